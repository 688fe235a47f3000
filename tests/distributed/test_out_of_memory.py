"""Out of memory on one of two ranks, for real: its process may map no more. The whole road goes on smaller."""

from __future__ import annotations

import json
import os
import random
import resource
from pathlib import Path
from typing import Any

import pytest
import ray.train
from datasets import Dataset

from ft_ray import pipeline, ray_session, recipe, stages
from ft_ray.errors import OutOfMemory
from ft_ray.manifest import Manifest
from ft_ray.prepared_data import Prepared
from ft_ray.storage import Store
from tests.parity.test_training import make

pytestmark = [pytest.mark.faults, pytest.mark.heavy]


class Tight(Prepared):
    """On the last rank `room` bytes may be mapped beyond what is when it reads the rows. Not in the driver, `pid`."""

    room = pid = 0

    def tokens(self, split: str, *, distinct: bool = False) -> Dataset:
        if split == "train" and os.getpid() != self.pid and _is_last_rank():
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + self.room, resource.RLIM_INFINITY))
        return super().tokens(split, distinct=distinct)


def _is_last_rank() -> bool:
    context = ray.train.get_context()
    return bool(context.get_world_rank() == context.get_world_size() - 1)


def _rows(path: Path, count: int = 340) -> Path:
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            prompt = f"{i} " + " ".join(str(rng.randrange(10)) for _ in range(190))
            file.write(json.dumps({"prompt": prompt, "completion": str(i)}) + "\n")
    return path


def _run(made: recipe.Recipe, room: int | None, patch: pytest.MonkeyPatch) -> tuple[Manifest, list[str]]:
    """Trains through the pipeline in a Ray that runs: (manifest, what was said)."""
    real, events = stages.prepare, list[dict[str, Any]]()

    def prepare(*args: Any, **options: Any) -> Prepared:
        prepared = real(*args, **options)
        if room is None:
            return prepared
        tight = Tight(**vars(prepared))
        tight.room, tight.pid = room, os.getpid()
        return tight

    with patch.context() as patched:
        patched.setattr(stages, "prepare", prepare)
        manifest = pipeline.train(made, on_event=events.append)
    return manifest, [e["message"] for e in events if e["kind"] == "status"]


def _losses(manifest: Manifest) -> list[float]:
    return [e["loss"] for e in manifest.stages["train"].metrics["history"] if e["kind"] == "step"]


def test_a_rank_runs_out_of_memory_and_the_run_goes_on_smaller(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(_rows(tmp_path / "rows.jsonl"))
    recipes = {}
    for name, batch, workers in (
        ("plain", {"global": 256, "per_device": 128}, 2), ("tight", {"global": 256, "per_device": 128}, 2),
        ("hopeless", {"global": 2, "per_device": 2}, 1),
    ):  # fmt: skip
        values = make(
            tiny_model, name=name, data={"train": [{"path": data}]}, sequence={"max_length": 512}, batch=batch,
            gradient_checkpointing=False, schedule={"max_steps": 2}, tracking={"to": []},
            storage=str(tmp_path / "runs"),
        ).to_dict()  # fmt: skip
        recipes[name] = recipe.from_dict({**values, "resources": {"workers": workers, "gpus": 0}})
    with ray_session.session(num_cpus=2):
        plain, _ = _run(recipes["plain"], None, monkeypatch)
        tight, said = _run(recipes["tight"], 900 * 2**20, monkeypatch)
        first = "out of memory: batch.per_device 128 -> 64, batch.global 256 kept"
        assert plain.lineage.substitutions == []
        assert first in tight.lineage.substitutions, "recorded in the manifest"
        written = Manifest.model_validate(Store(recipes["tight"].run_path).read_json("manifest.json"))
        assert written.lineage.substitutions == tight.lineage.substitutions
        assert f"{first}; trying again" in said, "and told"
        assert tight.stages["train"].metrics["per_device"] < 128
        assert _losses(tight) == pytest.approx(_losses(plain), abs=1e-5), "the same training"
        assert tight.stages["train"].metrics["retries"] == 0, "no retry of a lost worker is spent on it"

        with pytest.raises(OutOfMemory, match=r"at every setting .* \(batch.per_device 2 -> 1.*; gradient_check"):
            _run(recipes["hopeless"], 2**20, monkeypatch)
    hopeless = Manifest.model_validate(Store(recipes["hopeless"].run_path).read_json("manifest.json"))
    assert hopeless.stages["train"].status == "failed"
