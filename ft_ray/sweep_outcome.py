"""From Tune's trials and what storage holds of them to a SweepResult; and which checkpoints stay."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from ray.tune.experiment import Trial

from ft_ray import sweep_states
from ft_ray.errors import StorageError
from ft_ray.storage import Store
from ft_ray.sweep_results import Point, TrialResult

__all__ = ["error_of", "history_of", "retain", "trial_result"]

logger = logging.getLogger("ft_ray")


def history_of(store: Store, trial: str) -> dict[str, Any]:
    """What storage knows of a trial: history, tokens, stopped, total. Empty where it was never measured."""
    for step in sweep_states.steps(store, trial):
        try:
            return dict(store.read_json(f"{sweep_states.folder(trial, step)}/state.json"))
        except StorageError as error:
            logger.debug("%s", error)
    alone = f"{sweep_states.TRIALS}/{trial}/{sweep_states.OUTCOME}"
    return dict(store.read_json(alone)) if store.exists(alone) else {}


def trial_result(
    store: Store, folder: str, trial: str, point: Mapping[str, Any], status: str, error: str, *, cut: bool
) -> TrialResult:
    """One trial's record. `status` is Tune's; `cut` says that the sweep ended before the trial did."""
    record = history_of(store, trial)
    history = record.get("history", [])
    step = history[-1]["step"] if history else 0
    total = record.get("total") or record.get("steps") or 0
    stopped = record.get("stopped") or ""
    best = sweep_states.best_of(history)
    ours = "failed"
    if status != "ERROR":
        error = stopped
        if stopped or cut or status != "TERMINATED":
            ours = "stopped"
        else:
            ours = "done" if record.get("tree") or (step and step >= total and "key" in record) else "pruned"
    checkpoint = None
    if best is not None:
        for relative in (sweep_states.folder(trial, best[0]), f"{sweep_states.TRIALS}/{trial}/{record.get('tree')}"):
            if store.tree(relative) is not None:
                checkpoint = f"{folder}/{relative}"
                break
    return TrialResult(
        id=trial,
        config=dict(point),
        status=ours,
        steps=step,
        tokens=record.get("tokens", 0),
        history=[Point(**{k: p[k] for k in ("step", "validation_loss", "train_loss", "tokens")}) for p in history],
        best_step=best[0] if best else None,
        best_loss=best[1] if best else None,
        checkpoint=checkpoint,
        error=error,
    )


def retain(store: Store, folder: str, trials: Iterable[TrialResult], keep: int) -> list[TrialResult]:
    """Removes every state but the best one of the `keep` best trials. Returns the trials as they are then."""
    found = list(trials)
    ranked = sorted((t for t in found if t.best_loss is not None), key=lambda t: (t.best_loss, t.id))
    kept = {t.id for t in ranked[:keep]}
    sweep_states.keep_only(
        store, (t.checkpoint.removeprefix(f"{folder}/") for t in found if t.id in kept and t.checkpoint)
    )
    return [t if t.id in kept else t.model_copy(update={"checkpoint": None}) for t in found]


def error_of(trial: Trial) -> str:
    """The last line of what a trial failed with."""
    try:
        error = trial.get_error()
    except Exception as unreadable:  # it is only for the record
        return f"no error was recorded ({unreadable})"
    return " ".join(str(getattr(error, "cause", None) or error).strip().splitlines()[-1:])[:500]
