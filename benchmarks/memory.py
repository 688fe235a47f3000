"""`ft-ray plan`'s memory beside what training takes: LoRA, QLoRA and full, three sizes of model, three lengths of row.

    python benchmarks/memory.py --device cuda --json memory.json   # 27 cells in about 5 minutes on one H100
    python benchmarks/memory.py --device cpu                       # resident memory, coarse; small shapes
    python benchmarks/memory.py --device cpu --quick               # 3 cells
    python benchmarks/memory.py --device cuda --fused              # LoRA and QLoRA with `fused_kernels: true`, packed

Each cell is a process of its own that trains a few steps as a rank of a run does: `ft_ray.sft` with TRL's trainer and
the recipe's defaults (bf16, checkpointing, AdamW, LoRA r=16 with dropout on all linear layers), two passes a step. Not
as a run: weights are random and made on the device, rows are random tokens that are all trained, no checkpoint is
written, Ray does not run. Cells load their libraries at once and use the GPU one after another. A cell that runs out of
memory ends alone; full fine-tuning of 8B is there to see that it does, as planned. On CUDA the plan's `allocated`
stands beside torch's max_memory_allocated; on a CPU the plan's `total` stands beside the whole resident set, as in a
run's report, of which `process` is what was there after a step of a tiny model (`cpu_memory.PROCESS`).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from random_base import SHAPES, random_base  # noqa: E402

GIB = 2**30
METHODS = ("lora", "qlora", "full")
# (rows a forward pass, their length)
BATCHES = {"cuda": ((4, 512), (2, 2048), (1, 8192)), "cpu": ((2, 128), (2, 256), (2, 512))}


# `fused_kernels: true`, the largest model and the longest rows first, for when time runs out
FUSED_BATCHES = ((2, 2048), (1, 8192), (4, 512))


def fused_cells(device: str, quick: bool) -> list[dict[str, Any]]:
    """LoRA and QLoRA with `fused_kernels: true`: packed rows with checkpointing, and one without."""
    found: list[dict[str, Any]] = []
    sizes = ("8B", "1B", "135M") if device == "cuda" else ("tiny",)  # no kernel is fused there: a rehearsal
    for rows, length in FUSED_BATCHES if device == "cuda" else BATCHES[device]:
        for size in sizes:
            for method in ("qlora", "lora"):
                one = {"method": method, "size": size, "rows": rows, "length": length, "device": device, "fused": True}
                found.append(one)
                if (rows, length) == FUSED_BATCHES[0]:
                    found.append({**one, "whole": True})  # without checkpointing
    return found[:2] if quick else found


def cells(device: str, quick: bool) -> list[dict[str, Any]]:
    """What is measured: 27 cells, and on CUDA one more that does not fit."""
    found = []
    for method in METHODS:
        sizes = ("20M", "60M", "135M")
        if device == "cuda":
            sizes = ("135M", "1B", "3B" if method == "full" else "8B")
        for size in sizes[:1] if quick else sizes:
            for rows, length in BATCHES[device][:1] if quick else BATCHES[device]:
                found.append({"method": method, "size": size, "rows": rows, "length": length, "device": device})
    if device == "cuda" and not quick:
        found.append({"method": "full", "size": "8B", "rows": 4, "length": 512, "device": device})
    return found


def recipe_of(cell: dict[str, Any], model: str = "random") -> Any:
    from ft_ray.recipe import from_dict

    return from_dict({
        "name": "memory", "model": {"id": model}, "data": {"train": [{"path": "random"}]}, "method": cell["method"],
        "sequence": {"max_length": cell["length"], "packing": bool(cell.get("fused"))},
        "fused_kernels": bool(cell.get("fused")), "gradient_checkpointing": not cell.get("whole"),
        "batch": {"global": 2 * cell["rows"], "per_device": cell["rows"]},
        "schedule": {"max_steps": 3 if cell["device"] == "cuda" else 2, "epochs": 3},
    })  # fmt: skip


def planned(cell: dict[str, Any]) -> dict[str, Any]:
    """What the plan says of a cell: from the shape alone, without torch."""
    from ft_ray.model_shape import read
    from ft_ray.step_memory import Setting, memory

    on_gpu = cell["device"] == "cuda"
    setting = Setting.of(recipe_of(cell), rows=cell["rows"]).but(on_gpu=on_gpu)
    peak = memory(read({"model_type": "llama", **SHAPES[cell["size"]]}), setting)
    return {**peak.model_dump(), "allocated": peak.allocated, "total": peak.total}


def measure(cell: dict[str, Any], turn: Path) -> dict[str, Any]:
    """Trains the cell in this process once it is its turn, and reads the peak."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    from ft_ray import model_loading, sft
    from ft_ray.base_model import ModelFiles
    from tests.tiny import build

    device, method = cell["device"], cell["method"]

    class Rows:
        def __init__(self, length: int) -> None:
            self.length = length

        def packed(self) -> Any:
            from trl import pack_dataset

            rows = self.tokens("train")  # of full length each: every pack is one of them
            return pack_dataset(rows.remove_columns("length"), self.length, "bfd")

        def tokens(self, split: str) -> Any:
            length, count = self.length, 3 * 2 * cell["rows"] if split == "train" else 0
            ids = [[3 + (7 * i + k * k) % 250 for k in range(length - 1)] + [2] for i in range(count)]
            columns = {"input_ids": ids, "labels": ids, "length": [length] * count}
            return Dataset.from_dict(columns)

    class Hooks:
        def event(self, event: dict[str, Any]) -> None:
            if event["kind"] == "step":
                losses.append(event["loss"])

        def stop_requested(self) -> bool:
            return False

        def save_requested(self) -> bool:
            return False

        def told_to_end(self) -> bool:
            return False

        def begin_save(self) -> None:
            pass

        def save(self, folder: Path, progress: Any, *, later: Any = None, wait: bool = False) -> str:
            raise AssertionError("no checkpoint is written here")

    losses: list[float] = []

    def load(files: Any, recipe: Any, **_: Any) -> Any:
        model = random_base(SHAPES[files.source], device, nf4=method == "qlora", trained=method == "full")
        model.config.use_cache = False
        model_loading.cure_cpu_faults(model)
        return model

    with tempfile.TemporaryDirectory() as name, turn.open("w") as lock:
        folder = build(Path(name))  # for its tokenizer
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model_loading.load_model = load  # a model of this size cannot be fetched; what is done with it is the run's own
        sft.FineTuner._save_checkpoint = lambda *_: None  # type: ignore[method-assign]

        def train(size: str, length: int) -> None:
            recipe = recipe_of({**cell, "length": length}, str(folder))
            trainer = sft.build(
                recipe, ModelFiles(folder, size, None, "", {}), Rows(length), tokenizer, hooks=Hooks(),
                device="cuda:0" if device == "cuda" else "cpu",
            )  # fmt: skip
            sft.run(trainer)

        fcntl.flock(lock, fcntl.LOCK_EX)
        if device == "cpu":
            import ray.train.torch

            from ft_ray import train_rank  # a rank holds these too; on a GPU only the device counts

            del ray, train_rank
            train("tiny", 32)  # libraries that load at first use do not count as training's memory
            losses.clear()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        began = time.monotonic()
        found: dict[str, Any] = {}
        try:
            train(cell["size"], cell["length"])
        except torch.OutOfMemoryError as error:
            found["out_of_memory"] = str(error).splitlines()[0][:200]
        if device == "cuda":
            found |= {"measured": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(),
                      "device_name": torch.cuda.get_device_name()}  # fmt: skip
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            found |= {"measured": peak - before, "process": before, "resident": peak}
        found |= {"seconds": round(time.monotonic() - began, 1), "losses": losses, "torch": torch.__version__}
        return found


