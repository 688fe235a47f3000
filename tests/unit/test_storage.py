from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from ft_ray.errors import StorageError
from ft_ray.storage import COMMIT, Store, hash_tree


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path / "s" if request.param == "local" else f"memory://{uuid.uuid4().hex}/s")


def test_a_tree_is_visible_only_when_committed(store: Store) -> None:
    with store.stage("adapter") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a.bin").write_bytes(b"abc")
        assert store.tree("adapter") is None
    assert list(store.tree("adapter") or {}) == ["deep/a.bin"]
    assert store.verify("adapter") == []
    assert (store.local("adapter") / "deep" / "a.bin").read_bytes() == b"abc"


def test_a_failure_while_staging_leaves_the_earlier_tree_and_nothing_else(store: Store) -> None:
    with store.stage("adapter") as folder:
        (folder / "a").write_text("old")

    def fail() -> None:
        with store.stage("adapter") as folder:
            (folder / "a").write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert store.list() == ["adapter"]
    assert (store.local("adapter") / "a").read_text() == "old"


def test_a_new_commit_replaces_the_whole_tree(store: Store) -> None:
    for name in ("a", "b"):
        with store.stage("t") as folder:
            (folder / name).write_text(name)
    assert list(store.tree("t") or {}) == ["b"]
    assert store.verify("t") == []


def test_verify_names_changed_and_missing_files(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.stage("t") as folder:
        (folder / "a").write_text("a")
        (folder / "b").write_text("b")
    (tmp_path / "t" / "a").write_text("x")
    (tmp_path / "t" / "b").unlink()
    faults = store.verify("t")
    assert len(faults) == 2 and "differs" in faults[0] and "missing" in faults[1]
    (tmp_path / "t" / COMMIT).write_text("{")
    assert store.tree("t") is None


def test_writes_are_whole(store: Store) -> None:
    store.write_json("x.json", {"a": 1})
    assert store.read_json("x.json") == {"a": 1}
    assert store.list() == ["x.json"]
    store.write("x.json", b"{")
    with pytest.raises(StorageError, match="not valid JSON"):
        store.read_json("x.json")


def test_paths_stay_inside(store: Store) -> None:
    for path in ("../x", "a/../../x", "/etc/passwd"):
        with pytest.raises(StorageError, match="leaves the run folder"):
            store.path(path)


def test_a_second_writer_is_refused_and_named(store: Store) -> None:
    with (
        store.lock(),
        pytest.raises(StorageError, match=f"in use by process {os.getpid()}"),
        Store(store.url).lock(),
    ):
        raise AssertionError("two writers")
    with store.lock():
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import os, sys; from ft_ray.storage import Store\n"
        "with Store(sys.argv[1]).lock(): print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    with pytest.raises(StorageError, match=f"process {child.pid}"), Store(tmp_path).lock():
        raise AssertionError("two writers")
    child.kill()
    child.communicate()
    with Store(tmp_path).lock():
        pass


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere; /proc below is tested for root")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="cannot be written"):
        Store(tmp_path / "runs").check_writable()
    tmp_path.chmod(0o700)


def test_a_place_that_cannot_be_written_is_named() -> None:
    with pytest.raises(StorageError, match="/proc/nowhere"):
        Store("/proc/nowhere").check_writable()


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(StorageError, match="gopher"):
        Store("gopher://x/y")


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_keeps_the_old_tree(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=True)
    try:
        store = Store(small)
        with store.stage("t") as folder:
            (folder / "a").write_bytes(b"a" * 1000)
        before = hash_tree(small / "t")
        with pytest.raises(StorageError, match="no space left"), store.stage("t") as folder:
            (folder / "a").write_bytes(b"b" * 4_000_000)
        assert hash_tree(small / "t") == before and store.verify("t") == []
        with pytest.raises(StorageError, match="no space left"):
            store.write("big", b"c" * 4_000_000)
        assert store.list() == ["t"]
    finally:
        subprocess.run(["umount", str(small)], check=True)
