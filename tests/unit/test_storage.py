"""Storage: atomic folders, hashes, addresses, what a full or refused disk leaves behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ft_ray import run_lock, sources, storage, storage_retries
from ft_ray.errors import DataError, StorageError
from ft_ray.local_files import staged_folder
from ft_ray.recipe import Source
from ft_ray.safetensors_io import save_floats
from ft_ray.storage import COMMIT, Store, hash_tree
from ft_ray.storage_faults import redacted


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


def test_the_first_staged_folder_counts_and_one_that_cannot_be_placed_is_an_error(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with staged_folder(tmp_path / "made") as folder:
            (folder / "a").write_text(text)
    assert (tmp_path / "made" / "a").read_text() == "first"
    (tmp_path / "taken").write_text("a file where the folder should be")
    for target in (tmp_path / "taken", tmp_path / ("x" * 300)):
        with pytest.raises(OSError), staged_folder(target) as folder:  # noqa: PT011 - which one is the system's choice
            (folder / "a").write_text("lost")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "taken"]


def test_a_staged_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power loss right after would else leave empty files under a name that nobody looks into again."""
    brought: list[int] = []
    fsync, rename = os.fsync, os.rename

    def noted(descriptor: int) -> None:
        brought.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def placed(source: Path, target: Path) -> None:
        below = {p.stat().st_ino for p in (source, *source.rglob("*"))}
        assert len(below) == 5 and below == set(brought)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", placed)
    with staged_folder(tmp_path / "made") as folder:
        (folder / "deep" / "empty").mkdir(parents=True)
        (folder / "deep" / "a").write_text("a")
        (folder / "b").write_text("b")
    assert brought[-1] == tmp_path.stat().st_ino, "the name itself"


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


