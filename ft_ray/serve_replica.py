"""A replica of the endpoint: fetches and checks its model, runs vLLM, and leaves no process behind.

With `serve_ingress` and `serve_app` the only modules that import Ray's and vLLM's internals; both are pinned.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine, _normalize_vllm_engine_kwargs
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import FrontendArgs
from vllm.usage.usage_lib import UsageContext

from ft_ray import vllm_frontend
from ft_ray.direct_routes import DirectRoutes, fit_ray
from ft_ray.errors import ServingError, StorageError
from ft_ray.first_answer import first_answer
from ft_ray.gateway import VERSION, Gateway
from ft_ray.manifest import key_of
from ft_ray.serve_metrics import RequestMetrics, say_version
from ft_ray.served_model import split

__all__ = ["Adapters", "DirectServer", "Fetch", "Server", "guarded", "usable"]

log = logging.getLogger("ft_ray.serving")

# Ends the engine process when the replica is gone: the pipe closes even when the replica was killed.
_WATCH = (
    "import os,sys,time,signal\n"
    "pids=[int(p) for p in sys.argv[1:]]\n"
    "sys.stdin.buffer.read()\n"
    "for s,wait in ((signal.SIGTERM,3),(signal.SIGKILL,0)):\n"
    "    for p in pids:\n"
    "        try: os.kill(p,s)\n"
    "        except OSError: pass\n"
    "    time.sleep(wait)\n"
)

_LOOK_SECONDS = 0.02  # every question that comes between the engine's death and the replica's fails


class Fetch(CallbackBase):
    """Puts the model on the replica's own disk and checks every file before vLLM reads it."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False
        if cache := self.kwargs.get("cache"):
            usable(cache)
        engine: Any = self.llm_config.get_engine_config()
        engine.hf_model_id = await asyncio.to_thread(_fetch, self.kwargs["source"], self.kwargs.get("tree_hash", ""))


def usable(cache: str) -> None:
    """Raises ServingError where the folder `engine.cache` cannot be had, which vLLM would say late and at length."""
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise ServingError(
            f"engine.cache: {cache} cannot be written on this node ({error.strerror}): mount a volume there, or leave "
            "engine.cache out of the file."
        ) from error


def _fetch(address: str, tree_hash: str) -> str:
    """A local folder of the tree, whole and the one that was deployed; without `tree_hash` nobody recorded which.

    The record beside the files is not enough: who makes the tree again makes that anew, and a replica may start, or an
    adapter be asked for, days after the model was checked. Raises ServingError, or StorageError where it cannot be had.
    """
    store, tree = split(address)
    hashes = store.tree(tree)
    if tree_hash and (hashes is None or key_of(hashes) != tree_hash):
        raise ServingError(f"{store.address(tree)} is not what was deployed: it was made again since; deploy again.")
    if store.is_local and hashes is not None and (faults := store.verify(tree)):
        raise ServingError(f"{faults[0]}: it is not what was registered; nothing is served.")
    return str(store.local(tree))  # a download is checked as it is made


class Adapters:
    """Finds adapters by the name after the colon of `model: BASE:NAME`; Ray's own loader takes remote ones only."""

    def __init__(self, **_: Any) -> None:
        self._found: dict[str, DiskMultiplexConfig] = {}

    async def load_model_from_config(self, lora_model_id: str, llm_config: LLMConfig) -> DiskMultiplexConfig:
        """A download, kept by its content, is made once. A folder is compared each time that Ray has let it go."""
        known, name = llm_config.callback_config.callback_kwargs, lora_model_id.partition(":")[2]
        address = known["adapters"][name]
        found = self._found.get(lora_model_id)
        if found is not None and not split(address)[0].is_local:
            return found
        try:
            folder = await asyncio.to_thread(_fetch, address, known.get("adapter_hashes", {}).get(name, ""))
        except (ServingError, StorageError) as error:
            log.error("the adapter %s cannot be loaded: %s", name, error)
            remedy = "ask again" if type(error) is StorageError else "it has to be deployed again"
            raise _not_now(name, remedy) from None
        if found is None:
            found = self._found[lora_model_id] = DiskMultiplexConfig(
                model_id=lora_model_id, max_total_tokens=None, local_path=folder,
                lora_assigned_int_id=len(self._found) + 1,
            )  # fmt: skip
        return found


def _not_now(adapter: str, remedy: str) -> HTTPException:
    # By position: it crosses to the ingress' process, and Python makes it again from its positional arguments.
    return HTTPException(503, f"the adapter {adapter} cannot be loaded now: {remedy}.")


