"""Planted pathologies on the tiny model, trained for real: each is named, and the proposed patch helps."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ft_ray import base_model, recipe, remedies, sft
from ft_ray.chat import chat_of
from ft_ray.dataset import prepare
from ft_ray.diagnosis import Diagnosis, Watch, after
from ft_ray.errors import TrainingError
from ft_ray.evaluation import HFModel, evaluate
from ft_ray.forgetting import drift, general_data
from ft_ray.parity import heldout_loss
from ft_ray.preflight import check
from ft_ray.prepared_data import Prepared
from ft_ray.recipe import Recipe
from ft_ray.sft import FineTuner, Progress

pytestmark = pytest.mark.faults  # twelve real trainings: half a minute


@dataclass
class Hooks:
    """Keeps checkpoints in memory of the test: none. Watches like the pipeline does."""

    watch: Watch
    said: list[Diagnosis] = field(default_factory=list)

    def event(self, event: dict[str, Any]) -> None:
        self.said += self.watch(event)

    def stop_requested(self) -> bool:
        return False

    def save_requested(self) -> bool:
        return False

    def told_to_end(self) -> bool:
        return False

    def begin_save(self) -> None:
        pass

    def save(self, folder: Path, progress: Progress, *, later: Any = None, wait: bool = False) -> str:
        return f"step-{progress.step}"


@dataclass
class Trained:
    recipe: Recipe
    trainer: FineTuner
    prepared: Prepared
    history: list[dict[str, Any]]
    live: list[Diagnosis]
    error: str | None

    def codes(self, **more: Any) -> list[str]:
        return [d.code for d in self.diagnosed(**more)]

    def diagnosed(self, **more: Any) -> list[Diagnosis]:
        return after(self.history, self.recipe, error=self.error, **more)

    def losses(self) -> list[float]:
        return [e["loss"] for e in self.history if e["kind"] == "eval"]


def train(made: Recipe, cache: Path) -> Trained:
    files = base_model.resolve(made.model)
    chat = chat_of(made.model, files.folder)
    prepared = prepare(made, chat, model_hash=files.hash, cache=cache)
    hooks, error = Hooks(Watch(made)), None
    tokenizer = AutoTokenizer.from_pretrained(files.folder)
    trainer = sft.build(made, files, prepared, tokenizer, hooks=hooks, device="cpu")
    try:
        sft.run(trainer)
    except TrainingError as raised:
        error = str(raised)
    return Trained(made, trainer, prepared, trainer.progress.history, hooks.said, error)


def make(model: Path, rows: Path, **values: Any) -> Recipe:
    base: dict[str, Any] = {
        "name": "t",
        "model": {"id": str(model)},
        "data": {"train": [{"path": str(rows)}], "split": {"validation": 0.2, "test": 0}},
        "precision": "fp32",
        "gradient_checkpointing": False,
        "lora": {"r": 8, "alpha": 16, "dropout": 0.0},
        "batch": {"global": 8},
        "sequence": {"max_length": 96},
        "schedule": {"epochs": 4, "warmup": 0.03},
        "optim": {"lr": 5e-3},
        "evaluation": {"every": "epoch"},
        "checkpoint": {"every": 10_000},
    }
    for key, value in values.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) and key in base else value
    return recipe.from_dict(base)


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return path


WORDS = {"a": "amber", "b": "basil", "c": "cedar", "d": "delta"}


def task(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Something to learn: the answer names the prompt's letter, as JSON."""
    rng = random.Random(seed)
    letters = [rng.choice("abcdef") for _ in range(count)]
    return [(f"{i} say {letter}", f'{{"letter":"{letter}"}}') for i, letter in enumerate(letters)]


def general(count: int, seed: int = 1) -> list[tuple[str, str]]:
    """What the base knows: the word of a letter."""
    rng = random.Random(seed)
    letters = [rng.choice("abcd") for _ in range(count)]
    return [(f"{i} word of {letter}", WORDS[letter]) for i, letter in enumerate(letters)]


