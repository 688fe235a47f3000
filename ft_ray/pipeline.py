"""The whole road, one function a stage: check, train, merge, evaluate, register, promote, run.

Every function takes a Recipe and returns the Manifest of its run folder. A stage whose record is done, and
whose inputs have not changed, is skipped, so `run` goes on where an earlier one stopped.
"""

from __future__ import annotations

import threading

from ft_ray import stages
from ft_ray.base_model import resolve
from ft_ray.chat import chat_of
from ft_ray.dataset import prepare
from ft_ray.early_checks import check_asked, check_made, check_settings
from ft_ray.errors import DataError, FtRayError
from ft_ray.manifest import Manifest
from ft_ray.preflight import DataReport
from ft_ray.preflight import check as preflight_check
from ft_ray.preflight import gate as preflight_gate
from ft_ray.recipe import Recipe
from ft_ray.run_folder import Listener

__all__ = ["check", "evaluate", "merge", "run", "train"]


def check(
    recipe: Recipe, *, strict: bool = False, review: str | None = None, on_event: Listener | None = None
) -> DataReport:
    """Reads, normalises, splits, tokenises and judges the data. Writes nothing to the run folder.

    `review` is a CSV of sampled rows for a person: written where it does not exist, else its marks are judged.

    Raises DataError for rows that cannot be used; with `strict`, GateRefused for warnings too.
    """
    check_settings(recipe)
    files = resolve(recipe.model)
    chat = chat_of(recipe.model, files.folder)
    report = preflight_check(recipe, prepare(recipe, chat, model_hash=files.hash), chat, review=review)
    if on_event:
        on_event({"kind": "data", "report": report.to_dict()})
    preflight_gate(report, strict)
    return report


def train(
    recipe: Recipe, *, fresh: bool = False, on_event: Listener | None = None, stop: threading.Event | None = None
) -> Manifest:
    """Checks the data and trains; resumes from the newest whole checkpoint of the run folder.

    Raises Interrupted when `stop` is set and BudgetSpent when the budget ends: with a checkpoint, to go on from.
    """
    with stages.opened(recipe, on_event, fresh) as (folder, ground):
        stages.check_data(folder, ground, strict=False)
        stages.train(folder, ground, stop)
        return folder.manifest


def merge(recipe: Recipe, *, on_event: Listener | None = None) -> Manifest:
    """Merges the trained adapter, proves it against the adapter, and commits `merged`. GateRefused on a gap."""
    tree = "model" if recipe.method == "full" else "adapter"
    check_made(recipe, tree, "train")  # before a run folder is made
    with stages.opened(recipe, on_event) as (folder, ground):
        stages.merge(folder, ground, tree)
        return folder.manifest


def evaluate(
    recipe: Recipe,
    *,
    split: str = "test",
    url: str | None = None,
    model: str | None = None,
    on_event: Listener | None = None,
) -> Manifest:
    """Measures the merged model, and the baselines that the recipe asks for, on `split`.

    `url` and `model` name an OpenAI-compatible endpoint to measure beside them, for example a priced API.
    """
    check_asked(split, url, model)
    check_made(recipe, "merged", "merge")  # before a run folder is made
    with stages.opened(recipe, on_event) as (folder, ground):
        if ground.prepared.counts.get(split, 0) == 0:
            raise DataError(
                f"the {split} split of {recipe.name} is empty: raise data.split.{split} or give data.{split}."
            )
        stages.evaluate(folder, ground, split, (url, model) if url is not None and model is not None else None)
        return folder.manifest


def run(
    recipe: Recipe,
    *,
    strict: bool = False,
    review: str | None = None,
    fresh: bool = False,
    on_event: Listener | None = None,
    stop: threading.Event | None = None,
) -> Manifest:
    """From data check to a registered candidate; to the champion with `promote: auto`. `review`: see `check`.

    Raises what the stage that stopped raises, with a report left in the run folder; call again to go on.
    """
    from ft_ray.promotion import promote
    from ft_ray.reporting import leave_report

    with stages.opened(recipe, on_event, fresh, registers=True) as (folder, ground):
        try:
            stages.check_data(folder, ground, strict, review)
            stages.train(folder, ground, stop)
            version = stages.finish(folder, ground)
        except FtRayError:  # a spent budget, Ctrl-C, a gate, a fault: what there is until then is worth reading
            leave_report(folder)
            raise
        manifest = folder.manifest
    if recipe.promote == "auto":
        wanted = f"{recipe.name}@{version}"
        try:
            promote(wanted, storage=recipe.storage, uri=recipe.tracking.uri, why="promote: auto", on_event=on_event)
        except FtRayError:
            leave_report(folder)
            raise
        manifest = Manifest.load(folder.store) or manifest
    leave_report(folder)
    return manifest

