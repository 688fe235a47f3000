"""Training through Ray: one path for one and more workers, resumable after Ctrl-C, damage and a killed worker."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from safetensors.torch import load_file

from ft_ray import base_model, checkpoint, objective, ray_session, recipe, trainer
from ft_ray.errors import ModelError, RecipeError, StorageError, TrainingError
from ft_ray.storage import Store
from ft_ray.train_control import open_board
from ft_ray.train_listener import Listener
from ft_ray.trainer import Outcome, train
from tests.parity.test_training import Recorder, make
from tests.token_rows import TokenRows


@pytest.fixture(scope="module", autouse=True)
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A private Ray for all tests here, started with a home folder of its own to see that it is left alone."""
    home = tmp_path_factory.mktemp("home")
    before = os.environ.get("HOME", "")
    os.environ["HOME"] = str(home)
    try:
        with ray_session.session(num_cpus=2):
            yield home
    finally:
        os.environ["HOME"] = before


class Events(list[dict[str, Any]]):
    """Collects events, and does something at the first one that matches."""

    def __init__(
        self, at: Callable[[dict[str, Any]], bool] | None = None, do: Callable[[], None] | None = None
    ) -> None:
        super().__init__()
        self._at, self._do = at, do
        self.times = [time.monotonic()]

    def __call__(self, event: dict[str, Any]) -> None:
        self.append(event)
        self.times.append(time.monotonic())
        if self._at is not None and self._do is not None and self._at(event):
            self._at, do = None, self._do
            do()

    def losses(self) -> list[float]:
        return [e["loss"] for e in self if e["kind"] == "step"]


def run(made: recipe.Recipe, store: Store, events: Events, **options: Any) -> Outcome:
    files = base_model.resolve(made.model)
    return train(made, TokenRows(count=30), files, store, on_event=events, **options)


def at_step(step: int) -> Callable[[dict[str, Any]], bool]:
    return lambda event: event["kind"] == "step" and event["step"] == step


