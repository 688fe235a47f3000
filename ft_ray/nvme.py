"""Optimizer states on NVMe, which DeepSpeed's ZeRO-3 swaps a sub-group at a time with Linux's asynchronous I/O.

The files belong to one run and one rank. What the next run finds is never read: a checkpoint is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["folder_of", "missing", "path_of", "remove"]

_SECONDS = 60
_PROGRAM = "#include <libaio.h>\nint main() { io_context_t context = 0; return io_setup(1, &context); }\n"


def path_of(deepspeed: Mapping[str, Any]) -> str | None:
    """Where a recipe's `deepspeed` mapping wants optimizer states swapped to; None: nowhere."""
    zero = deepspeed.get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, Mapping) else None
    if not isinstance(offload, Mapping) or offload.get("device") != "nvme":
        return None
    return str(offload.get("nvme_path") or "") or None


def missing() -> str:
    """What DeepSpeed's async_io lacks on this machine to be compiled, and what to do; '' if nothing. Takes 0.2 s."""
    compiler = shutil.which("g++")
    if compiler is None:
        return "g++ is missing: apt-get install g++ libaio-dev"
    # As DeepSpeed looks for it: where these two variables say, too.
    flags = [*shlex.split(os.environ.get("CFLAGS", "")), *shlex.split(os.environ.get("LDFLAGS", ""))]
    command = [compiler, "-x", "c++", "-", "-o", os.devnull, *flags, "-laio"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, input=_PROGRAM, capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode == 0:
            return ""
    return "libaio's header and library are missing: apt-get install libaio-dev, or dnf install libaio-devel"


def folder_of(path: str, run: str, rank: int) -> Path:
    """The folder of a rank of the run `run` (its address and what it was made from) below `path`.

    The same for a run that goes on, so that a killed one leaves its files once and not with every attempt.
    """
    return Path(path) / f"ft-ray-{hashlib.sha256(run.encode()).hexdigest()[:12]}" / f"rank-{rank}"


def remove(folder: Path) -> None:
    """Removes a rank's folder, and the run's once it is the last."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()
