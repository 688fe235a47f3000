"""Attention for packed rows: torch's variable-length FlashAttention (arXiv:2307.08691) as one of transformers'.

Packed rows lie in one sequence whose position ids start anew with each row. `sdpa` takes a mask of all pairs of tokens
for that, and its work grows with the square of the sequence; here every row is a sequence of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ft_ray.model_shape import FUSED

__all__ = ["fits", "use"]

_NAME = "ft_ray_rows"
_known: tuple[Tensor, tuple[int, ...], Tensor, int] | None = None


def fits(config: Any) -> bool:
    """Whether the attention of this model (its config) is what is computed here."""
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    known = width <= 256 and width % 8 == 0 and not getattr(config, "attention_dropout", 0)
    return config.model_type in FUSED and known and not windowed  # plain causal attention: no soft cap, no sinks


def use(model: Any) -> None:
    """Gives a model of transformers this attention. Rows that are padded must be so on the right."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, lambda *_, **__: None)
    model.set_attn_implementation(_NAME)


def _bounds(position_ids: Tensor, shape: tuple[int, int]) -> tuple[Tensor, int]:
    """Where rows begin, with the end, and the longest one's length; found once a forward pass, not once a layer."""
    global _known
    if _known is None or _known[0] is not position_ids or _known[1] != shape:
        flat = position_ids.expand(shape).flatten()
        starts = (flat == 0).nonzero().flatten().to(torch.int32)
        ends = torch.nn.functional.pad(starts, (0, 1), value=flat.numel())
        _known = (position_ids, shape, ends, int(ends.diff().max()))
    return _known[2], _known[3]


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, position_ids: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    batch, length = query.shape[0], query.shape[2]
    assert position_ids is not None
    ends, longest = _bounds(position_ids, (batch, length))
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    if query.device.type == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        if torch.is_autocast_enabled("cuda"):  # which knows sdpa, and not this one
            q, k, v = (part.to(torch.get_autocast_dtype("cuda")) for part in (q, k, v))
        out = varlen_attn(
            q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=True
        )  # fmt: skip
        assert isinstance(out, Tensor)
    else:  # the same, row by row: for tests
        rows = []
        for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            one, keys, values = (part[start:end].transpose(0, 1)[None] for part in (q, k, v))
            row = torch.nn.functional.scaled_dot_product_attention(
                one, keys, values, is_causal=True, scale=scaling, enable_gqa=True
            )
            rows.append(row[0].transpose(0, 1))
        out = torch.cat(rows)
    return out.unflatten(0, (batch, length)), None
