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

__all__ = ["client_errors", "file_system", "redacted", "storage_errors"]


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
        if number in (errno.ENOSPC, errno.EDQUOT):
            message = (
                f"{what}: no space left at {where}; nothing was committed, earlier artifacts are intact: "
                "free space or set storage to another place, then run the same command again."
            )
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
