"""An adapter made elsewhere (Axolotl, Unsloth, TRL, LLaMA-Factory) brought to every gate of this project."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ft_ray import merging
from ft_ray.base_model import resolve
from ft_ray.early_checks import check_data, check_settings
from ft_ray.errors import InputError
from ft_ray.manifest import Manifest, key_of
from ft_ray.recipe import Recipe, from_dict, overridden
from ft_ray.run_folder import Listener, RunFolder, earlier
from ft_ray.stages import check_and_finish
from ft_ray.storage import Store, hash_tree

__all__ = ["import_adapter"]


def import_adapter(
    adapter: str,
    base: str,
    *,
    data: list[str],
    name: str | None = None,
    storage: str = "runs",
    quantized: bool = False,
    overrides: Iterable[str] = (),
    dry_run: bool = False,
    on_event: Listener | None = None,
) -> tuple[Recipe, Manifest]:
    """Commits the adapter as a trained run, then merges, proves, evaluates and registers it.

    `data` holds examples: the merge is proved on their validation split, the figures come from their test split.
    `quantized`: it was trained on a 4-bit NF4 base (QLoRA), so that both bases are tried for the merge. An
    adapter's own tokenizer and chat template go with it. `overrides`: `key=value` of the recipe that this makes.
    Raises ModelError when the adapter does not fit the base.
    """
    folder = Path(adapter)
    settings = merging.read_adapter_config(folder)
    if not data:
        raise InputError("ft-ray import needs --data: the merge and the model are measured on your own examples.")
    recipe = from_dict(
        {
            "name": name or re.sub(r"[^a-zA-Z0-9._-]", "-", folder.resolve().name),
            "model": {"id": base},
            "data": {"train": [{"path": path} for path in data], "split": {"validation": 0.2, "test": 0.7}},
            "method": "qlora" if quantized else "lora",
            "lora": {"r": settings["r"], "alpha": settings["lora_alpha"], "dropout": 0.0},
            "storage": storage,
        }
    )
    recipe = overridden(recipe, overrides)
    check_settings(recipe)  # all this before a run folder is made
    check_data(recipe)
    files = resolve(recipe.model)
    fits = merging.check_fits(folder, files)
    if dry_run:
        return recipe, earlier(recipe, Store(recipe.run_path)) or Manifest.start(recipe)

    def listen(event: dict[str, Any]) -> None:
        if on_event:
            on_event(event)

    with RunFolder.opened(recipe, listen) as run:

        def work() -> tuple[dict[str, Any], dict[str, str]]:
            with run.store.stage("adapter") as staged:
                found = merging.import_adapter(folder, files, staged, fits=fits)
            return {"imported_from": str(folder), **found}, {"adapter": key_of(run.store.tree("adapter"))}

        run.stage("train", key_of(hash_tree(folder), files.hash), work)
        check_and_finish(run)
        return recipe, run.manifest
