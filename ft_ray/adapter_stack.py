"""Where the weights of many LoRA adapters lie: one flat buffer per rank bucket, one row an adapter.

A bucket holds the adapters whose rank rounds up to R and whose targets are the same. Row i of its buffers is adapter i:
for each decoder layer R rank rows, each with one row of A^T [R, d] and one of B [R, o] for every target there of input
size d and output size o. Views over a run of adapters are then the stacked A [k, d, R] and B [k, R, o] that `torch.bmm`
takes as they are; the rank rows of a decoder layer, of adapters of any ranks one below the other, are what a grouped
product takes; and one fused AdamW call on a row updates a whole adapter. Rank rows past the adapter's own rank start at
zero and stay exactly zero: the gradient of each one's A is a product with its B, and the other way round.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ft_ray import pinned

__all__ = ["BlockRows", "Bucket", "Rounded", "Stacked", "Target", "TargetShape"]

_SMALL = 2**24  # floats a buffer may grow by beyond what is needed
_ALIGN = 64  # floats: 256 bytes, so that a kernel sees every row at the same alignment


@dataclass(frozen=True)
class TargetShape:
    """A Linear layer of the base by its dotted name: `inputs` d, `outputs` o, the number of its decoder layer."""

    name: str
    inputs: int
    outputs: int
    block: int


@dataclass(frozen=True)
class Target:
    """Where a layer's A and B lie in each rank row of its decoder layer."""

    shape: TargetShape
    a: int
    b: int


@dataclass(frozen=True)
class BlockRows:
    """The rank rows of a decoder layer, `width` floats each, from `start` on in a row of the bucket."""

    start: int
    width: int
    names: tuple[str, ...]


_BUFFERS = ("weights", "grads", "first", "second")


class Stacked:
    """A [k, d, R], B [k, R, o], their transposes, and their fp32 gradients, by name: a, b, a_t, b_t, grad_a, grad_b."""

    def __init__(self, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor) -> None:
        self.a, self.b, self.grad_a, self.grad_b = a, b, grad_a, grad_b
        self._each: dict[str, Sequence[Tensor]] = {}

    @functools.cached_property
    def a_t(self) -> Tensor:
        return self.a.transpose(1, 2)

    @functools.cached_property
    def b_t(self) -> Tensor:
        return self.b.transpose(1, 2)

    def stack(self, name: str) -> Tensor:
        stack: Tensor = getattr(self, name)
        return stack

    def each(self, name: str) -> Sequence[Tensor]:
        """The stack as a list of its k matrices. Kept: views are not free."""
        if name not in self._each:
            self._each[name] = self.stack(name).unbind(0)
        return self._each[name]


@dataclass(frozen=True)
class Rounded:
    """A decoder layer's rank rows of some adapters of a bucket [k, R, W], in less precision."""

    bucket: Bucket
    rows: Tensor

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.bucket._pair(self.rows, name)


