"""One rank's training on a tiny model: the loss does not depend on how the batch is split, packed or resumed."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from ft_ray import base_model, checkpoint, fine_tuner, model_loading, objective, recipe, sft
from ft_ray.batch_sampler import RankBatches
from ft_ray.checkpoint_state import Progress
from ft_ray.errors import TrainingError
from ft_ray.sft import FineTuner
from ft_ray.storage import Store
from tests.token_rows import TokenRows


@dataclass
class Recorder:
    """Hooks that keep events and copies of the checkpoints, and stop when told to."""

    folder: Path
    stop_after: int | None = None
    events: list[dict[str, Any]] = field(default_factory=list)

    def event(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def stop_requested(self) -> bool:
        return self.stop_after is not None and len(self.losses()) + 1 >= self.stop_after

    def save_requested(self) -> bool:
        return False

    def told_to_end(self) -> bool:
        return False

    def begin_save(self) -> None:
        pass

    def save(self, folder: Path, progress: Progress, *, later: Any = None, wait: bool = False) -> str:
        name = f"step-{progress.step}"
        shutil.copytree(folder, self.folder / name, dirs_exist_ok=True)
        shutil.rmtree(folder)
        return name

    def losses(self) -> list[float]:
        return [e["loss"] for e in self.events if e["kind"] == "step"]

    def steps(self, kind: str) -> list[int]:
        return [e["step"] for e in self.events if e["kind"] == kind]


def make(model: Path, **values: Any) -> recipe.Recipe:
    base: dict[str, Any] = {
        "name": "t",
        "model": {"id": str(model)},
        "data": {"train": [{"path": "x"}]},
        "precision": "fp32",
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
        "batch": {"global": 8},
        "sequence": {"max_length": 64},
        "schedule": {"epochs": 2, "warmup": 0},
        "optim": {"lr": 5e-3},
    }
    for key, value in values.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) and key in base else value
    return recipe.from_dict(base)


def build(made: recipe.Recipe, hooks: Recorder, rows: TokenRows | None = None, **more: Any) -> FineTuner:
    files = base_model.resolve(made.model)
    tokenizer = AutoTokenizer.from_pretrained(files.folder)
    return sft.build(made, files, rows or TokenRows(), tokenizer, hooks=hooks, device="cpu", **more)


def train(made: recipe.Recipe, hooks: Recorder, rows: TokenRows | None = None) -> FineTuner:
    trainer = build(made, hooks, rows)
    sft.run(trainer)
    return trainer


def adapter(trainer: FineTuner) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_eight_rows_at_once_equal_eight_accumulated(tiny_model: Path, tmp_path: Path) -> None:
    results = []
    for per_device in (8, 1, 4):
        hooks = Recorder(tmp_path / str(per_device))
        trainer = train(make(tiny_model, batch={"per_device": per_device}), hooks, TokenRows(count=21))
        results.append((hooks.losses(), trainer.progress.best_loss, adapter(trainer)))
    losses, best, weights = results[0]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    for other_losses, other_best, other_weights in results[1:]:
        assert other_losses == pytest.approx(losses, abs=1e-6)
        assert other_best == pytest.approx(best, abs=1e-6)
        for name, tensor in weights.items():
            torch.testing.assert_close(other_weights[name], tensor, atol=5e-5, rtol=0)


def test_the_loss_is_the_mean_over_trained_tokens_of_the_global_batch(tiny_model: Path, tmp_path: Path) -> None:
    """Against plain torch: sum over the batch's trained tokens / their number, one optimizer step = one epoch."""
    rows = TokenRows(count=7)
    hooks = Recorder(tmp_path)
    trainer = build(make(tiny_model, schedule={"epochs": 1}, batch={"per_device": 2}), hooks, rows)
    total, tokens = 0.0, 0
    files = base_model.resolve(trainer.recipe.model)
    plain = model_loading.load_model(files, trainer.recipe, device="cpu", quantized=False)
    for row in rows.tokens("train"):
        labels = torch.tensor(row["labels"][1:])
        with torch.no_grad():
            logits = plain(torch.tensor([row["input_ids"]])).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        tokens += int((labels != -100).sum())
    sft.run(trainer)
    assert len(hooks.losses()) == 1, "7 rows and a masked one are one step of 8"
    assert hooks.losses()[0] == pytest.approx(total / tokens, abs=1e-6)
    assert trainer.progress.trained_tokens == tokens


