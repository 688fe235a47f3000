"""`ft-ray plan --space` and the demo's sweep: predictions that say they are, files that fit each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ft_ray import demo_sweep, search_space, sharing_plan
from ft_ray.cli import app
from ft_ray.demo import prepare_folder
from ft_ray.errors import RecipeError
from ft_ray.recipe import Recipe, from_dict
from ft_ray.search_space import LoadedSpace
from ft_ray.storage import Store
from tests.unit.model_configs import LLAMA_8B

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
SPACE = {
    "search": {"lora.r": {"choice": [8, 16, 32]}, "optim.lr": {"loguniform": [1e-5, 1e-3]}},
    "scheduler": {"type": "asha", "reduction": 3, "grace": 0.1}, "budget": {"trials": 16},
}  # fmt: skip


def recipe(folder: Path, **keys: Any) -> Recipe:
    (folder / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
    return from_dict({
        "name": "p", "model": {"id": str(folder)}, "data": {"train": [{"path": "x.jsonl"}]}, "method": "qlora",
        "sequence": {"max_length": 512}, "batch": {"global": 8}, "schedule": {"max_steps": 100},
        "storage": str(folder / "runs"), **keys,
    })  # fmt: skip


def space(**keys: Any) -> LoadedSpace:
    return LoadedSpace(search_space.parse({**SPACE, **keys}), lambda loc: "space")


def test_the_gain_falls_with_the_tokens_of_a_step_and_says_its_source(tmp_path: Path) -> None:
    made = sharing_plan.plan(recipe(tmp_path), space(), gpu="h100")
    assert made.shared and made.adapters_at_once == 16 and made.tokens_a_step == 512
    ratios = [gain.ratio for gain in made.gains]
    assert ratios == sorted(ratios, reverse=True) and [g.tokens for g in made.gains] == [512, 1024, 2048, 4096, 8192]
    # Measured with 16 adapters of mixed ranks; what is predicted errs on the careful side.
    found = json.loads((RESULTS / "sweep_h100.json").read_text())
    for gain in made.gains:
        ours, peer = (
            min(c["seconds"] for c in found[side] if c["tokens"] == gain.tokens and not c.get("trials") and wanted(c))
            for side, wanted in (("ours", lambda c: True), ("trl", lambda c: c["r"] == 32))
        )
        measured = 16 * peer / ours
        assert 0.7 * measured < gain.ratio < 1.05 * measured, (gain, measured)
        assert (gain.ratio > 1) == (measured > 1), "where sharing loses"
    assert made.slot_bytes[0] < made.slot_bytes[1]
    assert made.seconds is not None and made.seconds_one_by_one is not None
    assert made.seconds < made.seconds_one_by_one / 3
    assert made.confirmation_trainings == 12  # the default and the best three, three seeds each
    shown = "\n".join(str(part) for part in sharing_plan.tables(made) if isinstance(part, str))
    assert "predicted from formulas" in shown and "16 of 16 trials at once" in shown
    assert "12 trainings to confirm" in shown


def test_a_smaller_card_holds_fewer_adapters(tmp_path: Path) -> None:
    large = sharing_plan.plan(recipe(tmp_path), space(budget={"trials": 64}), gpu="h100")
    small = sharing_plan.plan(recipe(tmp_path), space(budget={"trials": 64}), gpu="rtx-4090")
    assert 1 <= small.adapters_at_once < large.adapters_at_once
    assert small.gain <= large.gain


def test_asha_trains_a_part_of_the_tokens(tmp_path: Path) -> None:
    made = sharing_plan.plan(recipe(tmp_path), space(), gpu="h100")
    # 16 to a tenth, a third of them to 0.3, a ninth to 0.9, one to the end.
    assert made.share_of_tokens == pytest.approx((16 * 0.1 + 16 / 3 * 0.2 + 16 / 9 * 0.6 + 1 * 0.1) / 16, abs=0.001)
    assert sharing_plan.plan(recipe(tmp_path), space(scheduler={"type": "none"}), gpu="h100").share_of_tokens == 1


def test_what_cannot_share_is_said(tmp_path: Path) -> None:
    search = {"sequence.max_length": {"choice": [256, 512]}}
    made = sharing_plan.plan(recipe(tmp_path), space(search=search), gpu="h100")
    assert not made.shared and made.gains == () and made.gain == 1
    assert "Trials cannot share a base: sequence.max_length" in str(next(sharing_plan.tables(made)))
    with pytest.raises(RecipeError, match=r"lora\.rank"):
        sharing_plan.plan(recipe(tmp_path), space(search={"lora.rank": {"choice": [1, 2]}}))


def test_token_counts_of_the_data_check_are_used(tmp_path: Path) -> None:
    made = recipe(tmp_path, schedule={"epochs": 1})
    assert sharing_plan.plan(made, space()).seconds is None
    known = {"stats": {"train_tokens": {"rows": 800, "tokens": 80_000, "longest": 300}}}
    Store(made.run_path).write_json("data_check.json", known)
    counted = sharing_plan.plan(made, space())
    assert counted.seconds is not None and counted.tokens_a_step == 100


def test_the_verb_prints_one_object(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps({k: v for k, v in made.to_dict().items() if k != "tracking"}), encoding="utf-8")
    (tmp_path / "s.yaml").write_text(json.dumps(SPACE), encoding="utf-8")
    done = CliRunner().invoke(app, ["plan", str(file), "--space", str(tmp_path / "s.yaml"), "--json"])
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    assert value["method"] == "qlora" and value["sharing"]["trials"] == 16 and value["sharing"]["source"]


def test_the_demos_sweep_is_a_recipe_and_a_space_that_fit(tmp_path: Path) -> None:
    file = prepare_folder(tmp_path / "demo", seed=3)
    found = demo_sweep.prepare(file, seed=3)
    made = Recipe.load(file)
    assert made.schedule.max_steps == 48
    loaded = search_space.load(found)
    assert search_space.check(loaded, made) == [] and search_space.unshared(loaded.space, made) == []
    points = search_space.points(loaded.space, made)
    assert len(points) == 4 and points[0] == {"lora.r": 16, "lora.alpha": 32, "optim.lr": 1e-3}
    assert len((tmp_path / "demo" / "validation.jsonl").read_text(encoding="utf-8").splitlines()) == 64
