"""What a training step takes of host memory on a CPU, beside the tensors that it would hold on a GPU too.

Sizes are read off the code that allocates: our frozen head (token_loss, one chunk of logits at a time), TRL's fused
head in plain torch (trl 1.16, kernels/chunked_logprob: without Triton every intermediate of a tile is a tensor), and
glibc's malloc. docs/cost.md sets the results beside measured resident sets.
"""

from __future__ import annotations

__all__ = ["LOGITS_AT_ONCE", "PROCESS", "frozen_head", "kept_free", "packed", "trained_head"]

LOGITS_AT_ONCE = 1 << 24
"""Logits that the frozen head makes at a time: 64 MiB in fp32."""

# A rank's interpreter with torch, transformers, TRL, PEFT and Ray before its model. `benchmarks/memory.py --device cpu`
# measures it as `process`.
PROCESS = 801 * 2**20

# glibc takes blocks of up to 32 MiB from its heap once one was freed (mallopt(3), M_MMAP_THRESHOLD); larger ones go
# back to the system when they are freed. Of the heap goes back what is free at its top beyond twice that.
_HEAP_BLOCK, _TRIM = 32 * 2**20, 64 * 2**20


def frozen_head(tokens: int, vocab: int, hidden: int, element: int) -> int:
    """Bytes at the loss of an adapter's run, for `tokens` trained tokens.

    A chunk's logits in fp32 and, in logsumexp, their exponentials; in 16 bits the logits before and the probabilities
    after, which malloc keeps; the matrix as oneDNN packs it for a product in 16 bits; the trained positions' hidden
    states and their gradient.
    """
    chunk = min(tokens, max(1, LOGITS_AT_ONCE // vocab)) * vocab
    narrow = element if element < 4 else 0
    return chunk * (2 * narrow + 4 + 4) + packed(vocab * hidden, element) + 2 * tokens * hidden * element


def packed(weights: int, element: int) -> int:
    """Bytes of a matrix as oneDNN lays it out anew for a product in 16 bits."""
    return weights * element if element < 4 else 0


def trained_head(tokens: int, width: int) -> int:
    """Bytes beside the tile itself in the backward of TRL's head, `tokens` x `width` logits at a time.

    fp32: logits, scaled logits, log-probabilities, probabilities, gradient, the targets and their difference to the
    probabilities; and the targets as booleans.
    """
    return tokens * width * (7 * 4 + 1)


def kept_free(changing: int, elsewhere: int, block: int, checkpoints: int, kept: int) -> int:
    """Bytes that malloc keeps free at the peak of a step.

    Of `changing` bytes, which come and go within a step, the top of the heap; and holes of what exists at another
    moment than the peak, `elsewhere` bytes in blocks of up to `block` each: something smaller lives above them. Each
    checkpointed layer's input lies in what a freed block of the layer before left, and splits it, so that the next
    layer's blocks need new heap: one more block for each of `checkpoints`. Without checkpoints `kept` activations
    live through the step, in sizes that change with the rows' lengths: half as many blocks are free as are in use
    (Knuth, TAOCP 1, section 2.5, the fifty-percent rule), here taken to be as large.
    """
    holes = elsewhere + checkpoints * block + (0 if checkpoints else kept // 2)
    return min(_TRIM, changing) + (holes if block <= _HEAP_BLOCK else 0)
