"""vLLM's own routes, errors and request classes by the short way and by the long one: the same to a client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from ray.serve._private import replica
from ray.serve._private.http_util import RequestIdMiddleware
from vllm.entrypoints.openai.chat_completion import api_router as chat_router
from vllm.entrypoints.openai.completion import api_router as completion_router
from vllm.entrypoints.openai.completion.protocol import CompletionResponse, CompletionResponseChoice
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse, UsageInfo
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.exceptions import VLLMValidationError

from ft_ray import gateway, serve_replica
from ft_ray.direct_routes import DirectRoutes, fit_ray
from ft_ray.serve_args import Limits
from ft_ray.serve_replica import guarded

PATH, CHAT = "/v1/completions", "/v1/chat/completions"
TOKEN = "t"
QUESTION = {"model": "m", "prompt": "Hello", "max_tokens": 4}


class Handler:
    """Stands for vLLM's behind its route functions: what `mode` says, and what became of it."""

    def __init__(self, mode: str = "whole") -> None:
        self.mode, self.asked, self.ended = mode, list[Any](), asyncio.Event()
        self.long_way = 0

    async def create_completion(self, request: Any, raw_request: Any) -> Any:
        self.asked.append(request)
        self.headers = raw_request.headers
        self.long_way += "route" in raw_request.scope  # FastAPI leaves it there
        if self.mode in ERRORS:
            raise ERRORS[self.mode]
        if self.mode == "refusal":
            return ErrorResponse(error=ErrorInfo(message="too long", type="BadRequestError", code=400))
        if self.mode == "never":
            return await self._never()
        if self.mode == "renders":  # vLLM makes no refusal of what cancels it there
            try:
                await asyncio.sleep(60)
            finally:
                self.ended.set()
        if request.stream:
            return self._stream()
        choice = CompletionResponseChoice(index=0, text="Hi")
        usage = UsageInfo(prompt_tokens=1, total_tokens=2)
        return CompletionResponse(id="1", created=1, model="m", choices=[choice], usage=usage)

    async def _never(self) -> Any:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:  # as vLLM does
            self.ended.set()
            return ErrorResponse(error=ErrorInfo(message="Client disconnected", type="BadRequestError", code=400))

    create_chat_completion = create_completion

    async def _stream(self) -> AsyncIterator[str]:
        if self.mode == "breaks":
            raise RuntimeError("secret")
        try:
            if self.mode == "slow":
                await asyncio.sleep(0.3)
            if self.mode == "stalls at once":
                await asyncio.sleep(60)
            yield "data: 1\n\n"
            if self.mode == "stalls":
                await asyncio.sleep(60)
            yield "data: [DONE]\n\n"
        finally:
            self.ended.set()


ERRORS: dict[str, Exception] = {
    "value": ValueError("no such thing"), "http": HTTPException(418, "teapot"), "type": TypeError("of another kind"),
    "vllm": VLLMValidationError("out of range", parameter="temperature"), "any": RuntimeError("secret"),
}  # fmt: skip


def served(handler: Handler, *, short: bool = True, **limits: Any) -> FastAPI:
    """An app of vLLM's parts, guarded as a replica does it."""
    app = FastAPI()
    completion_router.attach_router(app)
    chat_router.attach_router(app)
    init_exception_handler(app)
    app.add_middleware(AuthenticationMiddleware, tokens=[TOKEN])  # as with VLLM_API_KEY
    app.state.openai_serving_completion = app.state.openai_serving_chat = handler
    app.state.args = SimpleNamespace(sse_keep_alive_interval=0, log_error_stack=False)
    guarded(app, 3, {"limits": Limits(**limits), "models": ["m"]})
    if not short:
        app.user_middleware = [m for m in app.user_middleware if m.cls is not DirectRoutes]
    return app


