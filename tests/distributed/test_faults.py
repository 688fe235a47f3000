"""Faults done for real to a run of two workers whose storage is S3: what is lost is bounded, nothing is corrupt."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import WorkerGroupError

from ft_ray import checkpoint, ray_session, recipe
from ft_ray.errors import StorageError, TrainingError
from ft_ray.storage import Store
from ft_ray.train_control import RAY_RECORDS, ray_records
from ft_ray.train_faults import describe
from tests import tiny
from tests.distributed.fault_tools import busiest_thread, thread_stopped, train_workers, until
from tests.distributed.test_trainer import Events, run
from tests.object_stores import S3Proxy, s3
from tests.parity.test_training import make

pytestmark = [pytest.mark.faults, pytest.mark.heavy]

EVERY = 10  # steps; another checkpoint is saved halfway


@pytest.fixture(scope="module")
def storage() -> Iterator[S3Proxy]:
    with s3() as made:
        yield made


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its attention drops weights out, so that full fine-tuning, too, replays only with each rank's random state."""
    return tiny.build(tmp_path_factory.mktemp("dropout") / "model", attention_dropout=0.1)


@pytest.fixture(scope="module", autouse=True)
def session(storage: S3Proxy) -> Iterator[None]:
    with ray_session.session(num_cpus=2):
        yield


@pytest.fixture(autouse=True)
def no_controller_left(session: None) -> Iterator[None]:
    """Ray lets the controller of a run whose worker hangs live on until its driver ends, which is this process.

    The next test would count or kill that one. Nor does Ray's own trainer, in a main thread, give Ctrl-C back.
    """
    interrupted = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, interrupted)
    for pid in controllers():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def two_workers(model: Path, **values: Any) -> recipe.Recipe:
    base: dict[str, Any] = {
        "schedule": {"epochs": 15},
        "checkpoint": {"every": EVERY, "keep": 3},
        "evaluation": {"every": 20},
        "resources": {"workers": 2, "retries": 4, "timeout": "20s"},
        "lora": {"dropout": 0.1},  # a replayed step has the same numbers only with its rank's random state
    }
    for name, value in values.items():
        base[name] = {**base.get(name, {}), **value} if isinstance(value, dict) else value
    return make(model, **base)


def whole(store: Store) -> list[int]:
    """Steps of the committed checkpoints; every one must match its hashes and hold both ranks' files."""
    names = [n for n in store.list("checkpoints") if store.tree(f"checkpoints/{n}") is not None]
    for name in names:
        assert store.verify(f"checkpoints/{name}") == []
        files = set(store.tree(f"checkpoints/{name}") or {})
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= files
        assert files >= {"adapter_model.safetensors"} or files >= PARTS
    return sorted(checkpoint.step_of(n) for n in names)


PARTS = {f"state-0000{rank}-of-00002.safetensors" for rank in (0, 1)}