class Bucket:
    """Adapters of one padded rank and one set of targets, in slots 0 to `len(ids) - 1`.

    Weights, gradients and optimizer state are fp32 as in PEFT under autocast. Where `compute_dtype` is less, a forward
    rounds those of a decoder layer as it comes to them: a copy of all would be 2 bytes more for a parameter's 16.
    """

    def __init__(
        self, rank: int, targets: Sequence[TargetShape], device: torch.device, compute_dtype: torch.dtype
    ) -> None:
        self.rank, self.device, self.compute_dtype = rank, device, compute_dtype
        self.targets: dict[str, Target] = {}
        self.blocks: dict[int, BlockRows] = {}
        self.size = 0
        for block in dict.fromkeys(shape.block for shape in targets):
            width, own = 0, [shape for shape in targets if shape.block == block]
            for shape in own:
                a, b = width, _aligned(width + shape.inputs)
                width = _aligned(b + shape.outputs)
                self.targets[shape.name] = Target(shape, a, b)
            self.blocks[block] = BlockRows(self.size, width, tuple(shape.name for shape in own))
            self.size += rank * width
        self.ids: list[str] = []
        self.steps: list[Tensor] = []  # AdamW's step count of each slot, as torch.optim keeps it
        self.weights, self.grads, self.first, self.second = (self._empty(0) for _ in range(4))
        self._views: dict[tuple[str, int, int], Stacked] = {}
        self._copies = pinned.Pool(self.size, device)

    def _empty(self, capacity: int) -> Tensor:
        return torch.zeros((capacity, self.size), dtype=torch.float32, device=self.device)

    def add(self, adapter_id: str) -> int:
        """A zeroed slot for the adapter. Full buffers grow one at a time: small ones double, large ones by a row.

        When memory runs out in between, what has grown already stays so, and the next call grows the rest.
        """
        slot = len(self.ids)
        if slot >= min(getattr(self, name).shape[0] for name in _BUFFERS):
            capacity = slot + max(1, min(slot, _SMALL // max(self.size, 1)))
            self._resize(capacity)
        for name in _BUFFERS:
            getattr(self, name)[slot].zero_()
        steps = torch.zeros((), dtype=torch.float32, device=self.device)
        self.ids.append(adapter_id)
        self.steps.append(steps)
        return slot

    def remove(self, adapter_id: str) -> None:
        """Frees the adapter's slot; the last one moves into it, and buffers shrink when three quarters are unused."""
        slot, last = self.ids.index(adapter_id), len(self.ids) - 1
        self.swap(slot, last)
        self.ids.pop()
        self.steps.pop()
        if last <= self.weights.shape[0] // 4:
            with contextlib.suppress(RuntimeError, MemoryError):  # no room for the smaller ones: the larger stay
                self._resize(max(last, 1))

    def _resize(self, capacity: int) -> None:
        self._views.clear()  # they hold what is replaced
        for name in _BUFFERS:  # one at a time: no more than one is there twice
            if getattr(self, name).shape[0] == capacity:
                continue
            resized = self._empty(capacity)
            kept = min(len(self.ids), capacity)
            resized[:kept] = getattr(self, name)[:kept]
            setattr(self, name, resized)

    def swap(self, one: int, other: int) -> None:
        if one == other:
            return
        buffers = [getattr(self, name) for name in _BUFFERS]
        kept = [buffer[one].clone() for buffer in buffers]  # first: where memory runs out, nothing has moved
        for buffer, row in zip(buffers, kept, strict=True):
            buffer[one] = buffer[other]
            buffer[other] = row
        self.ids[one], self.ids[other] = self.ids[other], self.ids[one]
        self.steps[one], self.steps[other] = self.steps[other], self.steps[one]

    def bring_forward(self, active: set[str]) -> int:
        """Moves the active adapters to the first slots, where one view stacks them; returns how many they are.

        Weights move only when the set of active adapters changed; a paused adapter then costs nothing.
        """
        front = 0
        for slot, adapter_id in enumerate(list(self.ids)):
            if adapter_id in active:
                self.swap(front, slot)
                front += 1
        return front

    def begin_step(self, active: int) -> None:
        """Zeroes the gradients of the first `active` slots."""
        self.grads[:active].zero_()

    def stacked(self, name: str, start: int, stop: int, rounded: Sequence[Tensor] = ()) -> Stacked:
        """The matrices of a target layer for slots start to stop; `rounded` are A and B where a forward takes 16 bits.

        Views of fp32 buffers are kept until those move.
        """
        key = (name, start, stop)
        if key not in self._views:
            block = self.targets[name].shape.block
            weights, grads = (self._pair(self.rows(block, start, stop, kind), name) for kind in ("weights", "grads"))
            self._views[key] = Stacked(*weights, *grads)
        views = self._views[key]
        if not rounded:
            return views
        a, b = rounded
        return Stacked(a, b, views.grad_a, views.grad_b)

    def rows(self, block: int, start: int, stop: int, kind: str = "weights") -> Tensor:
        """The rank rows [k, R, W] of a decoder layer in slots start to stop, a view; `kind` as for `matrices`."""
        return self._rows(getattr(self, kind)[start:stop], block)

    def _rows(self, rows: Tensor, block: int) -> Tensor:
        at = self.blocks[block]
        return rows.as_strided(
            (rows.shape[0], self.rank, at.width), (rows.stride(0), at.width, 1), rows.storage_offset() + at.start
        )

    def rounded(self, block: int, start: int, stop: int) -> Rounded:
        """A and B of a decoder layer's targets in `compute_dtype`: one copy for all, since they lie together."""
        return Rounded(self, self.rows(block, start, stop).to(self.compute_dtype))

    def _pair(self, rows: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """A [k, d, R] and B [k, R, o] of a target in the rank rows [k, R, W] of its decoder layer."""
        target = self.targets[name]
        k, r, _ = rows.shape
        step, width, at = rows.stride(0), rows.stride(1), rows.storage_offset()
        return (
            rows.as_strided((k, target.shape.inputs, r), (step, 1, width), at + target.a),  # one call each: a forward
            rows.as_strided((k, r, target.shape.outputs), (step, width, 1), at + target.b),  # makes thousands
        )

    def norms(self, start: int, stop: int) -> Tensor:
        """Gradient norm of each slot, [k]. One call a row: its result must not depend on the number of rows."""
        return torch.stack([torch.linalg.vector_norm(self.grads[slot]) for slot in range(start, stop)])

    def update(
        self, slot: int, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float, clip: float
    ) -> None:
        """AdamW (decoupled decay, arXiv:1711.05101) on one adapter; `clip` scales its gradient before."""
        grad = self.grads[slot]
        if clip != 1.0:
            grad.mul_(clip)
        self.steps[slot] += 1
        torch._fused_adamw_(
            [self.weights[slot]], [grad], [self.first[slot]], [self.second[slot]], [], [self.steps[slot]],
            amsgrad=False, beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=eps, maximize=False,
        )  # fmt: skip  # what AdamW(fused=True) calls, without its grouping, which takes longer than the update

    def matrices(self, kind: str, slot: int, rank: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, A and B in PEFT's orientation ([r, d] and [o, r]) of one slot, cut to the adapter's own rank.

        `kind` is 'weights', 'grads', 'first' or 'second'. A and B are views: writing to them writes the bucket.
        """
        for name, target in self.targets.items():
            a, b = self._pair(self.rows(target.shape.block, slot, slot + 1, kind), name)
            yield name, a[0, :, :rank].T, b[0, :rank].T

    def initialise(self, slot: int, rank: int, seed: int) -> None:
        """PEFT's start: A from kaiming_uniform(a=sqrt(5)), which is U(-1/sqrt(d), 1/sqrt(d)), and B zero."""
        generator = torch.Generator().manual_seed(seed)
        for _, a, _ in self.matrices("weights", slot, rank):
            bound = 1 / math.sqrt(a.shape[1])
            a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))

    def load(self, kind: str, slot: int, rank: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes `NAME.A` [r, d] and `NAME.B` [o, r] into a slot; KeyError for a missing one."""
        for name, a, b in self.matrices(kind, slot, rank):
            a.copy_(tensors[f"{name}.A"])
            b.copy_(tensors[f"{name}.B"])

    def save(self, kind: str, slot: int, rank: int) -> dict[str, Tensor]:
        """`NAME.A` [r, d] and `NAME.B` [o, r] of a slot, contiguous CPU copies."""
        return self.cut(self.copy(kind, slot), rank)

    def copy(self, kind: str, slot: int) -> Tensor:
        """A slot's row as it is now, in the CPU's memory: one copy, where its matrices are hundreds of small ones.

        From a GPU into pinned memory, where there is more to pin: into fresh memory it took a third of a sweep.
        """
        row: Tensor = getattr(self, kind)[slot].detach()
        if row.device.type == "cpu":
            return row.clone()
        with contextlib.suppress(RuntimeError):
            return self._copies.copy(row)
        return row.cpu()

    def cut(self, row: Tensor, rank: int) -> dict[str, Tensor]:
        """`NAME.A` [r, d] and `NAME.B` [o, r] of a copied row, contiguous. Any thread may call it."""
        out: dict[str, Tensor] = {}
        for name, target in self.targets.items():
            a, b = self._pair(self._rows(row[None], target.shape.block), name)
            out[f"{name}.A"] = a[0, :, :rank].T.clone(memory_format=torch.contiguous_format)
            out[f"{name}.B"] = b[0, :rank].T.clone(memory_format=torch.contiguous_format)
        return out


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN
