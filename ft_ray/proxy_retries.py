"""What Ray's proxy asks again: a request whose ingress died before it answered anything, or that has no route yet.

Ray hands a request to an ingress once. When that one dies the proxy sends nothing, and the server around it a bare 500;
a stream that has begun is cut off. A proxy that has just started knows no route and answers 404. Here the client's
request is kept until its answer begins, and told again to whichever ingress there is. Completions change nothing on
the server, so that asking twice does no harm beyond the tokens of the first time; requests that may change something,
of other applications of the same Serve, pass as they are. What Ray says itself comes in OpenAI's shape.

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

from ft_ray.request_rules import COMPLETIONS, WAITED, Refused

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
_KEPT_IN_ALL = 256_000_000
"""Of all bodies together; what comes above it is asked once."""
_YOUNG_SECONDS = 60.0
_ROUTE_SECONDS, _ROUTE_PAUSE = 5.0, 0.1
"""For the first route of a proxy that is younger than that."""
_TIMEOUT = b"x-request-timeout-seconds"
"""Ray ends a request after so many seconds; a client's own is left out before."""


class Retries:
    """ASGI middleware around Ray's proxy."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app, self._born = app, time.monotonic()
        self._kept = _Kept()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if not _repeatable(scope):
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send, self._kept)
        try:
            await self._ask(scope, exchange)
        finally:
            exchange.forget()

    async def _ask(self, scope: Scope, exchange: _Exchange) -> None:
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
        exchange.id = given or uuid.uuid4().hex.encode()  # one for all times
        own = [] if given else [(b"x-request-id", exchange.id)]
        began = time.monotonic()
        pauses, deaths = iter(_PAUSES), 0
        while True:
            asked = time.monotonic()
            waited = self._waited(asked - began) if asked - began > _ROUTE_PAUSE else []
            await self._app({**scope, "headers": [*scope["headers"], *own, *waited]}, exchange.receive, exchange.send)
            if exchange.begun or exchange.gone:
                await exchange.end()
                return
            now = time.monotonic()
            if exchange.routeless:
                if now - began > _ROUTE_SECONDS or now - self._born > _YOUNG_SECONDS or not exchange.rewind():
                    await exchange.say(_ROUTELESS)
                    return
                pause: float | None = _ROUTE_PAUSE
            else:
                deaths += now - asked > _DEATH_SECONDS
                pause = next(pauses, None) if deaths < _DEATHS else None
            if pause is None or not exchange.rewind():
                log.error("request %s failed: its ingress died", exchange.id.decode("latin-1"))
                await exchange.say(_DIED)
                return
            await asyncio.sleep(pause)

    def _waited(self, seconds: float) -> list[tuple[bytes, bytes]]:
        """Headers by which the next ingress, and Ray while it looks for one, count what has passed."""
        found = [(WAITED, b"%.3f" % seconds)]
        # Ray's proxy, below its middleware for request ids; http_options.request_timeout_s.
        most = getattr(getattr(self._app, "_app", None), "request_timeout_s", None)
        return [*found, (_TIMEOUT, b"%.3f" % max(0.001, most - seconds))] if most else found


def _repeatable(scope: Scope) -> bool:
    """Whether a request is one of ours, below whatever prefix: none of those changes anything."""
    if scope["type"] != "http":
        return False
    path, method = scope["path"], scope["method"]
    if method == "POST":
        return bool(path.endswith(COMPLETIONS))
    return method == "GET" and (path.endswith(("/v1/models", "/health")) or "/v1/models/" in path)


_DIED = Refused(503, "unavailable", "the process that answered this request died: try again.")
_ROUTELESS = Refused(404, "unknown_url", "nothing is served here.")
_RAYS = {
    408: Refused(504, "timeout", "no answer within the time that a request has here."),
    503: Refused(503, "unavailable", "no replica can take this request now: try again."),
}
"""What Ray's proxy says in plain text by itself."""


class _Kept:
    """Bytes of bodies that are kept for a further time, of all requests."""

    size = 0


class _Exchange:
    """One request of a client: what it has said, kept until its answer begins, and how far the answer is.

    The head of an answer is held back until its body comes, but a stream's, which the gateway sends when it has to.
    """

    id = b""

    def __init__(self, receive: Any, send: Any, kept: _Kept) -> None:
        self._receive, self._send, self._kept = receive, send, kept
        self._said: list[Message] | None = []
        self._size = self._next = 0
        self._head: Message | None = None
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
            size = len(message.get("body", b""))
            self._size += size
            self._kept.size += size
            self._said.append(message)
            self._next += 1
            if self._size > _KEPT_BYTES or self._kept.size > _KEPT_IN_ALL:
                self.forget()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = next((value for name, value in message["headers"] if name.lower() == b"content-type"), b"")
            self._stream = kind.startswith(b"text/event-stream")
            self._head = message
            if self._stream:
                await self._begin()
            return
        if self._head is not None and await self._rays_own(self._head, message):
            return
        self._ended = not message.get("more_body", False)
        if self._head is not None:
            await self._begin()
        await self._send(message)

    async def _rays_own(self, head: Message, message: Message) -> bool:
        """Whether an answer is the proxy's own; ours, and all of vLLM's, are JSON or events."""
        kind = next((value for name, value in head["headers"] if name.lower() == b"content-type"), b"")
        if not kind.startswith(b"text/plain") or message.get("more_body", False):
            return False
        body = message.get("body", b"")
        if head["status"] == 404 and body.startswith(b"Path '") and b"/-/routes" in body:
            self.routeless = True
        elif head["status"] in _RAYS:
            await self.say(_RAYS[head["status"]])
        else:
            return False
        return True

    async def _begin(self) -> None:
        """Sends the head. From then on nothing can be asked again."""
        head, self._head, self.begun = self._head, None, True
        self.forget()
        await self._send(head)

    def forget(self) -> None:
        """What the client has said is not kept any longer."""
        if self._said is not None:
            self._kept.size -= self._size
            self._said = None

    def rewind(self) -> bool:
        """For another time; whether there can be one."""
        self._next, self._head, self.routeless = 0, None, False
        return self._said is not None

    async def end(self) -> None:
        """Says to a client whose stream was cut off that it was."""
        if self._stream and not self._ended and not self.gone:
            event = b"data: " + json.dumps(_DIED.body()).encode() + b"\n\n"
            await self._send({"type": "http.response.body", "body": event, "more_body": False})

    async def say(self, refused: Refused) -> None:
        """An answer of our own, where none has begun."""
        self.begun = self._ended = True
        body = json.dumps(refused.body()).encode()
        headers = [
            (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"x-request-id", self.id),
            *([(b"retry-after", b"1")] if refused.status == 503 else []),
        ]  # fmt: skip
        await self._send({"type": "http.response.start", "status": refused.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})
