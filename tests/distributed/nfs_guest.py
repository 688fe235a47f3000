"""Runs as the first process of a user-mode Linux kernel: an NFS server, and two clients that mount it.

The kernel's root is this machine's, read-only; everything written lies in its memory. Prints a JSON object a line,
{"check": NAME, "fault": TEXT or null}, then ends the kernel. `tests/distributed/test_nfs.py` starts it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
FINIT_MODULE, POWER_OFF = 313, 0x4321FEDC
CLONE_NEWUTS, CLONE_NEWNET = 0x04000000, 0x40000000
FOREVER = 2147483647
# Of an export: any port, no check of the path, a number as its identity (memory has none). Written at once, not later.
INSECURE, NO_SUBTREE, BY_NUMBER = 0x2, 0x400, 0x2000
CLIENTS = {"a": Path("/run/a"), "b": Path("/run/b")}


def checked(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, place: str, kind: str, options: str = "") -> None:
    os.makedirs(place, exist_ok=True)
    checked(LIBC.mount(source.encode(), place.encode(), kind.encode(), 0, options.encode()), f"mount {kind} {options}")


def load(*names: str) -> None:
    """Kernel modules, each after those that it needs."""
    root = Path("/usr/lib/uml/modules") / os.uname().release
    needs = {}
    for line in (root / "modules.dep").read_text().splitlines():
        module, _, others = line.partition(":")
        needs[Path(module).stem] = [*reversed(others.split()), module]
    loaded = set()
    for name in names:
        for module in needs[name]:
            if module not in loaded:
                loaded.add(module)
                with open(root / module, "rb") as file:
                    checked(LIBC.syscall(FINIT_MODULE, file.fileno(), b"", 0), f"module {module}")


def serve(folder: str) -> None:
    """The kernel's own server, for `folder`. What mountd answers its questions with is written down beforehand."""
    mount("nfsd", "/proc/fs/nfsd", "nfsd")
    told = {"versions": "-2 -3 +4", "nfsv4leasetime": "10", "nfsv4gracetime": "10"}
    for name, value in told.items():
        Path("/proc/fs/nfsd", name).write_text(value + "\n")
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 2049))
        listener.listen(8)
        Path("/proc/fs/nfsd/portlist").write_text(f"{listener.fileno()}\n")
    Path("/proc/fs/nfsd/threads").write_text("4\n")
    flags = INSECURE | NO_SUBTREE | BY_NUMBER
    for cache, answer in {
        **{f"auth.unix.ip {n}": f"nfsd 10.77.{n}.2 {FOREVER} all" for n in (1, 2)},
        "auth.unix.gid": f"0 {FOREVER} 0",
        "nfsd.export": f"all {folder} {FOREVER} {flags} 65534 65534 0",
        "nfsd.fh": f"all 1 \\x00000000 {FOREVER} {folder}",
    }.items():
        with open(f"/proc/net/rpc/{cache.split()[0]}/channel", "wb", buffering=0) as channel:
            channel.write((answer + "\n").encode())


def join(name: str, number: int, place: str) -> None:
    """A client of its own: another network, another host name, and so another owner of locks and leases."""
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            checked(LIBC.unshare(CLONE_NEWNET | CLONE_NEWUTS), "unshare")
            socket.sethostname(f"host-{name}")
            os.write(ready[1], b"1")
            os.read(go[0], 1)
            here, server = f"10.77.{number}.2", f"10.77.{number}.1"
            for command in ("link set lo up", f"addr add {here}/24 dev nic{name}", f"link set nic{name} up"):
                subprocess.run(["ip", *command.split()], check=True)
            mount(f"{server}:/", place, "nfs4", f"vers=4.2,addr={server},clientaddr={here}")
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.read(ready[0], 1)
    for command in (
        f"link add wire{name} type veth peer name nic{name}", f"link set nic{name} netns {child}",
        f"addr add 10.77.{number}.1/24 dev wire{name}", f"link set wire{name} up",
    ):  # fmt: skip
        subprocess.run(["ip", *command.split()], check=True)
    os.write(go[1], b"1")
    _, status = os.waitpid(child, 0)
    assert status == 0, f"client {name} could not mount"


