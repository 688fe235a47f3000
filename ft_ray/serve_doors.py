"""Ray Serve's HTTP servers, the proxy and in direct mode the replica, before any guard of ours sees a request.

Headers: Serve acts on some of a client's, and without a key. It keeps each new value of a multiplexed model's name (its
table grows), ends a request after as many seconds as a header says, generates on for a client that has left, and
answers a request id that is no UTF-8 with a plain 500. Clients that dawdle: uvicorn waits for the rest of a request's
head, and for a client that does not read its answer, as long as the client likes. What the proxy itself would lose is
asked again by `proxy_retries`.

Both servers call what `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names (`env_vars.SERVE_DOORS`) for middleware,
before they start. Imported by Ray's proxy: this module needs Starlette and uvicorn with httptools alone, as ray[serve]
brings them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware
from uvicorn.protocols.http import auto
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ft_ray.env_vars import HAPROXY
from ft_ray.proxy_retries import Retries
from ft_ray.request_rules import WAITED

__all__ = ["PlainHeaders", "PromptClients", "middleware"]

HEAD_SECONDS = 30.0
"""For a connection's first byte, and from each request's first byte for the rest of its head."""
UNREAD_SECONDS = 60.0
"""Without any room for more on the client's side, or any sign of it: as HAProxy has it in `serve_direct`."""

_DROPPED = frozenset((
    b"serve-multiplexed-model-id", b"x-request-timeout-seconds", b"x-request-disconnect-disabled", WAITED,
))  # fmt: skip
_NAMES = frozenset((b"x-request-id", b"x-session-id"))  # read as UTF-8, logged, and sent back
_NAME = re.compile(rb"[A-Za-z0-9._-]{1,64}")

Scope = MutableMapping[str, Any]


class PlainHeaders:
    """ASGI middleware: leaves out the headers by which a client would steer Ray, and names that are no plain names."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            scope = {**scope, "headers": [header for header in scope["headers"] if _passes(*header)]}
        await self._app(scope, receive, send)


def _passes(name: bytes, value: bytes) -> bool:
    known = name.lower().replace(b"_", b"-")  # Ray takes either
    return known not in _DROPPED and (known not in _NAMES or _NAME.fullmatch(value) is not None)


class PromptClients(HttpToolsProtocol):
    """uvicorn's connection, which ends one that does not say its request or does not read its answer."""

    _late: asyncio.TimerHandle | None = None
    _begun = False  # the head of a request that is waited for

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection is not None and hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: tcp(7), an unread window counts
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * UNREAD_SECONDS))
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # uvicorn has stopped the clock between two requests for any byte: for one that begins none, or is left of the
        # body of one that was refused, it starts again here.
        ticking = self._late is not None or self.timeout_keep_alive_task is not None
        if not ticking and self._idle() and not self.transport.is_closing() and self.transport.get_protocol() is self:
            self._wait()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun = True
        self._wait()

    def on_headers_complete(self) -> None:
        self._begun = False
        self._arrived()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._arrived()
        self._late = self.loop.call_later(HEAD_SECONDS, self._end)

    def _arrived(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _end(self) -> None:
        self._late = None
        if self.transport.is_closing():
            return
        if not self._idle():  # the next request has begun within the answer to this one, and may be held back by it
            self._wait()
            return
        if self._begun:  # who has said nothing is told nothing: it may be a connection for later
            self.transport.write(STATUS_LINE[408] + b"content-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()


def middleware() -> list[Middleware]:
    """What Serve's HTTP servers take: Starlette's descriptions of middleware, from the innermost to the outermost.

    Has the servers of this process, which are made after it, take `PromptClients` for their connections. With HAProxy
    at the door the servers are the replicas themselves: one that has died asks nobody again.
    """
    auto.AutoHTTPProtocol = PromptClients
    again = [] if os.environ.get(HAPROXY) == "1" else [Middleware(Retries)]
    return [*again, Middleware(PlainHeaders)]
