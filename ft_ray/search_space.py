"""Search spaces: which recipe values a sweep varies, and how. Strict YAML, checked before anything starts.

A space names dotted recipe paths, each with a distribution (`space_sections`), first points, a searcher, a scheduler
and a budget. Every value it can draw is tried on the recipe; what vLLM could not serve is refused; what says the same
twice is said. Importing this module imports neither torch nor ray.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ft_ray import strict_yaml
from ft_ray.errors import RecipeError
from ft_ray.recipe import Recipe, from_dict
from ft_ray.recipe_faults import in_file
from ft_ray.recipe_sections import Strict
from ft_ray.space_sections import Budget, Confirm, Distribution, Scheduler, Space
from ft_ray.strict_yaml import dotted, nearest

__all__ = [
    "Budget", "Confirm", "Distribution", "LoadedSpace", "Scheduler", "Space", "apply", "check", "complete", "ends",
    "first_point", "grid", "label", "load", "parse", "planned", "points", "unshared", "value_of",
]  # fmt: skip

Point = dict[str, Any]
"""Dotted recipe path -> value: what one trial changes."""

# vLLM's LoRAConfig.max_lora_ranks (0.29.0): an adapter of a higher rank is refused at start-up.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_SHARED_RANK = 256
# What adapters on one base may differ in; anything else needs a base, or prepared data, of its own.
_SHARED = (
    "lora.r", "lora.alpha", "lora.dropout", "lora.targets", "lora.rslora", "optim.lr", "optim.weight_decay",
    "optim.betas", "optim.eps", "optim.max_grad_norm", "schedule.type", "schedule.warmup", "schedule.epochs",
    "schedule.max_steps", "batch.global", "data.fraction", "seed",
)  # fmt: skip
_ALONE = ("model.id", "model.revision", "method", "sequence", "quantization", "precision", "optim.name")
_DRAWS_PER_POINT = 200
_SHIPPED = (Path(__file__).resolve().parents[1] / "tune_spaces", Path(__file__).resolve().parent / "tune_spaces")


@dataclass(frozen=True)
class LoadedSpace:
    """A space, and `where(path)`: the place of a fault as a person is told it."""

    space: Space
    where: Callable[[strict_yaml.Path], str]


def find(path: str | Path) -> Path:
    """The file that `path` names: itself, or for a bare name one of tune_spaces/ here, of the checkout or the wheel."""
    file = Path(path)
    if not file.exists() and file.suffix in ("", ".yaml") and file.parent == Path("."):
        for root in (Path("tune_spaces"), *_SHIPPED):
            if (root / f"{file.stem}.yaml").exists():
                return root / f"{file.stem}.yaml"
    return file


def load(path: str | Path) -> LoadedSpace:
    """Reads a space file; see `find` for a bare name. Raises RecipeError."""
    file = find(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        shipped = ", ".join(sorted(f.stem for root in _SHIPPED for f in root.glob("*.yaml")))
        message = f"{path}: cannot be read ({reason}): give a file, or the name of a shipped one: {shipped}."
        raise RecipeError([message]) from error
    document = strict_yaml.parse(text, str(path))
    if not isinstance(document.value, dict):
        raise RecipeError([f"{path}: a search space is a mapping; see --space lora."])

    def where(loc: strict_yaml.Path) -> str:
        return f"{path}:{document.line(loc) or 1}"

    return LoadedSpace(parse(document.value, where), where)


def parse(value: Mapping[str, Any], where: Callable[[strict_yaml.Path], str] = lambda loc: "space") -> Space:
    """Validates a plain mapping. Raises RecipeError with every fault at once."""
    try:
        return Space.model_validate(value)
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            loc, _ = in_file(fault, value)
            name, place = dotted(loc), where(loc)
            if fault["type"] == "extra_forbidden":
                faults.append(f"{place}: unknown key {name!r}{nearest(str(loc[-1]), _keys(loc[:-1]))}.")
            elif fault["type"] == "missing":
                faults.append(f"{place}: {name!r} is missing: add it.")
            else:
                message = fault["msg"].removeprefix("Value error, ")
                subject = f"{name!r}: " if name else ""
                faults.append(f"{place}: {subject}{message[:1].lower()}{message[1:]}.")
        raise RecipeError(list(dict.fromkeys(faults))) from error


def check(loaded: LoadedSpace, recipe: Recipe) -> list[str]:
    """Tries the space on the recipe. Returns what is worth saying; raises RecipeError with every fault at once."""
    space, where = loaded.space, loaded.where
    faults: list[str] = []
    for path, distribution in space.search.items():
        place = where(("search", path))
        fault = _forbidden(path, recipe)
        if fault:
            faults.append(f"{place}: {path}: {fault}")
            continue
        if distribution.times is not None and distribution.times not in space.search:
            base = value_of(recipe, distribution.times)
            if not isinstance(base, int | float) or isinstance(base, bool):
                known = [p for p in space.search if p != path]
                near = nearest(distribution.times, known)
                faults.append(f"{place}: {path}: times {distribution.times!r} is no number{near}.")
                continue
        for value in ends(space, recipe, path):
            tried = _tried(recipe, {path: value}, place)
            faults += tried if isinstance(tried, list) else _served(path, value, place)
    faults = list(dict.fromkeys(faults))
    broken = {p for p in space.search if any(f.startswith(f'{where(("search", p))}:') for f in faults)}
    for index, first in enumerate(space.first):
        place = where(("first", index))
        for path, value in first.items():
            if path not in space.search:
                near = nearest(path, space.search)
                faults.append(f"{place}: first point sets {path!r}, which is not searched{near}.")
            elif path not in broken and not _inside(space, recipe, first, path, value):
                faults.append(f"{place}: first point sets {path} to {value!r}, outside what search.{path} can draw.")
    if space.searcher == "grid":
        for path, distribution in space.search.items():
            if distribution.values() is None:
                faults.append(
                    f"{where(('search', path))}: {path}: a grid needs choice or times with choice; "
                    "use searcher random or tpe for ranges."
                )
    elif space.budget.trials is None:
        place = where(("budget",))
        faults.append(f"{place}: budget.trials is missing: a {space.searcher} search has no end of its own.")
    if not faults:
        # Values that are right one by one may still not fit together: batch.global and per_device, say.
        for point in points(space, recipe)[:64]:
            tried = _tried(recipe, point, where(("search",)))
            faults += [f"{f} (point {label(point)})" for f in tried] if isinstance(tried, list) else []
    if faults:
        raise RecipeError(list(dict.fromkeys(faults)))
    return _notes(space, recipe)


def planned(recipe: Recipe, space: str) -> dict[str, Any]:
    """What a sweep would do: the points (drawn like random for tpe), notes, and whether trials share a base."""
    loaded = load(space)
    notes = check(loaded, recipe)
    reasons = unshared(loaded.space, recipe)
    return {
        "space": loaded.space.model_dump(mode="json"),
        "points": points(loaded.space, recipe),
        "notes": notes,
        "shared": not reasons,
        "reasons": reasons,
    }


def apply(recipe: Recipe, point: Mapping[str, Any]) -> Recipe:
    """The recipe with a point's values. Raises RecipeError."""
    return _applied(recipe, point, "point")


