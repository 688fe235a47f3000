"""What the trainer of one rank asks of its surroundings: protocols, so that it knows neither Ray nor DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from ft_ray.checkpoint_state import Progress
from ft_ray.objective import BatchPlan

__all__ = ["Hooks", "Sharding"]


class Hooks(Protocol):
    """What a rank's surroundings do for it. `event` and the two requests are called on rank 0 only."""

    def event(self, event: dict[str, Any]) -> None: ...
    def stop_requested(self) -> bool: ...
    def save_requested(self) -> bool: ...
    def told_to_end(self) -> bool:
        """Whether somebody ends this very process, with a little time left; asked on every rank after every step."""
        ...

    def save(self, folder: Path, progress: Progress, *, wait: bool = False) -> str:
        """Commits this rank's files in `folder` together with the other ranks'; returns the name.

        The folder is the hook's from then on: it removes it when it has done with it. `wait`: return once it is
        committed, not before.
        """
        ...


class Sharding(Protocol):
    """How a full model's state is shared out over the ranks, and how each saves its share; `zero3.Zero` is one."""

    @property
    def shards_weights(self) -> bool: ...
    @property
    def places_model(self) -> bool: ...
    def arguments(self, batch: BatchPlan) -> dict[str, Any]: ...
    def save(self, trainer: Any, folder: Path) -> None: ...
    def load(self, trainer: Any, folder: Path) -> None: ...