def prepare() -> None:
    for source, place, kind in [
        ("proc", "/proc", "proc"), ("sys", "/sys", "sysfs"), ("run", "/run", "tmpfs"),
    ]:  # fmt: skip
        mount(source, place, kind)
    os.environ.update(HOME="/run/home", FT_RAY_CACHE="/run/cache", TMPDIR="/run/staging")
    for folder in ("/run/home", "/run/staging"):
        os.makedirs(folder)
    load("nfsv4", "nfsd", "veth")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    mount("disk", "/run/export", "tmpfs")
    serve("/run/export")
    for number, (name, place) in enumerate(CLIENTS.items(), 1):
        join(name, number, str(place))
    sys.path.insert(0, sys.argv[1])


def store(client: str, run: str = "run") -> Any:
    from ft_ray.storage import Store

    return Store(CLIENTS[client] / run)


def refused(client: str, run: str, holder: int) -> None:
    """That client `client`, a process of its own, does not get the lock."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from ft_ray.storage import Store\nfrom ft_ray.errors import StorageError\n"
        "try:\n    with Store(sys.argv[2]).lock(): print('held')\n"
        "except StorageError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, sys.argv[1], str(CLIENTS[client] / run)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"is in use by process {holder} on" in told, told


# What is checked


def the_lock_counts_on_both_clients() -> None:
    from ft_ray.run_lock import flock_is_shared, mount_of

    kind, options = mount_of(CLIENTS["a"])
    assert kind == "nfs4" and "local_lock=none" in options and flock_is_shared(str(CLIENTS["a"])), (kind, options)
    with store("a").lock():
        refused("b", "run", os.getpid())
        refused("a", "run", os.getpid())
    with store("b").lock():
        refused("a", "run", os.getpid())


def the_lease_counts_on_both_clients_without_flock() -> None:
    """As where a mount keeps flock to its machine: nothing but files that are made once."""
    from ft_ray import storage
    from ft_ray.errors import StorageError

    known = storage.flock_is_shared
    storage.flock_is_shared = lambda path: False
    try:
        with store("a", "leased").lock():
            for client in CLIENTS:
                with contextlib.suppress(StorageError), store(client, "leased").lock():
                    raise AssertionError(f"two writers, the second one on client {client}")
            refused("b", "leased", os.getpid())  # which has flock, and finds the lease
        assert store("b", "leased").list() == []
    finally:
        storage.flock_is_shared = known


def one_of_many_makes_a_file() -> None:
    """Eight threads of either client at once."""
    made: list[str] = []
    start = threading.Barrier(16)

    def work(client: str, number: int) -> None:
        place = store(client, "race")
        start.wait()
        with contextlib.suppress(FileExistsError):
            place.create("only", f"{client}{number}".encode())
            made.append(f"{client}{number}")

    threads = [threading.Thread(target=work, args=(client, n)) for n in range(8) for client in CLIENTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and store("b", "race").read("only").decode() == made[0], made
    assert store("a", "race").list() == ["only"]


def a_commit_on_one_client_is_whole_on_the_other() -> None:
    """Two ranks on two clients, the commit on the first; the other has looked before and holds on to nothing."""
    from ft_ray import checkpoint

    name = checkpoint.name("k", 5, "abcdef")
    assert checkpoint.find(store("b"), "k") is None and store("b").list("checkpoints") == []
    sent = []
    for rank, client in enumerate(CLIENTS):
        folder = Path(f"/run/staging/rank{rank}")
        folder.mkdir()
        (folder / f"state-{rank}.bin").write_bytes(os.urandom(300_000))
        if rank == 0:
            (folder / "progress.json").write_text('{"step": 5}')
        sent.append(checkpoint.upload(store(client), folder, name))
        assert checkpoint.find(store("b"), "k") is None, "not before the commit"
    checkpoint.commit(store("a"), name, sent)
    found = checkpoint.find(store("b"), "k", contents=True)
    assert found is not None and (found.name, found.progress) == (name, {"step": 5}), found
    assert store("b").verify(f"checkpoints/{name}") == []
    assert store("b").tree("adapter") is None and not store("b").exists("report.html")
    store("a").write("report.html", b"<p>")
    with store("a").stage("adapter") as folder:
        (folder / "weights").write_bytes(b"w")
    assert store("b").exists("report.html") and store("b").verify("adapter") == []
    assert checkpoint.clean(store("b"), "k") == [], "no orphan"


def a_file_that_is_replaced_is_read_whole() -> None:
    """One client writes it anew without end, the other reads it: always one version or another.

    What the name stands for a client may remember for a minute (acdirmax), so that is how long a new one may take.
    """
    written, over = store("a"), threading.Event()
    faults: list[BaseException] = []

    def write() -> None:
        number = 0
        while not over.is_set():
            written.write_json("manifest.json", {"number": number, "text": "x" * (number % 7 * 2000)})
            number += 1

    written.write_json("manifest.json", {"number": 0, "text": ""})
    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    began = time.monotonic()
    while not faults and (time.monotonic() - began < 6 or (len(seen) < 2 and time.monotonic() - began < 90)):
        try:
            value = store("b").read_json("manifest.json")
            assert len(value["text"]) == value["number"] % 7 * 2000
            seen.add(value["number"])
        except BaseException as error:
            faults.append(error)
    over.set()
    writer.join()
    assert not faults, faults
    assert len(seen) > 1, "what is written after the first look is seen"


def an_open_file_of_an_old_checkpoint_stays_and_stops_nothing() -> None:
    """Retention removes checkpoints while a process of the same client still has a file of one open."""
    from ft_ray import checkpoint

    for step in (10, 15, 20):
        folder = Path(f"/run/staging/step{step}")
        folder.mkdir()
        (folder / "model.bin").write_bytes(b"m" * 1000)
        (folder / "progress.json").write_text("{}")
        name = checkpoint.name("k", step, "abcdef")
        checkpoint.commit(store("a"), name, [checkpoint.upload(store("a"), folder, name)])
    old = checkpoint.name("k", 10, "abcdef")
    with open(store("a").path(f"checkpoints/{old}/model.bin"), "rb") as opened:
        removed = checkpoint.retain(store("a"), "k", keep=1, best=None)
        assert checkpoint.name("k", 15, "abcdef") in removed and old in removed, removed
        left = os.listdir(store("a").path(f"checkpoints/{old}"))
        assert len(left) == 1 and left[0].startswith(".nfs"), left
        assert store("b").list(f"checkpoints/{old}") == [] and store("b").tree(f"checkpoints/{old}") is None
        assert opened.read() == b"m" * 1000
        checkpoint.clean(store("b"), "k")  # another client, while it is still open there
    checkpoint.clean(store("a"), "k")
    assert store("a").list("checkpoints") == [checkpoint.name("k", 20, "abcdef")]
    found = checkpoint.find(store("b"), "k", contents=True)
    assert found is not None and found.step == 20


def a_tree_is_replaced_under_an_open_file() -> None:
    with store("a").stage("adapter") as folder:
        (folder / "weights").write_bytes(b"old")
    with open(store("a").path("adapter/weights"), "rb") as opened:
        with store("a").stage("adapter") as folder:
            (folder / "weights").write_bytes(b"draft")
            with open(folder / "weights", "rb") as draft:  # a library replaces what it has mapped
                (folder / "new").write_bytes(b"new")
                os.replace(folder / "new", folder / "weights")
                assert any(name.startswith(".nfs") for name in os.listdir(folder)), "a real NFS client"
                assert draft.read() == b"draft"
        assert list(store("b").tree("adapter") or {}) == ["weights"]
        assert (store("b").local("adapter") / "weights").read_bytes() == b"new"
        assert opened.read() == b"old"
    assert store("b").verify("adapter") == []


CHECKS: list[Callable[[], None]] = [
    the_lock_counts_on_both_clients,
    the_lease_counts_on_both_clients_without_flock,
    one_of_many_makes_a_file,
    a_commit_on_one_client_is_whole_on_the_other,
    a_file_that_is_replaced_is_read_whole,
    an_open_file_of_an_old_checkpoint_stays_and_stops_nothing,
    a_tree_is_replaced_under_an_open_file,
]


def main() -> None:
    try:
        prepare()
        for check in CHECKS:
            fault = None
            try:
                check()
            except BaseException:
                fault = traceback.format_exc()
            print(json.dumps({"check": check.__name__, "fault": fault}), flush=True)
    except BaseException:
        print(json.dumps({"check": "prepare", "fault": traceback.format_exc()}), flush=True)
    finally:
        LIBC.reboot(POWER_OFF)


if __name__ == "__main__":
    main()
