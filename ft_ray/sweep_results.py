"""What a sweep leaves: `sweep.json` in NAME/sweep, one record a trial. Read by what chooses and draws then."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ft_ray.errors import StorageError
from ft_ray.recipe_sections import Strict
from ft_ray.storage import Store

__all__ = ["EngineStats", "Point", "SweepResult", "TrialResult", "load", "save"]

FOLDER = "sweep"
_FILE = f"{FOLDER}/sweep.json"


class Point(Strict):
    """One report of a trial. Losses are nats a trained token; None where they were not finite or not measured."""

    step: int
    validation_loss: float | None = None
    train_loss: float | None = Field(None, description="Mean over the steps since the report before.")
    tokens: int = Field(0, description="Trained tokens of this trial so far.")


class TrialResult(Strict):
    """One trial. `config` holds dotted recipe overrides, as `Recipe` takes them.

    done: all its steps; pruned: stopped by the scheduler; stopped: its loss was not finite, the budget ended or it was
    interrupted; failed: an error. `checkpoint` is relative to the run folder: a committed tree that is a PEFT adapter
    folder, and holds the training state too; it is of `best_step`.
    """

    id: str
    config: dict[str, Any]
    status: Literal["done", "stopped", "pruned", "failed"]
    steps: int
    tokens: int
    history: list[Point]
    best_step: int | None = None
    best_loss: float | None = None
    checkpoint: str | None = None
    error: str = ""


class EngineStats(Strict):
    """One engine. `mean_k`: adapters a training forward, on average; `padding`: share of empty token slots."""

    id: str
    device: str
    mean_k: float
    forwards: int
    trained_tokens: int
    padding: float = 0.0
    out_of_memory: int = 0
    k_limit: int | None = None
    restarts: int = 0
    node: str = Field("", description="Ray's id of the machine it ran on last.")
    spent: dict[str, float] = Field(
        default_factory=dict,
        description="Seconds of the thread that trains, since its last start: `stepping`, `measuring` (on validation "
        "rows), `copying` states off the device, and `waiting` for clients and for states to be written.",
    )


class SweepResult(Strict):
    """One sweep. `shared` says whether its trials shared a frozen base or ran as one Ray Train run each."""

    name: str
    recipe: dict[str, Any]
    recipe_hash: str = ""
    space: dict[str, Any]
    metric: str = "validation_loss"
    mode: Literal["min", "max"] = "min"
    trials: list[TrialResult]
    mean_k: float
    engines: tuple[EngineStats, ...] = ()
    seconds: float
    trained_tokens: int
    device: str
    shared: bool
    seed: int = 0
    status: Literal["done", "stopped"] = Field("done", description="stopped: interrupted or out of budget.")
    reason: str = ""


def load(store: Store) -> SweepResult:
    """The sweep of a run folder. Raises StorageError where there is none."""
    try:
        return SweepResult.model_validate(store.read_json(_FILE))
    except ValueError as error:
        raise StorageError(f"{store.address(_FILE)} is not a sweep's record ({error}): run the sweep again.") from error


def save(store: Store, result: SweepResult) -> None:
    store.write_json(_FILE, result.model_dump(mode="json"))
