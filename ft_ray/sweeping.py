"""The sweep's road: data check, then the search. What follows from its result starts where this returns."""

from __future__ import annotations

import threading
from typing import Any

from ft_ray import search_space, stages
from ft_ray.errors import DataError, InputError, Interrupted
from ft_ray.manifest import Manifest, key_of
from ft_ray.recipe import Recipe
from ft_ray.run_folder import Listener, RunFolder
from ft_ray.search_space import LoadedSpace
from ft_ray.sweep_results import FOLDER, SweepResult, load

__all__ = ["search", "sweep"]


def sweep(
    recipe: Recipe,
    space: str,
    *,
    resume: bool = False,
    fresh: bool = False,
    registers: bool = False,
    on_event: Listener | None = None,
    stop: threading.Event | None = None,
) -> tuple[Manifest, SweepResult]:
    """Searches the space file `space` on the recipe. A finished sweep of the same is not run again.

    `registers`: its winner will be, so that a registry which not all nodes reach is refused before the search, and with
    a DataError data without validation rows, by which the winner would be confirmed.
    Raises Interrupted when it was stopped (`resume` goes on), InputError for an unfinished sweep without `resume`.
    """
    loaded = search_space.load(space)
    search_space.check(loaded, recipe)
    with stages.opened(recipe, on_event, fresh, registers) as (folder, ground):
        stages.check_data(folder, ground, strict=False)
        if registers and not ground.prepared.counts.get("validation"):
            raise DataError(
                f"the validation split of {recipe.name} is empty, so the sweep's winner could not be confirmed: raise "
                "data.split.validation, give data.validation, or stop after the search with --search-only."
            )
        result = search(folder, ground, loaded, resume=resume, stop=stop)
        return folder.manifest, result


def search(
    folder: RunFolder, ground: stages.Ground, loaded: LoadedSpace, *, resume: bool, stop: threading.Event | None
) -> SweepResult:
    """The stage 'sweep' of an opened run folder."""
    from ft_ray.tuning import sweep as tuned

    recipe, space = folder.recipe, loaded.space
    key = key_of(recipe.hash, space.model_dump(mode="json"), folder.manifest.lineage.data_hash, ground.files.hash)
    record = folder.manifest.stages.get("sweep")
    if record is not None and record.status != "done" and not resume and folder.store.exists(f"{FOLDER}/tune"):
        raise InputError(
            f"{folder.store.address(FOLDER)} holds an unfinished sweep: go on with --resume, or replace it with "
            "--fresh."
        )

    def work() -> tuple[dict[str, Any], dict[str, str]]:
        result = tuned(
            recipe, space, ground.prepared, ground.files, folder.store, on_event=folder.on_event, resume=resume,
            stop=stop,
        )  # fmt: skip
        if result.reason == "interrupted":
            raise Interrupted(f"the sweep of {recipe.name} stopped: the same command with --resume goes on from there.")
        ranked = sorted((t for t in result.trials if t.best_loss is not None), key=lambda t: t.best_loss or 0.0)
        metrics = {
            "trials": len(result.trials),
            "best": ranked[0].model_dump(mode="json", exclude={"history"}) if ranked else None,
            "mean_k": result.mean_k,
            "trained_tokens": result.trained_tokens,
            "shared": result.shared,
            "reason": result.reason,
        }
        return metrics, folder.hashes(f"{FOLDER}/sweep.json")

    folder.stage("sweep", key, work)
    return load(folder.store)
