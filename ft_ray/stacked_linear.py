"""A Linear layer of the frozen base with the LoRA matrices of every adapter in the forward around it.

Shapes: K adapters, T token slots each, d inputs, o outputs; a part of the forward is k of the K adapters that lie in
one bucket of padded rank R. Per part the work is two `bmm` forward and four backward, whatever k is; where
`grouped_products` can do it, parts of all ranks go together.

`exact` mode calls one matrix product per adapter, on that adapter's own rows, where the fast mode calls one for all
(`exact_products`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ft_ray.adapter_stack import Bucket, Rounded, Stacked, Target
from ft_ray.dropout_masks import Dropout, mask_of, masked
from ft_ray.exact_products import clear_dead, own_rows
from ft_ray.segments import Layout

if TYPE_CHECKING:
    from ft_ray.seeded_dropout import Seeds

__all__ = ["Block", "Part", "StackedLinear", "StepContext", "Unit"]

_FP32_SUMS = torch.version.hip is None
"""Whether 16-bit products may have a 32-bit result: refused by some of ROCm's libraries."""


@dataclass(frozen=True, eq=False)
class Part:
    """Adapters `start` to `stop` of the forward: slots `first_slot` and following of `bucket`, in the same order."""

    bucket: Bucket
    start: int
    stop: int
    first_slot: int
    factors: Sequence[float]  # alpha/r of each; in training over 1-p, which saves scaling the mask
    scales: Tensor  # the same [k, 1, 1] on the device

    @property
    def targets(self) -> Mapping[str, Target]:
        return self.bucket.targets

    @property
    def slots(self) -> tuple[int, int]:
        return self.first_slot, self.first_slot + self.stop - self.start

    def matrices(self, layer: StackedLinear) -> Stacked:
        """The layer's matrices for a forward; where it takes 16 bits, rounded for the whole block at once."""
        if self.bucket.compute_dtype == torch.float32:
            return self.bucket.stacked(layer.name, *self.slots)
        block, rounded = layer.step.rounded.get(self, (-1, None))
        if rounded is None or block != layer.block.index:
            rounded = self.bucket.rounded(layer.block.index, *self.slots)
            layer.step.rounded[self] = layer.block.index, rounded
        return self.bucket.stacked(layer.name, *self.slots, rounded.pair(layer.name))

    def saved(self, matrices: Stacked) -> list[Tensor]:
        """What a backward needs of them: rounded copies, which nothing else keeps."""
        return [] if self.bucket.compute_dtype == torch.float32 else [matrices.a, matrices.b]

    def low(self, step: StepContext, rows: Tensor, matrices: Stacked) -> Sequence[Tensor]:
        """x A scaled: [k, T, R] of the part's rows [k, T, d]."""
        return [_bmm(rows, matrices.a).mul_(self.scales)]

    def add(self, step: StepContext, low: Sequence[Tensor], matrices: Stacked, into: Tensor) -> None:
        into.baddbmm_(low[0], matrices.b)

    def backward(
        self, layer: StackedLinear, low: Sequence[Tensor], saved: Sequence[Tensor], grad: Tensor, rows: Tensor,
        wanted: bool, into: Tensor | None, add: bool,
    ) -> Tensor | None:  # fmt: skip
        views = self.bucket.stacked(layer.name, *self.slots, saved)
        _accumulate(views.grad_b, low[0], grad)
        grad_low = _bmm(grad, views.b_t).mul_(self.scales)
        _accumulate(views.grad_a, rows, grad_low)
        if not wanted:
            return None
        return into.baddbmm_(grad_low, views.a_t) if into is not None and add else _bmm(grad_low, views.a_t, into)

    def finish(self) -> None:
        """Nothing is left to do: gradients are added up as they come."""


