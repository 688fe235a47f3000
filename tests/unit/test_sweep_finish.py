"""From a sweep's record to its winner without training: what is kept, what is skipped, and what is said of it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ft_ray import ray_session, search_space, sweep_finish, sweep_winner, sweeping
from ft_ray.confirmation import SeedRun
from ft_ray.errors import DataError
from ft_ray.recipe import Recipe, from_dict
from ft_ray.storage import Store
from ft_ray.sweep_after import CONFIRMED, Request
from ft_ray.sweep_results import Point, SweepResult, TrialResult


def make(folder: Path, model: str | Path = "m", **values: Any) -> Recipe:
    rows = folder / "rows.jsonl"
    if not rows.exists():
        lines = (json.dumps({"prompt": f"say {i}", "completion": "yes"}) + "\n" for i in range(60))
        rows.write_text("".join(lines), encoding="utf-8")
    return from_dict({
        "name": "s", "model": {"id": str(model)}, "data": {"train": [{"path": str(rows)}]}, "tracking": {"to": []},
        "storage": str(folder / "runs"), **values,
    })  # fmt: skip


def swept(recipe: Recipe, *configs: dict[str, Any], tree: str = "adapter", shared: bool = True) -> SweepResult:
    """A finished sweep, the best trial first; each trial's committed tree holds what its kind does."""
    store, trials = Store(recipe.run_path), []
    files = {"adapter": ("adapter_config.json", "adapter_model.safetensors"), "model": ("config.json",)}[tree]
    for number, config in enumerate(configs):
        checkpoint, loss = f"sweep/trials/t{number}/{tree}", 0.5 + number / 10
        with store.stage(checkpoint) as folder:
            for name in files:
                (folder / name).write_text("{}", encoding="utf-8")
        trials.append(TrialResult(
            id=f"t{number}", config=config, status="done", steps=8, tokens=9, best_step=8, best_loss=loss,
            history=[Point(step=s, validation_loss=loss + 8 - s) for s in (4, 8)], checkpoint=checkpoint,
        ))  # fmt: skip
    return SweepResult(
        name=recipe.name, recipe=recipe.to_dict(), recipe_hash=recipe.hash, space={}, trials=trials, mean_k=1.0,
        seconds=1.0, trained_tokens=9, device="cpu", shared=shared,
    )  # fmt: skip


RATES = ({"optim.lr": 1e-3}, {"optim.lr": 2e-3}, {"optim.lr": 3e-3})


