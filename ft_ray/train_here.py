"""A run on a private Ray of one machine: Ray Train's controller without what only a shared cluster needs.

Ray starts controller and workers in processes with a runtime environment of their own, which the controller's helpers
inherit, so that none of them can take one of the idle processes that Ray has ready; and it waits for one more actor,
which tells an autoscaler what the run needs, before it starts the workers. Each costs the start of a process and its
imports, one after the other. Here the controller is given its variables as an argument, workers have those of the
session already, and nobody is told. One more actor asks once a second whether the controller lives, to give its
workers' room back if not; here the driver, which waits for the controller, does that.

The controller, its helpers and the run's board share the machine's cores with the ranks. Each wakes a hundred times a
second, and a rank that is interrupted holds all others up, so they run behind the ranks.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

import psutil
import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray._private.state import state
from ray._private.worker import global_worker
from ray._raylet import PlacementGroupID
from ray.core.generated import gcs_pb2
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import (
    DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    get_env_vars_to_propagate,
)
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from ft_ray.ray_session import run_behind

__all__ = ["run"]

logger = logging.getLogger("ft_ray")

_HELPERS = ("ray::_Controller", "ray::Board", "ray::SynchronizationActor")


class _Behind(WorkerGroupCallback):
    """In the controller, whenever ranks begin to train: what serves them yields to them."""

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        # Each ends with the run: none becomes the worker of a later one, which only root could bring forward again.
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(os.getppid()).children():
                with contextlib.suppress(psutil.Error):  # one that has ended meanwhile
                    if "".join(process.cmdline()[:1]).startswith(_HELPERS):
                        run_behind(process.pid)


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
    """What `TorchTrainer` does with these parts of its controller. Returns the run's result.

    Raises RayActorError when the controller is lost; the room of its workers is then free again.
    """
    variables = get_env_vars_to_propagate()
    variables.setdefault(RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR, DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE)
    parts["scaling_policy"] = _Workers(parts["scaling_policy"].scaling_config)
    callbacks = [one for one in parts["callbacks"] if not isinstance(one, PlacementGroupCleanerCallback)]
    parts["callbacks"] = [*callbacks, _Behind()]
    actor: Any = ray.remote(num_cpus=0)(_Controller)
    controller = actor.remote(variables, **parts)
    try:
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())
    except ray.exceptions.RayActorError:
        _give_room_back(controller)
        raise


def _give_room_back(controller: Any) -> None:
    """Removes the placement groups of a controller that was lost: to Ray they live as long as its job."""
    if not ray.is_initialized():
        return
    messages: Any = gcs_pb2  # both made at import or compiled: mypy does not see what is in them
    worker: Any = global_worker
    try:
        ray.kill(controller)  # one that could not be reached may be alive
        for found in state._connect_and_get_accessor().get_placement_group_table():
            group = messages.PlacementGroupTableData.FromString(found)
            if group.creator_actor_id == controller._actor_id.binary():
                worker.core_worker.remove_placement_group(PlacementGroupID(group.placement_group_id))
    except Exception as error:  # what ended the controller is what has to be told
        logger.warning("the room of a lost controller's workers was not given back: %s", error)
