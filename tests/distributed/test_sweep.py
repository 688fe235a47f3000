"""Sweeps through Ray Tune on shared bases: together equals alone, stops are clean, and what is killed goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray import tune

from ft_ray import (
    base_model,
    model_loading,
    ray_session,
    search_space,
    sweep_data,
    sweep_engines,
    sweep_states,
    sweep_trial,
)  # fmt: skip
from ft_ray.env_vars import environment
from ft_ray.recipe import Recipe
from ft_ray.search_space import Space
from ft_ray.shared_base import SharedBase
from ft_ray.storage import Store
from ft_ray.sweep_actor import EngineActor
from ft_ray.sweep_data import SweepRows
from ft_ray.sweep_engine import Engine
from ft_ray.sweep_lease import EngineSetup
from ft_ray.sweep_results import SweepResult, TrialResult
from ft_ray.sweep_trial import Link
from ft_ray.tuning import sweep
from tests.parity.test_training import make
from tests.token_rows import TokenRows

STEPS = 24
LONG, EVERY = 320, 40  # where something has to happen before all trials end
MIDDLE = 160

POINTS: list[dict[str, Any]] = [
    {"lora.r": (2, 4, 8, 16)[i % 4], "lora.alpha": (4, 16)[i % 2], "lora.dropout": (0.0, 0.1)[i // 2 % 2],
     "optim.lr": (2e-3, 5e-3, 1e-2)[i % 3]}
    for i in range(8)
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _session() -> Iterator[None]:
    with ray_session.session(num_cpus=2):
        yield


def recipe_of(model: Path, **values: Any) -> Recipe:
    defaults: dict[str, Any] = {
        "schedule": {"max_steps": STEPS, "epochs": 100}, "evaluation": {"every": 8}, "tracking": {"to": []},
        "gradient_checkpointing": False, "batch": {"global": 4},
    }  # fmt: skip
    return make(model, **{**defaults, **values})


def space_of(**values: Any) -> Space:
    made = {"search": {"lora.r": {"choice": [2, 4, 8]}}, "budget": {"trials": 4}, "keep": 99, "retries": 0}
    return search_space.parse({**made, **values})


class Watcher(list[dict[str, Any]]):
    """Collects a sweep's events, and does something at the first table of trials for which `when` holds."""

    def __init__(self, when: Any = None, do: Any = None) -> None:
        super().__init__()
        self._when, self._do, self.done = when, do, False

    def __call__(self, event: dict[str, Any]) -> None:
        self.append(event)
        if event["kind"] == "sweep" and self._when is not None and self._when(event["rows"]):
            self._when = None
            self._do()
            self.done = True


def run(made: Recipe, space: Space, store: Store, watcher: Watcher | None = None, **options: Any) -> SweepResult:
    listen = Watcher() if watcher is None else watcher
    return sweep(made, space, TokenRows(count=30), base_model.resolve(made.model), store, on_event=listen, **options)


def by_point(result: SweepResult) -> dict[str, TrialResult]:
    return {json.dumps(trial.config, sort_keys=True): trial for trial in result.trials}


def long_recipe(model: Path, steps: int = LONG) -> Recipe:
    return recipe_of(model, schedule={"max_steps": steps, "epochs": 1000}, evaluation={"every": EVERY})


def assert_each_mark_once(trial: TrialResult, steps: int = STEPS, every: int = 8) -> None:
    assert trial.steps == steps
    assert [point.step for point in trial.history] == list(range(every, steps + 1, every))
    tokens = [point.tokens for point in trial.history]
    assert tokens == sorted(tokens) and tokens[-1] == trial.tokens


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As an engine on a base this narrow: the sums are in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train_alone(made: Recipe) -> list[tuple[int, float, float]]:
    """(step, validation loss, mean training loss) at the marks, of one adapter on a base of its own, without Ray."""
    rows = SweepRows(TokenRows(count=30), made)
    shared = SharedBase(model_loading.load_model(base_model.resolve(made.model), made, device="cpu", quantized=False))
    shared.attach("alone", sweep_data.adapter_config(made, rows))
    found, losses = [], []
    for step in range(STEPS):
        batch = rows.batch(sweep_data.rows_at(made, rows, step), 4)
        losses.append(shared.step({"alone": batch})["alone"].loss)
        if (step + 1) % 8 == 0:
            held_out = shared.evaluate({"alone": rows.validation(16)})["alone"]  # as many a forward as in an engine
            found.append((step + 1, held_out.loss, math.fsum(losses) / len(losses)))
            losses = []
    return found


