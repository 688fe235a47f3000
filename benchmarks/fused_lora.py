"""A candidate for LoRA layers: the update is added by the matrix product itself.

PEFT's layer makes the product, scales it and adds it: three passes over a tensor as large as the layer's output, and it
turns the input to fp32 first where autocast turns it back. `addmm` does all of that in one.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

__all__ = ["use"]


def use(model: nn.Module) -> int:
    """Gives PEFT's plain LoRA layers this forward; returns how many. For one adapter, active and not merged."""
    from peft.tuners.lora import LoraLayer

    found = 0
    for module in model.modules():
        if isinstance(module, LoraLayer) and module.lora_A and not module.lora_variant:
            module.forward = types.MethodType(_forward, module)
            found += 1
    return found


def _forward(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    result = self.base_layer(x)
    (name,) = self.active_adapters
    low = linear(self.lora_dropout[name](x), self.lora_A[name].weight)
    up = self.lora_B[name].weight.t()
    out = torch.addmm(result.flatten(0, -2), low.flatten(0, -2), up, alpha=self.scaling[name])
    return out.view_as(result)
