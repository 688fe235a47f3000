"""An action on a storage that may be away for a while, tried again within bounds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ft_ray.errors import DamagedError, StorageError
from ft_ray.run_lock import TakenOver
from ft_ray.storage_faults import disk_full, lasting

__all__ = ["persistently"]

logger = logging.getLogger("ft_ray")

T = TypeVar("T")
_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)  # seconds between the tries: an outage of a minute and a half


def persistently(action: Callable[[], T], say: Callable[[str], None] = logger.warning) -> T:
    """What `action` returns, tried again while storage fails: eight times within 91 seconds of waiting.

    A full disk, a missing permission, a damaged file and a run folder that another run has taken over stay what they
    are: they raise StorageError at once.
    """
    for wait in (*_WAITS, None):
        try:
            return action()
        except StorageError as error:
            stays = isinstance(error, DamagedError | TakenOver) or lasting(error.__cause__) or disk_full(error)
            if wait is None or stays:
                raise
            say(f"{error} Trying again in {wait:.0f} s.")
            time.sleep(wait)
    raise AssertionError("the last try returned or raised")
