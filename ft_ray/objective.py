"""The arithmetic around the loss: batches, steps, learning-rate schedule, optimizer names.

The training loss is the mean over the trained tokens of the *global* batch, whatever the number of workers and
accumulation steps. What counts and plans here imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ft_ray.errors import RecipeError
from ft_ray.recipe import Every, Recipe, duration_seconds
from ft_ray.step_memory import auto_rows
from ft_ray.strict_yaml import nearest

__all__ = [
    "BatchPlan",
    "StepPlan",
    "budget_seconds",
    "cadence",
    "ended",
    "lr_factor",
    "optimizer_name",
    "plan_batch",
    "plan_steps",
    "schedule_name",
    "warmup_steps",
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


def warmup_steps(warmup: float, total: int) -> int:
    """`schedule.warmup` in steps: a fraction of the run below 1 (rounded up, as the Trainer does), else steps."""
    return math.ceil(total * warmup) if warmup < 1 else int(warmup)


def lr_factor(kind: Literal["cosine", "linear", "constant"], step: int, total: int, warmup: int) -> float:
    """Factor on the learning rate of optimizer step `step`, counted from 0, of `total` with `warmup` steps."""
    if step < warmup:
        return step / max(1, warmup)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


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
