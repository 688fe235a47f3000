"""What a run asks of the cluster: workers, GPUs and CPUs; refused, or waited for where the cluster may grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.train import ScalingConfig

from ft_ray import gpu_table, ray_session
from ft_ray.errors import InputError, RecipeError, TrainingError
from ft_ray.recipe import Recipe

__all__ = ["cpus_each", "in_words", "priced", "scaling", "share_of_gpu", "use_gpu"]

_RESIZE_SECONDS = 60.0  # how often a run with resources.min_workers looks whether there is room for more workers
_MOST_CPUS = 8  # of a worker where resources.cpus is auto, on a cluster that others use as well


def use_gpu(recipe: Recipe) -> bool:
    """Whether the workers get GPUs. Raises TrainingError where this machine has fewer than are asked for."""
    gpus, wanted = float(ray.cluster_resources().get("GPU", 0)), recipe.resources.gpus
    if isinstance(wanted, str):  # auto
        return gpus >= _fewest(recipe)
    if wanted * recipe.resources.workers > gpus and not ray_session.may_grow():
        raise TrainingError(
            f"resources ask for {recipe.resources.workers} x {wanted:g} GPUs and Ray has {gpus:g}: "
            "lower resources.workers or gpus, or use a larger cluster."
        )
    return wanted > 0


def share_of_gpu(recipe: Recipe) -> float:
    """How much of its GPU one actor takes: all, or the part that the recipe gives a worker beside the job's driver."""
    wanted = recipe.resources.gpus
    return 1.0 if isinstance(wanted, str) else min(1.0, wanted)


def scaling(recipe: Recipe, gpu: bool, say: Callable[[str], None]) -> ScalingConfig:
    """The workers and what each reserves; nothing else of the cluster is held.

    A cluster that was attached to may scale from zero or lose machines for a while, so more than it has now is
    asked for and waited for, as long as resources.wait says; `say` tells so. Raises TrainingError on a private Ray.
    """
    workers, wanted = recipe.resources.workers, recipe.resources.cpus
    cluster = ray.cluster_resources()
    have = int(cluster.get("CPU", 0))
    # A GPU rank feeds its GPU with a few cores; a CPU rank computes with all it can have on a machine of its own.
    machines = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    most = _MOST_CPUS if gpu or ray_session.may_grow() else have
    cpus = cpus_each(workers, machines, most) if isinstance(wanted, str) else wanted
    resources: dict[str, float] = {"CPU": cpus}
    if gpu:
        resources["GPU"] = 1 if isinstance(recipe.resources.gpus, str) else recipe.resources.gpus
    if cpus * workers > have and not ray_session.may_grow():
        raise TrainingError(
            f"resources ask for {workers} x {cpus} CPUs and Ray has {have}: lower resources.workers or cpus."
        )
    fewest = _fewest(recipe)
    made: Any = ScalingConfig  # mypy sees Train V1's
    config: ScalingConfig = made(
        num_workers=(fewest, workers) if fewest < workers else workers,
        use_gpu=gpu,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
    )
    if any(amount * workers > cluster.get(kind, 0) for kind, amount in resources.items()):
        hint = "" if gpu or recipe.resources.gpus != "auto" else "; without a GPU, since resources.gpus is auto"
        say(
            f"the cluster has {have} CPUs and {cluster.get('GPU', 0):g} GPUs now: waiting up to "
            f"{recipe.resources.wait} (resources.wait) for {in_words(config)}{hint}"
        )
    return config


def _fewest(recipe: Recipe) -> int:
    """Workers to begin with. A private Ray has what its machine has: there is nothing to wait for."""
    least = recipe.resources.min_workers if ray_session.may_grow() else None
    return least or recipe.resources.workers


def cpus_each(workers: int, machines: list[int], most: int) -> int:
    """CPUs for each worker so that all fit on machines with so many, at least 1, no more than `most`."""
    for cpus in range(min(most, max(machines, default=1)), 1, -1):
        if sum(have // cpus for have in machines) >= workers:
            return cpus
    return 1


def in_words(config: ScalingConfig) -> str:
    asked: Any = config.resources_per_worker or {}
    each = " and ".join(f"{amount:g} {kind}{'s' if amount != 1 else ''}" for kind, amount in asked.items())
    number: Any = config.num_workers
    count = " to ".join(map(str, number if isinstance(number, tuple) else (number,)))
    return f"{count} worker{'s' if count != '1' else ''} of {each}"


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