def ask(
    app: Any, body: Any, path: str = PATH, kind: str = "application/json", token: str = TOKEN, **more: str
) -> httpx.Response:
    headers = {"content-type": kind, "authorization": f"Bearer {token}", "x-request-id": "r1", **more}

    async def send() -> httpx.Response:
        named = RequestIdMiddleware(app)  # as Serve has it around a replica
        transport = httpx.ASGITransport(named, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post(path, content=json.dumps(body).encode(), headers=headers)

    return asyncio.run(send())


def both(mode: str, body: Any, path: str = PATH, kind: str = "application/json") -> tuple[httpx.Response, Handler]:
    """The answer, which is the same by the long way."""
    handler = Handler(mode)
    short, long = ask(served(handler), body, path, kind), ask(served(Handler(mode), short=False), body, path, kind)
    assert (short.status_code, short.text) == (long.status_code, long.text)
    assert short.headers == long.headers
    assert (short.headers.get_list("x-request-id"), short.headers["x-model-version"]) == (["r1"], "3")
    return short, handler


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_the_same_and_its_way_shorter(stream: bool) -> None:
    answer, handler = both("whole", {**QUESTION, "stream": stream, "temperature": 0.5})
    assert answer.status_code == 200 and ("[DONE]" in answer.text) is stream
    assert [type(r).__name__ for r in handler.asked] == ["CompletionRequest"] and handler.long_way == 0
    assert (handler.asked[0].prompt, handler.asked[0].temperature) == ("Hello", 0.5)


@pytest.mark.parametrize(
    ("mode", "status"), [("refusal", 400), ("value", 400), ("type", 400), ("vllm", 400), ("http", 418), ("any", 500)]
)
def test_vllms_errors_are_told_as_vllm_tells_them(mode: str, status: int) -> None:
    answer, handler = both(mode, QUESTION)
    assert answer.status_code == status and handler.long_way == 0
    assert "secret" not in answer.text


@pytest.mark.parametrize("change", [{"temperature": "warm"}, {"prompt": None}, {"stream_options": {"a": 1}}])
def test_what_does_not_validate_takes_the_long_way(change: dict[str, Any]) -> None:
    answer, handler = both("whole", {**QUESTION, **change})
    assert answer.status_code == 400 and handler.asked == []


def test_so_does_what_is_not_called_json_however_json_is_written() -> None:
    assert both("whole", QUESTION, kind="text/plain")[0].status_code == 400
    said, handler = both("whole", QUESTION, kind="Application/JSON; charset=utf-8")
    assert said.status_code == 200 and handler.long_way == 0


def test_chat_takes_the_short_way_too() -> None:
    messages = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    answer, handler = both("whole", messages, CHAT)
    assert answer.status_code == 200 and "[DONE]" in answer.text
    assert [type(r).__name__ for r in handler.asked] == ["ChatCompletionRequest"] and handler.long_way == 0
    assert both("whole", {**messages, "messages": 3}, CHAT)[0].status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_an_application_with_an_address_of_its_own_takes_the_short_way(stream: bool) -> None:
    """As Ray hands it over (replica.py, `_direct_ingress_asgi`): the prefix is in `root_path`, and in `path` still."""
    handler = Handler()
    app = served(handler)

    async def below(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "root_path": "/a"}, receive, send)

    answer = ask(below, {**QUESTION, "stream": stream}, f"/a{PATH}")
    assert answer.status_code == 200 and handler.long_way == 0 and len(handler.asked) == 1


def test_vllms_own_key_counts_on_the_short_way_too() -> None:
    handler = Handler()
    assert ask(served(handler), QUESTION, token="wrong").status_code == 401 and handler.asked == []


def test_no_header_jumps_the_queue_or_names_an_engine() -> None:
    handler = Handler()
    ask(served(handler), QUESTION, **{"X-Vllm-Priority": "-9", "x-data-parallel-rank": "3", "x-session-id": "s"})
    assert {"x-vllm-priority", "x-data-parallel-rank"}.isdisjoint(handler.headers) and "x-session-id" in handler.headers


@pytest.mark.parametrize(
    ("mode", "stream", "status", "code"),
    [("never", False, 504, "timeout"), ("stalls at once", True, 504, "timeout"), ("stalls", True, 200, "timeout"),
     ("breaks", True, 500, "internal_error")],
)  # fmt: skip
def test_a_server_that_takes_too_long_or_breaks_is_stopped(mode: str, stream: bool, status: int, code: str) -> None:
    handler = Handler(mode)
    answer = ask(served(handler, timeout=0.2), {**QUESTION, "stream": stream})
    assert answer.status_code == status and f'"code": "{code}"' in answer.text and "secret" not in answer.text
    assert handler.ended.is_set() or mode == "breaks"
    assert answer.headers["content-type"].startswith("text/event-stream" if status == 200 else "application/json")


class Connection:
    """A client that sends its request, and leaves when `leave` is set or `seen` says so of a message to it."""

    def __init__(self, body: Any, seen: Callable[[Any], bool] = lambda message: False) -> None:
        self._body: bytes | None = json.dumps(body).encode()
        self.leave, self.sent, self._seen = asyncio.Event(), list[Any](), seen
        self.scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"",
                      "headers": [(b"content-type", b"application/json"), (b"authorization", b"Bearer t")],
                      "root_path": ""}  # fmt: skip

    async def receive(self) -> Any:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if self._seen(message):
            self.leave.set()


