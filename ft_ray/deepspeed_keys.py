"""Which keys a recipe's `deepspeed` mapping may hold: those DeepSpeed 0.19 reads and no recipe key decides.

DeepSpeed ignores most keys that it does not know, so a misspelt one would be lost without a word; and a value that it
does not take raises in its engine on the workers, as if one of them were broken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ft_ray.errors import RecipeError
from ft_ray.strict_yaml import nearest

__all__ = ["check_deepspeed", "check_values"]

_KNOWN = (
    "aio", "comms_logger", "communication_data_type", "csv_monitor", "data_types", "disable_allgather",
    "disable_python_gc", "dump_state", "flops_profiler", "gradient_allreduce_op", "gradient_predivide_factor",
    "log_level", "memory_breakdown", "prescale_gradients", "steps_per_print", "tensorboard", "timers",
    "wall_clock_breakdown", "wandb", "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip
_ZERO = (
    "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "enable_sanity_checks",
    "ignore_unused_parameters", "leaf_module", "log_trace_cache_warnings", "memory_efficient_linear",
    "module_granularity_threshold", "offload_optimizer", "offload_param", "overlap_comm", "parameter_alignment",
    "reduce_bucket_size", "reduce_scatter", "round_robin_gradients", "stage3_allgather_sequential",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size",
    "stage3_use_all_reduce_for_fetch_params", "sub_group_size", "use_multi_rank_bucket_allreduce",
    "zero_hpz_partition_size", "zero_quantized_gradients", "zero_quantized_weights",
)  # fmt: skip
_AIO = (
    "block_size", "intra_op_parallelism", "overlap_events", "queue_depth", "single_submit", "use_gds",
)  # fmt: skip
# The other sections, as DeepSpeed's get_*_config functions and its pydantic models read them.
_MONITOR = ("enabled", "job_name", "output_path")
_SECTIONS = {
    "aio": _AIO,
    "comms_logger": ("debug", "enabled", "prof_all", "prof_ops", "verbose"),
    "csv_monitor": _MONITOR,
    "data_types": ("buffer_dtype", "grad_accum_dtype", "keep_in_fp32_modules"),
    "flops_profiler": (
        "detailed", "enabled", "module_depth", "output_file", "profile_step", "recompute_fwd_factor", "top_modules",
    ),
    "tensorboard": _MONITOR,
    "timers": ("throughput",),
    "timers.throughput": ("enabled", "synchronized"),
    "wandb": ("enabled", "group", "project", "team"),
}  # fmt: skip
_DTYPES = ("fp32", "bf16", "fp16")
_SWITCH = "true or false"
_COUNT = "a whole number"
_KINDS = {  # of those that DeepSpeed reads as they are
    **dict.fromkeys(
        (
            "aio.overlap_events", "aio.single_submit", "aio.use_gds", "disable_allgather", "disable_python_gc",
            "dump_state", "flops_profiler.detailed", "flops_profiler.enabled", "memory_breakdown",
            "prescale_gradients", "wall_clock_breakdown", "zero_force_ds_cpu_optimizer",
        ),
        _SWITCH,
    ),
    **dict.fromkeys(
        (
            "aio.block_size", "aio.intra_op_parallelism", "aio.queue_depth", "flops_profiler.module_depth",
            "flops_profiler.profile_step", "flops_profiler.top_modules", "steps_per_print",
        ),
        _COUNT,
    ),
    **dict.fromkeys(("flops_profiler.recompute_fwd_factor", "gradient_predivide_factor"), "a number"),
}  # fmt: skip
_FOREIGN = "is for DeepSpeed's own checkpoints and models, of which none is written here: leave it out"
_UPDATES = "puts an update of DeepSpeed's own in place of optim.name, and is not supported: leave it out"
_REFUSED = {
    **{
        f"zero_optimization.{key}": _FOREIGN
        for key in (
            "elastic_checkpoint", "gather_16bit_weights_on_model_save", "load_from_fp32_weights",
            "pipeline_loading_checkpoint", "stage3_gather_16bit_weights_on_model_save",
            "stage3_gather_fp16_weights_on_model_save",
        )
    },
    "zero_optimization.legacy_stage1": "is an engine of DeepSpeed's whose state nothing here reads: leave it out",
    "zero_optimization.save_muon_momentum_buffer_in_memory": _UPDATES,
    "zero_optimization.zenflow": _UPDATES,
    "zero_optimization.zero_quantized_nontrainable_weights": "is for frozen weights, of which a full run has none",
    "activation_checkpointing": "is for models that call DeepSpeed's own checkpointing: set gradient_checkpointing",
    "checkpoint": "is for DeepSpeed's own checkpoints, of which none is written here: leave it out",
    "compile": "is for engine.compile(), which nobody calls here: leave it out",
}
_OWNED = {
    "data_types.param_dtype": "precision",
    "train_batch_size": "batch.global",
    "train_micro_batch_size_per_gpu": "batch.per_device",
    "gradient_accumulation_steps": "batch.global and batch.per_device",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "zero_allow_untested_optimizer": "optim.name",
    "scheduler": "schedule",
    "bf16": "precision",
    "fp16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "zero_optimization.stage": "resources.sharding",
    "zero_optimization.cpu_offload": "resources.offload_optimizer",
    "zero_optimization.cpu_offload_param": "resources.offload_parameters",
}


def check_deepspeed(values: Mapping[str, Any]) -> None:
    """Raises ValueError, all faults in one sentence, for keys that are unknown or that the recipe decides."""
    faults = list(_faults(values, "", _KNOWN))
    zero = values.get("zero_optimization", {})
    if isinstance(zero, Mapping):
        faults += _faults(zero, "zero_optimization.", _ZERO)
        faults += _layouts(zero)
    else:
        faults.append("zero_optimization is a mapping")
    for section, known in _SECTIONS.items():
        inner: Any = values
        for key in section.split("."):
            inner = inner.get(key, {}) if isinstance(inner, Mapping) else {}
        faults += _faults(inner, f"{section}.", known) if isinstance(inner, Mapping) else [f"{section} is a mapping"]
    if faults:
        raise ValueError("; ".join(faults))


def _faults(values: Mapping[str, Any], prefix: str, known: tuple[str, ...]) -> Iterator[str]:
    for key in values:
        owner = _OWNED.get(f"{prefix}{key}")
        if owner is not None:
            yield f"{prefix}{key} follows from the recipe: set {owner} instead"
        elif f"{prefix}{key}" in _REFUSED:
            yield f"{prefix}{key} {_REFUSED[f'{prefix}{key}']}"
        elif key not in known:
            yield f"DeepSpeed has no key {f'{prefix}{key}'!r} that can be set here{nearest(str(key), known)}"
        elif (kind := _KINDS.get(f"{prefix}{key}")) is not None and not _is(values[key], kind):
            yield f"{prefix}{key} is {kind}, not {values[key]!r}"


def _is(value: Any, kind: str) -> bool:
    if kind == _SWITCH or isinstance(value, bool):
        return kind == _SWITCH and isinstance(value, bool)
    return isinstance(value, int) or (isinstance(value, float) and (kind != _COUNT or value.is_integer()))


def _layouts(zero: Mapping[str, Any]) -> Iterator[str]:
    """What lies where: offload to the host has a recipe key; how it is done has not, nor has offload to NVMe."""
    if zero.get("round_robin_gradients"):  # DeepSpeed 0.19.8: stage_1_and_2.py, _create_param_mapping
        yield (
            "zero_optimization.round_robin_gradients lays states out in an order that DeepSpeed's map of them does not "
            "follow, and checkpoints would be scrambled: leave it out"
        )
    how = zero.get("offload_optimizer")
    if isinstance(how, Mapping) and how.get("ratio", 1) != 1:  # an assertion on every worker: DeepSpeedCPUAdam alone
        yield (
            "zero_optimization.offload_optimizer.ratio shares the update out to DeepSpeed's own Adam, and optim.name "
            "is torch's here: leave it out"
        )
    if isinstance(how, Mapping) and how.get("super_offload"):
        yield f"zero_optimization.offload_optimizer.super_offload {_UPDATES}"
    for key, owner in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        value = zero.get(key)
        device = value.get("device") if isinstance(value, Mapping) else None
        if device == "cpu":
            yield f"zero_optimization.{key}.device cpu follows from the recipe: set resources.{owner}: true instead"
        elif device == "nvme" and key == "offload_param":
            yield (
                "zero_optimization.offload_param.device nvme is not supported, only the optimizer's states are swapped "
                "to NVMe: set resources.offload_parameters: true to keep the weights in host memory"
            )
        elif device == "nvme" and not (isinstance(value, Mapping) and value.get("nvme_path")):
            yield f"zero_optimization.{key}.device nvme needs {key}.nvme_path, a folder on a local disk of every worker"


def check_values(values: Mapping[str, Any]) -> None:
    """Raises RecipeError for values that DeepSpeed does not take, as its own models and functions say.

    `values` is its whole configuration, with what follows from the recipe.
    """
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime import config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
    from pydantic import ValidationError

    models = {
        "zero_optimization": DeepSpeedZeroConfig, "comms_logger": CommsLoggerConfig, "csv_monitor": CSVConfig,
        "tensorboard": TensorBoardConfig, "wandb": WandbConfig, "timers.throughput": DeepSpeedThroughputTimerConfig,
    }  # fmt: skip
    faults = []
    for section, model in models.items():
        inner: Any = values
        for key in section.split("."):
            inner = inner.get(key, {})
        try:
            model(**inner)
        except ValidationError as error:
            places = [(".".join((f"deepspeed.{section}", *map(str, e["loc"]))), e["msg"]) for e in error.errors()]
            faults += [f"{place}: {said}." for place, said in places]
        except (TypeError, ValueError) as error:  # of a validator
            faults.append(f"deepspeed.{section}: {str(error).rstrip('.')}.")
    for key, read in (
        ("communication_data_type", config.get_communication_data_type),
        ("gradient_allreduce_op", config.get_gradient_allreduce_op),
    ):
        try:
            read(values)
        except (AttributeError, ValueError) as error:  # None of it where it is no text
            faults.append(f"deepspeed.{key}: {str(error).rstrip('.')}.")
    if values.get("gradient_allreduce_op") == "sum":
        faults.append("deepspeed.gradient_allreduce_op: sum makes a step depend on how many work: leave it out.")
    types = values.get("data_types", {})
    for key in ("grad_accum_dtype", "buffer_dtype"):
        if types.get(key) is not None and types[key] not in _DTYPES:
            faults.append(f"deepspeed.data_types.{key}: DeepSpeed takes {', '.join(_DTYPES)}, not {types[key]!r}.")
    kept = types.get("keep_in_fp32_modules", "auto")
    if kept != "auto" and not (isinstance(kept, list) and all(isinstance(name, str) for name in kept)):
        faults.append(f"deepspeed.data_types.keep_in_fp32_modules: 'auto' or a list of names, not {kept!r}.")
    if faults:
        raise RecipeError(faults)