def unshared(space: Space, recipe: Recipe) -> list[str]:
    """Why trials cannot share one frozen base, one reason each; empty when they do."""
    reasons = [f"{path} changes what a base is loaded or prepared for" for path in space.search if path not in _SHARED]
    methods = ends(space, recipe, "method") if "method" in space.search else [recipe.method]
    if "full" in methods:
        reasons.append("method full trains the base itself")
    if recipe.lora.dora or recipe.lora.bias != "none":
        reasons.append("lora.dora and lora.bias train more than the two small matrices")
    ranks = ends(space, recipe, "lora.r") if "lora.r" in space.search else [recipe.lora.r]
    if max(ranks) > _SHARED_RANK:
        reasons.append(f"lora.r {max(ranks)} is above {_SHARED_RANK}, the largest rank of the shared base")
    if "adamw" not in recipe.optim.name:
        reasons.append(f"optim.name {recipe.optim.name} is not AdamW")
    if "data.fraction" in space.search and recipe.sequence.packing:
        reasons.append("data.fraction leaves other rows to be packed")
    if recipe.precision == "fp16":
        reasons.append("precision fp16 needs loss scaling")
    return reasons


def points(space: Space, recipe: Recipe) -> list[Point]:
    """The trials of a grid or random search, the first points first, no point twice. For tpe: draws like random."""
    wanted = space.budget.trials
    if space.searcher == "grid":
        found = grid(space, recipe)
        if wanted is None or wanted >= len(found):
            return found
        return random.Random(space.seed).sample(found, wanted)
    assert wanted is not None
    rng = random.Random(space.seed)
    found, seen = [], set()
    firsts: Iterator[Point | None] = itertools.chain((dict(f) for f in space.first), itertools.repeat(None))
    for first in itertools.islice(firsts, wanted * _DRAWS_PER_POINT):
        point = _draw(space, recipe, rng, first or {})
        key = json.dumps(point, sort_keys=True)
        if key not in seen:
            seen.add(key)
            found.append(point)
        if len(found) == wanted:
            break
    return found


