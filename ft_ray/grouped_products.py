"""LoRA of all adapters in a forward by one matrix product each, whatever their ranks: grouped products over rank rows.

Shapes: k adapters of padded ranks R_1 to R_k, S their sum, T token slots each, d inputs, o outputs. A^T [S, d] and
B [S, o] of all of them lie one below the other, and `grouped_mm` takes each adapter's own rows by their bounds, so that
a layer's x A is one product and its backward four, where bmm takes as many for each rank. A small step on a GPU waits
for Python to ask for its kernels, not for the kernels (benchmarks/README.md, "The shared base").

An adapter's scale s is in its rank rows: both A and B are multiplied by the root of s/(1-p) as they are rounded, and
so are their gradients as they are added up, which is s x A B and its derivatives.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

if TYPE_CHECKING:
    from ft_ray.stacked_linear import Part, StackedLinear, StepContext, Unit

__all__ = ["Group", "grouped", "supported"]

_MULTIPLE = 8  # of 16-bit numbers: 16 bytes, to which a tensor memory access is aligned


def supported(device: torch.device, dtype: torch.dtype, layers: Iterable[StackedLinear]) -> bool:
    """Whether torch has a kernel for it: bf16 on Hopper and Blackwell. Elsewhere it is a loop over the adapters."""
    if device.type != "cuda" or torch.version.hip is not None or dtype != torch.bfloat16:
        return False
    sizes = [size for layer in layers for size in (layer.base.in_features, layer.base.out_features)]
    return torch.cuda.get_device_capability(device)[0] in (9, 10) and not any(size % _MULTIPLE for size in sizes)


def grouped(parts: Sequence[Part]) -> list[Unit]:
    """Parts next to one another whose adapters have the same targets as one, but those of odd ranks."""
    found: list[Unit] = []
    for _, same in itertools.groupby(parts, lambda part: (tuple(part.bucket.targets), part.bucket.rank % _MULTIPLE)):
        own = list(same)
        found += own if own[0].bucket.rank % _MULTIPLE else [Group(own)]
    return found


class Group:
    """Adapters `start` to `stop` of one forward, with what it makes of a decoder layer's rank rows until the next one.

    Its gradients are in the buckets once the backward has been through all targets of a decoder layer.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts, self.start, self.stop = parts, parts[0].start, parts[-1].stop
        bucket = parts[0].bucket
        self.targets, self._blocks = bucket.targets, bucket.blocks
        self._dtype, self._device = bucket.compute_dtype, bucket.device
        self._counts = [part.stop - part.start for part in parts]
        self._sizes = [k * part.bucket.rank for k, part in zip(self._counts, parts, strict=True)]
        bounds = itertools.accumulate(
            part.bucket.rank for k, part in zip(self._counts, parts, strict=True) for _ in range(k)
        )
        self._offsets = torch.tensor(list(bounds), dtype=torch.int32).to(self._device, non_blocking=True)
        roots = [part.scales.sqrt().expand(-1, part.bucket.rank, 1).reshape(-1, 1) for part in parts]
        self._roots = torch.cat(roots)  # [S, 1]
        self._packed: tuple[int, Tensor] | None = None
        self._gradients: dict[str, tuple[Tensor, Tensor]] = {}
        self._block = -1  # whose they are

    # One layer's forward and backward; `rows` and the like are the group's own of [K, T, ...]

    def matrices(self, layer: StackedLinear) -> tuple[Tensor, Tensor]:
        """A^T [S, d] and B [S, o], views of a copy of the whole decoder layer's."""
        block = layer.block.index
        if self._packed is None or self._packed[0] != block:
            self._packed = None  # before there is a second one
            self._packed = block, self._pack(block)
        at, rows = self.targets[layer.name], self._packed[1]
        return rows[:, at.a : at.a + at.shape.inputs], rows[:, at.b : at.b + at.shape.outputs]

    def saved(self, matrices: tuple[Tensor, Tensor]) -> list[Tensor]:
        return list(matrices)

    def low(self, step: StepContext, rows: Tensor, matrices: tuple[Tensor, Tensor]) -> Sequence[Tensor]:
        """x A of each adapter in columns of its own: [T, S]."""
        return [grouped_mm(rows, matrices[0].T, offs=self._offsets)]

    def add(self, step: StepContext, low: Sequence[Tensor], matrices: tuple[Tensor, Tensor], into: Tensor) -> None:
        """Adds x A B. A product for each rank, which adds in its own kernel: outputs are what is large here."""
        pieces = (low[0].split(self._sizes, dim=1), matrices[1].split(self._sizes), into.split(self._counts))
        for part, own, b, rows in zip(self.parts, *pieces, strict=True):
            shape = (len(rows), part.bucket.rank)
            rows.baddbmm_(own.unflatten(1, shape).transpose(0, 1), b.unflatten(0, shape))

    def backward(
        self, layer: StackedLinear, low: Sequence[Tensor], saved: Sequence[Tensor], grad: Tensor, rows: Tensor,
        wanted: bool, into: Tensor | None, add: bool,
    ) -> Tensor | None:  # fmt: skip
        a, b = saved
        grad_b = grouped_mm(low[0].T, grad, offs=self._offsets)
        grad_low = grouped_mm(grad, b.T, offs=self._offsets)
        grad_a = grouped_mm(grad_low.T, rows, offs=self._offsets)
        if layer.block.index != self._block:  # one of the last block's has had no backward, as nobody reads its output
            self.finish()
        self._block = layer.block.index
        self._gradients[layer.name] = grad_a, grad_b
        if len(self._gradients) == len(self._blocks[self._block].names):
            self.finish()
        if not wanted:
            return None
        back = grouped_mm(grad_low, a, offs=self._offsets)
        if into is None:
            return back
        return into.add_(back) if add else into.copy_(back)

    # Between the buckets' rows and one matrix

    def _pack(self, block: int) -> Tensor:
        """[S, W] in 16 bits, each rank row times the root of its scale."""
        rows = self._roots.new_empty((len(self._roots), self._blocks[block].width), dtype=self._dtype)
        for part, into, roots in zip(self.parts, rows.split(self._sizes), self._roots.split(self._sizes), strict=True):
            own = part.bucket.rows(block, *part.slots)
            torch.mul(own, roots.view(*own.shape[:2], 1), out=into.view(own.shape))
        return rows

    def finish(self) -> None:
        """Adds what the backward has found for a decoder layer to the buckets; nothing for a target without one."""
        at, pieces = 0, []
        for name, found in self._gradients.items():
            pieces += list(zip((self.targets[name].a, self.targets[name].b), found, strict=True))
        self._gradients.clear()
        if not pieces:
            return
        columns = []
        for start, piece in sorted(pieces, key=lambda one: one[0]):
            columns += [piece.new_zeros((len(piece), start - at))] if start > at else []
            columns.append(piece)
            at = start + piece.shape[1]
        if at < self._blocks[self._block].width:
            columns.append(piece.new_zeros((len(piece), self._blocks[self._block].width - at)))
        rows = torch.cat(columns, dim=1)
        for part, own, roots in zip(self.parts, rows.split(self._sizes), self._roots.split(self._sizes), strict=True):
            grads = part.bucket.rows(self._block, *part.slots, "grads")
            grads.addcmul_(own.view(grads.shape), roots.view(*grads.shape[:2], 1))
