"""Out of memory: a ladder that computes the same, climbed on a real failed allocation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ft_ray.errors import ModelError, OutOfMemory
from ft_ray.oom_ladder import climb, rungs
from ft_ray.recipe import Recipe, from_dict

ROOT = Path(__file__).parents[2]


def make(**changes: Any) -> Recipe:
    return from_dict({
        "name": "t", "model": {"id": "m"}, "data": {"train": [{"path": "x"}]}, "gradient_checkpointing": False,
        "batch": {"global": 24, "per_device": 12}, "sequence": {"max_length": 64}, **changes,
    })  # fmt: skip


def test_rungs_keep_the_global_batch() -> None:
    found = list(rungs(make(), "cpu"))
    assert [r.batch.per_device for _, r in found] == [6, 3, 1, 1]
    assert {r.batch.global_ for _, r in found} == {24}
    assert [r.gradient_checkpointing for _, r in found] == [False, False, False, True]
    assert found[0][0] == "out of memory: batch.per_device 12 -> 6, batch.global 24 kept"
    assert list(rungs(make(batch={"global": 1}, gradient_checkpointing=True), "cpu")) == []
    shared = {"method": "full", "batch": {"global": 2, "per_device": 1}, "gradient_checkpointing": True}
    whole = list(rungs(make(**shared, resources={"workers": 2}), "cuda"))
    assert [r.resources.offload_parameters for _, r in whole] == [False, True]
    assert list(rungs(make(**shared, resources={"workers": 2, "sharding": "ddp"}), "cuda")) == []
    fewer = make(batch={"global": 24, "per_device": "auto"}, resources={"workers": 4, "min_workers": 3})
    assert [r.batch.per_device for _, r in rungs(fewer, "cpu")][:2] == [2, 1], "which three workers can have as well"
    auto = list(rungs(make(batch={"global": 16}), "cpu"))
    assert [r.batch.per_device for _, r in auto][:2] == [8, 4], "auto was 16"


def test_it_ends_and_says_what_was_tried() -> None:
    tried: list[Any] = []

    def never(recipe: Recipe) -> None:
        tried.append(recipe.batch.per_device)
        raise OutOfMemory("no room")

    events: list[dict[str, Any]] = []
    with pytest.raises(OutOfMemory, match=r"every setting that computes the same \(batch.per_device 12 -> 6") as caught:
        climb(make(), never, device="cpu", on_event=events.append)
    assert tried == [12, 6, 3, 1, 1] and len(events) == 4
    assert "ft-ray plan" in str(caught.value)

    def broken(recipe: Recipe) -> None:
        raise ModelError("x")

    with pytest.raises(ModelError):
        climb(make(), broken, device="cpu", on_event=events.append)
    assert len(events) == 4, "what is no memory error is not retried"


SCRIPT = """
import gc, json, resource, sys, traceback
from pathlib import Path
from transformers import AutoTokenizer
from ft_ray import base_model, sft
from ft_ray.oom_ladder import climb
from ft_ray.train_control import classify
from tests.parity.test_training import Recorder, make
from tests.token_rows import TokenRows

folder, out = map(Path, sys.argv[1:])

class Long(TokenRows):
    def _rows(self, count, seed):
        ids = [[3 + (7 * i + k * k) % 250 for k in range(439)] + [2] for i in range(count)]
        return [{"input_ids": row, "labels": [-100] * 400 + row[400:], "length": 440} for row in ids]


rows = Long(count=64, held_out=0)
changes = {"batch": {"global": 64, "per_device": 64}, "sequence": {"max_length": 512}, "gradient_checkpointing": False}
made = make(folder, method="full", schedule={"epochs": 1}, **changes)
files = base_model.resolve(made.model)
tokenizer = AutoTokenizer.from_pretrained(folder)
losses, events = [], []

def run(recipe):
    hooks = Recorder(out / str(recipe.batch.per_device))
    failed = None
    try:
        sft.run(sft.build(recipe, files, rows, tokenizer, hooks=hooks, device="cpu"))
    except (RuntimeError, MemoryError) as error:
        failed = classify(error) or error
        traceback.clear_frames(error.__traceback__)  # a worker would have ended and given its memory back
    if failed is not None:
        gc.collect()
        raise failed
    losses.extend(hooks.losses())

# As it is once, without a limit: what the ladder's result must equal.
run(make(folder, method="full", schedule={"epochs": 1}, **{**changes, "batch": {"global": 64, "per_device": 4}}))
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 400 * 2**20,) * 2)
_, changed = climb(made, run, device="cpu", on_event=events.append)
print(json.dumps({"losses": losses, "changed": changed, "said": [e["message"] for e in events]}))
"""


@pytest.mark.faults
def test_a_real_allocation_that_fails_is_retried_smaller(tiny_model: Path, tmp_path: Path) -> None:
    """The process may not map more: torch's allocator fails by itself with 64 rows, and not with few."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tiny_model), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["changed"][0] == "out of memory: batch.per_device 64 -> 32, batch.global 64 kept"
    assert len(said["said"]) == len(said["changed"])
    plain, climbed = said["losses"]
    assert climbed == pytest.approx(plain, abs=1e-5), "the same step"
