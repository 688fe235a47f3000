from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERBS = [
    "init", "data", "config", "plan", "train", "merge", "evaluate", "compare", "runs", "promote", "serve", "run",
    "import", "fetch", "demo", "doctor",
]  # fmt: skip


def ft_ray(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "ft_ray", *arguments], capture_output=True, text=True, cwd=cwd, env=environment
    )


def recipe(tmp_path: Path, **changes: str) -> Path:
    file = tmp_path / "recipe.yaml"
    lines = {"name": "x", "model": "{id: nowhere/at-all}", "data": "{train: [{path: rows.jsonl}]}", "storage": "runs"}
    file.write_text("".join(f"{k}: {v}\n" for k, v in (lines | changes).items()), encoding="utf-8")
    return file


def test_help_lists_every_verb_fast_and_without_torch_or_ray() -> None:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        done = ft_ray("--help")
        seconds.append(time.perf_counter() - started)
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)
    assert statistics.median(seconds) < 0.5 or min(seconds) < 0.4, seconds
    code = (
        "import sys, runpy\nsys.argv = ['ft-ray', '--help']\n"
        "try: runpy.run_module('ft_ray', run_name='__main__')\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'mlflow') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stderr.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    done = ft_ray(verb, "--help")
    assert done.returncode == 0 and "Usage" in done.stdout


def test_bad_recipe_exits_2_with_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    file = recipe(tmp_path, metod="lora")
    done = ft_ray("run", str(file), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == f"ft-ray: {file}:5: unknown key 'metod' (did you mean 'method'?)."
    assert done.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml"]


def test_errors_are_one_json_object_with_json(tmp_path: Path) -> None:
    done = ft_ray("train", str(recipe(tmp_path, method="lorra")), "--json", cwd=tmp_path)
    value = json.loads(done.stdout)
    assert done.returncode == value["exit_code"] == 2
    assert value["kind"] == "RecipeError" and "'lorra'" in value["error"]


@pytest.mark.parametrize("verb", ["train", "merge", "evaluate", "run"])
def test_dry_run_says_what_would_run_and_does_nothing(tmp_path: Path, verb: str) -> None:
    done = ft_ray(verb, str(recipe(tmp_path)), "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["stages"].values()) == {"would run"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml"]


def test_config_render_shows_where_each_value_came_from(tmp_path: Path) -> None:
    file = recipe(tmp_path)
    done = ft_ray("config", "render", str(file), "lora.r=8")
    lines = done.stdout.splitlines()
    assert lines[0].startswith('name: "x"') and lines[0].endswith(f"# {file}:1")
    assert any(line.startswith("  r: 8 ") and line.endswith("# override") for line in lines)
    assert any(line.startswith("  alpha: 32.0 ") and line.endswith("# default") for line in lines)
    assert json.loads(ft_ray("config", "render", str(file), "--json").stdout)["recipe"]["lora"]["r"] == 16


def test_config_schema_is_a_closed_json_schema() -> None:
    import jsonschema

    schema = json.loads(ft_ray("config", "schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["additionalProperties"] is False
    assert not jsonschema.Draft202012Validator(schema).is_valid({"name": "x", "nonsense": 1})


def test_runs_of_an_empty_storage(tmp_path: Path) -> None:
    assert json.loads(ft_ray("runs", "--json", cwd=tmp_path).stdout) == {"runs": []}
    assert ft_ray("runs", cwd=tmp_path).stdout == "No runs here.\n"


def test_public_names_are_exactly_the_declared_ones() -> None:
    import ft_ray as package

    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        package.nonsense  # noqa: B018
