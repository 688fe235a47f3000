"""Verbs about what this machine has: its runs, its cache, and what it can do."""

from __future__ import annotations

import typer

from ft_ray.cli_output import AsJson, DryRun, Out, Overrides, ReadsOnly, RecipeFile, Storage, Verbose, load, verb

__all__ = ["machine_app"]

machine_app = typer.Typer()


@machine_app.command()
@verb
def runs(
    storage: Storage = "runs", as_json: AsJson = False, dry_run: ReadsOnly = False, verbose: Verbose = False
) -> None:
    """List the runs in a storage folder."""
    from ft_ray.views import list_runs, runs_table

    out, value = Out(as_json, verbose), list_runs(storage)
    out.result({"runs": value}, runs_table(value))


@machine_app.command()
@verb
def fetch(
    recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False, dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Download the model and data of a recipe into the cache, for machines without internet."""
    out, loaded = Out(as_json, verbose), load(recipe, overrides)
    from ft_ray.fetching import fetch as work
    from ft_ray.fetching import sources_of

    if dry_run:
        wanted = [loaded.model.id, *(s.path for s in sources_of(loaded))]
        out.result({"would_fetch": wanted}, f"Would fetch {', '.join(wanted)}")
        return
    with out.progress.running():
        found = work(loaded, on_event=out.progress)
    value = {"model": str(found.model), "hash": found.hash, "data": found.data}
    out.result(value, f"Model in {found.model}", *(f"Data in {place}" for place in found.data))


@machine_app.command()
@verb
def doctor(
    storage: Storage = "runs", as_json: AsJson = False, dry_run: ReadsOnly = False, verbose: Verbose = False
) -> None:
    """Say what this machine can do, what is missing, and the command that mends it."""
    from ft_ray.doctor import diagnose, rendered

    out = Out(as_json, verbose)
    out.progress({"kind": "status", "message": "looking at this machine, and trying torch, bitsandbytes and vllm"})
    with out.progress.running():
        checks = diagnose(storage)
    out.result({"checks": [c.to_dict() for c in checks]}, rendered(checks))
