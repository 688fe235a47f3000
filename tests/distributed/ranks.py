"""Training by several processes without Ray: each is a rank of a group, and does the jobs of a list in turn.

`run(folder, workers, jobs)` starts them as `python -m tests.distributed.ranks FOLDER RANK WORKERS`; a job trains a
recipe with `zero3.Zero` and leaves losses, checkpoints and measurements as JSON in its own folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Job:
    """A recipe (as a mapping), what to resume from, and after which step to stop.

    `twice`: each checkpoint is also written at once, to at-once/, before its snapshot is taken.
    """

    name: str
    recipe: dict[str, Any]
    rows: int = 30
    resume: str | None = None
    stop_after: int | None = None
    measure: bool = False
    twice: bool = False
    device: str = "cpu"


def run(folder: Path, workers: int, jobs: list[Job], *, expect: int = 0) -> dict[str, dict[str, Any]]:
    """Runs the jobs on `workers` processes; returns rank 0's results by name, with those of all ranks in `ranks`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    (folder / "rendezvous").unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    processes = []
    for rank in range(workers):
        command = [sys.executable, "-m", "tests.distributed.ranks", str(folder), str(rank), str(workers)]
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
        places |= {"LOCAL_WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        log = (folder / f"rank{rank}.log").open("w")
        processes.append(
            subprocess.Popen(
                command, env={**environment, **places}, stdout=log, stderr=subprocess.STDOUT,
                cwd=Path(__file__).parents[2],
            )
        )  # fmt: skip
        log.close()
    codes = []
    try:
        for process in processes:
            codes.append(process.wait(timeout=540))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    logs = "\n".join((folder / f"rank{rank}.log").read_text()[-4000:] for rank in range(workers))
    assert set(codes) == {expect}, logs
    results = {}
    for job in jobs:
        each = [json.loads((folder / job.name / f"result{rank}.json").read_text()) for rank in range(workers)]
        results[job.name] = {**each[0], "ranks": each, "folder": folder / job.name}
    return results


@dataclass
class _Keeper:
    """Hooks of a rank: keeps the checkpoints of all ranks together, and events."""

    folder: Path
    stop_after: int | None
    events: list[dict[str, Any]] = field(default_factory=list)
    writing: threading.Thread | None = None

    def event(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def stop_requested(self) -> bool:
        steps = sum(e["kind"] == "step" for e in self.events)
        return self.stop_after is not None and steps + 1 >= self.stop_after

    def save_requested(self) -> bool:
        return False

    def told_to_end(self) -> bool:
        return False

    def begin_save(self) -> None:
        if self.writing is not None:
            self.writing.join()

    def save(self, folder: Path, progress: Any, *, later: Any = None, wait: bool = False) -> str:
        import torch

        name = f"step-{progress.step}"
        for path in folder.iterdir():
            assert not (self.folder / name / path.name).exists(), f"two ranks wrote {path.name}"
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            shutil.move(path, self.folder / name / path.name)
        folder.rmdir()
        if later is not None:  # some steps later
            self.writing = threading.Timer(0.2, later, [self.folder / name])
            self.writing.start()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        return name


class _Memory:
    """Samples what this process holds of its own (not mapped files), in bytes."""

    def __init__(self) -> None:
        self.before, self.peak, self._end = self.now(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

    def _watch(self) -> None:
        while not self._end.wait(0.005):
            self.peak = max(self.peak, self.now())

    def end(self) -> int:
        self._end.set()
        self._thread.join()
        return self.peak - self.before


def _do(job: Job, folder: Path, rank: int) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    from ft_ray import base_model, recipe, sft
    from ft_ray.errors import FtRayError
    from ft_ray.sft import Progress
    from ft_ray.zero3 import Zero
    from ft_ray.zero_state import resident_bytes
    from tests.token_rows import TokenRows

    made = recipe.from_dict(job.recipe)
    files = base_model.resolve(made.model)
    hooks = _Keeper(folder, job.stop_after)
    spent = None
    if job.resume:
        spent = Progress.read(Path(job.resume))
        spent.stopped = ""
    result: dict[str, Any] = {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.folder)
        sharding = Zero(made, files.config, job.device)
        if job.twice:
            _write_twice(sharding, folder / "at-once")
        memory = _Memory() if job.measure else None
        trainer = sft.build(
            made, files, TokenRows(count=job.rows), tokenizer, hooks=hooks, device=job.device, spent=spent,
            sharding=sharding,
        )  # fmt: skip
        if memory is not None:
            result |= {"loading": memory.end(), "resident": resident_bytes(trainer.net)}
            return result
        sft.run(trainer, Path(job.resume) if job.resume else None)
        hooks.begin_save()
        result["resident"] = resident_bytes(trainer.net)
        result["local"] = sum((getattr(p, "ds_tensor", p)).numel() * p.element_size() for p in trainer.net.parameters())
        groups = [getattr(p, "ds_zero_param_process_group", None) for p in trainer.net.parameters()]
        result["own_groups"] = sum(group is not None for group in groups)
        result["leaves"] = sum(getattr(module, "_z3_leaf", False) for module in trainer.net.modules())
        result["own_linear"] = torch.nn.functional.linear.__module__.startswith("deepspeed")
        result["best"] = trainer.progress.best_loss
        result["facts"] = trainer.progress.facts
        result["evaluation"] = list(trainer.validation_loss())
        live = _live(trainer)
        if rank == 0:
            torch.save(live, folder / "live.pt")
    except FtRayError as error:
        result["error"] = str(error)
    result["losses"] = [e["loss"] for e in hooks.events if e["kind"] == "step"]
    result["evaluations"] = [e for e in hooks.events if e["kind"] == "eval"]
    result["norms"] = [e["grad_norm"] for e in hooks.events if e["kind"] == "step"]
    return result


def _write_twice(sharding: Any, place: Path) -> None:
    save = sharding.save

    def both(trainer: Any, folder: Path) -> Any:
        at_once = place / f"step-{trainer.state.global_step}"
        at_once.mkdir(parents=True, exist_ok=True)
        snapshot, sharding._snapshot = sharding._snapshot, None
        assert snapshot is not None and save(trainer, at_once) is None
        sharding._snapshot = snapshot
        later = save(trainer, folder)
        assert later is not None
        return later

    sharding.save = both


def _live(trainer: Any) -> dict[str, Any]:
    """The weights as the running model computes with them."""
    import contextlib

    import deepspeed

    out = {}
    for name, parameter in trainer.net.named_parameters():
        sharded = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter]) if sharded else contextlib.nullcontext():
            out[name] = parameter.detach().clone()
    return out


def main() -> None:
    import torch

    folder, rank, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    store = f"file://{folder / 'rendezvous'}"
    jobs = [Job(**values) for values in json.loads((folder / "jobs.json").read_text())]
    backend = "nccl" if jobs[0].device.startswith("cuda") else "gloo"
    torch.distributed.init_process_group(backend, init_method=store, rank=rank, world_size=workers)
    for job in jobs:
        place = folder / job.name
        place.mkdir(exist_ok=True)
        result = _do(job, place, rank)
        (place / f"result{rank}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
