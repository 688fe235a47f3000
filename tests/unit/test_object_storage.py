"""S3 and Google's storage, as their emulators serve them: what a run folder needs of them, and what may go wrong.

Each is behind a proxy that refuses, cuts off or loses what it is told to (tests/object_stores.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from ft_ray import run_lock
from ft_ray.errors import StorageError
from ft_ray.storage import COMMIT, Store
from ft_ray.upload import persistently
from tests.object_stores import FailingProxy, gs, s3

PUT = {"s3": "PUT", "gs": "POST"}  # how each puts an object


@pytest.fixture(scope="module", params=["s3", "gs"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def proxy(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FailingProxy]:
    with s3() if kind == "s3" else gs(tmp_path_factory.mktemp("no-login")) as made:
        yield made


@pytest.fixture
def store(kind: str, proxy: FailingProxy, request: pytest.FixtureRequest) -> Iterator[Store]:
    proxy.hits.clear()
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:8]
    made = Store(f"{kind}://runs/{name}")
    yield made
    proxy.disarm()
    made.remove("")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """gcsfs waits 1, 2, 4, 8 and 16 seconds between its six tries, botocore up to 20."""

    async def at_once(seconds: float) -> None:
        await asyncio.sleep(0)

    for module in ("gcsfs.retry", "aiobotocore.endpoint", "s3fs.core"):
        if module in sys.modules:
            known = sys.modules[module].asyncio
            others = {name: getattr(known, name) for name in dir(known) if not name.startswith("__")}
            monkeypatch.setattr(sys.modules[module], "asyncio", SimpleNamespace(**{**others, "sleep": at_once}))


def elsewhere(store: Store) -> Any:
    """The client of another machine: it shares no listing with this one."""
    return fsspec.filesystem(store.url.partition(":")[0], skip_instance_cache=True)


def test_files_are_written_read_listed_and_removed(store: Store) -> None:
    assert store.list() == [] and store.list("checkpoints") == [] and not store.exists("a.json")
    with pytest.raises(StorageError, match=r"reading: .*/a.json failed") as caught:
        store.read("a.json")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    store.check_writable()
    store.write_json("a.json", {"a": 1})
    store.write("checkpoints/one/x", b"x")
    store.write("checkpoints/one/deep/y", b"")
    assert store.list() == ["a.json", "checkpoints"] and store.list("checkpoints/one") == ["deep", "x"]
    before = store.versions()
    store.write_json("a.json", {"a": 2})
    assert store.read_json("a.json") == {"a": 2}
    assert list(before) == ["a.json"] and store.versions() != before
    assert store.sub("checkpoints").list() == ["one"]
    store.remove("checkpoints")
    store.remove("checkpoints")
    assert store.list() == ["a.json"] and not store.exists("checkpoints/one/x")


def test_a_tree_exists_once_its_record_does(
    store: Store, proxy: FailingProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_RAY_CACHE", str(tmp_path))
    with store.stage("adapter") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a.bin").write_bytes(b"abc")
        (folder / "old.bin").write_bytes(b"old")
        assert store.tree("adapter") is None
    assert sorted(store.tree("adapter") or {}) == ["deep/a.bin", "old.bin"]
    with store.stage("adapter") as folder:
        (folder / "new.bin").write_bytes(b"new")
    assert store.list("adapter") == [COMMIT, "new.bin"], "nothing of the earlier tree is left"
    store.clone("adapter", "kept/adapter")
    store.remove("adapter")
    assert store.tree("adapter") is None
    assert store.verify("kept/adapter") == [] and store.survey("kept/adapter") == []
    proxy.read.clear()
    assert (store.local("kept/adapter") / "new.bin").read_bytes() == b"new"
    assert sorted(proxy.read) == [COMMIT, "new.bin"], "each file is fetched once"
    store.write("kept/adapter/new.bin", b"newer")
    assert "differs from its recorded hash" in store.verify("kept/adapter")[0]
    store.remove("kept/adapter/new.bin")
    assert "missing" in store.verify("kept/adapter")[0] and "missing" in store.survey("kept/adapter")[0]


def test_what_another_machine_writes_is_seen_whatever_was_listed_before(store: Store) -> None:
    other, root = elsewhere(store), store.path()
    store.write("checkpoints/one/x", b"x")
    assert store.list("checkpoints/one") == ["x"] and not store.exists("checkpoints/one/y")
    other.pipe_file(f"{root}/checkpoints/one/y", b"y")
    assert store.exists("checkpoints/one/y")
    assert store.list("checkpoints/one") == ["x", "y"]
    other.pipe_file(f"{root}/checkpoints/one/z", b"z")
    store.remove("checkpoints/one")
    assert other.find(f"{root}/checkpoints/one") == [], "what came after the listing is gone too"
    other.pipe_file(f"{root}/a.json", b"{}")
    assert store.exists("a.json")
    other.rm_file(f"{root}/a.json")
    assert not store.exists("a.json")


def test_a_file_is_whole_after_a_busy_store_and_a_lost_connection(
    store: Store, kind: str, proxy: FailingProxy, tmp_path: Path, no_waiting: None
) -> None:
    """On gs:// in two parts, which gcsfs cuts at 50 MiB; s3fs at 100."""
    file = tmp_path / "state.safetensors"
    file.write_bytes(os.urandom(52 << 20 if kind == "gs" else 1 << 20))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for action in ("503", "429", "reset"):
        proxy.arm(PUT[kind], "state.safetensors", action)
    persistently(lambda: store.put(file, "one/state.safetensors"))
    assert sorted(proxy.hits) == ["429", "503", "reset"]
    assert store.survey("one") == [f"{store.address('one')}: not committed"]
    store.get("one/state.safetensors", tmp_path / "back")
    assert hashlib.sha256((tmp_path / "back").read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("kind", ["gs"], indirect=True, scope="module")  # s3fs sends less than 100 MiB at once
def test_an_upload_in_parts_that_is_cut_off_is_no_file(
    store: Store, proxy: FailingProxy, tmp_path: Path, no_waiting: None
) -> None:
    file = tmp_path / "state.safetensors"
    file.write_bytes(bytes(52 << 20))
    requests: list[int] = []

    def cut_off_the_second_part() -> None:
        requests.append(len(requests))
        if len(requests) == 2:  # the first begins the upload
            proxy.arm("POST", "state.safetensors", "reset", 1000)

    proxy.arm("POST", "state.safetensors", cut_off_the_second_part, 2)
    with pytest.raises(StorageError, match=r"writing: .*state.safetensors failed \(.+\): check"):
        store.put(file, "one/state.safetensors")
    assert len(requests) == 2 and proxy.hits.count("reset") == 6, "gcsfs tries six times"
    proxy.disarm()
    assert not store.exists("one/state.safetensors") and store.list("one") == []


def test_a_login_that_may_not_write_is_named_and_not_tried_again(
    store: Store, kind: str, proxy: FailingProxy, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"a")
    proxy.arm(PUT[kind], "/a", "403", 1000)
    waits: list[str] = []
    with pytest.raises(StorageError, match=r"writing: .*/a cannot be written \(.*: set storage to a place you may wr"):
        persistently(lambda: store.put(tmp_path / "a", "a"), waits.append)
    assert not waits, "eight times within 91 seconds would not help"
    proxy.disarm()
    store.write("b", b"b")
    proxy.arm("GET", "/b", "403", 1000)
    with pytest.raises(StorageError, match=r"reading: .*/b cannot be read \(.*: set storage to a place you may read"):
        store.read("b")


def test_a_bucket_that_is_not_there_is_named(kind: str, proxy: FailingProxy) -> None:
    store = Store(f"{kind}://no-such-bucket/runs")
    for use in (store.check_writable, lambda: store.create(".lock", b"{}")):
        said = rf"writing: {kind}://no-such-bucket/runs/.* failed \(.*there is no such bucket, so correct the address"
        with pytest.raises(StorageError, match=said) as caught:
            use()
        assert "\n" not in str(caught.value) and caught.value.exit_code == 1
    assert store.list() == [] and store.tree("adapter") is None


def test_a_second_writer_is_refused_and_a_killed_one_s_lease_is_free(store: Store) -> None:
    code = (
        "import sys; from ft_ray.storage import Store\n"
        "with Store(sys.argv[1]).lock(): print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, store.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    with pytest.raises(StorageError, match=f"in use by process {child.pid}"), store.lock():
        raise AssertionError("two writers")
    child.kill()
    child.communicate()
    with store.lock():
        assert store.list() == [".lock"]
    assert store.list() == []


def abandoned(host: str = "another-host") -> bytes:
    return json.dumps({"host": host, "boot": "b", "pid": 1, "token": "t", "renewed": time.time() - 600}).encode()


class Contender:
    """A writer of `store`, stopped at what its lock does there: before it removes, after it has made a lease."""

    def __init__(self, store: Store, removing: Callable[[], object], made: Callable[[], object]) -> None:
        self._store, self._removing, self._made = store, removing, made
        self.read, self.write = store.read, store.write
        self.outcome = ""

    def create(self, relative: str, content: bytes) -> None:
        self._store.create(relative, content)
        self._made()

    def remove(self, relative: str) -> None:
        self._removing()
        self._store.remove(relative)

    def work(self, held: threading.Event) -> None:
        try:
            with run_lock.leased(self, ".lock", self._store.url):
                self.outcome = "held"
                held.wait(30)
        except StorageError as error:
            self.outcome = str(error)
            held.set()


def test_of_two_that_find_an_abandoned_lease_one_gets_it(store: Store) -> None:
    """The slower one has read the old lease, and removes what the faster one has made in its place meanwhile."""
    store.write(".lock", abandoned())
    read_it, made_one, over = threading.Event(), threading.Event(), threading.Event()
    slow = Contender(store, lambda: (read_it.set(), made_one.wait(30)), lambda: None)
    fast = Contender(store, lambda: None, made_one.set)
    threads = [threading.Thread(target=one.work, args=(over,)) for one in (slow, fast)]
    threads[0].start()
    assert read_it.wait(30)
    threads[1].start()
    for thread in threads:
        thread.join(60)
    assert slow.outcome == "held" and f"in use by process {os.getpid()}" in fast.outcome
    assert not store.exists(".lock"), "who held it gave it back"


def test_a_lease_whose_answer_was_lost_is_held_all_the_same(
    store: Store, kind: str, proxy: FailingProxy, no_waiting: None
) -> None:
    """The client asks again, and is told that there is one: its own."""
    proxy.arm(PUT[kind], "/.lock", "lost")
    with store.lock():
        assert proxy.hits == ["lost"]
        with pytest.raises(StorageError, match="in use by"), store.lock():
            raise AssertionError("two writers")
    assert not store.exists(".lock")


def test_a_lease_that_was_taken_over_is_neither_renewed_nor_removed(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that its storage was cut off from for over two minutes comes back, and another one is at work."""
    monkeypatch.setattr(run_lock, "_LEASE_SECONDS", 0.4)
    theirs = abandoned()
    with store.lock():
        ours = store.read(".lock")
        deadline = time.monotonic() + 30
        while store.read(".lock") == ours and time.monotonic() < deadline:
            time.sleep(0.05)
        assert store.read(".lock") != ours, "it is renewed"
        store.write(".lock", theirs)
        while not caplog.messages and time.monotonic() < deadline:
            store.write(".lock", theirs)
            time.sleep(0.05)
        assert "was taken over by process 1 on another-host" in caplog.messages[0]
    assert store.read(".lock") == theirs
