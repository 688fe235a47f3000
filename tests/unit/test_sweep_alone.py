"""When Tune hears of what a trial of its own measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ft_ray import sweep_alone
from ft_ray.storage import Store
from ft_ray.sweep_states import OUTCOME

STEP = {"kind": "step", "loss": 2.0, "tokens": 10}


def measured(step: int) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "loss": 1.0 / step}


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps of which Tune, which is not there, has heard; it stops the trial at step 9."""
    found: list[int] = []

    def report(metrics: dict[str, Any], checkpoint: Any) -> None:
        found.append(metrics["step"])
        if metrics["step"] == 9:
            raise SystemExit

    monkeypatch.setattr(sweep_alone.tune, "report", report)
    return found


def test_a_measurement_is_told_once_training_goes_on_and_the_last_one_in_the_end(
    tmp_path: Path, heard: list[int]
) -> None:
    teller = sweep_alone._Teller(Store(tmp_path), tmp_path, told=0)
    for event in (STEP, measured(3), STEP, STEP, measured(6)):
        teller(event)
    assert heard == [3]
    teller.tell()
    teller.tell()
    assert heard == [3, 6] and teller.ended is None and not teller.stop.is_set()
    assert [point["train_loss"] for point in Store(tmp_path).read_json(OUTCOME)["history"]] == [2.0, 2.0]


def test_what_a_lost_process_had_not_told_is_told_by_the_next(tmp_path: Path, heard: list[int]) -> None:
    first = sweep_alone._Teller(Store(tmp_path), tmp_path, told=0)
    for event in (STEP, measured(3), STEP, measured(6)):
        first(event)
    sweep_alone._Teller(Store(tmp_path), tmp_path, told=6)(STEP)
    assert heard == [3]
    sweep_alone._Teller(Store(tmp_path), tmp_path, told=3)(STEP)
    assert heard == [3, 6]


def test_the_schedulers_word_stops_the_ranks_and_nothing_is_told_after_it(tmp_path: Path, heard: list[int]) -> None:
    teller = sweep_alone._Teller(Store(tmp_path), tmp_path, told=0)
    for event in (STEP, measured(9), STEP, measured(12), STEP):
        teller(event)
    assert heard == [9] and teller.ended is not None and teller.stop.is_set()
