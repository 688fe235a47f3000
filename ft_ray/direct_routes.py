"""vLLM's two completion routes by a short way: what one request costs the process that answers it in direct mode.

When many clients ask at once, the last one waits for its first token until this process has taken in all of them. Ray
Serve's part and the guards made that up to a quarter longer than in bare vLLM (benchmarks/README.md, "The endpoint");
what FastAPI does for routes of any shape, in both, is left out to make up for it. Here the body that the guards have
parsed becomes vLLM's request, vLLM's own route function is called with it, and one task, not five, listens for a client
that leaves. All that is unusual takes the long way: vLLM's app, with its errors. FastAPI, Starlette, Ray and vLLM are
pinned.
"""

from __future__ import annotations

import asyncio
import typing
from types import TracebackType
from typing import Any

from fastapi.routing import APIRoute
from starlette._utils import get_route_path
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import StreamingResponse

from ft_ray.gateway import BODY, App, Receive, Scope, Send
from ft_ray.request_rules import COMPLETIONS

__all__ = ["DirectRoutes", "fit_ray"]



class DirectRoutes:
    """ASGI middleware of `routes_of`, a FastAPI app of vLLM's, next to its routes: all other middleware comes first."""

    def __init__(self, app: App, *, routes_of: Any) -> None:
        self._app, self._routes = app, dict[str, tuple[Any, Any]]()
        for route in routes_of.routes:
            if isinstance(route, APIRoute) and route.path in COMPLETIONS:
                endpoint: Any = route.endpoint
                # Below vLLM's `with_cancellation`, which is two of the five tasks.
                self._routes[route.path] = (typing.get_type_hints(endpoint)["request"], endpoint.__wrapped__)
        assert self._routes.keys() == set(COMPLETIONS), "these routes are looked for in another place"
        # As Starlette shares them out: what is registered for any exception is the outermost middleware's.
        self._handlers = {k: v for k, v in routes_of.exception_handlers.items() if k not in (500, Exception)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = get_route_path(scope) if scope["type"] == "http" else ""  # the lifespan has none
        model, endpoint = self._routes.get(path, (None, None))
        asked = _validated(model, scope) if model is not None else None
        if asked is None or endpoint is None:
            await self._app(scope, receive, send)
            return
        await receive()  # the body, which is known
        response: Any = None  # stays so where a client leaves before there is one, while its prompt is made tokens
        with _Departure(receive) as departure:
            try:
                response = await endpoint(asked, Request(scope, receive))
            except Exception as error:
                await ExceptionMiddleware(_raising(error), handlers=self._handlers)(scope, receive, send)
                return
            departure.raise_if_cancelled()
            if not isinstance(response, StreamingResponse):
                await response(scope, receive, send)
                return
            await response.stream_response(send)
        if response is not None and response.background is not None:
            await response.background()


def _validated(model: Any, scope: Scope) -> Any:
    """vLLM's request of a JSON body; None for one that is not, which the long way refuses in its own words."""
    body = scope.pop(BODY, None)
    kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    if kind.lower().partition(b";")[0] != b"application/json" or body is None:
        return None
    try:
        return model.model_validate(body)
    except Exception:  # vLLM's validators raise errors of their own beside pydantic's
        return None


def _raising(error: Exception) -> App:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    return app


class _Departure:
    """Cancels what the current task does inside when the client goes away, and ends there in silence."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._inside, self._left = receive, True, False

    def __enter__(self) -> _Departure:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._before = task, task.cancelling()
        self._watch = asyncio.ensure_future(self._until_gone())
        self._watch.add_done_callback(self._gone)
        return self

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def _gone(self, watch: asyncio.Future[None]) -> None:
        if self._inside and not watch.cancelled() and watch.exception() is None:
            self._left = True
            self._task.cancel()

    def raise_if_cancelled(self) -> None:
        """vLLM makes a refusal, 'Client disconnected', of whatever cancels it: our timeout, too."""
        if self._task.cancelling() > self._before:
            raise asyncio.CancelledError

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._inside = False
        self._watch.cancel()
        if not self._left:
            return False
        alone = self._task.uncancel() <= self._before
        return alone and kind is asyncio.CancelledError


def fit_ray() -> None:
    """For this replica: Ray does not watch the connection too, nor look through all routes for a request's name.

    Its own watch takes two tasks and a queue a request; where the user's code has a thread of its own it stays, since
    it is also the bridge between the two. The name is a label of Ray's metrics; any but the routes above is looked up
    as ever, so that a client cannot make labels up.
    """
    from ray.serve._private import replica

    inner: Any = replica
    look_up = inner.get_asgi_route_name

    def name(app: Any, scope: Any) -> Any:
        path = get_route_path(scope)
        return scope.get("root_path", "") + path if path in COMPLETIONS else look_up(app, scope)

    inner.get_asgi_route_name = name
    if not inner.RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD:
        inner.parse_disconnect_disabled_header = lambda headers: True
