"""Experiment tracking, written by the driver alone: MLflow, and on request Weights & Biases and TensorBoard.

Workers never write: four processes that open a new sqlite store together fail, and a lost worker would leave
a run half told. The trackers of a run are remembered in `tracking.json` in its folder, so that a resumed run
goes on in the same MLflow run.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ft_ray import mlflow_store
from ft_ray.env_vars import environment
from ft_ray.errors import FtRayError, MissingPackageError, StorageError
from ft_ray.recipe import Recipe
from ft_ray.storage import Store, cache_dir
from ft_ray.storage_faults import redacted

__all__ = ["Tracker", "check_packages"]

logger = logging.getLogger("ft_ray")

FILE = "tracking.json"
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
_FLUSH_SECONDS = 2.0
_STEP_METRICS = {
    "loss": "train/loss",
    "accuracy": "train/token_accuracy",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
}
Metrics = Mapping[str, float]


class _Sink(Protocol):
    name: str

    def params(self, values: Mapping[str, str]) -> None: ...
    def tags(self, values: Mapping[str, str]) -> None: ...
    def metrics(self, rows: list[tuple[Metrics, int]]) -> None: ...
    def finish(self, status: str) -> None: ...


def check_packages(recipe: Recipe) -> None:
    """Before anything is made or trained: MissingPackageError for a tracker that is asked for and not installed."""
    for name in recipe.tracking.to:
        package = _PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            raise MissingPackageError(package, f"tracking.to: {name}", "tracking")


class Tracker:
    """Tells every tracker of `recipe.tracking.to` about one run.

    Opening one raises MissingPackageError, StorageError or InputError. A tracker that fails later (a server that
    went away) is dropped with a warning: a run is not lost for its diary.
    """

    def __init__(self, recipe: Recipe, store: Store) -> None:
        try:
            self._ids: dict[str, str] = dict(store.read_json(FILE)) if store.exists(FILE) else {}
        except (StorageError, ValueError):
            self._ids = {}
        openers: dict[str, Callable[[Recipe, Store, str | None], _Sink]] = {
            "mlflow": _MLflow, "wandb": _Wandb, "tensorboard": _TensorBoard,
        }  # fmt: skip
        self._sinks = [openers[name](recipe, store, self._ids.get(name)) for name in recipe.tracking.to]
        self._waiting: list[tuple[Metrics, int]] = []
        self._flushed = time.monotonic()
        new = {sink.name: str(getattr(sink, "id", "")) for sink in self._sinks}
        if {**self._ids, **new} != self._ids:
            store.write_json(FILE, {**self._ids, **new})
        self.log_params(flatten(recipe.to_dict()))

    @property
    def run_id(self) -> str | None:
        """The MLflow run, for the registry; None when MLflow is not used."""
        return next((str(getattr(s, "id", "")) for s in self._sinks if s.name == "mlflow"), None)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """What the run was made from; passwords in addresses stay here."""
        text = {k: redacted(str(v)) for k, v in values.items() if v is not None}
        self._each(lambda sink: sink.params(text))

    def set_tags(self, values: Mapping[str, Any]) -> None:
        """Lineage: hashes, revisions, versions."""
        text = {k: redacted(str(v)) for k, v in values.items() if v is not None}
        self._each(lambda sink: sink.tags(text))

    def log_metrics(self, values: Mapping[str, Any], step: int = 0) -> None:
        """Numbers of a step; anything else is left out. Written in batches, at most two seconds late."""
        numbers = {
            k: float(v)
            for k, v in values.items()
            if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
        }
        if numbers:
            self._waiting.append((numbers, step))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Takes what it wants from a stream of progress events."""
        if event.get("kind") == "step":
            values = {name: event[key] for key, name in _STEP_METRICS.items() if event.get(key) is not None}
            self.log_metrics(values, int(event["step"]))
        elif event.get("kind") == "eval":
            self.log_metrics({"validation/loss": event["loss"]}, int(event["step"]))

    def flush(self) -> None:
        rows, self._waiting, self._flushed = self._waiting, [], time.monotonic()
        if rows:
            self._each(lambda sink: sink.metrics(rows))

    def finish(self, status: str = "done") -> None:
        """`status` is done, stopped or failed; a stopped run is opened again when it goes on."""
        self.flush()
        self._each(lambda sink: sink.finish(status))

    def _each(self, tell: Callable[[_Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                tell(sink)
            except FtRayError:
                raise
            except Exception as error:  # each tracker has its own errors
                first = (str(error).splitlines() or [type(error).__name__])[0]
                logger.warning("%s no longer takes this run (%s): it goes on without.", sink.name, redacted(first))
                self._sinks.remove(sink)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'lora': {'r': 16}} as {'lora.r': 16}; lists stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class _MLflow:
    """One MLflow run, through a client: no global state, no background process."""

    name = "mlflow"
    _LONGEST = 6000  # characters of a parameter

    def __init__(self, recipe: Recipe, store: Store, known: str | None) -> None:
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        self._metric, self._param, self._tag = Metric, Param, RunTag
        self.uri = mlflow_store.tracking_uri(recipe.storage, recipe.tracking.uri)
        self._client = mlflow_store.client(self.uri)
        try:
            self.id = self._reopen(known) or self._create(recipe, store)
        except MlflowException as error:
            first = str(error).splitlines()[0]
            message = f"MLflow at {self.uri} does not answer ({first}): start it, or set tracking.uri."
            raise StorageError(redacted(message)) from error
        self._known_params = set(self._client.get_run(self.id).data.params)

    def _reopen(self, known: str | None) -> str | None:
        from mlflow.exceptions import MlflowException

        if not known:
            return None
        try:
            self._client.update_run(known, status="RUNNING")
        except MlflowException:  # another store than last time
            return None
        return known

    def _create(self, recipe: Recipe, store: Store) -> str:
        from mlflow.exceptions import MlflowException

        name = recipe.tracking.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                # Artifacts live in the run folder; MLflow is only told where.
                self._client.create_experiment(name, artifact_location=store.address("mlflow-artifacts"))
            except MlflowException:  # another process was first
                logger.debug("experiment %s exists by now", name)
            experiment = self._client.get_experiment_by_name(name)
        assert experiment is not None
        tags = {"ft_ray.run": recipe.name, "ft_ray.folder": redacted(store.address())}
        return str(self._client.create_run(experiment.experiment_id, run_name=recipe.name, tags=tags).info.run_id)

    def params(self, values: Mapping[str, str]) -> None:
        # A parameter is written once; a changed one on resuming (more budget, say) becomes a tag.
        new = {k: v[: self._LONGEST] for k, v in values.items() if k not in self._known_params}
        items = [self._param(k, v) for k, v in new.items()]
        for start in range(0, len(items), 100):
            self._client.log_batch(self.id, params=items[start : start + 100])
        self._known_params |= set(new)

    def tags(self, values: Mapping[str, str]) -> None:
        self._client.log_batch(self.id, tags=[self._tag(k, v[: self._LONGEST]) for k, v in values.items()])

    def metrics(self, rows: list[tuple[Metrics, int]]) -> None:
        now = int(time.time() * 1000)
        items = [self._metric(k, v, now, step) for values, step in rows for k, v in values.items()]
        for start in range(0, len(items), 1000):
            self._client.log_batch(self.id, metrics=items[start : start + 1000])

    def finish(self, status: str) -> None:
        self._client.set_terminated(self.id, {"done": "FINISHED", "stopped": "KILLED"}.get(status, "FAILED"))


class _TensorBoard:
    """Event files in the run folder (remote storage: in the cache of this machine)."""

    name = "tensorboard"

    def __init__(self, recipe: Recipe, store: Store, known: str | None) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise MissingPackageError("tensorboardX", "tracking.to: tensorboard", "tracking") from error
        self.id = store.path("tensorboard") if store.is_local else str(cache_dir() / "tensorboard" / recipe.name)
        self._writer = SummaryWriter(self.id)

    def params(self, values: Mapping[str, str]) -> None:
        text = "\n".join(f"    {k}: {v}" for k, v in sorted(values.items()))
        self._writer.add_text("recipe", text)

    def tags(self, values: Mapping[str, str]) -> None:
        self._writer.add_text("lineage", "\n".join(f"    {k}: {v}" for k, v in sorted(values.items())))

    def metrics(self, rows: list[tuple[Metrics, int]]) -> None:
        for values, step in rows:
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def finish(self, status: str) -> None:
        self._writer.close()


class _Wandb:
    """A Weights & Biases run; WANDB_API_KEY and WANDB_MODE are read by wandb itself."""

    name = "wandb"

    def __init__(self, recipe: Recipe, store: Store, known: str | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingPackageError("wandb", "tracking.to: wandb", "tracking") from error
        offline = os.environ.get("WANDB_MODE") == "offline"  # it cannot resume then, and says so
        weave = os.environ.get("WANDB_DISABLE_WEAVE", "true")  # else it is recommended: vLLM brings openai along
        with environment({"WANDB_DISABLE_WEAVE": weave}):
            self._run: Any = wandb.init(
                project=recipe.tracking.experiment, name=recipe.name, id=known or None, dir=str(cache_dir()),
                resume=None if offline else "allow", settings=wandb.Settings(silent=True),  # else dozens of lines
            )  # fmt: skip
        self.id = str(self._run.id)

    def params(self, values: Mapping[str, str]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def tags(self, values: Mapping[str, str]) -> None:
        self._run.config.update({"lineage": dict(values)}, allow_val_change=True)

    def metrics(self, rows: list[tuple[Metrics, int]]) -> None:
        for values, step in rows:
            self._run.log(dict(values), step=step)

    def finish(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "done" else 1)
