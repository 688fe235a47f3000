"""Two workers and ZeRO-3: one rank's shard is altered, the storage's disk fills up, workers die too often."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ft_ray import checkpoint, ray_session
from ft_ray.errors import StorageError, TrainingError
from ft_ray.storage import Store
from tests.distributed.fault_tools import train_workers
from tests.distributed.ranks import Job
from tests.distributed.ranks import run as run_ranks
from tests.distributed.test_faults import Attempts, two_workers, whole
from tests.distributed.test_trainer import Events, run
from tests.distributed.test_zero3 import full

pytestmark = [pytest.mark.faults, pytest.mark.heavy, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session.session(num_cpus=2):
        yield


@pytest.mark.usefixtures("session")
@pytest.mark.parametrize("damage", ["a bit flips", "cut short", "a bit of the index flips"])
def test_both_ranks_leave_a_checkpoint_of_which_one_finds_its_shard_damaged(
    tiny_model: Path, tmp_path: Path, damage: str
) -> None:
    """A flipped bit is seen by the rank alone that reads the shard; rank 0's own part is whole.

    In the index, which tells who reads what, every rank sees it: the JSON is none any more, and no shorter.
    """
    made = two_workers(tiny_model, method="full")
    store, stop = Store(tmp_path / "run"), threading.Event()
    first = run(made, store, Events(lambda e: e["kind"] == "step" and e["step"] == 13, stop.set), stop=stop)
    assert first.reason == "interrupted"
    newest = max(store.list("checkpoints"), key=checkpoint.step_of)
    name = "state.json" if "index" in damage else "state-00001-of-00002.safetensors"
    shard = Path(store.path(f"checkpoints/{newest}/{name}"))
    content = shard.read_bytes()
    at = 0 if "index" in damage else len(content) - 9
    flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    shard.write_bytes(flipped if "flips" in damage else content[:-9])

    stop.clear()
    events = Events(lambda e: e["kind"] == "step" and e["step"] == 20, stop.set)
    second = run(made, store, events, stop=stop)
    told = [e["message"] for e in events if "falling back to an earlier one" in str(e.get("message", ""))]
    if "flips" in damage:
        assert told and told[0].startswith(f"checkpoint {newest} is damaged (") and name in told[0]
    again = next(e["step"] for e in events if e["kind"] == "step")
    assert checkpoint.step_of(newest) - 10 < again <= checkpoint.step_of(newest), "the one before, not the start"
    assert second.metrics["resumed_from"] == again - 1
    assert [e["message"] for e in events if str(e.get("message", "")).startswith("going on from")][-1].endswith(
        f"of step {again - 1}"
    )
    recorded = {r["step"]: r["loss"] for r in first.history if r["kind"] == "step"}
    repeated = {r["step"]: r["loss"] for r in second.history if r["kind"] == "step"}
    assert sorted(repeated) == list(range(1, second.metrics["steps"] + 1))
    assert {step: repeated[step] for step in recorded} == recorded, "replayed bit for bit"
    assert not Attempts(list(events)).told, "no retry is spent"


@pytest.mark.usefixtures("session")
def test_a_disk_that_fills_up_under_two_workers_keeps_what_was_saved(tiny_model: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    # A checkpoint of the tiny model has 1.3 MB: the end of the disk comes in the middle of the fifth or sixth.
    mount = ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        store, events = Store(disk / "run"), Events()
        made = two_workers(tiny_model, method="full", checkpoint={"every": 4, "keep": 100}, evaluation={"every": 400})
        with pytest.raises(StorageError, match=r"no space left at .*earlier artifacts are intact") as caught:
            run(made, store, events)
        assert caught.value.exit_code == 1
        assert not Attempts(list(events)).told, "a full disk is not tried again"
        saved = whole(store)
        assert saved and saved == [e["step"] for e in events if e["kind"] == "checkpoint"]
        reached = max(e["step"] for e in events if e["kind"] == "step")
        assert reached - saved[-1] <= 4, "no more than checkpoint.every"
        assert store.tree("model") is None
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.usefixtures("session")
def test_workers_that_die_too_often_end_the_run_by_name(tiny_model: Path, tmp_path: Path) -> None:
    made = two_workers(tiny_model, method="full", schedule={"epochs": 10_000}, resources={"retries": 1})
    store, killed = Store(tmp_path / "run"), list[int]()

    class Script(Events):
        """A worker is killed at the first checkpoint of each attempt."""

        done = -1

        def __call__(self, event: dict[str, Any]) -> None:
            super().__call__(event)
            restarts = len(Attempts(list(self)).told)
            if event["kind"] == "checkpoint" and restarts > self.done:
                self.done = restarts
                killed.append(train_workers()[-1])
                os.kill(killed[-1], signal.SIGKILL)

    events = Script()
    said = r"training failed after 1 retries \(rank.*checkpoints in .* are kept: mend the cause"
    with pytest.raises(TrainingError, match=said):
        run(made, store, events)
    attempts = Attempts(list(events))
    assert (len(killed), len(attempts.told)) == (2, 1)
    assert "(retry 1, 1 are allowed)" in attempts.told[0]
    saved = whole(store)
    assert saved[-1] >= max(step for committed in attempts.committed for step in committed), "what was told is there"
    reached = max(max(steps) for steps in attempts.steps)
    assert reached - saved[-1] <= 10, "no more than checkpoint.every"


def test_states_in_many_groups_are_saved_and_taken_over(tiny_model: Path, tmp_path: Path) -> None:
    """DeepSpeed cuts a rank's share into groups of 1e9 elements, which 8B on two GPUs has several of."""
    groups = {"deepspeed": {"zero_optimization": {"sub_group_size": 20_000}}}
    jobs = [
        Job("one", full(tiny_model)),
        Job("many", full(tiny_model, **groups)),
        Job("many_again", full(tiny_model, **groups), resume=str(tmp_path / "many" / "step-4")),
        Job("one_to_many", full(tiny_model, **groups), resume=str(tmp_path / "one" / "step-4")),
        Job("many_to_one", full(tiny_model), resume=str(tmp_path / "many" / "step-4")),
    ]
    found = run_ranks(tmp_path, 2, jobs)
    assert [len(result["losses"]) for result in found.values()] == [8, 8, 4, 4, 4]
    for name in ("many_again", "one_to_many", "many_to_one"):
        assert found[name]["losses"] == pytest.approx(found["one"]["losses"][4:], abs=1e-6), name
    assert found["many_again"]["losses"] == found["many"]["losses"][4:], "bit for bit"
