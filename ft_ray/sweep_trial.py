"""A trial of a shared-base sweep as Ray Tune sees it: a thin client that asks an engine for steps and reports.

It imports no torch: its process costs memory and start-up time beside the engine that trains. It never keeps state:
what is true of a trial is in storage, where the engine writes it before the client hears of it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.tune import Checkpoint

__all__ = ["DIVERGED", "POINTER", "Link", "loss_of", "run", "told", "trainable"]

logger = logging.getLogger("ft_ray")

POINTER = "pointer.json"
DIVERGED = 1e4
"""Loss in nats a token that Tune is told of a trial that is not finite: finite, so that searchers can rank it."""
_RENEW_SECONDS = 1.5
_CALL_SECONDS = 120.0
_PATIENCE_SECONDS = 900.0
_LEAVING_SECONDS = 300
# A restarting engine: calls in flight fail with one of these. One that is gone for good is no longer found by name.
_LOST_ENGINE = (RayActorError, GetTimeoutError)


@dataclass(frozen=True)
class Link:
    """Where the engines are: names of actors in a namespace."""

    engines: tuple[str, ...]
    namespace: str


class LostError(Exception):
    """The lease or the engine is gone; the trial goes on from storage."""


def trainable(link: Link) -> Callable[[dict[str, Any]], None]:
    """The Tune function of a sweep on these engines."""
    from ft_ray.sweep_process import Thin  # which only a process of such a trial may import: others need Tune whole

    def trial(config: dict[str, Any]) -> None:
        run(config, link=link)

    trial.__mixins__ = (Thin,)  # type: ignore[attr-defined]
    return trial


def run(config: Mapping[str, Any], *, link: Link) -> None:
    """The Tune trainable. `config["point"]` holds dotted recipe overrides; the trial's id names its states."""
    trial, point = tune.get_context().get_trial_id(), dict(config["point"])
    client = _Client(link, trial, point)
    pointer = told()
    reported = pointer["reported"]
    # Tune reads it here as it gives the process to the next trial: how long it waits for this one's thread. Its 2 s are
    # less than a step may take, and a trial that comes too early fails for good.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(_LEAVING_SECONDS)
    wait = True
    try:
        client.attach()
        client.compare(pointer)
        while True:
            for new in client.points[reported:]:
                reported += 1
                _report(new, reported, client.points)  # an ASHA stop leaves by SystemExit in here
            if client.stopped is not None and reported >= len(client.points):
                _diverged(client)
                return
            at = client.points[-1]["step"] if client.points else 0
            if at >= client.total:
                return
            client.step(next(m for m in (*client.pauses, client.total) if m > at))
    except SystemExit:  # the next trial waits for this thread, and need not for the place: a full engine says so
        wait = False
        raise
    finally:
        client.close(wait=wait)


