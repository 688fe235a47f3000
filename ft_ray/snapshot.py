"""A rank's training state copied to host memory, so that its file is written while training goes on.

Forward and backward passes change neither fp32 weights nor optimizer states. The optimizer's next step does, and waits
for the copy: from a GPU a stream of its own makes it, into pinned memory; from host memory a thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from ft_ray import pinned
from ft_ray.state_files import Piece

__all__ = ["Snapshot"]

# Values of one block of memory, 256 MiB: what grows keeps what it has, and a close waits for one block at most.
_BLOCK = 1 << 26


class Snapshot:
    """Host memory for one state, filled at each save; `optimizers` are those whose steps change what is copied.

    One state is in it at a time: from `take` until `release`.
    """

    def __init__(
        self, device: torch.device, optimizers: Iterable[torch.optim.Optimizer], *, block: int = _BLOCK
    ) -> None:
        self._device, self._block, self._on_gpu = device, block, device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ft-ray-snapshot")
        self._blocks: list[torch.Tensor] = []
        self._room: Future[None] = Future()
        self._room.set_result(None)
        self._wanted = 0
        self._places: dict[tuple[str, Piece], int] = {}
        self._sources: list[torch.Tensor] = []  # alive while they are copied, whatever becomes of the trainer
        self._copy: Any = None  # torch.cuda.Event, or the thread's Future
        self._lock, self._taken, self._closed = threading.Lock(), False, False
        self._hooks = [one.register_step_pre_hook(self._before_step) for one in optimizers]

    def make_room(self, values: int) -> Future[None]:
        """Begins to set memory aside for `values` fp32 values, in the background. What there is grows and is kept."""
        if values > self._wanted:
            self._wanted = values
            self._room = self._thread.submit(self._grow)
        return self._room

    def _grow(self) -> None:
        with ThreadPoolExecutor(pinned.THREADS) as pool:
            while len(self._blocks) * self._block < self._wanted and not self._closed:
                if self._on_gpu:
                    self._blocks.append(pinned.block(self._block, pool, self._device))
                else:
                    self._blocks.append(torch.empty(self._block, dtype=torch.float32))

    def take(self, pieces: Iterable[tuple[str, Piece]], read: Callable[[str, Piece], torch.Tensor]) -> None:
        """Begins to copy what `read` says the values of `pieces` are now, and returns at once if there is room.

        Raises RuntimeError where there is no memory for it; nothing is taken then.
        """
        assert not self._taken, "the last snapshot is not written yet"
        self._places, end = {}, 0
        for kind, piece in pieces:
            self._places[kind, piece] = end
            end += piece.count
        self.make_room(end).result()
        self._sources = [read(kind, piece).detach() for kind, piece in self._places]
        self._taken = True
        if self._stream is None:
            self._copy = self._thread.submit(self._fill)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._fill()
            self._copy = self._stream.record_event(torch.cuda.Event(blocking=True))

    def _fill(self) -> None:
        for source, at in zip(self._sources, self._places.values(), strict=True):
            parts = list(self._parts(at, source.numel()))
            for part, values in zip(parts, source.split([len(part) for part in parts]), strict=True):
                part.copy_(values, non_blocking=True)

    def _parts(self, at: int, count: int) -> Iterator[torch.Tensor]:
        while count:
            block, start = divmod(at, self._block)
            length = min(count, self._block - start)
            yield self._blocks[block].narrow(0, start, length)
            at, count = at + length, count - length

    def _before_step(self, *_: Any) -> None:
        copy = self._copy
        if isinstance(copy, Future):
            copy.result()
        elif copy is not None:  # the device waits, this thread does not
            torch.cuda.current_stream(self._device).wait_event(copy)

    def read(self, kind: str, piece: Piece) -> Iterator[torch.Tensor]:
        """The values of a piece as they were taken, in parts. Waits for the copy; for the thread that writes."""
        assert self._taken, "nothing was taken"
        if isinstance(self._copy, Future):
            self._copy.result()
        else:
            self._copy.synchronize()
        return self._parts(self._places[kind, piece], piece.count)

    def release(self) -> None:
        """What was taken is written, or will not be: its memory may be filled again."""
        with self._lock:
            self._sources, self._copy, self._taken = [], None, False
            if self._closed:
                self._free()

    def close(self) -> None:
        """Nothing more is taken: frees the memory, as soon as what is in it was released."""
        with self._lock:
            self._closed = True
            if not self._taken:
                self._free()

    def _free(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._thread.shutdown()
        if self._stream is not None:
            with contextlib.suppress(RuntimeError):  # a device that failed has said so elsewhere
                self._stream.synchronize()  # a copy that nobody waited for
                pinned.free(self._blocks)
        self._blocks.clear()
