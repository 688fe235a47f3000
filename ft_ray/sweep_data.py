"""What a trial of a shared-base sweep trains on: its rows, their order, its adapter.

Rows and their order are those of the ordinary training path, so that a trial sees what the winner sees when it is
trained alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from ft_ray.adapter_config import AdapterConfig
from ft_ray.recipe import Recipe
from ft_ray.segments import MicroBatch
from ft_ray.sweep_steps import RowShares, total_steps

__all__ = ["SweepRows", "adapter_config", "rows_at"]

_CACHED_ROWS = 200_000


def adapter_config(recipe: Recipe, rows: SweepRows) -> AdapterConfig:
    """The recipe's adapter and its training."""
    lora, optim, schedule = recipe.lora, recipe.optim, recipe.schedule
    return AdapterConfig(
        total_steps=total_steps(recipe, rows),
        r=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        rslora=lora.rslora,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        betas=optim.betas,
        eps=optim.eps,
        max_grad_norm=optim.max_grad_norm,
        schedule=schedule.type,
        warmup=schedule.warmup,
        seed=recipe.seed,
    )


@functools.lru_cache(maxsize=64)
def _epoch(rows: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def rows_at(recipe: Recipe, rows: SweepRows, step: int) -> list[int]:
    """Row numbers of optimizer step `step`, counted from 0: what `batch_sampler.RankBatches` gives a run alone."""
    own, batch = rows.of(recipe), recipe.batch.global_
    epoch, within = divmod(step, math.ceil(len(own) / batch))
    numbers = _epoch(len(own), recipe.seed, epoch)[within * batch : (within + 1) * batch].tolist()
    return [own[number] for number in numbers]


class SweepRows(RowShares):
    """Prepared rows as micro-batches. `prepared` has `tokens(split)` and `packed()`, as `dataset.Prepared` does."""

    def __init__(self, prepared: Any, recipe: Recipe) -> None:
        super().__init__(prepared, recipe)
        self._validation = prepared.tokens("validation")
        self._read = functools.lru_cache(maxsize=_CACHED_ROWS)(self._row)
        self._held_out: dict[int, list[MicroBatch]] = {}

    def _row(self, index: int) -> tuple[tuple[Sequence[int], Sequence[int]], ...]:
        row = self._train[index]
        if self._packing:
            return MicroBatch.from_packed(row["input_ids"], row["labels"], row["seq_lengths"]).sequences
        return ((row["input_ids"], row["labels"]),)

    def batch(self, rows: Sequence[int], per_forward: int) -> list[MicroBatch]:
        """One step's rows, `per_forward` of them a micro-batch."""
        found = [self._read(row) for row in rows]
        return [
            MicroBatch(tuple(one for row in found[start : start + per_forward] for one in row))
            for start in range(0, len(found), per_forward)
        ]

    def validation(self, per_forward: int) -> list[MicroBatch]:
        """All validation rows, those of like length together. Empty without validation rows."""
        if per_forward not in self._held_out:
            rows = [(row["input_ids"], row["labels"]) for row in self._validation]
            rows.sort(key=lambda row: len(row[0]))
            self._held_out[per_forward] = [
                MicroBatch(tuple(rows[start : start + per_forward])) for start in range(0, len(rows), per_forward)
            ]
        return self._held_out[per_forward]
