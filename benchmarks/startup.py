"""Seconds from `ft-ray train` to the end of its first step, by part.

    python benchmarks/startup.py [--device cpu|cuda] [--shape tiny] [--model FOLDER] [--runs 2] [--json FILE]

Runs the command as a user does, on a small data set and a model of random weights, notes when it says what, and stops
it after the first step. Every run is a new run folder; the first one also fills caches (byte code, the model's hash),
so the parts of the last one are the ordinary start. A part lasts until the next message. Beside the seconds stand those
of cores that all processes of the command had spent by then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from random_base import SHAPES, random_folder  # noqa: E402
from runs import end_tree  # noqa: E402

RECIPE = """
name: startup-{number}
model: {{id: {model}}}
data: {{train: [{{path: {rows}}}], split: {{validation: 0.1, test: 0.1}}}}
method: {method}
sequence: {{max_length: 256}}
batch: {{global: 8, per_device: 8}}
schedule: {{max_steps: 50, epochs: 100}}
evaluation: {{every: 1000}}
checkpoint: {{every: 1000}}
tracking: {{to: []}}
storage: {storage}
"""
# What the command says, in order, and what it is doing from then on.
PARTS = (
    ("reading the base model", "read and hash the base model, tokenise the data"),
    ("▸ data check", "check the data"),
    ("▸ train", "start Ray"),
    ("starting workers", "start workers"),
    ("loading the training libraries", "import training libraries"),
    ("loading the model", "load the model"),
    ("training (start took", "first step"),
)


def one(recipe: Path, limit: float, trace: Path | None) -> dict[str, Any]:
    """Seconds by part of one start, and every line that was said with its time."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "PYTHONUNBUFFERED": "1"}
    if trace is not None:
        environment["PYTHONPATH"] = f"{ROOT / 'benchmarks' / 'trace'}:{environment['PYTHONPATH']}"
        environment["FT_RAY_TRACE"] = str(trace)
    began_at = time.time()
    command = [sys.executable, "-m", "ft_ray", "train", str(recipe), "--verbose"]
    began = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    said: list[tuple[float, str]] = []
    marks: list[tuple[float, str]] = [(0.0, "import the command and read the recipe")]
    total, cores = None, 0.0
    try:
        assert process.stdout is not None
        for line in process.stdout:
            at = time.monotonic() - began
            said.append((round(at, 2), line.rstrip()))
            for text, part in PARTS:
                if text in line and all(part != known for _, known in marks):
                    marks.append((at, part))
            if "step 1/" in line or at > limit:
                total = at if at <= limit else None
                cores = spent(process.pid)
                break
    except KeyboardInterrupt:
        end_tree(process.pid)
        raise
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    end_tree(process.pid)
    ends = [*(at for at, _ in marks[1:]), total or said[-1][0]]
    parts = {part: round(end - at, 2) for (at, part), end in zip(marks, ends, strict=True)}
    found = {"seconds": total, "core_seconds": round(cores, 1), "parts": parts, "said": said}
    if trace is not None:
        lines = [line.split(" ", 1) for line in trace.read_text().splitlines()]
        found["processes"] = [[round(float(at) - began_at, 2), what] for at, what in lines]
    return found


def spent(pid: int) -> float:
    """Seconds of cores of a process and all below it, with those that have ended and were waited for."""
    top, total = psutil.Process(pid), 0.0
    for process in (top, *top.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--model", type=Path, help="a model folder instead")
    parser.add_argument("--method", choices=("lora", "qlora"), default="lora")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--trace", action="store_true", help="in the JSON: every Python process, its large imports")
    parser.add_argument("--limit", type=float, default=200, help="seconds after which a start is given up")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = given.model or random_folder(given.shape, folder / "model", given.device)
        rows = folder / "rows.jsonl"
        with rows.open("w") as file:
            for i in range(200):
                file.write(json.dumps({"prompt": f"What is {i} and {i + 1}?", "completion": str(2 * i + 1)}) + "\n")
        for number in range(given.runs):
            recipe = folder / f"recipe{number}.yaml"
            recipe.write_text(RECIPE.format(
                number=number, model=model, rows=rows, method=given.method, storage=folder / "runs"
            ))  # fmt: skip
            results.append(one(recipe, given.limit, folder / f"trace{number}" if given.trace else None))
            found = results[-1]
            if given.json:
                shown = {"device": given.device, "shape": str(given.model or given.shape), "starts": results}
                given.json.write_text(json.dumps(shown, indent=1))
            took = f"{found['seconds']} s to the end of step 1, {found['core_seconds']} s of cores"
            print(f"start {number + 1}: {took}", flush=True)
            for part, seconds in found["parts"].items():
                print(f"  {seconds:7.2f} s  {part}", flush=True)
            if found["seconds"] is None:
                print("\n".join(line for _, line in found["said"][-15:]), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
