"""What Ray's proxy asks again: a request whose ingress died before it answered anything, or that has no route yet.

Ray hands a request to an ingress once. When that one dies the proxy sends nothing, and the server around it a bare 500;
a stream that has begun is cut off. A proxy that has just started knows no route and answers 404. Here the client's
request is kept until its answer begins, and told again to whichever ingress there is. Completions change nothing on
the server, so that asking twice does no harm beyond the tokens of the first time.

Imported by Ray's proxy, as `serve_doors` is.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ft_ray.request_rules import WAITED, Refused

__all__ = ["Retries"]

log = logging.getLogger("ft_ray.serving")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]

_PAUSES = (0.0, 0.5, 2.0)
"""Seconds before each further time: an ingress that was killed is listed until it was found dead."""
# As within the ingress: one that is known to be dead fails at once, one that dies later may have died of the request.
_DEATH_SECONDS = 0.1
_DEATHS = 2
_KEPT_BYTES = 4_000_000
"""Of a request's body; one that is larger is asked once."""
_YOUNG_SECONDS = 60.0
_ROUTE_SECONDS, _ROUTE_PAUSE = 5.0, 0.1
"""For the first route of a proxy that is younger than that."""


class Retries:
    """ASGI middleware around Ray's proxy."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app, self._born = app, time.monotonic()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send)
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
        name = given or uuid.uuid4().hex.encode()  # one for all times
        own = [] if given else [(b"x-request-id", name)]
        began = time.monotonic()
        pauses, deaths = iter(_PAUSES), 0
        while True:
            asked = time.monotonic()
            waited = [(WAITED, b"%.3f" % (asked - began))] if asked - began > _ROUTE_PAUSE else []
            await self._app({**scope, "headers": [*scope["headers"], *own, *waited]}, exchange.receive, exchange.send)
            if exchange.begun or exchange.gone:
                await exchange.end()
                return
            now = time.monotonic()
            if exchange.routeless:
                if now - began > _ROUTE_SECONDS or now - self._born > _YOUNG_SECONDS:
                    await exchange.flush()
                    return
                pause: float | None = _ROUTE_PAUSE
            else:
                deaths += now - asked > _DEATH_SECONDS
                pause = next(pauses, None) if deaths < _DEATHS else None
            if pause is None or not exchange.rewind():
                log.error("request %s failed: its ingress died", name.decode("latin-1"))
                await exchange.refuse(name)
                return
            await asyncio.sleep(pause)


_DIED = Refused(503, "unavailable", "the process that answered this request died: try again.")


class _Exchange:
    """One request of a client: what it has said, kept until its answer begins, and how far the answer is.

    The head of an answer is held back until its body comes, but a stream's, which the gateway sends when it has to.
    """

    def __init__(self, receive: Any, send: Any) -> None:
        self._receive, self._send = receive, send
        self._said: list[Message] | None = []
        self._size = self._next = 0
        self._held: list[Message] = []
        self.begun = self.gone = self.routeless = False
        self._stream = self._ended = False

    async def receive(self) -> Message:
        if self._said is not None and self._next < len(self._said):
            self._next += 1
            return self._said[self._next - 1]
        message: Message = await self._receive()
        if message["type"] == "http.disconnect":
            self.gone = True
        elif self._said is not None:
            self._size += len(message.get("body", b""))
            if self._size > _KEPT_BYTES:
                self._said = None
            else:
                self._said.append(message)
                self._next += 1
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = next((value for name, value in message["headers"] if name.lower() == b"content-type"), b"")
            self._stream = kind.startswith(b"text/event-stream")
            self.routeless = message["status"] == 404 and kind.startswith(b"text/plain")  # ours are JSON
            self._held.append(message)
            if self._stream:
                await self.flush()
            return
        if self.routeless:
            self._held.append(message)
            return
        self._ended = not message.get("more_body", False)
        if self._held:
            await self.flush()
        await self._send(message)

    async def flush(self) -> None:
        """Sends what was held back. From then on nothing can be asked again."""
        held, self._held, self._said, self.begun = self._held, [], None, True
        for message in held:
            await self._send(message)

    def rewind(self) -> bool:
        """For another time; whether there can be one."""
        self._next, self._held, self.routeless = 0, [], False
        return self._said is not None

    async def end(self) -> None:
        """Says to a client whose stream was cut off that it was."""
        if self._stream and not self._ended and not self.gone:
            event = b"data: " + json.dumps(_DIED.body()).encode() + b"\n\n"
            await self._send({"type": "http.response.body", "body": event, "more_body": False})

    async def refuse(self, request_id: bytes) -> None:
        body = json.dumps(_DIED.body()).encode()
        headers = [
            (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"retry-after", b"1"),
            (b"x-request-id", request_id),
        ]  # fmt: skip
        await self._send({"type": "http.response.start", "status": 503, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})
