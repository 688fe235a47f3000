"""Out of memory on one of two ranks, for real: its process may not map more. The run goes on smaller, same losses."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import ray.train
from datasets import Dataset

from ft_ray import base_model, ray_session, recipe
from ft_ray.storage import Store
from ft_ray.trainer import train
from tests.parity.test_training import make
from tests.token_rows import TokenRows


class Long(TokenRows):
    """64 rows of 440 tokens. On rank 1, `room` bytes may be mapped beyond what is when the rows are read."""

    room: int | None = None

    def _rows(self, count: int, seed: int) -> list[dict[str, list[int] | int]]:
        ids = [[3 + (7 * i + k * k) % 250 for k in range(439)] + [2] for i in range(count)]
        return [{"input_ids": row, "labels": [-100] * 400 + row[400:], "length": 440} for row in ids]

    def tokens(self, split: str) -> Dataset:
        if self.room is not None and split == "train" and ray.train.get_context().get_world_rank() == 1:
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + self.room, resource.RLIM_INFINITY))
        return super().tokens(split)


@pytest.mark.faults
def test_one_rank_runs_out_of_memory(tiny_model: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"sequence": {"max_length": 512}, "gradient_checkpointing": False}
    made = make(tiny_model, schedule={"epochs": 2}, batch={"global": 64, "per_device": 32}, **changes)
    made = recipe.from_dict({**made.to_dict(), "resources": {"workers": 2, "gpus": 0}})
    files = base_model.resolve(made.model)
    results = {}
    with ray_session.session(num_cpus=2):
        for name, room in (("plain", None), ("tight", 1000 * 2**20)):
            rows = Long(count=64, held_out=0)
            rows.room = room
            events: list[dict[str, Any]] = []
            outcome = train(made, rows, files, Store(tmp_path / name), on_event=events.append)
            results[name] = outcome, [e["loss"] for e in events if e["kind"] == "step"]
            assert outcome.status == "done"
    plain, tight = results["plain"], results["tight"]
    assert plain[0].substitutions == []
    assert tight[0].substitutions[0] == "out of memory: batch.per_device 32 -> 16, batch.global 64 kept"
    assert tight[0].metrics["per_device"] < 32
    assert tight[1] == pytest.approx(plain[1], abs=1e-5), "the same training"