@pytest.mark.heavy
@pytest.mark.injected
def test_two_workers_interrupted_damaged_and_resumed_by_one_equal_a_straight_run(
    tiny_model: Path, tmp_path: Path
) -> None:
    """4 rows on each of 2 workers, then 8 on 1: the losses are those of one process that was never stopped."""
    made = make(tiny_model, schedule={"epochs": 10}, evaluation={"every": 8}, checkpoint={"every": 6, "keep": 3})
    two = recipe.from_dict({**made.to_dict(), "resources": {"workers": 2}})
    store = Store(tmp_path / "run")

    stop = threading.Event()  # what Ctrl-C does too: tests/e2e/test_path.py sends the signals to a process of its own
    outcome = run(two, store, events := Events(at_step(9), stop.set), stop=stop)
    assert (outcome.status, outcome.reason) == ("stopped", "interrupted")
    assert (outcome.metrics["workers"], outcome.metrics["per_device"]) == (2, 4)
    # It tells something every 8 seconds; a machine that is busy with other things delays that.
    assert max(b - a for a, b in zip(events.times, events.times[1:], strict=False)) < 60, "never silent for long"
    stopped_at = outcome.metrics["steps"]
    assert 9 <= stopped_at < 40
    assert store.tree("adapter") is None, "an interrupted run has no result"

    names = [n for n in store.list("checkpoints") if "-step-" in n]
    newest = max(names, key=checkpoint.step_of)
    assert checkpoint.step_of(newest) == stopped_at
    files = set(store.tree(f"checkpoints/{newest}") or {})
    assert {"rng_state_0.pth", "rng_state_1.pth", "adapter_model.safetensors", "optimizer.pt"} <= files
    assert store.verify(f"checkpoints/{newest}") == []
    # A bit of the newest flips, which only who reads it sees, and Ray's own record is cut off: the run goes on.
    weights = Path(store.path(f"checkpoints/{newest}/adapter_model.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    Path(store.path("checkpoints/checkpoint_manager_snapshot.json")).write_text('{"ray_version"')

    again = Events()
    outcome = run(made, store, again)
    assert outcome.status == "done"
    assert outcome.reason == ""
    damaged = f"checkpoint {newest} is damaged ("
    assert any(e.get("message", "").startswith(damaged) for e in again)
    first = next(e["step"] for e in again if e["kind"] == "step")
    assert stopped_at - 6 <= first - 1 < stopped_at, "the one before it, not the start"
    assert outcome.metrics["workers"] == 1
    assert outcome.metrics["resumed_from"] == first - 1, "where it really went on from"
    assert any(e.get("message") == f"going on from the checkpoint of step {first - 1}" for e in again)
    steps = [r for r in outcome.history if r["kind"] == "step"]
    assert [s["step"] for s in steps] == list(range(1, 41))

    hooks = Recorder(tmp_path / "straight")
    from tests.parity.test_training import train as straight

    trainer = straight(made, hooks, TokenRows(count=30))
    assert [s["loss"] for s in steps] == pytest.approx(hooks.losses(), abs=1e-6)
    assert outcome.metrics["validation_loss"] == pytest.approx(trainer.progress.best_loss, abs=1e-6)

    assert store.verify("adapter") == []
    names_in_tree = set(store.tree("adapter") or {})
    needed = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert needed <= names_in_tree
    identity = store.read_json("adapter/ft_ray.json")
    assert identity["base"]["hash"] == base_model.resolve(made.model).hash
    assert identity["eos_ids"] == [2]
    assert store.read_json("adapter/adapter_config.json")["base_model_name_or_path"] == str(tiny_model)
    best = load_file(Path(store.path(f"checkpoints/{identity['checkpoint']}/adapter_model.safetensors")))
    kept = load_file(Path(store.path("adapter/adapter_model.safetensors")))
    assert all((best[k] == kept[k]).all() for k in best)
    left = [n for n in store.list("checkpoints") if "-step-" in n]
    assert identity["checkpoint"] in left
    assert len(left) <= 4, "the newest three and the best"

    once_more = Events()
    assert run(made, store, once_more).metrics["steps"] == 40
    assert once_more.losses() == [], "what is done is not trained again"


def test_a_rank_s_error_comes_back_as_itself_and_is_not_retried(tiny_model: Path, tmp_path: Path) -> None:
    store, events = Store(tmp_path / "run"), Events()
    said = r"^lora.targets 'qproj' matches no linear module \(did you mean 'q_proj'"
    with pytest.raises(ModelError, match=said) as caught:
        run(make(tiny_model, lora={"targets": ["qproj"]}), store, events)
    assert caught.value.exit_code == 2
    half = (".tmp", ".safetensors")
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".staging-") or p.suffix in half]
    assert not any("retry" in e.get("message", "") for e in events)
    assert store.tree("adapter") is None


@pytest.mark.heavy
@pytest.mark.faults
def test_a_killed_worker_is_replaced_and_resumes(tiny_model: Path, tmp_path: Path, capfd: Any) -> None:
    made = make(tiny_model, schedule={"epochs": 25}, evaluation={"every": 100}, checkpoint={"every": 20})
    store = Store(tmp_path / "run")
    events = Events(at_step(35), lambda: os.kill(_train_worker(), signal.SIGKILL))
    outcome = run(made, store, events)
    assert outcome.status == "done"
    assert outcome.metrics["retries"] == 1
    told = "rank 0 lost its process: starting again from the last checkpoint (retry 1, 3 are allowed)"
    assert any(e.get("message") == told for e in events)
    assert outcome.metrics["faults"] == ["rank 0 lost its process"]
    lost = next(i for i, e in enumerate(events) if "retry 1" in e.get("message", ""))
    before = [e["step"] for e in events[:lost] if e["kind"] == "step"]
    after = [e["step"] for e in events[lost:] if e["kind"] == "step"]
    saved = [e["step"] for e in events[:lost] if e["kind"] == "checkpoint"]
    assert after[0] == saved[-1] + 1, "it goes on from the last checkpoint that was told"
    assert before[-1] - saved[-1] <= 20, "no more than checkpoint.every"
    assert after == list(range(after[0], 101))
    assert [r["step"] for r in outcome.history if r["kind"] == "step"] == list(range(1, 101))
    recorded = {r["step"]: r["loss"] for r in outcome.history if r["kind"] == "step"}
    first_try = [e for e in events[:lost] if e["kind"] == "step"]
    assert [e["loss"] for e in first_try] == [recorded[e["step"]] for e in first_try], "replayed bit for bit"
    assert "raylet" not in capfd.readouterr().out, "stdout belongs to --json"