class Examined:
    """Calls of `examine` with a stand-in for the Ray task, which keeps the requests that reach it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, recipe: Recipe, result: SweepResult) -> None:
        self.recipe, self.result, self.store = recipe, result, Store(recipe.run_path)
        self.requests: list[Request] = []
        self.said: list[str] = []
        self.stops = False  # while the training rows are measured
        monkeypatch.setattr(sweep_winner, "_remote", self._task)

    def _task(self, request: Request, on_event: Any) -> int | None:
        self.requests.append(request)
        if request.settings:
            rows = [[SeedRun(tuple((n + row / 9, 4) for row in range(6)))] * 2 for n in range(len(request.settings))]
            runs = {setting.name: run for setting, run in zip(request.settings, reversed(rows), strict=True)}
            on_event({"kind": CONFIRMED, "runs": runs})
        if self.stops:
            raise KeyboardInterrupt
        if request.good:
            self.store.write(request.relabel, b"file,line\n")
        return 5 if request.good else None

    def __call__(self, hashes: str = "rows", **values: Any) -> sweep_winner.Finding:
        rows = {"group": [str(i) for i in range(6)]}
        prepared = SimpleNamespace(hashes={"train": hashes}, rows=lambda split: rows)
        files: Any = SimpleNamespace(hash="base")
        return sweep_winner.examine(
            self.recipe, self.result, files, lambda recipe: prepared, self.store, **{"top": 3, "seeds": 2, **values},
            on_event=lambda event: self.said.append(event["message"]),
        )  # fmt: skip


def test_a_confirmation_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examined = Examined(monkeypatch, recipe := make(tmp_path), swept(recipe, *RATES))
    first = examined()
    assert first.confirmation is not None and first.confirmation.winner == "t2" and first.hard_rows == 5
    again = examined()
    assert len(examined.requests) == 1 and (again.confirmation, again.hard_rows) == (first.confirmation, 5)
    assert examined.said[-1] == f"confirmed before: {first.confirmation.verdict}"
    assert examined(relabel=False).hard_rows is None and len(examined.requests) == 1
    for other in ({"seeds": 3}, {"top": 2}, {"hashes": "other rows"}):
        examined(**other)
        assert examined.requests[-1].settings, other
    examined.result = examined.result.model_copy(update={"seed": 1})  # another sweep
    examined()
    assert len(examined.requests) == 5


def test_who_stops_the_relabel_pass_keeps_the_confirmation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examined = Examined(monkeypatch, recipe := make(tmp_path), swept(recipe, *RATES))
    examined.stops = True
    with pytest.raises(KeyboardInterrupt):
        examined()
    examined.stops = False
    found = examined()
    assert found.confirmation is not None and found.hard_rows == 5
    assert [bool(r.settings) for r in examined.requests] == [True, False]
    assert all(len(r.good) == 2 for r in examined.requests)


def test_a_relabel_pass_that_is_left_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make(tmp_path)
    result = swept(recipe, *RATES)
    pruned = [t if t.id == "t0" else t.model_copy(update={"status": "pruned"}) for t in result.trials]
    examined = Examined(monkeypatch, recipe, result.model_copy(update={"trials": pruned}))
    assert examined().hard_rows is None and examined.requests[0].good == []
    assert [line for line in examined.said if line.startswith("no sweep/relabel.csv: fewer than two of the trials")]
    examined.said.clear()
    examined(relabel=False)
    assert not any("relabel" in line for line in examined.said), "nobody asked for it"


def test_what_is_compared_trains_as_long_as_the_trials_did(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a shared base early_stop ends no trial."""
    recipe = make(tmp_path, tiny_model, evaluation={"early_stop": 2})
    result = swept(recipe, *RATES)
    examined = Examined(monkeypatch, recipe, result)
    examined()
    assert [s.name for s in examined.requests[0].settings] == ["default", "t0", "t1", "t2"]
    assert all(s.recipe.evaluation.early_stop is None for s in examined.requests[0].settings)
    analysis = sweep_finish.analyse(recipe, result, top=0, relabel=False, on_event=lambda event: None)
    assert search_space.apply(recipe, analysis.config).evaluation.early_stop is None
    assert search_space.apply(recipe, analysis.config).optim.lr == 1e-3
    assert Store(recipe.run_path).tree(sweep_winner.TREE) is not None
    assert sweep_winner.unstopped(recipe, result.model_copy(update={"shared": False})) == {}, "alone, trials stop early"


def test_a_sweep_of_full_fine_tuning_has_a_winner_without_an_adapter(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_session, "session", contextlib.nullcontext)  # nothing is examined in it
    recipe = make(tmp_path, tiny_model, method="full", evaluation={"early_stop": 2})
    result = swept(recipe, *RATES, tree="model", shared=False)
    said: list[str] = []
    for top in (0, 3):  # --search-only, and the whole road
        analysis = sweep_finish.analyse(
            recipe, result, top=top, relabel=False, on_event=lambda event: said.append(event["message"])
        )
        assert (analysis.chosen, analysis.config) == ("t0", RATES[0]) and analysis.confirmation is None
        assert any("not confirmed" in line for line in said) == bool(top)
    store = Store(recipe.run_path)
    assert store.tree(sweep_winner.TREE) is None and store.exists("sweep/analysis.json")
    assert store.exists("sweep/report.html")


def test_a_sweep_without_validation_rows_is_refused_before_its_search(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make(tmp_path, tiny_model, data={
        "train": [{"path": str(tmp_path / "rows.jsonl")}], "split": {"validation": 0, "test": 0.2},
    })  # fmt: skip
    make(tmp_path)  # the rows
    searched: list[bool] = []
    monkeypatch.setattr(sweeping, "search", lambda *given, **options: searched.append(True))
    with pytest.raises(DataError, match=r"the validation split of s is empty.*raise data.split.validation.*search-on"):
        sweeping.sweep(recipe, "lora_small", registers=True)
    assert not searched
    sweeping.sweep(recipe, "lora_small")
    assert searched, "a search alone goes by the training loss"
