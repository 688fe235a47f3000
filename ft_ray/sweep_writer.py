"""What an engine writes to storage: trials' states, tried again where storage falters, and its own counters."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ft_ray import adapter_state, sweep_states
from ft_ray.errors import StorageError
from ft_ray.storage import Store
from ft_ray.sweep_lease import Lease, with_pointer

__all__ = ["Lanes", "StateWriter"]

logger = logging.getLogger("ft_ray")

_TRIES = 3


class Lanes:
    """Threads that write. What belongs to one trial is done in order, that of other trials beside it."""

    def __init__(self, count: int) -> None:
        self._pools = [ThreadPoolExecutor(1, thread_name_prefix=f"ft-ray-states-{i}") for i in range(count)]
        self._own: dict[str, int] = {}

    def submit(self, trial: str, work: Callable[..., Any], *arguments: Any, **named: Any) -> Future[Any]:
        lane = self._own.setdefault(trial, len(self._own) % len(self._pools))
        return self._pools[lane].submit(work, *arguments, **named)


class StateWriter:
    """Writes the states of trials on `model`. `identity` goes into the ft_ray.json beside every adapter."""

    def __init__(self, store: Store, model: Any, identity: Mapping[str, Any]) -> None:
        self._store, self._model, self._identity = store, model, identity

    def save(
        self, trial: Lease, step: int, snapshot: Callable[[], dict[str, Any]], record: dict[str, Any]
    ) -> None:
        """Commits one state and tells the lease: `reported` on success, `fault` where storage cannot take it."""
        state = snapshot()
        for attempt in range(1, _TRIES + 1):
            try:
                trial.texts = trial.texts or self._texts(trial)
                saved = sweep_states.commit(self._store, trial.id, step, state, record, trial.texts)
                sweep_states.collect(self._store, trial.id, record["history"])
                trial.reported = with_pointer(record["history"], saved)
                return
            except StorageError as error:
                if attempt == _TRIES or "no space left" in str(error) or isinstance(error.__cause__, PermissionError):
                    trial.fault = str(error)
                    return
                time.sleep(2.0**attempt / 2)
            except BaseException as error:
                trial.fault = f"the state of trial {trial.id} could not be saved ({type(error).__name__}: {error})."
                logger.exception(trial.fault)
                return

    def ended(self, trial: str, history: Sequence[Mapping[str, Any]]) -> None:
        """A trial that has left needs no state to fall back to: of 1,000 trials each would stay to the sweep's end."""
        try:
            sweep_states.collect(self._store, trial, history, newest=1)
        except StorageError as error:
            logger.warning("%s The sweep goes on.", error)

    def save_stats(self, path: str, stats: Mapping[str, Any]) -> None:
        """The engine's counters, for the one that is started in its place."""
        try:
            self._store.write_json(path, stats)
        except StorageError as error:
            logger.warning("%s The sweep goes on.", error)

    def _texts(self, trial: Lease) -> dict[str, str]:
        return {
            "adapter_config.json": adapter_state.peft_config(trial.config, self._model),
            "ft_ray.json": json.dumps({**self._identity, "recipe_hash": trial.recipe.hash}, indent=2),
        }
