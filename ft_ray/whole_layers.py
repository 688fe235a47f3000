"""ZeRO-3 takes a decoder layer as one: its weights are gathered, released and its gradients reduced together.

DeepSpeed hooks every module of a model, each time it is called and each time it is passed on the way back: on a GPU the
hooks of a small model take longer than its kernels. A module marked as a leaf has hooks of its own alone
(`deepspeed.utils.set_z3_leaf_modules`, made for mixtures of experts). Of a step of 24 layers on a CPU, 488 ms of 610
were hooks; 122 are left (benchmarks/README.md).
"""

from __future__ import annotations

from typing import Any

import torch

from ft_ray.errors import TrainingError

__all__ = ["MOST", "gather_whole_layers"]

MOST = 1_000_000_000
"""Parameters of a layer that is taken as one, at most: DeepSpeed's own limit for a leaf (`Z3_MAX_LEAF_SIZE`)."""


def gather_whole_layers(model: torch.nn.Module) -> int:
    """Marks the model's decoder layers, before DeepSpeed sets its hooks. Returns how many."""
    from deepspeed.utils import set_z3_leaf_module
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [
        module for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and 0 < _parameters(module) <= MOST
    ]  # fmt: skip
    inner = {id(part) for module in found for part in module.modules() if part is not module}
    outermost = [module for module in found if id(module) not in inner]
    for module in outermost:
        set_z3_leaf_module(module, True)
        module.register_forward_pre_hook(_check)
    return len(outermost)


def _parameters(module: torch.nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def _check(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
    """Gradients of a leaf are reduced when the gradient of its positional inputs is there: without one, too early."""
    if not torch.is_grad_enabled() or any(isinstance(one, torch.Tensor) and one.requires_grad for one in inputs):
        return
    raise TrainingError(
        f"ZeRO-3 cannot take a {type(module).__name__} as one, because its hidden states are no positional argument: "
        "set deepspeed.zero_optimization.leaf_module to {} to gather its weights matrix by matrix."
    )
