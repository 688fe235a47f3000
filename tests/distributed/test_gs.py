"""Full fine-tuning by two workers that saves its shards to gs://, and goes on from them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ft_ray import checkpoint, ray_session
from ft_ray.storage import COMMIT, Store
from tests.distributed.test_faults import PARTS, two_workers, whole
from tests.distributed.test_trainer import Events, at_step, run
from tests.object_stores import GcsProxy, gs


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GcsProxy]:
    with gs(tmp_path_factory.mktemp("no-login")) as made, ray_session.session(num_cpus=2):
        yield made


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_shards_at_gs_are_resumed_with_the_same_losses(tiny_model: Path, storage: GcsProxy) -> None:
    """Its newest checkpoint is lost, so that steps are done twice: what they gave is the same, bit for bit."""
    made = two_workers(tiny_model, method="full", schedule={"epochs": 6}, checkpoint={"every": 6, "keep": 2})
    store, stop = Store("gs://runs/zero3"), threading.Event()
    storage.arm("POST", "state-00001-of-00002.safetensors", "503")
    storage.arm("POST", "/.committed.json", "reset")
    with store.lock():
        first = run(made, store, Events(at_step(10), stop.set), stop=stop)
    assert sorted(storage.hits) == ["503", "reset"]
    assert (first.status, first.reason, first.metrics["retries"]) == ("stopped", "interrupted", 0)
    saved = whole(store)
    assert len(saved) == 2, "those kept, each with both ranks' parts"
    newest = max(store.list("checkpoints"), key=checkpoint.step_of)
    assert set(store.tree(f"checkpoints/{newest}") or {}) >= PARTS
    store.remove(f"checkpoints/{newest}/{COMMIT}")

    storage.read.clear()
    with store.lock():
        second = run(made, store, Events())
    assert (second.status, second.metrics["resumed_from"]) == ("done", saved[0])
    parts = sorted(name for name in storage.read if name.startswith("state-"))
    assert parts == sorted([*PARTS] * 2), "each rank fetched its own part, and the export at the end both"
    before = {r["step"]: r["loss"] for r in first.history if r["kind"] == "step"}
    after = {r["step"]: r["loss"] for r in second.history if r["kind"] == "step"}
    assert max(before) > saved[0] and sorted(after) == list(range(1, second.metrics["steps"] + 1))
    assert {step: after[step] for step in before} == before
    assert newest not in store.list("checkpoints"), "the one without its record was collected"
    assert len(whole(store)) == len(store.list("checkpoints")) == 2