class Attempts:
    """The events of a run, cut where it started again."""

    def __init__(self, events: list[dict[str, Any]]) -> None:
        self.steps: list[dict[int, float]] = [{}]
        self.committed: list[list[int]] = [[]]
        self.told: list[str] = []
        for event in events:
            message = "" if event.get("heartbeat") else str(event.get("message", ""))
            if "starting again from the last checkpoint" in message:
                self.told.append(message)
                self.steps.append({})
                self.committed.append([])
            elif event["kind"] == "step":
                self.steps[-1][event["step"]] = event["loss"]
            elif event["kind"] == "checkpoint":
                self.committed[-1].append(event["step"])

    def lost(self) -> list[int]:
        """Steps that had to be done twice, restart by restart."""
        return [max(a) - min(b) + 1 for a, b in zip(self.steps, self.steps[1:], strict=False)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("method", "planned"),
    [
        ("lora", ("mid-step", "hang")),
        ("full", ("mid-step", "hang")),
        ("full", ("while uploading", "before the commit")),
    ],
)
def test_workers_that_are_killed_or_hang_are_replaced(
    tiny_model: Path, storage: S3Proxy, method: str, planned: tuple[str, str]
) -> None:
    """A run meets two faults, one after the other, and is stopped then: an adapter's, and all weights by ZeRO-3.

    Those are written from snapshots, while training goes on.
    """
    made = two_workers(
        tiny_model, method=method, schedule={"epochs": 10_000}, checkpoint={"snapshot": method == "full"}
    )
    store = Store(f"s3://runs/killed-{method}-{planned[0].replace(' ', '-')}")
    stop = threading.Event()
    killed: list[str] = []
    stopped: list[int] = []

    def strike(what: str, number: int = signal.SIGKILL) -> None:
        workers = train_workers()
        assert len(workers) == 2
        killed.append(what)
        os.kill(workers[0], number)
        if number == signal.SIGSTOP:
            stopped.append(workers[0])

    class Script(Events):
        """After each restart, at the first committed checkpoint, the next fault."""

        seen = 0

        def __call__(self, event: dict[str, Any]) -> None:
            super().__call__(event)
            if "starting again" in str(event.get("message", "")) and not event.get("heartbeat"):
                self.seen = 0
            if event["kind"] != "checkpoint":
                return
            self.seen += 1
            if self.seen != 1:
                return
            fault = planned[len(killed)] if len(killed) < len(planned) else ""
            if fault == "mid-step":
                strike(fault)
            elif fault == "hang":
                strike(fault, signal.SIGSTOP)
            elif fault == "while uploading":
                storage.arm("PUT", "state-00001-of-00002.safetensors", lambda: strike(fault))
            elif fault == "before the commit":
                storage.arm("PUT", ".committed.json", lambda: strike(fault))
            else:
                stop.set()

    events = Script()
    storage.read.clear()
    outcome = run(made, store, events, stop=stop)
    assert killed == list(planned)
    assert (outcome.reason, outcome.metrics["retries"]) == ("interrupted", 2)
    attempts = Attempts(events)
    faults = outcome.metrics["faults"]
    assert len(faults) == 2
    for fault, told in zip(planned, faults, strict=True):
        if fault == "hang":
            assert told in ("rank 0 did not answer any more", "rank 1 did not answer any more")
        else:  # which sign of it comes first is chance
            assert "lost its process" in told or "lost the connection" in told
    assert f"{faults[1]}: starting again from the last checkpoint (retry 2, 4 are allowed)" in attempts.told
    assert max(attempts.lost()) <= EVERY, "no more than checkpoint.every, whatever was on its way"
    if method == "full":
        parts = sorted(name for name in storage.read if name.startswith("state-"))
        assert parts == sorted([*PARTS] * 2), "at each restart every rank fetched its own part, and no other one's"
    for steps, done, after in zip(attempts.steps, attempts.committed, attempts.steps[1:], strict=False):
        assert done[-1] < min(after) <= max(steps) + 1, "no checkpoint that was told is forgotten"
    recorded = {r["step"]: r["loss"] for r in outcome.history if r["kind"] == "step"}
    last = outcome.metrics["steps"]
    assert sorted(recorded) == list(range(1, last + 1))
    for steps in attempts.steps:
        assert steps == {step: recorded[step] for step in steps}, "replayed bit for bit"
    assert whole(store)[-1] == last
    assert len(store.list("checkpoints")) == len(whole(store)), "what was cut off is collected"
    until("the hanging process to be ended", lambda: not any(Path(f"/proc/{pid}").exists() for pid in stopped))
    key = store.list("checkpoints")[0].partition("-")[0]
    left = list(Path(tempfile.gettempdir()).glob(f"ft-ray-staged-*/{key}-step-*"))
    assert not left, "nothing staged is left on the machine"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_worker_that_is_told_to_end_saves_first(tiny_model: Path, method: str) -> None:
    """SIGTERM, which is what most of what takes machines back sends: a checkpoint at that step, and nothing is lost."""
    made = two_workers(
        tiny_model, method=method, schedule={"epochs": 10_000}, checkpoint={"every": 2000, "snapshot": True},
        resources={"retries": 0},
    )  # fmt: skip
    store, stop = Store(f"s3://runs/told-{method}"), threading.Event()

    class Script(Events):
        def __call__(self, event: dict[str, Any]) -> None:
            super().__call__(event)
            restarts = sum("starting again" in str(e.get("message", "")) and not e.get("heartbeat") for e in self)
            if event["kind"] == "step" and restarts == 0 and event["step"] == 7:
                os.kill(train_workers()[1], signal.SIGTERM)
            elif event["kind"] == "step" and restarts == 1:
                stop.set()

    events = Script()
    outcome = run(made, store, events, stop=stop)
    attempts = Attempts(events)
    assert (outcome.reason, len(attempts.told)) == ("interrupted", 1)
    assert attempts.lost() == [0]
    saved, last = attempts.committed[0], max(attempts.steps[0])
    assert saved == [last] and last > 7, "one checkpoint, at the step at which it was heard"
    told = [f"rank {rank} was told to end" for rank in (0, 1)]  # which rank the second process is, is chance
    assert attempts.told[0] in [
        f"{one} (SIGTERM): starting again from the last checkpoint (no retry spent)" for one in told
    ]
    assert any(e.get("message", "") in [f"{one}: saving a checkpoint now" for one in told] for e in events)
    recorded = {r["step"]: r["loss"] for r in outcome.history if r["kind"] == "step"}
    assert sorted(recorded) == list(range(1, outcome.metrics["steps"] + 1))
    assert attempts.steps[0] == {step: recorded[step] for step in attempts.steps[0]}


