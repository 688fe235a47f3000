"""Out of memory, retried by a ladder of changes that compute the same, each said and recorded.

The rungs, mildest first: half the rows a forward pass (the global batch kept by accumulation), again and again;
gradient checkpointing; for whole models on several ranks optimizer states, then weights, in host memory. The loss is
computed in tiles already (`sft`), so there is no rung for it. Sums in another order round otherwise: losses agree to
float precision, not bit for bit. A checkpoint does not depend on any of these, so each try goes on from the newest.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ft_ray import objective
from ft_ray.errors import OutOfMemory
from ft_ray.recipe import Recipe

__all__ = ["climb", "rungs"]

T = TypeVar("T")
_log = logging.getLogger("ft_ray")


def rungs(recipe: Recipe, device: str) -> Iterator[tuple[str, Recipe]]:
    """(what changes, the changed recipe) from the recipe's own setting on; each rung holds those before it."""
    rows = objective.plan_batch(recipe, device).per_device
    workers = recipe.resources.workers
    sizes = range(recipe.resources.min_workers or workers, workers + 1)
    local = math.gcd(*(recipe.batch.global_ // count for count in sizes))  # what divides each one's share
    while rows > 1:
        smaller = max(d for d in range(1, rows) if local % d == 0 and d <= max(1, rows // 2))
        changed = f"out of memory: batch.per_device {rows} -> {smaller}, batch.global {recipe.batch.global_} kept"
        rows = smaller
        recipe = recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"per_device": rows})})
        yield changed, recipe
    if not recipe.gradient_checkpointing:
        recipe = recipe.model_copy(update={"gradient_checkpointing": True})
        yield "out of memory: gradient_checkpointing on", recipe
    sharding = recipe.resources.sharding if recipe.method == "full" and recipe.resources.workers > 1 else "ddp"
    for key, what, stages in (
        ("offload_optimizer", "optimizer states", ("auto", "zero3", "zero2", "zero1")),
        ("offload_parameters", "weights", ("auto", "zero3")),
    ):
        if sharding in stages and not getattr(recipe.resources, key):
            recipe = recipe.model_copy(update={"resources": recipe.resources.model_copy(update={key: True})})
            yield f"out of memory: {what} offloaded to host memory", recipe


def climb(
    recipe: Recipe, run: Callable[[Recipe], T], *, device: str, on_event: Callable[[dict[str, Any]], None]
) -> tuple[T, list[str]]:
    """Calls `run` with the recipe, and after each OutOfMemory with the next rung: (its result, the changes made).

    Raises the last OutOfMemory when no rung is left; its message then says what was tried.
    """
    changes: list[str] = []
    ladder = rungs(recipe, device)
    while True:
        try:
            return run(recipe), changes
        except OutOfMemory as error:
            step = next(ladder, None)
            if step is None:
                if not changes:
                    raise
                tried = "; ".join(c.removeprefix("out of memory: ") for c in changes)
                raise OutOfMemory(
                    f"training ran out of memory at every setting that computes the same ({tried}): "
                    "lower sequence.max_length, use method qlora, or a larger GPU (ft-ray plan names those that fit)."
                ) from error
        changed, recipe = step
        changes.append(changed)
        _log.warning("%s; trying again", changed)
        on_event({"kind": "status", "message": f"{changed}; trying again"})
