"""Where the endpoints of this machine run: a note for each, so that other commands of the same user find them.

Importing this costs no Ray: a command looks here before it decides whether it needs one.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import psutil

from ft_ray.storage import cache_dir

__all__ = ["forget", "note", "noted"]

_RAY = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")


def note(name: str, url: str, address: str) -> None:
    """Writes down that this process serves `name` at `url` in the Ray at `address`. Readable by this user only."""
    path = _path(name)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # The token itself is not written, only where it is.
    values = {"RAY_ADDRESS": address, **{key: os.environ[key] for key in _RAY[1:] if key in os.environ}}
    value = {"url": url, "pid": os.getpid(), "started": psutil.Process().create_time(), "ray": values}
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(value, file)


def forget(name: str) -> None:
    """Removes this process' note."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        if json.loads(_path(name).read_text(encoding="utf-8"))["pid"] == os.getpid():
            _path(name).unlink()


def noted(name: str) -> dict[str, str] | None:
    """The RAY_* variables that reach the Ray of the endpoint `name`; None when there is none, or it has ended."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, psutil.Error):
        value = json.loads(_path(name).read_text(encoding="utf-8"))
        if abs(psutil.Process(value["pid"]).create_time() - value["started"]) < 1:
            return {key: str(value["ray"][key]) for key in _RAY if key in value["ray"]}
    return None


def _path(name: str) -> Path:
    return cache_dir() / "endpoints" / f"{name.replace('/', '--')}.json"
