"""Whole trainings of many recipes on one shared base: same order of rows, schedule and best step as each alone.

What a sweep's confirmation uses: everything runs to its end, nothing is stopped. Rows come in the order that the
solo path (`batch_sampler.RankBatches`) gives them, so that a training here and one alone see the same batches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ft_ray import objective
from ft_ray.adapter_config import AdapterConfig
from ft_ray.batch_sampler import RankBatches
from ft_ray.forward_groups import out_of_memory
from ft_ray.recipe import Recipe
from ft_ray.segments import MicroBatch
from ft_ray.shared_base import SharedBase

__all__ = ["PackedRun", "Rows", "adapter_config", "train_packed"]

logger = logging.getLogger("ft_ray")

_BATCH_TOKENS = 8192


class Rows(Protocol):
    """The prepared data as a training needs it; `dataset.Prepared` is one."""

    def tokens(self, split: str) -> Any: ...
    def packed(self) -> Any: ...


@dataclass
class PackedRun:
    """One training: validation loss by step, the best of them, and that step's (loss sum, tokens) of each row."""

    history: list[tuple[int, float]] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float = math.inf
    rows: tuple[tuple[float, int], ...] = ()
    stopped: str | None = None
    steps: int = 0


def adapter_config(recipe: Recipe, total_steps: int) -> AdapterConfig:
    """The recipe's adapter as the shared base takes it."""
    lora, optim = recipe.lora, recipe.optim
    return AdapterConfig(
        total_steps=total_steps, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets,
        rslora=lora.rslora, lr=optim.lr, weight_decay=optim.weight_decay, betas=optim.betas, eps=optim.eps,
        max_grad_norm=optim.max_grad_norm, schedule=recipe.schedule.type, warmup=recipe.schedule.warmup,
        seed=recipe.seed,
    )  # fmt: skip


class _Training:
    def __init__(self, recipe: Recipe, prepared: Rows, device: str) -> None:
        self.rows = prepared.packed() if recipe.sequence.packing else prepared.tokens("train")
        self.plan = objective.plan_steps(recipe, len(self.rows))
        batch = objective.plan_batch(recipe, device)
        self.batch, self.per_device = batch.global_rows, batch.per_device
        every, _ = objective.cadence(recipe.evaluation.every, self.plan)
        self.every = every or max(1, self.plan.total // 10)  # a cadence by the clock has no meaning here
        self.patience, self.without_gain = recipe.evaluation.early_stop, 0
        self.sampler = RankBatches(len(self.rows), batch, rank=0, seed=recipe.seed)
        self.order: Sequence[int] = ()
        self.epoch = -1
        self.run = PackedRun()

    def batches(self) -> list[MicroBatch]:
        """The next step's rows, as the micro-batches in which the solo path would take them."""
        epoch, within = divmod(self.run.steps, self.plan.per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.sampler.set_epoch(epoch)
            self.order = self.sampler.order()
        wanted = self.order[within * self.batch : (within + 1) * self.batch]
        return [self._micro(wanted[i : i + self.per_device]) for i in range(0, len(wanted), self.per_device)]

    def _micro(self, numbers: Sequence[int]) -> MicroBatch:
        sequences: list[tuple[Sequence[int], Sequence[int]]] = []
        for number in numbers:
            row = self.rows[number]
            if "seq_lengths" in row:
                sequences += MicroBatch.from_packed(row["input_ids"], row["labels"], row["seq_lengths"]).sequences
            else:
                sequences.append((row["input_ids"], row["labels"]))
        return MicroBatch.of(sequences)

    @property
    def due(self) -> bool:
        return self.run.steps % self.every == 0 or self.run.steps >= self.plan.total

    @property
    def over(self) -> bool:
        given_up = self.patience is not None and self.without_gain >= self.patience
        return self.run.stopped is not None or self.run.steps >= self.plan.total or given_up


def train_packed(
    shared: SharedBase,
    trainings: Mapping[str, tuple[Recipe, Rows]],
    *,
    places: int | None = None,
    folder: Path | None = None,
    on_step: Callable[[Mapping[str, PackedRun]], None] | None = None,
) -> dict[str, PackedRun]:
    """Trains every recipe to its end, all together; all must share the validation rows.

    `places`: how many are attached at a time at most; the others follow as places become free, and fewer go together
    where memory does not hold so many after all. `folder`: where the best adapter of each is left, as a PEFT folder of
    its name. `on_step` is told after every step. A training whose loss is not finite ends with `stopped` set, and the
    others go on.
    """
    found = {name: _Training(recipe, prepared, shared.device.type) for name, (recipe, prepared) in trainings.items()}
    validation = next(iter(trainings.values()))[1].tokens("validation")
    waiting, active = list(found), dict[str, _Training]()
    most = places or len(waiting)
    while waiting or active:
        while waiting and len(active) < most:
            name = waiting[0]
            try:
                shared.attach(name, adapter_config(trainings[name][0], found[name].plan.total))
            except (RuntimeError, MemoryError) as error:
                if not active or not out_of_memory(error):
                    raise
                most = len(active)
                logger.warning("no memory for one more adapter: %d at a time from here on", most)
                break
            active[name] = found[waiting.pop(0)]
        for name, result in shared.step({name: one.batches() for name, one in active.items()}).items():
            active[name].run.steps, active[name].run.stopped = result.step, result.stopped
        _measure(shared, {n: t for n, t in active.items() if t.due and t.run.stopped is None}, validation, folder)
        for name in [name for name, one in active.items() if one.over]:
            shared.detach(name)
            del active[name]
        if on_step is not None:
            on_step({name: one.run for name, one in found.items()})
    return {name: one.run for name, one in found.items()}


def _measure(shared: SharedBase, due: Mapping[str, _Training], validation: Any, folder: Path | None) -> None:
    """Validation loss of those due, in one forward a batch; a better one is kept, its adapter with it."""
    if not due:
        return
    rows: dict[str, list[tuple[float, int]]] = {name: [] for name in due}
    batch: list[tuple[Sequence[int], Sequence[int]]] = []
    for number in range(len(validation)):
        row = validation[number]
        batch.append((row["input_ids"], row["labels"]))
        if len(batch) * max(len(ids) for ids, _ in batch) * len(due) >= _BATCH_TOKENS or number == len(validation) - 1:
            for name, held in shared.evaluate({name: MicroBatch.of(batch) for name in due}).items():
                rows[name] += held.sequences
            batch = []
    for name, training in due.items():
        run, tokens = training.run, sum(n for _, n in rows[name])
        loss = math.fsum(s for s, _ in rows[name]) / tokens if tokens else math.nan
        run.history.append((run.steps, loss))
        if not loss < run.best_loss:
            training.without_gain += 1
            continue
        training.without_gain = 0
        run.best_loss, run.best_step, run.rows = loss, run.steps, tuple(rows[name])
        if folder is not None:
            shared.export(name, folder / name)
