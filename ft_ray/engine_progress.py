"""What an engine that starts is doing, as far as its own machine tells: vLLM is silent for a minute at a time.

After "Graph capturing finished", for one, vLLM 0.29 runs its sampler for the first time. For that FlashInfer has nvcc
compile three files, unless they lie compiled in its folder (`engine.cache` keeps it), and says nothing meanwhile.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

__all__ = ["doing"]

_COMPILERS = {
    "nvcc": "CUDA kernels", "cicc": "CUDA kernels", "ptxas": "CUDA kernels", "cudafe++": "CUDA kernels",
    "fatbinary": "CUDA kernels", "ninja": "an extension", "cc1plus": "C++", "cc1": "C",
}  # fmt: skip
# As vLLM's logger writes it: (EngineCore pid=12) INFO 11-29 04:55:46 [gpu_model_runner.py:7002] Graph capturing ...
_LINE = re.compile(r"(?:INFO|WARNING|ERROR) (\d\d-\d\d \d\d:\d\d:\d\d) \[[^\]]*\] (.+)")
_MOST_CHARACTERS = 120
_END_BYTES = 16_384


def doing(application: str, logs: Path | None) -> str:
    """What is being compiled for the replicas of `application`, else vLLM's last word and how old it is, in brackets.

    `logs`: the folder of Ray's logs on this machine. '' where no replica runs here or none has said anything.
    """
    replicas = list(_replicas(application))
    compiled = {_COMPILERS[name] for process in replicas for name in _below(process) if name in _COMPILERS}
    if compiled:
        return f" (compiling {' and '.join(sorted(compiled))})"
    spoken = [found for process in replicas if (found := _last_word(logs, process.pid)) is not None]
    if not spoken:
        return ""
    at, words = max(spoken)
    return f" ({max(0.0, time.time() - at):.0f} s ago: {words[:_MOST_CHARACTERS]})"


def _replicas(application: str) -> Iterator[psutil.Process]:
    title = f"ServeReplica:{application}:Server:"
    for process in psutil.process_iter(["cmdline"]):
        if title in "".join((process.info["cmdline"] or [])[:1]):
            yield process


def _below(process: psutil.Process) -> list[str]:
    names = []
    with contextlib.suppress(psutil.Error):
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                names.append(child.name())
    return names


def _time_of(written: str, latest: float) -> float:
    """time.time() of vLLM's 'MM-DD HH:MM:SS', which names no year: the last such moment up to `latest`."""
    year = time.localtime(latest).tm_year
    for one in (year, year - 1):
        with contextlib.suppress(ValueError):  # 29 February
            at = time.mktime(time.strptime(f"{one}-{written}", "%Y-%m-%d %H:%M:%S"))
            if at <= latest + 1:
                return at
    return latest


def _last_word(logs: Path | None, pid: int) -> tuple[float, str] | None:
    """When vLLM wrote the last of its lines in the logs of a process, as time.time() tells it, and the line."""
    found = []
    for path in logs.glob(f"worker-*-{pid}.[eo]*") if logs is not None else ():
        with contextlib.suppress(OSError), path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _END_BYTES))
            words = _LINE.findall(file.read().decode("utf-8", "replace"))
            if words:
                at, said = words[-1]
                found.append((_time_of(at, path.stat().st_mtime), said.strip()))
    return max(found) if found else None