def child(cell: dict[str, Any], turn: Path) -> None:
    answer = os.dup(1)
    os.dup2(2, 1)  # what libraries print does not get into the answer
    found = measure(cell, turn)
    os.write(answer, (json.dumps(found) + "\n").encode())
    os._exit(0)  # frees the GPU for the next one without waiting for the interpreter's end


def jemalloc() -> Path:
    """The allocator that Ray brings, which `ray_session` gives to the workers of a private Ray without a GPU."""
    import ray

    return Path(ray.__file__).parent / "core" / "libjemalloc.so"


def run_all(
    todo: list[dict[str, Any]], seconds: float, at_once: int, keep: Callable[[list[dict[str, Any]]], Any]
) -> list[dict[str, Any]]:
    """Each cell in a process; `at_once` of them load their libraries while one measures. Ends them after `seconds`.

    `keep` gets what there is after each.
    """
    ends, done, waiting = time.monotonic() + seconds, [], list(todo)
    running: list[tuple[int, subprocess.Popen[bytes]]] = []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if todo and todo[0]["device"] == "cpu":
        from ft_ray.ray_session import CPU_ALLOCATOR

        environment |= {"LD_PRELOAD": str(jemalloc()), "OMP_WAIT_POLICY": "PASSIVE"}  # as a rank on a private Ray
        environment.setdefault("MALLOC_CONF", CPU_ALLOCATOR["MALLOC_CONF"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while waiting or running:
            late = time.monotonic() >= ends
            if late:
                done += [{**cell, "plan": planned(cell), "failed": "out of time"} for cell in waiting]
                waiting = []
            while waiting and len(running) < at_once:
                number = len(todo) - len(waiting)
                command = [sys.executable, __file__, "--turn", str(folder / "turn"), "--cell"]
                with (folder / f"{number}.out").open("wb") as out, (folder / f"{number}.err").open("wb") as err:
                    process = subprocess.Popen(
                        [*command, json.dumps(waiting.pop(0))], stdout=out, stderr=err, env=environment
                    )
                running.append((number, process))
            for number, process in list(running):
                if late:
                    process.kill()
                elif process.poll() is None:
                    continue
                process.wait()
                running.remove((number, process))
                answer = (folder / f"{number}.out").read_text().splitlines()
                said = (folder / f"{number}.err").read_text(errors="replace").strip().splitlines()
                one = {**todo[number], "plan": planned(todo[number])}
                if process.returncode == 0 and answer:
                    one |= json.loads(answer[-1])
                else:
                    why = said[-1][:300] if said else f"exit {process.returncode}"
                    one["failed"] = "out of time" if late else why
                done.append(one)
                show(one)
                keep(done)
            time.sleep(0.05)
    return done


def show(one: dict[str, Any]) -> None:
    plan, said = one["plan"], one.get("failed") or one.get("out_of_memory")
    kind = (" fused" if one.get("fused") else "") + (" no checkpointing" if one.get("whole") else "")
    line = f"{one['method']:5} {one['size']:>4} {one['rows']} x {one['length']:<5}{kind} "
    line += f"plan {plan['allocated'] / GIB:7.2f}"
    if said:
        line += f"  {'out of memory' if 'out_of_memory' in one else 'failed'}: {said}"
    else:
        line += f"  measured {one['measured'] / GIB:7.2f}  plan / measured {plan['allocated'] / one['measured']:.3f}"
        if "resident" in one:
            line += f"  resident {one['resident'] / GIB:5.2f}  total {plan['total'] / GIB:5.2f}"
            line += f"  total / resident {plan['total'] / one['resident']:.2f}"
        if "reserved" in one:
            line += f"  reserved {one['reserved'] / GIB:7.2f}  total {plan['total'] / GIB:7.2f}"
        line += f"  peak planned at: {plan['moment']}  {one['seconds']:.0f} s"
    print(line, file=sys.stderr, flush=True)


def summary(done: list[dict[str, Any]]) -> dict[str, Any]:
    """How many cells were measured, how many within 10%, and the extremes of plan / measured by method.

    On a CPU the planned total stands against the whole resident set: what a report of a run says too.
    """
    ratios = [(c["method"], c["plan"]["total"] / c["resident"] if "resident" in c
               else c["plan"]["allocated"] / c["measured"]) for c in done
              if "failed" not in c and "out_of_memory" not in c]  # fmt: skip
    return {
        "measured": len(ratios),
        "within_10_percent": sum(0.9 <= r <= 1.1 for _, r in ratios),
        "plan_over_measured": {
            m: [round(min(own), 3), round(max(own), 3)] for m in METHODS if (own := [r for k, r in ratios if k == m])
        },
        "out_of_memory": [f"{c['method']} {c['size']}" for c in done if "out_of_memory" in c],
        "failed": [f"{c['method']} {c['size']} {c['length']}: {c['failed']}" for c in done if "failed" in c],
        "torch": next((c["torch"] for c in done if "torch" in c), None),
        "device": next((c["device_name"] for c in done if "device_name" in c), "cpu"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="one size and one length")
    parser.add_argument("--only", metavar="TEXT", help="cells whose 'METHOD SIZE LENGTH' holds this")
    parser.add_argument("--fused", action="store_true", help="LoRA and QLoRA with fused_kernels: true instead")
    parser.add_argument("--minutes", type=float, default=0, help="end after this; default 5 on CUDA, 60 on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cell:
        child(given.cell, given.turn)
    todo = [c for c in (fused_cells if given.fused else cells)(given.device, given.quick)
            if not given.only or given.only in f"{c['method']} {c['size']} {c['length']}"]  # fmt: skip
    on_gpu = given.device == "cuda"
    at_once = min(6, max(1, (os.cpu_count() or 2) // 2)) if on_gpu else 1
    began = time.monotonic()

    def keep(done: list[dict[str, Any]]) -> dict[str, Any]:
        result = {**summary(done), "seconds": round(time.monotonic() - began), "cells": done}
        if given.json:
            given.json.write_text(json.dumps(result, indent=1) + "\n")
        return result

    result = keep(run_all(todo, 60 * (given.minutes or (5 if on_gpu else 60)), at_once, keep))
    print(json.dumps({key: value for key, value in result.items() if key != "cells"}, indent=1))


if __name__ == "__main__":
    main()
