"""The Ray Serve application of one model: our use of `ray.serve.llm`, and its replicas on vLLM.

Every import of Ray's and vLLM's internals is in this module; both are pinned. It departs from Ray's builder
in what follows, each measured on 2 cores with SmolLM2:

- no task that "downloads" a local model: it costs a process with the whole stack (8 to 14 s, 0.5 GB);
- on a CPU, vLLM's engine and its only worker share a process (7 s and 0.6 GB less). vLLM forbids that where it
  wants to bind OpenMP threads itself; here the number of threads is set in the environment of the process;
- no telemetry actor (0.25 GB), no CORS, and the guards of `gateway` around the ingress;
- an engine process never outlives its replica, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from typing import Any

import psutil
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
from ray.llm._internal.serve.core.configs.openai_api_models import ModelCard, ModelList, to_model_metadata
from ray.llm._internal.serve.core.ingress.ingress import OpenAiIngress, make_fastapi_ingress
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.llm._internal.serve.utils.server_utils import get_response_for_error
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.deployment import LLMServer
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ft_ray.errors import ServingError
from ft_ray.gateway import Gateway
from ft_ray.served_model import Served, split

__all__ = ["Server", "application"]

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


class Fetch(CallbackBase):
    """Puts the model on the replica's own disk and checks every file before vLLM reads it."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False
        engine: Any = self.llm_config.get_engine_config()
        engine.hf_model_id = await asyncio.to_thread(_fetch, self.kwargs["source"])


def _fetch(address: str) -> str:
    store, tree = split(address)
    if store.is_local and store.tree(tree) is not None and (faults := store.verify(tree)):
        raise ServingError(f"{faults[0]}: it is not what was registered; nothing is served.")
    return str(store.local(tree))  # a download is checked as it is made


class Adapters:
    """Finds adapters by the name after the colon of `model: BASE:NAME`; Ray's own loader takes remote ones only."""

    def __init__(self, **_: Any) -> None:
        self._found: dict[str, DiskMultiplexConfig] = {}

    async def load_model_from_config(self, lora_model_id: str, llm_config: LLMConfig) -> DiskMultiplexConfig:
        if lora_model_id not in self._found:
            addresses = llm_config.callback_config.callback_kwargs["adapters"]
            folder = await asyncio.to_thread(_fetch, addresses[lora_model_id.partition(":")[2]])
            number = len(self._found) + 1
            self._found[lora_model_id] = DiskMultiplexConfig(
                model_id=lora_model_id, max_total_tokens=None, local_path=folder, lora_assigned_int_id=number
            )
        return self._found[lora_model_id]


class Engine(VLLMEngine):
    """vLLM with its worker inside the engine's process where there is one worker on a CPU."""

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        engine_args, frontend_args, config = super()._prepare_engine_config(callback_ctx)
        if config.device_config.device_type == "cpu" and config.parallel_config.world_size == 1:
            config.parallel_config.distributed_executor_backend = "uni"
        return engine_args, frontend_args, config


class Server(LLMServer):
    """One replica: starts the engine, and ends it with itself."""

    _default_engine_cls: Any = Engine

    async def _start_engine(self) -> None:
        me = psutil.Process()
        before = {p.pid for p in me.children(recursive=True)}
        engine: Any = self.engine
        await engine.start()
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

    async def __del__(self) -> None:
        engine: Any = getattr(self, "engine", None)
        with contextlib.suppress(Exception):
            engine._engine_client.shutdown()
        await super().__del__()


