"""The loss of tokens through a frozen output head, and the clipping of its gradient.

Clipping is that of `torch.nn.utils.clip_grad_norm_`, so that a run alone and the same run on a shared base take the
same steps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["clip_factor", "token_losses"]


def clip_factor(norm: float, max_norm: float) -> float:
    """What a gradient of `norm` is multiplied with so that its norm is at most `max_norm`; 0 turns clipping off."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0


def token_losses(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, *, budget: int
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of each token through a frozen output head, `budget` logits at a time.

    hidden [N, d], labels [N], weight [V, d]; scale [N] is what each token's loss counts in the objective (one over its
    adapter's trained tokens). Returns the unscaled losses [N] in fp32 and, where scale is given, the objective's
    gradient to hidden [N, d], computed chunk by chunk beside the loss: no more than `budget` logits ever exist.
    """
    rows = max(1, budget // weight.shape[0])
    if hidden.is_cuda and rows > 128:
        rows -= rows % 128  # whole tiles of the matrix product
    losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    grad = torch.empty_like(hidden) if scale is not None else None
    with torch.no_grad():
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = functional.linear(hidden[part], weight, bias).float()
            picked = labels[part, None]
            if logits.is_cuda:  # one kernel, where the other way is five
                logits = functional.log_softmax(logits, 1)
                losses[part] = -logits.gather(1, picked).squeeze(1)
            else:  # one buffer less, and a CPU's results as they were
                normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
                losses[part] = (normaliser - logits.gather(1, picked)).squeeze(1)
                logits.sub_(normaliser)
            if grad is not None and scale is not None:
                probabilities = logits.exp_()
                probabilities.scatter_add_(1, picked, probabilities.new_full(picked.shape, -1.0))
                probabilities.mul_(scale[part, None])
                torch.mm(probabilities.to(weight.dtype), weight, out=grad[part])
                del probabilities
            del logits  # before the next ones are made, else two chunks exist at once
    return losses, grad