@pytest.mark.timeout(600)
def test_a_rank_that_answers_and_never_comes_is_not_waited_for_for_ever(tiny_model: Path, storage: S3Proxy) -> None:
    """Both processes live and answer; one hangs in a read of its shard, the other in the collective after it."""
    made = two_workers(tiny_model, method="full", schedule={"epochs": 10_000}, resources={"timeout": "10s"})
    store, stop = Store("s3://runs/in-vain"), threading.Event()
    run(made, store, Events(lambda e: e["kind"] == "checkpoint", stop.set), stop=stop)
    stop.clear()
    over = threading.Event()

    class Script(Events):
        def __call__(self, event: dict[str, Any]) -> None:
            super().__call__(event)
            if "starting again" in str(event.get("message", "")):
                over.set()
            elif event["kind"] == "step":
                stop.set()

    storage.arm("GET", "state-00001-of-00002.safetensors", lambda: over.wait(240), 100)  # its client asks again
    outcome = run(made, store, Script(), stop=stop)
    storage.disarm()
    assert over.is_set()
    assert outcome.metrics["faults"] == ["rank 0 waited for another rank in vain"]
    assert (outcome.reason, outcome.metrics["retries"]) == ("interrupted", 1)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of the futex call is known for x86-64 only")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_rank_that_hangs_in_training_and_answers_is_replaced(tiny_model: Path, method: str) -> None:
    """Its training thread alone stands still: the process answers Ray, and the other rank waits in a training step."""
    every = 100  # steps, which take seconds: the fault falls between two saves
    made = two_workers(
        tiny_model, method=method, schedule={"epochs": 10_000}, checkpoint={"every": every},
        evaluation={"every": 100_000}, resources={"timeout": "10s"},
    )  # fmt: skip
    store, stop = Store(f"s3://runs/hung-thread-{method}"), threading.Event()
    hung: list[int] = []

    with contextlib.ExitStack() as stopped:

        class Script(Events):
            def __call__(self, event: dict[str, Any]) -> None:
                super().__call__(event)
                if event["kind"] == "checkpoint" and not hung:
                    hung.append(train_workers()[0])
                    stopped.enter_context(thread_stopped(hung[0], busiest_thread(hung[0])))
                elif event["kind"] == "checkpoint":
                    stop.set()

        events = Script()
        outcome = run(made, store, events, stop=stop)
        until("the hung process to be ended", lambda: not Path(f"/proc/{hung[0]}").exists())
    assert (outcome.reason, outcome.metrics["retries"]) == ("interrupted", 1)
    (told,) = outcome.metrics["faults"]
    assert told in [f"rank {rank} waited for another rank in vain" for rank in (0, 1)]  # which process, is chance
    attempts = Attempts(events)
    assert attempts.told == [f"{told}: starting again from the last checkpoint (retry 1, 4 are allowed)"]
    before, again = attempts.steps
    assert 0 < attempts.lost()[0] <= every
    assert attempts.committed[0][-1] == min(again) - 1, "it went on from the last checkpoint that was told"
    recorded = {r["step"]: r["loss"] for r in outcome.history if r["kind"] == "step"}
    assert sorted(recorded) == list(range(1, outcome.metrics["steps"] + 1))
    assert again == {step: recorded[step] for step in again}
    replayed = before.keys() & recorded.keys()  # it may have been stopped before it was as far as the first one
    assert {step: before[step] for step in replayed} == {step: recorded[step] for step in replayed}, "bit for bit"
    assert whole(store)[-1] == outcome.metrics["steps"]


