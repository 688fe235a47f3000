"""Between the driver and the ranks of a run: a board for events and the stop sign, and whose error an exception is.

Also what ends a rank before its time: a machine that is taken back, and SIGTERM.

Kept light: the board's process and Ray's controller import this module, and neither needs the training stack.
Ray internals that training needs are here, in `train_faults` and in `upload`, and nowhere else; Ray is pinned.
"""

from __future__ import annotations

import errno
import signal
import threading
from types import FrameType
from typing import Any

import fsspec
import ray
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ft_ray.errors import FtRayError, OutOfMemory, StorageError
from ft_ray.local_files import STAGED
from ft_ray.storage_faults import disk_full, full_message, redacted

__all__ = [
    "RAY_RECORDS",
    "Board",
    "HearSigterm",
    "ToldToEnd",
    "classify",
    "machines_that_go",
    "open_board",
    "ray_records",
    "root_causes",
    "told_to_end",
]

RAY_RECORDS = "/ft-ray"


def ray_records() -> FileSystem:
    """Where Ray Train keeps records of its own (at RAY_RECORDS): each process's memory.

    Ray must believe that it manages the checkpoints: it counts which rank's upload is done. What it writes for
    that (a snapshot a report, a marker) nobody needs, ours are the commit; on the user's storage a full disk or
    an outage would end the run in Ray's controller, where nothing retries.
    """
    return PyFileSystem(FSSpecHandler(fsspec.filesystem("memory")))


def machines_that_go() -> frozenset[str]:
    """In a rank: the nodes with ranks of which Ray said that they are being taken back (drained).

    Read from this worker's own context: `ray.train.get_preemption_info` is a barrier of all ranks at every step.
    """
    info = get_train_context().preemption_context.preemption_info
    return frozenset(info.preempted_node_ids) if info is not None else frozenset()


_told_to_end = threading.Event()


def told_to_end() -> bool:
    """In a rank: whether this process was sent SIGTERM."""
    return _told_to_end.is_set()


class ToldToEnd(Exception):
    """Raised by every rank once the checkpoint is committed that one rank's SIGTERM called for."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        super().__init__(rank)

    def __str__(self) -> str:
        return f"rank {self.rank} was told to end (SIGTERM)"


class HearSigterm(WorkerCallback):
    """In each rank, before training: SIGTERM asks for a checkpoint, a second one ends the process as Ray would.

    What takes a machine back without telling Ray (a container's stop, a batch system, an operator) sends SIGTERM and
    kills some seconds later. Ray's own handler leaves at once. Python runs handlers in the main thread, which in a
    worker waits inside Ray's core and comes back to Python each time that the controller asks how it is, once or
    more a second; training has a thread of its own.
    """

    def after_init_train_context(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # nothing could be set: SIGTERM stays a death
        _told_to_end.clear()
        rays = signal.getsignal(signal.SIGTERM)

        def note(number: int, frame: FrameType | None) -> None:
            if _told_to_end.is_set() and callable(rays):
                rays(number, frame)
            _told_to_end.set()

        signal.signal(signal.SIGTERM, note)


class Board:
    """An actor of a run: rank 0 and the controller post events, the driver takes them and may put up the stop sign."""

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


def open_board(**options: Any) -> Any:
    """A board on this process's own node: wherever else it were, a lost node could take it from a run that goes on."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0)(Board)
    return actor.options(scheduling_strategy=here, **options).remote()


def root_causes(error: BaseException) -> list[BaseException]:
    """The exceptions that ranks raised, without the layers Ray wraps around them."""
    failures = getattr(error, "worker_failures", None)
    found = list(failures.values()) if failures else [getattr(error, "controller_failure", error)]
    causes = []
    for one in found:
        while True:
            if isinstance(one, UserExceptionWithTraceback):
                inner: Any = one._base_exc
            elif isinstance(one, WorkerHealthCheckFailedError):
                inner = one.health_check_failure
            else:
                inner = getattr(one, "cause", None)
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
        where = str(getattr(error, "filename", None) or f"{storage} or on the worker's own disk")
        if f"/{STAGED}" in where:  # a shard on its way, which no other storage would help
            where = f"{where.partition(f'/{STAGED}')[0]} of a worker's machine"
            remedy = "free space there or set TMPDIR to a folder on another disk"
            return StorageError(full_message("saving", where, remedy))
        return StorageError(redacted(full_message("saving", where)))
    if getattr(error, "errno", None) == errno.EROFS or "read-only file system" in text.lower():
        where = getattr(error, "filename", None) or storage
        return StorageError(redacted(f"saving: {where} is read-only: set storage to a place you may write to."))
    # NCCL names its call that failed, not why: there was no room for its buffers (seen on a card with 3 GiB left).
    signs = ("out of memory", "defaultcpuallocator: can't allocate", "failed to cuda calloc", "failed to cuda malloc")
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