def _train_worker() -> int:
    """The pid of this test's training worker: a descendant of this process, never another Ray's."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
    for pid, name in names.items():
        ancestor = pid
        while ancestor in parents and ancestor != os.getpid():
            ancestor = parents[ancestor]
        if ancestor == os.getpid() and "TrainWorker" in name:
            return pid
    raise AssertionError("no training worker runs")


@pytest.mark.parametrize("stopped", ["", "early_stop"])
def test_a_rank_lost_after_its_last_checkpoint_trains_no_further_step(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: str
) -> None:
    """Committed, and killed before it told that it had ended: whoever takes its place finds nothing left to train.

    The driver here does not look at the checkpoint first, as it does not when it starts the ranks again.
    """
    more = {"evaluation": {"every": 1, "early_stop": 2}, "optim": {"lr": 1e-12}} if stopped else {}
    made = make(tiny_model, schedule={"epochs": 50 if stopped else 1, "type": "constant"}, **more)
    store = Store(tmp_path / "run")
    first = run(made, store, Events())
    assert (first.status, first.reason) == ("done", stopped)
    assert stopped or first.history[-1]["step"] == first.metrics["steps"]
    looked: list[bool] = []

    def blind(recipe: Any, progress: dict[str, Any]) -> str | None:
        looked.append(True)
        return None if len(looked) <= 2 else objective.ended(recipe, progress)

    monkeypatch.setattr(trainer, "objective", SimpleNamespace(**{**vars(objective), "ended": blind}))
    events = Events()
    second = run(made, store, events)
    assert len(looked) == 3 and any(e.get("message") == "starting workers" for e in events), "ranks were started"
    assert not [e for e in events if e["kind"] in ("step", "checkpoint")]
    assert (second.status, second.reason, second.history) == ("done", stopped, first.history)


@pytest.mark.injected
def test_a_full_disk_while_saving_keeps_what_was_saved(tiny_model: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        store = Store(disk / "run")
        # Nothing is ever removed, so that 80 checkpoints of 100 kB meet the end of the disk in the middle of a save.
        made = make(
            tiny_model, schedule={"epochs": 100}, checkpoint={"every": 10, "keep": 100}, evaluation={"every": 400}
        )
        events = Events()
        with pytest.raises(StorageError, match=r"no space left at .*earlier artifacts are intact") as caught:
            run(made, store, events)
        assert caught.value.exit_code == 1
        assert not any("retry" in e.get("message", "") for e in events), "a full disk is not tried again"
        committed = [n for n in store.list("checkpoints") if store.tree(f"checkpoints/{n}")]
        assert committed
        assert all(store.verify(f"checkpoints/{n}") == [] for n in committed)
        assert all("-step-" in n for n in store.list("checkpoints")), "Ray's own records are not on the user's storage"
        assert store.tree("adapter") is None
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_storage_that_cannot_be_written_is_refused_before_training(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match=r"writing: .*file/run"):
        run(make(tiny_model), Store(tmp_path / "file" / "run"), Events())


def test_money_without_a_price_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    asked = recipe.from_dict({**make(tiny_model).to_dict(), "budget": {"usd": 5}})
    with pytest.raises(RecipeError, match=r"budget.usd: no price is known for this machine: add budget.usd_per_hour"):
        run(asked, Store(tmp_path / "run"), Events())


def test_more_than_the_cluster_has_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    asked = recipe.from_dict({**make(tiny_model).to_dict(), "resources": {"gpus": 2}})
    with pytest.raises(TrainingError, match=r"resources ask for 1 x 2 GPUs and Ray has 0"):
        run(asked, Store(tmp_path / "run"), Events())
    asked = recipe.from_dict({**make(tiny_model).to_dict(), "resources": {"workers": 8}})
    with pytest.raises(TrainingError, match=r"resources ask for 8 x 1 CPUs and Ray has 2"):
        run(asked, Store(tmp_path / "run"), Events())


def priorities() -> dict[str, set[tuple[int, int]]]:
    """Niceness and policy of every thread of this Ray's processes, by what a process is called."""
    found: dict[str, set[tuple[int, int]]] = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):  # one that ended, or that an earlier test killed
            said = process.cmdline() or [""]
            name = next((part.rsplit("/", 1)[-1] for part in said if part.endswith((".py", "/raylet"))), said[0])
            for task in Path(f"/proc/{process.pid}/task").iterdir():
                thread = int(task.name)
                kind = (os.getpriority(os.PRIO_PROCESS, thread), os.sched_getscheduler(thread))
                found.setdefault(name, set()).add(kind)
    return found


