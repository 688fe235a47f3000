"""One shared-base engine a device: trials per hour of a sweep on N devices against one.

    python benchmarks/sweep_devices.py --device cuda --devices 2 [--shape 1B] [--model FOLDER] [--json FILE]

The whole sweep through Ray Tune, `--trials` trials an engine of `--steps` steps each, without pruning, so that every
engine holds as many adapters in both sweeps; a quarter of the steps apart, a trial is measured and saved. Told with
seconds: each part of the start, each second's steps, and where the time of each engine's thread went (`spent`), so
that the output of a sweep that is cut off says how far it came; what it had is kept as `partial`. Three ratios to N
times one device: trials per hour while training (between the first and the last report), trials per hour with
everything counted but the process's imports and Ray's start and end, and tokens a second of the engines' own steps,
which tells whether they slow one another down. Weights are random.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sweep as solo
import sweep_tune
from random_base import SHAPES, random_folder
from runs import end_tree

EVERY = 0.25


def child(work: dict[str, Any], answer: Path) -> None:
    """One sweep in this process; `answer` is written as it goes on."""
    born = time.monotonic()
    from ft_ray import base_model, ray_session
    from ft_ray.storage import Store
    from ft_ray.tuning import sweep

    case = solo.Case(**work["case"])
    made = sweep_tune.recipe(case, every=EVERY)
    made = made.model_copy(update={"model": made.model.model_copy(update={"id": work["model"]})})
    # The same points for every engine, a thousandth of the learning rate apart: equal work whatever their number.
    one = dataclasses.replace(case, trials=case.trials // work["engines"])
    points = [
        {**point, "optim.lr": point["optim.lr"] * (1 + number / 1000)}
        for number in range(work["engines"])
        for point in sweep_tune.points(one)
    ]
    space = sweep_tune.space(one, 0, asha=False).model_copy(update={"engines": work["engines"]})
    store = Store(made.run_path)
    phases: dict[str, float] = {}  # seconds since the process began
    reported: list[tuple[float, int]] = []  # seconds, steps of all trials so far
    found: dict[str, Any] = {"phases": phases, "reported": reported}

    def phase(name: str) -> None:
        if name not in phases:
            phases[name] = round(time.monotonic() - born, 1)
            print(f"{phases[name]:6.1f} s: {name}", file=sys.stderr, flush=True)
            answer.write_text(json.dumps(found))

    def on_event(event: dict[str, Any]) -> None:
        if event["kind"] == "status" and "note:" not in event["message"]:
            print(f"{time.monotonic() - born:6.1f} s: {event['message']}", file=sys.stderr, flush=True)
        elif event["kind"] == "sweep":
            phase("engines are up, trials start")
            running = sum(row["state"] == "running" for row in event["rows"])
            if running:
                phase("the first trial's process runs")
            if running == work["case"]["trials"]:
                phase("every trial's process runs")
            steps = sum(row["step"] for row in event["rows"])
            if steps > (reported[-1][1] if reported else 0):
                phase("the first report")
                reported.append((round(time.monotonic() - born, 2), steps))
                mean = f", {event['mean_k']:.1f} adapters a forward" if event["mean_k"] else ""
                print(f"{reported[-1][0]:6.1f} s: {steps} steps{mean}", file=sys.stderr, flush=True)
                names = [name for name in store.list("sweep/engines") if name.endswith(".json")]  # whole ones
                found["engines"] = [store.read_json(f"sweep/engines/{name}") for name in names]
                answer.write_text(json.dumps(found))

    phase("imports")
    files = base_model.resolve(made.model)
    phase("the base is hashed")
    with ray_session.session():
        phase("Ray is up")
        result = sweep(made, space, sweep_tune.data(case), files, store, on_event=on_event, points=points)
        phase("the sweep has ended")
    phase("Ray has ended")
    engines = [one.model_dump() for one in result.engines]
    for one in engines:
        print(f"        {one['id']}: mean k {one['mean_k']:.1f}, {one['forwards']} forwards, {one['spent']}",
              file=sys.stderr, flush=True)  # fmt: skip
    found |= {
        "trials": len(result.trials), "seconds": result.seconds, "tokens": result.trained_tokens,
        "mean_k": result.mean_k, "steps": sum(t.steps for t in result.trials), "engines": engines,
        "losses": [t.best_loss for t in result.trials], "whole": True,
    }  # fmt: skip
    answer.write_text(json.dumps(found))


def figures_of(found: dict[str, Any], steps: int) -> dict[str, Any]:
    """Trials per hour out of what a sweep left, whole or not."""
    reported = found.get("reported", [])
    if len(reported) > 1:
        (first, done), (last, whole) = reported[0], reported[-1]
        found["training_seconds"] = round(last - first, 1)
        found["trials_per_hour"] = 3600 * (whole - done) / max(last - first, 1e-9) / steps
    stepping = [one["trained_tokens"] / one["spent"]["stepping"] for one in found.get("engines", []) if one["forwards"]]
    found["tokens_per_stepping_second"] = sum(stepping)  # of all engines: whether they slow one another down
    if found.pop("whole", False):
        found["trials_per_hour_everything"] = 3600 * found["trials"] / found["seconds"]
    else:
        found["partial"] = True
    return found


def ratios(figures: dict[str, Any], devices: int) -> dict[str, float]:
    """N devices over N times one, where both are known."""
    named = {
        "ratio_to_n_times_one": "trials_per_hour", "ratio_everything": "trials_per_hour_everything",
        "ratio_stepping": "tokens_per_stepping_second",
    }  # fmt: skip
    rates = {name: [figures.get(str(c), {}).get(key) for c in (1, devices)] for name, key in named.items()}
    return {name: many / (devices * one) for name, (one, many) in rates.items() if one and many}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--counts", help="only these of 1 and --devices; the other one's figures are taken from --json")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--model", type=Path, help="a folder of that shape; made where there is none")
    parser.add_argument("--nf4", action="store_true", help="the base in 4 bits, as QLoRA has it")
    parser.add_argument("--trials", type=int, default=8, help="an engine")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=512, help="tokens a step of one trial, at most")
    parser.add_argument("--limit", type=float, default=240, help="seconds after which a sweep is cut off")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.json)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # its sweep ends with it
    counts = [int(c) for c in given.counts.split(",")] if given.counts else [1, given.devices]
    known = json.loads(given.json.read_text())["figures"] if given.json and given.json.exists() else {}
    figures: dict[str, Any] = {count: one for count, one in known.items() if int(count) not in counts}
    settings = {key: getattr(given, key) for key in ("shape", "nf4", "trials", "steps", "tokens")}
    paths = [str(solo.ROOT), str(solo.ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as made:
        model = given.model or random_folder(given.shape, Path(made) / "model", given.device)
        for count in counts:
            folder = Path(made) / str(count)
            folder.mkdir()
            case = {
                "device": given.device, "shape": "tiny" if given.shape == "tiny" else given.shape.lower(),
                "nf4": given.nf4, "trials": given.trials * count, "steps": given.steps, "tokens": given.tokens,
                "rows": 4, "dropout": True, "folder": str(folder),
            }  # fmt: skip
            answer, work = folder / "answer.json", {"case": case, "model": str(model), "engines": count}
            command = [sys.executable, __file__, "--child", json.dumps(work), "--json", str(answer)]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
            if given.device == "cuda":
                visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(given.devices)))
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:count])
            process = subprocess.Popen(command, env=environment)
            failed: str | int = ""
            try:
                failed = process.wait(timeout=given.limit) or ""
            except subprocess.TimeoutExpired:
                failed = f"cut off after {given.limit:.0f} s"
            except KeyboardInterrupt:
                failed = "stopped"
            finally:
                end_tree(process.pid)
            found = figures_of(json.loads(answer.read_text()), given.steps) if answer.exists() else {}
            figures[str(count)] = found | ({"failed": failed} if failed else {})
            told = ("seconds", "training_seconds", "trials_per_hour", "trials_per_hour_everything", "mean_k",
                    "tokens_per_stepping_second")  # fmt: skip
            shown = {key: round(found[key], 1) for key in told if key in found}
            print(f"{count} engines: {failed or 'done'}, {shown}", flush=True)
            result = {**settings, "figures": figures, **ratios(figures, given.devices)}
            for name in ("ratio_to_n_times_one", "ratio_everything", "ratio_stepping"):
                if name in result:
                    print(f"{given.devices} devices / ({given.devices} x one), {name}: {result[name]:.3f}", flush=True)
            if given.json:
                given.json.write_text(json.dumps(result, indent=1) + "\n")
            with contextlib.suppress(OSError):
                answer.unlink()
            if failed == "stopped":
                break


if __name__ == "__main__":
    main()
