"""Host memory that a GPU copies to at full speed, set aside without holding up the kernels that training launches.

`torch.empty(pin_memory=True)` has the driver fault in and pin all pages of a block in one call, and launches wait for
it. Huge pages that a few threads have filled before are registered almost at once: 19 GB/s where that took 2.4,
launches waited 0.02 ms where they waited 120 (benchmarks/pinning.py, on an H200's host).
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["Pool", "block", "free", "mapped"]

THREADS = 4  # that fill a block: what was measured


def mapped(values: int) -> torch.Tensor:
    """Ordinary memory for `values` fp32 values, under which no page was put yet; RuntimeError where there is none."""
    try:
        memory = mmap.mmap(-1, 4 * values, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared: small pages
    except OSError as error:
        raise RuntimeError(f"no address space for {4 * values} bytes of host memory ({error})") from None
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    memory.madvise(mmap.MADV_DONTFORK)  # after a fork, this process's next write would move the page from under the GPU
    return torch.frombuffer(memory, dtype=torch.float32)


def block(values: int, pool: ThreadPoolExecutor, device: torch.device) -> torch.Tensor:
    """A block of `values` fp32 zeros [values], pinned for `device`; `free` it. `pool` fills and pins it.

    Raises RuntimeError where there is no memory or the driver pins no more.
    """
    made = mapped(values)
    list(pool.map(torch.Tensor.zero_, made.chunk(THREADS)))
    # On a thread that launches nothing: CUDA keeps a failure for the next launch of the thread that met it.
    pool.submit(_register, made, device).result()
    return made


def _register(made: torch.Tensor, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(made.data_ptr(), made.nbytes, 0)))


def free(blocks: Iterable[torch.Tensor]) -> None:
    """Unpins blocks that nothing copies to any more; their memory goes with the last tensor that shows it."""
    for one in blocks:
        torch.cuda.cudart().cudaHostUnregister(one.data_ptr())


class Pool:
    """Pinned copies of `values` fp32 values each. The memory of one that nobody holds any more takes the next one.

    What was pinned stays so, up to `most` bytes: nothing else can have it, nor can it be swapped out.
    """

    def __init__(self, values: int, device: torch.device, *, most: int = 8 << 30) -> None:
        self._values, self._device, self._left = values, device, max(1, most // (4 * values))
        self._blocks: list[torch.Tensor] = []
        self._free: list[torch.Tensor] = []
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="ft-ray-pinned")
        weakref.finalize(self, _end, self._blocks, self._threads).atexit = False  # the process takes all with it

    def copy(self, source: torch.Tensor) -> torch.Tensor:
        """`source` [values] as it is now; returns once it is there. RuntimeError where no more is pinned."""
        if not self._free:
            self._grow()
        held = self._free.pop()
        out = held.view(-1)  # a tensor of its own: its end is the caller's last use
        weakref.finalize(out, self._free.append, held).atexit = False
        out.copy_(source)
        return out

    def _grow(self) -> None:
        if self._left <= 0:
            raise RuntimeError("all that may be pinned is in use")
        self._left -= 1
        try:
            made = block(self._values, self._threads, self._device)
        except RuntimeError:
            self._left = 0  # asked once: it would fill the memory each time, and fail
            raise
        self._blocks.append(made)
        self._free.append(made)


def _end(blocks: list[torch.Tensor], threads: ThreadPoolExecutor) -> None:
    threads.shutdown(wait=False)
    free(blocks)
