"""How the micro-batches of many adapters share one forward: layout of tokens, and attention that keeps sequences apart.

Shapes: K adapters in the forward, T token slots each (the longest adapter of the forward, rounded up), H heads,
D head size. The model sees a [K, T] batch; row i holds the sequences of adapter i one after another, each in a
whole number of 16-slot blocks. Everything but attention acts on single tokens, so only attention has to know where
sequences lie.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ft_ray.errors import DataError, ModelError

__all__ = ["ATTENTION", "IGNORE", "Layout", "MicroBatch", "build_layout", "register_attention", "takes_varlen"]

logger = logging.getLogger("ft_ray")

ATTENTION = "ft_ray_segments"
"""Name under which transformers finds `segment_attention`."""

IGNORE = -100
"""Label of a token that is not trained."""

ROWS = 16
"""Token slots are whole multiples of this: below 16 rows MKL picks other kernels, which round differently."""


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one adapter: token ids and labels of equal length, `IGNORE` where a token is not trained."""

    sequences: tuple[tuple[Sequence[int], Sequence[int]], ...]

    def __post_init__(self) -> None:
        if not self.sequences:
            raise DataError("A micro-batch holds no sequence: give at least one.")
        for ids, labels in self.sequences:
            if len(ids) != len(labels) or not ids:
                raise DataError(
                    f"A sequence has {len(ids)} ids and {len(labels)} labels: give equally many, and at least one."
                )

    @classmethod
    def of(cls, rows: Iterable[tuple[Sequence[int], Sequence[int]]]) -> MicroBatch:
        return cls(tuple(rows))

    @classmethod
    def from_packed(cls, ids: Sequence[int], labels: Sequence[int], lengths: Sequence[int]) -> MicroBatch:
        """One packed row (TRL's `seq_lengths`) taken apart into its sequences."""
        pieces, start = [], 0
        for length in lengths:
            pieces.append((ids[start : start + length], labels[start : start + length]))
            start += length
        return cls(tuple(pieces))

    @property
    def slots(self) -> int:
        """Token slots this batch takes: each sequence a whole number of row blocks."""
        return sum(_round_up(len(ids), ROWS) for ids, _ in self.sequences)

    @cached_property
    def trained(self) -> int:
        """Tokens that are predicted and count in the loss: the first token of a sequence never does."""
        return sum(sum(1 for label in labels[1:] if label != IGNORE) for _, labels in self.sequences)


@dataclass(frozen=True)
class Group:
    """Sequences of one padded length L: `source` and `target` pair flat token slots with slots of [n, L]."""

    count: int
    length: int
    source: Tensor
    target: Tensor


@dataclass(frozen=True)
class Layout:
    """One forward. `slots[i]` counts adapter i's own token slots; the rest of its row, up to T, is dead.

    How attention finds the sequences: `uniform` is the one span of all of them where they fill every row; `bounds` are
    the flat slots where they start and the end, for a GPU's kernel; `groups` are for all else.
    `trained` are the flat slots whose next token is trained, adapter by adapter, `trained_counts[i]` of adapter i;
    `labels` are the tokens they have to predict.
    """

    slots: tuple[int, ...]
    width: int
    input_ids: Tensor
    position_ids: Tensor
    groups: tuple[Group, ...]
    uniform: int | None
    trained: Tensor
    labels: Tensor
    trained_counts: tuple[int, ...]
    bounds: Tensor | None = None
    longest: int = 0
    windows: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def adapters(self) -> int:
        return len(self.slots)

    @cached_property
    def filled(self) -> bool:
        """Whether no slot is dead."""
        return min(self.slots) == self.width


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def padded_length(length: int) -> int:
    """Length a sequence is padded to inside attention: steps of 16 to 128, of 64 to 512, of 256 beyond.

    Depends on the sequence alone, so that its result does not depend on what else is in the forward.
    """
    return _round_up(length, 16 if length <= 128 else 64 if length <= 512 else 256)


