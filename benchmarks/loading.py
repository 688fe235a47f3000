"""How long an engine takes to read its weights, by the ways that `engine.loading` names, in turn.

    python benchmarks/loading.py --model FOLDER [--device cpu|cuda] [--loading auto runai_streamer fastsafetensors]
                                 [--rounds 2] [--limit SECONDS] [--json FILE]

Every start is a vLLM engine in a process of its own, without compiling. `cold`: the files' pages are given back to the
system before it (posix_fadvise), so that they come from the disk; `cached`: they are in memory. Seconds are those that
vLLM's own log tells, as far as it does, for the weights' files and for the model with them on its device, and those
from the command to an engine that has answered. The first line is the floor: the same bytes read by plain reads, 16 MiB
at a time. Ways whose package is missing are told and passed over.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from servers import about, options

_PACKAGES = {"runai_streamer": "runai_model_streamer", "fastsafetensors": "fastsafetensors"}
_SECONDS = ("weights_s", "model_s", "start_s")
_ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(**json.loads(sys.argv[1]))
llm.generate({"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
print("ANSWERED", flush=True)
"""


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Gives the pages of the weights' files back to the system; they are clean once they are on the disk."""
    for path in weights(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(folder: Path) -> float:
    """Seconds to read all weights by plain reads."""
    began = time.monotonic()
    for path in weights(folder):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    return time.monotonic() - began


def start(folder: Path, way: str, device: str, patience: float) -> dict[str, Any]:
    """One engine: `weights_s` from its log, `start_s` to its answer; `failed` with the end of its log instead."""
    engine = {"model": str(folder), "load_format": way, "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8,
              "dtype": "bfloat16", "skip_tokenizer_init": True}  # fmt: skip
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
           "VLLM_LOGGING_LEVEL": "INFO"}  # fmt: skip
    if device == "cpu":
        engine["kv_cache_memory_bytes"] = 1 << 28
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ENGINE, json.dumps(engine)], env=env, capture_output=True, text=True,
            timeout=patience,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"not up after {patience:.0f} s"}
    seconds, log = time.monotonic() - began, done.stdout + done.stderr
    if "ANSWERED" not in done.stdout:
        return {"failed": log[-1500:]}
    found = {name: float(match[1]) for name, pattern in (
        ("weights_s", r"Loading weights took ([\d.]+) seconds"),
        ("model_s", r"Model loading took .*?([\d.]+) seconds"),
    ) if (match := re.search(pattern, log))}  # fmt: skip
    return {**found, "start_s": round(seconds, 2)}


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--loading", nargs="+", default=["auto", *_PACKAGES], choices=["auto", *_PACKAGES])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which no start begins")
    given = parser.parse_args()
    until = time.monotonic() + given.limit
    ways = []
    for way in given.loading:
        if way == "auto" or importlib.util.find_spec(_PACKAGES[way]):
            ways.append(way)
        else:
            print(f"{way}: passed over, its package {_PACKAGES[way]} is not installed", file=sys.stderr)
    forget(given.model)
    size = sum(path.stat().st_size for path in weights(given.model))
    floor = {"cold": read(given.model), "cached": read(given.model)}
    print(f"{size / 1e9:.2f} GB; plain reads: {floor['cold']:.1f} s cold, {floor['cached']:.1f} s cached", flush=True)
    runs: list[dict[str, Any]] = []
    for number in range(given.rounds):
        for state in ("cold", "cached"):
            for way in ways if number % 2 == 0 else reversed(ways):
                if time.monotonic() > until:
                    print("the time is up", flush=True)
                    break
                if state == "cold":
                    forget(given.model)
                found = start(given.model, way, given.device, 300)
                runs.append({"loading": way, "state": state, **found})
                print(json.dumps(runs[-1]), flush=True)
                keep(given, size, floor, runs)
    for one in summary(runs):
        told = ", ".join(f"{key.removesuffix('_s')} {one[key]} s" for key in _SECONDS if key in one)
        print(f"{one['loading']:>16} {one['state']:>6}: {told}")


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for way, state in dict.fromkeys((run["loading"], run["state"]) for run in runs):
        good = [run for run in runs if (run["loading"], run["state"]) == (way, state) and "start_s" in run]
        if good:
            medians = {key: round(statistics.median(run[key] for run in good if key in run), 2)
                       for key in _SECONDS if any(key in run for run in good)}  # fmt: skip
            found.append({"loading": way, "state": state, "runs": len(good), **medians})
    return found


def keep(given: argparse.Namespace, size: int, floor: dict[str, float], runs: list[dict[str, Any]]) -> None:
    if given.json:
        result = {"bytes": size, "plain_reads_s": floor, "medians": summary(runs), "runs": runs, **about()}
        Path(given.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
