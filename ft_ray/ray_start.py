"""How a private Ray starts: without servers nobody asks, with imports beside it, and again where it took too long."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ray._private.node import Node

from ft_ray.lean_imports import collector_paused

__all__ = ["begin", "beside", "without_idle_servers"]

logger = logging.getLogger("ft_ray")

_node: Any = Node


@contextlib.contextmanager
def without_idle_servers() -> Iterator[None]:
    """Inside, `ray.init` starts neither the log monitor, to whom nobody listens here, nor the autoscaler's monitor.

    It has no argument for either. The first took the most of what an idle private Ray takes, 1.6% of a core.
    """

    def none(self: Any) -> None:
        pass

    usual = _node.start_log_monitor, _node.start_monitor
    _node.start_log_monitor = _node.start_monitor = none
    try:
        yield
    finally:
        _node.start_log_monitor, _node.start_monitor = usual


@contextlib.contextmanager
def beside(work: Callable[[], object] | None) -> Iterator[None]:
    """`work`, imports, is done beside the block. Both are over afterwards: two threads may see half a module.

    Where the block raises, nobody waits for the imports.
    """
    if work is None:
        yield
        return

    def run() -> None:
        with contextlib.suppress(Exception), collector_paused():
            work()

    thread = threading.Thread(target=run, name="ft-ray-imports", daemon=True)
    thread.start()
    yield
    thread.join()


def begin(init: Callable[[], object], clear: Callable[[], None]) -> None:
    """`init()`, a ray.init. Where Ray's servers were not up in time, `clear()` ends them, and they get a second chance.

    Ray gives its agents 15 seconds by a count of its own. On a machine whose disk is slow, or that is busy, they may be
    read for the first time in those; the second time they are in memory.
    """
    try:
        init()
    except Exception as error:
        clear()
        if not isinstance(error, TimeoutError) and "timed out" not in str(error).lower():
            raise
        logger.info("Ray's servers were not up in time: starting them again")
        try:
            init()
        except BaseException:
            clear()
            raise
