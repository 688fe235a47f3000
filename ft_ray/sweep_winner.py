"""From a sweep's record to its winner: chosen on validation, handed on as a plain PEFT adapter folder.

What only a sweep can tell is worked out here too, from one base loaded once: whether the best is better than the
recipe's own values (`confirmation`), and which training rows no good trial could learn (`hard_rows`).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from ft_ray import confirmation, search_space
from ft_ray.base_model import ModelFiles
from ft_ray.confirmation import DEFAULT, Confirmation
from ft_ray.errors import TrainingError
from ft_ray.manifest import key_of
from ft_ray.recipe import Recipe
from ft_ray.storage import Store
from ft_ray.sweep_after import CONFIRMED, Request, SettingRun
from ft_ray.sweep_after import work as after_work
from ft_ray.sweep_results import SweepResult, TrialResult
from ft_ray.train_control import Board
from ft_ray.train_room import share_of_gpu

__all__ = ["RELABEL", "TREE", "Finding", "adapter_tree", "choose", "examine", "good_trials", "unstopped"]

TREE = "sweep/winner"
"""The winning trial's adapter in the run folder, as peft and vLLM load it."""
RELABEL = "sweep/relabel.csv"
KEPT = "sweep/confirmed.json"
"""The examination as far as it has come: dozens of trainings, which the same command does not repeat."""
_GOOD = 4
_FILES = ("adapter_config.json", "adapter_model.safetensors")

OnEvent = Callable[[dict[str, Any]], None]


def _order(result: SweepResult) -> list[TrialResult]:
    """Trials that can win, best first. By their best checkpoint's validation loss, not by the last."""
    known = [t for t in result.trials if t.best_loss is not None and math.isfinite(t.best_loss) and t.checkpoint]
    return sorted(known, key=lambda t: (t.best_loss or 0.0, t.id))


def choose(result: SweepResult) -> TrialResult:
    """The trial with the best validation loss at its best checkpoint. Raises TrainingError when no trial has one."""
    order = _order(result)
    if not order:
        errors = sorted({t.error for t in result.trials if t.error})
        why = f" (first error: {errors[0]})" if errors else ""
        raise TrainingError(f"no trial of the sweep {result.name} has a checkpoint with a validation loss{why}.")
    return order[0]


