"""Dropout whose masks are drawn where they are used and never stored: one kernel reads a row, draws and writes it.

A mask is a function of a seed (of an adapter, its step and a decoder layer), the Linear layer, the row and the column:
Philox 4x32-7, a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), as Triton
has it. A backward and a checkpoint's recompute draw the same again. Masks of sixteen adapters that were drawn for a
layer, compared and kept took a tenth of a step's time and a sixth of its activations on an 8B base
(benchmarks/README.md).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Seeds", "masked", "works"]

logger = logging.getLogger("ft_ray")

_BLOCK = 4096  # columns of a program: 8 runs of 512, since one call of Philox gives 128 bits and a column takes 16
_ROUNDS = 7  # the fewest that pass all of TestU01's tests (Salmon et al., table 2); the usual 10 are a margin


@dataclass(frozen=True)
class Seeds:
    """Of one Linear layer in one forward: `seeds` [K] int64 and `thresholds` [K] int32 of the adapters on the device.

    Of 65536 values of 16 bits those below an adapter's threshold drop a number: p is met to 8e-6. `layer` is a number
    that no other Linear layer of the same seeds has.
    """

    seeds: Tensor
    thresholds: Tensor
    layer: int


@triton.jit  # type: ignore[untyped-decorator]
def _drop(x, out, seeds, thresholds, layer, rows, columns, block: tl.constexpr, rounds: tl.constexpr):  # type: ignore[no-untyped-def]
    row, tile = tl.program_id(0), tl.program_id(1)
    run: tl.constexpr = block // 8
    lane = tl.arange(0, run)
    adapter, at = row // rows, row % rows
    seed, threshold = tl.load(seeds + adapter), tl.load(thresholds + adapter).to(tl.uint32)
    zero = lane * 0
    words = tl.philox(seed, tile * run + lane, zero + at, zero + layer, zero, rounds)
    start = row.to(tl.int64) * columns
    for i in tl.static_range(8):
        bits = (words[i // 2] >> (16 * (i % 2))) & 0xFFFF
        column = tile * block + i * run + lane
        inside = column < columns
        value = tl.load(x + start + column, mask=inside & (bits >= threshold), other=0.0)
        tl.store(out + start + column, value, mask=inside)


def masked(x: Tensor, seeds: Seeds, out: Tensor | None = None) -> Tensor:
    """x [K, T, d], contiguous, with what dropout drops set to 0; into `out`, contiguous too, which may be x itself."""
    out = torch.empty_like(x) if out is None else out
    adapters, rows, columns = x.shape
    grid = (adapters * rows, triton.cdiv(columns, _BLOCK))
    _drop[grid](
        x, out, seeds.seeds, seeds.thresholds, seeds.layer, rows, columns, block=_BLOCK, rounds=_ROUNDS, num_warps=4
    )
    return out


def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel can be compiled here and does what it should, tried out on a few rows."""
    try:
        x = torch.ones((2, 16, 1104), dtype=dtype, device=device)
        seeds = torch.tensor([1, 2], dtype=torch.int64, device=device)
        drawn = Seeds(seeds, torch.tensor([0, 32768], dtype=torch.int32, device=device), 16)
        once, again = masked(x, drawn), masked(x, drawn)
        share = float(once[1].float().mean())
        right = bool((once[0] == 1).all() and (once == again).all()) and 0.4 < share < 0.6
    except Exception as error:
        right, why = False, str(error)[:200]
    else:
        why = "it draws other masks than it should"
    if not right:
        logger.info("dropout's masks are stored, no kernel draws them here (%s)", why)
    return right
