"""Attention row by row: packed rows give what each row gives alone, and what transformers' own attention gives."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from ft_ray import kernels, row_attention, sft
from ft_ray.errors import MissingPackageError
from ft_ray.recipe import from_dict


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


def test_fused_kernels_are_taken_where_they_can_be(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path
) -> None:
    """What a run with `fused_kernels: auto` decides and says, on a GPU that is only pretended."""
    config = {"model_type": "llama"}
    gpu = SimpleNamespace(
        parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]), config=SimpleNamespace(**config)
    )
    installed, capability, compilers = {"liger_kernel"}, [(8, 0)], {"gcc"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in compilers else None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "Python.h" in kernels.unfit(gpu)
    (tmp_path / "Python.h").touch()
    assert kernels.unfit(gpu) == ""
    capability[0] = (7, 5)
    assert "capability" in kernels.unfit(gpu)
    capability[0] = (9, 0)
    compilers.clear()
    assert "C compiler" in kernels.unfit(gpu)
    compilers.add("clang")
    gpu.config.model_type = "gemma2"
    assert kernels.unfit(gpu) == "there is nothing to fuse in a gemma2"

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert kernels.unfit(model) == "there is no NVIDIA GPU"
    values = {"name": "t", "model": {"id": "m"}, "data": {"train": [{"path": "x"}]}, "sequence": {"packing": True}}
    assert sft._speed_up(model, from_dict(values)) == "plain kernels: there is no NVIDIA GPU"
    monkeypatch.setattr(kernels, "unfit", lambda model: "")
    monkeypatch.setattr(kernels, "fuse", lambda model: 7)
    assert sft._speed_up(model, from_dict(values)) == "fused kernels in 7 modules, attention row by row"
    assert model.config._attn_implementation == "ft_ray_rows"
    installed.clear()
    with pytest.raises(MissingPackageError):
        sft._speed_up(model, from_dict(values | {"fused_kernels": True}))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama"}, True),
        ({"model_type": "llama", "head_dim": 20}, False),  # FlashAttention takes multiples of 8
        ({"model_type": "llama", "attention_dropout": 0.1}, False),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, True),
        ({"model_type": "mistral", "sliding_window": 4096}, False),
        ({"model_type": "gemma2"}, False),
    ],
)
def test_only_plain_attention_is_replaced(config: dict[str, object], expected: bool) -> None:
    sizes = {"head_dim": None, "hidden_size": 512, "num_attention_heads": 8}
    assert row_attention.fits(SimpleNamespace(**(sizes | config))) is expected
