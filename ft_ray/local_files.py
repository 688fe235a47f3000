"""Files and folders on this machine's file systems, NFS among them: hashed, put in place in one step, removed.

On NFS a file that is removed while a process has it open stays until that one closes it: its client renames it to
`.nfs` and 24 hex digits ("silly rename"). It cannot be removed, nor can its folder. It is no part of any tree.
And an NFS client remembers for up to a minute (the mount's acdirmax) what was not in a folder: see `look_again`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "STAGED",
    "cache_dir",
    "files_below",
    "hash_file",
    "is_kept_open",
    "is_left_behind",
    "look_again",
    "move_for_good",
    "put_back",
    "remove_local",
    "staged_folder",
    "write_once",
    "written_beside",
]

_CHUNK = 1 << 22
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)  # of many file systems in user space
_LIBC = ctypes.CDLL(None)
_AT_FDCWD, _AT_STATX_FORCE_SYNC, _STATX_BASIC_STATS = -100, 0x2000, 0x7FF  # linux/fcntl.h, linux/stat.h
_SILLY = re.compile(r"\.nfs[0-9a-f]{16,}")

STAGED = "ft-ray-staged-"
"""How the folders begin in which a rank's checkpoints wait to be sent."""


def cache_dir() -> Path:
    """Where downloads and tokenised data are kept: FT_RAY_CACHE, else ~/.cache/ft-ray."""
    return Path(os.environ.get("FT_RAY_CACHE") or Path.home() / ".cache" / "ft-ray")


def hash_file(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def is_kept_open(name: str) -> bool:
    """Whether `name`, without its folder, is an NFS client's name for a removed file that is still open."""
    return _SILLY.fullmatch(name) is not None


def is_left_behind(name: str) -> bool:
    """Whether `name` is what a killed process leaves: a folder or file on its way in, or one on its way out."""
    return name.startswith(".staging-") or re.fullmatch(r".+\.[0-9a-f]{32}\.(old|tmp)", name) is not None


def put_back(folder: str) -> None:
    """Gives what was moved aside in `folder` its name again, where nothing has taken its place."""
    for name in sorted(os.listdir(folder)):
        aside = re.fullmatch(r"(.+)\.[0-9a-f]{32}\.old", name)
        if aside and not os.path.lexists(os.path.join(folder, aside[1])):
            os.rename(os.path.join(folder, name), os.path.join(folder, aside[1]))


def files_below(folder: str | Path) -> list[Path]:
    """Every file below `folder`, sorted, but those that are kept open."""
    return sorted(p for p in Path(folder).rglob("*") if not is_kept_open(p.name) and p.is_file())


def look_again(folder: str) -> None:
    """Has the file system ask its server about `folder` and those above it, for what others have made there.

    A file that another machine has just committed is else not there for this one, if it has looked for it before:
    a run would go on from an older checkpoint, or take the new one for an orphan.
    """
    statx = getattr(_LIBC, "statx", None)  # Linux
    answer = ctypes.create_string_buffer(256)  # struct statx
    for step in (*reversed(Path(folder).parents), Path(folder)):
        if statx is None or statx(_AT_FDCWD, os.fsencode(step), _AT_STATX_FORCE_SYNC, _STATX_BASIC_STATS, answer):
            return


def remove_local(path: str) -> None:
    """Removes a file, or a folder with all in it but what is kept open. Raises OSError."""
    if not os.path.isdir(path) or os.path.islink(path):
        os.unlink(path)
        return
    shutil.rmtree(path, ignore_errors=True)
    if os.path.isdir(path) and (files_below(path) or not any(is_kept_open(p.name) for p in Path(path).rglob(".nfs*"))):
        shutil.rmtree(path)  # says what it is that cannot be removed


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` in one step; of several processes that do so, the first one counts.

    What is in it is on the disk before it has that name: nobody looks into it again, and a power loss would else leave
    empty files there. Raises OSError where the folder can be neither made nor put in its place.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=target.parent))
    try:
        yield staging
        _all_to_disk(staging)
        try:
            os.rename(staging, target)
            _folder_to_disk(target.parent)
        except OSError:
            if not os.path.isdir(target):  # else another process finished the same work first
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def move_for_good(file: str, path: str) -> None:
    """Moves a file into a folder so that it is there after a power loss. Raises OSError, and may be tried again then.

    What the disk, or a file system's server, has no room for may be known at the end only: `file` is there until then.
    """
    folder = os.path.dirname(path)
    if os.path.lexists(file):
        try:
            if os.stat(file).st_dev != os.stat(folder).st_dev:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            _to_disk(file)
            os.replace(file, path)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.copyfile(file, path)
            _to_disk(path)
            os.unlink(file)
    elif not os.path.lexists(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file)
    _folder_to_disk(folder)


def _all_to_disk(folder: Path) -> None:
    for below, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not is_kept_open(name) and os.path.isfile(path := os.path.join(below, name)):
                _to_disk(path)
        _folder_to_disk(below)


def _folder_to_disk(folder: str | Path) -> None:
    with contextlib.suppress(OSError):  # the names are there, and some file systems cannot do this for a folder
        _to_disk(folder)


def _to_disk(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def written_beside(path: str, content: bytes) -> Iterator[str]:
    """A file next to `path` with `content` on the disk, to put in its place; gone afterwards."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def write_once(path: str, content: bytes) -> None:
    """Makes the file `path`, whole, for one of several that try. Raises FileExistsError for the others, OSError."""
    with written_beside(path, content) as temporary:
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with open(path, "xb") as file:  # not whole at once: a reader may find the beginning
                file.write(content)
