"""What a training step takes of host memory on a CPU, beside the tensors that it would hold on a GPU too.

Sizes are read off the code that allocates: our frozen head (token_loss, one chunk of logits at a time) and TRL's fused
head in plain torch (trl 1.16, kernels/chunked_logprob: without Triton every intermediate of a tile is a tensor).
Little is added for holes: workers take their memory from jemalloc (`ray_session`), which leaves few. docs/cost.md sets
the results beside measured resident sets.
"""

from __future__ import annotations

__all__ = ["LOGITS_AT_ONCE", "PROCESS", "frozen_head", "packed", "rounded_up", "trained_head"]

LOGITS_AT_ONCE = 1 << 24
"""Logits that the frozen head makes at a time: 64 MiB in fp32."""

# A rank's interpreter with torch, transformers, TRL, PEFT and Ray before its model. `benchmarks/memory.py --device cpu`
# measures it as `process`.
PROCESS = 835 * 2**20


def frozen_head(tokens: int, vocab: int, hidden: int, element: int) -> int:
    """Bytes at the loss of an adapter's run, for `tokens` trained tokens.

    A chunk's logits in fp32 and, in logsumexp, their exponentials; in 16 bits also the logits before and the
    probabilities after, though neither is alive at that moment: a margin for what an allocator keeps; the matrix as
    oneDNN packs it for a product in 16 bits; the trained positions' hidden states and their gradient.
    """
    chunk = min(tokens, max(1, LOGITS_AT_ONCE // vocab)) * vocab
    narrow = element if element < 4 else 0
    return chunk * (2 * narrow + 4 + 4) + packed(vocab * hidden, element) + 2 * tokens * hidden * element


def packed(weights: int, element: int) -> int:
    """Bytes of a matrix as oneDNN lays it out anew for a product in 16 bits."""
    return weights * element if element < 4 else 0


def rounded_up(kept: int) -> int:
    """Bytes that jemalloc adds to `kept` activations, whose sizes change from step to step with the rows' lengths.

    It has four size classes in each doubling: a block wastes at most a fifth of itself, a quarter of what was asked for
    (jemalloc(3)); a fifth of what was asked for is taken. Blocks of one size touch nothing of that; blocks of changing
    sizes touch their class to its end.
    """
    return kept // 5


def trained_head(tokens: int, width: int) -> int:
    """Bytes beside the tile itself in the backward of TRL's head, `tokens` x `width` logits at a time.

    fp32: logits, scaled logits, log-probabilities, probabilities, gradient, the targets and their difference to the
    probabilities; and the targets as booleans.
    """
    return tokens * width * (7 * 4 + 1)
