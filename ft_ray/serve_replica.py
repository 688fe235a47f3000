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

import contextlib
import subprocess
import sys
from typing import Any

import psutil
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.llm._internal.serve.core.ingress.ingress import OpenAiIngress, make_fastapi_ingress
from ray.llm._internal.serve.core.server.llm_server import LLMServer
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.llm._internal.serve.utils.server_utils import get_response_for_error
from ray.serve.llm import LLMConfig, build_llm_deployment
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ft_ray.errors import ServingError
from ft_ray.gateway import Gateway
from ft_ray.serve_args import ServeArgs
from ft_ray.storage import Store

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


class Fetch(CallbackBase):  # type: ignore[misc]
    """Puts the model on the replica's own disk and checks every file before vLLM reads it."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False
        parent, _, tree = self.kwargs["source"].rpartition("/")
        store = Store(parent)
        if store.tree(tree) is not None:
            faults = store.verify(tree) if store.is_local else []  # a download is checked as it is made
            if faults:
                raise ServingError(f"{faults[0]}: the model is not what was registered; nothing is served.")
        self.llm_config.get_engine_config().hf_model_id = str(store.local(tree))


class Engine(VLLMEngine):  # type: ignore[misc]
    """vLLM with its worker inside the engine's process where there is one worker on a CPU."""

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        engine_args, frontend_args, config = super()._prepare_engine_config(callback_ctx)
        if config.device_config.device_type == "cpu" and config.parallel_config.world_size == 1:
            config.parallel_config.distributed_executor_backend = "uni"
        return engine_args, frontend_args, config


class Server(LLMServer):  # type: ignore[misc]
    """One replica: starts the engine, and ends it with itself."""

    _default_engine_cls = Engine

    async def _start_engine(self) -> None:
        me = psutil.Process()
        before = {p.pid for p in me.children(recursive=True)}
        await self.engine.start()
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
        engine = getattr(self, "engine", None)
        with contextlib.suppress(Exception):
            engine._engine_client.shutdown()
        await super().__del__()


class Ingress(OpenAiIngress):  # type: ignore[misc]
    """Ray's OpenAI routes; the name shows in Serve's status."""


_ROUTES: dict[str, Any] = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "completions": lambda app: app.post("/v1/completions"),
    "chat": lambda app: app.post("/v1/chat/completions"),
}


def application(args: ServeArgs, *, name: str, source: str, device: str, cpus: int) -> Any:
    """The Serve application that hosts the model folder at `source` as `name`.

    `device` is 'cpu' or 'gpu'; `cpus`: cores of a node, for the number of OpenMP threads. `args` must be
    resolved: replicas, sampling and engine.max_length given. Needs a connected Ray.
    """
    assert args.replicas is not None
    config = LLMConfig(**_llm_config(args, name, source, device, cpus))
    model = build_llm_deployment(config, deployment_cls=Server)
    app = FastAPI(
        title="ft-ray",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[Middleware(Gateway, limits=args.limits, keys=args.keys, models=[name])],
    )
    for kind in (HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _openai_error)
    ingress = make_fastapi_ingress(Ingress, endpoint_map=_ROUTES, app=app)
    options: dict[str, Any] = {
        "num_replicas": args.replicas.ingress,
        "max_ongoing_requests": max(2 * args.limits.concurrency, 64),  # the gateway refuses, Serve does not queue
        "ray_actor_options": {"num_cpus": 0},
    }
    if args.replicas.min == 0:
        del options["num_replicas"]
        options["autoscaling_config"] = {"min_replicas": 0, "max_replicas": args.replicas.ingress}
    return serve.deployment(ingress, **options).bind(
        llm_deployments={name: model}, model_cards={name: to_model_metadata(name, config)}
    )


async def _openai_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        first = (error.errors() or [{"msg": "invalid request", "loc": ()}])[0]
        # The offending value is not repeated: it may be a prompt.
        place = ".".join(str(p) for p in first["loc"] if p != "body")
        content = {"message": f"{first['msg']} ({place})", "type": "invalid_request_error", "param": place or None}
        return JSONResponse({"error": {**content, "code": "invalid_value"}}, status_code=422)
    found = get_response_for_error(error, request.headers.get("x-request-id", ""))
    return JSONResponse(found.model_dump(), status_code=found.error.code)


def _llm_config(args: ServeArgs, name: str, source: str, device: str, cpus: int) -> dict[str, Any]:
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
        placement = {
            "accelerator_config": {"kind": "cpu"},
            "placement_group_config": {"bundles": [{"CPU": 1}]},
        }
    else:
        kwargs |= {"tensor_parallel_size": engine.tensor_parallel, "gpu_memory_utilization": engine.gpu_memory}
        placement = {"accelerator_type": engine.accelerator} if engine.accelerator else {}
    return {
        "model_loading_config": {"model_id": name, "model_source": source},
        "engine_kwargs": kwargs,
        "runtime_env": {"env_vars": env},
        "callback_config": {"callback_class": Fetch, "callback_kwargs": {"source": source}},
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
        },
        **placement,
    }
