"""What a shared-base trial is made of: its settings, and what comes back from a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ft_ray import objective

__all__ = ["AdapterConfig", "HeldOut", "Stats", "StepResult"]


@dataclass(frozen=True)
class AdapterConfig:
    """One trial: its adapter and how it is trained. Names, units and defaults are the recipe's."""

    total_steps: int
    r: int = 16
    alpha: float = 32
    dropout: float = 0.05
    targets: str | tuple[str, ...] = "all-linear"
    rslora: bool = False
    lr: float = 2e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    seed: int = 0

    @property
    def scale(self) -> float:
        """alpha/r, or alpha/sqrt(r) for rsLoRA (arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def lr_at(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        warmup = objective.warmup_steps(self.warmup, self.total_steps)
        return self.lr * objective.lr_factor(self.schedule, step, self.total_steps, warmup)


@dataclass(frozen=True)
class StepResult:
    """`loss` is the mean over this adapter's `tokens` trained tokens, `grad_norm` before clipping, `lr` what was used.

    `step` counts optimizer steps taken. `stopped` says why the adapter trains no more; None while it does.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    step: int
    stopped: str | None = None


@dataclass(frozen=True)
class HeldOut:
    """Sum of token losses over `tokens` tokens, and the same for each sequence, in order."""

    loss_sum: float
    tokens: int
    sequences: tuple[tuple[float, int], ...]

    @property
    def loss(self) -> float:
        return self.loss_sum / self.tokens if self.tokens else math.nan


@dataclass(frozen=True)
class Stats:
    """`mean_k`: adapters a training forward, on average. `padding`: share of its token slots that held no token."""

    steps: int
    forwards: int
    mean_k: float
    tokens: int
    trained_tokens: int
    padding: float
    out_of_memory: int
    k_limit: int | None
