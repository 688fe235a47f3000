"""The three looks back at a run, as the command line and `ft_ray` call them: diagnose, report, export."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ft_ray import corrections, remedies, report, report_markdown, report_page
from ft_ray.diagnosis import Diagnosis
from ft_ray.errors import InputError
from ft_ray.manifest import Manifest
from ft_ray.promotion import run_store
from ft_ray.recipe import Recipe
from ft_ray.run_folder import RunFolder, read_recipe
from ft_ray.storage import Store
from ft_ray.sweep_diagnosis import is_of_space, widened

__all__ = [
    "Patched", "accept_corrections", "diagnose", "export", "leave_report", "patched", "sound", "write_corrections",
    "write_report",
]  # fmt: skip

_log = logging.getLogger("ft_ray")


def diagnose(ref: str, *, storage: str = "runs") -> list[Diagnosis]:
    """What went wrong in a run or sweep (folder, name or NAME@VERSION), worst first. Raises InputError."""
    return report.gather(_folder(ref, storage)).found


def sound(ref: str, *, storage: str = "runs") -> str:
    """What may be said of a run in which nothing was found."""
    return report.sound(report.gather(_folder(ref, storage)))


def patched(ref: str, *, storage: str = "runs", out: str | None = None, dry_run: bool = False) -> Patched:
    """Writes the run's recipe, or its sweep's space, or both, with every proposed change.

    The new recipe has a name of its own, NAME-2 and so on: a run folder holds one recipe. Raises InputError when
    there is nothing to change, or a file to write exists.
    """
    run = report.gather(_folder(ref, storage))
    of_recipe = [d for d in run.found if d.patch and not is_of_space(d.patch)]
    of_space = [d for d in run.found if d.patch and is_of_space(d.patch)]
    if not of_recipe and not of_space:
        raise InputError(f"{run.recipe.name} has no finding that the recipe could mend: there is nothing to apply.")
    name = _next_name(run.recipe)
    new = remedies.apply(run.recipe, [d.patch for d in of_recipe], name)
    target, space = (Path(out or f"{name}.yaml") if of_recipe else None), None
    texts: dict[Path, str] = {}
    if target is not None:
        texts[target] = remedies.recipe_text(run.recipe, new, [d.sentence for d in of_recipe])
    if of_space:
        space = Path(f"{name}.space.yaml" if of_recipe or not out else out)
        texts[space] = _space_text(run, of_space)
    for path, text in texts.items():
        if path.exists():
            raise InputError(f"{path} exists: choose another --output, or remove it.")
        if not dry_run:
            path.write_text(text, encoding="utf-8")
    return Patched(target, new if of_recipe else run.recipe, space, run.found)


@dataclass(frozen=True)
class Patched:
    """What `patched` wrote: the recipe's file and the search space's, each None where nothing of it changes."""

    target: Path | None
    recipe: Recipe
    space: Path | None
    found: list[Diagnosis]


def _space_text(run: report.Run, found: list[Diagnosis]) -> str:
    """The sweep's space with wider or narrower ranges, as YAML that `--space` reads; opened by what changed and why."""
    assert run.sweep is not None
    old = report.space_of(run.sweep)
    changes = {key: value for d in found for key, value in d.patch.items()}
    lines = [f"# The space of {run.recipe.name} after ft-ray diagnose:", *(f"#   {d.sentence}" for d in found)]
    lines += [f"#   {key}: {value}" for key, value in changes.items()]
    return "\n".join(lines) + "\n" + yaml.safe_dump(widened(old, changes), sort_keys=False, allow_unicode=True)


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
    """`exporting.export` of a run (folder, name or NAME@VERSION)."""
    from ft_ray.exporting import export as work  # loads transformers

    store = run_store(ref, storage, None)
    manifest = Manifest.load(store)
    if manifest is None:
        raise InputError(f"{store.url} has no manifest.json: it is not a run folder.")
    return work(read_recipe(store), manifest, store, to, **settings)


def write_report(
    ref: str,
    *,
    storage: str = "runs",
    form: str = "html",
    api: tuple[float, float] | None = None,
    dry_run: bool = False,
) -> tuple[str, str]:
    """(text of the report, its address): written into the run folder as report.html or report.md."""
    store = _folder(ref, storage)
    text = report_text(store, form, api)
    if not dry_run:
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
    return (report_page.html if form == "html" else report_markdown.markdown)(run, api=api)


def leave_report(folder: RunFolder) -> None:
    """report.html of a run as it stands, at its end. A page that cannot be made is no reason to lose a run."""
    try:
        folder.store.write("report.html", report_text(folder.store).encode())
    except Exception as error:
        _log.warning("report.html was not written (%s): ft-ray report %s tells more.", error, folder.store.url)
        return
    folder.status(f"report: {folder.store.address('report.html')}")
