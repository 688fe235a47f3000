"""What can be refused in a moment, before anything heavy is loaded or made: for the stages, and for dry runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ft_ray import lm_harness, nvme
from ft_ray import metrics as measures
from ft_ray.errors import InputError, MissingPackageError, RecipeError
from ft_ray.fetching import sources_of
from ft_ray.lean_imports import load_transformers
from ft_ray.planning import config_of
from ft_ray.recipe import Recipe, place_of
from ft_ray.recipe_sections import METRICS
from ft_ray.sources import locate, of_hub
from ft_ray.storage import Store

if TYPE_CHECKING:
    from ft_ray.base_model import ModelFiles

__all__ = ["check_asked", "check_data", "check_inputs", "check_made", "check_settings", "check_targets"]


def check_settings(recipe: Recipe) -> None:
    """What would only fail hours later: the metric, the schema, the general data, benchmarks. RecipeError with all."""
    asked = recipe.evaluation
    checks: dict[str, Callable[[], object]] = {
        "evaluation.metric": lambda: measures.metric(asked.metric),
        "evaluation.schema": lambda: measures.metric(METRICS[0], schema=asked.schema_),
        "evaluation.forgetting": lambda: _is_there(asked.forgetting),
        "deepspeed": lambda: _nvme_can_be_reached(recipe),
        "evaluation.lm_eval": lambda: None if asked.lm_eval is None else lm_harness.check(asked.lm_eval),
    }
    faults = []
    for key, check in checks.items():
        try:
            check()
        except InputError as error:
            place = place_of(recipe, key)
            faults.append((error, f"{place}: {error}" if place else str(error)))
    if len(faults) == 1 and isinstance(faults[0][0], MissingPackageError):
        raise faults[0][0]
    if faults:
        raise RecipeError([said for _, said in faults])


def _is_there(path: str | None) -> None:
    if path is not None and "://" not in path and not Path(path).exists():
        raise InputError(f"evaluation.forgetting: {path} does not exist: give a data file, or leave the key out.")


def _nvme_can_be_reached(recipe: Recipe) -> None:
    """Of workers on this machine only: what others have, they say themselves."""
    if nvme.path_of(recipe.deepspeed) is None or os.environ.get("RAY_ADDRESS", "local") not in ("", "local"):
        return
    lacking = nvme.missing()
    if lacking:
        raise InputError(f"offload to NVMe needs DeepSpeed's async_io, which cannot be built here: {lacking}.")


def check_inputs(recipe: Recipe) -> None:
    """`check_settings`, and that the model and local data are there. Of a hub model config.json alone is fetched."""
    check_settings(recipe)
    if not recipe.model.id.startswith("package:"):  # unpacked by the run itself
        config_of(recipe.model)
    check_data(recipe)


def check_data(recipe: Recipe) -> None:
    """Raises DataError for a local data file that is not there; reads none."""
    for source in sources_of(recipe):
        if not of_hub(source) and "://" not in source.path and not Path(source.path).expanduser().exists():
            locate(source)  # says what is wrong with the path


def check_targets(files: ModelFiles, recipe: Recipe) -> None:
    """Raises ModelError for names in `lora.targets` that the base has no linear module for, before anything starts.

    The modules are built on the meta device: 2 seconds of imports for those who name modules, no weights read.
    """
    asked = recipe.lora.targets
    if recipe.method == "full" or asked in ("all-linear", "attention"):
        return
    load_transformers()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ft_ray import lora

    code = recipe.model.trust_remote_code
    config = AutoConfig.from_pretrained(files.folder, trust_remote_code=code, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=code)
    lora.targets(model, asked)


def check_made(recipe: Recipe, tree: str, verb: str) -> dict[str, str]:
    """The hashes of a tree that `ft-ray verb` commits to the run folder. Raises InputError where there is none."""
    store = Store(recipe.run_path)
    found = store.tree(tree)
    if found is None:
        raise InputError(f"{store.address(tree)} is not there: run ft-ray {verb} first.")
    return found


def check_asked(split: str, url: str | None = None, model: str | None = None) -> None:
    """Raises InputError for what `evaluate` cannot measure."""
    if (url is None) != (model is None):
        raise InputError("an endpoint to compare with needs both its url (ending in /v1) and its model's name.")
    if split not in ("train", "validation", "test"):
        raise InputError(f"split {split!r} cannot be evaluated: use train, validation or test.")