@pytest.mark.timeout(300)
def test_a_report_of_which_one_rank_keeps_away_is_not_waited_for_for_ever() -> None:
    """No collective of torch waits here: rank 1 lives, answers, and never comes to its save."""

    def keep_away() -> None:
        if ray.train.get_context().get_world_rank() == 1:
            time.sleep(3600)
        ray.train.report({})

    own = RunConfig(name="keep-away", storage_path=RAY_RECORDS, storage_filesystem=ray_records())
    with ray_session.train_settings(timeout=5, start=60):
        alone = TorchTrainer(keep_away, scaling_config=ScalingConfig(num_workers=2), run_config=own)
        with pytest.raises(WorkerGroupError) as failed:
            alone.fit()
    assert describe(failed.value) == "rank 0 waited for another rank in vain"


def test_a_storage_that_fails_and_returns_costs_nothing_but_time(tiny_model: Path, storage: S3Proxy) -> None:
    made = two_workers(tiny_model, method="full", schedule={"epochs": 5})
    store = Store("s3://runs/outage")
    released: list[int] = []

    events = Events()

    def stall() -> None:
        until("training to go on during the upload", lambda: len(events.losses()) >= 9, 100)
        released.append(len(events.losses()))

    storage.hits.clear()
    storage.arm("PUT", "state-00001-of-00002.safetensors", "503", 3)
    storage.arm("PUT", "state-00000-of-00002.safetensors", "reset", 2)
    storage.arm("PUT", "rng_state_1.pth", stall)
    storage.arm("PUT", ".committed.json", "503", 2)
    outcome = run(made, store, events)
    assert sorted(storage.hits) == sorted(["503"] * 5 + ["reset"] * 2 + ["called"])
    assert (outcome.status, outcome.metrics["steps"], outcome.metrics["retries"]) == ("done", 20, 0)
    assert next(e["step"] for e in events if e["kind"] == "checkpoint") == 5
    assert released and released[0] <= 10, "it went on, and the next save waited"
    seconds = {e["step"]: e["seconds"] for e in events if e["kind"] == "step"}
    during, after = (seconds[9] - seconds[6]) / 3, (seconds[14] - seconds[11]) / 3
    print(f"seconds a step: {during:.3f} while an upload stands still, {after:.3f} after it")
    assert whole(store)[-1] == 20


def test_an_outage_longer_than_the_clients_own_patience_is_waited_for(tiny_model: Path, storage: S3Proxy) -> None:
    """The S3 client asks again by itself, for some seconds; what comes through that is for our own tries."""
    made = two_workers(tiny_model, method="full", schedule={"epochs": 3})
    store, over = Store("s3://runs/long-outage"), list[str]()

    class Script(Events):
        def __call__(self, event: dict[str, Any]) -> None:
            super().__call__(event)
            said = str(event.get("message", ""))
            if "Trying again in" in said and not event.get("heartbeat"):
                over.append(said)
                for kind in ("state-00001-of-00002.safetensors", ".committed.json"):
                    if kind in said:
                        storage.disarm(kind)

    storage.arm("PUT", "state-00001-of-00002.safetensors", "503", 10_000)
    storage.arm("PUT", ".committed.json", "503", 10_000)
    events = Script()
    outcome = run(made, store, events)
    assert (outcome.status, outcome.metrics["retries"], outcome.metrics["faults"]) == ("done", 0, [])
    for kind in ("state-00001-of-00002.safetensors", ".committed.json"):
        assert any(kind in one for one in over), "the client gave up, the run did not"
    assert whole(store)[-1] == outcome.metrics["steps"]


def controllers() -> list[int]:
    return train_workers(title=b"Controller")


def cut_off_by(strike: Callable[[], object]) -> Callable[[], object]:
    """What a proxy does with a request: strikes, and lets it go no further."""

    def action() -> None:
        strike()
        raise ConnectionAbortedError("cut off by the test")

    return action


