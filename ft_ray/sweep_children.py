"""A sweep in the experiment trackers: each trial a run of its own below the sweep's, written by the driver alone."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

from ft_ray import search_space
from ft_ray.errors import FtRayError, RecipeError
from ft_ray.recipe import Recipe
from ft_ray.storage import Store
from ft_ray.tracking import Tracker

__all__ = ["Children"]

logger = logging.getLogger("ft_ray")


class Children:
    """Trackers of a sweep's trials, opened when the first report comes. Nothing is tracked where the recipe says so."""

    def __init__(self, recipe: Recipe, store: Store) -> None:
        self._recipe, self._store = recipe, store
        self._open: dict[str, Tracker] = {}
        self._parent: Tracker | None = None
        if recipe.tracking.to:
            self._parent = Tracker(recipe.model_copy(update={"name": f"{recipe.name}-sweep"[:63]}), store)

    def report(self, trial: str, point: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Takes one Tune report."""
        if self._parent is None or "step" not in result:
            return
        if trial not in self._open:
            try:
                own = search_space.apply(self._recipe, point)
            except RecipeError:
                return
            own = own.model_copy(update={"name": f"{self._recipe.name[:40]}-{trial}"})
            try:
                self._open[trial] = Tracker(own, self._store.sub(f"tracking/{trial}"))
            except FtRayError as error:  # the sweep's own run could be opened; a sweep is not lost for its diary
                logger.warning("%s The sweep goes on without its trials in the tracker.", error)
                self._parent = None
                return
            if self._parent.run_id:
                self._open[trial].set_tags({"mlflow.parentRunId": self._parent.run_id, "ft_ray.trial": trial})
        # What a searcher is told of a loss that is not finite would hide every other curve of the experiment.
        validation = None if result.get("diverged") else result.get("validation_loss")
        if result.get("diverged"):
            self._open[trial].set_tags({"ft_ray.diverged_at_step": str(result["step"])})
        values = {"validation/loss": validation, "train/loss": result.get("train_loss")}
        self._open[trial].log_metrics({k: v for k, v in values.items() if v is not None}, int(result["step"]))

    def close(self, states: Mapping[str, str]) -> None:
        """`states` are Tune's: TERMINATED, ERROR; any other trial is to go on."""
        names = {"TERMINATED": "done", "ERROR": "failed"}
        for trial, tracker in self._open.items():
            with contextlib.suppress(FtRayError):
                tracker.finish(names.get(states.get(trial, ""), "stopped"))
        if self._parent is not None:
            with contextlib.suppress(FtRayError):
                self._parent.finish("done" if set(states.values()) <= set(names) else "stopped")
