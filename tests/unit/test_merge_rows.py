"""Tensors written by blocks of rows on many threads: the same bits as whole ones, and an error that is not lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ft_ray import merge_rows
from ft_ray.errors import ModelError
from ft_ray.merge_math import add_rows
from ft_ray.merge_rows import Blocks
from ft_ray.safetensors_io import Entry, Reader, Writer


def source(tensor: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    return lambda start, count: tensor.view(-1)[start : start + count]


@pytest.mark.parametrize("values", [1, 700, 1 << 18])
def test_blocks_of_any_size_give_the_bits_of_the_whole(
    values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(merge_rows._VALUES, "cpu", values)
    threads = torch.get_num_threads()
    weight, plain, empty = torch.randn(190, 70).bfloat16(), torch.randn(3, 5, 7), torch.empty(0, 4)
    a, b = torch.randn(8, 70), torch.randn(190, 8)
    entries = [Entry("w", torch.bfloat16, (190, 70)), Entry("p", torch.float16, (3, 5, 7))]
    entries.append(Entry("e", torch.float32, (0, 4)))
    with Blocks("cpu") as blocks, Writer(tmp_path / "x.safetensors", entries) as writer:
        blocks.write(writer, entries[0], source(weight), (a, b, 0.5))
        blocks.write(writer, entries[1], source(plain), None)
        blocks.write(writer, entries[2], source(empty), None)
        blocks.finish()
    with Reader([tmp_path / "x.safetensors"]) as reader:
        whole = add_rows(weight, a, b, 0.5, torch.bfloat16)
        # One row a block is a product of another kind; sizes in use are far from it.
        same: Any = torch.equal if values > 70 else lambda x, y: torch.allclose(x.float(), y.float(), rtol=8e-3)
        assert same(reader.read("w"), whole)
        assert torch.equal(reader.read("p"), plain.half())
        assert reader.read("e").shape == (0, 4)
    assert torch.get_num_threads() == threads


def test_a_fault_in_a_thread_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(merge_rows._VALUES, "cpu", 100)
    broken = torch.ones(50, 20)
    broken[33, 3] = float("inf")
    entry = Entry("w", torch.float32, (50, 20))

    def write() -> None:
        with Blocks("cpu") as blocks, Writer(tmp_path / "x.safetensors", [entry]) as writer:
            blocks.write(writer, entry, source(broken), None)
            blocks.finish()

    with pytest.raises(ModelError, match="'w' holds NaN or infinite"):
        write()


def test_nobody_writes_into_a_file_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(merge_rows._VALUES, "cpu", 100)
    entry, written = Entry("w", torch.float32, (50, 20)), []

    class Slow:
        def write_part(self, name: str, start: int, part: torch.Tensor) -> None:
            time.sleep(0.05)
            written.append(start)

    def interrupted() -> None:
        with blocks.of_one_file():
            blocks.write(Slow(), entry, source(torch.ones(50, 20)), None)  # type: ignore[arg-type]
            raise KeyboardInterrupt

    with Blocks("cpu") as blocks:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        at_the_end = len(written)
        time.sleep(0.2)
        assert len(written) == at_the_end


def test_a_file_that_is_not_whole_is_noticed(tmp_path: Path) -> None:
    entry = Entry("w", torch.float32, (4, 2))
    with pytest.raises(AssertionError, match="16 bytes"), Writer(tmp_path / "x.safetensors", [entry]) as writer:
        writer.write_part("w", 4, torch.ones(4))
