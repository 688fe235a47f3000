"""What a training step takes of host memory on a CPU, beside the tensors that it would hold on a GPU too.

Sizes are read off the code that allocates: our frozen head (token_loss, one chunk of logits at a time), TRL's fused
head in plain torch (trl 1.16, kernels/chunked_logprob: without Triton every intermediate of a tile is a tensor), and
glibc's malloc. docs/cost.md sets the results beside measured resident sets.
"""

from __future__ import annotations

__all__ = ["LOGITS_AT_ONCE", "PROCESS", "frozen_head", "kept_free", "packed", "trained_head"]

LOGITS_AT_ONCE = 1 << 24
"""Logits that the frozen head makes at a time: 64 MiB in fp32."""

# A rank's interpreter with torch, transformers, TRL and PEFT before its model. `benchmarks/memory.py --device cpu`
# measures it as `process`.
PROCESS = 753 * 2**20

# A freed block of up to 32 MiB raises glibc's mmap threshold to its size and the trim threshold to twice that
# (mallopt(3)): so much stays with the process at the top of its heap.
_TRIM = 64 * 2**20


def frozen_head(tokens: int, vocab: int, hidden: int, element: int) -> int:
    """Bytes at the loss of an adapter's run, for `tokens` trained tokens.

    A chunk's logits in the compute dtype, in fp32 and, in logsumexp, their exponentials; the matrix as oneDNN packs it
    for a product in 16 bits; the trained positions' hidden states and their gradient.
    """
    chunk = min(tokens, max(1, LOGITS_AT_ONCE // vocab)) * vocab
    narrow = element if element < 4 else 0
    return chunk * (narrow + 4 + 4) + packed(vocab * hidden, element) + 2 * tokens * hidden * element


def packed(weights: int, element: int) -> int:
    """Bytes of a matrix as oneDNN lays it out anew for a product in 16 bits."""
    return weights * element if element < 4 else 0


def trained_head(tokens: int, width: int) -> int:
    """Bytes beside the tile itself in the backward of TRL's head, `tokens` x `width` logits at a time.

    fp32: logits, scaled logits, log-probabilities, probabilities, gradient, the targets and their difference to the
    probabilities; and the targets as booleans.
    """
    return tokens * width * (7 * 4 + 1)


def kept_free(changing: int) -> int:
    """Bytes that malloc keeps of what comes and goes within a step."""
    return min(_TRIM, changing)
