"""Between the driver and the ranks of a run: a board for events and the stop sign, and which failures to retry.

Kept light: the board's process and Ray's controller import this module, and neither needs the training stack.
Ray internals that training needs are here and nowhere else; Ray is pinned.
"""

from __future__ import annotations

import errno
from typing import Any

import fsspec
import ray
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision, FailurePolicy

from ft_ray.errors import FtRayError, OutOfMemory, StorageError
from ft_ray.storage_faults import disk_full, full_message, redacted

__all__ = ["RAY_RECORDS", "Board", "RetryLostWorkers", "classify", "ray_records", "root_causes"]

RAY_RECORDS = "/ft-ray"


def ray_records() -> FileSystem:
    """Where Ray Train keeps records of its own (at RAY_RECORDS): each process's memory.

    Ray must believe that it manages the checkpoints: it counts which rank's upload is done. What it writes for
    that (a snapshot a report, a marker) nobody needs, ours are the commit; on the user's storage a full disk or
    an outage would end the run in Ray's controller, where nothing retries.
    """
    return PyFileSystem(FSSpecHandler(fsspec.filesystem("memory")))


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


def classify(error: BaseException, storage: str = "the run's storage") -> FtRayError | None:
    """The user's error in an exception: itself, a full disk, out of memory, or None for one that a retry may cure.

    `storage` is the address to name where the error itself does not say which disk is full.
    """
    if isinstance(error, FtRayError):
        return error
    text = f"{type(error).__name__}: {error}"
    if disk_full(error) or "PytorchStreamWriter failed writing" in text:
        where = getattr(error, "filename", None) or f"{storage} or on the worker's own disk"
        return StorageError(redacted(full_message("saving", str(where))))
    if getattr(error, "errno", None) == errno.EROFS or "read-only file system" in text.lower():
        where = getattr(error, "filename", None) or storage
        return StorageError(redacted(f"saving: {where} is read-only: set storage to a place you may write to."))
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