class Ingress(OpenAiIngress):
    """Ray's OpenAI routes, which list the adapters as well."""

    def __init__(self, *, adapters: list[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._adapters = adapters

    async def model(self, model_id: str) -> ModelCard | None:
        if model_id in self._adapters:
            return self._model_cards[model_id.partition(":")[0]].model_copy(update={"id": model_id})
        return await super().model(model_id)

    async def models(self) -> ModelList:
        return ModelList(data=[await self.model(name) for name in [*self._model_cards, *self._adapters]])


_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM compiles kernels for

_ROUTES: dict[str, Any] = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "completions": lambda app: app.post("/v1/completions"),
    "chat": lambda app: app.post("/v1/chat/completions"),
}


def application(model: Served, *, device: str, cpus: int) -> Any:
    """The Serve application that hosts `model`.

    `device` is 'cpu' or 'gpu'; `cpus`: cores of a node, for the number of OpenMP threads. Needs a connected Ray.
    """
    args, name = model.args, model.name
    assert args.replicas is not None
    config = LLMConfig(**_llm_config(model, device, cpus))
    replicas = build_llm_deployment(
        config, deployment_cls=Server, bind_kwargs={"model_downloader": Adapters} if model.adapters else None
    )
    adapters = [f"{name}:{adapter}" for adapter in model.adapters]
    app = FastAPI(
        title="ft-ray",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[
            Middleware(Gateway, limits=args.limits, keys=args.keys, models=[name, *adapters]),
            Middleware(_Errors),
        ],
    )
    for kind in (HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _openai_error)
    ingress = make_fastapi_ingress(Ingress, endpoint_map=_ROUTES, app=app)
    options: dict[str, Any] = {
        "num_replicas": args.replicas.ingress,
        "max_ongoing_requests": max(2 * args.limits.concurrency, 64),  # the gateway refuses, Serve does not queue
        "ray_actor_options": {"num_cpus": 0},
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": 120,
    }
    if args.replicas.min == 0:
        del options["num_replicas"]
        options["autoscaling_config"] = {"min_replicas": 0, "max_replicas": args.replicas.ingress}
    deployment: Any = serve.deployment(ingress, **options)
    return deployment.bind(
        llm_deployments={name: replicas}, model_cards={name: to_model_metadata(name, config)}, adapters=adapters
    )


class _Errors:
    """ASGI middleware: whatever a route raises becomes an error of OpenAI's shape.

    Starlette handles the classes it has handlers for, but leaves `Exception` to a layer outside of all
    middleware, which the gateway could not add its headers to. vLLM's errors for bad requests arrive here.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            await (await _openai_error(Request(scope), error))(scope, receive, send)


async def _openai_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        first = (error.errors() or [{"msg": "invalid request", "loc": ()}])[0]
        # The offending value is not repeated: it may be a prompt.
        place = ".".join(str(p) for p in first["loc"] if p != "body")
        content = {"message": f"{first['msg']} ({place})", "type": "invalid_request_error", "param": place or None}
        return JSONResponse({"error": {**content, "code": "invalid_value"}}, status_code=422)
    found = get_response_for_error(error, request.headers.get("x-request-id", ""))
    return JSONResponse(found.model_dump(), status_code=found.error.code)


def _llm_config(model: Served, device: str, cpus: int) -> dict[str, Any]:
    args = model.args
    engine, replicas, sampling = args.engine, args.replicas, args.sampling
    assert replicas is not None and sampling is not None
    compiled = engine.compiled if engine.compiled is not None else device == "gpu"
    kwargs: dict[str, Any] = {
        "dtype": engine.dtype,
        "max_model_len": engine.max_length,
        "max_num_seqs": engine.max_sequences,
        "enforce_eager": not compiled,
        "trust_remote_code": engine.trust_remote_code,
        # Defaults come from the arguments, never silently from the model's generation_config.json; its EOS ids
        # are still read.
        "generation_config": "vllm",
        "override_generation_config": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": args.limits.max_tokens,  # the default, and a cap
        },
    }
    env = {
        "HF_HUB_OFFLINE": "1",  # everything is in the folder
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "RAYLLM_ENABLE_REQUEST_PROMPT_LOGS": "0",
    }
    if device == "cpu":
        threads = max(1, cpus - 1) if engine.threads == "auto" else engine.threads
        kwargs["kv_cache_memory_bytes"] = int(engine.kv_cache_gib * 2**30)
        env |= {"OMP_NUM_THREADS": str(threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        placement: dict[str, Any] = {
            "accelerator_config": {"kind": "cpu"},
            "placement_group_config": {"bundles": [{"CPU": 1}]},
        }
    else:
        kwargs |= {"tensor_parallel_size": engine.tensor_parallel, "gpu_memory_utilization": engine.gpu_memory}
        placement = {"accelerator_type": engine.accelerator} if engine.accelerator else {}
    if model.adapters:
        most = min(engine.max_adapters, len(model.adapters))
        kwargs |= {
            "enable_lora": True,
            "max_loras": most,
            "max_lora_rank": next(r for r in _RANKS if r >= model.rank),
        }
        placement["lora_config"] = {"max_num_adapters_per_replica": most}
    return {
        "model_loading_config": {"model_id": model.name, "model_source": model.source},
        "engine_kwargs": kwargs,
        "runtime_env": {"env_vars": env},
        "callback_config": {
            "callback_class": Fetch,
            "callback_kwargs": {"source": model.source, "adapters": model.adapters},
        },
        # Ray waits 50 ms for more tokens before it sends the first (ray #59681).
        "experimental_configs": {"stream_batching_interval_ms": 0},
        "deployment_config": {
            "ray_actor_options": {"num_cpus": 0 if device == "cpu" else 1},
            "max_ongoing_requests": replicas.max_ongoing,
            "autoscaling_config": {
                "min_replicas": replicas.min,
                "max_replicas": replicas.max,
                "initial_replicas": max(1, replicas.min),
                "target_ongoing_requests": replicas.target_ongoing,
                "upscale_delay_s": replicas.upscale_delay,
                "downscale_delay_s": replicas.downscale_delay,
            },
            "health_check_timeout_s": 30,
            # Looks twice a second whether all requests are answered, for two minutes at most, then stops.
            "graceful_shutdown_wait_loop_s": 0.5,
            "graceful_shutdown_timeout_s": 120,
        },
        **placement,
    }
