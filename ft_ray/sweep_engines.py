"""Engines started, watched and ended by the driver: one a GPU, or one for a share of the CPU cores."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from ft_ray.errors import FtRayError, TrainingError
from ft_ray.recipe import Recipe
from ft_ray.search_space import Space
from ft_ray.shared_storage import seen_here
from ft_ray.storage import Store
from ft_ray.sweep_actor import EngineActor
from ft_ray.sweep_lease import EngineSetup
from ft_ray.sweep_trial import Link
from ft_ray.train_room import share_of_gpu

if TYPE_CHECKING:
    from ft_ray.base_model import ModelFiles

__all__ = ["Engines", "engines"]

logger = logging.getLogger("ft_ray")

_RESTARTS = 20
_MOST_CLIENTS = 32
_CLIENTS_A_CORE = 4


class Engines:
    """The engines of one sweep, which may still be loading the base.

    `places` is how many trials to run at once where that is known before the base is loaded, else 0.
    """

    def __init__(self, actors: list[Any], link: Link, places: int) -> None:
        self._actors, self.link, self.places = actors, link, places
        self._starting = [actor.ready.remote() for actor in actors]
        self._ready: list[dict[str, Any]] = []
        self._stats: list[dict[str, Any]] = [{} for _ in actors]
        self._calls: dict[Any, int] = {}

    def check(self, wait: float = 0.0) -> bool:
        """Whether all are ready. Raises what loading the base raised."""
        if not self._ready:
            try:
                with _told_plainly():
                    self._ready = ray.get(self._starting, timeout=wait)
            except GetTimeoutError:
                return False
            except RayActorError as error:
                raise TrainingError(f"an engine of the sweep died while it loaded the base ({error}).") from error
        return True

    @property
    def slots(self) -> int:
        """Trials that fit on them together; known once they are ready."""
        return sum(min(one["slots"], _MOST_CLIENTS) for one in self._ready)

    @property
    def device(self) -> str:
        return str(self._ready[0]["device"]) if self._ready else ""

    def stats(self, *, wait: float = 0.0) -> list[dict[str, Any]]:
        """What each engine said last, asking again in the background; with `wait`, what it says now.

        Raises an engine's own fault.
        """
        asked = set() if wait else set(self._calls.values())  # one whose machine is gone may not answer for long
        if wait:
            self._calls.clear()
        self._calls.update({actor.stats.remote(): i for i, actor in enumerate(self._actors) if i not in asked})
        done, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=wait)
        for call in done:
            with contextlib.suppress(RayActorError), _told_plainly():  # it restarts; its trials go on from storage
                self._stats[self._calls[call]] = ray.get(call) or self._stats[self._calls[call]]
            del self._calls[call]
        return [one for one in self._stats if one]


@contextlib.contextmanager
def _told_plainly() -> Iterator[None]:
    """An error of ours that an engine raised is raised as it is, without the engine's stack."""
    try:
        yield
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, FtRayError) else error from None


@contextlib.contextmanager
def engines(
    recipe: Recipe, space: Space, files: ModelFiles, prepared: Any, store: Store, use_gpu: bool,
    trials: int,
) -> Iterator[Engines]:  # fmt: skip
    """Starts the engines for a sweep of `trials` trials, and ends them afterwards. They load while clients start."""
    count = space.engines if isinstance(space.engines, int) else _gpus() if use_gpu else 1
    cpus = _cpus(count, use_gpu, recipe.resources.cpus)
    gpus = share_of_gpu(recipe) if use_gpu else 0
    link = Link(
        tuple(f"ft-ray-engine-{uuid.uuid4().hex[:8]}-{i}" for i in range(count)),
        ray.get_runtime_context().namespace,
    )
    places = _places(space, count, cpus, use_gpu)
    actors: list[Any] = []
    with seen_here(store) as seen, _ended(actors):
        for index, name in enumerate(link.engines):
            setup = EngineSetup(
                recipe, space.model_copy(update={"engines": count}), files, prepared, store.address(), index,
                "cuda:0" if use_gpu else "cpu", cpus, expect=max(1, min(trials, places or trials) // count), seen=seen,
            )  # fmt: skip
            actors.append(
                ray.remote(EngineActor).options(
                    name=name, namespace=link.namespace, num_cpus=cpus, num_gpus=gpus,
                    max_restarts=_RESTARTS, max_concurrency=1000, scheduling_strategy="SPREAD",
                ).remote(setup)
            )  # fmt: skip
        yield Engines(actors, link, places)


@contextlib.contextmanager
def _ended(actors: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for actor in actors:
            with contextlib.suppress(RayError):
                ray.kill(actor, no_restart=True)


def _places(space: Space, engines: int, cpus: int, use_gpu: bool) -> int:
    """Trials at once, 0: what the engines have memory for.

    On CPUs each client's process starts on a core that trains, so that more of them than a few a core cost more than
    a fuller forward saves; and they start while one engine loads (with several, all would go to the first one ready).
    """
    if isinstance(space.concurrent, int):
        return space.concurrent
    return 0 if use_gpu or engines > 1 else min(_CLIENTS_A_CORE * max(2, cpus), _MOST_CLIENTS)


def _gpus() -> int:
    return max(1, int(ray.cluster_resources().get("GPU", 0)))


def _cpus(count: int, use_gpu: bool, wanted: int | str) -> int:
    """Cores of one engine, `wanted` at most. A GPU is fed with a few; on CPUs the engines share all there are."""
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    share = max(1, min(sum(nodes) // count, max(nodes, default=1)))
    if not use_gpu and count > sum(nodes):
        raise TrainingError(f"engines: {count} CPU engines need a core each and Ray has {sum(nodes)}: lower engines.")
    if not isinstance(wanted, str):
        share = min(share, wanted)
    return min(share, 8) if use_gpu else share
