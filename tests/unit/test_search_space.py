"""Search spaces: strict files, every value tried on the recipe, points drawn the same for the same seed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ft_ray import recipe, search_space, sweep_steps
from ft_ray.errors import RecipeError
from ft_ray.recipe import Recipe
from ft_ray.search_space import LoadedSpace, Space, parse

BASE = recipe.from_dict({"name": "x", "model": {"id": "m"}, "data": {"train": [{"path": "rows.jsonl"}]}})


def space(**values: Any) -> Space:
    return parse({"search": {"lora.r": {"choice": [8, 16]}}, "budget": {"trials": 4}, **values})


def check(made: Space, on: Recipe = BASE) -> list[str]:
    return search_space.check(LoadedSpace(made, lambda loc: "space"), on)


def faults(folder: Path, text: str) -> list[str]:
    file = folder / "space.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        search_space.check(search_space.load(file), BASE)
    return [fault.removeprefix(f"{file}:") for fault in caught.value.faults]


def test_all_faults_of_the_file_are_said_at_once_with_their_lines(tmp_path: Path) -> None:
    assert faults(
        tmp_path,
        "search:\n"
        "  lora.r: {choice: [8], uniform: [1, 2]}\n"
        "  optim.lr: {loguniform: [0, 1]}\n"
        "  lora.alpha: {times: lora.r}\n"
        "  lora.dropout: {uniform: [0.1, 0]}\n"
        "serch: {}\n"
        "scheduler: {type: asha, reducton: 3}\n",
    ) == [
        "2: 'search.lora.r': has choice and uniform: give exactly one of choice, uniform, loguniform, quniform, "
        "qloguniform, randint, lograndint, or times with choice.",
        "3: 'search.optim.lr': loguniform needs numbers above 0.",
        "4: 'search.lora.alpha': is empty: give exactly one of choice, uniform, loguniform, quniform, qloguniform, "
        "randint, lograndint, or times with choice.",
        "5: 'search.lora.dropout': uniform needs two numbers, the lower one first.",
        "7: unknown key 'scheduler.reducton' (did you mean 'reduction'?).",
        "6: unknown key 'serch' (did you mean 'search'?).",
    ]


def test_a_space_that_is_not_there_names_the_shipped_ones() -> None:
    assert search_space.load("lora").space.search
    with pytest.raises(RecipeError, match="the name of a shipped one: data, lora, lora_lr, lora_small"):
        search_space.load("elsewhere/lora.yaml")


def test_every_value_is_tried_on_the_recipe_and_on_what_vllm_serves(tmp_path: Path) -> None:
    assert faults(
        tmp_path,
        "search:\n"
        "  lora.rank: {choice: [8]}\n"
        "  lora.r: {choice: [8, 513]}\n"
        "  lora.dora: {choice: [true, false]}\n"
        "  lora.bias: {choice: [none, all]}\n"
        "  lora.modules_to_save: {choice: [[lm_head]]}\n"
        "  lora.dropout: {uniform: [0, 1.5]}\n"
        "  lora.alpha: {times: lora.rr, choice: [2]}\n"
        "  serving.replicas: {choice: [1]}\n"
        "first:\n"
        "  - {optim.lr: 1}\n",
    ) == [
        "2: unknown key 'lora.rank' (valid here: alpha, bias, dora, dropout, r, rslora, targets).",
        "3: lora.r: rank 513 is above 512, the highest that vLLM serves: lower it.",
        "4: lora.dora: vLLM serves no DoRA adapter, so no sweep searches it: leave it out, "
        "or train it with ft-ray run.",
        "5: lora.bias: vLLM serves no adapter with trained biases, so no sweep searches it: leave it out.",
        "6: lora.modules_to_save: vLLM serves no adapter with modules_to_save, so no sweep searches it: leave it out.",
        "7: 'lora.dropout': input should be less than 1, not 1.5.",
        "8: lora.alpha: times 'lora.rr' is no number (did you mean 'lora.r'?).",
        "9: serving.replicas: does not change what is learnt from the same examples, or changes which they are "
        "(valid here: " + ", ".join(sorted(search_space._SHARED)) + ").",
        "11: first point sets 'optim.lr', which is not searched (valid here: " + ", ".join(sorted([
            "lora.rank", "lora.r", "lora.dora", "lora.bias", "lora.modules_to_save", "lora.dropout", "lora.alpha",
            "serving.replicas"])) + ").",
        "1: budget.trials is missing: a random search has no end of its own.",
    ]  # fmt: skip


def test_what_is_to_be_confirmed_is_kept() -> None:
    kept = [space(keep=1, confirm={"top": 3}).keep, space(confirm={"top": 6}).keep, space(confirm={"top": 0}).keep]
    assert kept == [3, 6, 4] and space(keep=8).keep == 8
    with pytest.raises(RecipeError) as caught:
        space(keep=0, confirm={"top": -1})
    assert len(caught.value.faults) == 2


def test_shares_of_the_rows_are_shares_of_all_rows() -> None:
    made = space(search={"data.fraction": {"choice": [0.25, 1.0]}})
    assert check(made) is not None
    half = recipe.from_dict({**BASE.to_dict(), "data": {"train": [{"path": "rows.jsonl"}], "fraction": 0.5}})
    with pytest.raises(RecipeError, match=r"data.fraction: the recipe keeps 0.5 of the rows itself: leave data.fract"):
        check(made, half)
    assert check(space(), half) is not None  # not searched: a recipe may have its share


def test_the_longest_trial_is_one_that_can_be_drawn() -> None:
    """What a scheduler counts against: a factor is no number of steps, and factors go with their own base."""

    class Rows:
        def tokens(self, split: str) -> range:
            return range(400)

    def longest(**search: Any) -> int:
        on = recipe.from_dict({**BASE.to_dict(), "batch": {"global": 8}, "schedule": {"epochs": 1000}})
        return sweep_steps.longest(space(search=search), on, sweep_steps.RowShares(Rows(), on))

    times = {"times": "batch.global", "choice": [10]}
    assert longest(**{"schedule.max_steps": times}) == 80
    assert longest(**{"schedule.max_steps": times, "batch.global": {"choice": [4, 16]}}) == 160
    # 4 epochs of 100 steps or 16 of 25: 16 of 100 cannot be drawn.
    epochs = {"times": "batch.global", "choice": [1]}
    assert longest(**{"schedule.epochs": epochs, "batch.global": {"choice": [4, 16]}}) == 400
    ranks = {"lora.r": {"choice": [8, 64]}, "schedule.max_steps": {"times": "lora.r", "choice": [1, 2]}}
    assert longest(**ranks) == 128


def test_a_dry_run_says_that_tpe_chooses_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from ft_ray.cli import app

    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(json.dumps(BASE.to_dict()), encoding="utf-8")
    for searcher, said in (("tpe", True), ("random", False)):
        text = "search: {lora.r: {choice: [8, 16]}}\nbudget: {trials: 2}\nsearcher: " + searcher
        Path("space.yaml").write_text(text, encoding="utf-8")
        done = CliRunner().invoke(app, ["sweep", "recipe.yaml", "--space", "space.yaml", "--dry-run"])
        assert done.exit_code == 0 and "2 trials, which share one frozen base" in done.stdout, done.stderr
        assert ("only examples of the space" in " ".join(done.stdout.split())) == said


def test_a_first_point_lies_in_the_space() -> None:
    with pytest.raises(RecipeError, match=r"first point sets lora.r to 9, outside what search.lora.r can draw"):
        check(space(first=[{"lora.r": 9}]))
    search = {"lora.r": {"choice": [8, 16]}, "lora.alpha": {"times": "lora.r", "choice": [1, 2]}}
    with pytest.raises(RecipeError, match=r"first point sets lora.alpha to 48, outside"):
        check(space(search=search, first=[{"lora.r": 16, "lora.alpha": 48}]))


def test_values_that_do_not_fit_together_are_found(tmp_path: Path) -> None:
    on = recipe.from_dict({**BASE.to_dict(), "batch": {"global": 8, "per_device": 8}})
    with pytest.raises(RecipeError, match=r"batch.global 12 is not workers 1 x per_device 8"):
        check(space(search={"batch.global": {"choice": [8, 12]}}), on)


def test_points_are_seeded_distinct_and_begin_with_the_first_ones() -> None:
    made = space(
        search={
            "lora.r": {"choice": [8, 16, 32]},
            "lora.alpha": {"times": "lora.r", "choice": [1, 2]},
            "lora.dropout": {"quniform": [0, 0.1, 0.05]},
            "optim.lr": {"loguniform": [1e-4, 1e-2]},
            "schedule.max_steps": {"lograndint": [10, 100]},
        },
        first=[{"lora.r": 32}],
        budget={"trials": 40},
    )
    points = search_space.points(made, BASE)
    assert points == search_space.points(made, BASE)
    assert points != search_space.points(made.model_copy(update={"seed": 1}), BASE)
    assert len({json.dumps(p) for p in points}) == len(points) == 40
    assert points[0]["lora.r"] == 32 and points[0]["lora.alpha"] == 32.0, "the recipe's alpha is once the rank"
    assert points[0]["lora.dropout"] == 0.05 and points[0]["optim.lr"] == 2e-4, "and its own values where they fit"
    for point in points:
        assert point["lora.alpha"] / point["lora.r"] in (1, 2)
        assert round(point["lora.dropout"] / 0.05, 6) in (0, 1, 2)
        assert 1e-4 <= point["optim.lr"] <= 1e-2
        assert isinstance(point["schedule.max_steps"], int) and 10 <= point["schedule.max_steps"] <= 100
        search_space.apply(BASE, point)
    assert len({p["schedule.max_steps"] for p in points}) > 15


def test_a_grid_is_every_combination_once() -> None:
    made = space(
        search={"lora.r": {"choice": [8, 16]}, "lora.alpha": {"times": "lora.r", "choice": [1, 2]}},
        searcher="grid", budget={},
    )  # fmt: skip
    assert check(made) == []
    assert [(p["lora.r"], p["lora.alpha"]) for p in search_space.points(made, BASE)] == [
        (8, 8), (8, 16), (16, 16), (16, 32),
    ]  # fmt: skip
    with pytest.raises(RecipeError, match=r"optim.lr: a grid needs choice"):
        check(space(search={"optim.lr": {"uniform": [1e-4, 1e-3]}}, searcher="grid"))


def test_redundant_points_are_said() -> None:
    notes = check(
        space(
            search={
                "lora.alpha": {"choice": [16, 32]},
                "optim.lr": {"choice": [1e-4, 2e-4]},
                "lora.r": {"choice": [16]},
            },
            budget={"trials": 4},
        )
    )
    assert any("lora.alpha and optim.lr trade off" in note for note in notes)
    assert any("lora.alpha is drawn apart from lora.r" in note for note in notes)
    assert any("have the same alpha/r times learning rate" in note for note in notes)
    chosen = check(space(
        search={"lora.alpha": {"choice": [16, 32]}, "optim.lr": {"choice": [1e-4, 2e-4]}}, searcher="tpe",
    ))  # fmt: skip
    assert not any(note.startswith("points ") for note in chosen), "which points tpe chooses is not known yet"
    few = check(space(budget={"trials": 9}))
    assert few == ["the space holds 2 different points, fewer than budget.trials 9"]


def test_what_cannot_share_a_base_is_known_by_the_space() -> None:
    assert search_space.unshared(space(), BASE) == []
    for search, on in (
        ({"sequence.max_length": {"choice": [64, 128]}}, {}),
        ({"method": {"choice": ["lora", "full"]}}, {}),
        ({"lora.r": {"choice": [512]}}, {}),
        ({"lora.r": {"choice": [8]}}, {"method": "full"}),
        ({"lora.r": {"choice": [8]}}, {"lora": {"dora": True}}),
        ({"lora.r": {"choice": [8]}}, {"optim": {"name": "adafactor"}}),
    ):
        made, changed = space(search=search), recipe.from_dict({**BASE.to_dict(), **on})
        assert check(made, changed) is not None
        assert search_space.unshared(made, changed), search


def test_a_value_is_no_multiple_of_itself() -> None:
    with pytest.raises(RecipeError, match=r"search.lora.r is a multiple of itself \(lora.r of lora.alpha of lora.r\)"):
        space(
            search={"lora.r": {"times": "lora.alpha", "choice": [1]}, "lora.alpha": {"times": "lora.r", "choice": [1]}}
        )


def test_spaces_need_neither_torch_nor_ray() -> None:
    code = "import sys, ft_ray.search_space, ft_ray.sweep_results; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
