"""The GPU side of benchmarks/train.py: full fine-tuning with ZeRO-3 by 1 and N workers, peers in the same run.

Each run is a process of its own, in this order, one-device runs side by side on different devices:

    ft-ray N               ours with ZeRO-3 by N workers; with `--saves` or `--faults` it saves a checkpoint every few
                           steps and goes on until one is committed; with `--faults` one worker is killed then
    trl N, fsdp2 N         the TRL + DeepSpeed script under torchrun, and torch's fully_shard
    whole N                that script with decoder layers taken whole, as ours has them: what is left is Ray Train
    equal N                with `--each`: ours by N workers with the batch of one, so that losses can be compared
    resume N/2             with `--saves` or `--faults`: half as many go on from the last checkpoint of N workers
    ft-ray 1, trl 1, whole 1, fsdp2 1   the same sides on one device
    loop 1, auto 1         a bare AdamW loop; ours with `resources.sharding: auto`, which shards nothing there

A step has `--global-rows` rows whatever the number of workers, or with `--each` that many a worker (weak scaling: the
memory and work of a device are the same). Steps are timed on rank 0 without those that save; the first quarter warms
up. Ours is ended once it was measured, and writes what it has every few seconds: a run that is killed leaves its
figures. The memory of a device is torch's peak of rank 0 beside the plan's `allocated`, and the driver's figure
(sampled) beside its `total`. Weights are random: this measures speed, memory and agreement, not quality.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from full_rows import Case, Rows, recipe_of, step_times, work_file
from runs import Run, run_all

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
KILLED_AFTER = 2  # steps past the last one that is timed, so that a save at that one is committed
LEAST = 6  # steps of a run that was resumed
AGAIN = "starting again from the last checkpoint"  # what the driver says once it knows of a lost worker


class _Enough(Exception):
    """Everything was measured: the run need not come to its end."""


def through_ft_ray(
    case: Case, workers: int, *, store: str, saving: bool, kill: bool, sharding: str, keep: Path, resumed: bool = False
) -> dict[str, Any]:
    """One run through Ray Train; `keep` is written as it goes on.

    With `kill`, a worker is killed once a checkpoint is committed and every step was timed, and the run goes on a
    little after it is back.
    """
    import psutil

    from ft_ray import ray_session
    from ft_ray.base_model import resolve
    from ft_ray.storage import Store
    from ft_ray.trainer import train

    began = kept = time.monotonic()
    found: dict[str, Any] = {"steps": [], "said": [], "saving": saving, "saves": []}
    killed: dict[str, float] = {}

    def on_event(event: dict[str, Any]) -> None:
        nonlocal kept
        at = time.monotonic() - began
        if event["kind"] == "status" and not event.get("heartbeat"):
            found["said"].append([round(at, 2), event["message"]])
            print(f"{at:6.1f} s: {event['message']}", flush=True)
            if killed and AGAIN in event["message"]:
                killed.setdefault("noticed", at)
        elif event["kind"] == "checkpoint":
            found["saves"].append({"at": round(at, 2), **{k: v for k, v in event.items() if k not in ("kind", "name")}})
            print(f"{at:6.1f} s: committed {found['saves'][-1]}", flush=True)
            enough()
        elif event["kind"] == "step":
            step(event, at)
        if time.monotonic() - kept > 2:
            kept = time.monotonic()
            keep.write_text(json.dumps(found))

    def step(event: dict[str, Any], at: float) -> None:
        number = event["step"]
        known = {k: event[k] for k in ("step", "loss", "seconds", "peak_memory_bytes")}
        found["steps"].append({**known, "at": at})
        if "noticed" in killed and "back" not in killed:
            killed.update(back=at, from_step=number)
        elif killed and "noticed" not in killed:
            killed["step"] = number  # it was on its way when the worker was killed
        if kill and not killed and number >= case.steps + KILLED_AFTER and found["saves"]:
            ranks = [p for p in psutil.Process().children(recursive=True) if _is_worker(p)]
            killed.update(at=at, step=number)
            found["killed"] = killed
            print(f"{at:6.1f} s: killing one of {len(ranks)} workers", flush=True)
            ranks[-1].kill()
        enough()

    def enough() -> None:
        steps = [s["step"] for s in found["steps"]]
        if len(steps) < LEAST or steps[-1] < case.steps:
            return
        due = 0 if resumed or not saving else sum(s % max(1, case.every // 2) == 0 for s in steps if s <= case.steps)
        back = "back" in killed and steps[-1] >= killed["from_step"] + LEAST
        if back if kill else len(found["saves"]) >= due:  # what was saved in the measured steps is committed
            raise _Enough

    made = recipe_of(case, workers, saving=saving, sharding=sharding)
    with contextlib.suppress(_Enough), ray_session.session():
        found["ray_seconds"] = time.monotonic() - began
        train(made, Rows(case), resolve(made.model), Store(store), on_event=on_event)
    return found


def _is_worker(process: Any) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return "TrainWorker" in " ".join(process.cmdline()[:1])
    return False


def child(case: Case, name: str, work: dict[str, Any]) -> None:
    keep = work_file(case, name)
    keep.write_text(json.dumps(through_ft_ray(case, **work, keep=keep)))
    os._exit(0)  # threads of a run that was cut short are not waited for


def runs(case: Case, workers: list[int], *, saves: bool, faults: bool, each: int | None) -> list[tuple[Run, Case]]:
    """Every run with its case, in the order in which they start. On a CPU each takes the whole machine."""
    python, most, wide = sys.executable, max(workers), case.device == "cpu"

    def sized(count: int) -> Case:
        return replace(case, global_rows=each * count) if each else case

    def ours(name: str, count: int, own: Case, **options: Any) -> tuple[Run, Case]:
        work = {"workers": count, "saving": False, "kill": False, "sharding": "zero3",
                "store": f"{case.work}/{name.replace(' ', '-')}"}  # fmt: skip
        command = [python, str(ROOT / "benchmarks/train_full.py"), "--case", json.dumps(asdict(own))]
        command += ["--name", name, "--child", json.dumps(work | options)]
        return Run(name, most if wide else count, command), own

    def peer(side: str, count: int) -> tuple[Run, Case]:
        own, name = sized(count), f"{side} {count}"
        command = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command += [str(ROOT / "benchmarks/train_peers.py"), "--side", side, "--case", json.dumps(asdict(own))]
        return Run(name, most if wide else count, [*command, "--name", name]), own

    found, last = [], []
    for count in [w for w in workers if w > 1]:
        found.append(ours(f"ft-ray {count}", count, sized(count), saving=saves or faults, kill=faults))
        found += [peer("trl", count), peer("whole", count), peer("fsdp2", count)]
        if each:
            rows = max(1, min(case.rows, each // count))
            found.append(ours(f"equal {count}", count, replace(sized(1), rows=rows)))
        if saves or faults:
            # The rows of all in one pass of half of the devices: a buffer to add gradients up in may not fit beside 8B.
            half, store = count // 2, f"{case.work}/ft-ray-{count}"
            own = replace(sized(count), rows=sized(count).global_rows // half) if each else sized(count)
            last = [ours(f"resume {half}", half, own, saving=True, resumed=True, store=store)]
    found += last
    if 1 in workers:
        found += [ours("ft-ray 1", 1, sized(1)), *(peer(side, 1) for side in ("trl", "whole", "fsdp2", "loop"))]
        found.append(ours("auto 1", 1, sized(1), sharding="auto"))
    return found


def read(case: Case, run: Run) -> dict[str, Any]:
    """Figures of one run out of what it left; of one that failed, what it had."""
    path, count = work_file(case, run.name), int(run.name.split()[-1])
    found: dict[str, Any] = {"failed": run.failed, "wall": run.wall, "device_bytes": run.device_bytes}
    try:
        left = json.loads(path.read_text())
    except (OSError, ValueError):
        return found
    tokens = case.global_rows * case.length
    if "ends" in left:
        times = step_times(left["ends"], tokens, count)
        profile = {"profile": left["profile"]} if left.get("profile") else {}
        return {**found, **times, "losses": left["losses"], "peak": max(left["peaks"]), **profile}
    steps = left["steps"]
    found |= {key: left[key] for key in ("said", "ray_seconds", "saves") if key in left}
    if len(steps) < 3:
        return found
    calm = [s for s in steps if s["at"] <= left.get("killed", s)["at"]]
    ends = [s["seconds"] for s in calm]
    half = case.every // 2
    saved = {i for i, s in enumerate(calm[:-1]) if left["saving"] and s["step"] % half == 0}
    # Gaps in which a checkpoint is on its way: they count for themselves.
    sent = {(s["step"], s["at"]) for s in left["saves"]}
    busy = {i for i, s in enumerate(calm[:-1]) if any(s["step"] > step and s["at"] < at for step, at in sent)} - saved
    found |= step_times(ends, tokens, count, saved | busy)
    if busy:
        found["seconds_while_saving"] = statistics.median(ends[i + 1] - ends[i] for i in busy)
    found |= {
        "losses": [s["loss"] for s in steps], "step_numbers": [s["step"] for s in steps],
        "first_step": steps[0]["step"], "first_step_at": steps[0]["at"],
        "peak": max(s["peak_memory_bytes"] for s in steps),
    }  # fmt: skip
    if saved:
        # Between the ends of the step that saves and of the next one, what is more than a step.
        found["standstill_per_save"] = [round(ends[i + 1] - ends[i] - found["seconds"], 3) for i in sorted(saved)]
    killed = left.get("killed", {})
    if "back" in killed:
        found["killed"] = {
            "seconds_to_first_step": round(killed["back"] - killed["at"], 1),
            "seconds_until_noticed": round(killed["noticed"] - killed["at"], 1),
            "steps_lost": int(killed["step"] - killed["from_step"] + 1),
            "at_step": int(killed["step"]), "back_at_step": int(killed["from_step"]),
        }  # fmt: skip
    return found


def planned(case: Case, workers: int) -> dict[str, int]:
    from ft_ray.model_shape import read as read_shape
    from ft_ray.step_memory import Setting, memory

    shape = read_shape(json.loads((Path(case.model) / "config.json").read_text()))
    peak = memory(shape, Setting.of(recipe_of(case, workers), rows=case.rows))
    return {"allocated": peak.allocated, "total": peak.total}


def summary(cases: dict[str, Case], figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    done = {name: f for name, f in figures.items() if "seconds" in f}
    rate = {name: f["tokens_per_second_per_device"] for name, f in done.items()}
    found: dict[str, Any] = {"tokens_per_second_per_device": rate, "scaling_efficiency": {}, "ratios": {}}
    for name in done:
        side, count = name.rsplit(" ", 1)
        if count != "1" and f"{side} 1" in rate:
            found["scaling_efficiency"][name] = rate[name] / rate[f"{side} 1"]
        for peer in ("loop", "trl", "whole", "fsdp2"):
            if side in ("ft-ray", "auto") and f"{peer} {count}" in rate:
                found["ratios"][f"{name} / {peer} {count}, seconds a step"] = rate[f"{peer} {count}"] / rate[name]
    found["plan_over_measured"] = {}
    for name, f in done.items():
        if name.startswith("ft-ray") and f["peak"]:
            plan = planned(cases[name], int(name.split()[1]))
            found["plan_over_measured"][name] = {
                "allocated": plan["allocated"] / f["peak"],
                "total_over_driver": plan["total"] / max(f["device_bytes"] or [1]),
            }
    # Losses: of one batch, whatever the side and the number of workers.
    found["largest_loss_difference"] = {}
    for one in ("ft-ray 1", "loop 1", "trl 1", "whole 1", "fsdp2 1"):
        for name, f in done.items():
            same = one in done and name != one and cases[name].global_rows == cases[one].global_rows
            both = _pairs(done[one], f) if same else {}
            if both:
                found["largest_loss_difference"][f"{name} to {one}"] = max(abs(a - b) / a for a, b in both.values())
        if any(key.endswith(f" to {one}") for key in found["largest_loss_difference"]):
            break
    resumed = next((f for n, f in done.items() if n.startswith("resume")), None)
    whole = next((f for n, f in done.items() if n.startswith("ft-ray") and n[-1] != "1"), None)
    if resumed and whole:
        both = _pairs(whole, resumed)
        found["resumed"] = {
            "first_step": resumed["first_step"], "first_step_at": resumed["first_step_at"],
            "losses_before_and_by_step": {step: list(pair) for step, pair in sorted(both.items())[:6]},
            "losses": resumed["losses"][:6],
        }  # fmt: skip
    return found


def _pairs(one: dict[str, Any], other: dict[str, Any]) -> dict[int, tuple[float, float]]:
    """Losses of the steps that both made; of a step that was made twice, the last."""
    found = []
    for figures in (one, other):
        numbers = figures.get("step_numbers") or range(1, len(figures["losses"]) + 1)
        found.append(dict(zip(numbers, figures["losses"], strict=True)))
    return {step: (found[0][step], found[1][step]) for step in found[0] if step in found[1]}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    from random_base import random_folder

    workers = [int(w) for w in given.workers.split(",")]
    work = Path(given.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    model = random_folder(given.shape, Path(given.model or work / "model").resolve(), given.device)
    case = Case(
        device=given.device, shape=given.shape, model=str(model), length=given.length, rows=given.rows,
        global_rows=given.global_rows, steps=given.steps, every=given.every, work=str(work), profile=given.profile,
        deepspeed=given.deepspeed, fused=given.fused, lean=given.lean,
    )  # fmt: skip
    only = given.only.split(",") if given.only else []
    made = runs(case, workers, saves=given.saves, faults=given.faults, each=given.each)
    todo = [run for run, _ in made if not only or run.name.split()[0] in only or run.name.replace(" ", ":") in only]
    cases = {run.name: own for run, own in made}
    kept = Path(given.json) if given.json and given.json != "-" else None
    figures: dict[str, dict[str, Any]] = {}
    if kept and kept.exists():  # of an earlier call with other sides of the same case
        earlier = json.loads(kept.read_text())["figures"]
        figures = {name: f for name, f in earlier.items() if name not in [run.name for run in todo]}
        counts = sorted({int(name.split()[-1]) for name in figures})
        more = runs(case, counts, saves=given.saves, faults=given.faults, each=given.each)
        cases = {run.name: own for run, own in more} | cases
        figures = {name: f for name, f in figures.items() if name in cases}
    result: dict[str, Any] = {"case": asdict(case), "each": given.each, "figures": figures}
    result["plan"] = {w: planned(cases[f"ft-ray {w}"], w) for w in workers}
    for count, plan in result["plan"].items():
        words = f"{plan['allocated'] / GIB:.1f} GiB allocated, {plan['total'] / GIB:.1f} in all"
        print(f"planned a device, {count} of them: {words}", flush=True)

    def done(run: Run) -> None:
        figures[run.name] = read(cases[run.name], run)
        result.update(summary(cases, figures))
        show(run.name, figures[run.name])
        if kept:
            kept.write_text(json.dumps(result, indent=1) + "\n")

    run_all(todo, devices=max(workers), device=given.device, folder=work, limit=given.limit, done=done)
    return result


def show(name: str, f: dict[str, Any]) -> None:
    if "seconds" not in f:
        print(f"{name:10} failed: {f['failed']}", flush=True)
        return
    line = f"{name:10} {f['seconds']:7.3f} s a step  {f['tokens_per_second_per_device']:9.0f} tok/s a device"
    line += f"  peak {f['peak'] / GIB:6.2f} GiB  device {max(f['device_bytes'] or [0]) / GIB:6.2f}"
    line += f"  wall {f['wall']:.0f} s  {f['failed']}"
    for key in ("standstill_per_save", "seconds_while_saving", "killed", "saves"):
        line += f"  {key} {f[key]}" if f.get(key) else ""
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
