"""What a finished sweep says about its search space: a best value at an end of its range, trials that diverged.

Judged from `sweep.json` alone. A patch here changes the space, not the recipe: its keys begin with `search.`, and
`remedies` has the recipe's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from ft_ray import search_space
from ft_ray.diagnosis import Diagnosis
from ft_ray.errors import RecipeError
from ft_ray.recipe import Recipe
from ft_ray.search_space import Distribution, LoadedSpace, Space
from ft_ray.sweep_results import SweepResult, TrialResult

__all__ = ["after_sweep", "is_of_space", "widened"]

_SEARCH = "search."
_ENOUGH = 5  # trials with a loss, below which the best of them is no trend
_RATE = "optim.lr"


def is_of_space(patch: Mapping[str, Any]) -> bool:
    """Whether a patch is of a search space rather than of a recipe."""
    return any(key.startswith(_SEARCH) for key in patch)


def after_sweep(record: Mapping[str, Any], recipe: Recipe) -> list[Diagnosis]:
    """Findings of a sweep's record (`sweep.json`); [] for one whose space this version cannot read."""
    try:
        result = SweepResult.model_validate(record)
        space = search_space.parse(result.space)
    except (ValueError, RecipeError):
        return []
    return [*_diverged(result, space, recipe), *_edges(result, space, recipe)]


def widened(space: Mapping[str, Any], patches: Mapping[str, Any]) -> dict[str, Any]:
    """A space's mapping with patched distributions; first points stay."""
    search = dict(space["search"]) | {key.removeprefix(_SEARCH): value for key, value in patches.items()}
    return {**space, "search": search}


def _edges(result: SweepResult, space: Space, recipe: Recipe) -> Iterator[Diagnosis]:
    known = [t for t in result.trials if t.best_loss is not None and math.isfinite(t.best_loss)]
    if len(known) < _ENOUGH:
        return
    order = sorted(known, key=lambda t: (t.best_loss or 0.0, t.id))
    good = order[: max(3, len(order) // 4)]
    for path, distribution in space.search.items():
        places = [_place(distribution, t.config.get(path)) for t in good]
        found = [p for p in places if p is not None]
        if len(found) < len(good) or places[0] is None:
            continue
        # The best at an end of the range, and the next best on that side as well: one trial alone may be luck.
        high = places[0] >= 0.9 and median(found) >= 2 / 3
        low = places[0] <= 0.1 and median(found) <= 1 / 3
        patch = _wider(space, recipe, path, high) if high or low else {}
        if not patch:
            continue  # inside the range, or at an end beyond which nothing lies
        end, value = ("upper" if high else "lower"), order[0].config[path]
        yield Diagnosis(
            "learning_rate_edge" if path == _RATE else "space_edge",
            "warning" if path == _RATE else "info",
            f"The best trial {order[0].id} has {path} {value:g}, at the {end} end of what was searched "
            f"({_shown(distribution)}), and the next best lie on that side too: the best value may lie beyond.",
            {"path": path, "best": value, "end": end, "places": [round(p, 3) for p in found], "trials": len(known)},
            patch,
        )


def _diverged(result: SweepResult, space: Space, recipe: Recipe) -> Iterator[Diagnosis]:
    bad = [t for t in result.trials if t.status == "stopped" and "not finite" in t.error]
    if not bad or len(bad) < max(2, len(result.trials) // 8):
        return
    sound = [t for t in result.trials if t.best_loss is not None and t not in bad]
    patch: dict[str, Any] = {}
    where = ""
    distribution = space.search.get(_RATE)
    rates, kept = _values(bad), _values(sound)
    if distribution is not None and len(rates) == len(bad) and kept and min(rates) > max(kept):
        where = f", all with {_RATE} from {min(rates):g} on, where no trial ended well"
        patch = _below(distribution, math.sqrt(min(rates) * max(kept)))
    yield Diagnosis(
        "trials_diverged", "warning",
        f"{len(bad)} of {len(result.trials)} trials diverged{where}: the space spends its budget on settings that "
        "cannot train.",
        {"diverged": [t.id for t in bad][:20], "trials": len(result.trials), "lowest": min(rates, default=None)},
        patch if _fits(space, recipe, patch) else {},
    )  # fmt: skip


def _values(trials: list[TrialResult]) -> list[float]:
    return [float(v) for t in trials if isinstance(v := t.config.get(_RATE), int | float)]


def _below(distribution: Distribution, most: float) -> dict[str, Any]:
    if distribution.choice is not None:
        left = [c for c in distribution.choice if c < most]
        return {_SEARCH + _RATE: {"choice": left}} if left else {}
    low, _, *step = getattr(distribution, distribution.kind)
    return {_SEARCH + _RATE: {distribution.kind: [low, _round(most), *step]}}


def _numbers(distribution: Distribution) -> list[float]:
    """A choice's values in order, [] where they are no numbers or too few to have a middle."""
    values = distribution.choice or ()
    plain = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return sorted(plain) if len(plain) == len(values) >= 3 else []


def _place(distribution: Distribution, value: Any) -> float | None:
    """Where a value lies in its range: 0 the lower end, 1 the upper; None where there is no order."""
    if distribution.times is not None or not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if distribution.choice is not None:
        numbers = _numbers(distribution)
        return numbers.index(value) / (len(numbers) - 1) if value in numbers else None
    low, high, _ = distribution.range
    if "log" in distribution.kind:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def _wider(space: Space, recipe: Recipe, path: str, high: bool) -> dict[str, Any]:
    """The range carried on at one end by half its width (a logarithmic one at most fourfold, a choice by one value).

    {} where that is not allowed.
    """
    distribution = space.search[path]
    changed: dict[str, Any]
    if distribution.choice is not None:
        numbers = _numbers(distribution)
        last, before = (numbers[-1], numbers[-2]) if high else (numbers[0], numbers[1])
        if last <= 0 or before <= 0:
            return {}
        beyond = last * last / before  # ranks, batches and rates are chosen by ratios
        beyond = round(beyond) if all(isinstance(n, int) for n in numbers) else _round(beyond)
        changed = {"choice": [*numbers, beyond] if high else [beyond, *numbers]}
    else:
        low, top, *step = getattr(distribution, distribution.kind)
        if "log" in distribution.kind:
            factor = min(math.sqrt(top / low), 4.0)
            low, top = (low, top * factor) if high else (low / factor, top)
        else:
            half = (top - low) / 2
            low, top = (low, top + half) if high else (low - half, top)
        ends = [round(low), round(top)] if distribution.kind.endswith("randint") else [_round(low), _round(top)]
        changed = {distribution.kind: [*ends, *step]}
    patch = {_SEARCH + path: changed}
    return patch if _fits(space, recipe, patch) else {}


def _fits(space: Space, recipe: Recipe, patch: Mapping[str, Any]) -> bool:
    """Whether the patched space can be searched with this recipe."""
    if not patch:
        return False
    try:
        made = search_space.parse(widened(space.model_dump(mode="json", exclude_none=True), patch))
        search_space.check(LoadedSpace(made, lambda loc: "space"), recipe)
    except RecipeError:
        return False
    return True


def _shown(distribution: Distribution) -> str:
    ends = distribution.ends()
    return f"{min(ends):g} to {max(ends):g}"


def _round(value: float) -> float:
    return float(f"{value:.2g}")
