"""A shared base in several processes of one machine: each trains some of the adapters, all have the one base.

A step of a narrow model is hundreds of small operations one after another, which a second thread does not make faster.
What is independent are the adapters. So once the base is loaded the process forks, as a data loader of torch does: the
weights are never written, and so are in memory once (fork(2), copy on write). An adapter alone and packed are equal bit
for bit on such a base, so it does not matter which process it is in.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

from ft_ray.adapter_config import AdapterConfig, HeldOut, Stats, StepResult
from ft_ray.shared_base import Batch, SharedBase

__all__ = ["ForkedBase"]


class ForkedBase:
    """`processes` processes, this one included, that train the adapters of one `SharedBase` side by side.

    Has those of its methods that an engine calls, with the same results. Fork before torch has had more than one thread
    in this process: GNU's OpenMP does not survive it. One caller at a time, but for `stats`.
    """

    def __init__(self, shared: SharedBase, processes: int) -> None:
        self._here = shared
        self.model, self.device = shared.model, shared.device
        self._lanes = [_Child(shared) for _ in range(processes - 1)]
        self._place: dict[str, int] = {}
        self._stats = [shared.stats for _ in range(processes)]
        self._forwards, self._adapters = 0, 0.0

    def attach(self, adapter_id: str, config: AdapterConfig, *, state: Mapping[str, Any] | None = None) -> None:
        """As `SharedBase.attach`, in the process that has the fewest adapters."""
        held = [list(self._place.values()).count(index) for index in range(len(self._lanes) + 1)]
        index = self._place.get(adapter_id, held.index(min(held)))
        self._ask({index: ("attach", adapter_id, config, state and _arrays(state))})
        self._place[adapter_id] = index

    def detach(self, adapter_id: str) -> None:
        self._ask({self._place[adapter_id]: ("detach", adapter_id)})
        del self._place[adapter_id]

    def step(self, batches: Mapping[str, Batch]) -> dict[str, StepResult]:
        """As `SharedBase.step`. Forwards beside one another count as one in `stats`."""
        before = [one.forwards for one in self._stats]
        adapters = sum(one.forwards * one.mean_k for one in self._stats)
        found: dict[str, StepResult] = self._together("step", batches)
        self._forwards += max(one.forwards - then for one, then in zip(self._stats, before, strict=True))
        self._adapters += sum(one.forwards * one.mean_k for one in self._stats) - adapters
        return found

    def evaluate(self, batches: Mapping[str, Batch]) -> dict[str, HeldOut]:
        """As `SharedBase.evaluate`."""
        return self._together("evaluate", batches)

    def snapshot(self, adapter_id: str) -> Callable[[], dict[str, Any]]:
        """As `SharedBase.snapshot`."""
        index = self._place[adapter_id]
        if index == 0:
            return self._here.snapshot(adapter_id)
        state = self._ask({index: ("state_dict", adapter_id)})[index]
        return lambda: {**state, "tensors": {name: torch.from_numpy(a) for name, a in state["tensors"].items()}}

    @property
    def stats(self) -> Stats:
        """Of all processes together; `mean_k` is adapters that train side by side."""
        every = list(self._stats)
        slots = sum(one.tokens / (1 - one.padding) for one in every if one.padding < 1)
        tokens, limits = sum(one.tokens for one in every), [one.k_limit for one in every if one.k_limit is not None]
        return Stats(
            steps=max(one.steps for one in every),
            forwards=self._forwards,
            mean_k=self._adapters / self._forwards if self._forwards else 0.0,
            tokens=tokens,
            trained_tokens=sum(one.trained_tokens for one in every),
            padding=1 - tokens / slots if slots else 0.0,
            out_of_memory=sum(one.out_of_memory for one in every),
            k_limit=min(limits) * len(every) if limits else None,
        )

    def close(self) -> None:
        """Ends the other processes, and gives the model back."""
        for lane in self._lanes:
            lane.close()
        self._here.close()

    def _together(self, method: str, batches: Mapping[str, Batch]) -> dict[str, Any]:
        shares: dict[int, dict[str, Batch]] = {}
        for adapter_id, batch in batches.items():
            shares.setdefault(self._place.get(adapter_id, 0), {})[adapter_id] = batch  # 0 refuses what it has not
        found = self._ask({index: (method, share) for index, share in shares.items()})
        merged = {adapter_id: one for each in found.values() for adapter_id, one in each.items()}
        return {adapter_id: merged[adapter_id] for adapter_id in batches}

    def _ask(self, calls: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Calls by process, all at once. Raises what one of them raised, after all have answered."""
        for index, call in calls.items():
            if index:
                self._lanes[index - 1].send(call)
        answers = {index: _done(self._here, call) for index, call in calls.items() if index == 0}
        answers |= {index: self._lanes[index - 1].answer() for index in calls if index}
        for index, (_, _, stats) in answers.items():
            self._stats[index] = stats
        for _, error, _ in answers.values():
            if error is not None:
                raise error
        return {index: found for index, (found, _, _) in answers.items()}


class _Child:
    """This end of another process."""

    def __init__(self, shared: SharedBase) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(shared, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, call: tuple[Any, ...]) -> None:
        try:
            self.pipe.send(call)
        except OSError as error:
            raise RuntimeError("a process of the sweep's engine has ended.") from error

    def answer(self) -> tuple[Any, BaseException | None, Stats]:
        try:
            found: tuple[Any, BaseException | None, Stats] = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("a process of the sweep's engine has ended.") from error
        return found

    def close(self) -> None:
        self.pipe.close()
        self._process.join(timeout=10)


def _serve(shared: SharedBase, pipe: Connection) -> None:
    """In a forked process: answers until the other end is gone, and ends without what its parent does at its end."""
    # Nothing of the parent's may be held open: Ray sees that a worker has died by its connections.
    for entry in os.listdir("/proc/self/fd"):
        number = int(entry)
        if number > 2 and number != pipe.fileno():
            with contextlib.suppress(OSError):
                os.close(number)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(EOFError, OSError):
        while True:
            found, error, stats = _done(shared, pipe.recv())
            if isinstance(found, dict) and "tensors" in found:
                found = _arrays(found)
            pipe.send((found, error, stats))
    os._exit(0)


def _done(shared: SharedBase, call: tuple[Any, ...]) -> tuple[Any, BaseException | None, Stats]:
    """What the call returns or raises, and the counters after it."""
    method, *given = call
    try:
        if method == "attach":
            adapter_id, config, state = given
            restored = state and {**state, "tensors": {n: torch.from_numpy(a) for n, a in state["tensors"].items()}}
            shared.attach(adapter_id, config, state=restored)
            return None, None, shared.stats
        return getattr(shared, method)(*given), None, shared.stats
    except Exception as error:
        error.__traceback__ = None
        return None, error, shared.stats


def _arrays(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state whose tensors are arrays: a tensor would go through shared memory, which nobody frees after a kill."""
    return {**state, "tensors": {name: tensor.numpy() for name, tensor in state["tensors"].items()}}
