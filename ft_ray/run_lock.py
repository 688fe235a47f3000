"""One writer a run folder: flock on file systems, a renewed lease on object storage."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ft_ray.errors import StorageError
from ft_ray.storage_faults import redacted, storage_errors

__all__ = ["flocked", "leased", "one_at_a_time"]

_LEASE_SECONDS = 120.0


def _owner() -> dict[str, Any]:
    return {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "token": uuid.uuid4().hex}


def _taken(url: str, holder: Any) -> StorageError:
    who = f"process {holder.get('pid')} on {holder.get('host')}" if isinstance(holder, dict) else "another process"
    return StorageError(
        f"{redacted(url)} is in use by {who}: wait for it, stop it, or choose another recipe name."
    )


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


@contextlib.contextmanager
def flocked(path: str, url: str) -> Iterator[None]:
    """Holds the file `path`; the kernel lets go when this process dies. Raises StorageError when it is taken."""
    with storage_errors("locking", url):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            text = file.read()
            raise _taken(url, json.loads(text) if text.startswith("{") else None) from error
        if os.fstat(file.fileno()).st_nlink == 0:  # its holder removed the folder, this file with it
            raise _taken(url, None)
        file.truncate(0)
        file.write(json.dumps(_owner()))
        file.flush()
        yield


@contextlib.contextmanager
def one_at_a_time(target: Path) -> Iterator[None]:
    """Waits for other processes of this machine that make `target` now; the file next to it that is locked stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def leased(fs: Any, path: str, url: str) -> Iterator[None]:
    """Holds the object `path`, made by conditional put (`fs` is an fsspec file system) and renewed.

    A lease not renewed for two minutes counts as abandoned, that of a dead process of this machine at once.
    Raises StorageError when it is taken.
    """
    owner = _owner()

    def content() -> bytes:
        return json.dumps({**owner, "renewed": time.time()}).encode()

    with storage_errors("locking", url):
        try:
            fs.pipe_file(path, content(), mode="create")
        except FileExistsError:
            try:
                holder = json.loads(fs.cat_file(path))
            except ValueError:
                holder = {}
            if time.time() - float(holder.get("renewed", 0)) < _LEASE_SECONDS and not _dead(holder):
                raise _taken(url, holder) from None
            fs.rm_file(path)
            try:
                fs.pipe_file(path, content(), mode="create")
            except FileExistsError:
                raise _taken(url, None) from None
    done = threading.Event()

    def renew() -> None:
        while not done.wait(_LEASE_SECONDS / 4):
            with contextlib.suppress(Exception):  # a missed renewal is made up by the next one
                fs.pipe_file(path, content())

    thread = threading.Thread(target=renew, name="ft-ray-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)
        with contextlib.suppress(Exception):
            fs.rm_file(path)
