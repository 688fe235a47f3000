"""After a sweep: confirm, show, retrain the winner alone, and take it down the ordinary road to a candidate.

The winner is trained again by the ordinary path, with its values as a recipe. It must come out as the packed trainings
did, within the noise of seeds: a gate, because what is promoted is this training and not the trial.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable
from typing import Any

from ft_ray import confirmation, pipeline, ray_session, search_space, sweep_charts, sweep_winner
from ft_ray.base_model import ModelFiles, resolve
from ft_ray.chat import Chat, chat_of
from ft_ray.confirmation import DEFAULT, Confirmation
from ft_ray.data_curve import FRACTION, DataCurve, data_curve
from ft_ray.dataset import prepare
from ft_ray.errors import GateRefused, TrainingError
from ft_ray.manifest import Manifest, key_of
from ft_ray.prepared_data import Prepared
from ft_ray.recipe import Recipe
from ft_ray.run_folder import Listener, RunFolder, check_sweepable
from ft_ray.storage import Store
from ft_ray.sweep_results import SweepResult, TrialResult
from ft_ray.sweep_winner import Finding

__all__ = ["Analysis", "analyse", "promote_winner", "retrain", "said"]

ANALYSIS = "sweep/analysis.json"
PAGE = "sweep/report.html"


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What a finished sweep says. `config` are the values to go on with: the winner's, or none for the default's.

    Those of `sweep_winner.unstopped` with them.
    """

    trial: TrialResult
    config: dict[str, Any]
    chosen: str
    confirmation: Confirmation | None
    curve: DataCurve | None
    hard_rows: int | None
    pictures: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "best_trial": self.trial.id,
            "chosen": self.chosen,
            "config": self.config,
            "best_loss": self.trial.best_loss,
            "confirmation": self.confirmation.to_dict() if self.confirmation else None,
            "data_curve": dataclasses.asdict(self.curve) if self.curve else None,
            "hard_rows": self.hard_rows,
            "relabel": sweep_winner.RELABEL if self.hard_rows is not None else None,
            "pictures": list(self.pictures),
        }


def _data(recipe: Recipe) -> tuple[ModelFiles, Chat, Callable[[Recipe], Prepared]]:
    files = resolve(recipe.model)
    chat = chat_of(recipe.model, files.folder)
    return files, chat, lambda changed: prepare(changed, chat, model_hash=files.hash)


def analyse(
    recipe: Recipe,
    result: SweepResult,
    *,
    top: int = 3,
    seeds: int = 3,
    relabel: bool = True,
    on_event: Listener,
) -> Analysis:
    """Chooses, confirms (`top` settings, `seeds` seeds each; 0: not at all), and writes curve, pictures and page.

    Writes to the run folder's `sweep/`: winner (a PEFT adapter folder; none of a fully tuned model), analysis.json,
    report.html, *.png and, with `relabel`, relabel.csv. Raises TrainingError when no trial has a checkpoint.
    """
    store = Store(recipe.run_path)
    trial = sweep_winner.choose(result)
    files, _, prepared = _data(recipe)
    finding = Finding(None, None, 0.0)
    if (top and seeds) or relabel:
        with ray_session.session():
            finding = sweep_winner.examine(
                recipe, result, files, prepared, store, top=top, seeds=seeds, relabel=relabel, on_event=on_event
            )
    confirmed = finding.confirmation
    chosen = confirmed.winner if confirmed is not None else trial.id
    if chosen not in (DEFAULT, trial.id):
        trial = next(t for t in result.trials if t.id == chosen)
    if search_space.apply(recipe, trial.config).method != "full":
        sweep_winner.adapter_tree(store, trial)
    curve = None
    if any(FRACTION in t.config for t in result.trials):
        curve = data_curve(result, len(prepared(recipe).tokens("train")))
    on_event({"kind": "status", "message": "drawing the sweep"})
    files_drawn, page = sweep_charts.pictures(result, curve=curve, confirmed=confirmed)
    for name, content in files_drawn.items():
        store.write(f"sweep/{name}", content)
    store.write(PAGE, page.encode("utf-8"))
    config = {**({} if chosen == DEFAULT else trial.config), **sweep_winner.unstopped(recipe, result)}
    drawn = tuple(f"sweep/{name}" for name in files_drawn)
    analysis = Analysis(trial, config, chosen, confirmed, curve, finding.hard_rows, (PAGE, *drawn))
    store.write_json(ANALYSIS, analysis.to_dict())
    return analysis


