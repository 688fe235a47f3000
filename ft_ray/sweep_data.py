"""What a trial of a shared-base sweep trains on: its rows, their order, its steps, and where it is measured.

Rows and their order are those of the ordinary training path, so that a trial sees what the winner sees when it is
trained alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch

from ft_ray import objective, search_space
from ft_ray.adapter_config import AdapterConfig
from ft_ray.recipe import Recipe
from ft_ray.search_space import Space
from ft_ray.segments import MicroBatch

__all__ = [
    "SweepRows", "adapter_config", "longest", "marks", "milestones", "pauses", "rows_at", "total_steps",
]  # fmt: skip

_CACHED_ROWS = 200_000
_STEP_KEYS = ("data.fraction", "schedule.epochs", "schedule.max_steps", "batch.global")


def _subset(rows: int, fraction: float, seed: int) -> list[int]:
    """Row numbers of a seeded share of `rows`, ascending; a smaller share is part of every larger one."""
    if fraction >= 1:
        return list(range(rows))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + 17)
    order: list[int] = torch.randperm(rows, generator=generator).tolist()
    return sorted(order[: max(1, math.ceil(fraction * rows))])


def total_steps(recipe: Recipe, rows: SweepRows) -> int:
    """Optimizer steps of a trial on its share of the training rows."""
    return objective.plan_steps(recipe, len(rows.of(recipe))).total


def longest(space: Space, recipe: Recipe, rows: SweepRows) -> int:
    """Steps of the longest trial that the space can draw: what a scheduler counts against."""
    keys = [key for key in _STEP_KEYS if key in space.search]
    ends = [space.search[key].ends() for key in keys]
    made = (search_space.apply(recipe, dict(zip(keys, values, strict=True))) for values in product(*ends))
    return max(total_steps(one, rows) for one in made)


def milestones(space: Space, most: int) -> list[int]:
    """Steps at which the scheduler may stop a trial, the last trial step excluded: grace x reduction^i for ASHA."""
    scheduler = space.scheduler
    if scheduler.type == "none":
        return []
    step = grace(space, most)
    if scheduler.type == "median":
        return [step]
    found = []
    while step < most:
        found.append(step)
        step *= scheduler.reduction
    return found


def grace(space: Space, most: int) -> int:
    """The scheduler's grace period in steps."""
    value = space.scheduler.grace
    return min(most, max(1, round(most * value) if value < 1 else int(value)))


def marks(space: Space, recipe: Recipe, rows: SweepRows, most: int) -> list[int]:
    """Steps at which a trial is measured and saved: `evaluation.every`, the scheduler's milestones, and the last."""
    total = total_steps(recipe, rows)
    plan = objective.plan_steps(recipe, len(rows.of(recipe)))
    every, _ = objective.cadence(recipe.evaluation.every, plan)
    every = every or max(1, total // 10)  # a duration is of a run alone; here trials share the time
    return sorted({*range(every, total, every), *(m for m in milestones(space, most) if m < total), total})


def pauses(space: Space, found: Sequence[int], most: int) -> list[int]:
    """Those of a trial's marks at which it waits for the scheduler's word, the last one excluded."""
    if space.scheduler.type == "asha":
        return [m for m in milestones(space, most) if m < found[-1]]
    if space.scheduler.type == "median":
        return [m for m in found[:-1] if m >= grace(space, most)]
    return []


def adapter_config(recipe: Recipe, rows: SweepRows) -> AdapterConfig:
    """The recipe's adapter and its training."""
    lora, optim, schedule = recipe.lora, recipe.optim, recipe.schedule
    return AdapterConfig(
        total_steps=total_steps(recipe, rows),
        r=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        rslora=lora.rslora,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        betas=optim.betas,
        eps=optim.eps,
        max_grad_norm=optim.max_grad_norm,
        schedule=schedule.type,
        warmup=schedule.warmup,
        seed=recipe.seed,
    )


@functools.lru_cache(maxsize=64)
def _epoch(rows: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def rows_at(recipe: Recipe, rows: SweepRows, step: int) -> list[int]:
    """Row numbers of optimizer step `step`, counted from 0: those that `objective.RankBatches` gives a run alone."""
    own, batch = rows.of(recipe), recipe.batch.global_
    epoch, within = divmod(step, math.ceil(len(own) / batch))
    numbers = _epoch(len(own), recipe.seed, epoch)[within * batch : (within + 1) * batch].tolist()
    return [own[number] for number in numbers]


class SweepRows:
    """Prepared rows as micro-batches. `prepared` has `tokens(split)` and `packed()`, as `dataset.Prepared` does."""

    def __init__(self, prepared: Any, recipe: Recipe) -> None:
        self._prepared, self._seed = prepared, recipe.seed
        self._packing = recipe.sequence.packing
        self._train = prepared.packed() if self._packing else prepared.tokens("train")
        self._validation = prepared.tokens("validation")
        self._read = functools.lru_cache(maxsize=_CACHED_ROWS)(self._row)
        self._held_out: dict[int, list[MicroBatch]] = {}
        self._shares: dict[float, Sequence[int]] = {}

    def of(self, recipe: Recipe) -> Sequence[int]:
        """Numbers of the rows (packed: sequences) that the recipe's data.fraction leaves."""
        fraction = recipe.data.fraction
        if fraction not in self._shares:
            if fraction >= 1:
                self._shares[fraction] = range(len(self._train))
            elif hasattr(self._prepared, "subset"):
                self._shares[fraction] = self._prepared.subset(fraction, self._seed)
            else:  # rows that know no prompt groups
                self._shares[fraction] = _subset(len(self._train), fraction, self._seed)
        return self._shares[fraction]

    def _row(self, index: int) -> tuple[tuple[Sequence[int], Sequence[int]], ...]:
        row = self._train[index]
        if self._packing:
            return MicroBatch.from_packed(row["input_ids"], row["labels"], row["seq_lengths"]).sequences
        return ((row["input_ids"], row["labels"]),)

    def batch(self, rows: Sequence[int], per_forward: int) -> list[MicroBatch]:
        """One step's rows, `per_forward` of them a micro-batch."""
        found = [self._read(row) for row in rows]
        return [
            MicroBatch(tuple(one for row in found[start : start + per_forward] for one in row))
            for start in range(0, len(found), per_forward)
        ]

    def validation(self, per_forward: int) -> list[MicroBatch]:
        """All validation rows, those of like length together. Empty without validation rows."""
        if per_forward not in self._held_out:
            rows = [(row["input_ids"], row["labels"]) for row in self._validation]
            rows.sort(key=lambda row: len(row[0]))
            self._held_out[per_forward] = [
                MicroBatch(tuple(rows[start : start + per_forward])) for start in range(0, len(rows), per_forward)
            ]
        return self._held_out[per_forward]
