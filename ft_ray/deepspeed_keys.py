"""Which keys a recipe's `deepspeed` mapping may hold: those DeepSpeed 0.19 reads and no recipe key decides.

DeepSpeed ignores most top-level keys that it does not know, so a misspelt one would be lost without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ft_ray.errors import RecipeError
from ft_ray.strict_yaml import nearest

__all__ = ["check_deepspeed", "check_values"]

_KNOWN = (
    "activation_checkpointing", "aio", "checkpoint", "comms_logger", "communication_data_type", "compile",
    "csv_monitor", "data_types", "disable_allgather", "disable_python_gc", "dump_state", "flops_profiler",
    "gradient_allreduce_op", "gradient_predivide_factor", "log_level", "memory_breakdown", "prescale_gradients",
    "steps_per_print", "tensorboard", "timers", "wall_clock_breakdown", "wandb", "zero_force_ds_cpu_optimizer",
    "zero_optimization",
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
_OWNED = {
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
        faults += _offloads(zero)
    else:
        faults.append("zero_optimization is a mapping")
    aio = values.get("aio", {})
    faults += _faults(aio, "aio.", _AIO) if isinstance(aio, Mapping) else ["aio is a mapping"]
    if faults:
        raise ValueError("; ".join(faults))


def _faults(values: Mapping[str, Any], prefix: str, known: tuple[str, ...]) -> Iterator[str]:
    for key in values:
        owner = _OWNED.get(f"{prefix}{key}")
        if owner is not None:
            yield f"{prefix}{key} follows from the recipe: set {owner} instead"
        elif key not in known:
            yield f"DeepSpeed has no key {f'{prefix}{key}'!r} that can be set here{nearest(str(key), known)}"


def _offloads(zero: Mapping[str, Any]) -> Iterator[str]:
    """Offload to the host has a recipe key; how it is done has not, nor has offload to NVMe."""
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
    """Raises RecipeError for what DeepSpeed does not take in `zero_optimization`, which only it knows."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**values["zero_optimization"])
    except ValidationError as error:
        places = [(".".join(("deepspeed.zero_optimization", *map(str, e["loc"]))), e["msg"]) for e in error.errors()]
        raise RecipeError([f"{place}: {said}." for place, said in places]) from error