def retrain(
    recipe: Recipe,
    result: SweepResult,
    analysis: Analysis,
    *,
    on_event: Listener,
    stop: threading.Event | None = None,
) -> Manifest:
    """Trains the chosen values alone, by the ordinary path, and checks the result against the packed trainings.

    Raises GateRefused when its validation loss is not what seeds explain; nothing is merged or registered then.
    """
    winner = search_space.apply(recipe, analysis.config)
    confirmed = analysis.confirmation.verdict if analysis.confirmation else "not confirmed with other seeds"
    with RunFolder.opened(recipe, on_event) as folder:
        check_sweepable(folder.manifest, folder.store)
        folder.manifest.lineage.sweep = {
            "recipe_hash": recipe.hash,
            "winner_hash": winner.hash,
            "trial": analysis.chosen,
            "config": analysis.config,
            "trials": len(result.trials),
            "seed": result.seed,
            "space_hash": key_of(result.space),
            "record_hash": key_of(result.model_dump(mode="json")),
            "confirmation": confirmed,
        }
        folder.manifest.save(folder.store)
    manifest = pipeline.train(winner, on_event=on_event, stop=stop)
    store = Store(winner.run_path)
    loss = manifest.stages["train"].metrics.get("validation_loss")
    known = _known_losses(analysis)
    if loss is None or not known:
        raise TrainingError(
            f"the retrained winner of {recipe.name} has no validation loss to compare: raise data.split.validation."
        )
    same, low, high = confirmation.match(float(loss), known)
    manifest.lineage.sweep |= {
        "packed_losses": known, "retrained_loss": loss, "expected": [low, high], "matches": same,
    }  # fmt: skip
    manifest.save(store)
    if not same:
        raise GateRefused(
            f"the winner of {recipe.name} retrained alone has validation loss {loss:.4f}, outside [{low:.4f}, "
            f"{high:.4f}] that {len(known)} packed training{'s' if len(known) > 1 else ''} lead to expect: do not "
            "promote it; look at the data's order and at evaluation.every first."
        )
    message = f"retrained alone: validation loss {loss:.4f}, expected within [{low:.4f}, {high:.4f}]"
    on_event({"kind": "status", "message": message})
    return manifest


def promote_winner(
    recipe: Recipe,
    result: SweepResult,
    *,
    top: int = 3,
    seeds: int = 3,
    relabel: bool = True,
    on_event: Listener,
    stop: threading.Event | None = None,
) -> tuple[Analysis, Manifest]:
    """The whole way from a finished sweep to a registered candidate, as `pipeline.run` ends.

    Merge, parity gate, test set once, registry; promoted where the recipe says `promote: auto`.
    """
    with ray_session.session():
        analysis = analyse(recipe, result, top=top, seeds=seeds, relabel=relabel, on_event=on_event)
        retrain(recipe, result, analysis, on_event=on_event, stop=stop)
        winner = search_space.apply(recipe, analysis.config)
        return analysis, pipeline.run(winner, on_event=on_event, stop=stop)


def _known_losses(analysis: Analysis) -> list[float]:
    if analysis.confirmation is not None:
        return list(analysis.confirmation.losses_of(analysis.chosen))
    loss = analysis.trial.best_loss
    return [loss] if loss is not None and math.isfinite(loss) else []


def said(analysis: Analysis, recipe: Recipe) -> list[str]:
    """What the analysis found, for a person."""
    lines = [analysis.confirmation.verdict] if analysis.confirmation else []
    if analysis.curve is not None:
        lines.append(analysis.curve.advice)
    if analysis.hard_rows:
        where = f"{recipe.run_path}/{sweep_winner.RELABEL}"
        lines.append(f"{analysis.hard_rows} training rows stay hard in all good trials; look at their answers: {where}")
    lines.append(f"pictures: {recipe.run_path}/{PAGE}")
    return lines
