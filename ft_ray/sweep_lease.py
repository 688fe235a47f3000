"""What an engine holds of a trial, and when it begins a step: leases, and a moment for those who are arriving."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ft_ray.recipe import Recipe
from ft_ray.search_space import Space
from ft_ray.shared_storage import Seen
from ft_ray.sweep_states import SavedTrial

if TYPE_CHECKING:
    from ft_ray.adapter_config import AdapterConfig
    from ft_ray.base_model import ModelFiles

__all__ = ["EngineSetup", "Lease", "Muster", "with_pointer"]


@dataclass(frozen=True)
class EngineSetup:
    """What an engine is made of. `store` is the address of the sweep's folder; `slots` None: what memory holds.

    `expect` is how many trials will come together at first; `seen` what another node must find in storage.
    """

    recipe: Recipe
    space: Space
    files: ModelFiles
    prepared: Any
    store: str
    index: int
    device: str
    threads: int = 1
    slots: int | None = None
    expect: int = 1
    seen: Seen | None = None


@dataclass
class Lease:
    """A lease. Steps from `step` to `target` are trained; `history` is what was measured, `reported` what is saved.

    `texts` are the small files that go beside every state.
    """

    id: str
    token: str
    recipe: Recipe
    key: str
    config: AdapterConfig
    marks: list[int]
    per_forward: int
    renewed: float
    step: int = 0
    target: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    reported: list[dict[str, Any]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None
    saving: int = 0
    fault: str | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Muster:
    """Whether to hold a step for a moment because more trials are just arriving: a step is cheap to share.

    At first, clients start one after another; after a rung, they come back within milliseconds. Both waits end when
    nobody has come for a little while: a core that waits for a process to start would better train those who are here.
    A GPU waits longer at first (`idle_costs` False): it does not take part in their start, and a trial that comes a
    step late is a step late at every mark, which is then measured twice.
    """

    PAUSE = 0.005
    _FIRST_GAP, _FIRST_GAP_OF_A_GPU, _FIRST_MOST = 0.5, 3.0, 20.0
    _GAP, _MOST = 0.03, 0.25

    def __init__(self, expect: int, *, idle_costs: bool = True) -> None:
        self._expect, self._first = expect, True
        self._first_gap = self._FIRST_GAP if idle_costs else self._FIRST_GAP_OF_A_GPU
        self._since: float | None = None
        self._last = 0.0

    def arrived(self) -> None:
        self._last = time.monotonic()

    def wait(self, due: int, attached: int) -> bool:
        """Called with at least one trial due."""
        now = time.monotonic()
        self._since = self._since or now
        if self._first:
            more, gap, most = attached < self._expect or due < attached, self._first_gap, self._FIRST_MOST
        else:
            more, gap, most = due < attached, self._GAP, self._MOST
        if more and now - self._last < gap and now - self._since < most:
            return True
        self._first = False
        return False

    def idle(self) -> None:
        """Nothing is due: the next to come may be waited with."""
        self._since = None


def with_pointer(history: Sequence[dict[str, Any]], saved: SavedTrial) -> list[dict[str, Any]]:
    """The history as clients see it: the last point says where its state is."""
    return [*history[:-1], {**history[-1], "checkpoint": saved.relative, "hash": saved.hash}]
