"""A frozen output head that is computed at the trained positions only, for training adapters on a CPU.

TRL's fused head skips untrained positions on GPUs, and computes every position elsewhere: with answers a
quarter of the tokens, that is a third of a step of a small model on a CPU. The loss is the same.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ft_ray.cpu_memory import LOGITS_AT_ONCE
from ft_ray.token_loss import token_losses

__all__ = ["CompactOutput", "add_compact_head"]

_SCALED = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


@dataclass
class CompactOutput:
    """What TRL's loss reads of a forward pass, for the N trained positions; accuracy and entropy are not known."""

    log_probs: Tensor
    label_mask: Tensor
    entropy: Tensor
    is_top1: Tensor
    aux_loss: Tensor | None = None


class _FrozenHeadLoss(torch.autograd.Function):
    """hidden [N, d] -> -log p of the labels [N]. The gradient is taken tile by tile in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scale = torch.ones(len(hidden), dtype=torch.float32, device=hidden.device) if ctx.needs_input_grad[0] else None
        losses, gradient = token_losses(hidden, labels, weight, bias, scale, budget=LOGITS_AT_ONCE)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # A token's loss depends on its own position alone, so the chain rule is a scaling of rows.
        return outer[0][:, None].to(gradient.dtype) * gradient, None, None, None


def add_compact_head(model: Any) -> None:
    """Makes `model(..., labels=labels, fused_lm_head=True)` return a CompactOutput; other calls are unchanged.

    `model` is a causal language model whose fused head TRL has already added.
    """
    original = model.forward
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    scaled = any(getattr(config, k, None) not in (None, 1.0) for k in _SCALED)
    trained = any(p.requires_grad for p in head.parameters())
    if scaled or trained or getattr(config, "output_router_logits", None) is not None:
        return  # scaled or capped logits, a trained head, a router loss: TRL's way

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None or "shift_labels" in kwargs:
            return original(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        shifted = labels[:, 1:]
        mask = shifted != -100
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1][mask]
        weight = head.weight.to(hidden.dtype)
        losses: Tensor = _FrozenHeadLoss.apply(hidden, shifted[mask], weight, head.bias)  # type: ignore[no-untyped-call]
        unknown = torch.full_like(losses.detach(), torch.nan)
        return CompactOutput(log_probs=-losses, label_mask=mask, entropy=unknown, is_top1=unknown)

    model.forward = types.MethodType(forward, model)