@pytest.mark.parametrize("packing", [False, True])
def test_the_head_at_trained_positions_only_gives_the_same_gradients(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    """Against TRL's fused head, masked filler rows included."""
    results = []
    for head in (fine_tuner.add_compact_head, lambda model: None):
        monkeypatch.setattr(fine_tuner, "add_compact_head", head)
        trainer = build(make(tiny_model, sequence={"packing": packing}), Recorder(tmp_path), TokenRows(count=5))
        with torch.no_grad():
            for name, parameter in trainer.net.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.linspace(-0.05, 0.05, parameter.numel()).view_as(parameter))
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.net, dict(batch), num_items_in_batch=torch.tensor(7))
        loss.backward()
        gradients = {n: p.grad for n, p in trainer.net.named_parameters() if p.requires_grad}
        results.append((loss.item(), trainer.validation_loss(), gradients))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)
    for name, gradient in results[0][2].items():
        torch.testing.assert_close(gradient, results[1][2][name], rtol=1e-4, atol=1e-7)


def test_packed_equals_unpacked(tiny_model: Path, tmp_path: Path) -> None:
    rows = TokenRows(count=16)
    unpacked, packed = Recorder(tmp_path / "a"), Recorder(tmp_path / "b")
    train(make(tiny_model, schedule={"epochs": 1}, batch={"global": 16}), unpacked, rows)
    sequences = len(rows.packed())
    assert sequences < 16
    made = make(tiny_model, schedule={"epochs": 1}, batch={"global": sequences}, sequence={"packing": True})
    trainer = train(made, packed, rows)
    assert packed.losses() == pytest.approx(unpacked.losses(), abs=2e-6)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" not in batch, "packed rows are kept apart by their positions"
    trained = sum(sum(label != -100 for label in row["labels"]) for row in rows.tokens("train"))
    assert trainer.progress.trained_tokens == trained


def through_a_bucket(folder: Path, address: str) -> Path:
    """What the only rank of a run downloads of a checkpoint, and nothing else."""
    store, name = Store(address), checkpoint.name("0123abcd", 1, "aa")
    checkpoint.commit(store, name, [checkpoint.upload(store, folder, name)])
    return checkpoint.fetch(store, name, checkpoint.others(store, name, 0))


def test_resume_is_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    """With dropout, so that the random state counts; stopped in the middle of an epoch and at its end."""
    often = {"evaluation": {"every": 2}, "checkpoint": {"every": 1}}
    made = make(tiny_model, lora={"dropout": 0.2}, schedule={"epochs": 3}, **often)
    straight = Recorder(tmp_path / "straight")
    whole = train(made, straight, TokenRows(count=30))
    assert len(straight.losses()) == 12
    for stop in (3, 4):
        first, second = Recorder(tmp_path / f"first{stop}", stop_after=stop), Recorder(tmp_path / f"second{stop}")
        stopped = train(made, first, TokenRows(count=30))
        assert stopped.progress.stopped == "interrupted"
        assert first.losses() == straight.losses()[:stop]
        saved = first.folder / f"step-{stop}"
        spent = Progress.read(saved)
        spent.stopped = ""
        resumed = build(made, second, TokenRows(count=30), spent=spent)
        sft.run(resumed, through_a_bucket(saved, f"memory://resumed-{tmp_path.name}-{stop}"))
        assert second.losses() == straight.losses()[stop:], "the same numbers, bit for bit"
        for name, tensor in adapter(whole).items():
            assert torch.equal(adapter(resumed)[name], tensor), name
        assert resumed.progress.best_loss == whole.progress.best_loss
        assert [r["step"] for r in resumed.progress.history if r["kind"] == "step"] == list(range(1, 13))


def test_validation_loss_is_the_same_for_every_batch_size(tiny_model: Path, tmp_path: Path) -> None:
    losses = []
    for per_device in (1, 8):
        made = make(tiny_model, batch={"per_device": per_device})
        trainer = build(made, Recorder(tmp_path), TokenRows(held_out=13))
        losses.append(trainer.validation_loss())
    assert losses[0][1] == losses[1][1]
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-6)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_qlora_gradients_after_an_evaluation_equal_those_before(
    tiny_model: Path, tmp_path: Path, checkpointing: bool
) -> None:
    """bitsandbytes packs 4-bit weights for CPU inference in a no-grad forward; training then loses its gradients."""
    made = make(tiny_model, method="qlora", precision="bf16", gradient_checkpointing=checkpointing)
    trainer = build(made, Recorder(tmp_path))
    assert model_loading.count_quantized(trainer.model) == 14
    # B starts at zero, and then A has no gradient: give B values, so that every layer must get one.
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-0.05, 0.05, parameter.numel()).view_as(parameter))
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)

    def gradients() -> dict[str, torch.Tensor]:
        trainer.model.train()
        trainer.model.zero_grad()
        batch = next(iter(trainer.get_train_dataloader()))
        with trainer.compute_loss_context_manager():
            trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).backward()
        return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}

    before = gradients()
    loss_before = trainer.validation_loss()
    after = gradients()
    assert before.keys() == after.keys()
    assert len(before) == 28
    for name, gradient in before.items():
        assert float(gradient.norm()) > 0, f"{name} has no gradient"
        assert torch.equal(after[name], gradient), f"{name} changed after an evaluation"
    assert trainer.validation_loss() == loss_before


