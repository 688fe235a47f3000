"""The Ray Serve application of one model, on `ray.serve.llm`.

It departs from Ray's builder in what follows, each measured on 2 cores with SmolLM2:

- no task that "downloads" a local model: it costs a process with the whole stack (8 to 14 s, 0.5 GB);
- vLLM's engine and its only worker share a process (7 s and 0.6 GB less on a CPU), as in vLLM's own server. On a CPU
  vLLM forbids that where it wants to bind OpenMP threads itself; here the number of threads is set in the environment
  of the process. On a GPU Ray would start a task that works out the engine's configuration, then an actor for the
  worker, each with imports of its own; here the replica holds the GPU and does without both;
- no telemetry actor (0.25 GB), no CORS, and the guards of `gateway` around the ingress;
- an engine process never outlives its replica, however that ends.
"""

from __future__ import annotations

import os
from typing import Any

import ray
from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.serve.llm import LLMConfig, build_llm_deployment

from ft_ray import serve_direct
from ft_ray.env_vars import SERVE_DOORS
from ft_ray.precision import serving_dtype
from ft_ray.request_rules import BAD_WORD_TOKENS
from ft_ray.rollout_state import deployment_name, routing_to
from ft_ray.serve_args import ServeArgs
from ft_ray.serve_ingress import ingress_class
from ft_ray.serve_replica import Adapters, Fetch, Server
from ft_ray.serve_room import missing_room
from ft_ray.served_model import Served

__all__ = ["application"]

_ROUTERS = {"ingress": "PrefixRouter", "direct": "DirectPrefixRouter"}
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM compiles kernels for


def application(model: Served, *, device: str, cpus: int, deployment: str | None = None) -> Any:
    """The Serve application that hosts `model`, in a Serve deployment called `deployment`.

    `device` is 'cpu' or 'gpu'; `cpus`: cores of a node, for the number of OpenMP threads. Needs a connected Ray.
    """
    args, name = model.args, model.name
    assert args.replicas is not None
    # With one name for all versions Serve replaces replica after replica, where it would end all of another name first.
    called = deployment or deployment_name(name, None if args.mode == "direct" else model.version)
    config = LLMConfig(**_llm_config(model, device, cpus))
    if args.mode == "direct":
        return _gapless(serve_direct.application(model, config, called), model)
    replicas = build_llm_deployment(
        config,
        deployment_cls=Server,
        bind_kwargs={"model_downloader": Adapters} if model.adapters else None,
        override_serve_options={"name": called},
    )
    replicas = _gapless(replicas, model)
    adapters = [f"{name}:{adapter}" for adapter in model.adapters]
    ingress = ingress_class([name, *adapters], args.limits, args.keys)
    options: dict[str, Any] = {
        # Never zero: while the model is scaled to zero its guards answer, and requests wait here for a replica.
        "num_replicas": args.replicas.ingress,
        "max_surge_percent": 100,  # deployed again, new ones start first; they need no resources
        "user_config": routing_to(called, model.version, args),
        "max_ongoing_requests": _let_in(args),
        "ray_actor_options": {"num_cpus": 0},
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": args.limits.draining,
    }
    made: Any = serve.deployment(ingress, **options)
    return made.bind(
        llm_deployments={name: replicas},
        model_cards={name: to_model_metadata(name, config)},
        adapters=adapters,
        timeout=args.limits.timeout,
    )


def _let_in(args: ServeArgs) -> int:
    """Requests at once that Serve hands to a gateway, which refuses: above all that it lets in, slow senders included.

    Serve would have those above wait, without end and whether or not their clients do.
    """
    return max(4 * args.limits.concurrency, 64)


def _gapless(replicas: Any, model: Served) -> Any:
    """Has Serve, where this is deployed over itself, start a new replica before it stops an old one, if one more fits.

    Serve would wait without end for room that there is not: then it stops an old one first, as it does by default.
    """
    if ray.is_initialized() and not missing_room(replicas._bound_deployment, 1, model):
        # Of any number of replicas, rounded up to one.
        replicas._bound_deployment = replicas._bound_deployment.options(max_surge_percent=1)
    return replicas


