"""Several engines of one sweep: clients spread evenly; states are copied at once and written later."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ft_ray import sweep_counters, sweep_engine, sweep_engines, sweep_lease, sweep_states, sweep_trial
from ft_ray.adapter_config import Stats
from ft_ray.adapter_stack import Bucket, TargetShape
from ft_ray.errors import TrainingError
from ft_ray.storage import Store
from ft_ray.sweep_counters import Counters
from ft_ray.sweep_engine import LEASE_SECONDS, Engine
from ft_ray.sweep_lease import Muster
from ft_ray.sweep_trial import Link, _Client
from ft_ray.sweep_writer import Lanes


class _Handle:
    """An engine as a client sees it."""

    def __init__(self, room: dict[str, int]) -> None:
        self.load = self
        self.room = room

    def remote(self) -> _Handle:
        return self


def _chosen(monkeypatch: pytest.MonkeyPatch, trial: str, rooms: list[dict[str, int]]) -> int:
    """The engine that the client of `trial` asks first."""
    handles = {f"engine-{index}": _Handle(room) for index, room in enumerate(rooms)}
    monkeypatch.setattr(sweep_trial.ray, "get_actor", lambda name, namespace: handles[name])
    monkeypatch.setattr(sweep_trial.ray, "wait", lambda calls, **_: (calls, []))
    monkeypatch.setattr(sweep_trial.ray, "get", lambda call, **_: call.room)
    client = _Client(Link(tuple(handles), "test"), trial, {})
    client.close(wait=False)
    return list(handles.values()).index(next(iter(client._by_room())))


def test_clients_that_see_the_same_room_spread_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    room = {"free": 8, "slots": 8}
    chosen = Counter(_chosen(monkeypatch, f"ab12_{i:05d}", [room, room]) for i in range(16))
    assert chosen == {0: 8, 1: 8}


def test_an_engine_whose_machine_is_gone_does_not_hold_up_the_word_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Actor:
        """Both methods are asked of it as of a Ray actor; one that is `gone` never answers."""

        def __init__(self, gone: bool) -> None:
            self.gone, self.asked, self.ready, self.stats = gone, 0, self, self

        def remote(self) -> tuple[Actor, int]:
            self.asked += 1
            return self, self.asked

    actors = [Actor(gone=False), Actor(gone=True)]
    monkeypatch.setattr(
        sweep_engines.ray, "wait", lambda calls, **_: ([c for c in calls if not c[0].gone], [])
    )
    monkeypatch.setattr(sweep_engines.ray, "get", lambda call, **_: {"forwards": call[1]})
    engines = sweep_engines.Engines(actors, Link(("a", "b"), "test"), 1)  # has asked both whether they are ready
    assert [engines.stats() for _ in range(3)] == [[{"forwards": 2}], [{"forwards": 3}], [{"forwards": 4}]]
    assert actors[1].asked == 2, "asked once, and not again while it does not answer"


def test_the_emptiest_engine_comes_first_whatever_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = [{"free": 6, "slots": 8}, {"free": 7, "slots": 14}, {"free": 0, "slots": 1}]
    assert {_chosen(monkeypatch, f"t_{i}", rooms) for i in range(3)} == {0}


def test_one_trial_is_written_in_order_and_another_one_beside_it() -> None:
    lanes, written, go = Lanes(2), list[Any](), threading.Event()
    first = lanes.submit("a", lambda: (go.wait(10), written.append(1)))
    second = lanes.submit("a", written.append, 2)
    lanes.submit("b", written.append, "b").result(timeout=10)
    assert written == ["b"] and not second.done()
    go.set()
    second.result(timeout=10)
    assert first.done() and written == ["b", 1, 2]


def test_a_copied_row_is_of_the_moment_it_was_copied() -> None:
    bucket = Bucket(8, [TargetShape("q", 16, 24, 0), TargetShape("v", 16, 4, 0)], torch.device("cpu"), torch.float32)
    bucket.add("x")
    bucket.initialise(bucket.add("y"), 5, seed=0)
    expected = {}
    for name, a, b in bucket.matrices("weights", 1, 5):
        expected |= {f"{name}.A": a.clone(), f"{name}.B": b.clone()}
    row = bucket.copy("weights", 1)
    bucket.weights.add_(1.0)
    found = bucket.cut(row, 5)
    assert found.keys() == expected.keys()
    assert all(t.is_contiguous() and torch.equal(t, expected[name]) for name, t in found.items())
    assert found["q.A"].shape == (5, 16) and found["v.B"].shape == (4, 5)


@pytest.mark.parametrize(("idle_costs", "together"), [(True, 7), (False, 8)])
def test_a_gpu_waits_for_a_trial_that_comes_a_second_late(
    monkeypatch: pytest.MonkeyPatch, idle_costs: bool, together: int
) -> None:
    """One step apart, each mark is measured twice: what is a second once on a GPU is cores' time on a CPU."""
    now = [100.0]
    monkeypatch.setattr(sweep_lease, "time", SimpleNamespace(monotonic=lambda: now[0]))
    muster, here = Muster(8, idle_costs=idle_costs), 0
    for at in (100.0, 100.1, 100.2, 100.3, 100.4, 100.5, 100.6, 102.0):
        while now[0] < at and here:
            if not muster.wait(here, here):
                break
            now[0] += Muster.PAUSE
        if here and not muster._first:
            break
        now[0] = max(now[0], at)
        here += 1
        muster.arrived()
    assert here == together
    assert not muster.wait(8, 8)