def good_trials(result: SweepResult, most: int = _GOOD) -> list[TrialResult]:
    """The best quarter of the trials that took all their steps, two at least and `most` at most."""
    done = [t for t in _order(result) if t.status == "done"]
    return done[: max(2, min(most, len(result.trials) // 4))]


def unstopped(recipe: Recipe, result: SweepResult) -> dict[str, Any]:
    """What a recipe changes in to train as long as the sweep's trials did.

    On a shared base evaluation.early_stop ends no trial; trainings that it ended could not be compared with them.
    """
    return {"evaluation.early_stop": None} if result.shared and recipe.evaluation.early_stop is not None else {}


def adapter_tree(store: Store, trial: TrialResult, destination: str = TREE) -> dict[str, str]:
    """Commits the trial's best adapter alone, without training state, as a folder that peft and vLLM load.

    Returns its hashes. Raises TrainingError when the checkpoint is gone.
    """
    if trial.checkpoint is None or store.tree(trial.checkpoint) is None:
        raise TrainingError(f"the checkpoint of trial {trial.id} is not in {store.url}: run the sweep again.")
    source = store.local(trial.checkpoint)
    with store.stage(destination) as folder:
        for name in _FILES:
            shutil.copyfile(source / name, folder / name)
    return store.tree(destination) or {}


@dataclass(frozen=True)
class Finding:
    """What the examination of a finished sweep gave. `hard_rows` is None when it was not asked for."""

    confirmation: Confirmation | None
    hard_rows: int | None
    seconds: float


def examine(
    recipe: Recipe,
    result: SweepResult,
    files: ModelFiles,
    prepare: Callable[[Recipe], Any],
    store: Store,
    *,
    top: int,
    seeds: int,
    relabel: bool = True,
    on_event: OnEvent,
) -> Finding:
    """Confirms the `top` settings against the recipe's own with `seeds` fresh seeds, and writes the relabel file.

    All trainings share one base, in one Ray task on the device that the sweep used; 0 seeds or 0 top skip the
    confirmation. What an earlier call found on the same is not done again. `prepare` reads the data of a recipe. A
    sweep whose trials could not share a base is not examined, which is said. Ray must be initialised.
    """
    began = time.monotonic()
    if not result.shared:
        on_event({"kind": "status", "message": "these trials cannot share a base: the winner is not confirmed"})
        return Finding(None, None, 0.0)
    prepared = prepare(recipe)
    key = key_of(result.model_dump(mode="json"), recipe.hash, top, seeds, prepared.hashes, files.hash)
    kept = store.read_json(KEPT) if store.exists(KEPT) else {}
    kept = kept if kept.get("key") == key else {"key": key}

    def keep(**found: Any) -> None:
        kept.update(found)
        store.write_json(KEPT, kept)

    def listen(event: dict[str, Any]) -> None:
        if event["kind"] != CONFIRMED:
            on_event(event)
            return
        found = confirmation.confirm(event["runs"], groups=list(prepared.rows("validation")["group"]))
        keep(confirmation=found.to_dict())
        on_event({"kind": "status", "message": found.verdict})

    if "confirmation" in kept:
        on_event({"kind": "status", "message": f"confirmed before: {kept['confirmation']['verdict']}"})
    order = _order(result)[:top] if seeds and "confirmation" not in kept else []
    good: list[TrialResult] = []
    if relabel and not ("hard_rows" in kept and store.exists(RELABEL)):
        good = [t for t in good_trials(result) if store.tree(t.checkpoint or "") is not None]
        if len(good) < 2:
            why = "fewer than two of the trials whose checkpoints are kept took all their steps"
            on_event({"kind": "status", "message": f"no {RELABEL}: {why}; raise keep in the space"})
            good = []
    settings = _settings(recipe, result, order, prepare, on_event)
    request = Request(
        recipe=recipe,
        files=files,
        store=store.address(),
        settings=settings if len(settings) > 1 else [],
        seeds=seeds,
        good=[(t.id, search_space.apply(recipe, t.config), t.checkpoint or "") for t in good],
        prepared=prepared,
        relabel=RELABEL,
    )
    if request.settings or request.good:
        hard_rows = _remote(request, listen)
        if request.good:
            keep(hard_rows=hard_rows)
    found = kept.get("confirmation")
    confirmed = Confirmation.from_dict(found) if found is not None else None
    return Finding(confirmed, kept.get("hard_rows") if relabel else None, time.monotonic() - began)


def _settings(
    recipe: Recipe, result: SweepResult, order: list[TrialResult], prepare: Callable[[Recipe], Any], on_event: OnEvent
) -> list[SettingRun]:
    """The recipe's own values and those of the trials, equal ones once; none without trials."""
    settings: list[SettingRun] = []
    for trial in [None, *order] if order else []:
        config = trial.config if trial is not None else {}
        name = trial.id if trial is not None else DEFAULT
        changed = search_space.apply(recipe, {**config, **unstopped(recipe, result)})
        if any(setting.recipe == changed for setting in settings):
            on_event({"kind": "status", "message": f"{name} has the default's values: nothing to compare"})
            continue
        settings.append(SettingRun(name, changed, prepare(changed)))
    return settings


def _remote(request: Request, on_event: OnEvent) -> int | None:
    """Runs the request as one Ray task, and passes on what it says meanwhile."""
    gpus = float(ray.cluster_resources().get("GPU", 0))
    wanted = request.recipe.resources.gpus
    use_gpu = gpus >= 1 if isinstance(wanted, str) else wanted > 0
    most = max((float(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=1.0)
    if not isinstance(request.recipe.resources.cpus, str):
        most = min(most, request.recipe.resources.cpus)
    cpus = max(1, int(min(most, 8) if use_gpu else most))
    share = share_of_gpu(request.recipe) if use_gpu else 0
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    task: Any = ray.remote(num_cpus=cpus, num_gpus=share, max_retries=1)(after_work)
    answer = task.remote(request, board, cpus, use_gpu)
    try:
        while True:
            ready, _ = ray.wait([answer], timeout=0.5)
            for event in ray.get(board.take.remote(), timeout=60):
                on_event(event)
            if ready:
                try:
                    hard_rows: int | None = ray.get(answer)
                except ray.exceptions.RayTaskError as error:
                    cause = error.cause
                    raise (cause if isinstance(cause, Exception) else error) from error
                return hard_rows
    except BaseException:
        ray.cancel(answer, force=True)
        raise
    finally:
        ray.kill(board)