@pytest.mark.parametrize("mode", ["never", "renders", "stalls", "stalls at once"])
def test_what_a_client_waited_for_ends_when_it_leaves(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[int, str]] = []
    monkeypatch.setattr(
        serve_replica, "RequestMetrics", lambda: lambda *, status, reason, **_: counted.append((status, reason))
    )

    async def check() -> None:
        handler = Handler(mode)
        app = served(handler, concurrency=1)
        client = Connection(
            {**QUESTION, "stream": "stalls" in mode}, lambda message: message.get("body") == b"data: 1\n\n"
        )
        if mode != "stalls":
            asyncio.get_running_loop().call_later(0.2, client.leave.set)
        await asyncio.wait_for(app(client.scope, client.receive, client.send), 5)
        assert handler.ended.is_set()
        kinds = [message["type"] for message in client.sent]
        assert kinds == (["http.response.start", "http.response.body"] if mode == "stalls" else [])
        current = asyncio.current_task()
        assert current is not None and current.cancelling() == 0
        handler.mode = "whole"
        other = Connection(QUESTION)
        await app(other.scope, other.receive, other.send)
        assert other.sent[0]["status"] == 200, "its place is free again"
        while len(counted) < 2:
            await asyncio.sleep(0.01)
        assert counted == [(200 if mode == "stalls" else 0, "disconnected"), (200, "")]
        await asyncio.sleep(0.01)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(check())


def test_a_cancellation_from_elsewhere_is_not_taken_for_a_departure() -> None:
    async def check() -> None:
        handler = Handler("never")
        client = Connection(QUESTION)
        task = asyncio.ensure_future(served(handler)(client.scope, client.receive, client.send))
        while not handler.asked:
            await asyncio.sleep(0.01)
        client.leave.set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.sent == []

    asyncio.run(check())


@pytest.mark.parametrize(("patience", "before_the_first"), [(1.0, 0), (0.05, 1)])
def test_the_head_of_a_stream_comes_with_its_first_event_or_soon(
    patience: float, before_the_first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "_HEAD_SECONDS", patience)

    async def check() -> None:
        client = Connection({**QUESTION, "stream": True})
        task = asyncio.ensure_future(served(Handler("slow"))(client.scope, client.receive, client.send))
        await asyncio.sleep(0.2)
        assert len(client.sent) == before_the_first
        await task
        assert [m["type"] for m in client.sent] == ["http.response.start"] + ["http.response.body"] * 2
        ends = [(m["body"], m["more_body"]) for m in client.sent[1:]]
        assert ends == [(b"data: 1\n\n", True), (b"data: [DONE]\n\n", False)], "the last event with the end"

    asyncio.run(check())


def test_ray_leaves_the_connection_alone_and_makes_no_labels_up(monkeypatch: pytest.MonkeyPatch) -> None:
    inner: Any = replica
    asked = inner.Replica._direct_ingress_asgi.__code__.co_names, inner.Replica._determine_http_route.__code__.co_names
    for name, where in zip(("parse_disconnect_disabled_header", "get_asgi_route_name"), asked, strict=True):
        assert name in where, "Ray looks it up at each request"
        monkeypatch.setattr(inner, name, getattr(inner, name))
    monkeypatch.setattr(inner, "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", True)
    look_up = inner.get_asgi_route_name
    fit_ray()
    assert inner.parse_disconnect_disabled_header({}) is False, "Ray's watch is the bridge to that thread"
    monkeypatch.setattr(inner, "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", False)
    fit_ray()
    assert inner.parse_disconnect_disabled_header({}) is True
    app = FastAPI()
    completion_router.attach_router(app)
    scope = {"type": "http", "method": "POST", "path": PATH, "root_path": "", "headers": []}
    assert inner.get_asgi_route_name(app, scope) == PATH
    assert inner.get_asgi_route_name(app, {**scope, "path": "/secret"}) is None
    below = {**scope, "root_path": "/a", "path": f"/a{PATH}"}
    assert inner.get_asgi_route_name(app, below) == f"/a{PATH}" == look_up(app, below)


def test_a_server_starts_and_ends_the_application() -> None:
    """The lifespan has no path: an application that fails at it is never up."""

    async def scenario() -> list[str]:
        told = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
        said: list[str] = []

        async def receive() -> dict[str, str]:
            return next(told)

        async def send(message: Any) -> None:
            said.append(message["type"])

        scope: Any = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        await served(Handler())(scope, receive, send)
        return said

    assert asyncio.run(scenario()) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