class _Full:
    """A shared base without room for one more."""

    device = "cuda:0"

    def attach(self, *given: Any, **also: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def detach(self, trial: str) -> None:
        pass


def _engine(trials: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine with two places and no thread of its own. `trials`: seconds since each one's client was heard."""
    engine: Any = object.__new__(Engine)
    engine._trials = {name: SimpleNamespace(id=name, renewed=time.monotonic() - ago) for name, ago in trials.items()}
    engine._arriving, engine._slots, engine._shared, engine._rows = set(), 2, _Full(), None
    engine._ready, engine._fault = Future(), None
    engine._ready.set_result(None)
    engine.setup = SimpleNamespace(space=None, device="cuda")
    engine._most = 1
    monkeypatch.setattr(sweep_engine.sweep_data, "adapter_config", lambda *_: SimpleNamespace(r=64))
    monkeypatch.setattr(sweep_engine.sweep_steps, "marks", lambda *_: [1])
    monkeypatch.setattr(sweep_engine.sweep_base, "batch_of", lambda *_: SimpleNamespace(per_device=1))
    return engine


def test_a_place_is_free_when_its_lease_is_over_however_long_the_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine({"alive": 1.0, "lost": LEASE_SECONDS + 0.1}, monkeypatch)
    assert asyncio.run(engine.load()) == {"free": 1, "slots": 2}
    engine._arriving.add("next")
    assert asyncio.run(engine.load())["free"] == 0


def test_a_trial_that_fits_nowhere_fails_and_one_more_than_fit_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine({"here": 0.0}, monkeypatch)
    assert engine._lease_out("more", None, "key", "token", None) is None and engine._slots == 1
    with pytest.raises(TrainingError, match="rank 64 does not fit in memory beside the base on cuda:0: lower"):
        _engine({}, monkeypatch)._lease_out("first", None, "key", "token", None)


@pytest.mark.parametrize(("error", "again"), [(RuntimeError("CUDA error: ECC"), True), (TrainingError("ours."), False)])
def test_an_engine_that_fails_by_itself_is_started_again_and_one_that_is_right_is_not(
    monkeypatch: pytest.MonkeyPatch, error: Exception, again: bool
) -> None:
    engine = _engine({}, monkeypatch)
    said: list[Any] = []

    def turn() -> None:
        raise error

    def leave(code: int) -> None:
        said.append(code)
        raise SystemExit

    monkeypatch.setattr(sweep_engine.os, "_exit", leave)
    engine._ready, engine._commands, engine._open, engine._turn = Future(), [], lambda: None, turn
    engine._counters = SimpleNamespace(path="engines/0.json", may_fail_again=lambda now: True)
    engine._writer = SimpleNamespace(save_stats=lambda *given: said.append(given))
    engine._stats, engine._shared = lambda: {"faults": 1}, SimpleNamespace(stats=None)
    if again:
        with pytest.raises(SystemExit):
            engine._main()
        assert said == [("engines/0.json", {"faults": 1}), 1], "what it counted is written first"
    else:
        engine._main()
        assert said == [] and engine._fault is error


def test_counters_go_on_in_a_restarted_engine_and_a_resumed_sweep_is_no_restart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = ["engine-a-0"]
    context = SimpleNamespace(get_actor_name=lambda: name[0], get_node_id=lambda: "n")
    monkeypatch.setattr(sweep_counters.ray, "get_runtime_context", lambda: context)
    store = Store(tmp_path)
    now = Stats(steps=4, forwards=4, mean_k=2.0, tokens=8, trained_tokens=8, padding=0.0, out_of_memory=1, k_limit=None)

    def life(faults: int = 0) -> tuple[dict[str, Any], list[bool]]:
        counters = Counters(store, 0)
        counters.load()
        may = [counters.may_fail_again(now) for _ in range(faults)]
        found = counters.all(now, "cpu", 1, {"stepping": 1.234})
        store.write_json(counters.path, found)
        return found, may

    assert life()[0]["restarts"] == 0
    found, may = life(faults=1)
    assert (found["restarts"], found["forwards"], found["adapters"], found["out_of_memory"]) == (1, 8, 16.0, 2)
    assert may == [True] and found["faults"] == 1
    name[0] = "engine-b-0"
    found, may = life(faults=3)
    assert found["restarts"] == 1, "another sweep's engine: this one goes on where that ended"
    assert may == [True, True, False]
    assert not Counters(store, 1).may_fail_again(Stats(0, 0, 0.0, 0, 0, 0.0, 0, None)), "it has not trained at all"


def test_a_swap_that_memory_runs_out_in_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(8, [TargetShape("q", 16, 16, 0)], torch.device("cpu"), torch.float32)
    for name in ("a", "b"):
        bucket.initialise(bucket.add(name), 8, ord(name))
    before, ids, usual, calls = bucket.weights.clone(), list(bucket.ids), torch.Tensor.clone, []

    def clone(tensor: torch.Tensor, **given: Any) -> torch.Tensor:
        calls.append(tensor)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return usual(tensor, **given)

    monkeypatch.setattr(torch.Tensor, "clone", clone)
    with pytest.raises(torch.OutOfMemoryError):
        bucket.swap(0, 1)
    monkeypatch.undo()
    assert bucket.ids == ids and torch.equal(bucket.weights, before)
    bucket.swap(0, 1)
    assert bucket.ids == ids[::-1] and torch.equal(bucket.weights[0], before[1])


def test_a_loss_that_is_not_finite_is_not_told_as_the_training_loss() -> None:
    point = sweep_states.point_of(20, float("nan"), 0.7, 100)
    assert point["validation_loss"] is None and sweep_trial.loss_of(point) == sweep_trial.DIVERGED
    assert sweep_trial.loss_of(sweep_states.point_of(20, None, 0.7, 100)) == 0.7, "there are no validation rows"
    assert "diverged" not in sweep_states.point_of(20, 1.5, 0.7, 100)
