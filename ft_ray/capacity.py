"""What fits beside the base: adapters of a sweep that share it, and requests of an endpoint that serves it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from ft_ray.gpu_table import Gpu
from ft_ray.model_shape import ModelShape, lora_parameters
from ft_ray.recipe import Recipe
from ft_ray.recipe_sections import SERVED_LENGTH
from ft_ray.step_memory import CONTEXT, FRAGMENTED, Setting, layer_bytes, memory, weight_bytes
from ft_ray.step_time import sharing_gain

__all__ = ["ServingPlan", "SweepPlan", "adapter_slot_bytes", "serving", "sweep"]

# vLLM's own default of gpu_memory_utilization, and what its profiling run and CUDA graphs take of that: assumed.
SERVED_SHARE, SERVED_WORKING = 0.92, int(1.5 * 2**30)
MOST_ADAPTERS = 64


class SweepPlan(BaseModel):
    """A sweep on a shared base. `gains` maps adapters in one forward to how many times faster than one by one."""

    model_config = ConfigDict(frozen=True)

    gpu: str
    slot_bytes: int
    tokens_per_adapter: int
    adapters_at_once: int
    gains: dict[int, float]
    worthwhile: bool


class ServingPlan(BaseModel):
    """One replica on one card. `request_bytes` is the cache of a request of `length` tokens."""

    model_config = ConfigDict(frozen=True)

    gpu: str
    weights: int
    kv_bytes_per_token: int
    length: int
    request_bytes: int
    concurrent_requests: int


def adapter_slot_bytes(shape: ModelShape, setting: Setting) -> int:
    """Device bytes that one more adapter of `setting.adapter` takes in the shared base, its tokens included.

    The engine keeps weights, gradients and two moments in fp32; a forward in 16 bits rounds the weights layer by layer,
    and keeps what it rounded for the backward unless the layer is checkpointed.
    """
    setting = setting.but(adapters=1, adapter_bytes=setting.element)
    states = 16 + (setting.element if setting.element < 4 and not setting.checkpointing else 0)
    kept, transient = layer_bytes(shape, setting)
    checkpoints = shape.layers * shape.hidden * setting.element
    per_token = checkpoints + kept + transient if setting.checkpointing else shape.layers * kept + transient
    activations = int(setting.tokens * per_token * (1 + FRAGMENTED))
    return lora_parameters(shape, setting.adapter) * states + activations


def sweep(shape: ModelShape, setting: Setting, gpu: Gpu) -> SweepPlan | None:
    """Adapters of the recipe's rank that fit one card at once, and the gain; None for full fine-tuning.

    The gain is that of steps which the host's launching bounds (docs/cost.md: 7.8x for 8 adapters of a 1B model
    at 512 tokens, 1.5x for 8B at 2,048, nothing where one adapter fills the card).
    """
    if setting.method == "full":
        return None
    alone = setting.but(world=1, zero=0, accumulation=1, adapters=1)
    slot = adapter_slot_bytes(shape, alone)
    fixed = weight_bytes(shape, alone) + memory(shape, alone).working + CONTEXT
    fit = max(0, min(MOST_ADAPTERS, (gpu.memory - fixed) // slot))
    counts = sorted({k for k in (2, 4, 8, 16, 32) if k <= fit} | ({fit} if fit > 1 else set()))
    gains = {k: round(sharing_gain(shape, alone, gpu, k), 2) for k in counts}
    return SweepPlan(
        gpu=gpu.name,
        slot_bytes=slot,
        tokens_per_adapter=alone.tokens,
        adapters_at_once=fit,
        gains=gains,
        worthwhile=max(gains.values(), default=1.0) >= 1.2,
    )


def serving(shape: ModelShape, recipe: Recipe, gpu: Gpu) -> ServingPlan:
    """Requests of full length that one card holds at once beside 16-bit merged weights (arXiv:2309.06180)."""
    length = recipe.serving.max_length or min(shape.max_positions or SERVED_LENGTH, SERVED_LENGTH)
    weights = shape.parameters * (4 if recipe.precision == "fp32" else 2)
    request = shape.kv_bytes(length)
    free = int(gpu.memory * SERVED_SHARE) - weights - SERVED_WORKING
    return ServingPlan(
        gpu=gpu.name,
        weights=weights,
        kv_bytes_per_token=shape.kv_bytes(1),
        length=length,
        request_bytes=request,
        concurrent_requests=max(0, free // request),
    )
