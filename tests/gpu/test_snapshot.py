"""Snapshots on a real GPU: the device's later steps change nothing of what is copied, under every sharding."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ft_ray.snapshot import Snapshot
from ft_ray.state_files import Piece
from tests import tiny
from tests.distributed.ranks import Job, run
from tests.distributed.test_zero3 import full, same_files

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
COUNT = 1 << 28  # values of a weight: 1 GiB, copied for a while during which the steps below would be over


@pytest.fixture
def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(COUNT, device="cuda"))


def test_steps_that_are_launched_at_once_wait_on_the_device(weight: torch.nn.Parameter) -> None:
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    pieces = [(kind, Piece("w", start, COUNT // 2)) for kind in ("weight", "exp_avg", "exp_avg_sq")
              for start in (0, COUNT // 2)]  # fmt: skip

    def read(kind: str, piece: Piece) -> torch.Tensor:
        values = weight.data if kind == "weight" else optimizer.state[weight][kind]
        return values.narrow(0, piece.start, piece.count)

    def taken(snapshot: Snapshot, meanwhile: Callable[[], object]) -> tuple[list[bool], float]:
        """Which pieces are what they were, after steps that were launched during the copy; seconds until they were."""
        before = [read(*piece).to("cpu", copy=True) for piece in pieces]
        began = time.monotonic()
        snapshot.take(pieces, read)
        for _ in range(3):
            meanwhile()
        launched = time.monotonic() - began
        same = [torch.equal(torch.cat(list(snapshot.read(*piece))), was)
                for piece, was in zip(pieces, before, strict=True)]  # fmt: skip
        snapshot.release()
        torch.cuda.synchronize()
        return same, launched

    snapshot = Snapshot(weight.device, [optimizer])
    began = time.monotonic()
    snapshot.make_room(3 * COUNT).result()
    print(f"3 GiB pinned in {time.monotonic() - began:.2f} s")
    for _ in range(2):
        same, launched = taken(snapshot, optimizer.step)
        assert all(same)
        print(f"launched with three steps in {launched:.4f} s")
    blind = Snapshot(weight.device, [])
    blind.make_room(3 * COUNT).result()
    same, _ = taken(blind, optimizer.step)
    assert not all(same), "without waiting it is another state: this test can fail"
    snapshot.close()
    blind.close()


def test_every_sharding_s_snapshots_are_what_is_written_at_once(tmp_path: Path) -> None:
    model = tiny.build(tmp_path / "model", hidden=512, layers=8)
    kept = {"checkpoint": {"every": 4, "snapshot": "auto"}}
    settings = {
        "zero3": {}, "zero3-bf16": {"precision": "bf16"}, "zero2": {"precision": "bf16"}, "ddp": {"precision": "bf16"},
        "accumulated": {"precision": "bf16", "batch": {"per_device": 2}},
    }  # fmt: skip
    jobs = [
        Job(name, full(model, 1, name.partition("-")[0] if name != "accumulated" else "zero3", **kept, **more),
            twice=True, device="cuda")
        for name, more in settings.items()
    ]  # fmt: skip
    for name, result in run(tmp_path, 1, jobs).items():
        assert len(result["losses"]) == 8
        for at in (2, 4, 6, 8):
            place = result["folder"] / f"step-{at}"
            assert same_files(place, result["folder"] / "at-once" / f"step-{at}"), name
