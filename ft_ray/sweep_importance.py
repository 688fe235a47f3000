"""Which settings moved the loss: functional ANOVA over a sweep's trials, with how far to believe it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

from ft_ray.sweep_results import SweepResult, TrialResult

__all__ = ["Importance", "comparable", "importance"]

_FORESTS = 8
_PER_SETTING = 10  # trials a setting below which the shares are read as a hint only


@dataclass(frozen=True)
class Importance:
    """`shares`: setting -> (mean, least, most) share of the loss's variance over 8 forests. `step`: where compared."""

    shares: dict[str, tuple[float, float, float]]
    trials: int
    step: int | None
    caveat: str


def comparable(result: SweepResult) -> tuple[list[tuple[TrialResult, float]], int | None]:
    """(trial, loss) pairs that may be compared, and the step they are compared at; None: each at its best.

    A scheduler stops the bad ones early, so best losses compare short runs with long ones. Then all are compared at
    the last step that every trial reported.
    """
    ran = [t for t in result.trials if t.status in ("done", "pruned") and t.history]
    known = [t for t in ran if t.best_loss is not None and math.isfinite(t.best_loss)]
    if all(t.status == "done" for t in known):
        return [(t, t.best_loss) for t in known if t.best_loss is not None], None
    tables = [{p.step: p.validation_loss for p in t.history if p.validation_loss is not None} for t in known]
    shared = set(tables[0]).intersection(*tables[1:]) if tables else set()
    if not shared:
        return [(t, t.best_loss) for t in known if t.best_loss is not None], None
    step = max(shared)
    return [(t, losses[step]) for t, losses in zip(known, tables, strict=True)], step


def importance(result: SweepResult) -> Importance | None:
    """Share of the loss's variance that each setting explains alone or with others (fANOVA, as Optuna computes it).

    Hutter et al. 2014, proceedings.mlr.press/v32/hutter14.html. None with fewer than 4 trials or nothing that varies.
    """
    pairs, step = comparable(result)
    values: dict[str, list[Any]] = {}
    for key in sorted({k for trial, _ in pairs for k in trial.config}):
        found = [trial.config.get(key) for trial, _ in pairs]
        if len({str(v) for v in found}) > 1:
            values[key] = found
    if len(pairs) < 4 or not values:
        return None
    losses = [loss for _, loss in pairs]
    if max(losses) == min(losses):
        return None
    forests = [_forest(values, losses, seed) for seed in range(_FORESTS)]
    shares = {}
    for key in values:
        each = [forest[key] for forest in forests]
        shares[key] = (math.fsum(each) / _FORESTS, min(each), max(each))
    ordered = dict(sorted(shares.items(), key=lambda item: -item[1][0]))
    return Importance(ordered, len(pairs), step, _caveat(len(pairs), len(values), step))


def _forest(values: dict[str, list[Any]], losses: list[float], seed: int) -> dict[str, float]:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.trial import create_trial

    distributions: dict[str, BaseDistribution] = {}
    columns: dict[str, list[Any]] = {}
    for key, column in values.items():
        numbers = [v for v in column if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) == len(column):
            low, high = float(min(numbers)), float(max(numbers))
            distributions[key] = FloatDistribution(low, high, log=low > 0 and high / low >= 4)
            columns[key] = [float(v) for v in column]
        else:
            names = [str(v) for v in column]
            distributions[key] = CategoricalDistribution(sorted(set(names)))
            columns[key] = names
    shown = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study()
        for i, loss in enumerate(losses):
            params = {key: column[i] for key, column in columns.items()}
            study.add_trial(create_trial(params=params, distributions=distributions, value=loss))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
            return dict(optuna.importance.get_param_importances(study, evaluator=evaluator, params=list(values)))
    finally:
        optuna.logging.set_verbosity(shown)


def _caveat(trials: int, settings: int, step: int | None) -> str:
    said = f"From {trials} trials" + (f" at step {step}, the last that all of them reached" if step else "")
    if trials < _PER_SETTING * settings:
        said += f": few for {settings} settings (about {_PER_SETTING * settings} would do), so read this as a hint"
    return said + "; it holds within the ranges searched, and says nothing about which value is better."
