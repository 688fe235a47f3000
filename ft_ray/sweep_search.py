"""The parts of a sweep that Ray Tune calls: searcher, scheduler, stopper and callback.

Tune pickles them into the experiment and revives copies on restore, so none holds anything of this process: they find
the running sweep in `Watch.current`. One sweep runs at a time in a process.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Protocol

import optuna
from ray.air._internal import usage
from ray.tune import Callback, Stopper
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from ft_ray import search_space, sweep_steps
from ft_ray.ray_session import may_grow
from ft_ray.recipe import Recipe
from ft_ray.search_space import Space
from ft_ray.sweep_trial import loss_of

__all__ = [
    "Asha", "BudgetStopper", "Median", "StopSweep", "TpeSearch", "Watch", "scheduler", "trial_name",
    "trial_variables", "uncounted",
]  # fmt: skip

_AMONG = 8
"""How many draws a space's first points are mixed with, where the budget has so many."""


@contextlib.contextmanager
def trial_variables() -> Iterator[None]:
    """What Tune puts of its process's environment into the runtime_env of trials, inside.

    Its AWS keys never: Ray logs and shows a runtime_env, and a cluster's nodes have credentials of their own. On a
    private Ray nothing: its processes inherit this one's environment, and a trial without a runtime_env may take a
    process that Ray has ready; with one, each is started anew, after a word with Ray's agent for them.
    """
    carried, fixed = class_cache.ENV_VARS_TO_PROPAGATE, class_cache.DEFAULT_ENV_VARS
    before = set(carried), dict(fixed)
    carried.difference_update({name for name in carried if name.startswith("AWS_")})
    if not may_grow():
        carried.clear()
        fixed.clear()
    try:
        yield
    finally:
        carried.update(before[0])
        fixed.update(before[1])


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Inside, Tune does not count its callbacks by kind for Ray's usage statistics, which no sweep sends.

    To count them it imports every tracker that is installed: MLflow and W&B, 1.6 s of a core before the first trial.
    """
    usual = usage.tag_callbacks
    usage.tag_callbacks = lambda callbacks: False
    try:
        yield
    finally:
        usage.tag_callbacks = usual


class StopSweep(Exception):
    """Raised inside Tune's loop to leave it: trials stay unfinished in its snapshot, and can be resumed."""


class _Sweep(Protocol):
    """What the parts here need of the running sweep."""

    def controller(self, controller: Any) -> None: ...
    def changed(self, trials: Iterable[Trial]) -> None: ...
    def turn(self) -> None: ...
    def spent(self) -> bool: ...
    def reported(self, trial: Trial, result: Mapping[str, Any]) -> None: ...
    def histories(self) -> Mapping[str, Iterable[Mapping[str, Any]]]: ...


class Watch(Callback):
    """Tells the running sweep what Tune does, in Tune's own thread."""

    current: ClassVar[_Sweep | None] = None

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if Watch.current is not None:
            Watch.current.changed(trials)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if Watch.current is not None:
            Watch.current.reported(trial, result)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if Watch.current is not None:
            Watch.current.turn()


class BudgetStopper(Stopper):
    """Ends the sweep when its tokens or hours are spent."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return Watch.current is not None and Watch.current.spent()


class _Seen:
    """Mixed into a scheduler: hands Tune's controller to the running sweep."""

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        if Watch.current is not None:
            Watch.current.controller(tune_controller)
        return super().choose_trial_to_run(tune_controller)  # type: ignore[misc]


class _Fifo(_Seen, FIFOScheduler):
    pass


Histories = Mapping[str, Iterable[Mapping[str, Any]]]
"""What trials have reported, by their ids."""


class _Recalling(_Seen):
    """Mixed into a scheduler that compares: it is told what an earlier session measured, since Tune restores trials,
    not what its schedulers knew of them.
    """

    _recalled = False

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if not self._recalled and Watch.current is not None:
            self._recalled = True
            self.recall(Watch.current.histories(), tune_controller.get_trials())
        return str(super().on_trial_result(tune_controller, trial, result))  # type: ignore[misc]

    def recall(self, histories: Histories, trials: Iterable[Trial]) -> None:
        """Takes earlier reports in, without stopping anybody for them."""


class Median(_Recalling, MedianStoppingRule):
    """The median stopping rule."""

    def recall(self, histories: Histories, trials: Iterable[Trial]) -> None:
        """Puts earlier reports before those of this session, without stopping anybody for them."""
        for trial in trials:
            known = [{**point, str(self._metric): loss_of(point)} for point in histories.get(trial.trial_id, ())]
            if known:
                self._results[trial][:0] = known

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        said = super().on_trial_result(tune_controller, trial, result)
        known = self._results.get(trial, [])
        steps = [point[self._time_attr] for point in known]
        if steps and steps.count(steps[-1]) > 1:  # it had been saved in the earlier session, and Tune not told
            del known[steps.index(steps[-1])]
        return said


