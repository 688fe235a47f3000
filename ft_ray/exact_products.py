"""The products of exact mode: one matrix product an adapter, on that adapter's own rows.

An adapter's numbers are then the same whoever else is in the forward, by construction and not by the grace of the BLAS:
MKL, for one, blocks a 2048x2048 product by its number of rows and rounds differently for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ft_ray.adapter_stack import Stacked
from ft_ray.segments import Layout

if TYPE_CHECKING:
    from ft_ray.stacked_linear import Part, StackedLinear, StepContext

__all__ = ["OneByOne", "clear_dead", "one_by_one", "own_rows"]


def own_rows(layout: Layout, x: Tensor, start: int = 0) -> Sequence[Tensor]:
    """x [k, T, a] taken apart into each adapter's own rows; row 0 is adapter `start` of the forward."""
    each: Sequence[Tensor] = x.unbind(0)
    if layout.filled:
        return each
    return [own[:slots] for own, slots in zip(each, layout.slots[start : start + len(each)], strict=True)]


def clear_dead(layout: Layout, out: Tensor, start: int = 0) -> Tensor:
    """Writes zeros to the dead slots of `out` [k, T, a], which no product is written to: what is there stays finite."""
    if not layout.filled:
        for own, slots in zip(out.unbind(0), layout.slots[start : start + len(out)], strict=True):
            own[slots:] = 0
    return out


def one_by_one(parts: Sequence[Part]) -> list[OneByOne]:
    """Parts next to one another whose adapters have the same targets as one."""
    return [OneByOne(list(same)) for _, same in itertools.groupby(parts, lambda part: tuple(part.targets))]


class OneByOne:
    """Adapters `start` to `stop` of the forward, of any ranks: lists are of one tensor an adapter."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts, self.start, self.stop = parts, parts[0].start, parts[-1].stop
        self.targets = parts[0].targets
        self._factors = [factor for part in parts for factor in part.factors]

    def matrices(self, layer: StackedLinear) -> list[Stacked]:
        return [part.matrices(layer) for part in self.parts]

    def saved(self, matrices: Sequence[Stacked]) -> list[Tensor]:
        return [kept for part, own in zip(self.parts, matrices, strict=True) for kept in part.saved(own)]

    def low(self, step: StepContext, rows: Tensor, matrices: Sequence[Stacked]) -> list[Tensor]:
        """x A scaled, [own slots, R] of each."""
        own = zip(own_rows(step.layout, rows, self.start), _each(matrices, "a"), strict=True)
        return self._scaled([torch.mm(x, a) for x, a in own])

    def add(self, step: StepContext, low: Sequence[Tensor], matrices: Sequence[Stacked], into: Tensor) -> None:
        for y, own, b in zip(own_rows(step.layout, into, self.start), low, _each(matrices, "b"), strict=True):
            y.addmm_(own, b)

    def backward(
        self, layer: StackedLinear, low: Sequence[Tensor], saved: Sequence[Tensor], grad: Tensor, rows: Tensor,
        wanted: bool, into: Tensor | None, add: bool,
    ) -> Tensor | None:  # fmt: skip
        layout = layer.step.layout
        each = len(saved) // len(self.parts)
        pairs = [saved[each * i : each * (i + 1)] for i in range(len(self.parts))]
        views = [
            part.bucket.stacked(layer.name, *part.slots, pair) for part, pair in zip(self.parts, pairs, strict=True)
        ]
        grads = own_rows(layout, grad, self.start)
        grad_lows = self._scaled([torch.mm(own, b_t) for own, b_t in zip(grads, _each(views, "b_t"), strict=True)])
        _accumulate(_each(views, "grad_b"), low, grads)
        _accumulate(_each(views, "grad_a"), own_rows(layout, rows, self.start), grad_lows)
        if not wanted:
            return None
        assert not add, "sums are rounded alike with a mask and without: of what was computed apart"
        back = clear_dead(layout, torch.empty_like(rows) if into is None else into, self.start)
        outs = own_rows(layout, back, self.start)
        for own, a_t, out in zip(grad_lows, _each(views, "a_t"), outs, strict=True):
            torch.mm(own, a_t, out=out)
        return back

    def finish(self) -> None:
        """Nothing is left to do: gradients are added up as they come."""

    def _scaled(self, lows: list[Tensor]) -> list[Tensor]:
        torch._foreach_mul_(lows, self._factors)  # one call: a small product takes no longer than the call of one
        return lows


def _each(stacks: Sequence[Stacked], name: str) -> list[Tensor]:
    return [matrix for stack in stacks for matrix in stack.each(name)]


def _accumulate(grads: Sequence[Tensor], xs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
    """Adds x^T y, [a, b] from [n, a] and [n, b], to each gradient (fp32)."""
    for grad, x, y in zip(grads, xs, ys, strict=True):
        if x.dtype == grad.dtype:
            grad.addmm_(x.T, y)
        else:
            grad += torch.mm(x.T, y)
