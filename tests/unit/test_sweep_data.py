"""A trial of a sweep sees the rows, in the order and in the forwards, that a run alone sees."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from ft_ray import batch_sampler, recipe, sweep_data
from ft_ray.objective import plan_batch
from ft_ray.sweep_data import SweepRows


class Prepared:
    """Rows that are their own number."""

    def __init__(self, count: int) -> None:
        self._rows = datasets.Dataset.from_list([{"input_ids": [i, i], "labels": [i, i]} for i in range(count)])

    def tokens(self, split: str) -> Any:
        return self._rows if split == "train" else self._rows.select([])

    def packed(self) -> Any:
        raise NotImplementedError("nothing is packed here")


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize(("rows", "batch", "per_device"), [(20, 8, 4), (16, 8, 8), (5, 8, 2), (37, 4, 1)])
def test_the_rows_of_each_step_are_those_of_a_run_alone(rows: int, batch: int, per_device: int, seed: int) -> None:
    made = recipe.from_dict({
        "name": "t", "model": {"id": "m"}, "data": {"train": [{"path": "x"}]}, "seed": seed,
        "batch": {"global": batch, "per_device": per_device}, "resources": {"workers": 1},
    })  # fmt: skip
    own = SweepRows(Prepared(rows), made)
    sampler = batch_sampler.RankBatches(rows, plan_batch(made, "cpu"), rank=0, seed=seed)
    for step in range(3 * sampler.steps):  # three epochs
        numbers = sweep_data.rows_at(made, own, step)
        forwards = [[ids[0] for ids, _ in micro.sequences] for micro in own.batch(numbers, per_device)]
        assert forwards == [forward for forward in sampler.rows_of(step + 1) if forward], step
