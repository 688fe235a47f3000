"""The GPU side of benchmarks/train.py: full fine-tuning with ZeRO-3 by 1 and N workers, peers in the same run.

Each run is a process of its own, in this order, one-device runs side by side on different devices:

    loop 1, auto 1, ft-ray 1   one device: a bare AdamW loop; ours through Ray Train with `resources.sharding: auto`,
                           which shards nothing there, and with ZeRO-3; trl 1 too where there is no run with more
    ft-ray N               also with a checkpoint every few steps and, at the end, one worker killed
    resume 1               goes on from the last checkpoint of N workers with one
    trl N, fsdp2 N         the TRL + DeepSpeed script under torchrun, and torch's fully_shard

Steps are timed on rank 0 without those that save; the first quarter warms up. Ours is ended once it was measured. The
memory of a device is torch's peak of rank 0 beside the plan's `allocated`, and the driver's figure (sampled) beside
its `total`. Weights are random: this measures speed, memory and agreement, not quality.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from full_rows import Case, Rows, recipe_of, step_times, work_file
from runs import Run, run_all

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
KILLED_AFTER = 2  # steps past the last one that is timed, so that a save at that one is committed
LEAST = 6  # steps of a run that was resumed


class _Enough(Exception):
    """Everything was measured: the run need not come to its end."""


def through_ft_ray(
    case: Case, workers: int, *, store: str, saving: bool, kill: bool, sharding: str
) -> dict[str, Any]:
    """One run through Ray Train. With `kill`, a worker is killed well after a save, and the run goes on a little."""
    import psutil

    from ft_ray import ray_session
    from ft_ray.base_model import resolve
    from ft_ray.storage import Store
    from ft_ray.trainer import train

    began = time.monotonic()
    found: dict[str, Any] = {"steps": [], "said": [], "saving": saving}
    last = case.steps + (KILLED_AFTER + 3 if kill else 0)
    killed: dict[str, float] = {}

    def on_event(event: dict[str, Any]) -> None:
        at = time.monotonic() - began
        if event["kind"] == "status" and not event.get("heartbeat"):
            found["said"].append([round(at, 2), event["message"]])
        if event["kind"] != "step":
            return
        step = event["step"]
        kept = {k: event[k] for k in ("step", "loss", "seconds", "peak_memory_bytes")}
        found["steps"].append({**kept, "at": at})
        if killed and "back" not in killed and step <= killed["step"]:
            killed.update(back=at, from_step=step)
        if kill and step >= case.steps + KILLED_AFTER and not killed:
            ranks = [p for p in psutil.Process().children(recursive=True) if "TrainWorker" in " ".join(p.cmdline()[:1])]
            killed.update(at=at, step=step)
            ranks[-1].kill()
        elif step >= last and len(found["steps"]) >= LEAST and (not kill or "back" in killed):
            raise _Enough

    made = recipe_of(case, workers, saving=saving, sharding=sharding)
    with contextlib.suppress(_Enough), ray_session.session():
        found["ray_seconds"] = time.monotonic() - began
        train(made, Rows(case), resolve(made.model), Store(store), on_event=on_event)
    if killed:
        found["killed"] = killed
    return found


def child(case: Case, name: str, work: dict[str, Any]) -> None:
    work_file(case, name).write_text(json.dumps(through_ft_ray(case, **work)))
    os._exit(0)  # threads of a run that was cut short are not waited for


def runs(case: Case, workers: list[int], faults: bool) -> list[Run]:
    """Every run, in the order in which it starts. On a CPU each takes the whole machine."""
    python, most, wide = sys.executable, max(workers), case.device == "cpu"

    def ours(name: str, count: int, **options: Any) -> Run:
        work = {"workers": count, "saving": False, "kill": False, "sharding": "zero3",
                "store": f"{case.work}/{name.replace(' ', '-')}"}  # fmt: skip
        command = [python, str(ROOT / "benchmarks/train_full.py"), "--case", json.dumps(asdict(case))]
        return Run(name, most if wide else count, [*command, "--name", name, "--child", json.dumps(work | options)])

    def peer(side: str, count: int) -> Run:
        command = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command += [str(ROOT / "benchmarks/train_peers.py"), "--side", side, "--case", json.dumps(asdict(case))]
        return Run(f"{side} {count}", most if wide else count, [*command, "--name", f"{side} {count}"])

    found = []
    if 1 in workers:
        found += [peer("loop", 1), ours("auto 1", 1, sharding="auto"), ours("ft-ray 1", 1)]
        found += [peer("trl", 1)] if most == 1 else []
    for count in [w for w in workers if w > 1]:
        store = f"{case.work}/ft-ray-{count}"
        found.append(ours(f"ft-ray {count}", count, saving=faults, kill=faults))
        if faults:
            found += [ours("resume 1", 1, saving=True, store=store), peer("trl", 1)]
        found += [peer("trl", count), peer("fsdp2", count)]
    return found


def read(case: Case, run: Run) -> dict[str, Any]:
    """Figures of one run out of what it left."""
    path, count = work_file(case, run.name), int(run.name.split()[-1])
    found: dict[str, Any] = {"failed": run.failed, "wall": run.wall, "device_bytes": run.device_bytes}
    if run.failed or not path.exists():
        return found
    left = json.loads(path.read_text())
    tokens = case.global_rows * case.length
    if "ends" in left:
        return {
            **found,
            **step_times(left["ends"], tokens, count),
            "losses": left["losses"],
            "peak": max(left["peaks"]),
        }
    steps = left["steps"]
    calm = steps
    if "killed" in left:
        calm = steps[: next(i for i, s in enumerate(steps) if s["at"] >= left["killed"]["at"]) + 1]
    ends = [s["seconds"] for s in calm]
    half = case.every // 2
    saved = {i for i, s in enumerate(calm[:-1]) if left["saving"] and s["step"] % half == 0}
    found |= step_times(ends, tokens, count, saved)
    found |= {
        "losses": [s["loss"] for s in steps], "first_step": steps[0]["step"], "first_step_at": steps[0]["at"],
        "peak": max(s["peak_memory_bytes"] for s in steps), "said": left["said"], "ray_seconds": left["ray_seconds"],
    }  # fmt: skip
    if saved:
        found["standstill_per_save"] = [round(ends[i + 1] - ends[i] - found["seconds"], 3) for i in sorted(saved)]
    if "killed" in left:
        killed = left["killed"]
        found["killed"] = {
            "seconds_to_first_step": round(killed["back"] - killed["at"], 1),
            "steps_lost": int(killed["step"] - killed["from_step"] + 1),
        }
    return found


def planned(case: Case, workers: int) -> dict[str, int]:
    from ft_ray.model_shape import read as read_shape
    from ft_ray.step_memory import Setting, memory

    shape = read_shape(json.loads((Path(case.model) / "config.json").read_text()))
    peak = memory(shape, Setting.of(recipe_of(case, workers), rows=case.rows))
    return {"allocated": peak.allocated, "total": peak.total}


def summary(case: Case, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    done = {name: f for name, f in figures.items() if "seconds" in f}
    rate = {name: f["tokens_per_second_per_device"] for name, f in done.items()}
    found: dict[str, Any] = {"tokens_per_second_per_device": rate, "scaling_efficiency": {}, "ratios": {}}
    for name in done:
        side, count = name.rsplit(" ", 1)
        if count != "1" and f"{side} 1" in rate:
            found["scaling_efficiency"][name] = rate[name] / rate[f"{side} 1"]
        for peer in ("loop", "trl", "fsdp2"):
            if side in ("ft-ray", "auto") and f"{peer} {count}" in rate:
                found["ratios"][f"{name} / {peer} {count}, seconds a step"] = rate[f"{peer} {count}"] / rate[name]
    found["plan_over_measured"] = {
        name: {
            "allocated": planned(case, int(name.split()[1]))["allocated"] / f["peak"],
            "total_over_driver": planned(case, int(name.split()[1]))["total"] / max(f["device_bytes"] or [1]),
        }
        for name, f in done.items()
        if name.startswith("ft-ray") and f["peak"]
    }
    one = done.get("ft-ray 1") or done.get("loop 1")
    if one:
        found["largest_loss_difference_to_one_device"] = {
            name: max(abs(a - b) / a for a, b in zip(one["losses"][first - 1 :], f["losses"], strict=False))
            for name, f in done.items()
            if not name.startswith("trl") and (first := f.get("first_step", 1)) <= len(one["losses"])
        }
    resumed, whole = (
        done.get("resume 1"),
        next((f for n, f in done.items() if n.startswith("ft-ray") and n[-1] != "1"), None),
    )
    if resumed and whole:
        at = resumed["first_step"]
        again = whole["losses"][at - 1 : at + 1]
        found["resumed"] = {"first_step": at, "first_step_at": resumed["first_step_at"],
                            "losses": [resumed["losses"][: len(again)], again]}  # fmt: skip
    return found


def measure(given: argparse.Namespace) -> dict[str, Any]:
    from random_base import random_folder

    workers = [int(w) for w in given.workers.split(",")]
    work = Path(given.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    model = random_folder(given.shape, Path(given.model or work / "model").resolve(), given.device)
    case = Case(
        device=given.device, shape=given.shape, model=str(model), length=given.length, rows=given.rows,
        global_rows=given.global_rows, steps=given.steps, every=given.every, work=str(work),
    )  # fmt: skip
    todo = [
        r for r in runs(case, workers, given.faults) if not given.only or r.name.split()[0] in given.only.split(",")
    ]
    figures: dict[str, dict[str, Any]] = {}
    result: dict[str, Any] = {"case": asdict(case), "figures": figures}

    def done(run: Run) -> None:
        figures[run.name] = read(case, run)
        result.update(summary(case, figures), plan={w: planned(case, w) for w in workers})
        show(run.name, figures[run.name])
        if given.json and given.json != "-":
            Path(given.json).write_text(json.dumps(result, indent=1) + "\n")

    run_all(todo, devices=max(workers), device=given.device, folder=work, limit=given.limit, done=done)
    return result


def show(name: str, f: dict[str, Any]) -> None:
    if "seconds" not in f:
        print(f"{name:10} failed: {f['failed']}", flush=True)
        return
    line = f"{name:10} {f['seconds']:7.3f} s a step  {f['tokens_per_second_per_device']:9.0f} tok/s a device"
    line += f"  peak {f['peak'] / GIB:6.2f} GiB  device {max(f['device_bytes'] or [0]) / GIB:6.2f}"
    line += f"  wall {f['wall']:.0f} s"
    for key in ("standstill_per_save", "killed"):
        line += f"  {key} {f[key]}" if key in f else ""
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", type=json.loads, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--child", type=json.loads, required=True)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    child(Case(**given.case), given.name, given.child)


if __name__ == "__main__":
    main()
