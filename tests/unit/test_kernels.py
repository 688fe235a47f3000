"""How a model gets fused kernels, as far as a CPU shows it: which parts call something else, and that no other does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from ft_ray import kernels

LAYERS = 3


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_the_rotation_of_one_model_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []

    def watched(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        calls.append(q.shape)
        return original(q, k, cos, sin, unsqueeze_dim)

    original = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(kernels, "_rotated", watched)
    plain, fused, ids = model(), model(), torch.tensor([[3, 9, 4, 7, 5]])
    assert kernels.fuse_rotary(fused) == LAYERS
    expected = plain(input_ids=ids).logits
    assert not calls
    assert torch.equal(fused(input_ids=ids).logits, expected)
    assert calls == [torch.Size([1, 4, 5, 8])] * LAYERS
    assert modeling_llama.apply_rotary_pos_emb is original
    assert kernels.fuse_rotary(fused) == LAYERS  # once more changes nothing
    assert torch.equal(fused(input_ids=ids).logits, expected)


def test_a_family_whose_rotation_is_not_known_is_left_alone() -> None:
    class Other(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert kernels.fuse_rotary(torch.nn.Sequential(Other())) == 0
