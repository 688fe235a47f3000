"""Checkpoints: committed whole or not at all, found by their hashes, and cleared by age and worth."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from ft_ray import checkpoint, run_lock, storage, storage_retries, train_rank, upload
from ft_ray.errors import DamagedError, StorageError
from ft_ray.local_files import is_left_behind
from ft_ray.storage import Store
from ft_ray.train_control import ToldToEnd

KEY = "0123abcd"


def save(store: Store, step: int, work: Path, *, attempt: str = "aa", ranks: int = 2, commit: bool = True) -> str:
    """What `ranks` workers and a commit do, in one process."""
    name, sent = checkpoint.name(KEY, step, attempt), []
    for rank in range(ranks):
        folder = work / f"rank{rank}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rng_state_{rank}.pth").write_bytes(os.urandom(64))
        if rank == 0:
            (folder / "progress.json").write_text(json.dumps({"step": step}))
            (folder / "adapter_model.safetensors").write_bytes(os.urandom(256))
        sent.append(checkpoint.upload(store, folder, name, storage_retries.persistently))
    if commit:
        checkpoint.commit(store, name, sent)
    return name


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "run")


def test_the_newest_whole_one_is_found(store: Store, tmp_path: Path) -> None:
    assert checkpoint.find(store, KEY) is None
    save(store, 5, tmp_path)
    newest = save(store, 10, tmp_path)
    save(store, 15, tmp_path, commit=False)
    found = checkpoint.find(store, KEY)
    assert found is not None
    assert (found.name, found.step, found.progress) == (newest, 10, {"step": 10})
    assert checkpoint.find(store, "ffffffff") is None, "another recipe's checkpoints are not ours"


@pytest.mark.injected
@pytest.mark.parametrize("damage", ["truncate", "delete", "record", "progress", "tampered"])
def test_a_damaged_newest_falls_back(store: Store, tmp_path: Path, damage: str, caplog: Any) -> None:
    caplog.set_level("WARNING", "ft_ray")  # after test_direct.py the root logger's level is ERROR
    good, bad = save(store, 5, tmp_path), save(store, 10, tmp_path)
    folder = Path(store.path(f"checkpoints/{bad}"))
    weights = folder / "adapter_model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:50])
    elif damage == "delete":
        (folder / "rng_state_1.pth").unlink()
    elif damage == "record":
        (folder / ".committed.json").write_text('{"committed": 1')
    elif damage == "tampered":
        (folder / ".committed.json").write_text('{"committed": 1, "files": {"../../x": ""}}')
    else:
        (folder / "progress.json").write_text("{")
    found = checkpoint.find(store, KEY)
    assert found is not None
    assert found.name == good
    if damage != "record":
        assert "falling back" in caplog.text


@pytest.mark.injected
def test_contents_are_compared_by_whoever_reads_them(store: Store, tmp_path: Path) -> None:
    """A flipped bit leaves the size: a listing cannot show it."""
    good, bad = save(store, 5, tmp_path), save(store, 10, tmp_path)
    weights = Path(store.path(f"checkpoints/{bad}/adapter_model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(bytes(data))
    found = checkpoint.find(store, KEY)
    assert found is not None
    assert found.name == bad
    with pytest.raises(DamagedError, match=r"adapter_model.safetensors: content differs"):
        checkpoint.fetch(store, bad)
    rest = checkpoint.fetch(store, bad, ["adapter_model.safetensors"])
    assert rest == weights.parent, "what is not read is no matter"
    for options in ({"contents": True}, {"without": [bad]}):
        found = checkpoint.find(store, KEY, **options)
        assert found is not None
        assert found.name == good
    assert checkpoint.others(store, good, 1) == {"rng_state_0.pth"}


def test_a_machine_downloads_what_it_reads_once_and_keeps_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_RAY_CACHE", str(tmp_path / "cache"))
    store = Store("memory://run-fetched")
    old, new = save(store, 5, tmp_path), save(store, 10, tmp_path)
    place, read = tmp_path / "cache" / "checkpoints", []
    get = MemoryFileSystem.get_file

    def counted(self: Any, path: str, *args: Any, **options: Any) -> Any:
        read.append(path.rsplit("/", 1)[-1])
        return get(self, path, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counted)
    checkpoint.fetch(store, old)
    read.clear()
    first = checkpoint.fetch(store, new, checkpoint.others(store, new, 0))
    assert set(read) == {"adapter_model.safetensors", "progress.json", "rng_state_0.pth"}
    assert checkpoint.fetch(store, new, checkpoint.others(store, new, 0)) == first
    assert len(read) == 3, "another process of the machine shares it"
    assert [p.name for p in place.glob("*/*")] == [new]
    store.write(f"checkpoints/{new}/rng_state_1.pth", b"x" * 64)
    with pytest.raises(DamagedError, match=r"rng_state_1.pth: content differs"):
        checkpoint.fetch(store, new, checkpoint.others(store, new, 1))


def reader(store: Store, read: list[str]) -> Store:
    """`store`, whose downloads are counted."""
    plain = Store(store.url)
    get = plain._fs.get_file

    def counted(path: str, *args: Any, **options: Any) -> Any:
        read.append(path.rsplit("/", 1)[-1])
        return get(path, *args, **options)

    plain._fs = SimpleNamespace(**{n: getattr(plain._fs, n) for n in ("cat_file", "invalidate_cache")})
    plain._fs.get_file = counted
    plain._fs.unstrip_protocol = lambda path: f"memory://{path}"
    return plain


def test_ranks_of_a_machine_fetch_each_file_once_whatever_they_leave_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_RAY_CACHE", str(tmp_path / "cache"))
    store, read = Store("memory://run-shared"), list[str]()
    name = save(store, 5, tmp_path)
    counted = reader(store, read)
    folders = [checkpoint.fetch(counted, name, checkpoint.others(store, name, rank)) for rank in (0, 1)]
    assert sorted(read) == ["adapter_model.safetensors", "progress.json", "rng_state_0.pth", "rng_state_1.pth"]
    assert folders[0] == folders[1] and set(storage.hash_tree(folders[0])) == set(read)
    checkpoint.fetch(counted, name)
    assert len(read) == 4, "nor is there anything left to fetch for who wants all"


def test_while_one_process_fetches_a_file_another_fetches_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_RAY_CACHE", str(tmp_path / "cache"))
    store, read = Store("memory://run-together"), list[str]()
    with store.stage("tree") as folder:
        for file in ("a", "b", "c"):
            (folder / file).write_text(file)
    counted = reader(store, read)
    get, first, others = counted._fs.get_file, threading.Event(), threading.Event()

    def slow(path: str, *args: Any, **options: Any) -> Any:
        if path.endswith("/a"):
            first.set()
            assert others.wait(30), "the other one waits for this file"
        get(path, *args, **options)
        if path.endswith("/c"):
            others.set()

    counted._fs.get_file = slow
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(counted.local, "tree")
        assert first.wait(30)
        two = pool.submit(counted.local, "tree")
        for done in (one, two):
            assert sorted(p.name for p in done.result(timeout=60).iterdir()) == ["a", "b", "c"]
    assert sorted(read) == ["a", "b", "c"]


@pytest.mark.injected
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and later, where other threads run
def test_a_killed_download_leaves_nothing_that_is_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child ends in the middle of the second file, whose first half is on the disk."""
    monkeypatch.setenv("FT_RAY_CACHE", str(tmp_path / "cache"))
    store, read = Store("memory://run-killed"), list[str]()
    content = {"a.bin": os.urandom(1000), "b.bin": os.urandom(1000)}
    with store.stage("tree") as folder:
        for file, data in content.items():
            (folder / file).write_bytes(data)
    child = os.fork()
    if child == 0:
        dying = reader(store, [])
        get = dying._fs.get_file

        def killed(path: str, local: str) -> None:
            if path.endswith("/b.bin"):
                Path(local).write_bytes(content["b.bin"][:500])
                os._exit(7)
            get(path, local)

        dying._fs.get_file = killed
        dying.local("tree")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    place = tmp_path / "cache" / "trees"
    half = [p for p in place.rglob("*") if p.is_file() and p.stat().st_size == 500]
    assert len(half) == 1 and half[0].parent == place and is_left_behind(half[0].name)
    found = reader(store, read).local("tree")
    assert {p.name: p.read_bytes() for p in found.iterdir()} == content
    assert read == ["b.bin"], "what was whole is not fetched again"
    assert not half[0].exists(), "and the half is gone"


