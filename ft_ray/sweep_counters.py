"""What an engine of a sweep counts, across its own restarts: a restarted one knows only what lies in storage."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import ray

from ft_ray.adapter_config import Stats
from ft_ray.storage import Store

__all__ = ["Counters"]

_MOST_FAULTS = 3


class Counters:
    """The counters of engine number `index`; `actor` is its name in Ray, which a restarted one has too."""

    def __init__(self, store: Store, index: int) -> None:
        self._store, self._index = store, index
        self.path = f"engines/{index}.json"
        self._actor = ray.get_runtime_context().get_actor_name()
        self._earlier: dict[str, Any] = {}

    def load(self) -> None:
        """Takes up what an earlier engine of this sweep counted. A resumed sweep's is no restart of this one."""
        if self._store.exists(self.path):
            self._earlier = self._store.read_json(self.path)
            self._earlier["restarts"] += self._earlier.get("actor") == self._actor

    def may_fail_again(self, now: Stats) -> bool:
        """After an error that is not ours: whether this engine trained at all, and has not failed so too often."""
        self._earlier["faults"] = self._earlier.get("faults", 0) + 1
        return now.forwards > 0 and self._earlier["faults"] <= _MOST_FAULTS

    def all(self, now: Stats, device: str, running: int, spent: Mapping[str, float]) -> dict[str, Any]:
        """`now` is what the shared base counted since this process began, `spent` its thread's seconds by kind."""
        earlier = self._earlier
        forwards = earlier.get("forwards", 0) + now.forwards
        adapters = earlier.get("adapters", 0.0) + now.mean_k * now.forwards
        return {
            "id": f"engine-{self._index}",
            "actor": self._actor,
            "pid": os.getpid(),
            "device": device,
            "node": ray.get_runtime_context().get_node_id(),
            "forwards": forwards,
            "adapters": adapters,
            "mean_k": adapters / forwards if forwards else 0.0,
            "trained_tokens": earlier.get("trained_tokens", 0) + now.trained_tokens,
            "padding": now.padding,
            "out_of_memory": earlier.get("out_of_memory", 0) + now.out_of_memory,
            "k_limit": now.k_limit,
            "restarts": earlier.get("restarts", 0),
            "faults": earlier.get("faults", 0),
            "running": running,
            "spent": {what: round(seconds, 2) for what, seconds in spent.items()},
        }