class Asha(_Recalling, AsyncHyperBandScheduler):
    """ASHA (arXiv:1810.05934)."""

    def recall(self, histories: Histories, trials: Iterable[Trial]) -> None:
        """Puts earlier reports into the rungs, without stopping anybody for them."""
        for name, history in histories.items():
            for point in history:
                for bracket in self._brackets:
                    for milestone, recorded in bracket._rungs:
                        if point["step"] >= milestone and name not in recorded:
                            recorded[name] = -loss_of(point)
                            break


def scheduler(space: Space, most: int) -> TrialScheduler:
    """The space's scheduler, for trials of at most `most` steps."""
    kind = space.scheduler.type
    grace = sweep_steps.grace(space, most)
    if kind == "asha":
        return Asha(time_attr="step", max_t=most, grace_period=grace, reduction_factor=space.scheduler.reduction)
    if kind == "median":
        return Median(time_attr="step", grace_period=grace, min_samples_required=space.scheduler.min_trials)
    return _Fifo()  # type: ignore[no-untyped-call]  # Tune's own constructor


class TpeSearch(OptunaSearch):
    """Optuna's tree-structured Parzen estimator over a space; what Tune gets is a point, factors multiplied out.

    The space's first points come at random places among the first draws: in lock-step ASHA favours early arrivals.
    """

    def __init__(self, space: Space, recipe: Recipe) -> None:
        self._own, self._recipe = space, recipe
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        super().__init__(
            space=self._define,
            metric=space.metric,
            mode=space.mode,
            seed=space.seed,
        )
        trials = space.budget.trials
        wanted = space.first[:trials]
        among = range(max(len(wanted), min(trials or 0, _AMONG)))  # other budgets may end after any number
        places = random.Random(space.seed).sample(among, len(wanted))
        self._first = {place: self._raw(first) for place, first in zip(places, wanted, strict=True)}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        number = len(self._ot_trials)
        if number in self._first and trial_id not in self._ot_trials:
            study: Any = self._ot_study
            study.enqueue_trial(self._first[number])
        drawn = super().suggest(trial_id)
        if drawn is None:
            return None
        raw = {path: self._value(path, drawn[self._name(path)]) for path in self._own.search}
        return {"point": search_space.complete(self._own, self._recipe, raw)}

    def _name(self, path: str) -> str:
        return f"{path} factor" if self._own.search[path].times is not None else path

    def _value(self, path: str, drawn: Any) -> Any:
        distribution = self._own.search[path]
        if distribution.choice is not None:
            return json.loads(drawn) if self._encoded(path) else drawn
        return distribution.rounded(drawn)

    def _encoded(self, path: str) -> bool:
        """Optuna's categories are plain values; lists travel as JSON."""
        return any(isinstance(c, list | tuple | dict) for c in self._own.search[path].choice or ())

    def _define(self, trial: Any) -> None:
        for path, distribution in self._own.search.items():
            name = self._name(path)
            if distribution.choice is not None:
                choices = [json.dumps(c) for c in distribution.choice] if self._encoded(path) else distribution.choice
                trial.suggest_categorical(name, list(choices))
                continue
            low, high, step = distribution.range
            log = "log" in distribution.kind
            if distribution.whole and log:
                trial.suggest_int(name, int(low), int(high), log=True)
            elif distribution.whole:
                trial.suggest_int(name, int(low), int(high), step=int(step or 1))
            else:
                trial.suggest_float(name, low, high, log=log, step=None if log else step)

    def _raw(self, first: Mapping[str, Any]) -> dict[str, Any]:
        """A first point in Optuna's names; what it does not set is the recipe's where that can be drawn."""
        found: dict[str, Any] = {}
        point = search_space.first_point(self._own, self._recipe, first)
        for path, value in point.items():
            distribution = self._own.search[path]
            if distribution.times is None:
                found[path] = json.dumps(value) if self._encoded(path) else value
            else:
                base = point.get(distribution.times, search_space.value_of(self._recipe, distribution.times))
                factors = distribution.choice or ()
                found[self._name(path)] = next(f for f in factors if math.isclose(base * f, value))
        return found


def trial_name(trial: Trial) -> str:
    """A trial's name and folder: its id. Tune's own would spell out the whole point."""
    return str(trial.trial_id)