@pytest.mark.usefixtures("one_thread")
def test_trials_on_two_engines_equal_each_alone_and_a_nan_stops_alone(tiny_model: Path, tmp_path: Path) -> None:
    made = recipe_of(tiny_model)
    diverging = {"lora.r": 4, "lora.alpha": 1e20, "optim.lr": 1e20}
    together = run(made, space_of(engines=2), Store(tmp_path / "a"), points=[*POINTS[:5], diverging])
    assert (together.shared, together.status, together.device) == (True, "done", "cpu")
    assert len(together.engines) == 2 and all(engine.trained_tokens > 0 for engine in together.engines)
    found = by_point(together)
    stopped = found.pop(json.dumps(diverging, sort_keys=True))
    assert stopped.status == "stopped" and "not finite" in stopped.error and stopped.steps < STEPS
    for trial in found.values():
        assert trial.status == "done" and trial.error == ""
        assert_each_mark_once(trial)
        assert trial.best_loss == min(p.validation_loss or math.inf for p in trial.history)
        folder = Path(Store(tmp_path / "a").path(trial.checkpoint or ""))
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == trial.config["lora.r"]
    assert together.trained_tokens == sum(trial.tokens for trial in together.trials)
    assert len({trial.best_loss for trial in found.values()}) == len(found)

    for point in POINTS[:3]:
        alone = train_alone(search_space.apply(made, point))
        packed = found[json.dumps(point, sort_keys=True)].history
        assert [(p.step, p.validation_loss, p.train_loss) for p in packed] == alone, "packed differs from alone"


def test_optuna_proposes_asha_prunes_and_the_first_point_is_tried(tiny_model: Path, tmp_path: Path) -> None:
    made = recipe_of(tiny_model, evaluation={"every": 24})
    space = space_of(
        search={
            "lora.r": {"choice": [2, 4, 8]},
            "lora.alpha": {"times": "lora.r", "choice": [1, 2]},
            "optim.lr": {"loguniform": [1e-5, 1e-2]},
        },
        first=[{"lora.r": 8, "lora.alpha": 16, "optim.lr": 1e-2}],
        searcher="tpe", scheduler={"type": "asha", "reduction": 2, "grace": 3}, budget={"trials": 6}, concurrent=3,
        keep=1, confirm={"top": 0},
    )  # fmt: skip
    watcher = Watcher()
    result = run(made, space, Store(tmp_path / "run"), watcher)
    assert len(result.trials) == 6
    assert any(t.config == {"lora.r": 8, "lora.alpha": 16, "optim.lr": 1e-2} for t in result.trials)
    assert {t.status for t in result.trials} == {"done", "pruned"}
    for trial in result.trials:
        assert [p.step for p in trial.history] == [m for m in (3, 6, 12, 24) if m <= trial.steps]
    assert sum(t.steps for t in result.trials) < 6 * STEPS
    best = min(result.trials, key=lambda t: t.best_loss or math.inf)
    assert [t.id for t in result.trials if t.checkpoint] == [best.id], "only the best one's checkpoint stays"
    assert Store(tmp_path / "run").list("sweep/trials") == [best.id]
    tables = [event for event in watcher if event["kind"] == "sweep"]
    assert tables and {"id", "point", "state", "step", "validation_loss"} <= set(tables[-1]["rows"][0])
    again = SweepResult.model_validate(Store(tmp_path / "run").read_json("sweep/sweep.json"))
    assert again == result


class SlowToLeave(EngineActor):
    """An engine that is in the middle of a step or of writing when a trial leaves, for longer than Tune's 2 s."""

    async def detach(self, trial: str, token: str) -> None:
        await asyncio.sleep(3.0)
        await super().detach(trial, token)


