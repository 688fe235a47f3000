"""The engine of a sweep: one frozen base on one device, in an actor; trials lease places on it.

A thread steps every adapter that has not reached its target, all together; adapters join and leave between steps, and
a paused one is never waited for. At its marks a trial is measured, its state is written to storage in the background,
and only then does its client hear of it. A lease that is not renewed ends, and its slot is free. A restarted engine
knows nothing: clients come back, and their trials go on from storage.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from ft_ray import search_space, sweep_base, sweep_data, sweep_states, sweep_steps
from ft_ray.adapter_config import HeldOut
from ft_ray.errors import FtRayError, TrainingError
from ft_ray.forward_groups import out_of_memory
from ft_ray.manifest import key_of
from ft_ray.recipe import Recipe
from ft_ray.segments import MicroBatch
from ft_ray.storage import Store
from ft_ray.sweep_counters import Counters
from ft_ray.sweep_lease import EngineSetup, Lease, Muster, with_pointer
from ft_ray.sweep_writer import Lanes, StateWriter

__all__ = ["Engine", "EngineSetup"]

logger = logging.getLogger("ft_ray")

LEASE_SECONDS = 6.0
_SAVES_AT_ONCE = 2
_LANES = 4
"""Threads that write states on a GPU's host: one writes and hashes 1 GB/s of them, and eight adapters of a 1B base are
3.5 GB a mark. On CPUs the cores train."""
_STATS_EVERY = 2.0


class Engine:
    """An async Ray actor. Every method but `ready` answers at once or within `wait` seconds."""

    def __init__(self, setup: EngineSetup) -> None:
        self.setup = setup
        self._store = Store(setup.store)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._trials: dict[str, Lease] = {}
        self._commands: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._wake = threading.Condition()
        self._arriving: set[str] = set()  # trials whose attaching waits for the thread
        self._io = Lanes(1 if setup.device == "cpu" else _LANES)
        self._ready: Future[None] = Future()
        self._fault: BaseException | None = None
        self._counters = Counters(self._store, setup.index)
        self._stats_written = 0.0
        self._spent = {"stepping": 0.0, "measuring": 0.0, "copying": 0.0, "waiting": 0.0}
        self._muster = Muster(setup.expect, idle_costs=setup.device == "cpu")
        threading.Thread(target=self._main, name="ft-ray-engine", daemon=True).start()

    # What clients and the driver call

    async def ready(self) -> dict[str, Any]:
        """Waits for the base. Returns slots and device; raises what loading raised."""
        await _shielded(self._ready)
        return {"slots": self._slots, "device": str(self._shared.device)}

    async def load(self) -> dict[str, int]:
        """Free places, for a client that looks for one."""
        await _shielded(self._ready)
        return {"free": self._slots - len(self._taken()), "slots": self._slots}

    async def attach(self, trial: str, point: dict[str, Any], token: str) -> dict[str, Any] | None:
        """Leases a place and takes the trial up where storage has it. None when the engine is full.

        Returns the trial's `total` steps, the `pauses` at which to wait for the scheduler, and its `points` so far.
        A trial that is attached already goes over to the new token: its client was lost.
        """
        await _shielded(self._ready)
        self._loop = asyncio.get_running_loop()
        self._check()
        taken = self._taken()
        if trial not in taken and len(taken) >= self._slots:
            return None
        self._arriving.add(trial)
        try:
            recipe = search_space.apply(self.setup.recipe, point)
            key = self._key(point)
            # Looked up for one that is attached too: an earlier client's `detach` may come before the command's turn.
            saved = await _shielded(self._io.submit(trial, sweep_states.newest, self._store, trial, key=key))
            found: dict[str, Any] | None = await self._command(lambda: self._attach(trial, recipe, key, token, saved))
        finally:
            self._arriving.discard(trial)
        return found

    async def advance(self, trial: str, token: str, until: int) -> bool:
        """Asks for steps up to `until`. False when the lease is lost."""
        found = self._lease(trial, token)
        if found is None:
            return False
        found.target = max(found.target, until)
        self._muster.arrived()
        self._notify()
        return True

    async def poll(self, trial: str, token: str, seen: int, wait: float = 1.0) -> dict[str, Any]:
        """Points from number `seen` on, at the latest after `wait` seconds; renews the lease. `lost` without one."""
        found = self._lease(trial, token)
        if found is None:
            return {"lost": True}
        found.changed.clear()
        if len(found.reported) <= seen and found.fault is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(found.changed.wait(), wait)
        self._check()
        if found.fault is not None:
            raise TrainingError(found.fault)
        done = found.stopped if found.saving == 0 else None
        return {"points": found.reported[seen:], "stopped": done, "step": found.step}

    async def renew(self, trial: str, token: str) -> bool:
        return self._lease(trial, token) is not None

    async def detach(self, trial: str, token: str) -> None:
        """Gives the place back, once what is being saved is saved. Of its states the newest and the best stay."""
        found = self._lease(trial, token)
        if found is not None:
            await self._command(lambda: self._detach(found))
            await _shielded(self._io.submit(trial, self._writer.ended, trial, found.history))

    async def stats(self) -> dict[str, Any]:
        """Counters since the sweep began; empty while the base is loaded."""
        self._check()
        return self._stats() if self._ready.done() else {}

    async def trials(self) -> list[str]:
        """Ids of the trials that hold a lease."""
        return sorted(self._trials)

    # Inside: the event loop's side

    def _taken(self) -> set[str]:
        """Trials that have a place or are getting one. They count at once: clients that start together ask together.

        One whose client has gone does not, though its place is cleared between two steps only, which may take long.
        """
        now = time.monotonic()
        held = [name for name, trial in list(self._trials.items()) if now - trial.renewed <= LEASE_SECONDS]
        return {*held, *self._arriving}

    def _check(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _lease(self, trial: str, token: str) -> Lease | None:
        self._check()
        found = self._trials.get(trial)
        if found is None or found.token != token:
            return None
        found.renewed = time.monotonic()
        return found

    async def _command(self, work: Callable[[], Any]) -> Any:
        """Runs `work` in the engine's thread, between steps."""
        future: Future[Any] = Future()
        with self._wake:
            self._commands.append((work, future))
            self._wake.notify()
        return await _shielded(future)

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _tell(self, trial: Lease) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(trial.changed.set)

    def _key(self, point: dict[str, Any]) -> str:
        """What a saved state must agree in to be this trial's."""
        setup = self.setup
        return key_of(point, setup.recipe.hash, setup.files.hash, getattr(setup.prepared, "hashes", None))

    # Inside: the engine's thread

    def _main(self) -> None:
        try:
            self._open()
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        try:
            while True:
                self._turn()
        except BaseException as error:
            logger.exception("the engine stops")
            ours = isinstance(error, FtRayError)
            if not ours and self._counters.may_fail_again(self._shared.stats):
                self._writer.save_stats(self._counters.path, self._stats())
                os._exit(1)  # what the device or a library did may be over: Ray starts this actor again
            what = f"{type(error).__name__}: {error}"[:300]
            self._fault = error if ours else TrainingError(f"the sweep's engine failed ({what}).")
            for _, future in self._commands:
                future.set_exception(self._fault)
            for trial in self._trials.values():
                self._tell(trial)

    def _open(self) -> None:
        base = sweep_base.load(self.setup)
        self.setup, self._rows, self._shared = base.setup, base.rows, base.shared
        self._slots, self._most, self._measured = base.slots, base.most, base.measured
        self._writer = StateWriter(self._store, self._shared.model, base.identity)
        self._counters.load()

    def _turn(self) -> None:
        """One round: what was asked, leases that ended, then a step of all that are to go on, and their marks."""
        with self._wake:
            if not self._commands and not self._due():
                self._muster.idle()
                with self._timed("waiting"):
                    self._wake.wait(0.5)
            commands, self._commands = self._commands, []
        now = time.monotonic()
        # Before what was asked, which may be for one of their places; but a trial that is asked for again goes on.
        again = set(self._arriving)
        for trial in [t for t in list(self._trials.values()) if now - t.renewed > LEASE_SECONDS and t.id not in again]:
            logger.warning("trial %s: its client no longer answers; its place is free", trial.id)
            self._detach(trial)
        for work, future in commands:
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)
        due = self._due()
        if due and self._muster.wait(len(due), len(self._trials)):
            with self._timed("waiting"):
                time.sleep(Muster.PAUSE)
        elif due:
            self._step(due)
        if now - self._stats_written > _STATS_EVERY and self._shared.stats.forwards:
            self._stats_written = now
            self._io.submit("", self._writer.save_stats, self._counters.path, self._stats())

    def _due(self) -> list[Lease]:
        return [
            t for t in list(self._trials.values())
            if t.step < t.target and t.stopped is None and t.fault is None and t.saving < _SAVES_AT_ONCE
        ]  # fmt: skip

    def _attach(
        self, trial: str, recipe: Recipe, key: str, token: str, saved: sweep_states.SavedTrial | None
    ) -> dict[str, Any] | None:
        found = self._trials.get(trial)
        if found is None:
            if len(self._trials) >= self._slots:
                return None
            found = self._lease_out(trial, recipe, key, token, saved)
            if found is None:
                return None
        else:
            found.token, found.renewed = token, time.monotonic()
        return {
            "total": found.marks[-1],
            "pauses": sweep_steps.pauses(self.setup.space, found.marks, self._most),
            "points": list(found.reported),
            "stopped": found.stopped,
        }

    def _lease_out(
        self, trial: str, recipe: Recipe, key: str, token: str, saved: sweep_states.SavedTrial | None
    ) -> Lease | None:
        config = sweep_data.adapter_config(recipe, self._rows)
        marks = sweep_steps.marks(self.setup.space, recipe, self._rows, self._most)
        batch = sweep_base.batch_of(recipe, self.setup.device)
        state = None
        try:
            if saved is not None:
                state = sweep_states.load_tensors(self._store, saved)
            self._shared.attach(trial, config, state=state)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, FtRayError) or not out_of_memory(error):
                raise
            if not self._trials:
                raise TrainingError(
                    f"an adapter of rank {config.r} does not fit in memory beside the base on {self._shared.device}: "
                    "lower lora.r in the space, or quantize the base (method: qlora)."
                ) from error
            self._slots = len(self._trials)
            logger.warning("no memory for one more adapter: %d at a time from here on", self._slots)
            return None
        found = Lease(trial, token, recipe, key, config, marks, batch.per_device, time.monotonic())
        if saved is not None:
            record = saved.record
            found.step, found.tokens, found.stopped = saved.step, record["tokens"], record["stopped"]
            found.history = list(record["history"])
            found.reported = with_pointer(found.history, saved)
        found.target = found.step
        self._trials[trial] = found
        return found

    def _detach(self, trial: Lease) -> None:
        if self._trials.get(trial.id) is trial:
            del self._trials[trial.id]
            self._shared.detach(trial.id)
            self._tell(trial)

    def _step(self, due: Sequence[Lease]) -> None:
        with self._timed("stepping"):
            results = self._shared.step(
                {t.id: self._rows.batch(sweep_data.rows_at(t.recipe, self._rows, t.step), t.per_forward) for t in due}
            )
        marked = []
        for trial in due:
            result = results[trial.id]
            if result.stopped is not None:
                trial.stopped = f"{result.stopped} (learning rate {result.lr:.3g})"
                self._mark(trial, None)
                continue
            trial.step = result.step
            trial.tokens += result.tokens
            trial.losses.append(result.loss)
            if trial.step in trial.marks:
                marked.append(trial)
        if marked:
            with self._timed("measuring"):
                held_out = self._evaluate(marked)
            for trial in marked:
                self._mark(trial, held_out.get(trial.id))

    def _evaluate(self, trials: Sequence[Lease]) -> dict[str, HeldOut]:
        batches: dict[str, Sequence[MicroBatch]] = {
            t.id: self._rows.validation(self._measured * t.per_forward) for t in trials
        }
        return self._shared.evaluate({i: b for i, b in batches.items() if b})

    def _mark(self, trial: Lease, held_out: HeldOut | None) -> None:
        """A trial is at a mark (or has just stopped): its point and state go to storage."""
        train = math.fsum(trial.losses) / len(trial.losses) if trial.losses else None
        loss = math.nan if trial.stopped is not None else held_out.loss if held_out else None
        point = sweep_states.point_of(trial.step, loss, train, trial.tokens)
        trial.losses = []
        if not trial.history or trial.history[-1]["step"] < trial.step or trial.stopped is None:
            trial.history.append(point)
        with self._timed("copying"):
            state = self._shared.snapshot(trial.id)
        record = {
            "key": trial.key,
            "total": trial.marks[-1],
            "tokens": trial.tokens,
            "stopped": trial.stopped,
            "history": list(trial.history),
        }
        trial.saving += 1
        self._io.submit(trial.id, self._save, trial, trial.step, state, record)

    # Inside: the threads that write

    def _save(
        self, trial: Lease, step: int, snapshot: Callable[[], dict[str, Any]], record: dict[str, Any]
    ) -> None:
        self._writer.save(trial, step, snapshot, record)
        trial.saving -= 1
        self._tell(trial)
        self._notify()

    def _stats(self) -> dict[str, Any]:
        return self._counters.all(self._shared.stats, str(self._shared.device), len(self._trials), self._spent)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._spent[what] += time.monotonic() - began


async def _shielded(future: Future[Any]) -> Any:
    """Waits for a future of another thread; when the waiting client is lost, the work goes on."""
    return await asyncio.shield(asyncio.wrap_future(future))
