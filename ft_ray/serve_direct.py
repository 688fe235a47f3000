"""Direct mode: HAProxy hands requests to the model's replicas, with no ingress process between.

`prepare` sets what Ray Serve reads when it is imported, so it comes before any import of Ray; this module imports
nothing of Ray until `application` is called. What each mode guarantees is in docs/operations.md.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_ray.env_vars import HAPROXY, environment
from ft_ray.errors import InputError

if TYPE_CHECKING:
    from ft_ray.served_model import Served

__all__ = ["CLIENT_TIMEOUT", "ENVIRONMENT", "FORWARD_BODY", "application", "check", "prepare"]

ENVIRONMENT = {
    HAPROXY: "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
    "VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "1",
}
"""What every process of a cluster needs for direct mode, from `ray start` on."""
FORWARD_BODY = "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY"
"""Set to 1 beside those where replicas.routing is prefix: costs the router a copy of every request."""

CLIENT_TIMEOUT = "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"
"""Seconds that HAProxy waits for more of a request; with Ray's own 3600, half-open connections stay for an hour.

It does not count while a replica is silent: an answer may take longer. It bounds a client that stops reading, too.
"""
_CLIENT_SECONDS = "60"


# HAProxy takes socket paths of 97 bytes, and Ray puts the 56 digits of a node's id into them.
_LONGEST_TMP = 11


@contextlib.contextmanager
def prepare() -> Iterator[None]:
    """Direct mode for a private Ray started inside: variables, and ports and files of HAProxy that nobody else has.

    HAProxy's own defaults (8404, 9101, /tmp/haproxy-serve) collide with those of any other Ray on the machine.
    """
    root = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="ftr-ha-", dir=root if len(root) <= _LONGEST_TMP else "/tmp"))
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(2):
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            ports.append(str(probe.getsockname()[1]))
    own = {
        **ENVIRONMENT,
        "RAY_SERVE_HAPROXY_STATS_PORT": ports[0],
        "RAY_SERVE_HAPROXY_METRICS_PORT": ports[1],
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        CLIENT_TIMEOUT: os.environ.get(CLIENT_TIMEOUT, _CLIENT_SECONDS),
    }
    try:
        with environment(own):
            yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check(routing: str = "load") -> None:
    """Raises InputError where Ray was not started for direct mode."""
    from ray.llm._internal.serve.constants import RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING
    from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY

    if routing == "prefix" and os.environ.get(FORWARD_BODY) != "1":
        raise InputError(
            f"replicas.routing: prefix in mode direct needs Ray started with {FORWARD_BODY}=1, so that the router sees "
            "prompts: set it before ray start, or use mode: ingress."
        )
    if not (RAY_SERVE_ENABLE_HA_PROXY and RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING):
        wanted = " ".join(f"{k}={v}" for k, v in ENVIRONMENT.items())
        raise InputError(f"mode: direct needs Ray started with {wanted}: set these before ray start, or use ingress.")


def application(model: Served, config: Any, name: str) -> Any:
    """The Serve application: the replicas are its ingress. `config` is the LLMConfig, `name` the deployment's.

    HAProxy gives a request to the replica with the fewest connections by itself. Ray's router for language models is
    there for prefixes only: HAProxy asks it first, over a new connection to a Python process for every request.
    """
    assert model.args.replicas is not None
    check(model.args.replicas.routing)
    from ray import serve
    from ray.llm._internal.serve.core.ingress.builder import _build_openai_ingress_request_router
    from ray.llm._internal.serve.core.server.builder import build_llm_deployment

    from ft_ray.serve_replica import DirectServer

    guards = {"models": [model.name], "limits": model.args.limits, "keys": model.args.keys}
    server = build_llm_deployment(
        config,
        deployment_cls=serve.ingress()(DirectServer),
        bind_kwargs={"guards": guards, "version": model.version},
        override_serve_options={"name": name},
    )
    if model.args.replicas.routing != "prefix":
        return server
    return server._with_ingress_request_router(_build_openai_ingress_request_router(server=server, llm_config=config))
