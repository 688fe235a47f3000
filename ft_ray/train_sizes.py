"""How many workers a run with `resources.min_workers` has now: as many as there is free room for.

Lives in Ray Train's controller. Ray's own elastic policy counts what nodes have, not what is free on them: beside an
endpoint it would ask for a size that cannot start, again and again, and end a smaller one that runs well for it. And
with less room than for the fewest it waits for ever, where `resources.wait` says how long (`train_faults`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ray._private.state import available_resources_per_node
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.execution.scaling_policy.scaling_policy import NoopDecision

__all__ = ["FreeRoom", "workers_in"]

_NO_ANSWER = 10.0  # seconds; Ray asks its coordinator for what is reserved every second


class FreeRoom(ElasticScalingPolicy):
    """Ray's policy, by what is free beside the workers that run already."""

    _running = 0
    _waits_since: float | None = None  # for Ray's coordinator to say anything at all

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        self._running = worker_group_state.num_workers
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Less room than for the fewest: they are asked for all the same, so that the start times out.

        So they are where Ray's coordinator gives no answer: it would be asked without end, whatever `resources.wait`.
        """
        self._running = 0
        decision = super().make_decision_for_non_running_worker_group()
        if not isinstance(decision, NoopDecision):
            self._waits_since = None
            return decision
        if self._latest_reserved_resources is None:
            now = time.monotonic()
            self._waits_since = now if self._waits_since is None else self._waits_since
            if now - self._waits_since < _NO_ANSWER:
                return decision
        self._waits_since = None  # a later start, too, leaves it time to answer
        return self._get_resize_decision(self.scaling_config.min_workers)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        free = workers_in(available_resources_per_node(), self.scaling_config._resources_per_worker_not_none)
        return min(super()._count_possible_workers(reserved_resources), self._running + free)


def workers_in(nodes: Mapping[str, Mapping[str, float]], each: Mapping[str, float]) -> int:
    """Workers of `each` that fit on what `nodes` have free."""
    wanted = {kind: amount for kind, amount in each.items() if amount > 0}
    return sum(min(int((free.get(k, 0.0) + 1e-9) // v) for k, v in wanted.items()) for free in nodes.values())
