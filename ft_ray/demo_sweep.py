"""The demo with a sweep before it: four settings on one shared base, and the best of them goes down the demo's road.

Nothing is canned here either: it writes a space and a shorter recipe beside the demo's data, then calls what
`ft-ray sweep` calls. Sized for 15 minutes on two cores: the trials are short, and the winner is not confirmed with
more seeds (`confirm: {top: 3, seeds: 3}` in the space does that, for three times as long).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ft_ray.manifest import Manifest
from ft_ray.recipe import Recipe
from ft_ray.run_folder import Listener

__all__ = ["lines", "prepare", "search"]

_SPACE = """\
# Four settings for the demo: enough to see trials share one base, and the better ones go on.
#
#   ft-ray sweep {folder}/recipe.yaml --space {folder}/space.yaml

search:
  lora.r: {{choice: [8, 16]}}
  lora.alpha: {{times: lora.r, choice: [2]}}
  optim.lr: {{loguniform: [3e-4, 2e-3]}}

first:
  - {{lora.r: 16, lora.alpha: 32, optim.lr: 1e-3}}      # the recipe's own values
searcher: random
scheduler: {{type: asha, reduction: 2, grace: 0.25}}
budget: {{trials: 4}}
confirm: {{top: 0}}
seed: {seed}
"""
_VALIDATION = 64
"""Rows that every trial is measured on at every rung: of the demo's 160, as many as two cores have time for."""
_CHANGES = {
    "max_steps: 90 ": "max_steps: 48 ",
    "# 720 of the 1,600 examples": "# 384 of the 1,600 examples: four trials take the time",
}


def prepare(recipe_file: Path, seed: int) -> Path:
    """Shortens the demo's recipe and its validation file, and writes the space beside them. Returns its path."""
    folder = recipe_file.parent
    text = recipe_file.read_text(encoding="utf-8")
    for old, new in _CHANGES.items():
        assert old in text, f"the demo's recipe has no {old!r}"
        text = text.replace(old, new)
    recipe_file.write_text(text, encoding="utf-8")
    rows = folder / "validation.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    rows.write_text("".join(lines[:_VALIDATION]), encoding="utf-8")
    space = folder / "space.yaml"
    space.write_text(_SPACE.format(folder=folder.as_posix(), seed=seed), encoding="utf-8")
    return space


def search(recipe: Recipe, space: Path, on_event: Listener) -> tuple[Recipe, Manifest, dict[str, Any]]:
    """Sweeps, and takes the winner to a registered candidate. Returns its recipe, its manifest, and what was found."""
    from ft_ray import search_space, sweep_finish, sweeping

    loaded = search_space.load(space)
    _, result = sweeping.sweep(recipe, str(space), on_event=on_event)
    analysis, manifest = sweep_finish.promote_winner(
        recipe, result, top=loaded.space.confirm.top, seeds=loaded.space.confirm.seeds, relabel=False,
        on_event=on_event,
    )  # fmt: skip
    winner = search_space.apply(recipe, analysis.config)
    found = {
        "trials": len(result.trials),
        "winner": analysis.chosen,
        "settings": analysis.config,
        "packed_loss": analysis.trial.best_loss,
        "retrained_loss": manifest.lineage.sweep["retrained_loss"],
        "mean_k": result.mean_k,
        "seconds": result.seconds,
        "page": f"{recipe.run_path}/{sweep_finish.PAGE}",
    }
    return winner, manifest, found


def lines(found: dict[str, Any]) -> list[str]:
    """What `search` found, for a person."""
    settings = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in found["settings"].items()]
    return [
        f"sweep: {found['trials']} trials, {found['mean_k']:.1f} in a forward on average, {found['seconds']:.0f} s; "
        f"best {found['winner']} ({', '.join(settings)}), validation loss {found['packed_loss']:.4f} packed, "
        f"{found['retrained_loss']:.4f} retrained alone",
        f"pictures of the sweep: {found['page']}",
    ]
