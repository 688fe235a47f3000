"""Following a job's log over a connection that may break: it is taken up again where it was.

The job API sends a job's whole log from its first byte on every connection, so what was printed is counted and left
out the next time. A connection that is silent is not taken for a living one: the job's status is asked for meanwhile,
and after a minute another is opened. Pings would not tell, since the head's handler never reads, and so never answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import aiohttp

from ft_ray.errors import TrainingError

__all__ = ["Connection", "LostConnection", "follow"]

_QUIET = 9.5  # seconds without a line after which the job's status is asked for
_STALE = 60.0  # seconds without a line after which the log is asked for anew: the connection may be forgotten
_LONGEST_PAUSE = 15.0


class LostConnection(Exception):
    """The cluster's job API does not answer: a network that is down, a tunnel that closed, a head that restarts."""


class Connection(Protocol):
    """What following needs of a client; `jobs.Client` is one."""

    def info(self, job: str) -> Any: ...
    def tail(self, job: str) -> AsyncIterator[str]: ...


class _Follower:
    def __init__(self, client: Connection, job: str, write: Callable[[str], None], say: Callable[[str], None]) -> None:
        self._client, self._job, self._write, self._say = client, job, write, say
        self._written = 0  # characters of the log
        self._heard = time.monotonic()

    async def _read(self) -> bool:
        """Reads the log until its end. False: it was silent for long, and is to be opened anew.

        Raises what a broken connection raises.
        """
        position, last = 0, time.monotonic()
        stream = self._client.tail(self._job)
        try:
            while True:
                following = asyncio.ensure_future(anext(stream))
                try:
                    while not (await asyncio.wait({following}, timeout=_QUIET))[0]:
                        info = await asyncio.to_thread(self._client.info, self._job)
                        self._heard = time.monotonic()
                        if str(info.status) in ("PENDING", "RUNNING"):
                            self._say(f"job {self._job} is {str(info.status).lower()}")
                        if self._heard - last > _STALE:
                            return False
                    text = await following
                except StopAsyncIteration:
                    return True
                finally:
                    if not following.done():
                        following.cancel()
                        with contextlib.suppress(asyncio.CancelledError):
                            await following
                self._heard = last = time.monotonic()
                fresh = text[max(0, self._written - position) :]
                position += len(text)
                if fresh:
                    self._written = position
                    self._write(fresh)
        finally:
            closing = getattr(stream, "aclose", None)
            if closing is not None:
                await closing()

    async def run(self, patience: float) -> Any:
        pause, orphaned = min(1.0, _LONGEST_PAUSE), 0
        self._heard = time.monotonic()
        while True:
            before, reason = self._written, "the log ended while the job goes on"
            try:
                if not await self._read():
                    continue
                info = await asyncio.to_thread(self._client.info, self._job)
                if info.status.is_terminal():
                    return info
            except (LostConnection, aiohttp.ClientError, OSError, RuntimeError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                # An ended job whose log cannot be read any more: the log was on a node that is gone.
                try:
                    info = await asyncio.to_thread(self._client.info, self._job)
                    orphaned = orphaned + 1 if self._written == before else 0
                    if info.status.is_terminal() and orphaned > 2:
                        self._say("the end of its log was on a node that is gone")
                        return info
                except LostConnection:
                    orphaned = 0
            silent = time.monotonic() - self._heard
            if silent > patience:
                raise TrainingError(
                    f"the job API was out of reach for {silent:.0f} s ({reason}): the job {self._job} may go on; "
                    f"`ft-ray jobs logs {self._job}` follows it again."
                )
            self._say(f"connection lost ({reason}): trying again")
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE) if silent > pause else 1.0


def follow(
    client: Connection,
    job: str,
    *,
    write: Callable[[str], None],
    say: Callable[[str], None],
    patience: float = 600.0,
) -> Any:
    """Hands the job's log to `write` until the job has ended; returns its details (Ray's JobDetails).

    A lost connection is tried again for `patience` seconds after the last line, with what happens told to `say`.
    Raises TrainingError after that, InputError for a job or token that the cluster does not know.
    """
    return asyncio.run(_Follower(client, job, write, say).run(patience))