class Unit(Protocol):
    """Adapters `start` to `stop` of the forward whose products are asked for together: a Part, or several of them."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def targets(self) -> Mapping[str, Target]: ...
    def matrices(self, layer: StackedLinear) -> Any: ...
    def saved(self, matrices: Any) -> list[Tensor]: ...
    def low(self, step: StepContext, rows: Tensor, matrices: Any) -> Sequence[Tensor]: ...
    def add(self, step: StepContext, low: Sequence[Tensor], matrices: Any, into: Tensor) -> None: ...
    def backward(
        self, layer: StackedLinear, low: Sequence[Tensor], saved: Sequence[Tensor], grad: Tensor, rows: Tensor,
        wanted: bool, into: Tensor | None, add: bool,
    ) -> Tensor | None:  # fmt: skip
        """Adds to the gradients of A and B. Returns that of the rows, if `wanted`: in `into` where given, `add`ed to
        what is there.
        """
    def finish(self) -> None:
        """After the whole backward."""


@dataclass
class StepContext:
    """What the wrapped layers read during one forward and its backward; one object an engine, set before each."""

    exact: bool
    gpu: bool  # what a GPU does otherwise than a CPU, bool masks for one; tests set it on a CPU too
    anchor: Tensor  # requires grad, so that the output does too where the input does not
    layout: Layout = field(init=False)
    units: Sequence[Unit] = ()
    generator: torch.Generator | None = None
    dropouts: Sequence[Dropout] | None = None  # of all K adapters; None: none drops anything, or an evaluation
    thresholds: Tensor | None = None  # [K] int32, see Dropout; 0 keeps all
    seeded: bool = False  # masks are drawn by a kernel where they are used (seeded_dropout), not made and kept
    seeds: Tensor | None = None  # [blocks, K] int64, where they are
    drawn: tuple[int, dict[str, Tensor]] | None = None  # the block that masks were drawn for last, and they by layer
    rounded: dict[Part, tuple[int, Rounded]] = field(default_factory=dict)  # of each part's last block
    checkpointing: bool = False  # one layer's activations at a time: masked inputs may be kept


@dataclass
class Block:
    """The Linear layers of one decoder layer, by name and first column: dropout is drawn for them together."""

    index: int
    columns: int = 0
    spans: dict[str, slice] = field(default_factory=dict)

    def add(self, name: str, inputs: int) -> None:
        self.spans[name] = slice(self.columns, self.columns + inputs)
        self.columns += inputs


class StackedLinear:
    """Takes over the forward of `base`, an nn.Linear or a bitsandbytes Linear4bit: x [K, T, d] -> [K, T, o].

    The module itself stays where it is, under its own name, and `release` gives its forward back.
    """

    def __init__(self, base: nn.Linear, name: str, block: Block, step: StepContext) -> None:
        self.base, self.name, self.block, self.step = base, name, block, step
        self._kept: Tensor | None = None
        block.add(name, base.in_features)
        base.forward = self._forward  # type: ignore[method-assign, assignment]

    def release(self) -> None:
        del self.base.forward

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The frozen weight [o, d] in `dtype`; a 4-bit one is dequantized.

        bitsandbytes' own forward is never called: on a CPU it packs the weights for inference after an evaluation and
        then trains without gradients.
        """
        kept, self._kept = self._kept, None
        if kept is not None:
            return kept
        weight: Any = self.base.weight
        state = getattr(weight, "quant_state", None)
        if state is not None:
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight.data, state)
        dequantized: Tensor = weight.to(dtype)
        return dequantized

    def _forward(self, x: Tensor) -> Tensor:
        """Everything that a backward needs is saved before the base's product is computed.

        A checkpointed block's recompute ends with the last tensor saved (torch.utils.checkpoint, early stop), so the
        product of its last layer, a quarter of a Llama's, is not computed again.
        """
        with torch.no_grad():
            low = _lows(self, x)
        y: Tensor = _Stacked.apply(x, self.step.anchor, self, low)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self._product(x, low, y.detach())
        return y

    def _product(self, x: Tensor, low: _Low, y: Tensor) -> None:
        weight = self.weight(x.dtype)
        if x.requires_grad and torch._C._current_graph_task_id() != -1:
            self._kept = weight  # a recompute: this layer's backward comes next and needs it once more
        bias: Any = self.base.bias
        _rows(self.step, x, weight.T, bias, out=y)
        rows = _by_unit(y, low.units)
        for unit, matrices, own, into in zip(low.units, low.matrices, low.lows, rows, strict=True):
            unit.add(self.step, own, matrices, into)


def _by_unit(x: Tensor, units: Sequence[Unit]) -> Sequence[Tensor]:
    """The units' own rows of x [K, T, a], in one call where they cover it: a small step on a GPU waits for calls."""
    sizes = [unit.stop - unit.start for unit in units]
    if sum(sizes) == x.shape[0]:  # units lie in order and nowhere twice
        rows: Sequence[Tensor] = x.split(sizes)
        return rows
    return [x[unit.start : unit.stop] for unit in units]


def _bmm(x: Tensor, y: Tensor, into: Tensor | None = None) -> Tensor:
    """torch.bmm, on CUDA by its `out` form: torch 2.13 hands each call of the other one to Python there, and back."""
    if into is None and x.is_cuda:
        into = x.new_empty((x.shape[0], x.shape[1], y.shape[2]))
    return torch.bmm(x, y) if into is None else torch.bmm(x, y, out=into)


