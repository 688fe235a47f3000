"""A key-value cache that writes in place, and attention that reads grouped keys without repeating them.

transformers' DynamicCache copies every key and value with each new token, and its SDPA path repeats the
key-value heads to the number of query heads. On a CPU, where decoding is bound by memory traffic, both cost
more than the model's own weights. Neither change alters a number: the cache holds the same values, and with
one query token the heads of a group are independent queries on the same keys.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

__all__ = ["ATTENTION", "new_cache"]

ATTENTION = "ft_ray_grouped"
_ROOM = 64


class _RoomyLayer(DynamicLayer):
    """Keys and values are views of buffers with room for tokens to come."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        have, new = self.get_seq_length(), key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < have + new:
            batch, heads, _, width = key_states.shape
            self._buffers = (
                key_states.new_empty(batch, heads, have + new + _ROOM, width),
                value_states.new_empty(batch, heads, have + new + _ROOM, value_states.shape[-1]),
            )
            if have:
                assert self.keys is not None and self.values is not None
                self._buffers[0][:, :, :have], self._buffers[1][:, :, :have] = self.keys, self.values
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, have : have + new] = states
        self.keys, self.values = (buffer[:, :, : have + new] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._buffers = None


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for `model`; layers other than plain full attention keep transformers' own kind."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """SDPA; for one query token, [batch, heads, 1, d] is read as [batch, kv heads, group, d].

    Returns [batch, 1, heads, d] as every attention function of transformers does.
    """
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    per_head_mask = attention_mask is not None and attention_mask.shape[1] != 1
    if length != 1 or groups == 1 or per_head_mask or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    out = torch.nn.functional.scaled_dot_product_attention(
        query.view(batch, key.shape[1], groups, width), key, value, attn_mask=attention_mask, scale=scaling
    )
    return out.reshape(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(ATTENTION, _grouped_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
