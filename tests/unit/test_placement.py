"""What a node does that lacks what the driver has. The rest needs nodes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from ft_ray import placement, recipe
from ft_ray.base_model import resolve
from ft_ray.chat import chat_of
from ft_ray.dataset import prepare
from ft_ray.errors import DataError, ModelError
from tests import tiny


def made(model: Path, tmp_path: Path, **changes: Any) -> recipe.Recipe:
    rows = tmp_path / "rows.jsonl"
    if not rows.exists():
        tiny.rows(rows, 30)
    return recipe.from_dict({
        "name": "x", "model": {"id": str(model)}, "data": {"train": [{"path": str(rows)}]},
        "sequence": {"max_length": 64}, "storage": str(tmp_path / "runs"), **changes,
    })  # fmt: skip


def test_without_a_cluster_nothing_is_asked_and_stages_run_here(tiny_model: Path, tmp_path: Path) -> None:
    one = made(tiny_model, tmp_path)
    said: list[dict[str, Any]] = []
    with placement.cluster(one, said.append, registry=True):
        parts: Any = (None, None, None)
        assert placement.run_stage(one, "merge", lambda *a, on_event: len(a), *parts, 7, on_event=said.append) == 5
    assert said == []


def test_a_node_without_the_cache_makes_the_same_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_RAY_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    one = made(copy, tmp_path)
    files = resolve(one.model)
    prepared = prepare(one, chat_of(one.model, files.folder), model_hash=files.hash)
    assert placement.local_parts(one, files, prepared) == (files, prepared), "what is there is taken as it is"

    monkeypatch.setenv("FT_RAY_CACHE", str(tmp_path / "elsewhere"))
    away = dataclasses.replace(files, folder=tmp_path / "not-here")
    gone = dataclasses.replace(prepared, folder=tmp_path / "nor-here")
    found, again = placement.local_parts(one, away, gone)
    assert found == files
    assert again.hashes == prepared.hashes and again.folder.is_relative_to(tmp_path / "elsewhere")
    assert again.tokens("train")["input_ids"] == prepared.tokens("train")["input_ids"]

    (tmp_path / "rows.jsonl").unlink()
    tiny.rows(tmp_path / "rows.jsonl", 31, seed=5)
    with pytest.raises(DataError, match="this node reads other data than the driver did"):
        placement.local_parts(one, files, gone)
    with pytest.raises(ModelError, match="is another model on this node"):
        placement.local_parts(one, dataclasses.replace(away, hash="0" * 64), prepared)
