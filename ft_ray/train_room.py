"""What a run asks of the cluster: workers, GPUs and CPUs; refused, or waited for where the cluster may grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.train import ScalingConfig

from ft_ray import gpu_table, ray_session
from ft_ray.errors import InputError, RecipeError, TrainingError
from ft_ray.recipe import Recipe

__all__ = ["in_words", "priced", "scaling", "use_gpu"]


def use_gpu(recipe: Recipe) -> bool:
    """Whether the workers get GPUs. Raises TrainingError where this machine has fewer than are asked for."""
    gpus, wanted = float(ray.cluster_resources().get("GPU", 0)), recipe.resources.gpus
    if isinstance(wanted, str):  # auto
        return gpus >= recipe.resources.workers
    if wanted * recipe.resources.workers > gpus and not ray_session.may_grow():
        raise TrainingError(
            f"resources ask for {recipe.resources.workers} x {wanted:g} GPUs and Ray has {gpus:g}: "
            "lower resources.workers or gpus, or use a larger cluster."
        )
    return wanted > 0


def scaling(recipe: Recipe, gpu: bool, say: Callable[[str], None]) -> ScalingConfig:
    """The workers and what each reserves, never the whole cluster beyond it.

    A cluster that was attached to may scale from zero or lose machines for a while, so more than it has now is
    asked for and waited for, as long as resources.wait says; `say` tells so. Raises TrainingError on a private Ray.
    """
    workers, wanted = recipe.resources.workers, recipe.resources.cpus
    cluster = ray.cluster_resources()
    have = int(cluster.get("CPU", 0))
    # A GPU rank feeds its GPU with a few cores; a CPU rank computes with all it can have.
    most = min(have // workers, 8) if gpu else have // workers
    cpus = max(1, most) if isinstance(wanted, str) else wanted
    resources: dict[str, float] = {"CPU": cpus}
    if gpu:
        resources["GPU"] = 1 if isinstance(recipe.resources.gpus, str) else recipe.resources.gpus
    if cpus * workers > have and not ray_session.may_grow():
        raise TrainingError(
            f"resources ask for {workers} x {cpus} CPUs and Ray has {have}: lower resources.workers or cpus."
        )
    config = ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker=resources)
    if any(amount * workers > cluster.get(kind, 0) for kind, amount in resources.items()):
        hint = "" if gpu or recipe.resources.gpus != "auto" else "; without a GPU, since resources.gpus is auto"
        say(
            f"the cluster has {have} CPUs and {cluster.get('GPU', 0):g} GPUs now: waiting up to "
            f"{recipe.resources.wait} (resources.wait) for {in_words(config)}{hint}"
        )
    return config


def in_words(config: ScalingConfig) -> str:
    asked: Any = config.resources_per_worker or {}
    each = " and ".join(f"{amount:g} {kind}{'s' if amount != 1 else ''}" for kind, amount in asked.items())
    return f"{config.num_workers} worker{'s' if config.num_workers != 1 else ''} of {each}"


def priced(recipe: Recipe, gpu: bool) -> Recipe:
    """The recipe with budget.usd_per_hour filled in from the table of GPUs where usd needs it."""
    if recipe.budget.usd is None or recipe.budget.usd_per_hour is not None:
        return recipe
    kinds = ray_session.accelerators()
    if not gpu or len(kinds) != 1:
        raise RecipeError(["budget.usd: no price is known for this machine: add budget.usd_per_hour."])
    try:
        price = gpu_table.find(kinds[0]).usd_per_hour * recipe.resources.workers
    except InputError as error:
        raise RecipeError([f"budget.usd: {error} Add budget.usd_per_hour."]) from error
    return recipe.model_copy(update={"budget": recipe.budget.model_copy(update={"usd_per_hour": price})})
