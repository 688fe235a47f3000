"""How long a trial of a shared-base sweep trains, and at which steps it is measured, saved and judged.

Driver and engine ask the same here; the driver has no torch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import product
from typing import Any

from ft_ray import objective, search_space
from ft_ray.recipe import Recipe
from ft_ray.search_space import Space

__all__ = ["RowShares", "grace", "longest", "marks", "milestones", "pauses", "total_steps"]

_STEP_KEYS = ("data.fraction", "schedule.epochs", "schedule.max_steps", "batch.global")


class RowShares:
    """Which training rows each `data.fraction` leaves. `prepared` has `tokens(split)` and `packed()`."""

    def __init__(self, prepared: Any, recipe: Recipe) -> None:
        self._prepared, self._seed = prepared, recipe.seed
        self._packing = recipe.sequence.packing
        self._train = prepared.packed() if self._packing else prepared.tokens("train")
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


def _subset(rows: int, fraction: float, seed: int) -> list[int]:
    """Row numbers of a seeded share of `rows`, ascending; a smaller share is part of every larger one."""
    order = list(range(rows))
    random.Random(seed * 1_000_003 + 17).shuffle(order)
    return sorted(order[: max(1, math.ceil(fraction * rows))])


def total_steps(recipe: Recipe, rows: RowShares) -> int:
    """Optimizer steps of a trial on its share of the training rows."""
    return objective.plan_steps(recipe, len(rows.of(recipe))).total


def longest(space: Space, recipe: Recipe, rows: RowShares) -> int:
    """Steps of the longest trial that the space can draw: what a scheduler counts against."""
    keys = [key for key in _STEP_KEYS if key in space.search]
    for key in keys:  # a multiple of another value is known by that one
        other = space.search[key].times
        keys += [other] if other in space.search and other not in keys else []
    found = []
    for values in product(*(space.search[key].ends() for key in keys)):
        point = search_space.complete(space, recipe, dict(zip(keys, values, strict=True)))
        steps = {key: value for key, value in point.items() if key in _STEP_KEYS}
        found.append(total_steps(search_space.apply(recipe, steps), rows))
    return max(found)


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


def marks(space: Space, recipe: Recipe, rows: RowShares, most: int) -> list[int]:
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