@pytest.mark.timeout(600)
def test_a_driver_killed_before_a_commit_and_the_same_command_again(tiny_model: Path, storage: S3Proxy) -> None:
    store = Store("s3://runs/driver")
    script = (
        "import sys\nfrom pathlib import Path\nfrom ft_ray import ray_session\nfrom ft_ray.storage import Store\n"
        "from tests.distributed.test_faults import two_workers, run\n"
        "store = Store('s3://runs/driver')\n"
        "tell = lambda event: print(event['kind'], event.get('step'), flush=True)\n"
        "with store.lock(), ray_session.session():\n"
        "    run(two_workers(Path(sys.argv[1]), method='full'), store, tell)\n"
    )
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, "-c", script, str(tiny_model)], text=True, stdout=subprocess.PIPE,
        env={**os.environ, "RAY_ADDRESS": address},
    )  # fmt: skip
    assert driver.stdout is not None
    told, struck = [], threading.Event()

    def strike() -> None:
        with pytest.raises(StorageError, match=rf"in use by process {driver.pid} on .*: wait for it"), store.lock():
            pass
        driver.kill()
        struck.set()
        until("the controller to end with its driver", lambda: not controllers())

    for line in driver.stdout:
        told.append(line.split())
        if told[-1][:2] == ["checkpoint", "10"]:
            storage.arm("PUT", ".committed.json", cut_off_by(strike))
    assert driver.wait() == -signal.SIGKILL and struck.is_set()
    driver.stdout.close()
    furthest = max(int(words[1]) for words in told if words[:1] == ["step"])
    killed = time.monotonic()
    until("the killed driver's workers to end", lambda: not train_workers())
    print(f"workers ended {time.monotonic() - killed:.1f} s after their driver")
    assert whole(store)[-1] == 10 and len(store.list("checkpoints")) > len(whole(store)), "reported, not committed"
    events = Events()
    with store.lock():  # a dead process of this machine holds no lease
        outcome = run(two_workers(tiny_model, method="full"), store, events)
    assert outcome.status == "done"
    assert outcome.metrics["resumed_from"] == 10
    assert furthest - 10 <= EVERY
    assert next(e["step"] for e in events if e["kind"] == "step") == 11
    assert [r["step"] for r in outcome.history if r["kind"] == "step"] == list(range(1, 61))
    assert whole(store)[-1] == 60 and len(store.list("checkpoints")) == len(whole(store)), "the orphan is collected"


@pytest.mark.timeout(600)
def test_a_run_whose_folder_was_taken_over_commits_and_removes_nothing(tiny_model: Path, storage: S3Proxy) -> None:
    """The controller sees it first and tells the driver, which looks by itself every 15 seconds here."""
    store = Store("s3://runs/taken-over")
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom ft_ray import ray_session, run_lock\n"
        "from ft_ray.errors import StorageError\nfrom ft_ray.storage import Store\n"
        "from tests.distributed.test_faults import two_workers, run\n"
        "run_lock._LEASE_SECONDS, store = 60.0, Store('s3://runs/taken-over')\n"
        "tell = lambda event: print(event['kind'], event.get('step', event.get('message')), flush=True)\n"
        "with store.lock(), ray_session.session():\n"
        "    try:\n"
        "        run(two_workers(Path(sys.argv[1]), method='full', schedule={'epochs': 10_000}), store, tell)\n"
        "    except StorageError as error:\n"
        "        print('error', error, flush=True)\n"
        "os._exit(0)  # Ray Train's thread still waits for its controller, and native threads may outlive Python\n"
    )
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, "-c", script, str(tiny_model)], text=True, stdout=subprocess.PIPE,
        env={**os.environ, "RAY_ADDRESS": address},
    )  # fmt: skip
    assert driver.stdout is not None
    told, before, armed = [], list[int](), False
    theirs = {"host": "another-host", "boot": "b", "pid": 4711, "token": "t", "renewed": time.time() + 600}

    def take_over() -> None:  # whoever reads the lock next reads the other run's
        before.extend(whole(store))
        store.write_json(".lock", theirs)

    try:
        for line in driver.stdout:
            told.append(line.strip())
            if told[-1].startswith("checkpoint") and not armed:
                armed = True
                storage.arm("GET", "/.lock", take_over)
        assert driver.wait() == 0, told
    finally:
        driver.kill()
        driver.wait()
        driver.stdout.close()
        storage.disarm()
    assert told[-1].startswith("error s3://runs/taken-over was taken over by process 4711 on another-host while"), told
    steps = [int(line.split()[1]) for line in told if line.startswith("step")]
    assert max(steps) - max(before) < 10 * EVERY, "it ended with the refused save, before the driver's own look"
    assert whole(store) == before, "a save that was on its way is not committed, and nothing is removed"
    assert store.read_json(".lock") == theirs
    until("the controller to end with its driver", lambda: not controllers())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("retries", [1, 0])