def grid(space: Space, recipe: Recipe) -> list[Point]:
    """Every combination of the choices, in the order of the file; equal ones once."""
    found: dict[str, Point] = {}
    for values in itertools.product(*(d.values() or () for d in space.search.values())):
        point = complete(space, recipe, dict(zip(space.search, values, strict=True)))
        found.setdefault(json.dumps(point, sort_keys=True), point)
    return list(found.values())


def first_point(space: Space, recipe: Recipe, first: Mapping[str, Any]) -> Point:
    """A first point's own values, and the recipe's where they can be drawn; the rest is left to the searcher."""
    found = dict(first)
    for path in space.search:
        if path not in found and _inside(space, recipe, found, path, value_of(recipe, path)):
            found[path] = value_of(recipe, path)
    return {path: found[path] for path in space.search if path in found}


def label(point: Mapping[str, Any]) -> str:
    """'r=16 alpha=32 lr=0.0002': a point as a person reads it."""
    return " ".join(f"{path.rsplit('.', 1)[-1]}={value:.4g}" if isinstance(value, float) else
                    f"{path.rsplit('.', 1)[-1]}={value}" for path, value in point.items())  # fmt: skip


# Inside


def _applied(recipe: Recipe, point: Mapping[str, Any], place: str) -> Recipe:
    value = copy.deepcopy(recipe.to_dict())
    for path, new in point.items():
        target, parts = value, path.split(".")
        for part in parts[:-1]:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise RecipeError([f"{place}: {path} does not lead anywhere in a recipe."])
        target[parts[-1]] = list(new) if isinstance(new, tuple) else new
    return from_dict(value, lambda loc: place)


def _tried(recipe: Recipe, point: Point, place: str) -> Recipe | list[str]:
    try:
        return _applied(recipe, point, place)
    except RecipeError as error:
        return error.faults


def value_of(recipe: Recipe, path: str) -> Any:
    """The recipe's value at a dotted path; None where there is none."""
    value: Any = recipe.to_dict()
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _forbidden(path: str, recipe: Recipe) -> str | None:
    unserved = {"lora.modules_to_save": "adapter with modules_to_save", "lora.dora": "DoRA adapter",
                "lora.bias": "adapter with trained biases"}  # fmt: skip
    if path in unserved:
        otherwise = ", or train it with ft-ray run" if path == "lora.dora" else ""
        return f"vLLM serves no {unserved[path]}, so no sweep searches it: leave it out{otherwise}."
    if path == "data.fraction" and recipe.data.fraction < 1:
        # The rows are prepared at the recipe's own fraction, and trials would take theirs of those.
        own = f"{recipe.data.fraction:g}"
        return f"the recipe keeps {own} of the rows itself: leave data.fraction out of the recipe, or out of the space."
    if path in _SHARED or path in _ALONE or path.split(".")[0] in _ALONE:
        return None
    sections = {"name", "storage", "resources", "budget", "tracking", "serving", "promote", "evaluation", "checkpoint",
                "gradient_checkpointing", "data", "batch", "model"}  # fmt: skip
    if path.split(".")[0] in sections:
        near = nearest(path, _SHARED)
        return f"does not change what is learnt from the same examples, or changes which they are{near}."
    return None  # the recipe itself says what is wrong with it


def ends(space: Space, recipe: Recipe, path: str) -> list[Any]:
    """The extreme values (all, of a choice) that `path` can take."""
    distribution = space.search[path]
    if distribution.times is None:
        return distribution.ends()
    other = distribution.times
    bases = ends(space, recipe, other) if other in space.search else [value_of(recipe, other)]
    factors = distribution.choice or ()
    return [_product(base, factor) for base in (min(bases), max(bases)) for factor in factors]