def told() -> dict[str, Any]:
    """The pointer that Tune kept of this trial: how many points Tune was told, the step and newest state then."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return {"reported": 0}
    with checkpoint.as_directory() as folder:
        found: dict[str, Any] = json.loads((Path(folder) / POINTER).read_text(encoding="utf-8"))
    return found


def loss_of(point: Mapping[str, Any]) -> float:
    """What Tune is told of a point as its validation loss: without validation rows the training loss."""
    if point.get("diverged"):
        return DIVERGED
    found = point["validation_loss"] if point["validation_loss"] is not None else point["train_loss"]
    return float(found) if found is not None else DIVERGED


def _report(point: Mapping[str, Any], reported: int, points: list[dict[str, Any]]) -> None:
    metrics = {k: v for k, v in point.items() if k not in ("checkpoint", "hash")}
    metrics["validation_loss"] = loss_of(point)
    with tempfile.TemporaryDirectory(prefix="ft-ray-pointer-") as folder:
        newest = points[-1]
        pointer = {"reported": reported, "step": point["step"], "tree": newest["checkpoint"], "hash": newest["hash"]}
        (Path(folder) / POINTER).write_text(json.dumps(pointer), encoding="utf-8")
        tune.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def _diverged(client: _Client) -> None:
    """A last word for the searcher, unless the last point said it already."""
    last = client.points[-1]
    if loss_of(last) != DIVERGED:
        metrics = {"step": last["step"], "tokens": last["tokens"], "validation_loss": DIVERGED, "diverged": True}
        tune.report({**metrics, "train_loss": None, "stopped": client.stopped})
    logger.warning("trial %s stopped: %s", client.trial, client.stopped)


class _Client:
    """One trial's side of its lease: finds an engine with a free place, and another one when that is lost."""

    def __init__(self, link: Link, trial: str, point: dict[str, Any]) -> None:
        self.trial, self.point, self.link = trial, point, link
        self.token = uuid.uuid4().hex
        self.points: list[dict[str, Any]] = []
        self.pauses: list[int] = []
        self.total = 0
        self.stopped: str | None = None
        self._engine: Any = None
        self._done = threading.Event()
        threading.Thread(target=self._keep, name="ft-ray-lease", daemon=True).start()

    def attach(self) -> None:
        """Gets a place, waiting for one if need be. Raises RuntimeError when no engine comes back."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:
            for engine in self._by_room():
                with contextlib.suppress(*_LOST_ENGINE):
                    found = ray.get(engine.attach.remote(self.trial, self.point, self.token), timeout=_CALL_SECONDS)
                    if found is not None:
                        self._engine = engine
                        self.points, self.pauses, self.total = found["points"], found["pauses"], found["total"]
                        self.stopped = found["stopped"]
                        return
                    deadline = time.monotonic() + _PATIENCE_SECONDS  # it lives, and others are on it
            time.sleep(0.5)
        raise RuntimeError(f"no engine of the sweep has answered for {_PATIENCE_SECONDS:.0f} s: see Ray's logs.")

    def step(self, until: int) -> None:
        """Waits for at least one new point of the trial, on its way to step `until`."""
        seen = len(self.points)
        try:
            if not self._call("advance", until):
                raise LostError
            while True:
                found = self._call("poll", seen)
                if found.get("lost"):
                    raise LostError
                self.stopped = found["stopped"]
                if found["points"] or self.stopped is not None:
                    self.points = [*self.points, *found["points"]]
                    return
        except (LostError, *_LOST_ENGINE):
            logger.warning("trial %s lost its engine: going on from step %d", self.trial, self._saved_step())
            self.attach()

    def compare(self, pointer: Mapping[str, Any]) -> None:
        """Says where storage has another state at a step than Tune was told of."""
        found = next((p for p in self.points if p["step"] == pointer.get("step") and "hash" in p), None)
        if found is not None and found["hash"] != pointer["hash"]:
            logger.warning("trial %s: its state at step %d is not the one it had reported", self.trial, found["step"])

    def close(self, *, wait: bool) -> None:
        self._done.set()
        if self._engine is not None:
            with contextlib.suppress(RayError, TimeoutError):
                left = self._engine.detach.remote(self.trial, self.token)
                if wait:
                    ray.get(left, timeout=30)

    def _saved_step(self) -> int:
        return int(self.points[-1]["step"]) if self.points else 0

    def _call(self, method: str, *arguments: Any) -> Any:
        return ray.get(getattr(self._engine, method).remote(self.trial, self.token, *arguments), timeout=_CALL_SECONDS)

    def _by_room(self) -> Iterator[Any]:
        """Engines that answer, the emptiest first. Raises RuntimeError when none is left."""
        handles, gone = {}, None
        for index, name in enumerate(self.link.engines):
            try:
                handles[index] = ray.get_actor(name, self.link.namespace)
            except ValueError as error:
                gone = error
        if not handles:
            raise RuntimeError(f"the sweep's engines are gone ({gone}).")
        calls: dict[Any, int] = {handle.load.remote(): index for index, handle in handles.items()}
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=2.0 if len(calls) > 1 else 20.0)
        # Clients that start together see the same free places: each begins with another engine, in the trials' order.
        first = int(number) if (number := self.trial.rpartition("_")[2]).isdecimal() else random.randrange(len(handles))
        rooms: list[tuple[float, int, int]] = []
        for call in done:
            with contextlib.suppress(*_LOST_ENGINE):
                turn = (calls[call] - first) % len(self.link.engines)
                room = ray.get(call)
                rooms.append((-room["free"] / room["slots"], turn, calls[call]))
        yield from (handles[index] for _, _, index in sorted(rooms))

    def _keep(self) -> None:
        """Renews the lease while Tune keeps the trial waiting."""
        while not self._done.wait(_RENEW_SECONDS):
            engine = self._engine
            if engine is not None:
                with contextlib.suppress(RayError):
                    engine.renew.remote(self.trial, self.token)
