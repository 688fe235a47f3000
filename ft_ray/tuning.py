"""Sweeps on Ray Tune: every trial is an ordinary Tune trial; on a shared base they train in one forward.

The driver builds the Tuner, tells the user and the trackers, and puts the result together from storage. Tune's loop
runs in a thread of its own, so that Ctrl-C and `stop` leave trials unfinished in Tune's snapshot, to be resumed.
"""

from __future__ import annotations

import json
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.experiment import Trial

from ft_ray import ray_session, search_space, sweep_outcome, sweep_search, sweep_steps, sweep_trial, train_room
from ft_ray.env_vars import environment
from ft_ray.errors import InputError, TrainingError
from ft_ray.recipe import Recipe
from ft_ray.run_lock import check_held
from ft_ray.search_space import LoadedSpace, Space
from ft_ray.shared_storage import Seen, seen_here
from ft_ray.storage import Store
from ft_ray.sweep_children import Children
from ft_ray.sweep_engines import Engines, engines
from ft_ray.sweep_results import FOLDER, EngineStats, SweepResult
from ft_ray.sweep_search import BudgetStopper, StopSweep, TpeSearch, Watch

if TYPE_CHECKING:
    from ft_ray.base_model import ModelFiles

__all__ = ["sweep"]

logger = logging.getLogger("ft_ray")

OnEvent = Callable[[dict[str, Any]], None]
_TUNE = "tune"
_ASKED = "sweep_of.json"
_TELL_SECONDS, _HEARTBEAT = 1.0, 8.0
_LOADING = "loading the base for the sweep"
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # files for each trial, which nothing here reads
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints tables on stdout, whatever `verbose` says
    "TUNE_WARN_THRESHOLD_S": "30",
}


def sweep(
    recipe: Recipe,
    space: Space,
    prepared: Any,
    files: ModelFiles,
    store: Store,
    *,
    on_event: OnEvent,
    resume: bool = False,
    stop: threading.Event | None = None,
    points: Sequence[Mapping[str, Any]] | None = None,
    folder: str = FOLDER,
) -> SweepResult:
    """Runs the space's trials and returns what each measured; the same is written to `folder`/sweep.json in `store`.

    `prepared` is a `dataset.Prepared`. `points` (dotted overrides) are trained as they are instead of drawn ones, each
    to its end. With `resume`, an interrupted sweep goes on and finished trials are kept. Setting `stop`, or Ctrl-C,
    ends it with `status` stopped and reason 'interrupted'; a second Ctrl-C raises at once. Raises RecipeError for a
    space that does not fit, InputError for another sweep in the folder, TrainingError when every trial failed.
    """
    if not ray.is_initialized():
        on_event({"kind": "status", "message": "starting a private Ray"})
        with ray_session.session():
            return sweep(recipe, space, prepared, files, store, on_event=on_event, resume=resume, stop=stop,
                         points=points, folder=folder)  # fmt: skip
    if points is not None:
        space = space.model_copy(update={"scheduler": search_space.Scheduler(), "searcher": "random"})
    else:
        for note in search_space.check(LoadedSpace(space, lambda loc: "space"), recipe):
            on_event({"kind": "status", "message": f"note: {note}"})
    reasons = search_space.unshared(space, recipe)
    running = _Running(recipe, space, prepared, files, store, folder, on_event, stop, shared=not reasons)
    what = f"one Ray Train run a trial: {'; '.join(reasons)}" if reasons else "the trials share one frozen base"
    on_event({"kind": "status", "message": what})
    with environment(_ENVIRONMENT), sweep_search.trial_variables(), sweep_search.uncounted():
        return running.run(points, resume)


