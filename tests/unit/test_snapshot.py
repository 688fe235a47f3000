"""Snapshots of a training state: what is written is what was there at the save, whatever training does meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ft_ray import recipe
from ft_ray.host_memory import total_and_free
from ft_ray.snapshot import Snapshot
from ft_ray.state_files import StateFiles
from ft_ray.zero3 import Zero
from tests.unit.test_zero3_config import make

BLOCK = 64  # values; the pieces below lie across several


@pytest.fixture
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(24, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5, dtype=torch.float32))


def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net(torch.randn(4, 24)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def optimizer(net: torch.nn.Module) -> torch.optim.Optimizer:
    made = torch.optim.AdamW(net.parameters(), lr=0.1)
    step(net, made)
    return made


@pytest.fixture
def snapshot(optimizer: torch.optim.Optimizer) -> Iterator[Snapshot]:
    made = Snapshot(torch.device("cpu"), [optimizer], block=BLOCK)
    yield made
    made.release()
    made.close()


class Hooks:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def event(self, event: dict[str, Any]) -> None:
        self.events.append(event)


def alone(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """What `Zero` looks at of a trainer."""
    return SimpleNamespace(net=net, optimizer=optimizer, rank=0, workers=1, hooks=Hooks())


def zero(snapshot: bool | str) -> Zero:
    made: recipe.Recipe = make(precision="fp32", checkpoint={"snapshot": snapshot})
    return Zero(made, {"model_type": "llama", "hidden_size": 24}, "cpu")


def state(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[tuple[str, str], torch.Tensor]:
    found = {("weight", name): p.detach().clone().flatten() for name, p in net.named_parameters()}
    for kind in ("exp_avg", "exp_avg_sq"):
        found |= {(kind, name): optimizer.state[p][kind].clone().flatten() for name, p in net.named_parameters()}
    return found


def held(folder: Path, kinds: dict[tuple[str, str], torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
    with StateFiles(folder) as files:
        return {(kind, name): files.read(kind, name) for kind, name in kinds}


def test_a_save_is_of_its_moment_and_equal_to_one_that_waits(
    net: torch.nn.Module, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    trainer, sharding = alone(net, optimizer), zero(True)
    sharding.prepare_saves(trainer)
    for number in range(3):
        at_once, later_on = tmp_path / f"at-once-{number}", tmp_path / f"later-{number}"
        at_once.mkdir(), later_on.mkdir()
        assert zero(False).save(trainer, at_once) is None
        before = state(net, optimizer)
        later = sharding.save(trainer, later_on)
        assert later is not None
        assert [p.name for p in later_on.iterdir()] == ["state.json"], "the pieces are not on disk yet"
        step(net, optimizer)
        moved = tmp_path / f"moved-{number}"
        later_on.rename(moved)
        later(moved)
        assert all(torch.equal(value, before[key]) for key, value in held(moved, before).items())
        assert not torch.equal(before["weight", "0.weight"], state(net, optimizer)["weight", "0.weight"])
        for path in at_once.iterdir():
            assert path.read_bytes() == (moved / path.name).read_bytes(), path.name
    sharding.end_saves()


def test_without_one_everything_is_written_at_once(
    net: torch.nn.Module, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    for asked in ("auto", False):  # auto: a state in host memory has no room for a second one
        folder = tmp_path / str(asked)
        folder.mkdir()
        trainer, sharding = alone(net, optimizer), zero(asked)
        sharding.prepare_saves(trainer)
        assert sharding.save(trainer, folder) is None
        before = state(net, optimizer)
        assert all(torch.equal(value, before[key]) for key, value in held(folder, before).items())
        sharding.end_saves()
    assert trainer.hooks.events == []


def test_the_optimizer_s_next_step_waits_for_the_copy(
    net: torch.nn.Module, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    trainer, sharding = alone(net, optimizer), zero(True)
    sharding.prepare_saves(trainer)
    made = sharding._snapshot
    assert made is not None
    made._room.result()
    go_on, before = threading.Event(), state(net, optimizer)
    made._thread.submit(go_on.wait)  # the copy comes after it
    later = sharding.save(trainer, tmp_path)
    assert later is not None
    net(torch.ones(4, 24)).sum().backward()  # goes on at once
    stepping = threading.Thread(target=optimizer.step)
    stepping.start()
    stepping.join(0.2)
    assert stepping.is_alive()
    unchanged = state(net, optimizer)
    assert all(torch.equal(value, before[key]) for key, value in unchanged.items())
    go_on.set()
    stepping.join(20)
    assert not stepping.is_alive()
    later(tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in held(tmp_path, before).items())
    sharding.end_saves()


def test_memory_is_set_aside_before_used_again_grown_and_freed(
    net: torch.nn.Module, optimizer: torch.optim.Optimizer, snapshot: Snapshot
) -> None:
    zeros = alone(net, optimizer)
    layout = zero(True)._layout(zeros)
    pieces = [("weight", piece) for piece in layout.pieces()]
    count = sum(piece.count for _, piece in pieces)
    snapshot.make_room(count).result()
    places = [block.data_ptr() for block in snapshot._blocks]
    assert len(places) == -(-count // BLOCK) > 1
    for _ in range(2):
        snapshot.take(pieces, layout.read)
        assert [block.data_ptr() for block in snapshot._blocks] == places
        with pytest.raises(AssertionError, match="not written yet"):
            snapshot.take(pieces, layout.read)
        step(net, optimizer)
        snapshot.release()
    more = [(kind, piece) for kind in ("weight", "exp_avg", "exp_avg_sq") for _, piece in pieces]
    snapshot.take(more, layout.read)  # an optimizer whose first steps were skipped has its states later
    assert len(snapshot._blocks) == -(-3 * count // BLOCK)
    assert [block.data_ptr() for block in snapshot._blocks[: len(places)]] == places
    before = state(net, optimizer)
    snapshot.close()
    assert snapshot._blocks, "what is not written yet stays"
    for kind, piece in more:
        assert torch.equal(torch.cat(list(snapshot.read(kind, piece))), before[kind, piece.name])
    snapshot.release()
    assert not snapshot._blocks
    step(net, optimizer)


def test_values_of_other_types_are_held_in_fp32(optimizer: torch.optim.Optimizer, snapshot: Snapshot) -> None:
    from ft_ray.state_files import Piece

    values = torch.randn(3 * BLOCK + 5).bfloat16()
    piece = Piece("w", 0, len(values))
    snapshot.take([("weight", piece)], lambda kind, asked: values)
    parts = list(snapshot.read("weight", piece))
    assert {part.dtype for part in parts} == {torch.float32} and len(parts) == 4
    assert torch.equal(torch.cat(parts), values.float())


def test_no_memory_for_it_is_said_once_and_the_state_is_written_at_once(
    net: torch.nn.Module, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    trainer, sharding = alone(net, optimizer), zero(True)
    sharding.prepare_saves(trainer)
    assert sharding._snapshot is not None
    sharding._snapshot._room.result()
    sharding._snapshot._block = 1 << 55  # values of one block: no machine has so much
    sharding._snapshot._blocks.clear()
    sharding._snapshot._wanted = 0
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert sharding.save(trainer, folder) is None
        before = state(net, optimizer)
        assert all(torch.equal(value, before[key]) for key, value in held(folder, before).items())
    said = [e["message"] for e in trainer.hooks.events if "training stands still" in e["message"]]
    assert len(said) == 1 and said[0].startswith("no host memory for snapshots (")


def test_a_failing_write_is_raised_and_leaves_the_memory_to_the_next_save(
    net: torch.nn.Module, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    trainer, sharding = alone(net, optimizer), zero(True)
    sharding.prepare_saves(trainer)
    later = sharding.save(trainer, tmp_path)
    assert later is not None
    with pytest.raises(FileNotFoundError):
        later(tmp_path / "nowhere")
    later = sharding.save(trainer, tmp_path)
    assert later is not None
    later(tmp_path)
    sharding.end_saves()


def test_free_memory_is_known() -> None:
    total, free = total_and_free()
    assert 0 < free <= total
