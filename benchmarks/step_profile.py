"""Where the time of a few training steps goes: how long the device computed, how long it waited, and what for."""

from __future__ import annotations

from collections import Counter
from typing import Any

__all__ = ["StepProfile"]

_GAPS = (20, 100, 500, float("inf"))  # microseconds


class StepProfile:
    """torch's profiler over `count` steps after step `first`: call `ended` at the end of each step."""

    def __init__(self, first: int, count: int = 3) -> None:
        self.first, self.count = first, count
        self.found: dict[str, Any] = {}
        self._profiler: Any = None

    def ended(self, step: int) -> None:
        import torch

        if step == self.first:
            kinds = torch.profiler.ProfilerActivity
            gpu = torch.cuda.is_available()
            self._profiler = torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if gpu else [kinds.CPU])
            self._profiler.__enter__()
        elif step == self.first + self.count and self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            self.found = self._summary()
            self._profiler = None

    def _summary(self) -> dict[str, Any]:
        """Seconds a step. `busy` counts moments in which several kernels ran once; `waits` are by length in us."""
        from torch._C._autograd import DeviceType

        every = self._profiler.key_averages()
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in self._profiler.events()
            if event.device_type == DeviceType.CUDA
        )
        busy, waits, until = 0.0, Counter[str](), spans[0][0] if spans else 0
        for begin, end in spans:
            if begin > until:
                waits[f"under {next(most for most in _GAPS if begin - until <= most):g} us"] += begin - until
            busy += max(0.0, end - max(begin, until))
            until = max(until, end)

        def largest(field: str) -> list[list[Any]]:
            found = sorted(every, key=lambda one: -getattr(one, field))[:18]
            return [[one.key[:90], round(getattr(one, field) / 1e6 / self.count, 5), one.count] for one in found]

        return {
            "steps": self.count,
            "busy": busy / 1e6 / self.count,
            "waits": {name: round(total / 1e6 / self.count, 5) for name, total in sorted(waits.items())},
            "kernels": largest("self_device_time_total"),
            "host": largest("self_cpu_time_total"),
        }
