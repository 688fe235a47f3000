"""Pinned memory without a GPU: CUDA's runtime is the one part that stands in for the real one (tests/gpu has that)."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ft_ray import pinned

SIZE = 1 << 20  # values: two huge pages
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Registers what it is given, until `full`."""
    held: dict[int, int] = {}
    fake = SimpleNamespace(held=held, full=False)

    def register(place: int, size: int, flags: int) -> int:
        assert flags == 0
        held.update({} if fake.full else {place: size})
        return 2 if fake.full else 0  # cudaErrorMemoryAllocation

    def checked(code: int) -> None:
        if code:
            raise torch.cuda.CudaError(code)

    fake.cudaHostRegister, fake.cudaHostUnregister = register, held.pop
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "check_error", checked)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CudaError", RuntimeError)
    return fake


def flags_of(tensor: torch.Tensor) -> set[str]:
    """The kernel's flags of the mapping in which a tensor begins."""
    found: set[str] = set()
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        place = line.split(maxsplit=1)[0]
        if "-" in place and not place.endswith(":"):
            begin, end = (int(one, 16) for one in place.split("-"))
            inside = begin <= tensor.data_ptr() < end
        elif inside and place == "VmFlags:":
            found.update(line.split()[1:])
    return found


def test_a_block_is_filled_before_it_is_pinned_and_unpinned_once(runtime: SimpleNamespace) -> None:
    with ThreadPoolExecutor(pinned.THREADS) as pool:
        blocks = [pinned.block(SIZE, pool, DEVICE) for _ in range(2)]
    assert runtime.held == {one.data_ptr(): 4 * SIZE for one in blocks}
    assert all(one.dtype == torch.float32 and len(one) == SIZE and not one.any() for one in blocks)
    pinned.free(blocks)
    assert not runtime.held
    blocks[0].fill_(1.0)  # its memory is there as long as it is


def test_a_driver_that_pins_no_more_is_an_error(runtime: SimpleNamespace) -> None:
    runtime.full = True
    with ThreadPoolExecutor(pinned.THREADS) as pool, pytest.raises(RuntimeError):
        pinned.block(SIZE, pool, DEVICE)


def test_no_address_space_is_an_error_that_says_how_much_was_asked_for() -> None:
    with pytest.raises(RuntimeError, match=f"no address space for {1 << 62} bytes"):
        pinned.mapped(1 << 60)


def test_forks_do_not_move_the_pages_that_a_gpu_writes_to() -> None:
    memory = pinned.mapped(SIZE)
    assert "dc" in flags_of(memory)  # VM_DONTCOPY
    if Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        assert "hg" in flags_of(memory)  # VM_HUGEPAGE


def test_a_copy_s_memory_is_taken_again_once_nobody_holds_it(runtime: SimpleNamespace) -> None:
    pool, one, two = pinned.Pool(SIZE, DEVICE), torch.randn(SIZE), torch.randn(SIZE)
    first = pool.copy(one)
    second = pool.copy(two)
    assert torch.equal(first, one) and torch.equal(second, two)
    assert len(runtime.held) == 2
    place, part = first.data_ptr(), first[:8]
    del first
    third = pool.copy(two)
    assert third.data_ptr() == place and len(runtime.held) == 2
    assert torch.equal(part, two[:8]), "a view is no hold: what is kept must be a copy"
    assert torch.equal(second, two)
    del pool
    assert not runtime.held
    assert torch.equal(third, two), "memory stays as long as a tensor shows it"


def test_where_no_more_is_pinned_the_copy_fails_and_what_is_there_goes_on(runtime: SimpleNamespace) -> None:
    pool, values = pinned.Pool(SIZE, DEVICE), torch.randn(SIZE)
    kept = pool.copy(values)
    runtime.full = True
    with pytest.raises(RuntimeError):
        pool.copy(values)
    runtime.full = False
    with pytest.raises(RuntimeError, match="all that may be pinned is in use"):
        pool.copy(values)  # it is not asked for again
    del kept
    assert torch.equal(pool.copy(values), values)


def test_no_more_is_pinned_than_may_be(runtime: SimpleNamespace) -> None:
    pool, values = pinned.Pool(SIZE, DEVICE, most=2 * 4 * SIZE), torch.randn(SIZE)
    kept = [pool.copy(values) for _ in range(2)]
    with pytest.raises(RuntimeError, match="all that may be pinned is in use"):
        pool.copy(values)
    assert len(runtime.held) == len(kept) == 2
