"""What to change in a recipe for each diagnosis, as a patch of dotted keys, and the new recipe written out.

The rules are those of the guide's troubleshooting table, sized by the evidence: epochs end where the validation loss
was best, a rate far above the usual range goes back into it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from ft_ray.recipe import Recipe, from_dict
from ft_ray.run_folder import differences

__all__ = ["apply", "recipe_text", "remedy"]

Patch = dict[str, Any]
USUAL_RATE = {"full": (1e-5, 2e-5), "lora": (1e-4, 5e-4), "qlora": (1e-4, 5e-4)}
"""The guide's range of `optim.lr`. Small models bear more, so a rate above it is no fault by itself."""

GENERAL_SHARE = 0.15


def remedy(code: str, recipe: Recipe, evidence: Mapping[str, Any]) -> Patch:
    """The patch against `code`; {} where the recipe is not what has to change, or says so already."""
    makers = {
        "overfitting": _overfitting, "underfitting": _underfitting, "divergence": _divergence,
        "loss_spikes": _spikes, "learning_rate_edge": _spikes, "plateau": _plateau, "forgetting": _forgetting,
        "broken_format": _format, "dead_adapter": _dead, "constant_answers": _unlearnt, "empty_answers": _unlearnt,
    }  # fmt: skip
    patch = makers[code](recipe, evidence) if code in makers else {}
    return {key: value for key, value in patch.items() if _at(recipe.to_dict(), key) != value}


def _overfitting(recipe: Recipe, evidence: Mapping[str, Any]) -> Patch:
    patch: Patch = {"evaluation.early_stop": min(recipe.evaluation.early_stop or 2, 2)}
    best = evidence.get("best_epoch")
    if best and best < recipe.schedule.epochs:
        patch["schedule.epochs"] = max(1, math.ceil(best))
    if recipe.schedule.max_steps and evidence.get("best_step"):
        patch["schedule.max_steps"] = int(evidence["best_step"])
    if recipe.method != "full":
        patch["lora.dropout"] = max(0.1, recipe.lora.dropout)
    return patch


def _underfitting(recipe: Recipe, evidence: Mapping[str, Any]) -> Patch:
    if evidence.get("still_falling"):
        return _longer(recipe)
    low, high = USUAL_RATE[recipe.method]
    rate = low if recipe.optim.lr < low else recipe.optim.lr * 3
    patch: Patch = {"optim.lr": _round(min(rate, max(high, recipe.optim.lr * 3)))}
    if recipe.method != "full" and recipe.lora.targets == "attention":
        patch["lora.targets"] = "all-linear"
    return patch


def _longer(recipe: Recipe) -> Patch:
    patch: Patch = {"schedule.epochs": recipe.schedule.epochs * 2}
    if recipe.schedule.max_steps:  # the sooner of both ends a run
        patch["schedule.max_steps"] = recipe.schedule.max_steps * 2
    return patch


def _unlearnt(recipe: Recipe, evidence: Mapping[str, Any]) -> Patch:
    """One answer for everything, or none: the rate where it is out of its range, else a longer training."""
    low, high = USUAL_RATE[recipe.method]
    if recipe.optim.lr > 10 * high:
        return _divergence(recipe, evidence)
    return {"optim.lr": low} if recipe.optim.lr < low else _longer(recipe)


def _divergence(recipe: Recipe, evidence: Mapping[str, Any]) -> Patch:
    high = USUAL_RATE[recipe.method][1]
    # Ten times the usual rate is no slip of the finger: back to the range. Else a third of what it was.
    rate = high if recipe.optim.lr > 10 * high else recipe.optim.lr / 3
    return {"optim.lr": _round(rate), "schedule.warmup": max(0.1, recipe.schedule.warmup), "optim.max_grad_norm": 1.0}


def _spikes(recipe: Recipe, evidence: Mapping[str, Any]) -> Patch:
    if recipe.optim.lr > 10 * USUAL_RATE[recipe.method][1]:
        return _divergence(recipe, evidence)  # half of far too much is still too much
    return {
        "optim.lr": _round(recipe.optim.lr / 2),
        "schedule.warmup": max(0.06, recipe.schedule.warmup),
        "optim.max_grad_norm": min(recipe.optim.max_grad_norm or 1.0, 1.0),
    }


def _plateau(recipe: Recipe, evidence: Mapping[str, Any]) -> Patch:
    return {"evaluation.early_stop": min(recipe.evaluation.early_stop or 3, 3)}


def _forgetting(recipe: Recipe, evidence: Mapping[str, Any]) -> Patch:
    patch: Patch = {"optim.lr": _round(recipe.optim.lr / 2)}
    general = recipe.data.general
    if general is not None:
        more = min(0.2, round(general.share * 1.5, 3))
        return {"data.general.share": more} if more > general.share else patch
    if recipe.evaluation.forgetting:
        return {"data.general": {"path": recipe.evaluation.forgetting, "share": GENERAL_SHARE}}
    return patch


def _format(recipe: Recipe, evidence: Mapping[str, Any]) -> Patch:
    if evidence.get("cut_off"):
        return {"evaluation.max_new_tokens": recipe.evaluation.max_new_tokens * 2}
    if evidence.get("kind") == "json" and evidence.get("broken_training_rows"):
        return {"data.answers": "json"}
    return {}


def _dead(recipe: Recipe, evidence: Mapping[str, Any]) -> Patch:
    if evidence.get("dead") == evidence.get("modules"):
        low = USUAL_RATE[recipe.method][0]
        return {"optim.lr": _round(max(low, recipe.optim.lr * 10))}
    return {"lora.targets": "all-linear"}


def _round(rate: float) -> float:
    return float(f"{rate:.2g}")


def _at(value: Any, key: str) -> Any:
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def apply(recipe: Recipe, patches: Iterable[Mapping[str, Any]], name: str | None = None) -> Recipe:
    """The recipe with all patches; where two set one key, the more careful value (the smaller number) wins."""
    changes: Patch = {}
    for patch in patches:
        for key, value in patch.items():
            numbers = isinstance(value, int | float) and isinstance(changes.get(key), int | float)
            changes[key] = min(changes[key], value) if numbers else value
    values = copy.deepcopy(recipe.to_dict())
    for key, value in changes.items():
        *parents, last = key.split(".")
        target = values
        for part in parents:
            target[part] = target.get(part) or {}
            target = target[part]
        target[last] = value
    return from_dict(values | ({"name": name} if name else {}))


def recipe_text(old: Recipe, new: Recipe, why: Iterable[str]) -> str:
    """The new recipe as YAML, opened by what changed and why. Defaults are left out."""
    lines = [f"# {old.name} after ft-ray diagnose:", *(f"#   {sentence}" for sentence in why), "# Changed:"]
    for key, was, now in differences(old.to_dict(), new.to_dict()):
        lines.append(f"#   {key}: {was!r} -> {now!r}")
    values = new.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return "\n".join(lines) + "\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