def _llm_config(model: Served, device: str, cpus: int) -> dict[str, Any]:
    args = model.args
    engine, replicas, sampling = args.engine, args.replicas, args.sampling
    assert replicas is not None and sampling is not None
    compiled = engine.compiled if engine.compiled is not None else device == "gpu"
    kwargs: dict[str, Any] = {
        "dtype": serving_dtype(engine.dtype, device),
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
        # Here it goes to Ray's log files. ERROR is what the command line sets to keep its own process quiet.
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "INFO").replace("ERROR", "INFO"),
        "DO_NOT_TRACK": "1",
        # Of one request. vLLM's 1,024 are fewer than the guards let through, and one too many ends a GPU's engine.
        "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS": str(BAD_WORD_TOKENS),
        **SERVE_DOORS,
    }
    if engine.cache is not None:
        env |= {
            "VLLM_CACHE_ROOT": engine.cache,
            "TRITON_CACHE_DIR": f"{engine.cache}/triton",
            "FLASHINFER_WORKSPACE_BASE": engine.cache,  # else the sampler's kernels are compiled at every start
        }
    if engine.loading != "auto":
        kwargs["load_format"] = engine.loading
    if engine.kv_cache_gib is not None or device == "cpu":
        kwargs["kv_cache_memory_bytes"] = int((engine.kv_cache_gib or 1) * 2**30)
    if engine.tool_parser is not None:
        kwargs |= {"enable_auto_tool_choice": True, "tool_call_parser": engine.tool_parser}
    if device == "cpu":
        threads = max(1, cpus - 1) if engine.threads == "auto" else engine.threads
        env |= {"OMP_NUM_THREADS": str(threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        placement: dict[str, Any] = {
            "accelerator_config": {"kind": "cpu"},
            "placement_group_config": {"bundles": [{"CPU": 1}]},
        }
        resources = {"num_cpus": 0}
    else:
        kwargs |= {"tensor_parallel_size": engine.tensor_parallel, "gpu_memory_utilization": engine.gpu_memory}
        placement = {"accelerator_type": engine.accelerator} if engine.accelerator else {}
        resources = {"num_cpus": 1}
        if engine.tensor_parallel == 1:  # the replica holds the GPU: its bundle gets what the replica asks for added
            placement |= {"accelerator_config": {"kind": "gpu"}, "placement_group_config": {"bundles": [{"CPU": 1}]}}
            resources = {"num_cpus": 0, "num_gpus": 1}
    if model.adapters:
        most = min(engine.max_adapters, len(model.adapters))
        kwargs |= {
            "enable_lora": True,
            "max_loras": most,
            "max_lora_rank": next(r for r in _RANKS if r >= model.rank),
        }
        placement["lora_config"] = {"max_num_adapters_per_replica": most}
    routing: dict[str, Any] = {}
    if replicas.routing == "prefix":
        # Its own default never looks at the load: one popular prefix would keep a single replica busy.
        routing["request_router_config"] = {
            "request_router_class": f"ft_ray.prefix_router.{_ROUTERS[model.args.mode]}",
            "request_router_kwargs": {"imbalanced_threshold": max(1, replicas.max_ongoing // 8)},
        }
    return {
        "model_loading_config": {"model_id": model.name, "model_source": model.source},
        "engine_kwargs": kwargs,
        "runtime_env": {"env_vars": env},
        "callback_config": {
            "callback_class": Fetch,
            "callback_kwargs": {
                "source": model.source, "tree_hash": model.tree_hash, "version": model.version, "cache": engine.cache,
                "adapters": model.adapters, "adapter_hashes": model.adapter_hashes,
            },
        },
        # Ray waits 50 ms for more tokens before it sends the first (ray #59681).
        "experimental_configs": {"stream_batching_interval_ms": 0},
        "deployment_config": {
            "ray_actor_options": resources,
            # Where a replica answers HTTP itself its gateway refuses and Serve does not queue, as in the ingress.
            "max_ongoing_requests": _let_in(args) if args.mode == "direct" else replicas.max_ongoing,
            "autoscaling_config": {
                "min_replicas": replicas.min,
                "max_replicas": replicas.max,
                "initial_replicas": max(1, replicas.min),
                "target_ongoing_requests": replicas.target_ongoing,
                "upscale_delay_s": replicas.upscale_delay,
                "downscale_delay_s": replicas.downscale_delay,
                # Serve decides on the mean of the last 30 seconds, reported every 10: slower than the delays ask for.
                "look_back_period_s": min(30.0, max(1.0, replicas.upscale_delay)),
                "metrics_interval_s": min(10.0, max(0.5, replicas.upscale_delay / 2)),
            },
            "health_check_timeout_s": 30,
            # Looks twice a second whether all requests are answered, for as long as one may take, then stops.
            "graceful_shutdown_wait_loop_s": 0.5,
            "graceful_shutdown_timeout_s": args.limits.draining,
            **routing,
        },
        **placement,
    }
