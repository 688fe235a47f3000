"""The engine of a sweep as Ray knows it: the actor's class, apart from what trains.

A process that looks an actor up by name loads the actor's class. With the engine's own, every trial's process would
load torch, transformers and PEFT to send it a message: 9 s of one core and 500 MB each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft_ray.sweep_lease import EngineSetup

__all__ = ["EngineActor"]


class EngineActor:
    """An async Ray actor that hands on to `sweep_engine.Engine`, which it loads when it is made."""

    def __init__(self, setup: EngineSetup) -> None:
        from ft_ray.lean_imports import collector_paused, load_transformers

        with collector_paused(keep=True):  # trials wait for this process
            load_transformers()  # before anything else imports them whole
            from ft_ray import dataset  # noqa: F401 - which reads the rows
            from ft_ray.sweep_engine import Engine

        self._engine = Engine(setup)

    async def ready(self) -> dict[str, Any]:
        return await self._engine.ready()

    async def load(self) -> dict[str, int]:
        return await self._engine.load()

    async def attach(self, trial: str, point: dict[str, Any], token: str) -> dict[str, Any] | None:
        return await self._engine.attach(trial, point, token)

    async def advance(self, trial: str, token: str, until: int) -> bool:
        return await self._engine.advance(trial, token, until)

    async def poll(self, trial: str, token: str, seen: int, wait: float = 1.0) -> dict[str, Any]:
        return await self._engine.poll(trial, token, seen, wait)

    async def renew(self, trial: str, token: str) -> bool:
        return await self._engine.renew(trial, token)

    async def detach(self, trial: str, token: str) -> None:
        await self._engine.detach(trial, token)

    async def stats(self) -> dict[str, Any]:
        return await self._engine.stats()

    async def trials(self) -> list[str]:
        return await self._engine.trials()
