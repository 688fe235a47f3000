"""The driver's ear: takes what the ranks and Ray's controller post off the board and tells it to the user."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import ray

from ft_ray.errors import TrainingError
from ft_ray.run_lock import lose

__all__ = ["Listener", "OnEvent"]

OnEvent = Callable[[dict[str, Any]], None]
_HEARTBEAT = 8.0


class Listener:
    """Takes rank 0's events off the board, and never lets the user wait in silence. One for all rungs of the ladder."""

    def __init__(self, on_event: OnEvent, stop: threading.Event | None, retries: int) -> None:
        self._board: Any = None
        self._on_event, self._stop, self._allowed = on_event, stop, retries
        self.faults: list[str] = []
        self.stood_still: list[float] = []
        self.retries = 0  # that counted
        self._said, self._message = time.monotonic(), ""
        self._pending: deque[dict[str, Any]] = deque()
        self.stopping = False
        self.resumed: int | None = None  # the step that the first workers of this command went on from; 0: the start

    def listen_to(self, board: Any) -> None:
        self._board = board
        if self.stopping:
            ray.get(board.stop.remote(), timeout=30)
        self._tell({"kind": "status", "message": "starting workers"})

    def say(self, message: str) -> None:
        self._tell({"kind": "status", "message": message})

    def ask_to_stop(self) -> None:
        self.stopping = True
        self._tell({"kind": "status", "message": "stopping after this step, with a checkpoint"})
        ray.get(self._board.stop.remote(), timeout=30)

    def turn(self, last: bool = False) -> None:
        if self._stop is not None and self._stop.is_set() and not self.stopping:
            self.ask_to_stop()
        try:
            self._pending.extend(ray.get(self._board.take.remote(), timeout=60))
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError) as error:
            message = "the process that carries the workers' messages here has ended: run the same command again."
            raise TrainingError(message) from error
        while self._pending:
            event = self._pending.popleft()  # one at a time: Ctrl-C in the middle loses none
            if event["kind"] == "lost":
                self.tell_lost(event["what"], counts=event["counts"])
            elif event["kind"] == "resumed":  # after a worker was lost the others go on from what this command saved
                self.resumed = event["step"] if self.resumed is None else self.resumed
            elif event["kind"] == "ousted":
                lose(event["url"], event["message"])
            elif event["kind"] != "start":
                self._tell(event)
        silent = time.monotonic() - self._said
        if silent >= _HEARTBEAT and not last:
            self._on_event({"kind": "status", "message": self._message, "heartbeat": True})
            self._said = time.monotonic()

    @property
    def retries_left(self) -> int:
        return max(0, self._allowed - self.retries)

    def tell_lost(self, what: str, *, counts: bool) -> None:
        self.faults.append(what)
        self.retries += counts
        number = f"retry {self.retries}, {self._allowed} are allowed" if counts else "no retry spent"
        self.say(f"{what}: starting again from the last checkpoint ({number})")

    def _tell(self, event: dict[str, Any]) -> None:
        self._said = time.monotonic()
        if event["kind"] == "status":
            self._message = event["message"]
        elif event["kind"] == "checkpoint":
            self.stood_still.append(event["stood_still"])
        elif event["kind"] == "step":
            self._message = f"step {event['step'] + 1} of {event['total']}"
        self._on_event(event)
