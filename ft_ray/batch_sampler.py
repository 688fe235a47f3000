"""The order of the rows: seeded permutations, dealt out as batches to the ranks of a run or to an adapter.

For the training loss to be the same whatever the number of workers and accumulation steps, every optimizer step must
see the same rows: `RankBatches` deals one seeded permutation an epoch out by global batches, and fills the last one
with masked rows.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from ft_ray.objective import BatchPlan

__all__ = ["DataOrder", "FilledRows", "RankBatches", "evaluation_batches"]


class RankBatches(Sampler[list[int]]):
    """Index batches of one rank: [per_device] row numbers each, `accumulation` of them an optimizer step.

    One permutation of the rows an epoch, seeded by (seed, epoch) and the same on every rank. Optimizer step
    s takes global batch s of it, whatever the number of ranks, so 1 x 8 rows = 8 x 1 = 2 workers x 4. Indices
    from `rows` on are filler, to be masked: the last global batch is whole and no row is seen twice.
    """

    def __init__(self, rows: int, plan: BatchPlan, *, rank: int, seed: int) -> None:
        self.rows, self.plan, self.rank, self.seed, self.epoch = rows, plan, rank, seed, 0
        self.steps = math.ceil(rows / plan.global_rows)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self, epoch: int | None = None) -> Sequence[int]:
        """An epoch's row numbers in the order of training; None: of the present one. Takes 8 bytes a row."""
        epoch = self.epoch if epoch is None else epoch
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        # As a list it would take 40 bytes a row, for as long as the epoch lasts.
        return array("q", torch.randperm(self.rows, generator=generator).numpy().tobytes())

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        for step in range(self.steps):
            yield from self._dealt(order, step)

    def _dealt(self, order: Sequence[int], step: int) -> Iterator[list[int]]:
        width, workers = self.plan.per_device, self.plan.workers
        for micro in range(self.plan.accumulation):
            start = step * self.plan.global_rows + (micro * workers + self.rank) * width
            ends = min(start + width, len(order))
            yield [*order[start:ends], *range(max(start, len(order)), start + width)]

    def rows_of(self, step: int) -> list[list[int]]:
        """Row numbers of each forward pass of this rank in optimizer step `step`, counted from 1; without filler."""
        epoch, inside = divmod(step - 1, self.steps)
        return [[row for row in batch if row < self.rows] for batch in self._dealt(self.order(epoch), inside)]

    def __len__(self) -> int:
        return self.steps * self.plan.accumulation


class FilledRows(Dataset[dict[str, Any]]):
    """Memory-mapped token rows, and a two-token row without trained tokens for every index past the end."""

    def __init__(self, rows: Any, pad_id: int) -> None:
        columns = [c for c in ("input_ids", "labels", "seq_lengths") if c in rows.column_names]
        self._rows = rows.select_columns(columns)
        filler = {"input_ids": [pad_id, pad_id], "labels": [-100, -100], "seq_lengths": [2]}
        self._filler = {column: filler[column] for column in columns}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._rows[index]) if index < len(self._rows) else dict(self._filler)


def evaluation_batches(lengths: Sequence[int], batch: int, *, rank: int, workers: int) -> list[list[int]]:
    """Index batches of one rank for a loss sum: by length, so that little is padded.

    Every rank gets equally many (some of filler only): a sharded model's forward pass is a collective.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    chunk = batch * workers
    order += range(len(lengths), math.ceil(len(lengths) / chunk) * chunk)
    return [order[s + rank * batch : s + (rank + 1) * batch] for s in range(0, len(order), chunk)]


@dataclass(frozen=True)
class DataOrder:
    """Which rows an adapter sees at which position: a seeded permutation an epoch, its partial last batch dropped."""

    rows: int
    batch: int
    seed: int

    def at(self, position: int) -> list[int]:
        """Row numbers of batch `position`, counted from 0 through all epochs."""
        batch = min(self.batch, self.rows)
        epoch, within = divmod(position, self.rows // batch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(self.rows, generator=generator).tolist()
        return order[within * batch : (within + 1) * batch]
