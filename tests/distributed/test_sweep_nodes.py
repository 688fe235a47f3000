"""A sweep on two machines: an engine on each, trials on both; one loses power, and its trials go on on the other.

Two Ray nodes of one cluster on this machine, each with its processes and a core of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from ft_ray.storage import Store
from tests.distributed.fault_tools import Nodes
from tests.distributed.test_sweep import (
    EVERY,
    LONG,
    POINTS,
    Watcher,
    assert_each_mark_once,
    by_point,
    long_recipe,
    run,
    space_of,
)

pytestmark = [pytest.mark.faults, pytest.mark.heavy, pytest.mark.timeout(900)]


@contextlib.contextmanager
def two_machines() -> Iterator[Nodes]:
    made = Nodes()
    try:
        for name in ("a", "b"):
            made.add(name)
        with made.attached():
            yield made
    finally:
        made.close()


def holders() -> dict[str, list[str]]:
    """Node: the trials that its engine holds now."""
    found = {}
    for one in ray.util.list_named_actors(all_namespaces=True):
        if one["name"].startswith("ft-ray-engine-"):
            engine = ray.get_actor(one["name"], one["namespace"])
            found[ray.get(engine.stats.remote(), timeout=60)["node"]] = ray.get(engine.trials.remote(), timeout=60)
    return found


def clients(nodes: Nodes, name: str) -> int:
    """Trials' processes on the node."""
    found = 0
    for pid in nodes.pids(name):
        with contextlib.suppress(OSError):
            found += b"ImplicitFunc" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return found


@pytest.mark.parametrize("processes", ["lost", "kept"])
def test_trials_of_a_lost_machine_go_on_on_the_other(tiny_model: Path, tmp_path: Path, processes: str) -> None:
    """`lost`: the machine that also runs the trials' processes (Ray puts them all on one); `kept`: the other one.

    In the second case the clients find the other engine by themselves, and no retry is spent.
    """
    store, seen = Store(tmp_path / "run"), {}
    with two_machines() as nodes:
        names = {nodes.id(name): name for name in ("a", "b")}

        def all_have_reported(rows: list[dict[str, Any]]) -> bool:
            return len(rows) == len(POINTS) and all(row["step"] >= EVERY for row in rows)

        def lose_a_machine() -> None:
            held = {names[node]: trials for node, trials in holders().items()}
            processes_on = {name: clients(nodes, name) for name in held}
            lost = (max if processes == "lost" else min)(processes_on, key=lambda name: processes_on[name])
            seen.update(held=held, clients=processes_on, lost=lost)
            nodes.kill(lost)

        watcher = Watcher(all_have_reported, lose_a_machine)
        long = long_recipe(tiny_model)
        result = run(long, space_of(engines=2, retries=3), store, watcher, points=POINTS)

        assert watcher.done and seen["held"].keys() == {"a", "b"}, f"an engine on each machine: {seen}"
        assert all(len(trials) >= 2 for trials in seen["held"].values()), seen
        assert sum(map(len, seen["held"].values())) == len(POINTS), "killed while all of them trained"
        if processes == "lost":
            assert seen["clients"][seen["lost"]] > 0, seen
        else:  # Ray puts all clients on one machine, and this is the other
            assert seen["clients"][seen["lost"]] == 0 < sum(seen["clients"].values()), seen
            assert not list((tmp_path / "run/sweep/tune").glob("*/error.txt")), "no trial's retry was spent"
        assert result.status == "done" and len(by_point(result)) == len(result.trials) == len(POINTS)
        for trial in result.trials:
            assert trial.status == "done", trial.error
            assert_each_mark_once(trial, LONG, EVERY)
        assert [engine.trained_tokens > 0 for engine in result.engines] == [True, True]
        # Bit for bit what they would have been: one trial of each machine, again on the machine that is left.
        again = [next(t.config for t in result.trials if t.id == trials[0]) for trials in seen["held"].values()]
        unharmed = by_point(run(long, space_of(), Store(tmp_path / "unharmed"), points=again))
        for key, trial in unharmed.items():
            assert by_point(result)[key].history == trial.history