def build_layout(batches: Sequence[MicroBatch], device: torch.device, *, varlen: bool = False) -> Layout:
    """Lays the micro-batches of K adapters out as one [K, T] forward on `device`.

    `varlen`: attention takes sequences of any lengths as they lie, so that none has to be moved (`takes_varlen`).
    """
    slots = tuple(batch.slots for batch in batches)
    width = max(slots)
    ids: list[int] = []
    positions: list[int] = []
    trained: list[int] = []
    labels: list[int] = []
    counts: list[int] = []
    by_length: dict[int, list[tuple[int, int]]] = {}
    starts: list[int] = []
    spans: set[int] = set()
    for row, batch in enumerate(batches):
        start = row * width
        before = len(trained)
        for tokens, targets in batch.sequences:
            length = len(tokens)
            span = _round_up(length, ROWS)
            spans.add(span)
            starts.append(start)
            by_length.setdefault(padded_length(length), []).append((start, length))
            ids += [*tokens, *[0] * (span - length)]
            positions += range(span)
            for offset in range(1, length):
                if targets[offset] != IGNORE:
                    trained.append(start + offset - 1)
                    labels.append(targets[offset])
            start += span
        dead = (row + 1) * width - start
        ids += [0] * dead
        positions += [0] * dead
        counts.append(len(trained) - before)

    # Sequences of one span that fill every row: attention is a view of [K, T] and nothing has to be gathered. Padding
    # then holds some token's values and not zeros, which is the same to the real tokens before it.
    span = next(iter(spans))
    filled = span in by_length and len(by_length) == len(spans) == 1 and sum(slots) == width * len(batches)
    uniform = span if filled else None
    groups: list[Group] = []
    bounds = [*starts, width * len(batches)]
    if uniform is None and not varlen:
        for padded, found in sorted(by_length.items()):
            source = [slot for start, length in found for slot in range(start, start + length)]
            target = [n * padded + slot for n, (_, length) in enumerate(found) for slot in range(length)]
            groups.append(Group(len(found), padded, _index(source, device), _index(target, device)))
    shape = (len(batches), width)
    return Layout(
        slots=slots,
        width=width,
        input_ids=_index(ids, device).view(shape),
        position_ids=_index(positions, device).view(shape),
        groups=tuple(groups),
        uniform=uniform,
        trained=_index(trained, device),
        labels=_index(labels, device),
        trained_counts=tuple(counts),
        # A sequence reaches to where the next begins: what lies between comes last, where causality hides it.
        bounds=torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True) if varlen else None,
        longest=max(b - a for a, b in pairwise(bounds)),
    )


def _index(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)


class _Move(torch.autograd.Function):
    """Rows `source` of a flat tensor to rows `target` of a zero tensor of `size` rows; backward is the same, reversed.

    Index pairs are one to one, so that no sum is needed in backward (index_select's own uses atomics on a GPU, whose
    order is not fixed), and slots that nothing is moved to hold zeros: a masked NaN would still be NaN.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, source: Tensor, target: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(source, target)
        ctx.size = flat.shape[0]
        return flat.new_zeros((size, *flat.shape[1:])).index_copy_(0, target, flat.index_select(0, source))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        source, target = ctx.saved_tensors
        grad = grads[0]
        back = grad.new_zeros((ctx.size, *grad.shape[1:]))
        return back.index_copy_(0, source, grad.index_select(0, target)), None, None, None


def _move(flat: Tensor, source: Tensor, target: Tensor, size: int) -> Tensor:
    moved: Tensor = _Move.apply(flat, source, target, size)  # type: ignore[no-untyped-call]
    return moved


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence, in transformers' attention interface.

    query [K, H, T, D], key and value [K, Hkv, T, D]; returns [K, T, H, D]. Sequences of equal padded length go through
    one call of `scaled_dot_product_attention`; padding comes last, where a causal mask hides it from every real token.
    """
    layout: Layout = module._ft_ray_step.layout  # type: ignore[assignment]
    if softcap is not None:
        raise ModelError("The shared base has no attention with soft-capped scores: train this model without a sweep.")
    if key.shape[1] != query.shape[1] and query.device.type != "cuda":
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if layout.uniform is not None:
        n, length = query.shape[0] * (layout.width // layout.uniform), layout.uniform
        heads = query.shape[1]

        def split(x: Tensor) -> Tensor:
            return x.transpose(1, 2).reshape(n, length, x.shape[1], x.shape[-1]).transpose(1, 2)

        if length != layout.width:
            query, key, value = split(query), split(key), split(value)
        out = _attend(layout, query, key, value, scaling, sliding_window)
        return out.transpose(1, 2).reshape(layout.adapters, layout.width, heads, out.shape[-1]), None

    flats = [x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[-1]) for x in (query, key, value)]
    if layout.bounds is not None:
        from torch.nn.attention.varlen import varlen_attn

        bounds, longest = layout.bounds, layout.longest
        window = (longest if sliding_window is None else sliding_window - 1, 0)
        flat_query, flat_key, flat_value = flats
        attended: Any = varlen_attn(
            flat_query, flat_key, flat_value, bounds, bounds, longest, longest, scale=scaling, enable_gqa=True,
            window_size=(-1, 0) if window[0] >= longest - 1 else window,
        )  # fmt: skip
        return attended.view(layout.adapters, layout.width, *attended.shape[1:]), None
    total: Tensor | None = None
    for group in layout.groups:
        size = group.count * group.length
        q, k, v = (
            _move(flat, group.source, group.target, size).view(group.count, group.length, *flat.shape[1:])
            for flat in flats
        )
        out = _attend(layout, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scaling, sliding_window)
        flat = out.transpose(1, 2).reshape(size, *out.shape[1:2], out.shape[-1])
        placed = _move(flat, group.target, group.source, layout.adapters * layout.width)
        total = placed if total is None else total + placed
    assert total is not None
    return total.view(layout.adapters, layout.width, *total.shape[1:]), None


