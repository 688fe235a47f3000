"""Between the driver and the ranks of a run: a board for events and the stop sign, and which failures to retry.

Kept light: the board's process and Ray's controller import this module, and neither needs the training stack.
Ray internals that training needs are here and nowhere else; Ray is pinned.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision, FailurePolicy

from ft_ray.errors import FtRayError, OutOfMemory

__all__ = ["Board", "RetryLostWorkers", "classify", "root_causes"]


class Board:
    """An actor of a run: rank 0 posts events, the driver takes them and may put up the stop sign."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._result: dict[str, Any] = {}
        self._stop = False

    def post(self, event: dict[str, Any]) -> bool:
        """Adds an event; returns whether to stop."""
        if event["kind"] == "result":
            self._result = event
        else:
            self._events.append(event)
        return self._stop

    def take(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events

    def result(self) -> dict[str, Any]:
        return self._result

    def stop(self) -> None:
        self._stop = True


class RetryLostWorkers(FailurePolicy):
    """Ray's policy, except that an error which would only happen again ends the run at once."""

    def __init__(self, usual: FailurePolicy) -> None:
        super().__init__(usual.failure_config)
        self._usual = usual

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        if any(isinstance(classify(cause), FtRayError) for cause in root_causes(training_failed_error)):
            return FailureDecision.RAISE
        return self._usual.make_decision(training_failed_error)


def root_causes(error: BaseException) -> list[BaseException]:
    """The exceptions that ranks raised, without the layers Ray wraps around them."""
    failures = getattr(error, "worker_failures", None)
    found = list(failures.values()) if failures else [getattr(error, "controller_failure", error)]
    causes = []
    for one in found:
        while True:
            inner = one._base_exc if isinstance(one, UserExceptionWithTraceback) else getattr(one, "cause", None)
            if not isinstance(inner, BaseException):
                break
            one = inner
        causes.append(one)
    return causes


def classify(error: BaseException) -> FtRayError | None:
    """The user's error in an exception: itself, out of memory, or None for one that a retry may cure."""
    if isinstance(error, FtRayError):
        return error
    text = f"{type(error).__name__}: {error}"
    signs = ("out of memory", "defaultcpuallocator: can't allocate")
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in signs):
        return OutOfMemory(
            "training ran out of memory: lower batch.per_device or sequence.max_length, "
            "turn gradient_checkpointing on, or use method qlora."
        )
    if isinstance(error, ray.exceptions.OutOfMemoryError) or "memory on the node" in text:
        return OutOfMemory(
            "a worker was ended because its machine ran out of memory: lower batch.per_device or sequence.max_length, "
            "or give the workers more memory."
        )
    return None
