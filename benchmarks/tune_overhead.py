"""What Ray Tune itself costs a sweep: 1,000 trials of the real client on an engine that trains nothing.

    python benchmarks/tune_overhead.py [--trials 1000] [--concurrent 4] [--json FILE]

The engine here is a stub in place of `sweep_engine.Engine`: it answers the same calls at once, with four reports a
trial. Everything else is what a sweep uses: Tune, the client, leases, pointer checkpoints, snapshots, reused actors.
Prints trials a second; never asserts a time.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import RunConfig, TuneConfig, Tuner

from ft_ray import ray_session, sweep_search, sweep_trial, tuning
from ft_ray.env_vars import environment

MARKS = (10, 30, 90, 100)


class StubEngine:
    """Answers as an engine does whose trials need no time."""

    def __init__(self) -> None:
        self._points: dict[str, list[dict[str, Any]]] = {}
        self.calls = 0

    def load(self) -> dict[str, int]:
        return {"free": 1000}

    def attach(self, trial: str, point: dict[str, Any], token: str) -> dict[str, Any]:
        self.calls += 1
        return {"total": MARKS[-1], "pauses": list(MARKS[:-1]), "points": self._points.setdefault(trial, []),
                "stopped": None}  # fmt: skip

    def advance(self, trial: str, token: str, until: int) -> bool:
        self.calls += 1
        loss = random.Random(trial).random() + 1 / until
        self._points[trial].append({"step": until, "validation_loss": loss, "train_loss": loss, "tokens": until * 64,
                                    "checkpoint": f"trials/{trial}/step-{until:08d}", "hash": "0" * 64})  # fmt: skip
        return True

    def poll(self, trial: str, token: str, seen: int, wait: float = 1.0) -> dict[str, Any]:
        self.calls += 1
        return {"points": self._points[trial][seen:], "stopped": None, "step": 0}

    def renew(self, trial: str, token: str) -> bool:
        return True

    def detach(self, trial: str, token: str) -> None:
        self.calls += 1


def measure(trials: int, concurrent: int, scheduler: str) -> dict[str, Any]:
    """One sweep of `trials` stub trials; returns wall seconds and rates."""
    name, namespace = "stub-engine", ray.get_runtime_context().namespace
    engine: Any = ray.remote(StubEngine).options(name=name, num_cpus=0).remote()
    points = [{"lora.r": 8, "optim.lr": 1e-4 * (1 + i)} for i in range(trials)]
    chosen: Any = sweep_search._Fifo()
    if scheduler == "asha":
        chosen = sweep_search.Asha(time_attr="step", max_t=MARKS[-1], grace_period=MARKS[0], reduction_factor=3)
    with tempfile.TemporaryDirectory() as folder:
        trainable = sweep_trial.trainable(sweep_trial.Link((name,), namespace))
        tuner = Tuner(
            tune.with_resources(trainable, {"memory": 1}),
            param_space={"point": tune.grid_search(points)},
            tune_config=TuneConfig(
                metric="validation_loss", mode="min", scheduler=chosen, max_concurrent_trials=concurrent,
                reuse_actors=True, trial_name_creator=sweep_search.trial_name,
                trial_dirname_creator=sweep_search.trial_name,
            ),
            run_config=RunConfig(name="tune", storage_path=folder, verbose=0),
        )  # fmt: skip
        started = time.perf_counter()
        results = tuner.fit()
        seconds = time.perf_counter() - started
    reports = sum(int(r.metrics["step"] >= m) for r in results if r.metrics for m in MARKS)
    processes = len({r.metrics["pid"] for r in results if r.metrics})
    ray.kill(engine)
    return {
        "scheduler": scheduler, "trials": len(results), "processes": processes, "concurrent": concurrent,
        "seconds": round(seconds, 2),
        "reports": reports, "errors": len(results.errors), "trials_per_second": round(len(results) / seconds, 2),
        "milliseconds_per_report": round(1000 * seconds / max(1, reports), 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--concurrent", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with ray_session.session(), environment(tuning._ENVIRONMENT):
        found = [measure(arguments.trials, arguments.concurrent, kind) for kind in ("none", "asha")]
    for one in found:
        print(
            f"{one['scheduler']}: {one['trials']} trials, {one['reports']} reports, {one['processes']} processes "
            f"in {one['seconds']} s: "
            f"{one['trials_per_second']} trials a second, {one['milliseconds_per_report']} ms a report"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"runs": found, "ray": ray.__version__}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