@pytest.mark.faults  # for its length
def test_a_trial_may_take_the_process_of_one_that_leaves_slowly(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_engines, "EngineActor", SlowToLeave)
    asha = {"type": "asha", "reduction": 2, "grace": 3}
    space = space_of(searcher="random", scheduler=asha, budget={"trials": 6}, concurrent=2,
                     search={"lora.r": {"choice": [2, 4, 8]}, "optim.lr": {"loguniform": [1e-4, 1e-2]}})  # fmt: skip
    result = run(recipe_of(tiny_model), space, Store(tmp_path / "slow"))
    assert {t.status for t in result.trials} == {"done", "pruned"}, [t.error for t in result.trials]


def test_the_client_of_a_trial_needs_no_torch() -> None:
    # The actor's class as well: looking an engine up by name loads it.
    code = (
        "import sys, ft_ray.sweep_trial, ft_ray.sweep_actor; "
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_process_of_a_trial_has_no_pandas(tmp_path: Path) -> None:
    """Nor Ray Data, in a real process of Tune's: the trial's class is the first that it is given."""

    def thin(config: dict[str, Any]) -> None:
        tune.report({"heavy": sorted({"pandas", "ray.data", "torch"} & set(sys.modules))})

    thin.__mixins__ = sweep_trial.trainable(Link((), "")).__mixins__  # type: ignore[attr-defined]
    with environment({"RAY_AIR_NEW_OUTPUT": "0"}):
        found = tune.Tuner(thin, run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0)).fit()
    assert found[0].error is None and found[0].metrics is not None and found[0].metrics["heavy"] == []


@pytest.mark.faults  # for its length
def test_sixteen_trials_are_more_than_four_a_forward(tiny_model: Path, tmp_path: Path) -> None:
    points = [{"lora.r": r, "optim.lr": lr} for r in (2, 4, 8, 16) for lr in (1e-3, 2e-3, 4e-3, 8e-3)]
    result = run(recipe_of(tiny_model), space_of(), Store(tmp_path / "many"), points=points)
    assert [t.status for t in result.trials] == ["done"] * 16
    assert result.mean_k > 4


@pytest.mark.faults  # for its length
def test_what_cannot_share_a_base_trains_in_runs_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    made = recipe_of(tiny_model, optim={"name": "adafactor", "lr": 1e-2})
    watcher, store = Watcher(), Store(tmp_path / "apart")
    result = run(made, space_of(), store, watcher, points=[{"lora.r": 2}, {"lora.r": 8}])
    said = [event["message"] for event in watcher if event["kind"] == "status"]
    assert any(message.startswith("one Ray Train run a trial: optim.name adafactor") for message in said), said
    assert not result.shared and result.engines == ()
    for trial in result.trials:
        assert trial.status == "done" and trial.steps == STEPS, trial.error
        folder = Path(store.path(trial.checkpoint or ""))
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == trial.config["lora.r"]


@pytest.fixture
def another_ray() -> Iterator[None]:
    """A second private Ray on this machine, of another process."""
    code = "from ft_ray import ray_session\nwith ray_session.session(num_cpus=1): print('up', flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield
        process.communicate("\n", timeout=60)


@pytest.mark.faults  # for its length
@pytest.mark.usefixtures("another_ray")
def test_runs_of_their_own_are_pruned_too(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say the word {i}", "completion": "yes yes yes yes"} for i in range(60)]  # each run reads them
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"train": [{"path": str(tmp_path / "rows.jsonl")}], "split": {"validation": 0.2, "test": 0.0}}
    made = recipe_of(tiny_model, evaluation={"every": 6}, data=data)
    space = space_of(
        search={"sequence.max_length": {"choice": [64, 96]}, "optim.lr": {"choice": [1e-6, 1e-2]}}, searcher="grid",
        scheduler={"type": "asha", "reduction": 2, "grace": 6}, budget={"trials": 4}, concurrent=1,
        seed=1,  # one of the better two comes first
    )  # fmt: skip
    watcher = Watcher()
    result = run(made, space, Store(tmp_path / "apart"), watcher)
    said = [event["message"] for event in watcher if event["kind"] == "status"]
    assert any(message.startswith("one Ray Train run a trial: sequence.max_length") for message in said), said
    assert not result.shared and len(result.trials) == 4
    found = [(t.config["optim.lr"], t.status, t.steps) for t in result.trials]
    assert [one for one in found if one[0] == 1e-6] == [(1e-6, "pruned", 6)] * 2, found
    assert (1e-2, "done", STEPS) in found, found
    winner = min(result.trials, key=lambda t: t.best_loss or math.inf)
    assert winner.status == "done" and winner.checkpoint is not None