def noise(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Nothing to learn but by heart."""
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choice("abcdefgh") for _ in range(6))

    return [(f"{i} {word()}", word()) for i in range(count)]


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, taught the general data and to write JSON: a base that adapters can build on."""
    folder = tmp_path_factory.mktemp("base")
    other = [(f"{i} number {n}", f'{{"number":"{n}"}}') for i, n in enumerate(random.Random(2).choices("0123", k=200))]
    rows = write(folder / "rows.jsonl", [*general(400), *other, *noise(100, 3)])
    made = make(tiny_model, rows, method="full", optim={"lr": 4e-3}, schedule={"epochs": 6}, batch={"global": 16})
    run = train(made, folder / "cache")
    out = folder / "model"
    shutil.copytree(tiny_model, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    run.trainer.net.save_pretrained(out)
    return out


def test_a_sound_run_has_no_finding(base: Path, tmp_path: Path) -> None:
    measured = {"every": "epoch", "format_rows": 8, "max_new_tokens": 24}
    run = train(make(base, write(tmp_path / "rows.jsonl", task(160)), evaluation=measured), tmp_path / "cache")
    assert run.losses()[-1] < 0.2
    assert [d.code for d in run.diagnosed() if d.severity != "info"] == []
    assert run.live == []
    valid = [e["valid"] for e in run.history if e["kind"] == "eval"]
    assert len(valid) == 4 and valid[-1] == 1.0, "the format over time"
    plain = train(make(base, tmp_path / "rows.jsonl"), tmp_path / "cache")
    assert plain.losses() == run.losses(), "answering between steps changes no step"


def test_a_rate_100_times_too_high(base: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", task(160))
    run = train(make(base, rows, optim={"lr": 0.5}, schedule={"epochs": 6}), tmp_path / "cache")
    (found,) = [d for d in run.diagnosed() if d.code == "divergence"]
    assert found.severity == "error" and "0.5" in found.sentence
    assert [d.code for d in run.live][:1] == ["divergence"], "said while it went on"
    mended = train(remedies.apply(run.recipe, [found.patch]), tmp_path / "cache")
    assert "divergence" not in mended.codes()
    assert mended.losses()[-1] < 0.5 * run.losses()[-1]


def test_a_rate_100_times_too_high_without_a_spike(tiny_model: Path, tmp_path: Path) -> None:
    """An untrained model is thrown off within the warm-up: no gradient stands out, and then there is none."""
    rows = write(tmp_path / "rows.jsonl", task(160))
    run = train(make(tiny_model, rows, optim={"lr": 0.5}), tmp_path / "cache")
    (found,) = [d for d in run.diagnosed() if d.code == "divergence"]
    assert "vanished" in found.sentence and found.patch["optim.lr"] == 5e-4
    mended = train(remedies.apply(run.recipe, [found.patch]), tmp_path / "cache")
    assert "divergence" not in mended.codes()
    assert mended.losses()[-1] < run.losses()[-1] - 0.05
    assert all(d.code == "underfitting" and d.patch["optim.lr"] > 5e-4 for d in mended.diagnosed() if d.patch)


def test_twenty_epochs_on_fifty_rows(base: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", noise(62))
    made = make(base, rows, schedule={"epochs": 20}, optim={"lr": 1e-2}, lora={"r": 32, "alpha": 64})
    run = train(made, tmp_path / "cache")
    (found,) = [d for d in run.diagnosed() if d.code == "overfitting"]
    assert "overfitting" in [d.code for d in run.live]
    mended = train(remedies.apply(run.recipe, [found.patch]), tmp_path / "cache")
    assert mended.losses()[-1] < run.losses()[-1]
    assert mended.trainer.progress.step < run.trainer.progress.step / 2
    assert "overfitting" not in mended.codes()


def answers(run: Trained, rows: list[tuple[str, str]]) -> list[dict[str, Any]]:
    files = base_model.resolve(run.recipe.model)
    model = HFModel(run.trainer.net, chat_of(run.recipe.model, files.folder))
    table = [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]} for p, c in rows]
    return evaluate(model, table, "json_match", max_new_tokens=24).predictions


def test_training_rows_that_break_the_format(base: Path, tmp_path: Path) -> None:
    """The answers about one letter lost their end; the references of the test are whole."""
    broken = [(p, c[:-2] if p.endswith("d") else c) for p, c in task(240)]
    rows = write(tmp_path / "rows.jsonl", broken)
    held = task(40, seed=9)
    run = train(make(base, rows, schedule={"epochs": 6}), tmp_path / "cache")
    said = answers(run, held)
    files = base_model.resolve(run.recipe.model)
    codes = check(run.recipe, run.prepared, chat_of(run.recipe.model, files.folder)).codes()
    (found,) = [d for d in run.diagnosed(predictions=said, data_codes=codes) if d.code == "broken_format"]
    assert found.patch == {"data.answers": "json"}
    mended = train(remedies.apply(run.recipe, [found.patch]), tmp_path / "cache")
    assert mended.prepared.dropped["answers"] > 20
    better = answers(mended, held)
    before, after_ = (sum(p["scores"]["json_valid"] for p in side) for side in (said, better))
    assert after_ > before and after_ >= 38
    assert "broken_format" not in mended.codes(predictions=better)


def test_general_data_lost(base: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", task(200))
    known = write(tmp_path / "general.jsonl", general(200, seed=5))
    made = make(base, rows, optim={"lr": 1e-2}, schedule={"epochs": 4}, evaluation={"forgetting": str(known)})
    files = base_model.resolve(made.model)
    chat = chat_of(made.model, files.folder)

    def measured(run: Trained) -> dict[str, Any]:
        data = general_data(run.recipe, files, chat)
        plain = HFModel.load(files.folder, chat, run.recipe)
        tuned = HFModel(run.trainer.net, chat)
        said = [m.generate(data.prompts, data.max_new_tokens) for m in (plain, tuned)]
        losses = {"base": heldout_loss(plain, data.tokens), "tuned": heldout_loss(tuned, data.tokens)}
        return {"general_loss": losses, "general_drift": drift(*said)}

    run = train(made, tmp_path / "cache")
    before = measured(run)
    (found,) = [d for d in run.diagnosed(scores=before) if d.code == "forgetting"]
    assert before["general_drift"]["changed"] > 0
    mended = train(remedies.apply(run.recipe, [found.patch]), tmp_path / "cache")
    now = measured(mended)
    assert found.patch["data.general"]["share"] == 0.15
    share = mended.prepared.counts["general"] / (mended.prepared.counts["general"] + mended.prepared.counts["train"])
    assert 0.1 < share < 0.2
    assert now["general_loss"]["tuned"] < 0.5 * before["general_loss"]["tuned"]
    assert now["general_drift"]["similarity"] > before["general_drift"]["similarity"]
    assert mended.losses()[-1] < 0.3, "the task is still learnt"
