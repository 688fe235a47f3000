"""What Ray Tune and the driver cost a sweep: 1,000 trials of the real client on an engine that trains nothing.

    python benchmarks/tune_overhead.py [--trials 1000] [--concurrent 4] [--only none|asha] [--mlflow] [--json FILE]

The engine here is a stub in place of `sweep_actor.EngineActor`: it answers the same calls at once, with four reports a
trial. Everything else is `ft_ray.tuning.sweep`: Tune, the clients, leases, pointer checkpoints, snapshots, reused
actors, the table's events, the budget's stopper, and with `--mlflow` a child run for each trial. Prints trials a second
and core-seconds (user + system) of the driver and of all other processes a trial, over the whole sweep and over its
last fifth, where what grows with the number of trials shows; never asserts a time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import ray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ft_ray import ray_session, search_space, tuning  # noqa: E402
from ft_ray.recipe import from_dict  # noqa: E402
from ft_ray.storage import Store  # noqa: E402
from ft_ray.sweep_engines import Engines  # noqa: E402
from ft_ray.sweep_trial import Link  # noqa: E402

MARKS = (10, 30, 90, 100)


class StubEngine:
    """Answers as an engine does whose trials need no time."""

    def __init__(self) -> None:
        self._points: dict[str, list[dict[str, Any]]] = {}
        self._forwards = 0

    def ready(self) -> dict[str, Any]:
        return {"slots": 1000, "device": "cpu"}

    def load(self) -> dict[str, int]:
        return {"free": 1000, "slots": 1000}

    def attach(self, trial: str, point: dict[str, Any], token: str) -> dict[str, Any]:
        return {"total": MARKS[-1], "pauses": list(MARKS[:-1]), "points": self._points.setdefault(trial, []),
                "stopped": None}  # fmt: skip

    def advance(self, trial: str, token: str, until: int) -> bool:
        loss = random.Random(trial).random() + 1 / until
        self._forwards += 1
        self._points[trial].append({"step": until, "validation_loss": loss, "train_loss": loss, "tokens": until * 64,
                                    "checkpoint": f"trials/{trial}/step-{until:08d}", "hash": "0" * 64})  # fmt: skip
        return True

    def poll(self, trial: str, token: str, seen: int, wait: float = 1.0) -> dict[str, Any]:
        return {"points": self._points[trial][seen:], "stopped": None, "step": 0}

    def renew(self, trial: str, token: str) -> bool:
        return True

    def detach(self, trial: str, token: str) -> None:
        pass

    def stats(self) -> dict[str, Any]:
        return {"id": "stub", "device": "cpu", "mean_k": 1.0, "forwards": self._forwards, "trained_tokens": 0,
                "padding": 0.0, "out_of_memory": 0, "k_limit": None, "restarts": 0, "node": "",
                "adapters": float(self._forwards), "spent": {}}  # fmt: skip


class Rows:
    """As many training rows as the sweep has to know of: it reads nothing but their number."""

    def tokens(self, split: str) -> Any:
        import datasets

        return datasets.Dataset.from_dict({"input_ids": [[3, 4]] * 64, "labels": [[3, 4]] * 64, "length": [2] * 64})


def _kind(process: psutil.Process) -> str:
    command = process.cmdline()
    first = command[0] if command else ""
    if first.startswith("ray::"):
        name = first[len("ray::") :].split(".")[0].split("(")[0].strip().lower()
        return {"implicitfunc": "clients"}.get(name, name)
    names = (Path(part).name for part in command[:6])
    return next((n for n in names if n and not n.startswith(("python", "-"))), "python")


def stub_engines(*_: Any) -> Any:
    """In place of `sweep_engines.engines`."""

    @contextlib.contextmanager
    def made() -> Iterator[Engines]:
        actor: Any = ray.remote(StubEngine).options(name="stub-engine", num_cpus=0).remote()
        try:
            yield Engines([actor], Link(("stub-engine",), ray.get_runtime_context().namespace), 0)
        finally:
            ray.kill(actor)

    return made()


class Meter:
    """Takes a sweep's events; notes when how many trials had ended and what the processes had used by then."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int, float, float]] = []
        self._used: dict[int, tuple[str, float]] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        if event["kind"] == "sweep":
            self.sample(sum(row["state"] in ("terminated", "error") for row in event["rows"]))

    def sample(self, ended: int) -> None:
        here = psutil.Process()
        for process in here.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                used, kind = process.cpu_times(), _kind(process)
                was = self._used.get(process.pid, ("", 0.0))[0]
                # A process that ran trials stays one of theirs when it is idle again.
                self._used[process.pid] = (was if kind == "idle" and was else kind, used.user + used.system)
        own = here.cpu_times()
        self.samples.append(
            (time.perf_counter(), ended, own.user + own.system, sum(seconds for _, seconds in self._used.values()))
        )

    def kinds(self) -> dict[str, dict[str, float]]:
        """Processes and core-seconds of each kind, the dearest first."""
        found: dict[str, list[float]] = {}
        for kind, seconds in self._used.values():
            found.setdefault(kind, []).append(seconds)
        ranked = sorted(found.items(), key=lambda item: -sum(item[1]))
        return {kind: {"processes": len(each), "core_seconds": round(sum(each), 1)} for kind, each in ranked}

    def between(self, first: tuple[float, ...], last: tuple[float, ...]) -> dict[str, float]:
        trials = max(1.0, last[1] - first[1])
        return {
            "trials": int(trials), "seconds": round(last[0] - first[0], 2),
            "trials_per_second": round(trials / (last[0] - first[0]), 2),
            "driver_core_seconds_per_trial": round((last[2] - first[2]) / trials, 4),
            "other_core_seconds_per_trial": round((last[3] - first[3]) / trials, 4),
        }  # fmt: skip

    def stretches(self, parts: int = 5) -> list[dict[str, float]]:
        """The sweep in `parts` stretches of as many trials each, from the first trial's end on."""
        total = self.samples[-1][1]
        cuts = [next(s for s in self.samples if s[1] >= max(1, total * i // parts)) for i in range(parts + 1)]
        return [self.between(a, b) for a, b in itertools.pairwise(cuts) if b[0] > a[0]]


def measure(trials: int, concurrent: int, scheduler: str, mlflow: bool) -> dict[str, Any]:
    """One sweep of `trials` stub trials."""
    rules = {"type": "asha", "reduction": 3, "grace": 0.1} if scheduler == "asha" else {"type": "none"}
    space = search_space.parse({
        "search": {"lora.r": {"choice": [8, 16]}, "optim.lr": {"loguniform": [1e-5, 1e-2]}}, "searcher": "random",
        "scheduler": rules, "budget": {"trials": trials}, "concurrent": concurrent, "confirm": {"top": 0},
    })  # fmt: skip
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        recipe = from_dict({
            "name": "bench", "model": {"id": folder}, "data": {"train": [{"path": "unused.jsonl"}]}, "method": "lora",
            "batch": {"global": 4, "per_device": 4}, "schedule": {"max_steps": MARKS[-1], "epochs": 1000},
            "resources": {"workers": 1, "gpus": 0}, "tracking": {"to": ["mlflow"] if mlflow else []},
            "storage": folder,
        })  # fmt: skip
        files: Any = SimpleNamespace(hash="stub")  # of the base: a sweep that is resumed must find the same
        meter.sample(0)
        result = tuning.sweep(recipe, space, Rows(), files, Store(recipe.run_path), on_event=meter)
        meter.sample(len(result.trials))
        reports = len(list(Path(folder).rglob("pointer.json")))
    return {
        "scheduler": scheduler, "trials": len(result.trials), "concurrent": concurrent, "mlflow": mlflow,
        "whole": meter.between(meter.samples[0], meter.samples[-1]), "stretches": meter.stretches(),
        "failed": sum(t.status == "failed" for t in result.trials), "pointers": reports,
        "kinds": meter.kinds(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--concurrent", type=int, default=4)
    parser.add_argument("--only", choices=("none", "asha"), help="one scheduler only")
    parser.add_argument("--mlflow", action="store_true", help="a child run a trial, as the default recipe has it")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    tuning.engines = stub_engines
    found = []
    for kind in (given.only,) if given.only else ("none", "asha"):
        with ray_session.session():
            found.append(measure(given.trials, given.concurrent, kind, given.mlflow))
        print(json.dumps(found[-1], indent=1), flush=True)
        if given.json:
            answer = {"runs": found, "ray": ray.__version__, "machine": platform.machine()}
            given.json.write_text(json.dumps(answer, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
