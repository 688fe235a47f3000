"""Trials that cannot share a base: each one a Ray Train run of its own, through Ray Tune all the same."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.train.v2._internal import constants as train_constants
from ray.tune import Checkpoint

from ft_ray import search_space, sweep_states, sweep_trial
from ft_ray.base_model import ModelFiles, resolve
from ft_ray.chat import chat_of
from ft_ray.dataset import prepare
from ft_ray.env_vars import environment
from ft_ray.placement import local_parts
from ft_ray.recipe import Recipe
from ft_ray.shared_storage import Seen
from ft_ray.storage import Store
from ft_ray.sweep_states import OUTCOME

__all__ = ["AloneSetup", "trainable"]

_PREPARES = ("data", "sequence", "model", "seed")


@dataclass(frozen=True)
class AloneSetup:
    """`store` is the address of the sweep's folder; `cpus` what each of its workers takes; None: as the recipe says."""

    recipe: Recipe
    files: ModelFiles
    prepared: Any
    store: str
    cpus: int | None
    seen: Seen | None = None


def trainable(setup: AloneSetup) -> Callable[[dict[str, Any]], None]:
    """The Tune function: it builds the TorchTrainer of its point and reports what that measures."""

    def trial(config: dict[str, Any]) -> None:
        _run(config["point"], tune.get_context().get_trial_id(), setup)

    return trial


def _run(point: Mapping[str, Any], trial: str, setup: AloneSetup) -> None:
    from ft_ray.trainer import train

    if setup.seen is not None:
        setup.seen.check()
    recipe = search_space.apply(setup.recipe, point)
    if setup.cpus is not None:
        recipe = recipe.model_copy(update={"resources": recipe.resources.model_copy(update={"cpus": setup.cpus})})
    files = resolve(recipe.model) if any(p.startswith("model") for p in point) else setup.files
    prepared = setup.prepared
    if any(p.split(".")[0] in _PREPARES for p in point):
        prepared = prepare(recipe, chat_of(recipe.model, files.folder), model_hash=files.hash)
    files, prepared = local_parts(recipe, files, prepared)
    store = Store(f"{setup.store}/{sweep_states.TRIALS}/{trial}")
    teller = _Teller(store, Path(tempfile.gettempdir()), int(sweep_trial.told().get("step", 0)))
    with _known_address():
        outcome = train(recipe, prepared, files, store, on_event=teller, stop=teller.stop)
    if teller.ended is None:
        teller.write(steps=outcome.metrics["steps"], tokens=outcome.metrics["trained_tokens"], tree=outcome.tree,
                     device=outcome.metrics.get("device"))  # fmt: skip
        teller.tell()
    if teller.ended is not None:
        raise teller.ended


@contextlib.contextmanager
def _known_address() -> Iterator[None]:
    """Inside, Ray Train tells its helpers which Ray they are in.

    The one that gives back the room of a trial that was ended looks for it by itself otherwise, and where a machine has
    two it fails: the next trial then waits for room that nobody uses, and those after it.
    """
    told: set[str] = train_constants.ENV_VARS_TO_PROPAGATE
    told.add("RAY_ADDRESS")
    try:
        with environment({"RAY_ADDRESS": ray.get_runtime_context().gcs_address}):
            yield
    finally:
        told.discard("RAY_ADDRESS")


class _Teller:
    """Listens to a training run: measurements go to storage and to Tune; a stop from Tune stops the ranks.

    Tune hears of a measurement once training goes on after it, and of the last one once the weights are committed: its
    schedulers stop a trial at its last step as well, and Tune ends the process of one that is stopped. `told` is the
    step of the last one that it has heard of.
    """

    def __init__(self, store: Store, scratch: Path, told: int) -> None:
        self._store, self._scratch = store, scratch
        self.stop = threading.Event()
        self.ended: SystemExit | None = None
        self._record: dict[str, Any] = store.read_json(OUTCOME) if store.exists(OUTCOME) else {"history": []}
        self._losses: list[float] = []
        self._tokens = self._record.get("tokens", 0)
        # What an earlier process of this trial had measured last, where it ended before it told Tune.
        last = self._record["history"][-1:]
        self._untold: dict[str, Any] | None = last[0] if last and last[0]["step"] > told else None

    def __call__(self, event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            self.tell()
            self._losses.append(event["loss"])
            self._tokens += event["tokens"]
        elif event["kind"] == "eval" and self.ended is None:
            train = sum(self._losses) / len(self._losses) if self._losses else None
            self._losses = []
            point = sweep_states.point_of(event["step"], event["loss"], train, self._tokens)
            earlier = [p for p in self._record["history"] if p["step"] < point["step"]]
            self.write(history=[*earlier, point], steps=event["step"], tokens=self._tokens)
            self._untold = point

    def tell(self) -> None:
        """Reports the last measurement if Tune has not heard of it. A scheduler's stop is then in `ended`."""
        point, self._untold = self._untold, None
        if point is None or self.ended is not None:
            return
        try:
            with tempfile.TemporaryDirectory(dir=self._scratch, prefix="ft-ray-pointer-") as folder:
                (Path(folder) / sweep_trial.POINTER).write_text(json.dumps({"step": point["step"]}), encoding="utf-8")
                told = {**point, "validation_loss": sweep_trial.loss_of(point)}
                tune.report(told, checkpoint=Checkpoint.from_directory(folder))
        except SystemExit as stop:  # the scheduler's word, raised inside report
            self.ended = stop
            self.stop.set()

    def write(self, **values: Any) -> None:
        self._record |= values
        self._store.write_json(OUTCOME, self._record)
