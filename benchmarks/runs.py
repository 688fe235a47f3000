"""Runs in processes of their own, as many at once as there are free GPUs: logs, time limits, memory of the devices."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

__all__ = ["Run", "end_tree", "gpu_memory", "run_all", "tail"]

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Run:
    """A command that needs `devices` GPUs. What became of it: seconds of `wall`, the largest memory of each device
    as the driver tells it, and why it `failed` ('' where it did not)."""

    name: str
    devices: int
    command: list[str]
    wall: float = 0.0
    failed: str = ""
    device_bytes: list[int] = field(default_factory=list)


@dataclass
class _Running:
    run: Run
    process: subprocess.Popen[bytes]
    devices: list[int]
    log: Path
    began: float


def gpu_memory() -> list[int]:
    """Bytes in use of each GPU of the machine; [] where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return [int(line) * 2**20 for line in said.split()]
    return []


def tail(path: Path, lines: int = 25) -> str:
    """The end of a log, where there is one."""
    with contextlib.suppress(OSError):
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    return ""


def end_tree(pid: int) -> None:
    """Kills a process and everything below it."""
    with contextlib.suppress(psutil.Error):
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for process in tree:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(tree, timeout=20)


def run_all(
    todo: list[Run], *, devices: int, device: str, folder: Path, limit: float, done: Callable[[Run], None]
) -> None:
    """Starts them in order, each once as many devices are free as it needs; one that fails does not stop the next.

    `limit`: seconds of one run, after which it is killed. `device` 'cpu' counts devices and sets none.
    """
    mine = os.environ.get("CUDA_VISIBLE_DEVICES") if device == "cuda" else None
    free = [int(number) for number in mine.split(",")][:devices] if mine else list(range(devices))
    waiting, running = list(todo), list[_Running]()
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}:{os.environ.get('PYTHONPATH', '')}",
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        # Neither NCCL's nor torch's collectives over NVLink multicast: rented hosts do not always let them be set up.
        "NCCL_NVLS_ENABLE": os.environ.get("NCCL_NVLS_ENABLE", "0"),
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"),
    }  # fmt: skip
    if device == "cpu":
        environment |= {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    try:
        while waiting or running:
            while waiting and waiting[0].devices <= len(free):
                run = waiting.pop(0)
                own, free = free[: run.devices], free[run.devices :]
                log = folder / f"{run.name.replace(' ', '-')}.log"
                visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, own))} if device == "cuda" else {}
                with log.open("wb") as out:
                    process = subprocess.Popen(run.command, stdout=out, stderr=out, env=environment | visible)
                running.append(_Running(run, process, own, log, time.monotonic()))
            memory = gpu_memory() if device == "cuda" else []
            for one in list(running):
                used = [memory[i] for i in one.devices if i < len(memory)]
                before = one.run.device_bytes or [0] * len(used)
                one.run.device_bytes = [max(pair) for pair in zip(before, used, strict=False)]
                one.run.wall = time.monotonic() - one.began
                if one.process.poll() is None and one.run.wall < limit:
                    continue
                if one.process.poll() is None:
                    end_tree(one.process.pid)
                    one.run.failed = f"killed after {limit:.0f} s"
                elif one.process.returncode:
                    one.run.failed = f"exit {one.process.returncode}"
                if one.run.failed:
                    said = f"{one.run.name} {one.run.failed}; the end of its log:\n{tail(one.log)}"
                    print(said, file=sys.stderr, flush=True)
                one.process.wait()
                running.remove(one)
                free = sorted([*free, *one.devices])
                done(one.run)
            time.sleep(0.3)
    finally:  # whoever ends this ends what it started
        for one in running:
            end_tree(one.process.pid)
            one.run.failed = f"stopped after {time.monotonic() - one.began:.0f} s"
            with contextlib.suppress(Exception):  # what it had is kept, and the rest of the way out goes on
                done(one.run)
