"""How host memory for snapshots is pinned, and what that costs the kernels which training launches meanwhile.

    python benchmarks/pinning.py [--gib 16] [--rounds 2] [--json FILE]   # needs a GPU, and that much host memory free

Ways, in turn, each in blocks of 256 MiB as `ft_ray/snapshot.py` sets it aside:

    cuda          torch.empty(pin_memory=True): the driver faults and pins every page in one call
    register      ordinary memory in huge pages, filled first, then cudaHostRegister, which finds the pages there
    register 4k   the same in small pages
    threads       as `register`, filled by four threads: what snapshots do (`ft_ray/pinned.py`)

Meanwhile another thread launches a kernel and waits for it, again and again: its longest wait is what a step may stand
still. Prints seconds, GB/s, and the median and longest wait; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ft_ray import pinned as ours

BLOCK = 1 << 28  # bytes
WAYS = ("cuda", "register", "register 4k", "threads")


def mapped(huge: bool) -> torch.Tensor:
    """A block of this process's memory that no page was put under yet."""
    memory = mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has small pages
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def pinned(way: str, pool: ThreadPoolExecutor) -> torch.Tensor:
    """One block in pinned memory."""
    if way == "cuda":
        return torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True)
    if way == "threads":
        return ours.block(BLOCK // 4, pool, torch.device("cuda")).view(torch.uint8)
    block = mapped(huge=way != "register 4k")
    block.zero_()
    code = torch.cuda.cudart().cudaHostRegister(block.data_ptr(), BLOCK, 0)
    assert int(code) == 0, code
    assert block.is_pinned()
    return block


def released(way: str, blocks: list[torch.Tensor]) -> None:
    for block in blocks if way != "cuda" else []:
        torch.cuda.cudart().cudaHostUnregister(block.data_ptr())
    blocks.clear()
    torch._C._host_emptyCache()


class Launches(threading.Thread):
    """Launches one kernel after the other until told to end; seconds of each, until it has run."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.waits: list[float] = []
        self.over = threading.Event()

    def run(self) -> None:
        values = torch.ones(1 << 20, device="cuda")
        while not self.over.is_set():
            began = time.monotonic()
            values.mul_(1.0)
            torch.cuda.synchronize()
            self.waits.append(time.monotonic() - began)


def measure(way: str, gib: float) -> dict[str, Any]:
    count = int(gib * 2**30 / BLOCK)
    launches, blocks = Launches(), list[torch.Tensor]()
    with ThreadPoolExecutor(4) as pool:
        launches.start()
        began = time.monotonic()
        blocks.extend(pinned(way, pool) for _ in range(count))
        seconds = time.monotonic() - began
        launches.over.set()
        launches.join()
    copied = time.monotonic()
    source = torch.ones(BLOCK, dtype=torch.uint8, device="cuda")
    for block in blocks:
        block.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    copied = time.monotonic() - copied
    assert all(int(block[-1]) == 1 for block in blocks)
    total = count * BLOCK / 1e9
    released(way, blocks)
    return {
        "way": way, "seconds": seconds, "gb_per_second": total / seconds, "copied_gb_per_second": total / copied,
        "median_wait": statistics.median(launches.waits), "longest_wait": max(launches.waits),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    torch.ones(1, device="cuda")
    found = []
    for number in range(given.rounds):
        for way in given.ways if number % 2 == 0 else reversed(given.ways):
            one = measure(way, given.gib)
            found.append({"round": number, **one})
            print(
                f"{way:12} {one['seconds']:6.2f} s  {one['gb_per_second']:5.1f} GB/s  filled by the GPU at "
                f"{one['copied_gb_per_second']:5.1f} GB/s  a launch waited {1e3 * one['median_wait']:.2f} ms, at most "
                f"{1e3 * one['longest_wait']:.0f} ms", flush=True,
            )  # fmt: skip
            if given.json:
                about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "gib": given.gib}
                given.json.write_text(json.dumps({**about, "figures": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