def test_what_only_serves_training_runs_behind_it(tiny_model: Path, tmp_path: Path) -> None:
    during: dict[str, set[tuple[int, int]]] = {}
    events = Events(lambda e: e["kind"] == "step" and not during, lambda: during.update(priorities()))
    run(make(tiny_model), Store(tmp_path / "run"), events)
    usual, behind = (psutil.Process().nice(), os.SCHED_OTHER), (10, os.SCHED_BATCH)
    for name in ("dashboard.py", "ray::DashboardAgent", "ray::_Controller.run", "ray::Board"):
        assert during[name] == {behind}, name
    for name in ("raylet", "ray::RayTrainWorker"):
        assert during[name] == {usual}, name
    # Processes that training on one machine has no use for.
    unwanted = ("log_monitor.py", "monitor.py", "ray::DatasetManager", "ray::PlacementGroupCleaner")
    assert not during.keys() & set(unwanted)


@pytest.mark.skipif(
    sys.platform != "linux" or bool({"LD_PRELOAD", "RAY_LD_PRELOAD_ON_WORKERS", "MALLOC_CONF"} & os.environ.keys()),
    reason="only on Linux, and where the user preloads nothing of their own",
)
def test_workers_on_cpus_take_their_memory_from_jemalloc() -> None:
    maps = ray.get(ray.remote(lambda: Path("/proc/self/maps").read_text(encoding="utf-8")).remote())
    assert ("libjemalloc" in maps) == (not ray_session._has_gpu()), "plans of a CPU run count no holes of glibc's heap"
    kept = ray.get(ray.remote(lambda: os.environ.get("MALLOC_CONF")).remote())
    assert (kept == "oversize_threshold:0") == (not ray_session._has_gpu()), "large blocks are kept from step to step"


def test_the_private_ray_has_a_token_of_its_own_and_another_process_attaches(session: Path) -> None:
    assert not (session / ".ray" / "auth_token").exists(), "the user's token is not touched"
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    address = ray.get_runtime_context().gcs_address
    script = (
        "import json, ray\nfrom ft_ray import ray_session\n"
        "with ray_session.session():\n    print(json.dumps(ray.cluster_resources()))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert json.loads(out.stdout.splitlines()[-1])["CPU"] == 2
    assert ray.is_initialized(), "the other process ended its session, not ours"


def test_who_asked_to_stop_need_not_ask_again_when_the_memory_ladder_starts_anew() -> None:
    listener = Listener(Events(), None, retries=0)
    boards = [open_board(), open_board()]
    try:
        listener.listen_to(boards[0])
        listener.ask_to_stop()
        listener.listen_to(boards[1])
        assert ray.get([board.post.remote({"kind": "status"}) for board in boards]) == [True, True]
    finally:
        for board in boards:
            ray.kill(board)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="CPUs are given to a process on Linux")
def test_a_private_ray_counts_the_cpus_that_this_process_may_use() -> None:
    script = (
        "import os, ray\nfrom ft_ray import ray_session\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "with ray_session.session():\n    print(ray.cluster_resources()['CPU'])\n"
    )
    alone = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", script]
    out = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=120, check=True)
    assert out.stdout.split() == ["1.0"]