class Engine(VLLMEngine):
    """vLLM with its worker inside the engine's process where there is one worker."""

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        if self.llm_config.deployment_config["ray_actor_options"].get("num_gpus"):
            return self._on_own_gpu()
        engine_args, frontend_args, config = super()._prepare_engine_config(callback_ctx)
        if config.device_config.device_type == "cpu" and config.parallel_config.world_size == 1:
            config.parallel_config.distributed_executor_backend = "uni"
        return engine_args, frontend_args, config

    async def resolve_lora(self, disk_lora_model: DiskMultiplexConfig) -> None:
        try:
            await super().resolve_lora(disk_lora_model)
        except ValueError as error:  # what vLLM said of files that were whole a moment ago
            name = disk_lora_model.model_id.partition(":")[2]
            log.error("the adapter %s cannot be loaded: %s", name, error)
            raise _not_now(name, "ask again") from None

    def _on_own_gpu(self) -> Any:
        """The configuration, worked out here: this process sees its GPU, and Ray's own replica needs a task for it."""
        asked: Any = self.llm_config.get_engine_config()
        kwargs = _normalize_vllm_engine_kwargs(asked.get_initialization_kwargs())
        engine_args = AsyncEngineArgs(**{**kwargs, "distributed_executor_backend": "uni"})
        config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        return engine_args, FrontendArgs(**asked.frontend_kwargs), config


class Server(LLMServer):
    """One replica: starts the engine, and ends it with itself."""

    _default_engine_cls: Any = Engine

    async def _start_engine(self) -> None:
        me = psutil.Process()
        before = {p.pid for p in me.children(recursive=True)}
        engine: Any = self.engine
        vllm_frontend.fit()
        await engine.start()
        vllm_frontend.settle()
        started = [p.pid for p in me.children(recursive=True) if p.pid not in before]
        # Never read by us: its closing is the message. A session of its own, so that a signal to the group of
        # the replica does not end the watcher first.
        self._watcher = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _WATCH, *map(str, started)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # Every replica, however it came to be: started again, added by load, put in place of another version's.
        await first_answer(engine._engine_client, self._llm_config.model_id)
        self._say_version()
        self._mortal = asyncio.create_task(self._end_with(engine._engine_client))

    async def _end_with(self, client: Any) -> None:
        """Ends this process once vLLM's engine, a process of its own, is dead.

        A replica without an engine refuses at once, so that it is always the one with the fewest requests and gets all
        of them, until Serve has found it unhealthy three times, half a minute later. A process that ended is asked no
        more and replaced at Serve's next look.
        """
        while not client.errored:
            await asyncio.sleep(_LOOK_SECONDS)
        manager = getattr(client.engine_core.resources, "engine_manager", None)
        codes = [process.exitcode for process in getattr(manager, "processes", [])]
        log.error(
            "%s: vLLM's engine died (exit codes of its processes: %s): this replica ends, Serve starts another",
            self._llm_config.model_id,
            codes,
        )
        logging.shutdown()  # what handlers hold back is written; nothing else is left to be put in order
        os._exit(1)  # no exit handlers: vLLM's would wait for the engine

    async def check_health(self) -> None:
        await super().check_health()
        self._say_version()

    def _say_version(self) -> None:
        version = self._llm_config.callback_config.callback_kwargs["version"]
        say_version(self._llm_config.model_id, version, serve.get_replica_context().replica_id.unique_id)

    async def __del__(self) -> None:
        engine: Any = getattr(self, "engine", None)
        if mortal := getattr(self, "_mortal", None):
            mortal.cancel()  # from here on the engine ends because it is told to
        with contextlib.suppress(Exception):
            engine._engine_client.shutdown()
        await super().__del__()


class DirectServer(Server):
    """A replica that answers HTTP itself: vLLM's own routes inside the gateway, without vLLM's open CORS."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it, as it does LLMServer's
        self, llm_config: LLMConfig, *, guards: dict[str, Any], version: int | None, **kwargs: Any
    ) -> None:
        self._guards, self._version = guards, version
        fit_ray()
        await super().__init__(llm_config, **kwargs)

    async def __serve_build_asgi_app__(self) -> Any:
        parent: Any = super()
        return guarded(await parent.__serve_build_asgi_app__(), self._version, self._guards)


def guarded(app: Any, version: int | None, guards: dict[str, Any]) -> Any:
    """vLLM's app with the gateway around it and the short way to its routes inside, without vLLM's open CORS."""
    # Nor with its count of requests, which only /metrics would tell, and that answers nobody here; nor with Ray's
    # search for the adapter that a header names, which fails where there is none.
    unwanted = (CORSMiddleware.__name__, "PrometheusInstrumentatorMiddleware", "_ResolveLoRAMiddleware")
    app.user_middleware = [m for m in app.user_middleware if m.cls.__name__ not in unwanted]
    app.user_middleware.append(Middleware(DirectRoutes, routes_of=app))  # innermost
    app.middleware_stack = None  # vLLM has built it; it is built again at the first request
    app.add_middleware(_Versioned, version=str(version or ""))
    # Added last: outermost.
    app.add_middleware(Gateway, observer=RequestMetrics(), keep_body=True, named=True, **guards)
    return app


class _Versioned:
    """ASGI middleware: tells the gateway which version answers."""

    def __init__(self, app: Any, version: str) -> None:
        self._app, self._version = app, version

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope[VERSION] = self._version
        await self._app(scope, receive, send)
