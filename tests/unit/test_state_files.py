"""Training state on disk: any range of any parameter, out of whatever pieces the ranks wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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


def test_any_range_is_read_whoever_wrote_it(whole: dict[tuple[str, str], torch.Tensor], tmp_path: Path) -> None:
    """Within one rank's share, over the shares of several, and of a parameter that some ranks have nothing of."""
    wanted = [("a", 0, 334), ("a", 300, 500), ("a", 668, 332), ("a", 0, 1000), ("b", 0, 37), ("b", 5, 0), ("c", 0, 1)]
    with StateFiles(tmp_path) as state:
        for kind in KINDS:
            for name, start, count in wanted:
                values = state.read(kind, name, start, count)
                assert torch.equal(values, whole[kind, name][start : start + count])
                assert values.dtype == torch.float32
            assert torch.equal(state.read(kind, "a", 900), whole[kind, "a"][900:]), "to its end"


def test_what_lacks_is_told(whole: dict[tuple[str, str], torch.Tensor], tmp_path: Path) -> None:
    (tmp_path / "state-00001-of-00003.safetensors").unlink()
    with StateFiles(tmp_path) as state:
        assert torch.equal(state.read("weight", "a", 0, 334), whole["weight", "a"][:334]), "its own share is there"
        lacking = r"has 666 of 1000 elements of weight of a and lacks state-00001-of-00003\.safetensors: remove that"
        with pytest.raises(TrainingError, match=lacking):
            state.read("weight", "a")
    cut = tmp_path / "state-00002-of-00003.safetensors"
    with StateFiles(tmp_path) as state:
        cut.write_bytes(cut.read_bytes()[:-100])
        with pytest.raises(ModelError, match="cut short"):
            [state.read("exp_avg", "b", 26, 11), state.read("exp_avg", "a", 668, 332)]