def test_qlora_merges_right_after_an_evaluation(tiny_model: Path, tmp_path: Path) -> None:
    """The merged weights are quantized again, within 0.1 of their norm; packed bytes read as plain are 1.4 off."""
    from bitsandbytes.functional import dequantize_4bit

    eight_bit = {"optim": {"name": "paged_adamw_8bit"}, "schedule": {"epochs": 1}}
    made = make(tiny_model, method="qlora", precision="bf16", **eight_bit)
    trainer = train(made, Recorder(tmp_path))

    def plain(weight: Any) -> torch.Tensor:
        return dequantize_4bit(weight.data, weight.quant_state).float()

    layers = {n: m for n, m in trainer.model.named_modules() if hasattr(m, "base_layer")}
    deltas = {n: m.get_delta_weight("default").detach().float() for n, m in layers.items()}
    expected = {n: plain(m.base_layer.weight) + deltas[n] for n, m in layers.items()}
    trainer.validation_loss()
    merged = trainer.model.merge_and_unload(safe_merge=False)
    assert len(expected) == 14
    for name, weight in expected.items():
        got = plain(merged.get_submodule(name.removeprefix("base_model.model.")).weight)
        assert ((got - weight).norm() / weight.norm()).item() < 0.15, name


def test_a_diverged_loss_names_the_step_and_keeps_the_checkpoints(tiny_model: Path, tmp_path: Path) -> None:
    made = make(tiny_model, checkpoint={"every": 1}, schedule={"epochs": 3})
    hooks = Recorder(tmp_path)
    trainer = build(made, hooks)
    original = trainer.compute_loss

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        loss = original(*args, **kwargs)
        return loss * math.nan if trainer.state.global_step == 3 else loss

    trainer.compute_loss = poisoned  # a row that makes the loss NaN, without having to find one
    said = r"the loss became nan at step 4: lower optim.lr.*the checkpoint of step 3 is kept"
    with pytest.raises(TrainingError, match=said):
        sft.run(trainer)
    assert hooks.steps("checkpoint") == [1, 2, 3]


def test_weights_that_an_update_ruined_are_not_saved(tiny_model: Path, tmp_path: Path) -> None:
    """The loss of a step is measured before its update: what step 2 does to the weights shows at step 3."""
    wild = {"lr": 1e30, "max_grad_norm": 1e30}  # by the warm-up's first step none of it
    made = make(tiny_model, optim=wild, schedule={"epochs": 2, "warmup": 2}, checkpoint={"every": 1})
    hooks = Recorder(tmp_path)
    trainer = build(made, hooks)
    said = r"no number by the update of step 2: .*\(row .*\); the checkpoint of step 1 is kept\.$"
    with pytest.raises(TrainingError, match=said):
        sft.run(trainer)
    assert (hooks.steps("checkpoint"), hooks.steps("step")) == ([1], [1, 2])


class Placed(TokenRows):
    """Rows that know their file and line; row 5 is the one that breaks the loss."""

    def places(self, split: str, numbers: Sequence[int]) -> list[str]:
        return [f"{split}.jsonl:{number + 1}" for number in numbers]


