"""What Tune calls: first points among the draws, and schedulers that remember what an earlier session measured."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from ft_ray.recipe import Recipe
from ft_ray.search_space import Space
from ft_ray.sweep_search import Asha, Median, TpeSearch, Watch

FIRST = [{"lora.r": 16, "lora.alpha": 32}, {"lora.r": 8, "lora.alpha": 8}]


def search(seed: int, trials: int = 16) -> TpeSearch:
    recipe = Recipe.model_validate({"name": "t", "model": {"id": "m"}, "data": {"train": [{"path": "rows.jsonl"}]}})
    space = Space.model_validate({
        "search": {"lora.r": {"choice": [8, 16, 32, 64]}, "lora.alpha": {"uniform": [4, 64]}},
        "first": FIRST, "searcher": "tpe", "budget": {"trials": trials}, "seed": seed,
    })  # fmt: skip
    return TpeSearch(space, recipe)


def drawn(made: TpeSearch, count: int) -> list[dict[str, Any]]:
    found = []
    for number in range(count):
        suggested = made.suggest(f"trial{number}")
        assert suggested is not None
        found.append({path: suggested["point"][path] for path in FIRST[0]})
    return found


def test_first_points_are_tried_once_each_at_places_that_differ_with_the_seed() -> None:
    places = []
    for seed in range(6):
        points = drawn(search(seed), 10)
        assert [points.count(first) for first in FIRST] == [1, 1]
        places.append(tuple(points.index(first) for first in FIRST))
        assert max(places[-1]) < 8
    assert len(set(places)) > 3 and len({place[0] for place in places}) > 2, places
    points = drawn(search(0, trials=2), 2)
    assert all(first in points for first in FIRST), "a small budget holds them too"
    assert drawn(search(0, trials=1), 1) == FIRST[:1], "and a smaller one those that are named first"


def test_first_points_that_are_still_to_come_survive_a_restore() -> None:
    """Tune pickles the searcher, and asks a revived copy."""
    seed = next(s for s in range(20) if all(place >= 4 for place in search(s)._first))
    made = search(seed)
    begun = drawn(made, 4)
    revived = pickle.loads(pickle.dumps(made))
    assert not any(first in begun for first in FIRST)
    assert all(first in drawn(revived, 10)[4:] for first in FIRST)


class Earlier:
    """A running sweep that went on from another session's reports."""

    def __init__(self, losses: dict[str, list[float | None]]) -> None:
        self._found = {
            name: [{"step": 10 * (i + 1), "validation_loss": loss, "train_loss": None} for i, loss in enumerate(own)]
            for name, own in losses.items()
        }

    def histories(self) -> Any:
        return self._found


class Reported:
    """Of a trial what schedulers look at."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id, self.status = trial_id, "RUNNING"
        self.last_result: dict[str, Any] = {}

    def is_finished(self) -> bool:
        return False


def decide(made: Any, losses: dict[str, list[float | None]], report: float, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the scheduler says of a new trial's report at step 20, in a session that begins with these histories."""
    trials, new = [Reported(name) for name in losses if name != "new"], Reported("new")
    controller = SimpleNamespace(get_trials=lambda: [*trials, new], get_live_trials=lambda: [new])
    monkeypatch.setattr(Watch, "current", Earlier(losses))
    made.set_search_properties("validation_loss", "min")
    made.on_trial_add(controller, new)
    return str(made.on_trial_result(controller, new, {"step": 20, "training_iteration": 2, "validation_loss": report}))


@pytest.mark.parametrize(("report", "said"), [(2.0, TrialScheduler.STOP), (0.1, TrialScheduler.CONTINUE)])
@pytest.mark.parametrize("kind", ["asha", "median"])
def test_reports_of_an_earlier_session_count(
    kind: str, report: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Any
    if kind == "asha":
        made = Asha(time_attr="step", max_t=90, grace_period=20, reduction_factor=3)
    else:
        made = Median(time_attr="step", grace_period=10, min_samples_required=3)
    earlier: dict[str, list[float | None]] = {f"t{i}": [1.0, 0.5 + i / 10, 0.5] for i in range(5)}
    earlier["nan"] = [None, None]
    assert decide(made, earlier, report, monkeypatch) == said
    assert decide(type(made)(time_attr="step", grace_period=20), {}, report, monkeypatch) == TrialScheduler.CONTINUE


def test_a_report_that_was_saved_and_not_told_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = Median(time_attr="step", grace_period=90)
    earlier: dict[str, list[float | None]] = {"new": [1.0, 0.8]}  # at steps 10 and 20
    assert decide(made, earlier, 0.8, monkeypatch) == TrialScheduler.CONTINUE  # reports step 20 again
    ((_, reports),) = made._results.items()
    assert [(point["step"], point["validation_loss"]) for point in reports] == [(10, 1.0), (20, 0.8)]
