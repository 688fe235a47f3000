"""The arithmetic of batches, steps, cadence, schedule and optimizer names."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from typing import Any

import pytest

from ft_ray import batch_sampler, objective, recipe
from ft_ray.batch_sampler import RankBatches
from ft_ray.errors import RecipeError
from ft_ray.objective import BatchPlan, StepPlan
from ft_ray.recipe_sections import OPTIMIZERS


def make(**values: Any) -> recipe.Recipe:
    return recipe.from_dict({"name": "t", "model": {"id": "m"}, "data": {"train": [{"path": "x"}]}, **values})


def test_global_batch_is_kept_whatever_the_split() -> None:
    for workers in (1, 2, 4):
        for device in ("cpu", "cuda"):
            made = make(batch={"global": 16}, resources={"workers": workers}, sequence={"max_length": 1024})
            plan = objective.plan_batch(made, device)
            assert plan.workers * plan.per_device * plan.accumulation == 16
    assert objective.plan_batch(make(batch={"global": 16}, sequence={"max_length": 4096}), "cpu").per_device == 1
    assert objective.plan_batch(make(batch={"global": 16, "per_device": 4}), "cpu").accumulation == 4


def step_rows(plan: BatchPlan, rows: int, epoch: int) -> list[Counter[int]]:
    """The rows of each optimizer step, all ranks together."""
    steps = [Counter[int]() for _ in range(math.ceil(rows / plan.global_rows))]
    for rank in range(plan.workers):
        sampler = RankBatches(rows, plan, rank=rank, seed=3)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == len(steps) * plan.accumulation
        for number, batch in enumerate(batches):
            assert len(batch) == plan.per_device
            steps[number // plan.accumulation].update(batch)
    return steps


def test_every_step_sees_the_same_rows_whatever_ranks_and_accumulation() -> None:
    splits = [BatchPlan(8, 1, 8, 1), BatchPlan(8, 1, 1, 8), BatchPlan(8, 2, 2, 2), BatchPlan(8, 4, 2, 1)]
    seen = [step_rows(plan, 21, epoch=1) for plan in splits]
    assert all(one == seen[0] for one in seen)
    assert step_rows(splits[0], 21, epoch=0) != seen[0], "each epoch has an order of its own"


def test_an_epoch_sees_each_row_once_and_fills_up_with_masked_ones() -> None:
    total = sum(step_rows(BatchPlan(8, 2, 4, 1), 21, epoch=0), Counter[int]())
    assert all(total[row] == 1 for row in range(21)), "no row is repeated or left out"
    assert sorted(i for i in total if i >= 21) == [21, 22, 23]


def test_the_order_of_a_large_epoch_takes_eight_bytes_a_row_and_never_changes() -> None:
    """Checkpoints hold the step alone: where a run goes on in its data follows from this order."""
    plan = BatchPlan(8, 1, 8, 1)
    small = RankBatches(21, plan, rank=0, seed=3)
    assert list(small.order(0)) == [20, 10, 11, 19, 3, 14, 13, 0, 15, 4, 12, 8, 16, 17, 2, 1, 9, 7, 5, 6, 18]
    tracemalloc.start()
    order = RankBatches(200_000, plan, rank=0, seed=3).order(0)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(order) == 200_000 and held < 9 * 200_000


def test_steps_warmup_and_cap() -> None:
    made = make(batch={"global": 8}, schedule={"epochs": 2.5, "warmup": 0.1})
    assert objective.plan_steps(made, 20) == StepPlan(total=8, per_epoch=3, warmup=1)
    assert objective.plan_steps(make(schedule={"max_steps": 5, "warmup": 2}), 1600) == StepPlan(5, 100, 2)
    assert objective.plan_steps(make(batch={"global": 16}, schedule={"epochs": 1}), 3).total == 1


@pytest.mark.parametrize(
    ("every", "expected"),
    [(50, (50, None)), (0.1, (4, None)), ("epoch", (10, None)), ("10m", (None, 600.0)), (0.001, (1, None))],
)
def test_cadence(every: Any, expected: Any) -> None:
    assert objective.cadence(every, StepPlan(total=40, per_epoch=10, warmup=0)) == expected


@pytest.mark.parametrize("every", [2, 3, 4, 5, 12])
def test_two_saves_in_a_row_are_no_further_apart_than_the_interval(every: int) -> None:
    """The next save waits for the last one's commit: so much is lost at most."""
    points = [step for step in range(0, 10 * every) if objective.save_due(step, every)]
    assert set(range(0, 10 * every, every)) <= set(points)
    assert max(c - a for a, c in zip(points, points[2:], strict=False)) == every
    assert [step for step in range(1, 4) if objective.save_due(step, 1)] == [1, 2, 3]


def test_paged_optimizer_is_substituted_on_a_cpu_and_said() -> None:
    name, said = objective.optimizer_name("paged_adamw_8bit", "cpu")
    assert name == "adamw_8bit"
    assert said is not None
    assert "paged_adamw_8bit -> adamw_8bit" in said
    assert objective.optimizer_name("paged_adamw_8bit", "cuda:0") == ("paged_adamw_8bit", None)
    for paged in (n for n in OPTIMIZERS if n.startswith("paged_")):  # every one has an unpaged form
        assert objective.optimizer_name(paged, "cpu")[0] in OPTIMIZERS
    assert objective.optimizer_name("adamw_torch", "cpu") == ("adamw_torch", None)
    with pytest.raises(RecipeError, match=r"did you mean 'adamw_torch'"):
        objective.optimizer_name("adamw_torhc", "cpu")


def test_budget_is_the_tighter_of_hours_and_money() -> None:
    assert objective.budget_seconds(make()) == math.inf
    assert objective.budget_seconds(make(budget={"hours": 2})) == 7200
    assert objective.budget_seconds(make(budget={"hours": 2, "usd": 3, "usd_per_hour": 6})) == 1800


@pytest.mark.parametrize(
    ("step", "stopped", "seconds", "ended"),
    [
        (3, "", 10, None),
        (3, "interrupted", 10, None),
        (3, "told to end", 10, None),
        (3, "early_stop", 10, "early_stop"),
        (3, "", 3600, "budget"),
        (9, "", 3600, ""),
        (9, "interrupted", 10, ""),  # at its last step: asked for again it is done, and not interrupted for ever
        (9, "early_stop", 10, "early_stop"),
    ],
)
def test_how_a_run_has_ended(step: int, stopped: str, seconds: float, ended: str | None) -> None:
    progress = {"step": step, "total": 9, "stopped": stopped, "seconds": seconds}
    assert objective.ended(make(budget={"hours": 1}), progress) == ended


def test_evaluation_batches_give_every_rank_as_many() -> None:
    lengths = [5, 9, 2, 7, 7, 1, 3]
    parts = [batch_sampler.evaluation_batches(lengths, 2, rank=r, workers=2) for r in range(2)]
    assert len(parts[0]) == len(parts[1])
    seen = [i for part in parts for batch in part for i in batch]
    assert sorted(i for i in seen if i < len(lengths)) == list(range(7))
    assert len(seen) == len(set(seen))
