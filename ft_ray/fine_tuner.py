"""The trainer of one rank: TRL's SFTTrainer with our data order, loss bookkeeping and checkpoints.

It knows no Ray: what it tells the outside (events), asks it (stop) and gives it (checkpoint files) goes through
`Hooks`. What TRL does otherwise is replaced here: its data order, its evaluation loss (a mean of batch means)
and its checkpoint layout.
"""

from __future__ import annotations

import logging
import math
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ft_ray import checkpoint_state, divergence, fused_lora, kernels, model_loading, objective
from ft_ray.batch_sampler import FilledRows, RankBatches, evaluation_batches
from ft_ray.checkpoint_state import TOLD_TO_END, Progress
from ft_ray.compact_head import add_compact_head
from ft_ray.errors import Diverged, TrainingError
from ft_ray.format_probe import validity
from ft_ray.objective import BatchPlan, StepPlan
from ft_ray.rank_hooks import Hooks, Sharding
from ft_ray.recipe import Recipe

__all__ = ["FineTuner", "world"]

logger = logging.getLogger("ft_ray")

_STOP_REASONS = ("", "interrupted", "budget", TOLD_TO_END)


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class _Pace(TrainerCallback):
    """After every step: what is due, decided by rank 0's clock and told to all ranks."""

    def __init__(self, trainer: FineTuner) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        evaluate, save, stop = self.trainer.agree_what_is_due(state.global_step)
        control.should_evaluate, control.should_save = evaluate, save
        if self.trainer.sharding is not None and not stop and self.trainer.saves_before_the_end():
            self.trainer.sharding.prepare_saves(self.trainer)
        if stop:
            self.trainer.progress.stopped = _STOP_REASONS[stop]
            control.should_training_stop = True


