"""The Ray task after a sweep: one base, loaded once, for the confirmation and for the rows that stay hard.

The training stack is imported inside, by the worker alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import ray

from ft_ray.base_model import ModelFiles
from ft_ray.confirmation import SeedRun
from ft_ray.errors import DataError, TrainingError
from ft_ray.recipe import Recipe
from ft_ray.storage import Store

__all__ = ["CONFIRMED", "Request", "SettingRun", "seed_of", "work"]

CONFIRMED = "confirmed"
"""The kind of the event with the confirmation's runs: it comes before the training rows are measured, which may end."""
_SAID_SECONDS = 5.0


@dataclass(frozen=True)
class SettingRun:
    """A setting to confirm: its name, its recipe, and the data of that recipe."""

    name: str
    recipe: Recipe
    prepared: Any


@dataclass(frozen=True)
class Request:
    """`good`: (trial, its recipe, its checkpoint's path in the store) of the trials that look for hard rows."""

    recipe: Recipe
    files: ModelFiles
    store: str
    settings: list[SettingRun]
    seeds: int
    good: list[tuple[str, Recipe, str]]
    prepared: Any
    relabel: str


def seed_of(recipe: Recipe, number: int) -> int:
    """The seed of confirmation `number`: none that the sweep used, so that its luck is not counted again."""
    return recipe.seed + 10_007 * (number + 1)


def work(request: Request, board: Any, threads: int, use_gpu: bool) -> int | None:
    """Trains the settings with every seed, packed; then measures the training rows under the good trials.

    Tells the board of the runs by an event `CONFIRMED`; returns how many rows stay hard, None with fewer than two
    good trials.
    """
    import torch

    from ft_ray import model_loading, precision, sweep_base
    from ft_ray.placement import local_parts
    from ft_ray.shared_base import SharedBase

    def say(message: str) -> None:
        ray.get(board.post.remote({"kind": "status", "message": message}))

    if not use_gpu:
        torch.set_num_threads(threads)
    recipe = request.recipe
    device = "cuda:0" if use_gpu else "cpu"
    files, prepared = local_parts(recipe, request.files, request.prepared)
    settings = [replace(s, prepared=local_parts(s.recipe, files, s.prepared)[1]) for s in request.settings]
    request = replace(request, files=files, prepared=prepared, settings=settings)
    say(f"loading the model {request.files.source} on {device}")
    able, _ = precision.on_device(recipe, device)
    model = model_loading.load_model(request.files, able, device=device, quantized=recipe.method == "qlora")
    shared = SharedBase(model, gradient_checkpointing=recipe.gradient_checkpointing)
    recipes = [*(setting.recipe for setting in request.settings), *(good for _, good, _ in request.good)]
    places = sweep_base.fitting(recipes, files, shared.device)
    if request.settings:
        runs = _confirm(request, shared, places, say)
        ray.get(board.post.remote({"kind": CONFIRMED, "runs": runs}))
    hard = _relabel(request, shared, places, say) if request.good else None
    shared.close()
    return hard


def _confirm(request: Request, shared: Any, places: int, say: Any) -> dict[str, list[SeedRun]]:
    from ft_ray.packed_training import train_packed

    if not len(request.prepared.tokens("validation")):
        raise DataError("a confirmation needs validation rows: raise data.split.validation or give data.validation.")
    trainings = {}
    for setting in request.settings:
        for number in range(request.seeds):
            changed = setting.recipe.model_copy(update={"seed": seed_of(request.recipe, number)})
            trainings[f"{setting.name}#{number}"] = (changed, setting.prepared)
    say(f"confirming {len(request.settings)} settings with {request.seeds} seeds each, packed on one base")
    said = time.monotonic()

    def told(found: Any) -> None:
        nonlocal said
        if time.monotonic() - said > _SAID_SECONDS:
            said = time.monotonic()
            steps = [one.steps for one in found.values()]
            say(f"confirming: step {max(steps)}, {sum(steps)} steps of {len(steps)} trainings in all")

    found = train_packed(shared, trainings, places=places, on_step=told)
    failed = [f"{name}: {run.stopped}" for name, run in found.items() if not run.rows]
    names = [s.name for s in request.settings if not any(f.startswith(f"{s.name}#") for f in failed)]
    if request.settings[0].name not in names:
        raise TrainingError(f"the recipe's own values do not train ({failed[0]}): nothing can be compared with them.")
    for one in failed:
        say(f"left out of the comparison, {one}")
    return {n: [SeedRun(found[f"{n}#{i}"].rows) for i in range(request.seeds)] for n in names}


def _relabel(request: Request, shared: Any, places: int, say: Any) -> int:
    from ft_ray.hard_rows import attach_folder, hard_rows, row_losses, to_csv
    from ft_ray.packed_training import adapter_config

    store = Store(request.store)
    tokens = request.prepared.tokens("train", distinct=True)
    losses: dict[str, list[float]] = {trial: [] for trial, _, _ in request.good}
    said = time.monotonic()
    say(f"measuring {len(tokens)} training rows under {len(losses)} good trials")
    for first in range(0, len(request.good), places):
        together = request.good[first : first + places]
        for trial, recipe, checkpoint in together:
            attach_folder(shared, trial, store.local(checkpoint), adapter_config(recipe, 1))
        names = [trial for trial, _, _ in together]
        for done, found in row_losses(shared, names, tokens):
            for name, values in found.items():
                losses[name] += values
            if time.monotonic() - said > _SAID_SECONDS:
                said = time.monotonic()
                say(f"measuring the training rows, {done} of {len(tokens)}")
        for name in names:
            shared.detach(name)
    hard = hard_rows(losses)
    store.write(request.relabel, to_csv(hard, request.prepared.rows("train")).encode("utf-8"))
    return len(hard)