def test_a_controller_killed_before_a_commit_is_replaced(tiny_model: Path, storage: S3Proxy, retries: int) -> None:
    """The process that commits goes, and with it the workers: another one begins with what was committed."""
    made = two_workers(tiny_model, method="full", schedule={"epochs": 10_000}, resources={"retries": retries})
    store, stop = Store(f"s3://runs/controller-{retries}"), threading.Event()

    def strike() -> None:
        [controller] = controllers()
        os.kill(controller, signal.SIGKILL)

    class Script(Events):
        def __call__(self, event: dict[str, Any]) -> None:
            super().__call__(event)
            saved = [e["step"] for e in self if e["kind"] == "checkpoint"]
            if event["kind"] == "checkpoint" and len(saved) == 1:
                storage.arm("PUT", ".committed.json", cut_off_by(strike))
            elif event["kind"] == "checkpoint":
                stop.set()

    events = Script()
    lost = "Ray Train's controller lost its process"
    if not retries:
        with pytest.raises(TrainingError, match=rf"failed after 0 retries \({lost}\); checkpoints in .* are kept"):
            run(made, store, events, stop=stop)
        assert whole(store) == [5]
        return
    outcome = run(made, store, events, stop=stop)
    assert (outcome.reason, outcome.metrics["retries"], outcome.metrics["faults"]) == ("interrupted", 1, [lost])
    attempts = Attempts(events)
    assert attempts.told == [f"{lost}: starting again from the last checkpoint (retry 1, 1 are allowed)"]
    assert attempts.committed[0] == [5] and min(attempts.steps[1]) == 6 and max(attempts.lost()) <= EVERY
    recorded = {r["step"]: r["loss"] for r in outcome.history if r["kind"] == "step"}
    assert attempts.steps[0] == {step: recorded[step] for step in attempts.steps[0]}, "replayed bit for bit"
    assert whole(store)[-1] == outcome.metrics["steps"]
    assert len(store.list("checkpoints")) == len(whole(store)), "what was cut off is collected"


NO_NUMBER = {
    "lora": "the loss became no number by the update of step 2",
    "full": "the gradient became inf at step 3",  # the loss of such weights is still one
}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_what_is_good(tiny_model: Path, method: str) -> None:
    """The second step's update ruins the weights, which its own loss does not tell; the first one's did nothing."""
    wild = {"lr": 1e30, "max_grad_norm": 1e30}
    made = two_workers(
        tiny_model, method=method, optim=wild, schedule={"warmup": 2}, checkpoint={"every": 1, "keep": 1}
    )
    store, events = Store(f"s3://runs/nan-{method}"), Events()
    rows = r"the rows of its batch \(row \d+.*\)"
    said = rf"{NO_NUMBER[method]}: lower optim.lr.*{rows}; the checkpoint of step 1 is kept\.$"
    with pytest.raises(TrainingError, match=said):
        run(made, store, events)
    assert not Attempts(events).told, "the same would happen again"
    assert whole(store) == [1], "a ruined one would have taken its place"
    losses = {e["step"]: e["loss"] for e in events if e["kind"] == "step"}
    assert sorted(losses) == [1, 2] and all(math.isfinite(loss) for loss in losses.values())
    again = Events()
    with pytest.raises(TrainingError, match=said):  # it can be gone on from: the same update ruins it again
        run(made, store, again)
    assert [(e["step"], e["loss"]) for e in again if e["kind"] == "step"] == [(2, losses[2])]
    assert whole(store) == [1]


@pytest.mark.timeout(600)
def test_workers_that_die_while_they_start_are_not_started_for_ever(tiny_model: Path) -> None:
    made = two_workers(tiny_model, resources={"retries": 1})
    over, killed = threading.Event(), set[int]()

    def strike() -> None:
        while not over.wait(0.01):
            for pid in train_workers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)

    thread = threading.Thread(target=strike)
    thread.start()
    events = Events()
    try:
        with pytest.raises(TrainingError, match=r"training failed after 1 retries \(.+\); checkpoints in .* are kept"):
            run(made, Store("s3://runs/stillborn"), events)
    finally:
        over.set()
        thread.join()
    assert len(killed) >= 2
    assert [one.rsplit(" (", 1)[1] for one in Attempts(events).told] == ["retry 1, 1 are allowed)"]
    assert not [e for e in events if e["kind"] == "step"]


def test_a_storage_that_lets_nobody_write_any_more_ends_the_run_by_name(tiny_model: Path, storage: S3Proxy) -> None:
    made, store = two_workers(tiny_model), Store("s3://runs/denied")
    events = Events()
    storage.arm("PUT", "rng_state_1.pth", "403", 1000)
    with pytest.raises(StorageError, match=r"s3://runs/denied/checkpoints/.*/rng_state_1.pth cannot be written"):
        run(made, store, events)
    storage.disarm()
    assert not Attempts(events).told, "trying again would not help"
    assert whole(store) == [], "rank 0's half alone is no checkpoint"
