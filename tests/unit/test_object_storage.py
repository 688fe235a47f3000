"""S3 and Google's storage, as their emulators serve them: what a run folder needs of them, and what may go wrong.

Each is behind a proxy that refuses, cuts off or loses what it is told to (tests/object_stores.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from ft_ray import base_model, checkpoint, run_lock, storage_retries, upload
from ft_ray.errors import StorageError
from ft_ray.recipe import Model, Source
from ft_ray.sources import locate
from ft_ray.storage import COMMIT, Store
from ft_ray.storage_retries import persistently
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


def client(store: Store) -> Callable[[str], None]:
    """Makes an empty object of any name below `store`, as a console does."""

    def make(name: str) -> None:
        fs = elsewhere(store)
        fs.pipe_file(f"{store.root}/{name}", b"")

    return make


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 kB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.injected
def test_a_machine_without_room_for_what_it_stages_and_downloads_is_named_and_not_the_bucket(
    store: Store, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = os.urandom(400_000)
    with store.stage("adapter") as folder:
        (folder / "adapter_model.safetensors").write_bytes(weights)
    store.write("model/config.json", b"{}")
    store.write("model/model.safetensors", weights)
    store.write("rows.jsonl", weights)
    cache, temporary, other = (small_disk / name for name in ("cache", "temporary", "other"))
    for made in (temporary, other):
        made.mkdir()
    monkeypatch.setenv("FT_RAY_CACHE", str(cache))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def stage() -> None:
        with store.stage("merged") as folder:
            (folder / "model.safetensors").write_bytes(weights)

    to_another_disk = "free space there or set {} to a folder on another disk, then"
    uses: list[tuple[Callable[[], object], Path, str]] = [
        (lambda: store.local("adapter"), cache / "trees", to_another_disk.format("FT_RAY_CACHE")),
        (lambda: store.local("adapter", place=cache / "checkpoints"), cache / "checkpoints", "FT_RAY_CACHE"),
        (lambda: base_model.resolve(Model(id=store.address("model"))), cache / "models", "FT_RAY_CACHE"),
        (lambda: locate(Source(path=store.address("rows.jsonl"))), cache / "sources", "FT_RAY_CACHE"),
        (lambda: store.get("model/model.safetensors", temporary / "a"), temporary, to_another_disk.format("TMPDIR")),
        (lambda: store.get("model/model.safetensors", other / "a"), other, "free space there, then"),
        (stage, temporary, to_another_disk.format("TMPDIR")),
    ]
    for use, full, remedy in uses:
        waits: list[str] = []
        with pytest.raises(StorageError) as caught:
            persistently(use, waits.append)
        said = str(caught.value)
        assert f"no space left at {full}" in said and f" on {socket.gethostname()}; " in said and remedy in said, said
        assert "://" not in said and "set storage" not in said and caught.value.exit_code == 1
        assert not waits, "no wait would help"
        for place in (temporary, other):  # what `get` has begun
            (place / "a").unlink(missing_ok=True)
        assert not [p for p in small_disk.rglob("*") if p.is_file() and not p.name.endswith(".lock")]


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
        said = rf"writing: {kind}://no-such-bucket/runs/.* failed \(.*there is no such bucket, .* correct the address"
        with pytest.raises(StorageError, match=said) as caught:
            use()
        assert "\n" not in str(caught.value) and caught.value.exit_code == 1
    assert store.list() == [] and store.tree("adapter") is None


def test_placeholders_of_folders_cost_a_tree_nothing(store: Store, tmp_path: Path) -> None:
    """Consoles and mounts make objects called like folders; removing one would remove what lies below."""
    for name in ("tree/", "tree/deep/"):
        client(store)(name)
    store.write("tree/earlier", b"x")
    (tmp_path / "out/deep").mkdir(parents=True)
    (tmp_path / "out/deep/a").write_bytes(b"a")
    store.commit(tmp_path / "out", "tree")
    assert store.verify("tree") == [] and not store.exists("tree/earlier")


def test_a_tree_that_was_cloned_already_stays_committed(store: Store, proxy: FailingProxy, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_bytes(b"a")
    store.commit(tmp_path / "out", "one")
    store.clone("one", "two")
    record = store.read(f"two/{COMMIT}")
    store.clone("one", "two")
    assert store.read(f"two/{COMMIT}") == record and store.verify("two") == []


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


def lease_of_another(age: float) -> bytes:
    renewed = time.time() - age
    return json.dumps({"host": "another-host", "boot": "b", "pid": 1, "token": "t", "renewed": renewed}).encode()


class Contender:
    """A writer of `store` in a thread of its own. `writing` is called before it writes over an abandoned lease."""

    def __init__(self, store: Store, writing: Callable[[], object] = lambda: None) -> None:
        self._store, self._writing = store, writing
        self.read, self.remove, self.create = store.read, store.remove, store.create
        self.outcome = ""
        self.known, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def write(self, relative: str, content: bytes) -> None:
        self._writing()
        self._store.write(relative, content)

    def _work(self) -> None:
        try:
            with run_lock.leased(self, ".lock", self._store.url):
                self.outcome = "held"
                self.known.set()
                self._over.wait(60)
        except StorageError as error:
            self.outcome = str(error)
            self.known.set()

    def end(self) -> None:
        self._over.set()
        self._thread.join(60)


def test_of_those_that_find_an_abandoned_lease_the_last_to_write_has_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_SETTLE_SECONDS", 6.0)  # requests take long on a busy machine
    store.write(".lock", lease_of_another(600))
    about_to, go_on = threading.Event(), threading.Event()
    last = Contender(store, lambda: (about_to.set(), go_on.wait(30)))
    assert about_to.wait(30)
    first = Contender(store, go_on.set)
    deadline = time.monotonic() + 30
    while store.read_json(".lock")["host"] == "another-host" and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(StorageError, match="in use by"), store.lock():  # a third one, while both wait and look
        raise AssertionError("two writers")
    assert first.known.wait(30) and last.known.wait(30)
    assert sorted(one.outcome == "held" for one in (first, last)) == [False, True]
    first.end()
    last.end()
    assert not store.exists(".lock"), "who held it gave it back"


def test_who_takes_long_to_write_over_an_abandoned_lease_has_it_not(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile another one may have taken it and looked."""
    store.write(".lock", lease_of_another(600))
    about_to, go_on = threading.Event(), threading.Event()
    slow = Contender(store, lambda: (about_to.set(), go_on.wait(60)))
    assert about_to.wait(30)
    fast = Contender(store)
    assert fast.known.wait(30) and fast.outcome == "held"
    go_on.set()
    assert slow.known.wait(30) and "in use by another process" in slow.outcome
    slow.end()
    fast.end()


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