@pytest.mark.parametrize("name", ["../../../escaped", "/escaped", "a/../../escaped", "..\\escaped", "a\0b", ""])
def test_a_record_that_names_files_outside_its_tree_is_refused(
    name: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_RAY_CACHE", str(tmp_path / "cache"))
    store.mark_committed("a/b/t", {name: hashlib.sha256(b"bad").hexdigest()})
    store.write("escaped", b"bad")
    before = sorted(tmp_path.rglob("*"))
    for use in (store.tree, lambda tree: store.clone(tree, "copy")):
        with pytest.raises(StorageError, match=r"outside its folder: do not use this tree"):
            use("a/b/t")
    if not store.is_local:
        with pytest.raises(StorageError, match="outside its folder"):
            store.local("a/b/t")
    assert "outside its folder" in store.verify("a/b/t")[0]
    assert sorted(tmp_path.rglob("*")) == before and not store.exists("copy")


def test_passwords_are_cut_out_of_addresses_and_messages() -> None:
    for secret in ("https://ann:PW@host:5000/x", "ray://PW@host:10001", "postgresql+x://ann:P@PW@host/db"):
        message = f"GET {secret} failed for {secret!r}, mail admin@host"
        host = secret.rsplit("@", 1)[1]
        assert "PW" not in redacted(message) and "ann" not in redacted(message)
        assert redacted(message).count(f"//{host}") == 2 and redacted(message).endswith("mail admin@host")
    for plain in ("sqlite:///me@home.db", "sqlite:////a/b@c.db", "s3://bucket/a@b", "NAME@3", "127.0.0.1:6379"):
        assert redacted(plain) == plain


@pytest.fixture
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "BOTO_CONFIG"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.usefixtures("no_login")
def test_object_storage_without_a_login_or_an_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("s3://no-such-bucket/runs")
    for use in (store.list, store.versions, store.exists, lambda: store.read("a"), lambda: store.tree("a")):
        with pytest.raises(StorageError, match=r"s3://no-such-bucket/.*credentials.*check the login"):
            use()
    with pytest.raises(DataError, match=r"s3://no-such-bucket/a.jsonl cannot be reached .*credentials"):
        sources.locate(Source(path="s3://no-such-bucket/a.jsonl"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    type(store._fs).clear_instance_cache()
    monkeypatch.setattr(type(store._fs), "retries", 1)
    with pytest.raises(StorageError, match=r"listing: s3://no-such-bucket/runs failed .*127\.0\.0\.1:9"):
        Store("s3://no-such-bucket/runs").list()
    type(store._fs).clear_instance_cache()


def test_google_storage_names_the_package_it_needs() -> None:
    code = (
        "import sys; sys.modules['gcsfs'] = None  # as where it is not installed\n"
        "from ft_ray import sources; from ft_ray.errors import MissingPackageError\n"
        "from ft_ray.recipe import Source; from ft_ray.storage import Store\n"
        "for use in (lambda: Store('gs://bucket/runs'), lambda: sources.locate(Source(path='gs://bucket/a.jsonl'))):\n"
        "    try: use()\n"
        "    except MissingPackageError as error: print(error, error.exit_code)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    needs = "a gs:// address needs the package 'gcsfs', which is not installed: run pip install 'ft-ray[gcs]'. 2"
    assert told == [needs, needs]


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


def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o555)
    store = Store(tmp_path / "runs")
    child = os.fork()  # root may write anywhere, so the child becomes somebody else first
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            store.check_writable()
        except StorageError as error:
            os._exit(0 if "cannot be written" in str(error) and "runs" in str(error) else 2)
        except BaseException:
            os._exit(3)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o700)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_place_that_cannot_be_written_is_named() -> None:
    with pytest.raises(StorageError, match="/proc/nowhere"):
        Store("/proc/nowhere").check_writable()


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(StorageError, match="gopher"):
        Store("gopher://x/y")


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.injected
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
        with pytest.raises(StorageError, match="no space left"), store.stage("adapter") as folder:
            save_floats({"a": torch.zeros(1_000_000)}, folder / "adapter_model.safetensors")
        assert store.list() == ["t"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_file_system_is_that_of_the_nearest_mount_and_says_whether_locks_are_shared(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "overlay / overlay rw 0 0\nserver:/x /mnt/ft-ray nfs4 rw,vers=4.2,local_lock=none 0 0\n"
        "/dev/sda1 /mnt ext4 rw 0 0\ns3 /mnt/my\\040data fuse.s3 rw 0 0\n"
        "server:/y /mnt/old nfs rw,vers=3,nolock,local_lock=all 0 0\nmgs:/z /mnt/lustre lustre rw,localflock 0 0\n"
    )
    for path, kind, shared in [
        ("/mnt/ft-ray/runs", "nfs4", True), ("/mnt/ft-rays", "ext4", True), ("/home/ray/runs", "overlay", True),
        ("/mnt/my data/runs", "fuse.s3", False), ("/mnt/old/runs", "nfs", False), ("/mnt/lustre", "lustre", False),
    ]:  # fmt: skip
        assert run_lock.mount_of(Path(path), str(mounts))[0] == kind, path
        assert run_lock.flock_is_shared(path, str(mounts)) is shared, path
    assert run_lock.mount_of(Path("/mnt"), str(tmp_path / "none")) == ("", frozenset())


def test_a_folder_whose_locks_are_not_shared_is_held_by_a_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "flock_is_shared", lambda path: False)
    store = Store(tmp_path / "run")
    with store.lock():
        with pytest.raises(StorageError, match=f"in use by process {os.getpid()}"), store.lock():
            raise AssertionError("two writers")
        with pytest.raises(StorageError, match=f"in use by process {os.getpid()}"), run_lock.flocked(
            store.path(".lock"), store.url
        ):
            raise AssertionError("two writers, one of them where the locks are shared")
        lease = store.read(".lock")
    assert store.list() == []
    taken = f"in use by process {os.getpid()}"
    with run_lock.flocked(store.path(".lock"), store.url), pytest.raises(StorageError, match=taken), store.lock():
        raise AssertionError("two writers, the other one where the locks are shared")
    for lock in (lambda: run_lock.flocked(store.path(".lock"), store.url), store.lock):
        with pytest.raises(KeyError), lock():
            raise KeyError("what is done inside fails")
        with store.lock():
            pass  # nothing is left that would count
    gone = subprocess.Popen(["true"])
    gone.wait()
    store.write_json(".lock", {**json.loads(lease), "pid": gone.pid})  # killed, it could not give it back
    with store.lock():
        assert store.list() == [".lock"]


def test_a_killed_holder_of_a_shared_lock_stops_nobody_who_sees_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    with run_lock.flocked(store.path(".lock"), store.url):
        left = {**json.loads(store.read(".lock")), "host": "another-host"}
    store.write_json(".lock", left)  # renewed a moment ago, on a machine that lost power: the server let go
    with store.lock():
        pass


def test_a_lease_put_over_a_shared_lock_is_noticed_by_who_held_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a machine without shared locks, which found it not renewed for two minutes."""
    monkeypatch.setattr(run_lock, "_LEASE_SECONDS", 0.4)
    store = Store(tmp_path / "run")
    with store.lock():
        time.sleep(0.3)
        run_lock.check_held(store.url)  # what it renews is its own
        theirs = {"host": "another-host", "pid": 4711, "token": "t", "renewed": time.time()}
        store.write_json(".lock", theirs)
        deadline = time.monotonic() + 30
        while run_lock.is_held(store.url) and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(StorageError, match=r"taken over by process 4711 on another-host .* it ends here"):
            run_lock.check_held(store.url)
    assert store.read_json(".lock") == theirs
    run_lock.check_held(store.url, look=store)  # of no concern to the next run of this process


@pytest.mark.parametrize("shared", [True, False], ids=["flock", "lease"])
def test_a_lease_taken_over_since_the_last_renewal_is_seen_by_who_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    monkeypatch.setattr(storage, "flock_is_shared", lambda path: shared)
    store = Store(tmp_path / "run")
    with store.lock():
        run_lock.check_held(store.url, look=store)
        store.write_json(".lock", {"host": "another-host", "pid": 4711, "token": "t", "renewed": time.time()})
        run_lock.check_held(store.url)
        waits: list[str] = []
        with pytest.raises(run_lock.TakenOver, match="taken over by process 4711 on another-host"):
            storage_retries.persistently(lambda: run_lock.check_held(store.url, look=store), waits.append)
        assert waits == [], "it stays as it is"
        assert not run_lock.is_held(store.url)


def test_a_lease_on_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_here(source: str, target: str) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(storage, "flock_is_shared", lambda path: False)
    monkeypatch.setattr(os, "link", none_here)
    store = Store(tmp_path / "run")
    with store.lock(), pytest.raises(StorageError, match=f"in use by process {os.getpid()}"), store.lock():
        raise AssertionError("two writers")
    assert store.list() == []


def test_a_linked_folder_is_on_the_mount_that_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda1 / ext4 rw 0 0\nserver:/x {tmp_path.resolve()}/real nfs rw,nolock 0 0\n")
    assert not run_lock.flock_is_shared(str(tmp_path / "link/runs"), str(mounts))


def test_a_server_without_locks_is_not_called_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_here(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", none_here)
    with pytest.raises(StorageError, match=r"has no file locks \(No locks available\): mount it with them"):
        Store(tmp_path).lock().__enter__()


def test_what_nfs_keeps_of_an_open_file_is_no_part_of_a_tree(tmp_path: Path) -> None:
    """A real NFS client makes such files in tests/distributed/test_nfs.py."""
    store, kept = Store(tmp_path), ".nfs00000000000001a200000003"
    with store.stage("t") as folder:
        (folder / "a").write_text("a")
        (folder / kept).write_text("old")
        (folder / ".nfsome").write_text("a file of somebody's")
    assert sorted(store.tree("t") or {}) == [".nfsome", "a"] and store.list("t") == [COMMIT, ".nfsome", "a"]


def test_floats_are_written_as_the_library_writes_them(tmp_path: Path) -> None:
    tensors = {"b.A": torch.randn(3, 5), "a": torch.randn(7), "empty": torch.zeros(0, 4)}
    save_floats(tensors, tmp_path / "own", metadata={"format": "pt"})
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    assert (tmp_path / "own").read_bytes() == (tmp_path / "library").read_bytes()
    assert {name: one.tolist() for name, one in load_file(tmp_path / "own").items()} == {
        name: one.tolist() for name, one in tensors.items()
    }
