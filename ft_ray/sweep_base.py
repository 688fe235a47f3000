"""The frozen base of a sweep's engine, as it is loaded: how many adapters fit beside it, what their files say of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from ft_ray import objective, search_space, sweep_steps
from ft_ray.base_model import ModelFiles
from ft_ray.capacity import adapter_slot_bytes
from ft_ray.chat import chat_of
from ft_ray.errors import TrainingError
from ft_ray.model_loading import load_model
from ft_ray.model_shape import read as read_shape
from ft_ray.objective import BatchPlan
from ft_ray.placement import local_parts
from ft_ray.precision import on_device
from ft_ray.recipe import Recipe
from ft_ray.shared_base import SharedBase, padded
from ft_ray.step_memory import Setting
from ft_ray.sweep_data import SweepRows
from ft_ray.sweep_lease import EngineSetup

__all__ = ["SweepBase", "batch_of", "fitting", "load"]

_MOST_SLOTS = 64
_NARROW = 256
"""Below this width of the base, products are too small to share: a second thread gained nothing (64 wide), and where
another process has its core, every product waits for it: 90 instead of 11 s for 16 trials of 200 steps."""
_MEASURED = 4
"""How many times a training batch's rows a forward of a measurement takes, on a GPU and for a narrow base: it keeps
nothing for a backward, and what a small forward costs there is its calls."""


@dataclasses.dataclass(frozen=True)
class SweepBase:
    """A loaded base. `setup` has the files and rows as this node sees them; `slots`: adapters that fit at once.

    `most` is the steps of the longest trial that the space can ask for; a forward of a measurement takes `measured`
    times a training batch's rows; `identity` is what an adapter's ft_ray.json tells of the base that it belongs to.
    """

    setup: EngineSetup
    rows: SweepRows
    shared: SharedBase
    slots: int
    most: int
    measured: int
    identity: dict[str, Any]


def load(setup: EngineSetup) -> SweepBase:
    """Loads the base and the rows. Raises ModelError, StorageError; TrainingError where no training row is left."""
    recipe = setup.recipe
    if setup.seen is not None:
        setup.seen.check()
    files, prepared = local_parts(recipe, setup.files, setup.prepared)
    setup = dataclasses.replace(setup, files=files, prepared=prepared)
    narrow = read_shape(files.config).hidden < _NARROW
    if setup.device == "cpu":
        torch.set_num_threads(1 if narrow else setup.threads)
    quantized = recipe.method == "qlora"
    rows = SweepRows(setup.prepared, recipe)
    if not len(rows.of(recipe)):
        raise TrainingError("there are no training rows left after the data check: add rows or raise max_length.")
    model = load_model(setup.files, on_device(recipe, setup.device)[0], device=setup.device, quantized=quantized)
    shared = SharedBase(model, gradient_checkpointing=recipe.gradient_checkpointing)
    chat = chat_of(recipe.model, setup.files.folder)
    identity = {
        "name": recipe.name,
        "method": recipe.method,
        "template_hash": chat.template_hash,
        "eos_ids": sorted(chat.eos_ids),
        "base": {"source": setup.files.source, "revision": setup.files.revision, "hash": setup.files.hash},
        "quantization": recipe.quantization.model_dump() if quantized else None,
    }
    slots = setup.slots or _fitting(setup, shared.device)
    most = sweep_steps.longest(setup.space, recipe, rows)
    measured = 1 if setup.device == "cpu" and not narrow else _MEASURED
    return SweepBase(setup, rows, shared, slots, most, measured, identity)


def batch_of(recipe: Recipe, device: str) -> BatchPlan:
    """The batch of one trial: its engine is one worker, whatever the recipe asks for."""
    alone = recipe.model_copy(update={"resources": recipe.resources.model_copy(update={"workers": 1})})
    return objective.plan_batch(alone, device)


def _fitting(setup: EngineSetup, device: torch.device) -> int:
    """Adapters of the largest that the space can draw that memory holds beside the base, by the estimator."""
    recipe, space = setup.recipe, setup.space
    ends = {path: search_space.ends(space, recipe, path) for path in ("lora.r", "lora.targets") if path in space.search}
    ranks, targets = ends.get("lora.r", [recipe.lora.r]), ends.get("lora.targets", [recipe.lora.targets])
    drawn = [{"r": max(ranks), "targets": one} for one in targets]
    every = [recipe.model_copy(update={"lora": recipe.lora.model_copy(update=one)}) for one in drawn]
    return fitting(every, setup.files, device, space.engines if isinstance(space.engines, int) else 1)


def fitting(recipes: Iterable[Recipe], files: ModelFiles, device: torch.device, engines: int = 1) -> int:
    """Adapters of the largest of these recipes that memory holds beside the loaded base, by the estimator."""
    shape, sizes = read_shape(files.config), []
    for recipe in recipes:
        padded_to = recipe.lora.model_copy(update={"r": padded(recipe.lora.r)})
        rows = batch_of(recipe, device.type).per_device
        setting = Setting.of(recipe.model_copy(update={"lora": padded_to}), world=1, rows=rows).but(fused_kernels=False)
        sizes.append(adapter_slot_bytes(shape, setting))
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available // engines
    return max(1, min(_MOST_SLOTS, int(free * 0.9) // max(sizes)))
