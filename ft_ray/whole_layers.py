"""ZeRO-3 takes a decoder layer as one: its weights are gathered, released and its gradients reduced together.

DeepSpeed hooks every module of a model, each time it is called and each time it is passed on the way back: on a GPU the
hooks of a small model take longer than its kernels. A module marked as a leaf has hooks of its own alone
(`deepspeed.utils.set_z3_leaf_modules`, made for mixtures of experts). Of a step of 24 layers on a CPU, 488 ms of 610
were hooks; 122 are left (benchmarks/README.md).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from ft_ray.errors import TrainingError

__all__ = ["MOST", "gather_whole_layers", "restore_linear", "taken"]

MOST = 1_000_000_000
"""Parameters of a layer that is taken as one, at most: DeepSpeed's own limit for a leaf (`Z3_MAX_LEAF_SIZE`)."""


def taken(deepspeed: Mapping[str, Any], layer: int) -> bool:
    """Whether layers of `layer` parameters (0: nobody knows) are, by a recipe's `deepspeed` mapping."""
    told = deepspeed.get("zero_optimization", {})
    return 0 < layer <= MOST and not {"leaf_module", "stage3_module_granularity_threshold"} & set(told)


def restore_linear() -> None:
    """Takes DeepSpeed's Linear out of torch again, where an earlier run of this process has put it there.

    DeepSpeed leaves it for good (`partition_parameters._enable_mem_efficient_linear`), and sets it anew where it is
    wanted.
    """
    module = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if module is not None:
        own = getattr(module.InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
        torch.nn.functional.linear = own or torch.nn.functional.linear


def gather_whole_layers(model: torch.nn.Module) -> int:
    """Marks the model's decoder layers, before DeepSpeed sets its hooks. Returns how many.

    None where two of them share a weight: its gradient would be reduced before the second one's part is there.
    """
    from deepspeed.utils import set_z3_leaf_module
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [
        module for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and 0 < _parameters(module) <= MOST
    ]  # fmt: skip
    inner = {id(part) for module in found for part in module.modules() if part is not module}
    outermost = [module for module in found if id(module) not in inner]
    users = Counter(id(parameter) for module in outermost for parameter in module.parameters())
    if any(count > 1 for count in users.values()):
        return 0
    for module in outermost:
        set_z3_leaf_module(module, True)
        module.register_forward_pre_hook(_check)
        _watch_first_pass(module)
    return len(outermost)


def _parameters(module: torch.nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def _watch_first_pass(module: torch.nn.Module) -> None:
    """Raises TrainingError where the layer is called twice before its first backward: like a shared weight."""
    calls = 0

    def called(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal calls
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:  # an evaluation, a recompute
            return
        calls += 1
        if calls > 1:
            raise TrainingError(_unfit(module, "it is called more than once in a forward pass"))

    def passed_back(*_: Any) -> None:
        counting.remove()
        ending.remove()

    counting, ending = module.register_forward_pre_hook(called), module.register_full_backward_hook(passed_back)


def _check(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
    """Gradients of a leaf are reduced when the gradient of its positional inputs is there: without one, too early."""
    if not torch.is_grad_enabled() or any(isinstance(one, torch.Tensor) and one.requires_grad for one in inputs):
        return
    raise TrainingError(_unfit(module, "its hidden states are no positional argument"))


def _unfit(module: torch.nn.Module, why: str) -> str:
    return (
        f"ZeRO-3 cannot take a {type(module).__name__} as one, because {why}: set "
        "deepspeed.zero_optimization.leaf_module to {} to gather its weights matrix by matrix."
    )
