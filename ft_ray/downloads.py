"""The files of a tree in object storage, brought to this machine's disk: each once for all processes that want it."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from ft_ray.errors import DamagedError
from ft_ray.local_files import hash_file, move_for_good
from ft_ray.run_lock import one_at_a_time

__all__ = ["fetch_files"]


def fetch_files(wanted: Mapping[str, str], target: Path, get: Callable[[str, Path], None], address: str) -> None:
    """Puts the files `wanted` (relative path -> SHA-256) into the folder `target`, those that are not there yet.

    `get` brings one to a local path. A file that is there is whole, since it was compared before it got its name; the
    folder may lack others. Raises DamagedError, which names the file below `address`, and what `get` raises.
    """
    target.mkdir(parents=True, exist_ok=True)
    missing = list(wanted)
    # What another process fetches is left to it at first: several that began together would else wait for each other
    # at every file, and one at a time would download.
    for wait in (False, True):
        missing = [name for name in missing if not _fetched(name, wanted[name], target, get, address, wait=wait)]


def _fetched(
    name: str, expected: str, target: Path, get: Callable[[str, Path], None], address: str, *, wait: bool
) -> bool:
    """Whether the file is there now; it may not be while another process fetches it and `wait` is False."""
    if (target / name).exists():
        return True
    # Beside the folder, not in it: what lies in a tree is one of its files.
    mark = f"{target.name}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    with one_at_a_time(target.parent / mark, wait=wait) as mine:
        if not mine or (target / name).exists():
            return mine
        # Always the same on this machine: what a killed process has left is written over.
        staging = target.parent / f".staging-{mark}-{socket.gethostname()}"
        try:
            try:
                get(name, staging)
            except FileNotFoundError as error:
                raise DamagedError(f"{address}/{name}: missing") from error
            if hash_file(staging) != expected:
                raise DamagedError(f"{address}/{name}: content differs from its recorded hash.")
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            move_for_good(str(staging), str(target / name))
        finally:
            staging.unlink(missing_ok=True)
    return True
