"""Dropout of many adapters in one forward: each one's masks are a function of its own seed, step and layer.

Masks are made for a whole decoder layer by torch's generators, or drawn by a kernel where they are used
(`seeded_dropout`), which an NVIDIA GPU with Triton does. The two draw unlike masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ft_ray.seeded_dropout import Seeds
    from ft_ray.stacked_linear import Block, StackedLinear, StepContext

__all__ = ["Dropout", "mask_of", "masked"]

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Dropout:
    """One adapter's dropout in one forward: the masks are a function of these and the block, nothing is remembered.

    That is what restores them in a checkpointed layer's recompute, after a resume, and whoever else is in the forward.
    """

    p: float
    state: int

    @classmethod
    def of(cls, p: float, seed: int, step: int, micro: int) -> Dropout:
        return cls(p, _mix(_mix(_mix(0, seed), step), micro))

    def block_seed(self, block: int) -> int:
        return _mix(self.state, block) >> 1  # torch.Generator takes it as a signed number

    @property
    def threshold(self) -> int:
        """Of 65536 values of 16 random bits, from which one on a number is kept: p is met to 8e-6."""
        return min(65535, round(self.p * 65536))


def _mix(state: int, value: int) -> int:
    """splitmix64's finaliser (Steele, Lea and Flood 2014) over a 64-bit state and one more counter."""
    state = (state + value + 0x9E3779B97F4A7C15) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state ^ (state >> 31)


def mask_of(step: StepContext, layer: StackedLinear, x: Tensor) -> Tensor | Seeds:
    """[K, T, d] of 0 and 1 for this layer: of what was drawn for the whole block. Or how to draw it.

    One draw a decoder layer instead of one for each of its seven matrices: draws are small and there are K of each. All
    of a block's layers are drawn for, whichever an adapter has, so that a draw depends on nobody else. A checkpointed
    block's recompute draws again; no more than one block's masks are kept.
    """
    if step.seeded:
        from ft_ray.seeded_dropout import Seeds

        assert step.seeds is not None and step.thresholds is not None
        return Seeds(step.seeds[layer.block.index], step.thresholds, layer.block.spans[layer.name].start)
    if step.drawn is None or step.drawn[0] != layer.block.index:
        step.drawn = None  # before the next masks are made: two blocks' would exist at once
        step.drawn = (layer.block.index, _draw(step, layer.block, x))
    return step.drawn[1][layer.name]


def _draw(step: StepContext, block: Block, x: Tensor) -> dict[str, Tensor]:
    """[K, T, d] of 0 and 1 by layer, each adapter's rows from a generator of its own, over its own slots only."""
    assert step.dropouts is not None and step.thresholds is not None
    if step.generator is None:
        step.generator = torch.Generator(device=x.device)
    # A generator is asked for 64 bits at a time, and 16 of them decide about one number: a quarter of the draws.
    columns = -(-block.columns // 4) * 4
    noise = torch.empty((*x.shape[:2], columns), dtype=torch.int16, device=x.device)
    for own, slots, dropout in zip(noise.unbind(0), step.layout.slots, step.dropouts, strict=True):
        if dropout.p:
            step.generator.manual_seed(dropout.block_seed(block.index))
            own[:slots].view(torch.int64).random_(-(2**63), None, generator=step.generator)
            own[slots:] = 0
        else:
            own.zero_()
    thresholds = (step.thresholds - 32768).to(torch.int16).view(-1, 1, 1)
    if step.gpu:  # each mask a tensor of its own: kernels are slower on columns of a wider one
        return {name: noise[..., span] >= thresholds for name, span in block.spans.items()}
    kept = (noise >= thresholds).to(x.dtype)  # a CPU multiplies unlike types slowly
    return {name: kept[..., span] for name, span in block.spans.items()}


def masked(x: Tensor, mask: Tensor | Seeds, out: Tensor | None = None) -> Tensor:
    """x where the mask is 1, else 0. A bool mask by dropout's own kernel, which takes both types as they are.

    `out`: where the result may be written, if that helps.
    """
    if not isinstance(mask, Tensor):
        from ft_ray import seeded_dropout

        return seeded_dropout.masked(x.contiguous(), mask, out)
    kept: Tensor = torch.ops.aten.native_dropout_backward(x, mask, 1.0) if mask.dtype == torch.bool else x * mask
    return kept
