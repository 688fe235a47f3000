"""Engines started, watched and ended by the driver: one a GPU, or one for a share of the CPU cores."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from ft_ray.base_model import ModelFiles
from ft_ray.errors import TrainingError
from ft_ray.recipe import Recipe
from ft_ray.search_space import Space
from ft_ray.storage import Store
from ft_ray.sweep_engine import Engine, EngineSetup
from ft_ray.sweep_trial import Link

__all__ = ["Engines", "engines"]

logger = logging.getLogger("ft_ray")

_RESTARTS = 20
_MOST_CLIENTS = 32


class Engines:
    """The engines of one sweep. `slots` trials fit on them together."""

    def __init__(self, actors: list[Any], link: Link, ready: list[dict[str, Any]]) -> None:
        self._actors, self.link = actors, link
        self.slots = sum(min(one["slots"], _MOST_CLIENTS) for one in ready)
        self.devices = [str(one["device"]) for one in ready]
        self._stats: list[dict[str, Any]] = [{} for _ in actors]
        self._calls: dict[Any, int] = {}

    def stats(self, *, wait: float = 0.0) -> list[dict[str, Any]]:
        """What each engine said last, asking again in the background. Raises an engine's own fault."""
        if not self._calls:
            self._calls = {actor.stats.remote(): i for i, actor in enumerate(self._actors)}
        done, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=wait)
        for call in done:
            with contextlib.suppress(RayActorError):  # it restarts; its trials go on from storage
                self._stats[self._calls.pop(call)] = ray.get(call)
                continue
            self._calls.pop(call, None)
        return [one for one in self._stats if one]


@contextlib.contextmanager
def engines(
    recipe: Recipe, space: Space, files: ModelFiles, prepared: Any, store: Store, use_gpu: bool,
    waiting: Callable[[], None],
) -> Iterator[Engines]:  # fmt: skip
    """Starts the engines and waits for them, calling `waiting` meanwhile; ends them afterwards."""
    count = space.engines if isinstance(space.engines, int) else _gpus() if use_gpu else 1
    cpus = _cpus(count, use_gpu)
    link = Link(
        tuple(f"ft-ray-engine-{uuid.uuid4().hex[:8]}-{i}" for i in range(count)),
        ray.get_runtime_context().namespace,
    )
    actors: list[Any] = []
    try:
        for index, name in enumerate(link.engines):
            setup = EngineSetup(
                recipe, space.model_copy(update={"engines": count}), files, prepared, store.address(), index,
                "cuda:0" if use_gpu else "cpu", cpus,
            )  # fmt: skip
            actors.append(
                ray.remote(Engine).options(
                    name=name, namespace=link.namespace, num_cpus=cpus, num_gpus=1 if use_gpu else 0,
                    max_restarts=_RESTARTS, max_concurrency=1000, scheduling_strategy="SPREAD",
                ).remote(setup)
            )  # fmt: skip
        calls = [actor.ready.remote() for actor in actors]
        while True:
            try:
                ready = ray.get(calls, timeout=0.5)
                break
            except GetTimeoutError:
                waiting()
            except RayActorError as error:
                raise TrainingError(f"an engine of the sweep died while it loaded the base ({error}).") from error
        yield Engines(actors, link, ready)
    finally:
        for actor in actors:
            with contextlib.suppress(RayError):
                ray.kill(actor, no_restart=True)


def _gpus() -> int:
    return max(1, int(ray.cluster_resources().get("GPU", 0)))


def _cpus(count: int, use_gpu: bool) -> int:
    """Cores of one engine. A GPU is fed with a few; on CPUs the engines share all there are."""
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    share = max(1, min(sum(nodes) // count, max(nodes, default=1)))
    if not use_gpu and count > sum(nodes):
        raise TrainingError(f"engines: {count} CPU engines need a core each and Ray has {sum(nodes)}: lower engines.")
    return min(share, 8) if use_gpu else share
