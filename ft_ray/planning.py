"""`plan` for a recipe: finds the model's config.json, and the token counts when the data was read before.

Neither weights nor torch nor ray are needed; of a hub model only config.json is fetched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ft_ray import hub
from ft_ray.errors import ModelError
from ft_ray.estimate import Plan, TokenStats
from ft_ray.estimate import plan as estimate
from ft_ray.recipe import Model, Recipe
from ft_ray.storage import Store

__all__ = ["config_of", "plan", "tokens_of"]


def plan(recipe: Recipe, *, gpu: str | None = None, count: int | None = None, price: float | None = None) -> Plan:
    """Memory, time and cost of `recipe`. Time and cost need token counts: they come from the run's data check.

    Raises ModelError when there is no config.json, InputError for an unknown GPU.
    """
    return estimate(recipe, config_of(recipe.model), gpu=gpu, count=count, price=price, tokens=tokens_of(recipe))


def config_of(model: Model) -> dict[str, Any]:
    """The model's config.json. Raises ModelError."""
    if model.id.startswith("package:"):
        from ft_ray.base_model import resolve  # unpacks the demo model; the one case that loads torch

        return dict(resolve(model).config)
    folder = Path(model.id).expanduser()
    if "://" in model.id:
        return dict(Store(model.id).read_json("config.json"))
    if not folder.is_dir():
        folder = hub.fetch_config(model.id, model.revision)
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model.id}: config.json cannot be read ({error}): give a folder saved by transformers."
        ) from error


def tokens_of(recipe: Recipe) -> TokenStats | None:
    """Token counts from the run folder's data check, None before there is one."""
    store = Store(recipe.run_path)
    if not store.exists("data_check.json"):
        return None
    stats = store.read_json("data_check.json").get("stats", {})
    known = stats.get("train_tokens")
    return TokenStats.model_validate(known) if known else None
