"""The three looks back at a run, as the command line and `ft_ray` call them: diagnose, report, export."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ft_ray import corrections, remedies, report, report_page
from ft_ray.diagnose import Diagnosis
from ft_ray.errors import InputError
from ft_ray.manifest import Manifest
from ft_ray.promotion import run_store
from ft_ray.recipe import Recipe
from ft_ray.run_folder import RunFolder, read_recipe
from ft_ray.storage import Store

__all__ = [
    "accept_corrections", "diagnose", "export", "leave_report", "patched", "write_corrections", "write_report",
]  # fmt: skip

_log = logging.getLogger("ft_ray")


def diagnose(ref: str, *, storage: str = "runs") -> list[Diagnosis]:
    """What went wrong in a run (folder, name or NAME@VERSION), worst first. Raises InputError."""
    return report.gather(run_store(ref, storage, None)).found


def patched(
    ref: str, *, storage: str = "runs", out: str | None = None, dry_run: bool = False
) -> tuple[Path, Recipe, list[Diagnosis]]:
    """Writes the run's recipe with every proposed change; returns its path, the recipe and the diagnoses.

    The new recipe has a name of its own, NAME-2 and so on: a run folder holds one recipe. Raises InputError when
    there is nothing to change, or `out` exists.
    """
    run = report.gather(run_store(ref, storage, None))
    patches = [d.patch for d in run.found if d.patch]
    if not patches:
        raise InputError(f"{run.recipe.name} has no finding that the recipe could mend: there is nothing to apply.")
    name = _next_name(run.recipe)
    new = remedies.apply(run.recipe, patches, name)
    target = Path(out or f"{name}.yaml")
    if target.exists():
        raise InputError(f"{target} exists: choose another --output.")
    sentences = [d.sentence for d in run.found if d.patch]
    if not dry_run:
        target.write_text(remedies.recipe_text(run.recipe, new, sentences), encoding="utf-8")
    return target, new, run.found


def _next_name(recipe: Recipe) -> str:
    stem, _, number = recipe.name.rpartition("-")
    stem, at = (stem, int(number)) if stem and number.isdigit() else (recipe.name, 1)
    root = Store(recipe.storage)
    while root.exists(f"{stem}-{(at := at + 1)}"):
        pass
    return f"{stem}-{at}"


def write_corrections(ref: str, out: str, *, storage: str = "runs", split: str = "train") -> int:
    """Writes the run's wrong answers on `split` for a person's review; returns their number. Raises InputError.

    Of training rows, because the split by prompt puts any other row back where it came from. With a test set in files
    of its own, rows taken from it and trained on make it no test any more.
    """
    store = run_store(ref, storage, None)
    run = report.gather(store)
    file = "predictions.jsonl" if split == "test" else f"predictions_{split}.jsonl"
    if not store.exists(file):
        raise InputError(
            f"{run.recipe.name} has no answers on {split}: run ft-ray evaluate RECIPE --split {split} first."
        )
    rows = [json.loads(line) for line in store.read(file).splitlines() if line.strip()]
    stage = run.stage("evaluate" if split == "test" else f"evaluate_{split}")
    return corrections.write(out, corrections.wrong_answers(rows, stage.get("primary", "exact_match")))


accept_corrections = corrections.accepted


def export(ref: str, to: str, *, storage: str = "runs", **settings: Any) -> dict[str, Any]:
    """`export.export` of a run (folder, name or NAME@VERSION)."""
    from ft_ray.export import export as work  # loads transformers

    store = run_store(ref, storage, None)
    manifest = Manifest.load(store)
    if manifest is None:
        raise InputError(f"{store.url} has no manifest.json: it is not a run folder.")
    return work(read_recipe(store), manifest, store, to, **settings)


def write_report(
    ref: str, *, storage: str = "runs", form: str = "html", api: tuple[float, float] | None = None
) -> tuple[str, str]:
    """(text of the report, its address): written into the run folder as report.html or report.md."""
    store = _folder(ref, storage)
    text = report_text(store, form, api)
    store.write(f"report.{form}", text.encode())
    return text, store.address(f"report.{form}")


def _folder(ref: str, storage: str) -> Store:
    """The folder of a run, or of a sweep that no run has followed."""
    for place in (ref, f"{storage.rstrip('/')}/{ref}"):
        store = Store(place)
        if store.exists("sweep/sweep.json") and not store.exists("manifest.json"):
            return store
    return run_store(ref, storage, None)


def report_text(store: Store, form: str = "html", api: tuple[float, float] | None = None) -> str:
    if form not in ("html", "md"):
        raise InputError(f"a report is html or md, not {form!r}.")
    run: Any = report.gather(store)
    return (report_page.html if form == "html" else report_page.markdown)(run, api=api)


def leave_report(folder: RunFolder) -> None:
    """report.html of a run as it stands, at its end. A page that cannot be made is no reason to lose a run."""
    try:
        folder.store.write("report.html", report_text(folder.store).encode())
    except Exception as error:
        _log.warning("report.html was not written (%s): ft-ray report %s tells more.", error, folder.store.url)
        return
    folder.status(f"report: {folder.store.address('report.html')}")
