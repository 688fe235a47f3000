"""Whole trainings on a shared base: each as alone, in the solo path's order; and the rows that stay hard."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ft_ray.adapter_stack import Bucket
from ft_ray.batch_sampler import RankBatches
from ft_ray.errors import InputError
from ft_ray.hard_rows import attach_folder, row_losses
from ft_ray.objective import plan_batch
from ft_ray.packed_training import PackedRun, adapter_config, train_packed
from ft_ray.recipe import Recipe, from_dict
from ft_ray.shared_base import SharedBase
from tests.token_rows import TokenRows

ROWS = TokenRows(count=20, held_out=6)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(model: Path, **keys: Any) -> Recipe:
    return from_dict({
        "name": "p", "model": {"id": str(model)}, "data": {"train": [{"path": "x"}]}, "lora": {"r": 8, "dropout": 0.0},
        "sequence": {"max_length": 64}, "batch": {"global": 8, "per_device": 4}, "optim": {"lr": 1e-2},
        "schedule": {"epochs": 3}, "precision": "fp32", "gradient_checkpointing": False, "evaluation": {"every": 3},
        **keys,
    })  # fmt: skip


def base(model: Path) -> SharedBase:
    return SharedBase(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))


def test_packed_is_alone_and_the_best_step_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    recipes = {
        "a": recipe(tiny_model),
        "b": recipe(tiny_model, lora={"r": 16, "alpha": 64, "dropout": 0.1}, seed=3, evaluation={"every": 2}),
        "nan": recipe(tiny_model, optim={"lr": 1e30, "max_grad_norm": 0}),
        "early": recipe(tiny_model, optim={"lr": 1e-12}, evaluation={"every": 1, "early_stop": 2}),
    }
    seen: list[int] = []

    def told(found: Any) -> None:
        seen.append(max(run.steps for run in found.values()))

    shared = base(tiny_model)
    found = train_packed(shared, {n: (r, ROWS) for n, r in recipes.items()}, folder=tmp_path, on_step=told)
    assert shared.adapters == () and seen == list(range(1, 10))  # 20 rows, 8 a step: 3 steps an epoch
    shared.close()
    for name in ("a", "b"):
        shared = base(tiny_model)
        alone: PackedRun = train_packed(shared, {name: (recipes[name], ROWS)})[name]
        shared.close()
        assert found[name].history == alone.history and found[name].rows == alone.rows
    run = found["a"]
    assert [step for step, _ in run.history] == [3, 6, 9] and found["b"].history[-1][0] == 9
    assert run.best_loss == min(loss for _, loss in run.history) and run.best_step in (3, 6, 9)
    assert sum(loss for loss, _ in run.rows) / sum(n for _, n in run.rows) == pytest.approx(run.best_loss, rel=1e-12)
    assert len(run.rows) == 6
    assert found["nan"].stopped is not None and found["nan"].best_step is None and math.isinf(found["nan"].best_loss)
    assert found["early"].steps < 9 and not (tmp_path / "nan").exists()
    # What was left in the folder is the adapter of the best step, as peft reads it.
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "a").eval()
    rows, total, tokens = ROWS.tokens("validation"), 0.0, 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        trained = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(tuned(torch.tensor([row["input_ids"]]), labels=labels).loss) * trained
        tokens += trained
    assert total / tokens == pytest.approx(run.best_loss, abs=1e-5)


@pytest.mark.parametrize("places", [2, None])
def test_what_does_not_fit_at_once_follows_and_trains_the_same(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, places: int | None
) -> None:
    """Two at a time, as was said beforehand, or as memory has it that runs out in the third."""
    recipes = {f"t{n}": recipe(tiny_model, seed=n, schedule={"epochs": 1 + n % 2}) for n in range(5)}
    trainings = {name: (one, ROWS) for name, one in recipes.items()}
    shared = base(tiny_model)
    together = train_packed(shared, trainings)
    most: list[int] = []
    attach = Bucket.add

    def full(self: Any, adapter_id: str) -> int:
        if len(self.ids) >= 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        most.append(len(self.ids) + 1)
        return attach(self, adapter_id)

    monkeypatch.setattr(Bucket, "add", full)
    found = train_packed(shared, trainings, places=places)
    assert max(most) == 2 and shared.adapters == ()
    for name in recipes:
        assert found[name].history == together[name].history and found[name].rows == together[name].rows


def test_one_that_does_not_fit_at_all_is_an_error(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, adapter_id: str) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Bucket, "add", full)
    with pytest.raises(torch.OutOfMemoryError):
        train_packed(base(tiny_model), {"a": (recipe(tiny_model), ROWS)})


def test_rows_come_in_the_order_of_the_solo_path(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(tiny_model, schedule={"epochs": 2})
    shared = base(tiny_model)
    taken: list[list[list[int]]] = []
    real = shared.step

    def step(batches: Any) -> Any:
        taken.append([list(ids) for micro in batches["a"] for ids, _ in micro.sequences])
        return real(batches)

    monkeypatch.setattr(shared, "step", step)
    train_packed(shared, {"a": (made, ROWS)})
    shared.close()
    ids = ROWS.tokens("train")["input_ids"]
    sampler, expected = RankBatches(20, plan_batch(made, "cpu"), rank=0, seed=0), []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        micros = [[ids[i] for i in batch if i < 20] for batch in sampler]
        expected += [micros[i] + micros[i + 1] for i in range(0, len(micros), 2)]
    assert taken == expected


def test_row_losses_are_each_rows_own_under_each_adapter(tiny_model: Path, tmp_path: Path) -> None:
    recipes = {"a": recipe(tiny_model), "b": recipe(tiny_model, lora={"r": 16, "dropout": 0.0}, seed=1)}
    shared = base(tiny_model)
    train_packed(shared, {n: (r, ROWS) for n, r in recipes.items()}, folder=tmp_path)
    for name, made in recipes.items():
        attach_folder(shared, name, tmp_path / name, adapter_config(made, 1))
    tokens = ROWS.tokens("train")
    parts = list(row_losses(shared, ["a", "b"], tokens))
    losses = {name: [loss for _, part in parts for loss in part[name]] for name in recipes}
    with pytest.raises(InputError, match="another rank"):
        attach_folder(shared, "c", tmp_path / "a", adapter_config(recipes["b"], 1))
    assert shared.adapters == ("a", "b")
    shared.close()
    assert parts[-1][0] == 20
    for name in recipes:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / name).eval()
        with torch.no_grad():
            own = [
                float(model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss)
                for row in tokens
            ]
        assert losses[name] == pytest.approx(own, abs=1e-4)
