"""The guards of an endpoint: one pure-ASGI middleware around the OpenAI routes.

Only listed routes exist; every other path is a 404. A request is refused before it costs anything: without a
valid key, too large, too long, too many at once, or asking for what the server does not let a client choose.
Errors have OpenAI's shape. Nothing of a prompt or an answer is ever logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any, Protocol

from starlette._utils import get_route_path

from ft_ray.api_keys import Keys
from ft_ray.idle_calls import later
from ft_ray.request_rules import COMPLETIONS, WAITED, Refused, check, parse
from ft_ray.serve_args import Limits

__all__ = ["BODY", "VERSION", "Gateway", "Observer"]

log = logging.getLogger("ft_ray.gateway")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_ROUTES = {
    "/v1/models": "GET",
    "/health": "GET",
    **dict.fromkeys(COMPLETIONS, "POST"),
}
_MODEL = re.compile(r"^/v1/models/[^/].*$")
_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
# The first is set anew; by the others vLLM lets a client jump its queue or choose an engine.
_DROPPED = frozenset((b"x-request-id", b"x-vllm-priority", b"x-data-parallel-rank"))
_HEAD_SECONDS = 1.0
_LAST_WORD_SECONDS = 10.0
_LAST_EVENT = b"data: [DONE]\n\n"  # nothing follows it but the end
_ERROR_EVENT = b'data: {"error"'  # how an event begins in which vLLM says that a stream failed

BODY = "ft_ray.body"
"""Key of the ASGI scope under which the app finds the parsed body of a request that passed."""
VERSION = "ft_ray.version"
"""Key of the ASGI scope under which the app says which version of the model answers."""


class Observer(Protocol):
    """Counts requests. Nothing that a client chooses freely reaches it, so that labels stay few."""

    def __call__(
        self, *, model: str, version: str, stream: bool, status: int, reason: str, seconds: float, first: float | None
    ) -> None:
        """`reason`: code of a refusal or failure ('status_400' and so on of one that is the app's own), 'disconnected'
        for a client that went away, '' for a whole answer.

        `status`: 0 when nothing was sent. `first`: seconds to the first token of a stream.
        """


class Gateway:
    """ASGI middleware. `models`: names that answer; `keys`: address of the API keys, None asks for none.

    With `keep_body` the app finds the parsed body of a request under BODY in its scope. `named`: the server around it
    names each request in its answer, as Ray's does, by the id that it also tells in the request's headers.
    """

    def __init__(
        self,
        app: App,
        *,
        limits: Limits,
        keys: str | None = None,
        models: Collection[str] = (),
        observer: Observer | None = None,
        keep_body: bool = False,
        named: bool = False,
    ) -> None:
        self._app, self._limits, self._models, self._keep_body = app, limits, frozenset(models), keep_body
        self._observer, self._named = observer, named
        self._only = next(iter(self._models)) if len(self._models) == 1 else ""
        self._keys = Keys(keys) if keys else None
        self._active, self._receiving = 0, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no websockets
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
            return
        answer = _Answer(scope, send, self._named)
        started = time.monotonic()
        try:
            await self._guarded(scope, receive, answer)
        except Refused as refused:
            await answer.refuse(refused)
        except TimeoutError:
            await answer.refuse(Refused(504, "timeout", f"no answer within {self._limits.timeout:g} seconds."))
        except Exception as error:  # the app has logged it; its text may hold parts of a prompt
            log.error("request %s failed: %s", answer.id, type(error).__name__)
            await answer.refuse(Refused(500, "internal_error", "the server failed to answer this request."))
        finally:
            answer.settle()
            seconds = time.monotonic() - started
            log.debug("%s %s %s %s %.3fs", answer.id, scope["method"], scope["path"], answer.status, seconds)
            if self._observer is not None and get_route_path(scope) != "/health":
                # Who is refused may have named no model, or one that is not here: it is the only one's refusal.
                model = answer.model or (self._only if answer.reason else "")
                report = functools.partial(
                    self._observer,
                    model=model if model in self._models else "",
                    version=str(scope.get(VERSION, "")),
                    stream=answer.streams,
                    status=answer.status,
                    reason=answer.reason,
                    seconds=seconds,
                    first=answer.first - started if answer.first and answer.streaming else None,
                )
                later(report)

    async def _guarded(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        path, method = get_route_path(scope), scope["method"]  # Serve leaves an application's prefix in the path
        wanted = "GET" if _MODEL.match(path) else _ROUTES.get(path)
        if wanted is None:
            await answer.refuse(Refused(404, "unknown_url", f"unknown request URL: {method} {path[:100]}."))
            return
        if method != wanted:
            await answer.refuse(Refused(405, "method_not_allowed", f"{path} takes {wanted}."), {"allow": wanted})
            return
        if path == "/health":
            await answer.json(200, {"status": "ok"})
            return
        if self._keys is not None and await self._keys.owner(_bearer(scope)) is None:
            await answer.refuse(
                Refused(401, "invalid_api_key", "no valid API key: send 'Authorization: Bearer KEY'."),
                {"www-authenticate": "Bearer"},
            )
            return
        if method == "GET":
            async with asyncio.timeout(self._left(scope)):
                await self._app(scope, receive, answer.send)
            return
        most = self._limits.concurrency
        busy = Refused(429, "rate_limit_exceeded", f"{most} requests are in progress, the most at once: try again.")
        # A slow sender holds no place of those that are answered, but slow senders may not pile up either.
        if self._active >= most or self._receiving >= 2 * most:
            raise busy
        self._receiving += 1
        try:
            raw = await self._body(scope, receive)
        finally:
            self._receiving -= 1
        body = parse(raw)
        answer.model = check(body, self._limits, self._models) or self._only
        if self._keep_body:
            scope[BODY] = body
        del body
        if self._active >= most:
            raise busy
        self._active += 1
        try:
            async with asyncio.timeout(self._left(scope)):
                await self._app(scope, _replay(raw, receive), answer.send)
        finally:
            self._active -= 1

    def _left(self, scope: Scope) -> float:
        """Seconds for the answer: less for a request that another ingress had before, which died with it."""
        said = next((value for name, value in scope["headers"] if name == WAITED), b"0")
        with contextlib.suppress(ValueError):
            return max(0.0, self._limits.timeout - max(0.0, float(said)))
        return self._limits.timeout

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._limits.body_bytes
        too_large = Refused(413, "request_too_large", f"the request is larger than {limit} bytes.")
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > limit:
                raise too_large
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self._limits.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "disconnected", "the client went away.")
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limit:
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(chunks)
        except TimeoutError:
            slow = f"the request did not arrive within {self._limits.body_timeout:g} seconds."
            raise Refused(408, "request_timeout", slow) from None


class _Answer:
    """The response of one request: adds its id, and turns a failure into what can still be said.

    The head of a stream goes out with its first event: until then a failure has a status. After a second it goes alone:
    clients and proxies have limits of their own for how long they wait for one. The last event goes with the end.
    """

    def __init__(self, scope: Scope, send: Send, named: bool) -> None:
        self._send, self.status, self.streaming, self._ended = send, 0, False, False
        self._head: Message | None = None
        self._last = b""
        self._patience: asyncio.TimerHandle | None = None
        self.streams = False
        self._scope, self.model, self.reason, self.first = scope, "", "", 0.0
        given = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"x-request-id"), "")
        self._named = named and _REQUEST_ID.match(given) is not None
        self.id = given if _REQUEST_ID.match(given) else uuid.uuid4().hex
        others = [h for h in scope["headers"] if h[0] not in _DROPPED]
        scope["headers"] = [*others, (b"x-request-id", self.id.encode())]

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [h for h in message.get("headers", []) if h[0].lower() != b"x-request-id"]
            headers += [] if self._named else [(b"x-request-id", self.id.encode())]
            names = {h[0].lower(): h[1] for h in headers}
            self.streaming = names.get(b"content-type", b"").startswith(b"text/event-stream")
            if self.status in (429, 503) and b"retry-after" not in names:
                headers.append((b"retry-after", b"1"))
            if self._scope.get(VERSION):
                headers.append((b"x-model-version", str(self._scope[VERSION]).encode()))
            message = {**message, "headers": headers}
            if self.streaming:
                self.streams, self._head = True, message
                self._patience = asyncio.get_running_loop().call_later(_HEAD_SECONDS, self._lose_patience)
                return
        elif message["type"] == "http.response.body":
            body, more = message.get("body", b""), message.get("more_body", False)
            if self.streaming and body.startswith(_ERROR_EVENT):
                self.reason = self.reason or _failure(body)
            if not self.reason:
                self.first = self.first or time.monotonic()
            await self._send_head()
            if more and self.streaming and body == _LAST_EVENT and not self._last:
                self._last = body
                return
            if self._last:
                message, self._last = {**message, "body": self._last + body}, b""
            self._ended = not more
        await self._send(message)

    async def _send_head(self) -> None:
        head = self.take_head()
        if head is not None:
            await self._send(head)

    def take_head(self) -> Message | None:
        """The head that was held back, which nobody sends from then on but the caller."""
        head, self._head = self._head, None
        if self._patience is not None:
            self._patience.cancel()
        return head

    def settle(self) -> None:
        """After the last message: what did not end was left by its client, or its server ended first."""
        if self.take_head() is not None:
            self.status = 0  # the client never saw it
        if not self._ended:
            self.reason = self.reason or "disconnected"
        elif self.status >= 400:  # what the app itself refuses or fails at is no answer either
            self.reason = self.reason or f"status_{self.status}"

    def _lose_patience(self) -> None:
        if self._head is not None:
            self._sending = asyncio.ensure_future(self._send_head())

    async def json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        fields = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        encoded = [(k.encode(), v.encode("latin-1", "replace")) for k, v in fields.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": encoded})
        await self.send({"type": "http.response.body", "body": body})

    async def refuse(self, refused: Refused, headers: dict[str, str] | None = None) -> None:
        """The error as a response, or as the last event of a stream that has begun."""
        self.reason = refused.code
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_LAST_WORD_SECONDS):  # who does not read would hold the connection
                await self._refuse(refused, headers)

    async def _refuse(self, refused: Refused, headers: dict[str, str] | None) -> None:
        if self.take_head() is not None:
            self.status = 0
        if not self.status:
            await self.json(refused.status, refused.body(), headers)
        elif not self._ended:
            event = b"data: " + json.dumps(refused.body()).encode() + b"\n\n" if self.streaming else b""
            await self.send({"type": "http.response.body", "body": event, "more_body": False})


def _failure(event: bytes) -> str:
    """A label for an error event: its code where that is a status, never a text, which a model could choose."""
    try:
        code = json.loads(event[len(b"data: ") :].partition(b"\n")[0])["error"]["code"]
    except (ValueError, TypeError, KeyError):
        code = None
    return f"stream_error_{code}" if type(code) is int and 400 <= code <= 599 else "stream_error"


def _bearer(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            return key.strip() if scheme.lower() == "bearer" else ""
    return ""


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once, then whatever the server says (a client that goes away)."""
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