class _Running:
    """One sweep while it runs: Tune's parts call it (see `sweep_search`), the main thread tells the outside."""

    def __init__(
        self, recipe: Recipe, space: Space, prepared: Any, files: ModelFiles, store: Store, folder: str,
        on_event: OnEvent, stop: threading.Event | None, *, shared: bool,
    ) -> None:  # fmt: skip
        self.recipe, self.space, self.prepared, self.files = recipe, space, prepared, files
        self.store, self.home, self.folder, self.shared = store, store.sub(folder), folder, shared
        self.on_event, self.stop, self.stopping = on_event, stop or threading.Event(), False
        self.trials: list[Trial] = []
        self.cut: set[str] = set()
        self.reason, self._wanted = "", 0
        self._controller: Any = None
        self._seen: Seen | None = None
        self._reports: queue.Queue[tuple[str, dict[str, Any], dict[str, Any]]] = queue.Queue()
        self._histories: dict[str, list[dict[str, Any]]] = {}
        self._tokens: dict[str, int] = {}
        self._earlier_seconds, self._began = 0.0, time.monotonic()
        self._said = time.monotonic()

    # What Tune's parts call, in Tune's thread

    def controller(self, controller: Any) -> None:
        self._controller = controller

    def changed(self, trials: Iterable[Trial]) -> None:
        self.trials = list(trials)

    def reported(self, trial: Trial, result: Mapping[str, Any]) -> None:
        self._tokens[trial.trial_id] = result.get("tokens", 0)
        self._reports.put((trial.trial_id, trial.config["point"], dict(result)))

    def histories(self) -> Mapping[str, Iterable[Mapping[str, Any]]]:
        return self._histories

    def turn(self) -> None:
        if self.stop.is_set():
            self._controller.checkpoint(force=True, wait=True)
            raise StopSweep

    def spent(self) -> bool:
        if not self.reason:
            budget = self.space.budget
            if budget.tokens is not None and sum(self._tokens.values()) >= budget.tokens:
                self.reason = "tokens"
            elif budget.hours is not None and self.seconds >= budget.hours * 3600:
                self.reason = "hours"
            if self.reason:
                self.cut = {t.trial_id for t in self.trials if not t.is_finished()}
        return bool(self.reason)

    # The main thread

    @property
    def seconds(self) -> float:
        return self._earlier_seconds + time.monotonic() - self._began

    def run(self, points: Sequence[Mapping[str, Any]] | None, resume: bool) -> SweepResult:
        resume = self._open(points, resume)
        use_gpu = train_room.use_gpu(self.recipe)
        self._wanted = self._count(points)
        if not self.shared:
            with seen_here(self.home) as self._seen:
                return self._tuned(points, resume, None, use_gpu)
        with engines(
            self.recipe, self.space, self.files, self.prepared, self.home, use_gpu, self._wanted
        ) as started:
            return self._tuned(points, resume, started, use_gpu)

    def _open(self, points: Sequence[Mapping[str, Any]] | None, resume: bool) -> bool:
        """Prepares the folder; whether there is something to resume. Raises InputError for another sweep's."""
        space = self.space.model_dump(mode="json")
        rows, base = getattr(self.prepared, "hashes", None), self.files.hash
        given = {"recipe": self.recipe.hash, "space": space, "points": points, "rows": rows, "base": base}
        asked = json.loads(json.dumps(given))
        found = self.home.read_json(_ASKED) if self.home.exists(_ASKED) else None
        if resume and found is not None and found["asked"] != asked:
            raise InputError(
                f"{self.home.address()} holds a sweep of another recipe or space, or its rows or base have changed "
                "since: give this one another name, or start it afresh without --resume."
            )
        resume = resume and found is not None
        if resume:
            self._earlier_seconds = float(found["seconds"]) if found else 0.0
            for trial in self.home.list("trials"):
                self._histories[trial] = history = sweep_outcome.history_of(self.home, trial).get("history", [])
                self._tokens[trial] = history[-1]["tokens"] if history else 0
        else:
            self.home.remove("")
        self._asked = asked
        self._remember()
        return resume

    def _remember(self) -> None:
        self.home.write_json(_ASKED, {"asked": self._asked, "seconds": self.seconds})

    def _tuned(
        self, points: Sequence[Mapping[str, Any]] | None, resume: bool, started: Engines | None, use_gpu: bool
    ) -> SweepResult:
        tuner = self._tuner(points, resume, started, use_gpu)
        failure: list[BaseException] = []
        ended = threading.Event()

        def fit() -> None:
            try:
                tuner.fit()
            except BaseException as error:
                failure.append(error)
            finally:
                ended.set()

        Watch.current = self
        children = Children(self.recipe, self.home)
        try:
            threading.Thread(target=fit, name="ft-ray-tune", daemon=True).start()
            self._listen(ended, started, children)
            stats = started.stats(wait=10.0) if started is not None and started.check(wait=10.0) else []
        finally:
            Watch.current = None
            children.close({t.trial_id: t.status for t in self.trials})
        if failure and not isinstance(failure[0], StopSweep):
            what = f"{type(failure[0]).__name__}: {failure[0]}"[:300]
            raise TrainingError(f"the sweep failed in Ray Tune ({what}): run it again with --resume.") from failure[0]
        if failure:
            self.reason = "interrupted"
        return self._result(stats, started.device if started is not None else "cuda" if use_gpu else "cpu")

    def _tuner(
        self, points: Sequence[Mapping[str, Any]] | None, resume: bool, started: Engines | None, use_gpu: bool
    ) -> Tuner:
        if started is not None:
            function = sweep_trial.trainable(started.link)
            while not started.places and not started.check(wait=0.5):
                self._wait(_LOADING)
            concurrent = started.places or started.slots
        else:
            concurrent, function = self._alone(use_gpu)
        # A byte of memory: Tune wants something to reserve, and the cores are the engines'.
        trainable = tune.with_resources(function, {"memory": 1})
        path = f"{self.home.path()}/{_TUNE}"
        filesystem = _filesystem(self.home)
        if resume and Tuner.can_restore(path, storage_filesystem=filesystem):
            return Tuner.restore(
                path, trainable=trainable, resume_unfinished=True, resume_errored=True, storage_filesystem=filesystem
            )
        searcher, space, samples = None, {}, 1
        if points is None and self.space.searcher == "tpe":
            searcher, samples = TpeSearch(self.space, self.recipe), self.space.budget.trials or 1
        else:
            order = [dict(p) for p in (points if points is not None else search_space.points(self.space, self.recipe))]
            # In lock-step ASHA favours those who arrive first: they must not be the first of the file.
            random.Random(self.space.seed).shuffle(order)
            space = {"point": tune.grid_search(order)}
        shares = sweep_steps.RowShares(self.prepared, self.recipe)
        most = sweep_steps.longest(self.space, self.recipe, shares)
        return Tuner(
            trainable,
            param_space=space,
            tune_config=TuneConfig(
                metric=self.space.metric,
                mode=self.space.mode,
                num_samples=samples,
                search_alg=searcher,
                scheduler=sweep_search.scheduler(self.space, most),
                max_concurrent_trials=concurrent,
                reuse_actors=self.shared,
                trial_name_creator=sweep_search.trial_name,
                trial_dirname_creator=sweep_search.trial_name,
            ),
            run_config=RunConfig(
                name=_TUNE,
                storage_path=self.home.path(),
                storage_filesystem=filesystem,
                callbacks=[Watch()],
                stop=BudgetStopper(),
                failure_config=FailureConfig(max_failures=self.space.retries),
                verbose=0,
            ),
        )

    def _alone(self, use_gpu: bool) -> tuple[int, Callable[[dict[str, Any]], None]]:
        resources, workers = ray.cluster_resources(), self.recipe.resources.workers
        concurrent, cpus = 1, None
        if use_gpu:
            concurrent = max(1, int(resources.get("GPU", 1)) // workers)
        elif isinstance(self.space.concurrent, int) and self.recipe.resources.cpus == "auto":
            concurrent = max(1, min(self.space.concurrent, int(resources.get("CPU", 1)) // workers))
            cpus = max(1, int(resources.get("CPU", 1)) // workers // concurrent)
        from ft_ray import sweep_alone  # it brings the whole training path along

        return concurrent, sweep_alone.trainable(
            sweep_alone.AloneSetup(self.recipe, self.files, self.prepared, self.home.address(), cpus, self._seen)
        )

    def _listen(self, ended: threading.Event, started: Engines | None, children: Children) -> None:
        """Until Tune has ended: tells what happens, and turns Ctrl-C into a stop."""
        told = 0.0
        while True:
            over = ended.is_set()
            try:
                while True:
                    try:
                        children.report(*self._reports.get_nowait())
                    except queue.Empty:
                        break
                if over:
                    return
                check_held(self.store.url)
                if time.monotonic() - told > _TELL_SECONDS:
                    told = time.monotonic()
                    if started is not None and not started.check():
                        self._heartbeat(_LOADING)
                    self._tell(started.stats() if started is not None else [])
                    self._remember()
                ended.wait(0.2)
            except KeyboardInterrupt:
                if self.stop.is_set():
                    raise
                self.stop.set()
                self.on_event({"kind": "status", "message": "stopping; the same command with --resume goes on"})
            except BaseException:
                self.stop.set()  # an engine's fault, or the listener's own: Tune must not go on without us
                ended.wait(60)
                raise

    def _tell(self, stats: list[dict[str, Any]]) -> None:
        rows = []
        for trial in self.trials:
            last = trial.last_result or {}
            rows.append(
                {
                    "id": trial.trial_id,
                    "point": trial.config.get("point", {}),
                    "state": trial.status.lower(),
                    "step": last.get("step", 0),
                    "tokens": last.get("tokens", 0),
                    "validation_loss": last.get("validation_loss"),
                }
            )
        forwards = sum(s["forwards"] for s in stats)
        mean_k = sum(s["adapters"] for s in stats) / forwards if forwards else None
        self.on_event({
            "kind": "sweep", "rows": rows, "total": self._wanted, "mean_k": mean_k, "forwards": forwards,
            "seconds": self.seconds,
        })  # fmt: skip

    def _count(self, points: Sequence[Mapping[str, Any]] | None) -> int:
        if points is None and self.space.searcher == "tpe":
            return self.space.budget.trials or 1
        return len(points if points is not None else search_space.points(self.space, self.recipe))

    def _wait(self, message: str) -> None:
        if self.stop.is_set():
            raise KeyboardInterrupt
        self._heartbeat(message)

    def _heartbeat(self, message: str) -> None:
        if time.monotonic() - self._said > _HEARTBEAT:
            self._said = time.monotonic()
            self.on_event({"kind": "status", "message": message, "heartbeat": True})

    def _result(self, stats: list[dict[str, Any]], device: str) -> SweepResult:
        trials = []
        for trial in self.trials:
            error = sweep_outcome.error_of(trial) if trial.status == Trial.ERROR else ""
            trials.append(
                sweep_outcome.trial_result(
                    self.home, self.folder, trial.trial_id, trial.config.get("point", {}), trial.status, error,
                    cut=trial.trial_id in self.cut,
                )
            )  # fmt: skip
        if trials and all(t.status == "failed" for t in trials):
            raise TrainingError(f"every trial of the sweep failed; the first one: {trials[0].error}")
        interrupted = self.reason == "interrupted"
        if not interrupted:
            trials = sweep_outcome.retain(self.home, self.folder, trials, self.space.keep)
        forwards = sum(s["forwards"] for s in stats)
        fields = EngineStats.model_fields
        result = SweepResult(
            name=self.recipe.name,
            recipe=self.recipe.to_dict(),
            recipe_hash=self.recipe.hash,
            space=self.space.model_dump(mode="json"),
            trials=trials,
            mean_k=sum(s["adapters"] for s in stats) / forwards if forwards else 1.0,
            engines=tuple(EngineStats(**{k: s[k] for k in fields}) for s in stats),
            seconds=round(self.seconds, 3),
            trained_tokens=sum(t.tokens for t in trials),
            device=device,
            shared=self.shared,
            seed=self.space.seed,
            status="stopped" if self.reason else "done",
            reason=self.reason,
        )
        self._remember()
        self.home.write_json("sweep.json", result.model_dump(mode="json"))
        return result


def _filesystem(store: Store) -> Any:
    if store.is_local:
        return None
    from fsspec.core import url_to_fs
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(url_to_fs(store.address())[0]))
