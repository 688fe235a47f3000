"""Whole machines that go, come back and come late: Ray nodes of one cluster, killed and drained for real."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from ft_ray import checkpoint, recipe, train_room
from ft_ray.errors import TrainingError
from ft_ray.storage import Store
from tests.distributed.fault_tools import Nodes, until
from tests.distributed.test_faults import Attempts
from tests.distributed.test_trainer import Events, run
from tests.parity.test_training import make

pytestmark = [pytest.mark.faults, pytest.mark.heavy]

EVERY = 40  # steps; another checkpoint is saved halfway


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module", autouse=True)
def session(nodes: Nodes) -> Iterator[None]:
    with nodes.attached(RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.5"):
        yield


def two_workers(model: Path, **resources: Any) -> recipe.Recipe:
    asked = {"workers": 2, "cpus": 1, "retries": 1, **resources}
    often = {"checkpoint": {"every": EVERY}, "evaluation": {"every": 1_000_000}}
    # All weights by ZeRO-3, stopped when it has seen enough; adapters meet the same in test_cluster.
    return make(model, method="full", schedule={"epochs": 100_000}, resources=asked, **often)


def test_room_that_does_not_come_up_is_waited_for_and_no_longer(tiny_model: Path, tmp_path: Path) -> None:
    events = Events()
    with pytest.raises(TrainingError, match=r"no room came up for 2 workers of 1 CPU within 3s: make the cluster"):
        run(two_workers(tiny_model, wait="3s"), Store(tmp_path / "run"), events)
    said = [e.get("message", "") for e in events]
    asked = "the cluster has 0 CPUs and 0 GPUs now: waiting up to 3s (resources.wait) for 2 workers of 1 CPU"
    assert any(m.startswith(asked) for m in said), said


@pytest.mark.timeout(900)
def test_machines_that_come_late_are_taken_back_and_die(tiny_model: Path, tmp_path: Path, nodes: Nodes) -> None:
    """From nothing to two machines; one is drained with notice, one loses power: the run goes on each time."""
    store, stop = Store(tmp_path / "run"), threading.Event()
    phase = "waiting"

    helpers: list[threading.Thread] = []

    def meanwhile(what: Callable[[], Any]) -> None:
        helpers.append(threading.Thread(target=what))
        helpers[-1].start()

    def drain(name: str) -> None:
        """What a cloud's notice becomes in Ray: this node goes away in 15 seconds."""
        subprocess.run(
            [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "drain-node", "--address",
             nodes.address, "--node-id", nodes.id(name), "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message",
             "spot", "--deadline-remaining-seconds", "15"],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip

    class Script(Events):
        def __call__(self, event: dict[str, Any]) -> None:
            nonlocal phase
            super().__call__(event)
            message = "" if event.get("heartbeat") else str(event.get("message", ""))
            if phase == "waiting" and "the cluster has 0 CPUs" in message:
                phase = "starting"
                meanwhile(lambda: [nodes.add("b"), nodes.add("c")])
            elif phase == "starting" and event["kind"] == "checkpoint":
                phase = "draining"
                meanwhile(lambda: [drain("b"), nodes.add("d")])
            elif phase == "draining" and "was taken back" in message:
                phase = "drained"
            elif phase == "drained" and event["kind"] == "checkpoint":
                phase = "killing"
                nodes.kill("c")
                meanwhile(lambda: nodes.add("e"))
            elif phase == "killing" and "starting again" in message:
                phase = "killed"
            elif phase == "killed" and event["kind"] == "checkpoint":
                phase = "over"
                stop.set()

    events = Script()
    outcome = run(two_workers(tiny_model), store, events, stop=stop)
    for helper in helpers:
        helper.join()
    assert (phase, outcome.reason) == ("over", "interrupted")
    faults = outcome.metrics["faults"]
    assert len(faults) == 2, faults
    assert "was taken back" in faults[0]
    # Which sign of it comes first is chance: the dead node, the actor that is gone, or the peer's broken connection.
    assert any(sign in faults[1] for sign in ("lost its machine", "lost its process", "lost the connection")), faults
    assert any("was taken back" in e.get("message", "") and "no retry spent" in e["message"] for e in events)
    notice = next(i for i, e in enumerate(events) if "a machine is being taken back" in e.get("message", ""))
    before = max(e["step"] for e in events[:notice] if e["kind"] == "step")
    in_time = next(e["step"] for e in events[notice:] if e["kind"] == "checkpoint" and e["step"] > before - 1)
    assert in_time % (EVERY // 2) != 0 or in_time - before <= 1, "saved at once, not at the next interval"
    drained, killed = Attempts(events).lost()
    print(f"steps lost: {drained} by the drained machine, {killed} by the killed one")
    assert drained <= EVERY and killed <= EVERY
    assert [r["step"] for r in outcome.history if r["kind"] == "step"] == list(range(1, outcome.metrics["steps"] + 1))
    names = [n for n in store.list("checkpoints") if store.tree(f"checkpoints/{n}") is not None]
    assert all(store.verify(f"checkpoints/{n}") == [] for n in names)
    assert max(checkpoint.step_of(n) for n in names) == outcome.metrics["steps"]
    until("the machine's processes to be gone", lambda: not nodes.workers("c"))


@pytest.mark.timeout(600)
def test_a_run_goes_on_with_fewer_workers_and_takes_more_when_they_come(
    tiny_model: Path, tmp_path: Path, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`min_workers`: of two machines one dies, the other goes on alone with the same losses, and a third joins it."""
    monkeypatch.setattr(train_room, "_RESIZE_SECONDS", 5.0)
    for name in ("b", "c", "d", "e"):
        nodes.kill(name)
    until("the nodes of the tests before to go", lambda: ray.cluster_resources().get("CPU", 0) == 0)
    nodes.add("f"), nodes.add("g")
    until("two machines", lambda: ray.cluster_resources().get("CPU", 0) == 2)
    store, stop = Store(tmp_path / "run"), threading.Event()
    sizes: list[int] = []
    helpers: list[threading.Thread] = []

    class Script(Events):
        saved = 0

        def __call__(self, event: dict[str, Any]) -> None:
            super().__call__(event)
            message = "" if event.get("heartbeat") else str(event.get("message", ""))
            if message.startswith("training by "):
                sizes.append(int(message.split()[2]))
                self.saved = 0
            elif event["kind"] == "checkpoint":
                self.saved += 1
                if self.saved == 1 and sizes in ([2], [1, 2]):
                    nodes.kill("g")
                elif self.saved == 1 and sizes[-2:] == [2, 1]:
                    helpers.append(threading.Thread(target=nodes.add, args=("h",)))
                    helpers[-1].start()
                elif self.saved == 1 and sizes[-3:] == [2, 1, 2]:
                    stop.set()

    events = Script()
    outcome = run(two_workers(tiny_model, min_workers=1, retries=3), store, events, stop=stop)
    for helper in helpers:
        helper.join()
    # It may begin with one: what is free on a machine that has just come is known a moment later.
    assert outcome.reason == "interrupted" and sizes in ([2, 1, 2], [1, 2, 1, 2])
    recorded = {r["step"]: r["loss"] for r in outcome.history if r["kind"] == "step"}
    assert sorted(recorded) == list(range(1, outcome.metrics["steps"] + 1))
    told = [(e["step"], e["loss"]) for e in events if e["kind"] == "step"]
    again = [(loss, recorded[step]) for step, loss in told if loss != recorded[step]]
    assert len(told) > len(recorded), "some were done twice, by two workers and by one"
    assert all(abs(a - b) < 1e-5 for a, b in again), "and have the same losses"
    names = [n for n in store.list("checkpoints") if store.tree(f"checkpoints/{n}") is not None]
    assert names and all(store.verify(f"checkpoints/{n}") == [] for n in names)
