"""Which adapters and micro-batches go through a forward together, and what is done when memory runs out in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch

from ft_ray.adapter_stack import Bucket
from ft_ray.segments import MicroBatch

__all__ = ["Member", "halved", "in_groups", "out_of_memory", "rounds"]

Member = tuple[str, Bucket, int]
"""An adapter in a forward: its id, its bucket and its slot there."""
Found = TypeVar("Found")


def rounds(group: Sequence[Member], micros: Mapping[str, list[MicroBatch]]) -> Iterator[tuple[int, list[Member]]]:
    """Micro-batch numbers, each with the members that have so many."""
    for round_ in range(max(len(micros[adapter_id]) for adapter_id, _, _ in group)):
        yield round_, [member for member in group if len(micros[member[0]]) > round_]


def in_groups(
    members: Sequence[Member],
    micros: dict[str, list[MicroBatch]],
    most: int,
    forward: Callable[[Sequence[Member], Mapping[str, list[MicroBatch]]], dict[str, Found]],
    ran_out: Callable[[int], None],
) -> tuple[dict[str, Found], int]:
    """`forward` of all members, `most` at a time; what it found, and how many went at a time in the end.

    Where memory runs out half as many go, and where one is too much its micro-batches are halved in `micros`, down to
    a sequence; then the error is raised. `ran_out` hears how many there were.
    """
    found: dict[str, Found] = {}
    while members:
        group = members[:most]
        try:
            found |= forward(group, micros)
        except (RuntimeError, MemoryError) as error:
            own = group[0][0]
            whole = len(group) == 1 and max(len(batch.sequences) for batch in micros[own]) == 1
            if whole or not out_of_memory(error):
                raise
            error.__traceback__ = None  # it holds the frames, and they hold the activations
            ran_out(len(group))
            if len(group) > 1:
                most = len(group) // 2
            else:
                micros[own] = halved(micros[own])
            continue
        members = members[len(group) :]
    return found, most


def halved(batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The same sequences in the same order, half as many together."""
    found: list[MicroBatch] = []
    for batch in batches:
        middle = (len(batch.sequences) + 1) // 2
        parts = (batch.sequences[:middle], batch.sequences[middle:])
        found += [MicroBatch(part) for part in parts if part]
    return found


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: for torch, for a kernel of Triton's that is loaded, for a CPU's allocator.

    The latter two are plain RuntimeErrors: 'Triton Error [CUDA]: out of memory', "DefaultCPUAllocator: can't allocate
    memory".
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "out of memory" in str(error) or "allocate memory" in str(error)
