"""Everything that a recipe reads from elsewhere, brought onto this machine: for runs without internet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ft_ray.recipe import Recipe, Source
from ft_ray.run_folder import Listener
from ft_ray.sources import locate

__all__ = ["Fetched", "fetch", "sources_of"]


@dataclass(frozen=True)
class Fetched:
    """What is here now: the model's folder and its hash, and the data's files or ids in the hub's cache."""

    model: Path
    hash: str
    data: list[str]


def sources_of(recipe: Recipe) -> list[Source]:
    """Every source that a run of the recipe reads, each once: the splits, the general data, and that of forgetting."""
    data, more = recipe.data, [recipe.evaluation.forgetting]
    if recipe.data.general is not None:
        more.insert(0, recipe.data.general.path)
    general = [Source.model_validate({"path": path}) for path in more if path is not None]
    return list(dict.fromkeys((*data.train, *data.validation, *data.test, *general)))


def fetch(recipe: Recipe, *, on_event: Listener | None = None) -> Fetched:
    """Fills the caches (FT_RAY_CACHE, HF_HOME) with the recipe's model and data; what is there already is kept.

    Raises ModelError and DataError, which name the licence page and the login command where a hub refuses.
    """
    from ft_ray.base_model import resolve  # torch: `sources_of` alone needs none

    tell = on_event or (lambda event: None)
    tell({"kind": "status", "message": f"fetching {recipe.model.id}"})
    files = resolve(recipe.model)
    tell({"kind": "status", "message": "fetching the data"})
    found = [file for source in sources_of(recipe) for file in locate(source)]
    return Fetched(files.folder, files.hash, [str(f.path) if f.dataset is None else f.name for f in found])
