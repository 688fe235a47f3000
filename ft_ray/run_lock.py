"""One writer a run folder: flock where all machines see it, elsewhere a lease that its holder renews."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

from ft_ray.errors import StorageError
from ft_ray.storage_faults import redacted, storage_errors

__all__ = [
    "Hold",
    "Taken",
    "TakenOver",
    "check_held",
    "flock_is_shared",
    "flocked",
    "hold_of",
    "is_held",
    "leased",
    "lose",
    "mount_of",
    "one_at_a_time",
    "taken_over",
]

logger = logging.getLogger("ft_ray")

_MOUNTS = "/proc/self/mounts"
_LOCK = ".lock"  # of a run folder
_LEASE_SECONDS = 120.0
_SETTLE_SECONDS = 1.0  # two that find the same abandoned lease both take it: a moment later the last one's is there
_FLOCK, _LEASE = "flock", "lease"  # which of them wrote a lock file: the kernel knows whether the first still counts
# Mount options with which the kernel keeps flock to its own machine: NFS, Lustre, SMB.
_OWN_LOCKS = {"nolock", "local_lock=all", "local_lock=flock", "localflock", "nobrl"}
_OWN_KINDS = ("fuse", "9p")  # most of these keep flock to one machine, and the mount does not say which
_tokens: dict[str, str] = {}  # what this process's holds are known by in their lock files, by their urls
_lost: dict[str, str] = {}  # what is to be said of a lease that was taken over, by its url


class Taken(StorageError):
    """Another process has the lock; `who` names it."""

    def __init__(self, message: str, who: str) -> None:
        super().__init__(message)
        self.who = who

    def __reduce__(self) -> tuple[type[Taken], tuple[str, str]]:
        return (Taken, (str(self), self.who))


class TakenOver(StorageError):
    """Another process has the run folder now: nothing more is to be written there, and no further try is of use."""


class Hold(NamedTuple):
    """This process's hold on the run folder `url`, for processes that work for it: the token in its lock file."""

    url: str
    token: str


class Files(Protocol):
    """Where a lease is kept: `storage.Store`."""

    def create(self, relative: str, content: bytes) -> None: ...
    def read(self, relative: str) -> bytes: ...
    def write(self, relative: str, content: bytes) -> None: ...
    def remove(self, relative: str) -> None: ...


def mount_of(path: Path, mounts: str = _MOUNTS) -> tuple[str, frozenset[str]]:
    """The type and the options of the file system that holds `path`, as Linux names them; ('', none) elsewhere."""
    best, kind, options = -1, "", ""
    with contextlib.suppress(OSError):
        for line in Path(mounts).read_text(encoding="utf-8").splitlines():
            _, place, name, how, *_ = line.split(" ")
            place = place.replace("\\040", " ")
            if path.is_relative_to(place) and len(place) >= best:
                best, kind, options = len(place), name, how
    return kind, frozenset(options.split(",")) - {""}


def flock_is_shared(path: str, mounts: str = _MOUNTS) -> bool:
    """Whether flock on `path` counts on every machine that has this file system mounted."""
    kind, options = mount_of(Path(path).resolve(), mounts)
    return not options & _OWN_LOCKS and kind.partition(".")[0] not in _OWN_KINDS


def _owner(kind: str) -> dict[str, Any]:
    token = uuid.uuid4().hex
    return {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "token": token, "kind": kind}


def _now(owner: dict[str, Any]) -> str:
    return json.dumps({**owner, "renewed": time.time()})


@contextlib.contextmanager
def _renewing(renew: Callable[[], None]) -> Iterator[None]:
    """Calls `renew` four times in the life of a lease. One that is missed is made up by the next."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(_LEASE_SECONDS / 4):
            with contextlib.suppress(Exception):
                renew()

    thread = threading.Thread(target=work, name="ft-ray-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)


def _taken(url: str, holder: dict[str, Any]) -> Taken:
    who = f"process {holder['pid']} on {holder.get('host')}" if "pid" in holder else "another process"
    message = f"{redacted(url)} is in use by {who}: wait for it, stop it, or choose another recipe name."
    return Taken(message, who)


def _holder(content: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _standing(files: Files, relative: str) -> dict[str, Any]:
    """What stands in a lock file; empty where there is none. Raises StorageError where that cannot be said."""
    try:
        return _holder(files.read(relative))
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return {}
        raise


def _held(holder: dict[str, Any]) -> bool:
    """Whether a lease counts: renewed lately, and not by a process of this machine that is gone."""
    return time.time() - float(holder.get("renewed", 0)) < _LEASE_SECONDS and not _dead(holder)


def _dead(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is gone: killed, it could not give the lease back."""
    if holder.get("host") != socket.gethostname() or holder.get("boot") != _boot():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (KeyError, ValueError, PermissionError):
        pass
    return False


