"""A run's folder and its manifest: stages, resuming, what another recipe may not touch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ft_ray import run_lock
from ft_ray.errors import DataError, InputError, Interrupted, StorageError
from ft_ray.manifest import Manifest
from ft_ray.recipe import Recipe, from_dict
from ft_ray.run_folder import RunFolder, differences, read_recipe
from ft_ray.storage import Store


def make(tmp_path: Path, **changes: Any) -> Recipe:
    return from_dict(
        {"name": "r", "model": {"id": "m"}, "data": {"train": [{"path": "d"}]}, "storage": str(tmp_path), **changes}
    )


def test_a_done_stage_is_skipped_until_its_key_or_artifacts_change(tmp_path: Path) -> None:
    calls: list[str] = []
    events: list[dict[str, Any]] = []

    def work() -> tuple[dict[str, Any], dict[str, str]]:
        calls.append("x")
        store.write("out.json", b"{}")
        return {"n": len(calls)}, {"out.json": ""}

    store = Store(tmp_path / "r")
    for key, count in [("k", 1), ("k", 1), ("other", 2)]:
        with RunFolder.opened(make(tmp_path), events.append) as folder:
            assert folder.stage("s", key, work).metrics == {"n": count}
    store.remove("out.json")
    with RunFolder.opened(make(tmp_path), events.append) as folder:
        assert folder.stage("s", "other", work).metrics == {"n": 3}
    assert [e["state"] for e in events] == ["start", "done", "skipped", "start", "done", "start", "done"]


def test_a_failed_or_interrupted_stage_is_recorded_and_runs_again(tmp_path: Path) -> None:
    def fail() -> tuple[dict[str, Any], dict[str, str]]:
        raise StorageError("disk gone")

    def interrupt() -> tuple[dict[str, Any], dict[str, str]]:
        raise KeyboardInterrupt

    with pytest.raises(StorageError), RunFolder.opened(make(tmp_path), lambda e: None) as folder:
        folder.stage("s", "k", fail)
    manifest = Manifest.load(Store(tmp_path / "r"))
    assert manifest is not None and manifest.stages["s"].status == "failed"
    assert manifest.stages["s"].error == "disk gone"
    with pytest.raises(Interrupted) as caught, RunFolder.opened(make(tmp_path), lambda e: None) as folder:
        folder.stage("s", "k", interrupt)
    assert caught.value.exit_code == 130
    with RunFolder.opened(make(tmp_path), lambda e: None) as folder:
        assert folder.stage("s", "k", lambda: ({}, {})).status == "done"


def test_another_recipe_is_not_resumed_into(tmp_path: Path) -> None:
    with RunFolder.opened(make(tmp_path), lambda e: None) as folder:
        folder.stage("train", "k", lambda: ({}, {}))
    with (
        pytest.raises(InputError, match=r"seed 0 -> 1.*--fresh"),
        RunFolder.opened(make(tmp_path, seed=1), lambda e: None),
    ):
        raise AssertionError("opened")
    for change in ({"promote": "auto"}, {"fused_kernels": False}, {"gradient_checkpointing": False}):
        with RunFolder.opened(make(tmp_path, **change), lambda e: None) as folder:
            assert "train" in folder.manifest.stages, "the same run"
    with RunFolder.locked(make(tmp_path, seed=1), lambda e: None, fresh=True) as folder:
        assert folder.manifest.stages == {}
        assert read_recipe(Store(tmp_path / "r")).seed == 0, "removed before it was begun"
        folder.begin()
    assert read_recipe(Store(tmp_path / "r")).seed == 1


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("evaluation.early_stop", {"evaluation": {"early_stop": 1}}),
        ("evaluation.every", {"evaluation": {"every": 5}}),
        ("deepspeed", {"method": "full", "deepspeed": {"gradient_clipping": 0.5}, "resources": {"sharding": "zero2"}}),
    ],
)
def test_what_decides_the_last_or_best_step_makes_another_run(
    tmp_path: Path, key: str, change: dict[str, Any]
) -> None:
    with RunFolder.opened(make(tmp_path), lambda e: None) as folder:
        folder.stage("train", "k", lambda: ({}, {}))
    written = (tmp_path / "r" / "recipe.yaml").read_bytes()
    with pytest.raises(InputError, match=key), RunFolder.opened(make(tmp_path, **change), lambda e: None):
        raise AssertionError("opened")
    assert (tmp_path / "r" / "recipe.yaml").read_bytes() == written
    with RunFolder.opened(make(tmp_path, evaluation={"max_rows": 5}), lambda e: None) as folder:
        assert folder.manifest.stages["train"].status == "done", "what only measures may change"


def test_a_new_folder_that_was_not_begun_is_gone(tmp_path: Path) -> None:
    with pytest.raises(DataError), RunFolder.locked(make(tmp_path), lambda e: None):
        raise DataError("bad rows")
    assert not (tmp_path / "r").exists()
    Store(tmp_path / "r").write("mine.txt", b"x")
    with pytest.raises(DataError), RunFolder.locked(make(tmp_path), lambda e: None, fresh=True):
        raise DataError("bad rows")
    assert (tmp_path / "r" / "mine.txt").exists()


def test_what_a_killed_process_left_half_made_is_gone_with_the_next_start(tmp_path: Path) -> None:
    store = Store(tmp_path / "r")
    with RunFolder.opened(make(tmp_path), lambda e: None):
        kept = {*store.list(), "adapter", "my.old", "notes.tmp"}
    code = (
        "import os, sys; from pathlib import Path; from ft_ray.storage import Store\n"
        "with Store(sys.argv[1]).stage('merged') as out:\n"
        "    (out / 'weights').write_bytes(bytes(1000)); os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "r")], check=False)
    for name in ("adapter/a", "my.old", "notes.tmp", f"adapter.{'0' * 32}.old/a", f"manifest.json.{'f' * 32}.tmp"):
        store.write(name, b"x")
    assert any(name.startswith(".staging-") for name in store.list())
    with RunFolder.opened(make(tmp_path), lambda e: None):
        assert set(store.list()) == kept


def test_a_tree_that_was_moved_aside_for_one_that_never_came_is_put_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "r")
    with RunFolder.opened(make(tmp_path), lambda e: None), store.stage("adapter") as out:
        (out / "a").write_bytes(b"a")
    os.rename(tmp_path / "r/adapter", tmp_path / f"r/adapter.{'0' * 32}.old")
    with RunFolder.opened(make(tmp_path), lambda e: None):
        assert store.verify("adapter") == []


def test_two_openers_of_one_run_name(tmp_path: Path) -> None:
    with (
        RunFolder.opened(make(tmp_path), lambda e: None),
        pytest.raises(StorageError, match="in use by process"),
        RunFolder.opened(make(tmp_path), lambda e: None),
    ):
        raise AssertionError("opened twice")


def test_a_broken_manifest_is_refused_not_overwritten(tmp_path: Path) -> None:
    store = Store(tmp_path / "r")
    store.write("manifest.json", b'{"version": 1, "nam')
    with pytest.raises(StorageError, match="cut short"), RunFolder.opened(make(tmp_path), lambda e: None):
        raise AssertionError("opened")
    assert store.read("manifest.json") == b'{"version": 1, "nam'


def test_differences() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [("a.c", 2, 3), ("d", None, 4)]


def test_a_run_whose_folder_was_taken_over_writes_nothing_more_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: dict[str, str] = {}
    monkeypatch.setattr(run_lock, "_lost", lost)

    def taken_over() -> tuple[dict[str, Any], dict[str, str]]:
        lost[folder.store.url] = "it was taken over."
        folder.store.write("manifest.json", b"theirs")
        raise StorageError("the upload failed")

    with RunFolder.opened(make(tmp_path), lambda event: None) as folder:
        with pytest.raises(StorageError, match="the upload failed"):
            folder.stage("s", "k", taken_over)
        with pytest.raises(StorageError, match="it was taken over"):
            folder.stage("t", "k", taken_over)
        assert folder.store.read("manifest.json") == b"theirs"
