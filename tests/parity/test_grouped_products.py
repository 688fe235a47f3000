"""Adapters of all ranks by grouped products: the same losses and gradients as by one product a rank, in bf16.

On a CPU, where `grouped_mm` is a loop over the adapters that takes the same operands; tests/gpu has the kernel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ft_ray import grouped_products
from ft_ray.segments import MicroBatch
from ft_ray.shared_base import AdapterConfig, SharedBase
from tests import tiny

ATTENTION = ["q_proj", "v_proj"]
# Rank 12 lies in rows for 16, rank 4 is no multiple of 8 and goes by itself, two have fewer targets.
ADAPTERS: list[dict[str, Any]] = [
    {"r": 8, "alpha": 16}, {"r": 64, "alpha": 32}, {"r": 12, "alpha": 20}, {"r": 8, "alpha": 64},
    {"r": 8, "alpha": 8, "targets": ATTENTION}, {"r": 16, "alpha": 8, "targets": ATTENTION}, {"r": 4, "alpha": 8},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("grouped") / "tiny", hidden=96)  # no multiple of the rows' alignment


def base(folder: Path, dtype: torch.dtype, grouped: bool, checkpoint: bool, dropout: float) -> SharedBase:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    shared = SharedBase(model, gradient_checkpointing=checkpoint, rank_buckets=(4, 8, 16, 32, 64))
    shared._base.grouped = grouped
    for i, own in enumerate(ADAPTERS):
        drops = dropout if i % 2 else 0.0
        config = AdapterConfig(**{"targets": "all-linear", **own}, dropout=drops, seed=i, total_steps=9, warmup=0.0)
        shared.attach(f"t{i}", config)
        state = shared.state_dict(f"t{i}")
        generator = torch.Generator().manual_seed(i)
        for name, tensor in state["tensors"].items():
            if name.startswith("weights") and name.endswith(".B"):  # zero at first: A would have no gradient
                tensor.normal_(std=0.05, generator=generator)
        shared.load_state(f"t{i}", state)
    return shared


def batch(number: int, of: list[int]) -> dict[str, MicroBatch]:
    generator = torch.Generator().manual_seed(number)
    found = {}
    for i in of:
        rows = [torch.randint(3, 200, (12 + i + 3 * j,), generator=generator).tolist() for j in range(3)]
        found[f"t{i}"] = MicroBatch.of((row, row) for row in rows)
    return found


def gradients(shared: SharedBase, of: list[int]) -> dict[str, torch.Tensor]:
    return {f"{i} {n}": g for i in of for n, g in shared.gradients(f"t{i}").items()}


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(("dropout", "of"), [(0.0, list(range(7))), (0.2, list(range(7))), (0.2, [1, 2, 5])])
def test_no_less_exact_than_a_product_for_each_rank(
    folder: Path, checkpoint: bool, dropout: float, of: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = grouped_products.grouped_mm
    monkeypatch.setattr(grouped_products, "grouped_mm", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    found, losses = {}, {}
    for name, dtype, grouped in (
        ("exact", torch.float32, False), ("rank", torch.bfloat16, False), ("all", torch.bfloat16, True)
    ):  # fmt: skip
        shared = base(folder, dtype, grouped, checkpoint, dropout)
        before = len(calls)
        results = shared.step(batch(0, of))
        assert (len(calls) > before) == grouped
        found[name], losses[name] = gradients(shared, of), [r.loss for r in results.values()]
        held = shared.evaluate(batch(1, of))
        losses[name] += [h.loss / h.tokens for h in held.values()]
    error = {
        name: {n: float((found[name][n] - g).norm() / g.norm()) for n, g in found["exact"].items()}
        for name in ("rank", "all")
    }
    print({name: (max(each.values()), sum(each.values()) / len(each)) for name, each in error.items()})
    assert max(error["all"].values()) < 1.5 * max(error["rank"].values()) and max(error["all"].values()) < 0.1
    assert sum(error["all"].values()) < 1.1 * sum(error["rank"].values())
    off = {n: max(abs(x - y) for x, y in zip(losses[n], losses["exact"], strict=True)) for n in ("rank", "all")}
    print(off)
    assert off["all"] < max(1.5 * off["rank"], 0.01)


def test_rows_past_an_adapters_own_rank_stay_zero(folder: Path) -> None:
    shared = base(folder, torch.bfloat16, True, False, 0.2)
    for number in range(3):
        shared.step(batch(number, list(range(7))))
    adapter = shared._adapters["t2"]
    slot = adapter.bucket.ids.index("t2")
    for kind in ("weights", "first", "second"):
        for _, a, b in adapter.bucket.matrices(kind, slot, adapter.bucket.rank):
            assert a[:12].abs().sum() and b[:, :12].abs().sum()
            assert not a[12:].any() and not b[:, 12:].any()


def test_two_micro_batches_add_up(folder: Path) -> None:
    first, second = batch(0, [0, 1]), batch(1, [0, 1])
    both = {name: [first[name], second[name]] for name in first}
    found = {}
    for grouped in (False, True):
        shared = base(folder, torch.bfloat16, grouped, True, 0.0)
        shared.step(both)
        found[grouped] = gradients(shared, [0, 1])
    for name, grad in found[False].items():
        assert float((found[True][name] - grad).norm() / grad.norm()) < 0.05


def test_a_layer_whose_output_nobody_reads_costs_no_other_its_gradients(folder: Path) -> None:
    """Its own stay zero, and those of its decoder layer and of the next ones are what they are by rank."""
    found = {}
    for grouped in (False, True):
        shared = base(folder, torch.bfloat16, grouped, False, 0.0)
        mlp = shared.model.model.layers[1].mlp
        down, up = mlp.down_proj, mlp.up_proj

        def halved(x: torch.Tensor, mlp: Any = mlp, down: Any = down, up: Any = up) -> torch.Tensor:
            up(x)
            found: torch.Tensor = down(mlp.act_fn(mlp.gate_proj(x)))
            return found

        mlp.forward = halved
        shared.step(batch(0, [0, 1]))
        found[grouped] = gradients(shared, [0, 1])
    for name, grad in found[False].items():
        if "layers.1.mlp.up_proj" in name:
            assert not grad.any() and not found[True][name].any()
        else:
            assert float((found[True][name] - grad).norm() / grad.norm()) < 0.05, name


def test_it_is_left_to_what_has_a_kernel_for_it() -> None:
    assert not grouped_products.supported(torch.device("cpu"), torch.bfloat16, [])
    assert not grouped_products.supported(torch.device("cuda"), torch.float16, [])