def test_a_run_that_is_over_leaves_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_RAY_CACHE", str(tmp_path / "cache"))
    remote, local = Store("memory://run-over"), Store(tmp_path / "run")
    for store in (remote, local):
        name = save(store, 5, tmp_path)
        folder = checkpoint.fetch(store, name)
        checkpoint.forget(store, KEY)
        checkpoint.forget(store, KEY)  # another rank of the machine
        assert folder.exists() is store.is_local
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    other = checkpoint.fetch(remote, name := save(remote, 5, tmp_path, attempt="bb"))
    checkpoint.forget(remote, "ffffffff")
    assert other.exists() and name in str(other), "another run's stay"


@pytest.mark.parametrize("leaves", [None, 1])
def test_a_rank_that_ends_well_removes_what_its_machine_has_downloaded(
    leaves: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was told to end leaves it: the run goes on at once, maybe here."""
    monkeypatch.setenv("FT_RAY_CACHE", str(tmp_path / "cache"))
    store = Store("memory://run-ended")
    folder = checkpoint.fetch(store, save(store, 5, tmp_path))
    context = SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: 2)
    monkeypatch.setattr(train_rank.ray.train, "get_context", lambda: context)
    hooks = SimpleNamespace(store=store, uploads=SimpleNamespace(finish=lambda: True))
    monkeypatch.setattr(train_rank, "_RankHooks", lambda *parts: hooks)
    monkeypatch.setattr(train_rank, "_train", lambda *parts: {"kind": "result", "told_to_end": leaves})
    made = SimpleNamespace(resources=SimpleNamespace(workers=2, min_workers=None))
    config = {"recipe": made, "seen": None, "board": None, "store": store.address(), "key": KEY}
    with pytest.raises(ToldToEnd) if leaves is not None else contextlib.nullcontext():
        train_rank.work(config)
    assert folder.exists() is (leaves is not None)


def test_retention_keeps_the_newest_and_the_best_and_clears_orphans(store: Store, tmp_path: Path) -> None:
    names = [save(store, step, tmp_path) for step in (1, 2, 3, 4, 5)]
    orphan = save(store, 3, tmp_path, attempt="bb", commit=False)
    other = Path(store.path("checkpoints/99999999-step-00000001-cc"))
    other.mkdir()
    removed = checkpoint.retain(store, KEY, keep=2, best=names[1])
    assert set(removed) == {names[0], names[2], orphan}
    assert set(store.list("checkpoints")) == {names[1], names[3], names[4], other.name}


def test_the_last_one_that_a_good_step_followed_is_kept(store: Store, tmp_path: Path) -> None:
    first, second, third = (save(store, step, tmp_path) for step in (1, 2, 3))
    assert checkpoint.retain(store, KEY, keep=1, best=None, newest=third, proven=second) == [first]
    checkpoint.drop(store, third)
    found = checkpoint.find(store, KEY)
    assert found is not None and found.name == second


def rank_zero(store: Store) -> tuple[Any, list[str]]:
    """The hooks of a run of one rank, without Ray: what it says, and no board."""
    hooks: Any = object.__new__(train_rank._RankHooks)
    said: list[str] = []
    hooks.store, hooks.say, hooks._rank, hooks._workers = store, said.append, 0, 1
    hooks._board = SimpleNamespace(post=SimpleNamespace(remote=lambda event: None))
    hooks._sent = hooks._proven = ""
    return hooks, said


def test_a_run_that_diverges_leaves_no_checkpoint_that_no_good_step_followed(store: Store, tmp_path: Path) -> None:
    names = [save(store, step, tmp_path) for step in (1, 2)]
    hooks, said = rank_zero(store)
    hooks.go_on_from(names[1])
    hooks.drop_unproven(True)
    assert (store.list("checkpoints"), said) == (names, []), "an earlier run may have proved what this one goes on from"
    hooks._sent = save(store, 3, tmp_path)
    hooks.drop_unproven(False)
    assert len(store.list("checkpoints")) == 3, "its commit may still come"
    hooks.drop_unproven(True)
    assert store.list("checkpoints") == names
    assert said == ["the checkpoint of step 3, from just before, is removed"]
    hooks._sent = save(store, 4, tmp_path)
    hooks.event({"kind": "step"})
    hooks.drop_unproven(True)
    assert len(store.list("checkpoints")) == 3 and len(said) == 1, "a good step has followed it"


def test_a_storage_that_fails_then_does_not_hide_why_the_run_ended(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks, said = rank_zero(store)
    hooks._sent = save(store, 3, tmp_path)

    def refuse(*_: Any) -> None:
        raise StorageError("no permission.") from PermissionError()

    monkeypatch.setattr(checkpoint, "drop", refuse)
    hooks.drop_unproven(True)
    assert said == ["the checkpoint of step 3, from just before, could not be removed: no permission."]


def test_a_damaged_one_that_training_went_back_behind_takes_no_place(store: Store, tmp_path: Path) -> None:
    """The newest, of step 13, is damaged: with `keep: 1` what is committed next, at step 12, is what stays."""
    older, damaged = save(store, 10, tmp_path), save(store, 13, tmp_path)
    Path(store.path(f"checkpoints/{damaged}/rng_state_0.pth")).write_bytes(b"")
    found = checkpoint.find(store, KEY)
    assert found is not None and found.name == older
    new = save(store, 12, tmp_path, attempt="bb")
    assert set(checkpoint.retain(store, KEY, keep=1, best=None, newest=new)) == {older, damaged}
    found = checkpoint.find(store, KEY)
    assert found is not None and (found.name, found.step) == (new, 12)


def test_what_a_record_names_is_on_the_disk_before_the_record_is(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, sync = [], os.fsync

    def noted(descriptor: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")).split(".json.")[0])
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    name = save(store, 5, tmp_path)
    files = ["adapter_model.safetensors", "progress.json", "rng_state_0.pth", "rng_state_1.pth"]
    assert [one for one in done if one in files] == files and done.count(name) == 4
    assert done[-1] == ".committed"


@pytest.mark.parametrize("devices", ["one", "two"])
def test_an_upload_that_the_disk_refuses_at_the_end_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: str
) -> None:
    """NFS says so when a file is flushed: what was to be moved is still there then."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if devices == "two" else tmp_path))
    file, sync, refused = folder / "shard", os.fsync, []

    def once_full(descriptor: int) -> None:
        if not refused:
            refused.append(descriptor)
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", once_full)
    try:
        file.write_bytes(b"x" * 1000)
        store = Store(tmp_path / "run")
        with pytest.raises(StorageError):
            store.put(file, "a/shard", lasting=True)
        store.put(file, "a/shard", lasting=True)
        assert store.read("a/shard") == b"x" * 1000 and not file.exists()
        store.put(file, "a/shard", lasting=True)  # a caller that did not hear of it
        assert store.read("a/shard") == b"x" * 1000
    finally:
        shutil.rmtree(folder)


def test_what_ranks_are_filling_now_is_no_orphan(store: Store, tmp_path: Path) -> None:
    """Training goes on while a checkpoint is uploaded: the next one's folder is there before its commit."""
    newest = save(store, 5, tmp_path)
    coming = save(store, 6, tmp_path, commit=False)
    given_up = save(store, 4, tmp_path, commit=False)
    before = save(store, 6, tmp_path, attempt="bb", commit=False)
    assert set(checkpoint.retain(store, KEY, keep=2, best=None, newest=newest)) == {given_up, before}
    assert set(store.list("checkpoints")) == {newest, coming}


def test_a_checkpoint_whose_record_cannot_be_read_now_is_not_taken_for_an_orphan(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, read = save(store, 5, tmp_path), LocalFileSystem.cat_file

    def fails(self: Any, path: Any, *args: Any, **options: Any) -> Any:
        if str(path).endswith(".committed.json"):
            raise OSError("503 slow down")
        return read(self, path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "cat_file", fails)
        for step in (lambda: checkpoint.clean(store, KEY), lambda: checkpoint.find(store, KEY)):
            with pytest.raises(StorageError, match="503 slow down"):
                step()
    found = checkpoint.find(store, KEY)
    assert found is not None
    assert found.name == name


def test_a_staging_area_goes_with_its_process_and_a_dead_one_s_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, alive = tmp_path / "ft-ray-staged-dead", tmp_path / "ft-ray-staged-alive"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / ".lock").write_text("1")
    with open(alive / ".lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with upload.staging_area() as area:
            assert tempfile.gettempdir() == str(area)
            assert set(tmp_path.iterdir()) == {alive, area}
    assert tempfile.gettempdir() == str(tmp_path)
    assert not area.exists()


def test_a_replayed_step_is_newer_than_its_first_try(store: Store, tmp_path: Path) -> None:
    save(store, 5, tmp_path, attempt="zz")
    again = save(store, 5, tmp_path, attempt="aa")
    found = checkpoint.find(store, KEY)
    assert found is not None
    assert found.name == again


def test_a_storage_that_fails_and_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Flaky(DirFileSystem):
        """A remote file system that drops the first two writes of each kind."""

        protocol = "flaky"
        left = 2

        def __init__(self, **options: Any) -> None:
            super().__init__(path=str(tmp_path / "remote"), fs=LocalFileSystem(auto_mkdir=True), **options)

        @classmethod
        def _strip_protocol(cls, path: Any) -> Any:
            return str(path).removeprefix("flaky://")

        def put_file(self, *args: Any, **options: Any) -> Any:
            if Flaky.left > 0:
                Flaky.left -= 1
                raise OSError("503 slow down")
            return super().put_file(*args, **options)

    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(storage_retries, "_WAITS", (0.01,) * 3)
    name = save(Store("flaky://run"), 5, tmp_path)
    found = checkpoint.find(Store("flaky://run"), KEY)
    assert found is not None
    assert found.name == name
    Flaky.left = 100
    with pytest.raises(StorageError, match=r"503 slow down"):
        save(Store("flaky://run"), 6, tmp_path)
    assert Flaky.left == 96, "four tries, then the error"


class Controller:
    """A `Committer` of `keep: 1` and the board that it speaks to; `report` is what Ray tells it when all have sent."""

    def __init__(self, store: Store, hold: run_lock.Hold | None, work: Path) -> None:
        self.events: list[dict[str, Any]] = []
        board = SimpleNamespace(post=SimpleNamespace(remote=self.events.append))
        self.store, self.work = store, work
        self.committer = upload.Committer(store.address(), KEY, 1, board, hold)

    def report(self, step: int) -> str:
        name, folder = checkpoint.name(KEY, step, "aa"), self.work / "rank0"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "progress.json").write_text(json.dumps({"step": step}))
        facts = {"workers": 1, "name": name, "step": step, "seconds": 1.0, "stood_still": 1.0, "best": None}
        facts |= {"proven": None, "sent": checkpoint.upload(self.store, folder, name)}
        self.committer.after_report(None, [facts])
        return name


@pytest.mark.parametrize("shared", [True, False], ids=["flock", "lease"])
def test_a_controller_leaves_a_run_folder_alone_that_another_run_took_over(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """Its driver does not know yet. What it would remove is the other run's, whose recipe is the same."""
    monkeypatch.setattr(storage, "flock_is_shared", lambda path: shared)
    monkeypatch.setattr(upload.ray, "get", lambda posted, timeout: posted)  # the board here is a list
    with store.lock():
        hold = run_lock.hold_of(store.url)
        assert hold is not None and hold == (store.url, store.read_json(".lock")["token"])
        controller = Controller(store, hold, tmp_path / "work")
        controller.report(5)
        newest = controller.report(10)
        assert store.list("checkpoints") == [newest], "the one before it is removed"
        theirs = {"host": "another-host", "boot": "b", "pid": 4711, "token": "t", "renewed": time.time()}
        store.write_json(".lock", theirs)
        controller.report(15)
        store.write_json(".lock", {**theirs, "token": hold.token})  # a lease once lost stays lost
        orphan = controller.report(20)
        found = checkpoint.find(store, KEY)
        assert found is not None and found.name == newest and store.survey(found.relative) == []
        assert store.tree(f"checkpoints/{orphan}") is None
    assert [event["step"] for event in controller.events if event["kind"] == "checkpoint"] == [5, 10]
    (ousted,) = [event for event in controller.events if event["kind"] != "checkpoint"]
    assert (ousted["kind"], ousted["url"]) == ("ousted", store.url)
    assert f"{store.url} was taken over by process 4711 on another-host while" in ousted["message"]
    assert run_lock.hold_of(store.url) is None


def test_a_controller_of_a_driver_without_a_lock_commits_whoever_holds_the_folder(store: Store, tmp_path: Path) -> None:
    """A sweep's trial that trains by itself: the sweep holds the folder above it."""
    store.write_json(".lock", {"pid": 4711, "host": "another-host", "token": "t"})
    controller = Controller(store, run_lock.hold_of(store.url), tmp_path / "work")
    controller.report(5)
    newest = controller.report(10)
    assert store.list("checkpoints") == [newest] and [e["kind"] for e in controller.events] == ["checkpoint"] * 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 kB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.injected
def test_a_full_disk_leaves_the_last_checkpoint(small_disk: Path, tmp_path: Path) -> None:
    store = Store(small_disk / "run")
    good = save(store, 5, tmp_path)
    folder = tmp_path / "big"
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(b"x" * 400_000)
    with pytest.raises(StorageError, match=r"no space left at .*earlier artifacts are intact.*free space"):
        checkpoint.upload(store, folder, checkpoint.name(KEY, 6, "aa"))
    found = checkpoint.find(store, KEY)
    assert found is not None
    assert found.name == good
    checkpoint.clean(store, KEY)
    assert [n for n in store.list("checkpoints") if n != good] == [], "nothing half-written is left"
    with pytest.raises(StorageError, match=r"no space left"), store.stage("adapter") as out:
        (out / "adapter_model.safetensors").write_bytes(b"x" * 400_000)
    assert not store.exists("adapter")


def test_a_full_model_is_exported_in_the_recipe_s_precision(store: Store, tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "rank0"
    shutil.copytree(tiny_model, folder)
    (folder / "progress.json").write_text("{}")
    name = checkpoint.name(KEY, 1, "aa")
    checkpoint.commit(store, name, [checkpoint.upload(store, folder, name)])
    extra = {"base": {"source": "b", "revision": None}}
    checkpoint.export_tree(store, name, "model", extra, tiny_model, "{{ x }}", dtype="bfloat16")
    assert store.verify("model") == []
    exported = AutoModelForCausalLM.from_pretrained(store.local("model"))
    original = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert exported.dtype == torch.bfloat16
    for key, tensor in original.state_dict().items():
        assert torch.equal(exported.state_dict()[key], tensor.to(torch.bfloat16)), key
    assert {"tokenizer.json", "chat_template.jinja", "ft_ray.json"} <= set(store.tree("model") or {})


@pytest.mark.parametrize("own", [True, False])
def test_code_that_a_model_brings_goes_with_it(store: Store, tiny_model: Path, tmp_path: Path, own: bool) -> None:
    base, folder = tmp_path / "base", tmp_path / "rank0"
    shutil.copytree(tiny_model, base)
    (base / "modeling_own.py").write_text("# the model's class")
    config = json.loads((base / "config.json").read_text())
    if own:
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (base / "config.json").write_text(json.dumps(config))
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.py"))
    (folder / "progress.json").write_text("{}")
    name = checkpoint.name(KEY, 1, "aa")
    checkpoint.commit(store, name, [checkpoint.upload(store, folder, name)])
    checkpoint.export_tree(store, name, "model", {"base": {"source": "b", "revision": None}}, base, "{{ x }}")
    assert ("modeling_own.py" in (store.tree("model") or {})) == own
