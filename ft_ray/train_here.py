"""A run on a private Ray of one machine: Ray Train's controller without what only a shared cluster needs.

Ray starts controller and workers in processes with a runtime environment of their own, which the controller's helpers
inherit, so that none of them can take one of the idle processes that Ray has ready; and it waits for one more actor,
which tells an autoscaler what the run needs, before it starts the workers. Each costs the start of a process and its
imports, one after the other. Here the controller is given its variables as an argument, workers have those of the
session already, and nobody is told.
"""

from __future__ import annotations

import os
from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray.train.v2._internal.constants import (
    DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    get_env_vars_to_propagate,
)
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup

__all__ = ["run"]


class _Workers(FixedScalingPolicy):
    """So many workers, without a word to an autoscaler: there is none."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    _send_resource_request = _maybe_send_resource_request


class _Group(WorkerGroup):
    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        return custom_runtime_env


class _Controller(TrainController):
    worker_group_cls = _Group

    def __init__(self, variables: dict[str, str], **parts: Any) -> None:
        os.environ.update(variables)
        super().__init__(**parts)


def run(**parts: Any) -> Any:
    """What `TorchTrainer` does with these parts of its controller. Returns the run's result."""
    variables = get_env_vars_to_propagate()
    variables.setdefault(RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR, DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE)
    parts["scaling_policy"] = _Workers(parts["scaling_policy"].scaling_config)
    actor: Any = ray.remote(num_cpus=0)(_Controller)
    controller = actor.remote(variables, **parts)
    ray.get(controller.run.remote())
    return ray.get(controller.get_result.remote())
