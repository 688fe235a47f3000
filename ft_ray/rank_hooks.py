"""What the trainer of one rank asks of its surroundings: protocols, so that it knows neither Ray nor DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
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

    def begin_save(self) -> None:
        """A save begins: returns once the last one is committed."""
        ...

    def save(
        self, folder: Path, progress: Progress, *, later: Callable[[Path], None] | None = None, wait: bool = False
    ) -> str:
        """Commits this rank's files in `folder` together with the other ranks'; returns the name.

        The folder is the hook's from then on: it removes it when it has done with it. `later` writes the rest of them
        to the folder in which they are then, in whatever thread. `wait`: return once all is committed, not before.
        """
        ...


class Sharding(Protocol):
    """How a full model's state is shared out over the ranks, and how each saves its share; `zero3.Zero` is one."""

    @property
    def shards_weights(self) -> bool: ...
    @property
    def places_model(self) -> bool: ...
    def arguments(self, batch: BatchPlan) -> dict[str, Any]: ...
    def prepare_model(self, model: Any) -> None:
        """Called once the model is loaded, before the trainer has it."""
        ...

    def prepare_saves(self, trainer: Any) -> None:
        """Called when a first step is done, where saves come before the end. More than once is as good as once."""
        ...

    def save(self, trainer: Any, folder: Path) -> Callable[[Path], None] | None: ...
    def end_saves(self) -> None: ...
    def load(self, trainer: Any, folder: Path) -> None: ...
