"""The sections of a search space: strict, frozen, one class for each mapping in the file. `search_space` joins them."""

from __future__ import annotations

import math
import random
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ft_ray.recipe_sections import Strict

__all__ = ["Budget", "Confirm", "Distribution", "Scheduler", "Space"]

_RANGES = ("uniform", "loguniform", "quniform", "qloguniform", "randint", "lograndint")


class Distribution(Strict):
    """What a recipe value is drawn from: exactly one of these keys, or `times` with `choice`. Ranges hold both ends."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1, description="One of a list.")
    times: str | None = Field(None, description="With choice: that many times the value of another path.")
    uniform: tuple[float, float] | None = Field(None, description="Evenly between two numbers.")
    loguniform: tuple[float, float] | None = Field(None, description="Evenly in the logarithm.")
    quniform: tuple[float, float, float] | None = Field(None, description="low, high, step.")
    qloguniform: tuple[float, float, float] | None = Field(None, description="low, high, step; even in the logarithm.")
    randint: tuple[int, int] | None = Field(None, description="A whole number.")
    lograndint: tuple[int, int] | None = Field(None, description="A whole number, evenly in the logarithm.")

    @model_validator(mode="after")
    def _one(self) -> Distribution:
        given = [n for n in ("choice", *_RANGES) if getattr(self, n) is not None]
        if len(given) != 1:
            what = f"has {' and '.join(given)}" if given else "is empty"
            raise ValueError(f"{what}: give exactly one of choice, {', '.join(_RANGES)}, or times with choice")
        if self.times is not None:
            if self.choice is None:
                raise ValueError("times goes with choice: {times: lora.r, choice: [1, 2]}")
            if not all(isinstance(c, int | float) and not isinstance(c, bool) and c > 0 for c in self.choice):
                raise ValueError("the factors of times are numbers above 0")
        if self.choice is not None:
            if len({repr(c) for c in self.choice}) < len(self.choice):
                raise ValueError("a choice names a value twice")
            return self
        low, high, step = self._range()
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"{given[0]} needs two numbers, the lower one first")
        if "log" in given[0] and low <= 0:
            raise ValueError(f"{given[0]} needs numbers above 0")
        if step is not None and not 0 < step <= high - low:
            raise ValueError(f"{given[0]} needs a step above 0 and no wider than its range")
        return self

    @property
    def kind(self) -> str:
        return next(n for n in ("choice", *_RANGES) if getattr(self, n) is not None)

    @property
    def whole(self) -> bool:
        return self.kind in ("randint", "lograndint") or (
            self.kind in ("quniform", "qloguniform") and all(float(x).is_integer() for x in getattr(self, self.kind))
        )

    def _range(self) -> tuple[float, float, float | None]:
        found = getattr(self, self.kind)
        return found[0], found[1], found[2] if len(found) == 3 else (1 if self.kind.endswith("randint") else None)

    @property
    def range(self) -> tuple[float, float, float | None]:
        """Low, high, and the step between values (None: any number)."""
        return self._range()

    def values(self) -> tuple[Any, ...] | None:
        """All values of a choice; None for a range."""
        return self.choice

    def ends(self) -> list[Any]:
        """All values of a choice, else the lowest and the highest."""
        if self.choice is not None:
            return list(self.choice)
        low, high, _ = self._range()
        return [self.rounded(low), self.rounded(high)]

    def holds(self, value: Any) -> bool:
        if self.choice is not None:
            return value in self.choice or (isinstance(value, list) and tuple(value) in self.choice)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        low, high, step = self._range()
        on_step = step is None or math.isclose((value - low) / step, round((value - low) / step), abs_tol=1e-9)
        return low <= value <= high and on_step

    def rounded(self, value: float) -> Any:
        """The nearest value that can be drawn."""
        low, high, step = self._range()
        if step is not None:
            value = low + round((value - low) / step) * step
            value -= step if value > high * (1 + 1e-12) else 0
        return round(value) if self.whole else float(f"{value:.6g}")

    def draw(self, rng: random.Random) -> Any:
        if self.choice is not None:
            return rng.choice(self.choice)
        low, high, _ = self._range()
        if "log" in self.kind:
            return self.rounded(min(high, max(low, math.exp(rng.uniform(math.log(low), math.log(high))))))
        return self.rounded(rng.uniform(low, high))


class Scheduler(Strict):
    """Which trials are stopped early. Steps are a trial's optimizer steps."""

    type: Literal["asha", "median", "none"] = Field("none", description="ASHA (arXiv:1810.05934), or median stopping.")
    reduction: int = Field(3, ge=2, description="ASHA: one in so many goes on at each rung.")
    grace: int | float = Field(0.1, gt=0, description="No stop before: steps, or a fraction of the longest trial.")
    min_trials: int = Field(3, ge=1, description="median: trials that must have reported before one is stopped.")


class Budget(Strict):
    """Limits of the whole sweep; the first that is reached ends it."""

    trials: int | None = Field(None, ge=1, description="Trials; a grid may leave it out.")
    tokens: int | None = Field(None, ge=1, description="Trained tokens, all trials together.")
    hours: float | None = Field(None, gt=0, description="Hours of wall time.")


class Confirm(Strict):
    """The best trials trained again with other seeds, to tell a better setting from a lucky one."""

    top: int = Field(3, ge=0, description="How many; 0 turns it off.")
    seeds: int = Field(3, ge=1, description="Seeds each.")


class Space(Strict):
    """One search space."""

    search: dict[str, Distribution] = Field(min_length=1, description="Dotted recipe path -> distribution.")
    first: tuple[dict[str, Any], ...] = Field(
        (), description="Points tried for certain, at random places among the first eight."
    )
    searcher: Literal["random", "grid", "tpe"] = "random"
    scheduler: Scheduler = Scheduler()
    metric: Literal["validation_loss"] = Field("validation_loss", description="Nats a trained token, on validation.")
    mode: Literal["min"] = "min"
    budget: Budget = Budget()
    seed: int = Field(0, ge=0, description="Of draws and of the order of trials.")
    confirm: Confirm = Confirm()
    engines: int | Literal["auto"] = Field("auto", description="Shared bases; auto: one a GPU, or one on CPUs.")
    concurrent: int | Literal["auto"] = Field("auto", description="Most trials at once; auto: see the guide.")
    keep: int = Field(
        4, ge=1, validate_default=True,
        description="Trials whose best checkpoint stays when the sweep has ended; confirm.top at the least.",
    )  # fmt: skip
    retries: int = Field(3, ge=0, description="Times a trial whose client was lost is started again.")

    @field_validator("keep")
    @classmethod
    def _all_that_are_confirmed(cls, keep: int, info: ValidationInfo) -> int:
        confirm = info.data.get("confirm")  # None: it is at fault itself
        return max(keep, confirm.top) if confirm is not None else keep

    @model_validator(mode="after")
    def _no_circle(self) -> Space:
        for start in self.search:
            chain = [start]
            while (path := self.search[chain[-1]].times) is not None and path in self.search:
                if path in chain:
                    raise ValueError(f"search.{start} is a multiple of itself ({' of '.join([*chain, path])})")
                chain.append(path)
        for name in ("engines", "concurrent"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is a number from 1, or auto")
        return self
