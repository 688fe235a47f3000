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
    space: Annotated[str, typer.Option("--space", help="A search space, e.g. tune_spaces/lora.yaml.")] = "lora_small",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted sweep.")] = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Search LoRA settings with Ray Tune; trials share one frozen base where the space allows it."""
    out, loaded = Out(as_json, verbose), load(recipe, overrides)
    from ft_ray.search_space import label, planned

    if dry_run:
        value = planned(loaded, space)
        how = "share one frozen base" if value["shared"] else f"run one by one ({'; '.join(value['reasons'])})"
        points = [label(point) for point in value["points"]]
        out.result(value, f"{len(points)} trials, which {how}:", *points, *(f"note: {n}" for n in value["notes"]))
        return
    from ft_ray import sweeping

    with out.progress.running():
        _, result = sweeping.sweep(loaded, space, resume=resume, fresh=fresh, on_event=out.progress)
    out.result(result.model_dump(mode="json"), _table(result.model_dump()))


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