def _rows(
    step: StepContext, x: Tensor, matrix: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x [K, T, a] times matrix [a, b] into `out`, by all rows at once, or by each adapter's own rows where exact."""
    if not step.exact:
        flat = x.reshape(-1, x.shape[-1])
        if out is None:
            return torch.mm(flat, matrix).view(*x.shape[:-1], matrix.shape[1])
        into = out.view(-1, matrix.shape[1])
        torch.mm(flat, matrix, out=into) if bias is None else torch.addmm(bias, flat, matrix, out=into)
        return out
    out = clear_dead(step.layout, x.new_empty((*x.shape[:-1], matrix.shape[1])) if out is None else out)
    for own, own_out in zip(own_rows(step.layout, x), own_rows(step.layout, out), strict=True):
        torch.mm(own, matrix, out=own_out)
    if bias is not None:
        out += bias
    return out


def _accumulate(grad: Tensor, x: Tensor, y: Tensor) -> None:
    """Adds each adapter's x^T y, [k, a, b] from [k, T, a] and [k, T, b], to the gradients `grad` (fp32)."""
    if _FP32_SUMS and x.is_cuda and x.dtype != grad.dtype:  # in fp32 by the product itself
        torch.baddbmm(grad, x.transpose(1, 2), y, out_dtype=grad.dtype, out=grad)
    else:  # not baddbmm_: on a CPU it falls back to a loop where the result is no contiguous stack
        grad += _bmm(x.transpose(1, 2), y)


@dataclass(frozen=True)
class _Low:
    """What the adapters make of one layer's input: x A, unit by unit, and what their backward needs."""

    units: Sequence[Unit]
    matrices: Sequence[Any]
    lows: Sequence[Sequence[Tensor]]
    own_x: Tensor
    mask: Tensor | Seeds | None


def _lows(layer: StackedLinear, x: Tensor) -> _Low:
    step = layer.step
    units = [unit for unit in step.units if layer.name in unit.targets]
    mask = mask_of(step, layer, x) if units and step.dropouts is not None else None
    own_x = x if mask is None else masked(x, mask)
    matrices = [unit.matrices(layer) for unit in units]
    lows = [
        unit.low(step, rows, used) for unit, used, rows in zip(units, matrices, _by_unit(own_x, units), strict=True)
    ]
    return _Low(units, matrices, lows, own_x, mask)


class _Stacked(torch.autograd.Function):
    """y = x W + bias + s/(1-p) (x*mask) A B per adapter; backward adds to the buckets' gradients, returns x's.

    The forward only saves and makes room for y: its values are computed after it, see `StackedLinear._forward`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: StackedLinear, low: _Low) -> Tensor:
        step, mask = layer.step, low.mask
        ctx.layer, ctx.units, ctx.mask = layer, low.units, None if isinstance(mask, Tensor) else mask
        if low.units:
            # On a GPU memory is dear and a product is cheap: x is one tensor for all layers that read it. With
            # checkpoints only one layer's are there, and the masked copies may stay.
            ctx.apart = mask is not None and step.gpu and not step.checkpointing
            # Rounded copies of A and B go with the saved tensors, which a checkpoint drops: held by the node, those of
            # every layer would be there when the backward begins, 2 bytes a parameter.
            rounded = [unit.saved(used) for unit, used in zip(low.units, low.matrices, strict=True)]
            masks = [mask] if isinstance(mask, Tensor) else []
            lists = [masks, *low.lows, *rounded]
            ctx.sizes = [len(one) for one in lists]
            ctx.save_for_backward(x if ctx.apart else low.own_x, *itertools.chain(*lists))
        return x.new_empty((*x.shape[:-1], layer.base.out_features))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        layer: StackedLinear = ctx.layer
        units: Sequence[Unit] = ctx.units
        step = layer.step
        grad = grads[0].contiguous()
        wanted: bool = ctx.needs_input_grad[0]
        if not units:
            return _rows(step, grad, layer.weight(grad.dtype)) if wanted else None, None, None, None
        own_x, *kept = ctx.saved_tensors  # before the weight is asked for: a recompute happens here and keeps it
        each = iter(kept)
        masks, *saved = [list(itertools.islice(each, size)) for size in ctx.sizes]
        mask: Tensor | Seeds | None = masks[0] if masks else ctx.mask
        if mask is not None and ctx.apart:
            own_x = masked(own_x, mask)
        lows, rounded = saved[: len(units)], saved[len(units) :]
        # On a GPU the base's product is added to the adapters', in the product's own kernel.
        first = wanted and mask is not None and not step.exact
        dx = _rows(step, grad, layer.weight(grad.dtype)) if wanted and not first else None
        # Exact: the sum is rounded alike with a mask and without, since a neighbour may bring one.
        apart = wanted and (mask is not None or step.exact)
        covered = sum(unit.stop - unit.start for unit in units) == own_x.shape[0]
        back = dx
        if apart:
            alone = covered and len(units) == 1  # makes its own room
            back = None if alone else (torch.empty_like if covered else torch.zeros_like)(own_x)
        own_grads, own_xs = _by_unit(grad, units), _by_unit(own_x, units)
        backs = [None] * len(units) if back is None else _by_unit(back, units)
        for i, (unit, low) in enumerate(zip(units, lows, strict=True)):
            found = unit.backward(
                layer, low, rounded[i], own_grads[i], own_xs[i], wanted=wanted, into=backs[i], add=not apart
            )
        back = found if back is None else back
        if first:
            assert back is not None and mask is not None
            dx = masked(back, mask, back)
            dx.view(-1, dx.shape[-1]).addmm_(grad.view(-1, grad.shape[-1]), layer.weight(grad.dtype))
        elif apart:
            assert back is not None and dx is not None and (mask is None or isinstance(mask, Tensor))
            dx.add_(back if mask is None else back.mul_(mask))
        return dx, None, None, None
