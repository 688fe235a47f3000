"""Attention row by row: packed rows give what each row gives alone, and what transformers' own attention gives."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from ft_ray import row_attention


def test_packed_rows_are_each_row_alone(tiny_model: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa").eval()
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    row_attention.use(model)
    rows = [torch.arange(3, 3 + n)[None] for n in (5, 9, 2)]
    places = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    packed = torch.cat(rows, dim=1)
    with torch.inference_mode():
        logits = model(packed, position_ids=places, use_cache=False).logits
        theirs = plain(packed, position_ids=places, use_cache=False).logits
        alone = torch.cat([plain(row, use_cache=False).logits for row in rows], dim=1)
    assert torch.allclose(logits, alone, atol=1e-5) and torch.allclose(logits, theirs, atol=1e-5)


def test_its_gradients_are_those_of_sdpa(tiny_model: Path) -> None:
    found = []
    for rows_alone in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa")
        if rows_alone:
            row_attention.use(model)
        ids = torch.arange(3, 35).view(2, 16)
        model(ids, labels=ids, position_ids=torch.arange(16).expand(2, 16), use_cache=False).loss.backward()
        found.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert found[0].abs().max() > 0 and torch.allclose(found[0], found[1], atol=1e-6)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama"}, True),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, True),
        ({"model_type": "mistral", "sliding_window": 4096}, False),
        ({"model_type": "gemma2"}, False),
    ],
)
def test_only_plain_attention_is_replaced(config: dict[str, object], expected: bool) -> None:
    assert row_attention.fits(SimpleNamespace(**config)) is expected