class FineTuner(SFTTrainer):
    """SFTTrainer with exact data order, token-mean validation loss, and checkpoints given to `Hooks`."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        model: Any,
        args: SFTConfig,
        rows: Any,
        validation: Any,
        tokenizer: PreTrainedTokenizerBase,
        batch: BatchPlan,
        steps: StepPlan,
        hooks: Hooks,
        progress: Progress,
        eos_ids: frozenset[int],
        sharding: Sharding | None = None,
        places: Callable[[Sequence[int]], list[str]] | None = None,
    ) -> None:
        self.sharding, self.places = sharding, places
        self._passes: list[torch.Tensor] = []
        self.last_inputs: Any = None  # of a forward pass of this rank
        self.saved_step = self.proven_step = progress.step  # of a checkpoint; of one that a good step followed
        self.recipe, self.batch, self.steps, self.hooks, self.progress = recipe, batch, steps, hooks, progress
        self.rank, self.workers = world()
        self._pad_id = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
        self._validation = validation
        self._eos_ids, self._eos_checked = eos_ids, False
        self._eval_every, self._eval_seconds = objective.cadence(recipe.evaluation.every, steps)
        self._save_every, self._save_seconds = objective.cadence(recipe.checkpoint.every, steps)
        self._spent = progress.seconds
        self._began = self._last_step = self._last_eval = self._last_save = time.monotonic()
        self._step_tokens = 0
        self._pace: float | None = None
        self.told_to_end: int | None = None  # the rank that is
        super().__init__(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
        if args.device.type == "cpu" and recipe.method != "full":
            add_compact_head(self.net.get_base_model())
        # TRL's loss divides by the global batch's trained tokens itself, whatever the model's forward takes.
        self.model_accepts_loss_kwargs = True
        self.progress.total, self.progress.workers, self.progress.facts = steps.total, self.workers, self.facts()
        self.add_callback(_Pace(self))

    @property
    def net(self) -> Any:
        """The model as it was given: not wrapped for data parallelism, an adapter still on it."""
        return self.model

    @property
    def whole_forward(self) -> Any:
        """What to call for a forward pass outside the training loop: sharded weights are gathered by their wrapper."""
        return self.model_wrapped if self.sharding is not None and self.sharding.shards_weights else self.net

    # Data

    def get_train_dataloader(self) -> DataLoader[Any]:
        rows: Any = self.train_dataset
        sampler = RankBatches(len(rows), self.batch, rank=self.rank, seed=self.recipe.seed)
        return _EpochLoader(FilledRows(rows, self._pad_id), batch_sampler=sampler, collate_fn=self._collated)

    def _collated(self, rows: list[Any]) -> dict[str, Any]:
        """The collated batch; the first one is checked: what the loss sees must end its answers in EOS.

        A stop token that is masked on the way was seen in other trainers (axolotl #3754): the model never stops.
        """
        collate: Any = self.data_collator
        batch: dict[str, Any] = collate(rows)
        if not self._eos_checked:
            self._eos_checked = True
            trained = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)
            ends = trained[:, :-1][(trained[:, :-1] != -100) & (trained[:, 1:] == -100)]
            if not len(ends) or not torch.isin(ends, torch.tensor(sorted(self._eos_ids))).all():
                raise TrainingError(
                    "answers in the first batch do not end in a trained EOS token: the model would never stop; "
                    "check the chat template, and that padding does not mask EOS."
                )
        return batch

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        tokens = super()._get_num_items_in_batch(batch_samples, device)
        self._step_tokens = int(tokens) if tokens is not None else 0
        return tokens

    # What is due

    def agree_what_is_due(self, step: int) -> tuple[bool, bool, int]:
        """(evaluate, save, stop code) of this step, the same on every rank."""
        now, last = time.monotonic(), step >= self.steps.total
        self.progress.step, self.progress.seconds = step, self._spent + now - self._began
        due = [0, 0, 0, self.rank + 1 if self.hooks.told_to_end() else 0]
        if self.rank == 0:
            stop = 0
            if self.hooks.stop_requested():
                stop = 1
            elif not last and self.progress.seconds >= objective.budget_seconds(self.recipe):
                stop = 2
            evaluate = self._due(step, now, self._eval_every, self._eval_seconds, self._last_eval)
            save = self.hooks.save_requested() or self._save_due(step, now)
            # Who stops does not wait for it, but at the last step: that is the result, once it is asked for again.
            measure = bool(len(self._validation)) and (last or (evaluate and stop != 1))
            due = [int(measure), int(save or last or stop > 0), stop, due[3]]
        due = self.agree(*due)
        stop, told = due[2], due[3]
        if told and not last and not stop:
            self.told_to_end = told - 1
            if self.rank == 0:
                message = f"rank {told - 1} was told to end: saving a checkpoint now"
                self.hooks.event({"kind": "status", "message": message})
            return False, True, _STOP_REASONS.index(TOLD_TO_END)
        return bool(due[0]), bool(due[1]), stop

    def agree(self, *numbers: int) -> list[int]:
        """On every rank, the largest of each number over the ranks (none is negative)."""
        if self.workers == 1:
            return list(numbers)
        shared = torch.tensor(numbers, device=self.args.device)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        largest: list[int] = shared.tolist()
        return largest

    def _save_due(self, step: int, now: float) -> bool:
        if self._save_every is not None:
            return objective.save_due(step, self._save_every)
        # As `save_due`, and before the step that would make it late.
        return now + (self._pace or 0.0) - self._last_save >= (self._save_seconds or 0.0) / 2

    def saves_before_the_end(self) -> bool:
        """Whether checkpoints come while training goes on: what is due, or a best loss."""
        first = [self._save_every and max(1, self._save_every // 2)]
        first += [self._eval_every] if len(self._validation) else []
        return any(step is None or step < self.steps.total for step in first)

    @staticmethod
    def _due(step: int, now: float, every: int | None, seconds: float | None, last: float) -> bool:
        return step % every == 0 if every is not None else now - last >= (seconds or 0.0)

    # Numbers

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Once a step: checks that the numbers are finite, and tells the outside. Raises Diverged."""
        extra = {key: sum(v) / len(v) for key, v in self._metrics["train"].items() if v}
        accuracy = extra.get("mean_token_accuracy", math.nan)
        self._metrics["train"].clear()
        self.control.should_log = False
        if "loss" not in logs:
            return
        step, loss = self.state.global_step, logs["loss"]
        norm = float(logs.get("grad_norm", 0.0))
        # With fp16 a scaled gradient may overflow: the step is then skipped and the scale lowered.
        passes, self._passes = self._passes, []
        if not math.isfinite(loss) or (not math.isfinite(norm) and not self.args.fp16):
            what = "loss" if not math.isfinite(loss) else "gradient"
            found = loss if what == "loss" else norm
            raise Diverged(f"the {what} became {found} at step {step}: {divergence.advice(self, step, passes)}.")
        self.proven_step = self.saved_step
        now = time.monotonic()
        elapsed = max(now - self._last_step, 1e-9)
        self._last_step = now
        self._pace = elapsed if self._pace is None else 0.8 * self._pace + 0.2 * elapsed
        tokens = int(extra.get("num_tokens", 0))
        seen, self._seen_tokens = tokens - getattr(self, "_seen_tokens", 0), tokens
        self.progress.trained_tokens += self._step_tokens
        record = {
            "kind": "step",
            "step": step,
            "total": self.steps.total,
            "epoch": round(step / self.steps.per_epoch, 4),
            "loss": loss,
            "accuracy": accuracy if math.isfinite(accuracy) else None,
            "lr": logs.get("learning_rate"),
            "grad_norm": norm,
            "tokens": seen,
            "tokens_per_second": seen / elapsed,
            "seconds": self.progress.seconds,
        }
        self.progress.history.append(record)
        if self.rank == 0:
            left = self._pace * (self.steps.total - step)
            self.hooks.event({**record, "seconds_left": left, "peak_memory_bytes": self.peak_memory()})

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._passes.append(loss.detach())
        self.last_inputs = args[1] if len(args) > 1 else kwargs["inputs"]
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The validation loss, early stopping, and whether this is the best so far."""
        self.control.should_evaluate = False
        self._last_eval = time.monotonic()
        if self.rank == 0:
            self.hooks.event({"kind": "status", "message": "measuring the validation loss"})
        loss, tokens = self.validation_loss()
        step, progress = self.state.global_step, self.progress
        gained = math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss)
        progress.last_eval_step = step
        if gained:
            progress.best_loss, progress.best_step, progress.without_gain = loss, step, 0
            self.control.should_save = True  # the best is a checkpoint of its own, kept by retention
        else:
            progress.without_gain += 1
            patience = self.recipe.evaluation.early_stop
            if patience is not None and progress.without_gain >= patience and step < self.steps.total:
                progress.stopped = "early_stop"
                self.control.should_training_stop = self.control.should_save = True
        record = {"kind": "eval", "step": step, "loss": loss, "tokens": tokens, "best": gained}
        if self.recipe.evaluation.format_rows:
            record["valid"] = validity(self.recipe, self.net, self.processing_class, self._validation)
        progress.history.append(record)
        if self.rank == 0:
            self.hooks.event(record)
        self._last_step = time.monotonic()
        return {"validation_loss": loss}

    def validation_loss(self) -> tuple[float, int]:
        """Sum of token losses / trained tokens over the validation rows, the same for any batch and ranks."""
        rows = FilledRows(self._validation, self._pad_id)
        known = "length" in self._validation.column_names  # else every row is read to sort them
        lengths = self._validation["length"][:] if known else [len(ids) for ids in self._validation["input_ids"]]
        batches = evaluation_batches(lengths, self.batch.per_device, rank=self.rank, workers=self.workers)
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        told = time.monotonic()
        was_training = self.net.training
        collate: Any = self.data_collator
        self.net.eval()
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                for number, batch in enumerate(batches):
                    inputs = self._prepare_inputs(collate([rows[i] for i in batch]))
                    outputs = self.whole_forward(**inputs, fused_lm_head=True)
                    sums[0] -= outputs.log_probs.double().sum()
                    sums[1] += outputs.label_mask.sum()
                    if self.rank == 0 and time.monotonic() - told > 5:
                        told = time.monotonic()
                        message = f"measuring the validation loss, batch {number + 1} of {len(batches)}"
                        self.hooks.event({"kind": "status", "message": message})
        finally:
            self.net.train(was_training)
        if self.workers > 1:
            torch.distributed.all_reduce(sums)
        return float(sums[0] / sums[1].clamp(min=1)), int(sums[1])

    def facts(self) -> dict[str, Any]:
        """What is trained, and how it is split."""
        return {
            "device": str(self.args.device),
            "quantized_modules": model_loading.count_quantized(self.net),
            "fused_modules": kernels.count(self.net),
            "fused_adapters": fused_lora.count(self.net),
            "trainable_parameters": sum(
                getattr(p, "ds_numel", p.numel()) for p in self.net.parameters() if p.requires_grad
            ),
            "per_device": self.batch.per_device,
            "accumulation": self.batch.accumulation,
        }

    def peak_memory(self) -> int:
        """Bytes: the GPU's where there is one, else the process's resident set."""
        if self.args.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._last_save = time.monotonic()
        started, step = time.monotonic(), self.state.global_step
        self.hooks.begin_save()
        divergence.check_weights(self, step)
        if self.rank == 0:
            self.hooks.event({"kind": "status", "message": f"saving the checkpoint of step {step}"})
        folder = Path(tempfile.mkdtemp(prefix="ft-ray-checkpoint-"))
        try:
            later = checkpoint_state.write(self, self.sharding, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        # With a checkpoint a step there is nothing halfway, and who is told to end has no next save that would wait.
        every_step = self._save_every == 1 or self._save_seconds == 0
        wait = every_step or self.told_to_end is not None
        name = self.hooks.save(folder, self.progress, later=later, wait=wait)
        self.saved_step = step
        if self.progress.best_step == step:
            self.progress.best_checkpoint, self.proven_step = name, step
        seconds = time.monotonic() - started
        if self.rank == 0:
            self.hooks.event({"kind": "checkpoint", "step": step, "name": name, "seconds": seconds})
        self._last_step = time.monotonic()

    def _prepare_for_training(self, max_steps: Any, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """As the trainer does; a sharded state is taken over once optimizer and shards exist."""
        prepare: Any = super()._prepare_for_training
        if self.sharding is None or resume_from_checkpoint is None:
            return prepare(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = prepare(max_steps, train_dataloader, None)
        checkpoint_state.load_sharded(self, self.sharding, Path(resume_from_checkpoint))
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.sharding is None:  # else the optimizer's shards do not exist yet: _prepare_for_training loads both
            checkpoint_state.load_weights(Path(resume_from_checkpoint), self.net if model is None else model)


class _EpochLoader(DataLoader[Any]):
    """A loader whose rows follow the epoch; the trainer calls `set_epoch` before each pass.

    Skipping to a position wraps the sampler in another loader; the trainer then reaches the sampler itself.
    """

    def set_epoch(self, epoch: int) -> None:
        sampler = self.batch_sampler
        assert isinstance(sampler, RankBatches)
        sampler.set_epoch(epoch)
