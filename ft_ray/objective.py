"""The arithmetic around the loss: batches, steps, schedule, optimizer names, the order of the rows.

The training loss is the mean over the trained tokens of the *global* batch. For that to hold whatever the
number of workers and accumulation steps, every optimizer step must see the same rows: `RankBatches` deals
one seeded permutation an epoch out by global batches, and fills the last one with masked rows.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from ft_ray.errors import RecipeError
from ft_ray.recipe import Every, Recipe, duration_seconds
from ft_ray.step_memory import auto_rows
from ft_ray.strict_yaml import nearest

__all__ = [
    "BatchPlan",
    "FilledRows",
    "RankBatches",
    "StepPlan",
    "budget_seconds",
    "cadence",
    "ended",
    "evaluation_batches",
    "optimizer_name",
    "plan_batch",
    "plan_steps",
    "schedule_name",
]


@dataclass(frozen=True)
class BatchPlan:
    """global_rows = workers * per_device * accumulation, always exactly."""

    global_rows: int
    workers: int
    per_device: int
    accumulation: int


def plan_batch(recipe: Recipe, device: str) -> BatchPlan:
    """Splits `batch.global` into workers, rows a forward pass, and accumulation steps."""
    workers = recipe.resources.workers
    local = recipe.batch.global_ // workers
    wanted = recipe.batch.per_device
    # Rows are assumed to be as long as sequence.max_length.
    fitting = auto_rows(local, recipe.sequence.max_length, on_gpu=device.startswith("cuda"))
    per_device = fitting if isinstance(wanted, str) else wanted  # "auto"
    return BatchPlan(recipe.batch.global_, workers, per_device, local // per_device)


@dataclass(frozen=True)
class StepPlan:
    """Optimizer steps of a run: `total` in all, `per_epoch` a pass, `warmup` with a rising rate."""

    total: int
    per_epoch: int
    warmup: int


def plan_steps(recipe: Recipe, rows: int) -> StepPlan:
    """Steps for `rows` training rows (packed: sequences). A partial last batch counts as a step."""
    per_epoch = max(1, math.ceil(rows / recipe.batch.global_))
    total = max(1, math.ceil(recipe.schedule.epochs * per_epoch - 1e-9))
    if recipe.schedule.max_steps is not None:
        total = min(total, recipe.schedule.max_steps)
    warmup = recipe.schedule.warmup
    return StepPlan(total, per_epoch, math.ceil(warmup * total) if warmup < 1 else min(int(warmup), total))


def cadence(every: Every, plan: StepPlan) -> tuple[int | None, float | None]:
    """`every` of a recipe as (steps, None) or, for a duration, (None, seconds)."""
    if isinstance(every, str):
        return (plan.per_epoch, None) if every == "epoch" else (None, duration_seconds(every))
    if every < 1:
        return max(1, round(plan.total * every)), None
    return int(every), None


def save_due(step: int, every: int) -> bool:
    """Whether a checkpoint is begun after `step`: at each multiple of `every` (in steps), and halfway between.

    Uploads run in the background, and the next save waits until the last one is committed. A fault then costs two of
    these gaps at most: `every` steps, and not two times as many.
    """
    return step % every in (0, every // 2)


def budget_seconds(recipe: Recipe) -> float:
    """Seconds of training that `budget` allows; infinite without one. usd counts at usd_per_hour."""
    limits = [math.inf]
    if recipe.budget.hours is not None:
        limits.append(recipe.budget.hours * 3600)
    if recipe.budget.usd is not None and recipe.budget.usd_per_hour is not None:
        limits.append(recipe.budget.usd / recipe.budget.usd_per_hour * 3600)
    return min(limits)


def ended(recipe: Recipe, progress: Mapping[str, Any]) -> str | None:
    """How a run that stands there (a checkpoint's progress) has ended; None where steps are left.

    '' at its last step, even one at which it was interrupted; 'early_stop'; 'budget'.
    """
    if progress.get("stopped") == "early_stop":
        return "early_stop"
    if progress["step"] >= progress["total"] > 0:
        return ""
    return "budget" if float(progress.get("seconds", 0.0)) >= budget_seconds(recipe) else None


def schedule_name(recipe: Recipe) -> str:
    """The schedule's name in transformers. Only 'constant' has a separate name for its warm-up."""
    kind = recipe.schedule.type
    return "constant_with_warmup" if kind == "constant" and recipe.schedule.warmup else kind


def optimizer_name(name: str, device: str) -> tuple[str, str | None]:
    """The optimizer to use on `device`, and what was substituted (None: nothing). Raises RecipeError.

    Paging moves optimizer state between GPU and host memory; without a GPU there is nothing to page, and the
    same update runs unpaged.
    """
    from transformers.training_args import OptimizerNames

    names = [str(o.value) for o in OptimizerNames]
    if name not in names:
        raise RecipeError([f"optim.name: transformers has no optimizer {name!r}{nearest(name, names)}."])
    if device.startswith("cuda") or not name.startswith("paged_"):
        return name, None
    unpaged = {"paged_adamw_32bit": "adamw_torch", "paged_ademamix_32bit": "ademamix"}.get(
        name, name.removeprefix("paged_")
    )
    if unpaged not in names:
        raise RecipeError([f"optim.name: {name!r} needs a GPU and has no unpaged form: use adamw_8bit."])
    return unpaged, f"optim.name {name} -> {unpaged}: no GPU memory to page; the update is the same"


class RankBatches(Sampler[list[int]]):
    """Index batches of one rank: [per_device] row numbers each, `accumulation` of them an optimizer step.

    One permutation of the rows an epoch, seeded by (seed, epoch) and the same on every rank. Optimizer step
    s takes global batch s of it, whatever the number of ranks, so 1 x 8 rows = 8 x 1 = 2 workers x 4. Indices
    from `rows` on are filler, to be masked: the last global batch is whole and no row is seen twice.
    """

    def __init__(self, rows: int, plan: BatchPlan, *, rank: int, seed: int) -> None:
        self.rows, self.plan, self.rank, self.seed, self.epoch = rows, plan, rank, seed, 0
        self.steps = math.ceil(rows / plan.global_rows)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self, epoch: int | None = None) -> Sequence[int]:
        """An epoch's row numbers in the order of training; None: of the present one. Takes 8 bytes a row."""
        epoch = self.epoch if epoch is None else epoch
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        # As a list it would take 40 bytes a row, for as long as the epoch lasts.
        return array("q", torch.randperm(self.rows, generator=generator).numpy().tobytes())

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        for step in range(self.steps):
            yield from self._dealt(order, step)

    def _dealt(self, order: Sequence[int], step: int) -> Iterator[list[int]]:
        width, workers = self.plan.per_device, self.plan.workers
        for micro in range(self.plan.accumulation):
            start = step * self.plan.global_rows + (micro * workers + self.rank) * width
            ends = min(start + width, len(order))
            yield [*order[start:ends], *range(max(start, len(order)), start + width)]

    def rows_of(self, step: int) -> list[list[int]]:
        """Row numbers of each forward pass of this rank in optimizer step `step`, counted from 1; without filler."""
        epoch, inside = divmod(step - 1, self.steps)
        return [[row for row in batch if row < self.rows] for batch in self._dealt(self.order(epoch), inside)]

    def __len__(self) -> int:
        return self.steps * self.plan.accumulation


class FilledRows(Dataset[dict[str, Any]]):
    """Memory-mapped token rows, and a two-token row without trained tokens for every index past the end."""

    def __init__(self, rows: Any, pad_id: int) -> None:
        columns = [c for c in ("input_ids", "labels", "seq_lengths") if c in rows.column_names]
        self._rows = rows.select_columns(columns)
        filler = {"input_ids": [pad_id, pad_id], "labels": [-100, -100], "seq_lengths": [2]}
        self._filler = {column: filler[column] for column in columns}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._rows[index]) if index < len(self._rows) else dict(self._filler)


def evaluation_batches(lengths: Sequence[int], batch: int, *, rank: int, workers: int) -> list[list[int]]:
    """Index batches of one rank for a loss sum: by length, so that little is padded.

    Every rank gets equally many (some of filler only): a sharded model's forward pass is a collective.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    chunk = batch * workers
    order += range(len(lengths), math.ceil(len(lengths) / chunk) * chunk)
    return [order[s + rank * batch : s + (rank + 1) * batch] for s in range(0, len(order), chunk)]
