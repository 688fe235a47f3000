"""Tensors of a merge computed and written a block of rows at a time, by as many threads as torch uses.

A block is read, updated, rounded, checked and written while it is in one core's cache. Operations on whole matrices
go through memory for each of them, and their threads wait for one another thousands of times: on a machine that others
use too that took most of a merge's time.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any

import torch

from ft_ray.merge_math import add_rows, check_finite
from ft_ray.safetensors_io import Entry, Writer

__all__ = ["Blocks", "Source"]

_VALUES = {"cpu": 1 << 18, "cuda": 1 << 24}  # of a block: half a megabyte stays in a core's cache; a copy wants more
_ON_GPU = 4  # threads that copy to and from a GPU
_WAITING = {"cpu": 4, "cuda": 1}  # blocks a thread that may wait, each with what it needs in memory

# Elements [start, start + count) of a flattened source tensor.
Source = Callable[[int, int], torch.Tensor]


class Blocks:
    """A pool of threads that write tensors, as a context manager; `finish` waits for all and raises their errors."""

    def __init__(self, device: str) -> None:
        self._device, kind = device, torch.device(device).type
        self._threads = torch.get_num_threads()  # a limit that the user set, or the cores of this process
        workers = self._threads if kind == "cpu" else _ON_GPU
        size = "cpu" if kind == "cpu" else "cuda"
        self._values, self._most = _VALUES[size], _WAITING[size] * workers
        self._pool = ThreadPoolExecutor(workers, "ft-ray-merge", initializer=torch.set_num_threads, initargs=(1,))
        self._running: deque[Future[None]] = deque()

    def write(self, writer: Writer, entry: Entry, source: Source, update: tuple[Any, Any, float] | None) -> None:
        """The tensor `entry` from `source`, plus `update`: lora_A and lora_B in fp32 on the device, and the scaling."""
        rows, width = entry.shape if update else (entry.nbytes // entry.dtype.itemsize, 1)
        # Of one size: a product with a single row would be summed up in another order than one with many.
        count = max(1, -(-rows * width // self._values))
        edges = [rows * i // count for i in range(count + 1)]
        for start, end in pairwise(edges):
            while len(self._running) >= self._most:
                self._running.popleft().result()
            self._running.append(self._pool.submit(self._block, writer, entry, source, update, start, end, width))

    def _block(
        self, writer: Writer, entry: Entry, source: Source, update: tuple[Any, Any, float] | None,
        start: int, end: int, width: int,
    ) -> None:  # fmt: skip
        with torch.inference_mode():
            part = source(start * width, (end - start) * width)
            if update is not None:
                a, b, scaling = update
                part = add_rows(part.to(self._device).view(-1, width), a, b[start:end], scaling, entry.dtype)
            part = part.to(device="cpu", dtype=entry.dtype)
            check_finite(part, entry.name)
            writer.write_part(entry.name, start * width, part)

    def finish(self) -> None:
        while self._running:
            self._running.popleft().result()

    @contextlib.contextmanager
    def of_one_file(self) -> Iterator[None]:
        """All that is given to `write` inside is written at the end; after an error nobody writes any more either."""
        try:
            yield
            self.finish()
        finally:
            for future in self._running:
                future.cancel()
            wait(self._running)
            self._running.clear()  # a failed one holds its block, and through its traceback this pool

    def __enter__(self) -> Blocks:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)  # MKL's number is one of the process, not of a thread
