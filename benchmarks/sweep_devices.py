"""One shared-base engine a device: trials per hour of a sweep on N devices against one.

    python benchmarks/sweep_devices.py --device cuda --devices 2 [--shape 1B] [--model FOLDER] [--json FILE]

The whole sweep through Ray Tune, `--trials` trials an engine of `--steps` steps each, without pruning, so that every
engine holds as many adapters in both sweeps. Trials per hour count the sweep's own seconds (from the first engine's
start to the last trial's end); the wall of the process stands beside it. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sweep as solo
import sweep_tune
from random_base import SHAPES, random_folder


def child(work: dict[str, Any]) -> dict[str, Any]:
    from ft_ray import base_model, ray_session
    from ft_ray.storage import Store
    from ft_ray.tuning import sweep

    case = solo.Case(**work["case"])
    made = sweep_tune.recipe(case)
    made = made.model_copy(update={"model": made.model.model_copy(update={"id": work["model"]})})
    space = sweep_tune.space(case, 0, asha=False).model_copy(update={"engines": work["engines"]})
    reported: list[tuple[float, int]] = []  # seconds, steps of all trials so far

    def on_event(event: dict[str, Any]) -> None:
        if event["kind"] == "status":
            print(f"{time.monotonic() - began:.1f} s: {event['message']}", file=sys.stderr, flush=True)
        elif event["kind"] == "sweep":
            steps = sum(row["step"] for row in event["rows"])
            if not reported or steps > reported[-1][1]:
                reported.append((time.monotonic() - began, steps))

    began = time.monotonic()
    with ray_session.session():
        result = sweep(
            made, space, sweep_tune.data(case), base_model.resolve(made.model), Store(made.run_path), on_event=on_event
        )
    return {
        "trials": len(result.trials), "seconds": result.seconds, "tokens": result.trained_tokens,
        "mean_k": result.mean_k, "steps": sum(t.steps for t in result.trials), "reported": reported,
        "losses": [t.best_loss for t in result.trials], "wall_s": time.monotonic() - began,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--counts", help="only these of 1 and --devices; the other one's figures are taken from --json")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--model", type=Path, help="a folder of that shape; made where there is none")
    parser.add_argument("--trials", type=int, default=8, help="an engine")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=512, help="tokens a step of one trial, at most")
    parser.add_argument("--limit", type=float, default=240, help="seconds after which a sweep is given up")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        given.json.write_text(json.dumps(child(given.child)))
        return
    counts = [int(c) for c in given.counts.split(",")] if given.counts else [1, given.devices]
    known = json.loads(given.json.read_text())["figures"] if given.json and given.json.exists() else {}
    figures: dict[str, Any] = {count: one for count, one in known.items() if int(count) not in counts}
    result: dict[str, Any] = {"shape": given.shape, "steps": given.steps, "tokens": given.tokens, "figures": figures}
    paths = [str(solo.ROOT), str(solo.ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            model = given.model or random_folder(given.shape, Path(folder) / "model", given.device)
            case = {
                "device": given.device, "shape": "tiny" if given.shape == "tiny" else given.shape.lower(),
                "nf4": False, "trials": given.trials * count, "steps": given.steps, "tokens": given.tokens, "rows": 4,
                "dropout": True, "folder": folder,
            }  # fmt: skip
            answer, work = Path(folder) / "answer.json", {"case": case, "model": str(model), "engines": count}
            command = [sys.executable, __file__, "--child", json.dumps(work), "--json", str(answer)]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
            if given.device == "cuda":
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(count)))
            process = subprocess.Popen(command, env=environment)
            try:
                failed = process.wait(timeout=given.limit)
            except subprocess.TimeoutExpired:
                from runs import end_tree

                end_tree(process.pid)
                failed = f"not done after {given.limit:.0f} s"
            if failed:
                figures[str(count)] = {"failed": failed}
                print(f"{count} engines failed: {failed}", flush=True)
                continue
            found = json.loads(answer.read_text())
        (first, done), (last, whole) = found["reported"][0], found["reported"][-1]
        rate = (whole - done) / max(last - first, 1e-9) / given.steps  # trials a second
        figures[str(count)] = found | {"trials_per_hour": 3600 * rate}
        print(f"{count} engines: {found['trials']} trials, all {found['seconds']:.1f} s (wall {found['wall_s']:.0f}), "
              f"steps in {last - first:.1f} s, {3600 * rate:.0f} trials an hour, mean k {found['mean_k']:.1f}",
              flush=True)  # fmt: skip
        rates = [figures.get(str(c), {}).get("trials_per_hour") for c in (1, given.devices)]
        if all(rates):
            result["ratio_to_n_times_one"] = rates[1] / (given.devices * rates[0])
            print(f"{given.devices} devices / ({given.devices} x one): {result['ratio_to_n_times_one']:.3f}")
        if given.json:
            given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
