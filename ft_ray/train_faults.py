"""What a run does when a rank is lost: which failures are tried again, how often, and how they are told.

Lives in Ray Train's controller. A machine that is taken back (a drained node, a process that is told to end) does not
count as a failure; room that is missing is waited for, since an autoscaler or a person may bring it.
"""

from __future__ import annotations

import math
from typing import Any

import ray
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling.default import _is_preemption_failure
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision, FailurePolicy
from ray.train.v2.api.exceptions import ControllerError, PreemptionError

from ft_ray.errors import FtRayError
from ft_ray.train_control import ToldToEnd, classify, root_causes

__all__ = ["MOST_PREEMPTIONS", "RetryLostWorkers", "controller_lost", "describe", "start_timeout"]

_START_TIMEOUT = 60.0
MOST_PREEMPTIONS = 100  # machines taken back in one run: more is a place where no run ends
_NODE_LOST = ("node has died", "node was terminated", "node is dead", "node died")
_PEER_LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "connection refused")


def start_timeout(wait: float) -> float:
    """Seconds for which Ray waits for room at a time, before it asks the policy, out of `wait` in all."""
    return min(_START_TIMEOUT, wait)


class RetryLostWorkers(FailurePolicy):
    """Lost ranks and starts that failed are tried again; an error which would only happen again ends the run at once.

    Of machines taken back Ray's own policy (`usual`) keeps count; all else counts together, against its `max_failures`:
    Ray by itself would start workers that die while they start for ever. `board` (an actor) is told what was lost;
    `wait` bounds the seconds in which room for all workers must come up.
    """

    def __init__(self, usual: FailurePolicy, board: Any = None, *, wait: float = 900.0, what: str = "") -> None:
        super().__init__(usual.failure_config)
        self._usual, self._board, self._wait, self._what = usual, board, wait, what
        self._waited = 0.0
        self._told = self._failed = 0

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        causes = root_causes(training_failed_error)
        if any(isinstance(classify(cause), FtRayError) for cause in causes):
            return FailureDecision.RAISE
        if any(isinstance(cause, WorkerGroupStartupTimeoutError) for cause in causes):
            return self._room_is_missing()
        self._waited = 0.0
        counts = False
        if any(isinstance(cause, ToldToEnd) for cause in causes):
            self._told += 1
            decision = FailureDecision.RETRY if self._told <= MOST_PREEMPTIONS else FailureDecision.RAISE
        elif _is_preemption_failure(training_failed_error):
            decision = self._usual.make_decision(training_failed_error)
        elif isinstance(training_failed_error, ControllerError) and not _of_a_start(training_failed_error):
            return FailureDecision.RAISE
        else:
            counts = True
            self._failed += 1
            again = self._failed <= self.failure_config.max_failures
            decision = FailureDecision.RETRY if again else FailureDecision.RAISE
        if decision is FailureDecision.RETRY:
            self._post({"kind": "lost", "what": describe(training_failed_error), "counts": counts})
        return decision

    def _room_is_missing(self) -> FailureDecision:
        self._waited += start_timeout(self._wait)
        if self._waited >= self._wait:
            return FailureDecision.RAISE
        message = (
            f"waiting for room for {self._what}: {self._waited / 60:.0f} of {math.ceil(self._wait / 60)} minutes "
            f"(resources.wait), {room()}"
        )
        self._post({"kind": "status", "message": message})
        return FailureDecision.RETRY

    def _post(self, event: dict[str, Any]) -> None:
        if self._board is not None:
            self._board.post.remote(event)


def _of_a_start(error: ControllerError) -> bool:
    """Whether workers died or failed while they started: a port that was taken, ranks that did not find one another."""
    kinds = (WorkerGroupStartupFailedError, ray.exceptions.RayActorError, ray.exceptions.RayTaskError)
    return isinstance(error.controller_failure, kinds)


def room() -> str:
    """What the cluster has and what is free of it, in words."""
    have, free = ray.cluster_resources(), ray.available_resources()
    parts = [f"{free.get(k, 0):g} of {have.get(k, 0):g} {k}s free" for k in ("CPU", "GPU") if k == "CPU" or k in have]
    return "the cluster has " + ", ".join(parts)


def controller_lost(error: BaseException) -> bool:
    """Whether the controller's own process went, which nobody in Ray starts again: not an error that it raised."""
    gone = isinstance(error, ray.exceptions.RayActorError) and not isinstance(error, ray.exceptions.RayTaskError)
    return gone and classify(error) is None


def describe(error: Any) -> str:
    """What was lost, by rank: the rank that died or hung rather than those that noticed."""
    if isinstance(error, PreemptionError):
        return f"the machine of {_ranks(error.preemption_info.preempted_ranks)} was taken back"
    if controller_lost(error):
        return "Ray Train's controller lost its process"
    leaving = [cause for cause in root_causes(error) if isinstance(cause, ToldToEnd)]
    if leaving:
        return str(leaving[0])
    failures = getattr(error, "worker_failures", None) or {}
    told: dict[str, list[int]] = {}
    for rank, failure in failures.items():
        cause = root_causes(failure)[0]
        told.setdefault(_kind(failure, cause), []).append(rank)
    first = [kind for kind in _ORDER if kind in told] or list(told)
    if not first:
        cause = root_causes(error)[0]
        said = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        started = not (isinstance(error, ControllerError) and _of_a_start(error))
        return f"{'Ray failed' if started else 'the workers did not start'}: {said}"[:300]
    return f"{_ranks(told[first[0]])} {first[0]}"


_ORDER = (
    "did not answer any more",
    "lost its machine",
    "lost its process",
    "waited for another rank in vain",
    "lost the connection to another rank",
)


def _kind(failure: Any, cause: BaseException) -> str:
    text = str(cause).lower()
    if isinstance(failure, WorkerHealthCheckTimeoutError):
        return _ORDER[0]
    if isinstance(cause, ray.exceptions.RayActorError):
        gone = any(sign in text for sign in _NODE_LOST) or getattr(cause, "preempted", False)
        return _ORDER[1] if gone else _ORDER[2]
    if any(sign in text for sign in _PEER_LOST):
        return _ORDER[4]
    if "timed out" in text or "timeout" in text:
        return _ORDER[3]
    first = next((line for line in str(cause).splitlines() if line.strip()), "")
    return f"failed ({type(cause).__name__}: {first})"[:200]


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(str(rank) for rank in sorted(ranks))