def takes_varlen(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_size: int) -> bool:
    """Whether flash attention over sequences of unlike lengths can be had: 16 bits, on an NVIDIA GPU since Ampere.

    Tried out on two short sequences, forward and backward: its interface is young.
    """
    if device.type != "cuda" or torch.version.hip is not None or dtype not in (torch.bfloat16, torch.float16):
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        return varlen_equals_padded(device, dtype, heads, key_heads, head_size)
    except Exception as error:
        logger.info("no flash attention over sequences of unlike lengths (%s): by padded lengths", str(error)[:200])
        return False


def varlen_equals_padded(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_size: int
) -> bool:
    """Whether results and gradients of both ways agree on sequences of 5 and 3 tokens, within 16 bits."""
    from torch.nn.attention.varlen import varlen_attn

    generator = torch.Generator(device=device).manual_seed(0)
    shapes = [(8, n, head_size) for n in (heads, key_heads, key_heads)]
    found = []
    drawn = [torch.randn(shape, generator=generator, device=device) for shape in (*shapes, (8, heads, head_size))]
    bounds = torch.tensor([0, 5, 8], dtype=torch.int32, device=device)
    with torch.enable_grad():
        for varlen in (True, False):
            q, k, v = (x.to(dtype).requires_grad_() for x in drawn[:3])
            if varlen:
                out: Any = varlen_attn(q, k, v, bounds, bounds, 5, 5, window_size=(-1, 0), enable_gqa=True)
            else:
                parts = zip(*([p.transpose(0, 1)[None] for p in x.split([5, 3])] for x in (q, k, v)), strict=True)
                attended = [
                    functional.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)
                    for a, b, c in parts
                ]
                out = torch.cat([one[0].transpose(0, 1) for one in attended])
            found.append([out.detach(), *torch.autograd.grad(out, (q, k, v), drawn[3].to(dtype))])
    return all((one - other).float().norm() <= 0.02 * other.float().norm() for one, other in zip(*found, strict=True))


def _attend(
    layout: Layout, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    length = query.shape[2]
    grouped = key.shape[1] != query.shape[1]  # a GPU's kernels share key and value heads by themselves
    if window is None or window >= length:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    mask = layout.windows.get((length, window))
    if mask is None:
        at = torch.arange(length, device=query.device)
        distance = at[:, None] - at[None, :]
        mask = layout.windows[length, window] = (distance >= 0) & (distance < window)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped
    )


def register_attention() -> None:
    """Makes `segment_attention` known to transformers; without a mask function of its own it is given no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, segment_attention)
