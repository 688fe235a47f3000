"""Training state on disk: any range of any parameter, one read at a time or streamed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from ft_ray import state_files
from ft_ray.errors import ModelError, TrainingError
from ft_ray.state_files import Index, Piece, StateFiles, write_index, write_part

SIZES = {"a": 1000, "b": 37, "c": 1}
KINDS = ("weight", "exp_avg")


@pytest.fixture
def whole(tmp_path: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Values by kind and name, on disk in the shares of three ranks."""
    values = {(kind, name): torch.randn(size) for kind in KINDS for name, size in SIZES.items()}
    for rank in range(3):
        pieces = []
        for kind in KINDS:
            for name, size in SIZES.items():
                share = -(-size // 3)
                start = min(rank * share, size)
                pieces.append((kind, Piece(name, start, min(share, size - start))))
        write_part(
            tmp_path, rank, 3, pieces,
            read=lambda kind, p: values[kind, p.name].narrow(0, p.start, p.count).split(100), buffers={},
        )  # fmt: skip
    shapes = {name: [size] for name, size in SIZES.items()}
    write_index(tmp_path, Index(shapes, ["exp_avg"], {"step": 3.0}, "AdamW", "zero3", 3, {}, []))
    return values


@pytest.mark.parametrize(("block", "readers"), [(7, 1), (7, 4), (100, 2), (1 << 24, 4)])
def test_what_is_streamed_is_what_is_read(
    whole: dict[tuple[str, str], torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    readers: int,
) -> None:
    monkeypatch.setattr(state_files, "_BLOCK", block)
    monkeypatch.setattr(state_files, "_READERS", readers)
    wanted = [
        ("exp_avg", Piece("a", 300, 500)), ("weight", Piece("b", 0, 37)), ("weight", Piece("b", 5, 0)),
        ("weight", Piece("c", 0, 1)), ("weight", Piece("a", 0, 1000)),
    ]  # fmt: skip
    out = {(kind, piece): torch.full((piece.count,), torch.nan) for kind, piece in wanted}
    order = []
    with StateFiles(tmp_path) as state:
        for kind, piece, at, values in state.stream(wanted):
            assert len(values) <= block and values.dtype == torch.float32
            order.append((kind, piece, at))
            out[kind, piece][at : at + len(values)] = values
        for (kind, piece), values in out.items():
            expected = whole[kind, piece.name][piece.start : piece.start + piece.count]
            assert torch.equal(values, expected)
            assert torch.equal(state.read(kind, piece.name, piece.start, piece.count), expected)
    assert order == sorted(order, key=lambda one: (wanted.index(one[:2]), one[2])), "in the order asked for"


def test_what_lacks_is_told_and_no_thread_is_left(
    whole: dict[tuple[str, str], torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_files, "_BLOCK", 50)
    (tmp_path / "state-00001-of-00003.safetensors").unlink()
    with StateFiles(tmp_path) as state:
        got: list[int] = []
        stream = state.stream([("weight", Piece("a", 0, 1000))])
        with pytest.raises(TrainingError, match=r"lacks state-00001-of-00003\.safetensors: remove that checkpoint"):
            got.extend(at for _, _, at, _ in stream)
        assert got == [0, 50, 100, 150, 200, 250], "what was whole came first"
    cut = tmp_path / "state-00002-of-00003.safetensors"
    with StateFiles(tmp_path) as state:
        cut.write_bytes(cut.read_bytes()[:-100])
        with pytest.raises(ModelError, match="cut short"):
            list(state.stream([("exp_avg", Piece("b", 26, 11)), ("exp_avg", Piece("a", 668, 332))]))
    assert not [t.name for t in threading.enumerate() if t.name.startswith("ft-ray-state")]


def test_whoever_stops_listening_is_not_read_to(whole: dict[tuple[str, str], torch.Tensor], tmp_path: Path) -> None:
    with StateFiles(tmp_path) as state:
        stream = state.stream([("weight", Piece(name, 0, size)) for name, size in SIZES.items()])
        next(stream)
        stream.close()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("ft-ray-state")]