def test_a_lease_taken_over_in_an_outage_is_seen_before_the_next_try_to_commit(
    store: Store, proxy: FailingProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_waiting: None
) -> None:
    """A controller that has its storage back before its driver has."""
    monkeypatch.setattr(storage_retries, "_WAITS", (0.01,) * 3)
    monkeypatch.setattr(upload.ray, "get", lambda posted, timeout: posted)  # the board here is a list
    events: list[dict[str, Any]] = []

    def post(event: dict[str, Any]) -> None:
        events.append(event)
        if "Trying again" in event.get("message", ""):
            proxy.disarm()
            store.write(".lock", lease_of_another(0))

    with store.lock():
        board = SimpleNamespace(post=SimpleNamespace(remote=post))
        committer = upload.Committer(store.address(), "0123abcd", 1, board, run_lock.hold_of(store.url))
        names = [checkpoint.name("0123abcd", step, "aa") for step in (5, 10)]
        for name in names:
            (tmp_path / "sent").mkdir(exist_ok=True)
            (tmp_path / "sent/progress.json").write_text("{}")
            sent = checkpoint.upload(store, tmp_path / "sent", name)
            facts = {"workers": 1, "name": name, "step": checkpoint.step_of(name), "seconds": 1.0, "stood_still": 1.0}
            committer.after_report(None, [{**facts, "best": None, "proven": None, "sent": sent}])
            proxy.arm("GET", "/.lock", "503", 1000)
    assert proxy.hits, "the lock was asked for while the storage failed"
    assert store.tree(f"checkpoints/{names[0]}") is not None and store.tree(f"checkpoints/{names[1]}") is None
    assert [event["kind"] for event in events] == ["checkpoint", "status", "ousted"]
    assert "was taken over by process 1 on another-host while" in events[-1]["message"]


def test_a_lease_that_was_taken_over_is_neither_renewed_nor_removed(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that its storage was cut off from for over two minutes comes back, and another one is at work."""
    monkeypatch.setattr(run_lock, "_LEASE_SECONDS", 0.4)
    theirs = lease_of_another(-600)
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
        with pytest.raises(StorageError, match=r"taken over by process 1 on another-host .* it ends here"):
            run_lock.check_held(store.url)
        store.write(".lock", lease_of_another(600))  # abandoned by that one, too: what it has written stays its own
        time.sleep(0.5)
        assert json.loads(store.read(".lock"))["token"] == "t"
        store.write(".lock", theirs)
    assert store.read(".lock") == theirs
    run_lock.check_held(store.url)  # of no concern to the next run of this process