# What is killed


def _engine_pid(store: Store) -> int:
    return int(store.read_json("sweep/engines/0.json")["pid"])


@pytest.mark.faults
def test_a_killed_engine_loses_no_trial_and_counts_none_twice(tiny_model: Path, tmp_path: Path) -> None:
    """kill -9 with 8 trials on it, with no retry to spend: all go on from their last report, bit for bit."""
    store = Store(tmp_path / "b")

    def all_have_reported(rows: list[dict[str, Any]]) -> bool:
        return len(rows) == 8 and all(row["step"] >= EVERY for row in rows) and store.exists("sweep/engines/0.json")

    long = long_recipe(tiny_model)
    watcher = Watcher(all_have_reported, lambda: os.kill(_engine_pid(store), signal.SIGKILL))
    killed = run(long, space_of(), store, watcher, points=POINTS)
    assert watcher.done
    assert [engine.restarts for engine in killed.engines] == [1]
    assert len(killed.trials) == 8
    for trial in killed.trials:
        assert trial.status == "done"
        assert_each_mark_once(trial, LONG, EVERY)
        assert not Store(tmp_path / "b").exists(f"sweep/tune/{trial.id}/error.txt"), "no failure was counted"
    unharmed = by_point(run(long, space_of(), Store(tmp_path / "c"), points=POINTS[:2]))
    for key, trial in unharmed.items():
        assert by_point(killed)[key].history == trial.history
    assert len(by_point(killed)) == 8


@pytest.mark.faults
def test_the_place_of_a_killed_client_is_free_within_ten_seconds(tiny_model: Path, tmp_path: Path) -> None:
    made = recipe_of(tiny_model)
    files = base_model.resolve(made.model)
    setup = EngineSetup(made, space_of(), files, TokenRows(count=30), str(tmp_path), 0, "cpu", 1, 2)
    engine: Any = ray.remote(Engine).options(num_cpus=1, max_concurrency=100).remote(setup)
    try:
        assert ray.get(engine.ready.remote(), timeout=120)["slots"] == 2

        @ray.remote(num_cpus=0, max_retries=0)
        def client() -> None:
            ray.get(engine.attach.remote("t", {"lora.r": 4}, "token"))
            ray.get(engine.advance.remote("t", "token", 8))
            while True:
                ray.get(engine.poll.remote("t", "token", 0))
                (tmp_path / "pid").write_text(str(os.getpid()))
                time.sleep(0.5)

        running = client.remote()
        _wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        assert ray.get(engine.trials.remote()) == ["t"]
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        killed = time.monotonic()
        _wait(lambda: ray.get(engine.trials.remote()) == [])
        assert time.monotonic() - killed < 10
        assert ray.get(engine.load.remote()) == {"free": 2, "slots": 2}
        with pytest.raises(ray.exceptions.WorkerCrashedError):
            ray.get(running)
        # What it had reported is there for whoever comes next.
        found = ray.get(engine.attach.remote("t", {"lora.r": 4}, "another"))
        assert [point["step"] for point in found["points"]] == [8]
        assert ray.get(engine.attach.remote("u", {"lora.r": 4}, "u")) is not None
        assert ray.get(engine.attach.remote("v", {"lora.r": 4}, "v")) is None, "full"
        # While it trains it has an earlier state to fall back to; once it has left, no more than what is asked for.
        store, points = Store(tmp_path), found["points"]
        ray.get(engine.advance.remote("t", "another", STEPS))
        while points[-1]["step"] < STEPS:
            points += ray.get(engine.poll.remote("t", "another", len(points)))["points"]
        assert sweep_states.steps(store, "t")[:2] == [24, 16]
        ray.get(engine.detach.remote("t", "another"))
        best = min(points, key=lambda point: point["validation_loss"])["step"]
        assert set(sweep_states.steps(store, "t")) == {24, best}
    finally:
        ray.kill(engine)


