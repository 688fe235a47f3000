"""Real data sets through the data check. They are not part of this repository: FT_RAY_TEST_DATA names their folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import ft_ray
from ft_ray.recipe import from_dict

FOLDER = Path(os.environ.get("FT_RAY_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")


def recipe(tmp_path: Path, model: Path, name: str, columns: dict[str, str]) -> ft_ray.Recipe:
    file = FOLDER / name
    if not file.exists():
        pytest.skip(f"{file} is not here: set FT_RAY_TEST_DATA to a folder with {name}")
    return from_dict(
        {
            "name": "real",
            "model": {"id": str(model)},
            "data": {"train": [{"path": str(file)}], "columns": columns, "system": "Answer."},
            "sequence": {"max_length": 4096},
            "storage": str(tmp_path / "runs"),
        }
    )


def test_banking77_passes_with_a_three_line_column_map(tmp_path: Path, tiny_model: Path) -> None:
    columns = {"prompt": "text", "completion": "category"}
    report = ft_ray.check(recipe(tmp_path, tiny_model, "banking77/train.csv", columns))
    counts = report.stats["counts"]
    assert sum(counts.values()) == 10_003 and min(counts["validation"], counts["test"]) > 900
    assert len(report.stats["labels"]) == 77
    assert [f.code for f in report.findings if f.severity == "error"] == []
    # Near duplicates are told apart below: written in series, some of its rows do repeat. Of all else that names
    # rows, next to nothing may be said: the set is clean.
    repeats = ("duplicates", "near_duplicates", "near_leakage", "leakage")
    flagged = {f.code: f.count for f in report.findings if f.examples and f.code not in repeats}
    assert sum(flagged.values()) <= 0.01 * 10_003, flagged
    for finding in report.findings:
        assert finding.code not in repeats or finding.examples, "a repeat is shown with its pair"


def test_self_instruct_passes_with_nested_columns(tmp_path: Path, tiny_model: Path) -> None:
    columns = {"instruction": "instruction", "input": "instances[].input", "output": "instances[].output"}
    name = "self_instruct/user_oriented_instructions.jsonl"
    report = ft_ray.check(recipe(tmp_path, tiny_model, name, columns))
    assert sum(report.stats["counts"].values()) >= 240
    assert "few_rows" in report.codes()
