"""What the sides of a full fine-tuning benchmark share: the case, its recipe, its rows, how step times are read."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

__all__ = ["Case", "Rows", "recipe_of", "rows_of", "step_times"]

LEAST_SKIPPED = 2  # steps that warm up


@dataclass(frozen=True)
class Case:
    """Every side trains the folder `model` on rows of `length` tokens, `global_rows` a step, `rows` a forward pass."""

    device: str
    shape: str
    model: str
    length: int
    rows: int
    global_rows: int
    steps: int
    every: int  # steps, of checkpoints where there are any
    work: str
    profile: bool = False  # of peers
    fused: bool = False  # Liger's norms and MLPs in the side `whole`
    lean: bool = False  # `_lean` of train_peers.py in the side `whole`, on one device
    deepspeed: dict[str, Any] | None = None  # laid over what ft-ray derives

    @property
    def precision(self) -> str:
        return "bf16" if self.device == "cuda" else "fp32"


def recipe_of(case: Case, workers: int, *, saving: bool = False, sharding: str = "zero3") -> Any:
    """Full fine-tuning, with ZeRO-3 unless told. Its steps have no end that is reached: whoever measures ends it."""
    from ft_ray import recipe

    return recipe.from_dict(
        {
            "name": "bench", "model": {"id": case.model}, "data": {"train": [{"path": "x"}]}, "method": "full",
            "precision": case.precision, "batch": {"global": case.global_rows, "per_device": case.rows},
            "sequence": {"max_length": case.length}, "schedule": {"epochs": 1000, "max_steps": 1000, "warmup": 0},
            "optim": {"name": "adamw_torch_fused", "lr": 1e-5, "weight_decay": 0.0}, "evaluation": {"every": 10_000},
            "checkpoint": {"every": case.every if saving else 10_000, "keep": 1}, "gradient_checkpointing": True,
            "resources": {"workers": workers, "sharding": sharding, "gpus": 1 if case.device == "cuda" else 0},
            "deepspeed": (case.deepspeed or {}) if sharding == "zero3" else {},
        }
    )  # fmt: skip


def rows_of(case: Case) -> list[list[int]]:
    """Eight steps of rows of equal length, all tokens trained, so that every step does the same work."""
    return [
        [3 + (7 * i + (i % 5 + 1) * k) % 250 for k in range(case.length - 1)] + [2] for i in range(8 * case.global_rows)
    ]


@dataclass(frozen=True)
class Rows:
    """The rows in the shape of prepared data; made anew wherever this travels."""

    case: Case

    def tokens(self, split: str) -> Any:
        from datasets import Dataset

        ids = rows_of(self.case) if split == "train" else []
        return Dataset.from_dict({"input_ids": ids, "labels": ids, "length": [self.case.length] * len(ids)})


def step_times(ends: list[float], tokens: int, workers: int, leave_out: set[int] = frozenset()) -> dict[str, float]:  # type: ignore[assignment]
    """Median seconds between the ends of steps and the rate they mean. `leave_out`: gaps (from 0) with other work."""
    gaps = [b - a for a, b in pairwise(ends)]
    skipped = max(LEAST_SKIPPED, len(gaps) // 4)
    kept = [gap for number, gap in enumerate(gaps) if number >= skipped and number not in leave_out] or gaps[-1:]
    seconds = statistics.median(kept)
    return {
        "seconds": seconds, "fastest": min(kept), "slowest": max(kept), "steps": len(kept),
        "tokens_per_second_per_device": tokens / seconds / workers,
    }  # fmt: skip


def work_file(case: Case, name: str) -> Path:
    return Path(case.work) / f"{name.replace(' ', '-')}.json"
