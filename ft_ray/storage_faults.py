"""What goes wrong with storage, said in one sentence: full disks, permissions, object-store clients; no passwords."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from ft_ray.errors import FtRayError, MissingPackageError, StorageError
from ft_ray.local_files import cache_dir, is_left_behind

__all__ = [
    "client_errors",
    "disk_full",
    "file_system",
    "full_message",
    "lasting",
    "redacted",
    "refused",
    "storage_errors",
    "temporary_folder",
]


def redacted(text: str) -> str:
    """An address, or a message with addresses in it, without the user names and passwords before their hosts."""
    return re.sub(r"(?<!/)//[^/\s]*@", "//", text)


# What object-store clients raise besides OSError.
_CLIENT_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("google.api_core.exceptions", "GoogleAPIError"),
    ("gcsfs.retry", "HttpError"),
    ("gcsfs.retry", "ChecksumError"),
    ("aiohttp.client_exceptions", "ClientError"),  # gcsfs and s3fs: a connection cut off in an answer
)


def client_errors() -> tuple[type[Exception], ...]:
    """The error classes of the object-store clients in use: a client never imported has raised nothing."""
    found = [getattr(sys.modules[module], name, None) for module, name in _CLIENT_ERRORS if module in sys.modules]
    return tuple(kind for kind in found if kind is not None)


_READS = ("reading", "listing", "looking up", "downloading")
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What libraries write when the number of the error is lost: pyarrow, safetensors (Rust), the shell, and tempfile, which
# tries a few bytes in each of its folders.
_FULL_TEXT = re.compile(
    r"no space left on device|disk quota exceeded|(errno|os error) (28|122)\b|no usable temporary directory", re.I
)


def disk_full(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that a disk or a quota is full: by number or by text."""
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) in _FULL or _FULL_TEXT.search(str(seen)):
            return True
        seen = seen.__cause__
    return False


def refused(error: BaseException) -> bool:
    """Whether an error says that this login may not do that; gcsfs has no class and no number for it, only a text."""
    number = getattr(error, "errno", None)
    by_text = isinstance(error, OSError) and number is None and str(error).startswith("Forbidden: ")
    return isinstance(error, PermissionError) or number in (errno.EACCES, errno.EPERM, errno.EROFS) or by_text


def lasting(error: BaseException | None) -> bool:
    """Whether what caused a StorageError stays, however often one tries: missing, refused, a wrong address."""
    return error is not None and (
        isinstance(error, FileNotFoundError | NotADirectoryError | ValueError) or refused(error)
    )


def _no_bucket(what: str, where: str, error: Exception) -> bool:
    """A file that is put into a bucket needs nothing else to be there; one that is missing here has its name."""
    puts = what in ("writing", "committing", "locking") and "://" in where
    return puts and isinstance(error, FileNotFoundError) and error.filename is None


def full_message(what: str, where: str, remedy: str = "free space or set storage to another place") -> str:
    return (
        f"{what}: no space left at {where}; nothing was committed, earlier artifacts are intact: "
        f"{remedy}, then run the same command again."
    )


def temporary_folder() -> Path:
    """Where temporary files go. Unlike tempfile's own answer it needs no room there to be given."""
    return Path(tempfile.tempdir or os.environ.get("TMPDIR") or "/tmp")


def _own_disk_full(what: str, folder: Path) -> str:
    """Names the folder, the host (any worker's), and the variable that puts the folder elsewhere, if one does."""
    # A folder that was to be made, and one that is gone when the message is read, lie in one that is there.
    found = next(p for p in (folder, *folder.parents) if os.path.exists(p) and not is_left_behind(p.name))
    movable = {"TMPDIR": temporary_folder()}
    with contextlib.suppress(RuntimeError):  # of an account without a home
        movable["FT_RAY_CACHE"] = cache_dir().absolute()
    variable = next((name for name, root in movable.items() if folder.is_relative_to(root)), None)
    remedy = "free space there" + (f" or set {variable} to a folder on another disk" if variable else "")
    return full_message(what, f"{found} on {socket.gethostname()}", remedy)


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it. Raises MissingPackageError, ValueError, ImportError."""
    try:
        fs, root = url_to_fs(address)
    except ImportError as error:
        if address.startswith(("gs://", "gcs://")):
            raise MissingPackageError("gcsfs", "a gs:// address", "gcs") from error
        raise
    return fs, root


@contextlib.contextmanager
def storage_errors(what: str, where: str, own_disk: Path | None = None) -> Iterator[None]:
    """Turns operating-system and object-store failures into one StorageError sentence.

    `own_disk`: the folder of this machine that is written to, where a full disk can be no other than its.
    """
    try:
        yield
    except FtRayError:
        raise
    except Exception as error:
        # gcsfs has a ValueError for what the service calls invalid, such as a bucket's name.
        invalid = isinstance(error, ValueError) and str(error).startswith("Bad Request: ")
        if not invalid and not isinstance(error, (OSError, *client_errors())):
            raise
        said = " ".join(str(error).split())
        if disk_full(error):
            message = full_message(what, where) if own_disk is None else _own_disk_full(what, own_disk.absolute())
        elif refused(error):
            done = "read" if what in _READS else "written"
            message = (
                f"{what}: {where} cannot be {done} ({getattr(error, 'strerror', None) or said}): "
                f"set storage to a place you may {'read' if done == 'read' else 'write to'}."
            )
        elif invalid or _no_bucket(what, where, error):
            message = (
                f"{what}: {where} failed ({said}): there is no such bucket, or a name in it is not valid, so correct "
                "the address or make the bucket."
            )
        elif isinstance(error, OSError):
            message = f"{what}: {where} failed ({said}): check that the storage is reachable."
        else:
            message = f"{what}: {where} failed ({said}): check the login, and that the storage is reachable."
        raise StorageError(redacted(message)) from error
