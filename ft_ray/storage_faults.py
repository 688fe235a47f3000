"""What goes wrong with storage, said in one sentence: full disks, permissions, object-store clients; no passwords."""

from __future__ import annotations

import contextlib
import errno
import re
import sys
from collections.abc import Iterator
from typing import Any

from fsspec.core import url_to_fs

from ft_ray.errors import FtRayError, MissingPackageError, StorageError

__all__ = ["client_errors", "disk_full", "file_system", "full_message", "redacted", "storage_errors"]


def redacted(text: str) -> str:
    """An address, or a message with addresses in it, without the user names and passwords before their hosts."""
    return re.sub(r"(?<!/)//[^/\s]*@", "//", text)


# What object-store clients raise besides OSError.
_CLIENT_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("gcsfs.retry", "HttpError"),
)


def client_errors() -> tuple[type[Exception], ...]:
    """The error classes of the object-store clients in use: a client never imported has raised nothing."""
    found = [getattr(sys.modules[module], name, None) for module, name in _CLIENT_ERRORS if module in sys.modules]
    return tuple(kind for kind in found if kind is not None)


_FULL = (errno.ENOSPC, errno.EDQUOT)
# What libraries write when the number of the error is lost: pyarrow, safetensors (Rust), the shell.
_FULL_TEXT = re.compile(r"no space left on device|disk quota exceeded|(errno|os error) (28|122)\b", re.I)


def disk_full(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that a disk or a quota is full: by number or by text."""
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) in _FULL or _FULL_TEXT.search(str(seen)):
            return True
        seen = seen.__cause__
    return False


def full_message(what: str, where: str) -> str:
    return (
        f"{what}: no space left at {where}; nothing was committed, earlier artifacts are intact: "
        "free space or set storage to another place, then run the same command again."
    )


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
def storage_errors(what: str, where: str) -> Iterator[None]:
    """Turns operating-system and object-store failures into one StorageError sentence."""
    try:
        yield
    except FtRayError:
        raise
    except Exception as error:
        if not isinstance(error, (OSError, *client_errors())):
            raise
        number = error.errno if isinstance(error, OSError) else None
        if disk_full(error):
            message = full_message(what, where)
        elif number in (errno.EACCES, errno.EPERM, errno.EROFS) or isinstance(error, PermissionError):
            message = (
                f"{what}: {where} cannot be written ({getattr(error, 'strerror', None) or error}): "
                "set storage to a place you may write to."
            )
        elif isinstance(error, OSError):
            message = f"{what}: {where} failed ({error}): check that the storage is reachable."
        else:
            message = f"{what}: {where} failed ({error}): check the login, and that the storage is reachable."
        raise StorageError(redacted(message)) from error
