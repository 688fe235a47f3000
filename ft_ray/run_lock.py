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
from typing import Any

from ft_ray.errors import StorageError
from ft_ray.storage_faults import redacted, storage_errors

__all__ = ["flocked", "leased"]

_LEASE_SECONDS = 120.0


def _owner() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}


def _taken(url: str, holder: Any) -> StorageError:
    who = f"process {holder.get('pid')} on {holder.get('host')}" if isinstance(holder, dict) else "another process"
    return StorageError(
        f"{redacted(url)} is in use by {who}: wait for it, stop it, or choose another recipe name."
    )


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
        file.truncate(0)
        file.write(json.dumps(_owner()))
        file.flush()
        yield


@contextlib.contextmanager
def leased(fs: Any, path: str, url: str) -> Iterator[None]:
    """Holds the object `path`, made by conditional put (`fs` is an fsspec file system) and renewed.

    A lease not renewed for two minutes counts as abandoned. Raises StorageError when it is taken.
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
            if time.time() - float(holder.get("renewed", 0)) < _LEASE_SECONDS:
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