def _wait(state: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not state():
        assert time.monotonic() < deadline, "the state never came"
        time.sleep(0.1)


@pytest.mark.faults
def test_a_stopped_sweep_goes_on_where_it_was(tiny_model: Path, tmp_path: Path) -> None:
    made, store, stop = long_recipe(tiny_model, MIDDLE), Store(tmp_path / "run"), threading.Event()
    watcher = Watcher(lambda rows: any(r["state"] == "terminated" for r in rows), stop.set)
    space = space_of(concurrent=1)
    first = run(made, space, store, watcher, points=POINTS[:4], stop=stop)
    assert (first.status, first.reason) == ("stopped", "interrupted")
    finished = {t.id: t for t in first.trials if t.status == "done"}
    assert 1 <= len(finished) < 4
    written = {i: store.tree(t.checkpoint or "") for i, t in finished.items()}
    second = run(made, space, store, points=POINTS[:4], resume=True)
    assert second.status == "done" and [t.status for t in second.trials] == ["done"] * 4
    for trial in second.trials:
        assert_each_mark_once(trial, MIDDLE, EVERY)
        if trial.id in finished:
            assert trial == finished[trial.id], "a finished trial is kept as it is"
            assert store.tree(trial.checkpoint or "") == written[trial.id]
    assert len(by_point(second)) == 4


_DRIVER = """
import sys
from pathlib import Path
from ft_ray import ray_session
from ft_ray.storage import Store
from tests.distributed import test_sweep as t
with ray_session.session(num_cpus=2):
    t.run(t.long_recipe(Path(sys.argv[1]), t.MIDDLE), t.one_at_a_time(sys.argv[3]), Store(sys.argv[2]),
          points=t.POINTS[:4] if sys.argv[3] == "points" else None)
"""


def one_at_a_time(searcher: str) -> Space:
    """A sweep of four trials, one after another: of given points, or proposed by Optuna and pruned by ASHA."""
    if searcher == "points":
        return space_of(concurrent=1)
    return space_of(
        search={"lora.r": {"choice": [2, 4, 8]}, "optim.lr": {"loguniform": [1e-4, 1e-2]}}, searcher=searcher,
        scheduler={"type": "asha", "reduction": 2, "grace": EVERY}, concurrent=1,
    )  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("searcher", ["points", "tpe"])
def test_a_sweep_whose_driver_was_killed_keeps_its_finished_trials(
    tiny_model: Path, tmp_path: Path, searcher: str
) -> None:
    store, root = Store(tmp_path / "run"), Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", _DRIVER, str(tiny_model), str(tmp_path / "run"), searcher]
    driver = subprocess.Popen(command, env=environment)

    def ended() -> list[str]:
        last = f"step-{MIDDLE:08d}"
        return [i for i in store.list("sweep/trials") if store.tree(f"sweep/trials/{i}/{last}") is not None]

    least = 2 if searcher == "points" else 1  # ASHA may prune the others

    try:
        _wait(lambda: len(ended()) >= least, 240)
    finally:
        started = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        # Its Ray goes with it, but for two agents of the node, which notice only later.
        for process in psutil.wait_procs(started, timeout=10)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    finished = {i: Path(store.path(f"sweep/trials/{i}")) for i in ended()}
    written = {f: f.stat().st_mtime_ns for folder in finished.values() for f in folder.glob("*/state.json")}
    assert least <= len(finished) < 4 and not store.exists("sweep/sweep.json")

    points = POINTS[:4] if searcher == "points" else None
    result = run(long_recipe(tiny_model, MIDDLE), one_at_a_time(searcher), store, points=points, resume=True)
    assert result.status == "done" and {t.status for t in result.trials} <= {"done", "pruned"}
    assert len(by_point(result)) == len(result.trials) == 4 and {*finished} <= {t.id for t in result.trials}
    assert searcher == "tpe" or all(t.status == "done" for t in result.trials)
    for trial in result.trials:
        if trial.status == "done":
            assert_each_mark_once(trial, MIDDLE, EVERY)
        if trial.id in finished:
            kept = finished[trial.id] / f"step-{trial.best_step:08d}" / "state.json"
            assert kept.stat().st_mtime_ns == written[kept], "a finished trial is not trained again"