def test_a_loss_that_is_no_number_names_the_rows_of_its_batch(tiny_model: Path, tmp_path: Path) -> None:
    """Two rows a forward pass; the pass that holds row 5 is named, and the other three of its step are not."""
    made = make(tiny_model, batch={"per_device": 2}, schedule={"epochs": 1})
    trainer = build(made, Recorder(tmp_path), Placed())
    rows = list(trainer.train_dataset)
    batches = RankBatches(len(rows), trainer.batch, rank=0, seed=0)
    step, around = next((s, b) for s in (1, 2, 3) for b in batches.rows_of(s) if 5 in b)
    original = trainer.compute_loss

    def poisoned(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
        length = len(rows[5]["input_ids"])
        held = any(ids[:length].tolist() == rows[5]["input_ids"] for ids in inputs["input_ids"])
        loss = original(model, inputs, **kwargs)
        return loss * math.nan if held else loss

    trainer.compute_loss = poisoned
    named = ", ".join(f"train.jsonl:{row + 1}" for row in around)
    with pytest.raises(TrainingError, match=rf"nan at step {step}: .*the rows of its batch \({named}\);"):
        sft.run(trainer)


def test_early_stopping_keeps_the_best(tiny_model: Path, tmp_path: Path) -> None:
    """Random answers cannot be generalised: with a high rate the validation loss soon rises."""
    made = make(
        tiny_model,
        optim={"lr": 0.1},
        lora={"r": 16, "alpha": 64},
        schedule={"epochs": 20, "type": "constant"},
        evaluation={"every": 3, "early_stop": 2},
    )
    hooks = Recorder(tmp_path)
    trainer = train(made, hooks)
    progress = trainer.progress
    assert progress.stopped == "early_stop"
    assert progress.step < 60
    evaluations = [e for e in hooks.events if e["kind"] == "eval"]
    assert progress.best_loss == min(e["loss"] for e in evaluations)
    assert progress.best_step is not None
    assert progress.best_step <= progress.step - 6
    assert progress.best_checkpoint == f"step-{progress.best_step}"
    assert (tmp_path / f"step-{progress.best_step}" / "adapter_model.safetensors").exists()


def test_by_default_layers_are_recomputed_and_the_logits_never_exist_at_once(tiny_model: Path, tmp_path: Path) -> None:
    trainer = build(make(tiny_model, method="full", schedule={"epochs": 1}), Recorder(tmp_path))
    whole: list[int] = []
    trainer.net.get_output_embeddings().register_forward_hook(lambda *_: whole.append(1))
    sft.run(trainer)
    assert trainer.net.is_gradient_checkpointing
    assert whole == [], "neither in training nor in validation"
    trainer.net(input_ids=torch.tensor([[1, 5]]))
    assert whole == [1], "as an ordinary forward pass makes them"


def test_a_spent_budget_stops_with_a_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    made = make(tiny_model, budget={"usd": 1e-9, "usd_per_hour": 1.0})
    hooks = Recorder(tmp_path)
    trainer = train(made, hooks)
    assert (trainer.progress.stopped, trainer.progress.step) == ("budget", 1)
    assert hooks.steps("checkpoint") == [1]


def test_durations_pace_evaluations_and_checkpoints(tiny_model: Path, tmp_path: Path) -> None:
    made = make(tiny_model, evaluation={"every": "1h"}, checkpoint={"every": "0s"})
    hooks = Recorder(tmp_path)
    train(made, hooks)
    assert hooks.steps("eval") == [6], "the end is always measured"
    assert hooks.steps("checkpoint") == [1, 2, 3, 4, 5, 6]


def test_full_fine_tuning_trains_every_parameter(tiny_model: Path, tmp_path: Path) -> None:
    hooks = Recorder(tmp_path)
    made = make(tiny_model, method="full", precision="bf16", optim={"lr": 1e-3}, schedule={"epochs": 1})
    trainer = build(made, hooks)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    sft.run(trainer)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters()), "master weights stay fp32"
    unchanged = [n for n, p in trainer.model.named_parameters() if torch.equal(p, before[n])]
    assert unchanged == []
    assert (tmp_path / "step-3" / "model.safetensors").exists()


def test_a_stop_while_loading_trains_nothing(tiny_model: Path, tmp_path: Path) -> None:
    trainer = train(make(tiny_model), Recorder(tmp_path, stop_after=0))
    assert (trainer.progress.stopped, trainer.progress.step) == ("interrupted", 0)


def test_a_stop_at_the_last_step_measures_it_all_the_same(tiny_model: Path, tmp_path: Path) -> None:
    """Nobody would later: the same command takes its checkpoint for the result."""
    made = make(tiny_model, evaluation={"every": 2}, schedule={"epochs": 1})
    whole = train(made, Recorder(tmp_path / "whole"))
    total = whole.progress.step
    stopped = train(made, Recorder(tmp_path / "stopped", stop_after=total)).progress
    saved = Progress.read(tmp_path / "stopped" / f"step-{total}")
    assert stopped.stopped == saved.stopped == "interrupted" and saved.step == total
    assert saved.last_eval_step == total and saved.best_loss == whole.progress.best_loss
    assert objective.ended(made, vars(saved)) == ""


def test_without_validation_rows_the_last_weights_count(tiny_model: Path, tmp_path: Path) -> None:
    hooks = Recorder(tmp_path)
    trainer = train(make(tiny_model), hooks, TokenRows(held_out=0))
    assert hooks.steps("eval") == []
    assert trainer.progress.best_checkpoint is None
    assert hooks.steps("checkpoint")[-1] == 6


class WithoutEos(TokenRows):
    """Rows whose EOS lost its label on the way, as a collator that masks padding does where EOS is the pad token."""

    def tokens(self, split: str) -> Dataset:
        def mask(row: dict[str, Any]) -> dict[str, Any]:
            return {"labels": [-100 if label == 2 else label for label in row["labels"]]}

        return super().tokens(split).map(mask)


def test_an_eos_that_is_not_trained_is_an_error_at_the_first_batch(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="do not end in a trained EOS token"):
        train(make(tiny_model), Recorder(tmp_path), WithoutEos())
