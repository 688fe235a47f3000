"""What a sweep's record says of its space: the best at an end of its range, trials that diverged; and the new space."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ft_ray import search_space
from ft_ray.cli import app
from ft_ray.recipe import Recipe, from_dict
from ft_ray.storage import Store
from ft_ray.sweep_diagnosis import after_sweep
from ft_ray.sweep_results import Point, SweepResult, TrialResult


def make(**values: Any) -> Recipe:
    return from_dict({"name": "s", "model": {"id": "m"}, "data": {"train": [{"path": "x"}]}, **values})


def record(search: dict[str, Any], trials: list[tuple[dict[str, Any], float | None]]) -> dict[str, Any]:
    """A sweep's record: each trial its settings and its loss; None is one that diverged."""
    made = []
    for i, (config, loss) in enumerate(trials):
        bad = loss is None
        made.append(TrialResult(
            id=f"t{i}", config=config, status="stopped" if bad else "done", steps=20, tokens=9, best_loss=loss,
            history=[Point(step=20, validation_loss=loss)], best_step=None if bad else 20,
            error="its loss was not finite at step 3 (learning rate 0.1)" if bad else "",
        ))  # fmt: skip
    space = search_space.parse({"search": search, "budget": {"trials": len(trials)}})
    return SweepResult(
        name="s", recipe=make().to_dict(), space=space.model_dump(mode="json"), trials=made, mean_k=2, seconds=1,
        trained_tokens=9, device="cpu", shared=True,
    ).model_dump(mode="json")  # fmt: skip


RATES = [1e-4, 1.6e-4, 2.5e-4, 4e-4, 6.3e-4, 9.8e-4]
LOG = {"optim.lr": {"loguniform": [1e-4, 1e-3]}}


def by_rate(losses: list[float | None]) -> list[tuple[dict[str, Any], float | None]]:
    return [({"optim.lr": rate}, loss) for rate, loss in zip(RATES, losses, strict=True)]


def test_the_best_rate_at_an_end_of_the_space() -> None:
    (high,) = after_sweep(record(LOG, by_rate([2, 1.8, 1.5, 1.2, 1.0, 0.9])), make())
    assert (high.code, high.severity) == ("learning_rate_edge", "warning")
    assert "at the upper end of what was searched (0.0001 to 0.001)" in high.sentence
    assert high.patch == {"search.optim.lr": {"loguniform": [1e-4, 3.2e-3]}}
    (low,) = after_sweep(record(LOG, by_rate([0.9, 1.0, 1.2, 1.5, 1.8, 2])), make())
    assert low.patch == {"search.optim.lr": {"loguniform": [3.2e-5, 1e-3]}} and low.evidence["end"] == "lower"
    assert after_sweep(record(LOG, by_rate([2, 1.5, 1.0, 0.9, 1.2, 1.8])), make()) == [], "inside the range"
    assert after_sweep(record(LOG, by_rate([0.95, 0.96, 1.2, 1.5, 1.8, 0.9])), make()) == [], "one lucky trial"
    assert after_sweep(record(LOG, by_rate([2, 1.8, 1.5, 1.2, 1.0, 0.9])[2:]), make()) == [], "too few to tell"


def test_other_settings_and_natural_ends() -> None:
    ranks = {"lora.r": {"choice": [8, 16, 32]}}
    (found,) = after_sweep(
        record(ranks, [({"lora.r": r}, 3 - r / 16) for r in (8, 16, 32, 32, 16, 8, 32, 32)]), make()
    )
    assert (found.code, found.severity) == ("space_edge", "info")
    assert found.patch == {"search.lora.r": {"choice": [8, 16, 32, 64]}}
    whole = {"schedule.epochs": {"randint": [1, 3]}}
    (more,) = after_sweep(record(whole, [({"schedule.epochs": 1 + i % 3}, 3 - i % 3) for i in range(9)]), make())
    assert more.patch == {"search.schedule.epochs": {"randint": [1, 4]}}
    dropout = {"lora.dropout": {"uniform": [0, 0.1]}}
    assert after_sweep(record(dropout, [({"lora.dropout": i / 60}, 1 + i) for i in range(6)]), make()) == [], "zero"
    names = {"schedule.type": {"choice": ["cosine", "linear", "constant"]}}
    kinds = [({"schedule.type": k}, float(i)) for i, k in enumerate(("cosine", "linear", "constant") * 2)]
    assert after_sweep(record(names, kinds), make()) == [], "no order"
    times = {"lora.r": {"choice": [8, 16]}, "lora.alpha": {"times": "lora.r", "choice": [1, 2, 4]}}
    drawn = [({"lora.r": 8, "lora.alpha": 8 * f}, 3.0 / f) for f in (1, 2, 4, 4, 4, 2)]
    assert after_sweep(record(times, drawn), make()) == []
    assert after_sweep({"name": "of another version"}, make()) == []


def test_diverged_trials_lower_the_upper_end() -> None:
    (found,) = after_sweep(record(LOG, by_rate([1.2, 1.0, 0.9, 1.1, None, None])), make())
    assert found.code == "trials_diverged" and "all with optim.lr from 0.00063 on" in found.sentence
    assert found.patch == {"search.optim.lr": {"loguniform": [1e-4, 5e-4]}}
    (mixed,) = after_sweep(record(LOG, by_rate([None, 1.0, 0.9, 1.1, 1.2, None])), make())
    assert mixed.patch == {} and "all with" not in mixed.sentence
    assert after_sweep(record(LOG, by_rate([1.2, 1.0, 0.9, 1.1, 1.2, None])), make()) == [], "one of six"


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_the_command_writes_the_new_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("runs/s")
    store.write_json("sweep/sweep.json", record(LOG, by_rate([2, 1.8, 1.5, 1.2, 1.0, 0.9])))
    seen = CliRunner().invoke(app, ["diagnose", "s", *extra])
    assert seen.exit_code == 0 and ("learning_rate_edge" if extra else "learning rate edge") in seen.stdout
    dry = CliRunner().invoke(app, ["diagnose", "runs/s", "--apply", "--dry-run", *extra])
    assert dry.exit_code == 0 and not Path("s-2.space.yaml").exists()
    done = CliRunner().invoke(app, ["diagnose", "runs/s", "--apply", *extra])
    assert done.exit_code == 0, done.stderr
    if extra:
        assert json.loads(done.stdout)["space"] == "s-2.space.yaml" and "recipe" not in json.loads(done.stdout)
    else:
        assert "Next: ft-ray sweep RECIPE --space s-2.space.yaml" in " ".join(done.stdout.split())
    loaded = search_space.load("s-2.space.yaml")
    assert search_space.check(loaded, make()) is not None
    assert loaded.space.search["optim.lr"].loguniform == (1e-4, 3.2e-3) and loaded.space.budget.trials == 6
    again = CliRunner().invoke(app, ["diagnose", "runs/s", "--apply", *extra])
    assert again.exit_code == 2 and "exists" in again.stderr + again.stdout