def _boot() -> str:
    """What tells this start of this machine, and this container's processes, from others of the same name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex


def _still_there(path: str, descriptor: int) -> bool:
    """Whether an open file is still that of this name. NFS may keep a removed one, so its links say nothing."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def flocked(path: str, url: str) -> Iterator[None]:
    """Holds the file `path`; the kernel lets go when this process dies. Raises StorageError when it is taken.

    The file is renewed like a lease, for machines that have the file system mounted without shared locks; one of those
    may take it over, as it may a lease that could not be renewed.
    """
    owner = _owner(_FLOCK)

    def write() -> None:
        file.seek(0)
        file.truncate(0)
        file.write(_now(owner))
        file.flush()

    def renew() -> None:
        # By its name and not by what is open: NFS has lost that where it was cut off from its server for long.
        _note_if_lost(url, _holder(Path(path).read_bytes()), owner["token"])
        if url not in _lost:
            write()

    with storage_errors("locking", url):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115
    with file:
        with storage_errors("locking", url):  # a server without locks is not another process
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise _taken(url, _holder(file.read())) from error
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                raise StorageError(
                    f"locking: {url} has no file locks ({error.strerror}): mount it with them, or with the option "
                    "nolock (NFS) or localflock (Lustre), and a renewed lease is used."
                ) from error
            if not _still_there(path, file.fileno()):  # its holder removed the folder, this file with it
                raise _taken(url, {})
            file.seek(0)
            holder = _holder(file.read())
            if holder.get("kind") != _FLOCK and _held(holder):  # the lease of such a machine
                raise _taken(url, holder)
            write()
        _tokens[url] = owner["token"]
        try:
            with _renewing(renew):
                yield
        finally:
            _tokens.pop(url, None)
            _lost.pop(url, None)
            with contextlib.suppress(OSError):
                file.truncate(0)


@contextlib.contextmanager
def one_at_a_time(target: Path, *, wait: bool = True) -> Iterator[bool]:
    """Waits for other processes of this machine that make `target` now; the file next to it that is locked stays.

    With `wait` False it does not, and gives whether there is none.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except BlockingIOError:
            mine = False
        yield mine


def check_held(url: str, look: Files | None = None) -> None:
    """Raises TakenOver where what this process held was taken over: what it writes is in the way now.

    With `look`, the folder's files, the lock file is read now, where this process has a hold at all; else what the last
    renewal has seen counts. Raises StorageError where it cannot be read.
    """
    if look is not None and url in _tokens:
        _note_if_lost(url, _standing(look, _LOCK), _tokens[url])
    if url in _lost:
        raise TakenOver(_lost[url])


def is_held(url: str) -> bool:
    """Whether no lease of this process was taken over there."""
    return url not in _lost


def lose(url: str, message: str) -> NoReturn:
    """Gives a hold up of which a process that works for this one has seen that it was taken over."""
    _lost.setdefault(url, message)
    raise TakenOver(_lost[url])


def _note_if_lost(url: str, holder: dict[str, Any], token: str) -> None:
    """Has `check_held` raise from now on where the lock file holds another record than that of `token`."""
    if holder and holder.get("token") != token and url not in _lost:
        _lost[url] = _over(url, holder)
        logger.warning(_lost[url])


def _over(url: str, holder: dict[str, Any]) -> str:
    return (
        f"{redacted(url)} was taken over by process {holder.get('pid')} on {holder.get('host')} while this run could "
        "not reach its storage: it ends here, and the other one goes on."
    )


def hold_of(url: str) -> Hold | None:
    """This process's hold on `url`, for `taken_over` in processes that work for it; None where it has none."""
    return Hold(url, _tokens[url]) if url in _tokens else None


def taken_over(files: Files, hold: Hold) -> str:
    """What is to be said where another one's record stands in the lock file; '' where not, or where none is whole.

    Raises StorageError where it cannot be read.
    """
    holder = _standing(files, _LOCK)
    return _over(hold.url, holder) if holder and holder.get("token") != hold.token else ""


@contextlib.contextmanager
def leased(files: Files, relative: str, url: str) -> Iterator[None]:
    """Holds the file `relative`, made only where there is none, and renewed.

    A lease not renewed for two minutes counts as abandoned, that of a dead process of this machine at once.
    Raises StorageError when it is taken.
    """
    owner = _owner(_LEASE)

    def write() -> None:
        files.write(relative, _now(owner).encode())

    def read() -> dict[str, Any]:
        return _standing(files, relative)

    try:
        files.create(relative, _now(owner).encode())
    except FileExistsError:
        # Our own is there when the answer to our request was lost and the client asked again; none when it was given
        # back meanwhile, or is being written.
        holder = read()
        if not holder:
            time.sleep(_SETTLE_SECONDS)
            holder = read()
        if holder.get("token") != owner["token"]:
            if _held(holder):
                raise _taken(url, holder) from None
            # Overwritten and not removed, so that a third one never finds no lease. Who writes last has it, and who
            # needed so long to write that another may have looked already has it not.
            looked = time.monotonic()
            if read() != holder:
                raise _taken(url, read()) from None
            write()
            slow = time.monotonic() - looked > 0.8 * _SETTLE_SECONDS
            time.sleep(_SETTLE_SECONDS)
            found = read()
            if slow or found.get("token") != owner["token"]:
                raise _taken(url, {} if slow else found) from None
    over = False

    def renew() -> None:
        holder = read()
        if over:  # the storage answered too late
            return
        _note_if_lost(url, holder, owner["token"])
        if url not in _lost:
            write()

    _tokens[url] = owner["token"]
    try:
        with _renewing(renew):
            yield
    finally:
        over = True
        _tokens.pop(url, None)
        _lost.pop(url, None)
        with contextlib.suppress(Exception):
            if read().get("token") == owner["token"]:
                files.remove(relative)
