"""`ft-ray sweep`: the command line of sweeps."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ft_ray.cli_output import AsJson, DryRun, Fresh, Out, Overrides, RecipeFile, Verbose, load, verb

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Adds the verb to the command."""
    app.command()(sweep)


@verb
def sweep(
    recipe: RecipeFile,
    overrides: Overrides = None,
    space: Annotated[str, typer.Option("--space", help="A file, or the name of a shipped space.")] = "lora_small",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted sweep.")] = False,
    fresh: Fresh = False,
    search_only: Annotated[bool, typer.Option("--search-only", help="Stop after the search and its pictures.")] = False,
    relabel: Annotated[bool, typer.Option(help="List training rows that stay hard in all good trials.")] = True,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Search LoRA settings with Ray Tune on one shared base; confirm, retrain, merge and register the winner."""
    out, loaded = Out(as_json, verbose), load(recipe, overrides)
    from ft_ray.search_space import label, planned

    if dry_run:
        value = planned(loaded, space)
        how = "share one frozen base" if value["shared"] else f"run one by one ({'; '.join(value['reasons'])})"
        points = [label(point) for point in value["points"]]
        if value["space"]["searcher"] == "tpe":
            how += "; tpe chooses each by the results before it, so these are only examples of the space"
        out.result(value, f"{len(points)} trials, which {how}:", *points, *(f"note: {n}" for n in value["notes"]))
        return
    from ft_ray import ray_session, search_space
    from ft_ray.manifest import Manifest
    from ft_ray.run_folder import check_sweepable
    from ft_ray.storage import Store
    from ft_ray.sweep_table import SweepTable
    from ft_ray.views import summary

    shown = SweepTable(out.err, out.progress)
    if not (search_only or fresh):  # before hours of searching
        store = Store(loaded.run_path)
        check_sweepable(Manifest.load(store), store)
    with out.progress.running(), shown.running(), ray_session.session(meanwhile=_load_libraries):
        from ft_ray import sweeping

        _, result = sweeping.sweep(
            loaded, space, resume=resume, fresh=fresh, registers=not search_only, on_event=shown
        )
        from ft_ray import sweep_finish

        value, table = result.model_dump(mode="json"), _table(result.model_dump())
        if search_only:
            analysis = sweep_finish.analyse(loaded, result, top=0, relabel=False, on_event=shown)
            found = {**value, "analysis": analysis.to_dict()}
            return out.result(found, table, *sweep_finish.said(analysis, loaded))
        confirm = search_space.load(space).space.confirm
        analysis, manifest = sweep_finish.promote_winner(
            loaded, result, top=confirm.top, seeds=confirm.seeds, relabel=relabel, on_event=shown
        )
    winner = search_space.apply(loaded, analysis.config)
    found = {"analysis": analysis.to_dict(), "manifest": f"{loaded.run_path}/manifest.json"}
    out.result({**value, **found}, table, *sweep_finish.said(analysis, loaded), *summary(winner, manifest))


def _load_libraries() -> None:
    """What a sweep needs in this process, which are seconds of imports: while Ray starts, a core has time for them."""
    from ft_ray import sweeping, tuning  # noqa: F401
    from ft_ray.lean_imports import load_transformers

    load_transformers()
    from transformers import AutoTokenizer  # noqa: F401 - the data's


def _table(result: dict[str, Any]) -> Any:
    from ft_ray.console import table
    from ft_ray.search_space import label

    ranked = sorted(result["trials"], key=lambda t: (t["best_loss"] is None, t["best_loss"]))
    rows = [
        [
            trial["id"], label(trial["config"]), trial["status"], str(trial["steps"]),
            "-" if trial["best_loss"] is None else f"{trial['best_loss']:.4f}", str(trial["best_step"] or "-"),
        ]
        for trial in ranked
    ]  # fmt: skip
    title = f"{result['name']}: {len(rows)} trials, {result['mean_k']:.1f} in a forward on average"
    return table(title, ["trial", "settings", "status", "steps", "validation loss", "at step"], rows)