def _product(base: float, factor: float) -> float:
    value = base * factor
    return int(value) if value == int(value) else value


def _served(path: str, value: Any, place: str) -> list[str]:
    if path == "lora.r" and value > VLLM_RANKS[-1]:
        return [f"{place}: lora.r: rank {value} is above {VLLM_RANKS[-1]}, the highest that vLLM serves: lower it."]
    return []


def _inside(space: Space, recipe: Recipe, first: Mapping[str, Any], path: str, value: Any) -> bool:
    distribution = space.search[path]
    if distribution.times is None:
        return distribution.holds(value)
    base = first.get(distribution.times, value_of(recipe, distribution.times))
    return any(math.isclose(float(base) * f, float(value)) for f in distribution.choice or ())


def _draw(space: Space, recipe: Recipe, rng: random.Random, first: Point) -> Point:
    """A point: the values of `first`; else, for a first point, the recipe's own where they can be drawn; else drawn."""
    raw: dict[str, Any] = {}
    known = first_point(space, recipe, first) if first else {}
    for path, distribution in space.search.items():
        drawn = distribution.draw(rng)
        if path in known:
            raw[path] = known[path]
        else:
            raw[path] = drawn if distribution.times is None else _Factor(drawn)
    return complete(space, recipe, raw, factors=False)


class _Factor(float):
    """A drawn factor, told apart from a value that is given."""


def complete(space: Space, recipe: Recipe, raw: Mapping[str, Any], *, factors: bool = True) -> Point:
    """A point from what a searcher drew: factors (`times`) multiplied out, in the order of the file."""
    point: Point = {p: v for p, v in raw.items() if space.search[p].times is None}
    # A factor may be of a path that is itself a factor of another: at most as many rounds as there are paths.
    waiting = [p for p in raw if space.search[p].times is not None]
    for _ in range(len(waiting) + 1):
        for path in list(waiting):
            other = space.search[path].times
            assert other is not None
            if other in waiting:
                continue
            if factors or isinstance(raw[path], _Factor):
                point[path] = _product(point.get(other, value_of(recipe, other)), float(raw[path]))
            else:
                point[path] = raw[path]
            waiting.remove(path)
    return {p: point[p] for p in space.search if p in point}


def _notes(space: Space, recipe: Recipe) -> list[str]:
    notes = []
    search = space.search
    if "lora.alpha" in search and "optim.lr" in search and len(search["lora.alpha"].ends()) > 1:
        notes.append(
            "lora.alpha and optim.lr trade off: the update is scaled by alpha/r, so a higher alpha acts much like a "
            "higher learning rate; fixing alpha as a multiple of r searches less for the same result"
        )
    if "lora.alpha" in search and "lora.r" in search and search["lora.alpha"].times is None:
        notes.append(
            "lora.alpha is drawn apart from lora.r, so alpha/r, which scales the update, varies with both; "
            "{times: lora.r, choice: [1, 2]} keeps it fixed"
        )
    drawn = points(space, recipe)
    if space.budget.trials is not None and len(drawn) < space.budget.trials:
        notes.append(f"the space holds {len(drawn)} different points, fewer than budget.trials {space.budget.trials}")
    scaled: dict[str, Point] = {}
    for point in drawn if space.searcher != "tpe" else ():  # its points are not known yet: these are only examples
        rank = point.get("lora.r", recipe.lora.r)
        alpha, lr = point.get("lora.alpha", recipe.lora.alpha), point.get("optim.lr", recipe.optim.lr)
        rslora = point.get("lora.rslora", recipe.lora.rslora)
        strength = alpha / (math.sqrt(rank) if rslora else rank) * lr
        rest = {k: v for k, v in point.items() if k not in ("lora.alpha", "optim.lr", "lora.rslora")}
        key = json.dumps([rest, f"{strength:.3g}"], sort_keys=True)
        twin = scaled.setdefault(key, point)
        if twin is not point:
            notes.append(f"points {label(twin)} and {label(point)} have the same alpha/r times learning rate")
    return notes[:8]


def _keys(loc: tuple[str | int, ...]) -> list[str]:
    if not loc:
        return list(Space.model_fields)
    owners: dict[str, type[Strict]] = {
        "search": Distribution, "scheduler": Scheduler, "budget": Budget, "confirm": Confirm,
    }  # fmt: skip
    owner = owners.get(str(loc[0]))
    return list(owner.model_fields) if owner else []
