"""Seconds of a training step on a GPU of the table.

A forward pass is 2N floating-point operations a token and a backward pass twice that (6ND, arXiv:2001.08361,
section 2.1), N the weights a token is multiplied with. A frozen base needs no weight gradients: 4N. Gradient
checkpointing adds one forward, 2N. Attention adds 2*s*(width) a token and layer for a causal pass over s tokens.
Small steps are bound by the host that launches kernels: measured on one H100, 165 ms a step for 16 layers and
350 ms for 32 at any size (LoRA on all projections, checkpointing), so 10.6 ms a layer.
"""

from __future__ import annotations

import math

from ft_ray.gpu_table import Gpu
from ft_ray.model_shape import ModelShape
from ft_ray.step_memory import Setting, trained_parameters

__all__ = ["flops_per_token", "sharing_gain", "step_seconds"]

LAUNCH = 0.0106  # seconds a layer and pass: measured with adapters and checkpointing
HOST_BANDWIDTH = 200e9  # bytes/s of one host's memory, for Adam on the CPU: assumed
ADAM_TRAFFIC = 28  # bytes a parameter that a step of Adam reads and writes: weight, two moments, gradient, fp32


def flops_per_token(shape: ModelShape, setting: Setting) -> float:
    """Floating-point operations that training spends on one token."""
    passes = (3 if setting.method == "full" else 2) + (1 if setting.checkpointing else 0)
    multiplied = 2 * shape.multiplied_weights
    attention = 2 * setting.length * shape.heads * shape.head_dim * shape.layers
    adapters = 0 if setting.method == "full" else 6 * trained_parameters(shape, setting) / setting.adapters
    # Attention kernels recompute scores in the backward: 2.5 forwards (arXiv:2205.14135), whatever is frozen.
    return passes * multiplied + (3.5 + (1 if setting.checkpointing else 0)) * attention + adapters


def step_seconds(shape: ModelShape, setting: Setting, gpu: Gpu) -> float:
    """Seconds of one optimizer step: all accumulated passes, communication and the update.

    Compute and launching overlap, so the longer one rules (joined smoothly, fourth powers); so do compute and
    communication. Volumes as in arXiv:1910.02054, section 7: an all-reduce moves 2 bytes a byte, ZeRO-3 gathers
    the parameters for each pass and scatters gradients.
    """
    compute = setting.tokens * flops_per_token(shape, setting) / (gpu.tflops * 1e12 * gpu.efficiency)
    launch = shape.layers * LAUNCH * (1 if setting.checkpointing else 0.75) * (0.5 if setting.method == "full" else 1)
    work = math.sqrt(math.hypot(compute**2, launch**2))
    world, e, trained = setting.world, setting.element, trained_parameters(shape, setting)
    others = (world - 1) / world
    passes = 3 if setting.checkpointing else 2
    moved = update = 0.0
    if setting.zero >= 3:
        moved = (passes * shape.parameters + trained) * e * others / (gpu.link_gbs * 1e9)
        if setting.offload_parameters:
            moved += passes * shape.parameters * e / world / (gpu.pcie_gbs * 1e9)
    elif world > 1:
        update += 2 * trained * e * others / (gpu.link_gbs * 1e9)
    if setting.offload_optimizer:
        update += 2 * trained * e / world / (gpu.pcie_gbs * 1e9) + ADAM_TRAFFIC * trained / HOST_BANDWIDTH
    return setting.accumulation * max(work, moved) + update


def sharing_gain(shape: ModelShape, setting: Setting, gpu: Gpu, adapters: int) -> float:
    """How many times faster `adapters` trials go in one forward over one base than one after the other."""
    alone = step_seconds(shape, setting.but(adapters=1), gpu)
    return adapters * alone / step_seconds(shape, setting.but(adapters=adapters), gpu)
