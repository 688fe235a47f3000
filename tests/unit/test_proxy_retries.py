"""The proxy's requests are asked again where their ingress died before it answered, and only there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ft_ray import proxy_retries
from ft_ray.proxy_retries import Retries
from ft_ray.request_rules import WAITED

Step = Callable[[Any, Any, Any], Awaitable[None]]
HEAD = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
STREAM = {**HEAD, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}
LOST = {**HEAD, "status": 404, "headers": [(b"Content-Type", b"text/plain; charset=utf-8")]}
NO_ROUTE = b"Path '/v1/completions' not found. Ping http://.../-/routes for available routes."
WHOLE = {"type": "http.response.body", "body": b"{}"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_retries, "_PAUSES", (0.0, 0.01, 0.02))
    monkeypatch.setattr(proxy_retries, "_DEATH_SECONDS", 0.05)
    monkeypatch.setattr(proxy_retries, "_ROUTE_PAUSE", 0.01)
    monkeypatch.setattr(proxy_retries, "_ROUTE_SECONDS", 0.1)


class Run:
    """Asks through the middleware. `steps`: what the ingress does each time; the last one for all later times.

    As Ray's proxy it reads what the client says in a task of its own, which is cancelled when the ingress dies.
    """

    def __init__(
        self, *steps: Step, said: list[Any] | None = None, headers: Any = (), then: Any = None, method: str = "POST",
        path: str = "/v1/completions", ray_timeout: float | None = None,
    ) -> None:  # fmt: skip
        self._asked, self._ray_timeout = {"method": method, "path": path}, ray_timeout
        self.scopes: list[Any] = []
        self.bodies: list[bytes] = []
        self.sent: list[Any] = []
        asyncio.run(self._run(list(steps), said, list(headers), then))

    async def _run(self, steps: list[Step], said: list[Any] | None, headers: list[Any], then: Any) -> None:
        client: asyncio.Queue[Any] = asyncio.Queue()
        for part in said if said is not None else [b"abc"]:
            client.put_nowait(part if isinstance(part, dict) else {"type": "http.request", "body": part})

        async def proxy(scope: Any, receive: Any, send: Any) -> None:
            self.scopes.append({**scope, "headers": dict(scope["headers"])})
            scope["headers"].append((b"x-added", b"by Ray"))
            scope["root_path"] = "/changed"
            self.bodies.append(b"")

            async def listen() -> None:
                while (message := await receive())["type"] != "http.disconnect":
                    self.bodies[-1] += message.get("body", b"")

            listener = asyncio.create_task(listen())
            await asyncio.sleep(0.005)
            try:
                await steps[min(len(self.scopes), len(steps)) - 1](scope, receive, send)
                if then is not None:
                    client.put_nowait(then)
                    await asyncio.sleep(0.005)
            finally:
                listener.cancel()

        async def send(message: Any) -> None:
            self.sent.append(message)

        class Names:  # as Ray's middleware holds its proxy
            _app = SimpleNamespace(request_timeout_s=self._ray_timeout)

            async def __call__(self, *given: Any) -> None:
                await proxy(*given)

        scope = {"type": "http", **self._asked, "root_path": "", "headers": headers}
        retries = Retries(Names())
        await asyncio.wait_for(retries(scope, client.get, send), 10)
        assert retries._kept.size == 0, "what was kept is let go"
        if proxy_retries._repeatable(scope):
            assert scope["root_path"] == "" and scope["headers"] == list(headers), "what comes first stays as it is"

    def said(self) -> tuple[int, Any]:
        head, *rest = self.sent
        return head["status"], json.loads(b"".join(message["body"] for message in rest))


async def dies(*_: Any) -> None:
    """Ray's proxy sends nothing then."""


async def dies_late(*_: Any) -> None:
    await asyncio.sleep(0.08)


async def answers(scope: Any, receive: Any, send: Any) -> None:
    await send(HEAD)
    await send(WHOLE)


async def dies_with_its_head_sent(scope: Any, receive: Any, send: Any) -> None:
    await send(HEAD)


async def has_no_route(scope: Any, receive: Any, send: Any) -> None:
    await send(LOST)
    await send({**WHOLE, "body": NO_ROUTE})


@pytest.mark.parametrize("fault", [dies, dies_late, dies_with_its_head_sent])
def test_a_request_whose_ingress_died_is_asked_again_as_it_was(fault: Step) -> None:
    run = Run(fault, answers, said=[b"ab", b"cd"], headers=[(b"x-request-id", b"mine"), (b"a", b"b")])
    assert run.sent == [HEAD, WHOLE]
    assert run.bodies == [b"abcd", b"abcd"]
    assert [scope["root_path"] for scope in run.scopes] == ["", ""]
    first, second = (scope["headers"] for scope in run.scopes)
    assert first == {b"x-request-id": b"mine", b"a": b"b"}
    assert {**first, WAITED: second.get(WAITED)} == {WAITED: None, **second}
    if fault is dies_late:
        assert 0.05 < float(second[WAITED]) < 5


def test_all_times_have_one_request_id() -> None:
    run = Run(dies, dies, answers)
    names = {scope["headers"][b"x-request-id"] for scope in run.scopes}
    assert len(run.scopes) == 3 and len(names) == 1 and len(names.pop()) == 32


def test_one_that_is_known_to_be_dead_costs_no_more_than_four_times() -> None:
    run = Run(dies)
    status, body = run.said()
    assert len(run.scopes) == 4 and status == 503 and body["error"]["code"] == "unavailable"
    headers = dict(run.sent[0]["headers"])
    assert headers[b"retry-after"] == b"1"
    assert headers[b"x-request-id"] == run.scopes[0]["headers"][b"x-request-id"]
    assert int(headers[b"content-length"]) == len(run.sent[1]["body"])


def test_a_request_that_two_ingresses_died_of_is_not_given_to_a_third() -> None:
    run = Run(dies_late)
    assert len(run.scopes) == 2 and run.said()[0] == 503


def test_a_stream_that_was_cut_off_says_so_and_is_not_begun_again() -> None:
    async def breaks_off(scope: Any, receive: Any, send: Any) -> None:
        await send(STREAM)
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})

    run = Run(breaks_off, answers)
    assert len(run.scopes) == 1 and run.sent[0] == STREAM
    event = run.sent[-1]
    assert event["more_body"] is False and event["body"].startswith(b"data: ") and event["body"].endswith(b"\n\n")
    assert json.loads(event["body"][len("data: ") :])["error"]["code"] == "unavailable"


def test_the_head_of_a_stream_goes_out_when_the_gateway_sends_it() -> None:
    seen: list[int] = []

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        await send(STREAM)
        seen.append(len(run_sent))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    run_sent: list[Any] = []

    async def through() -> None:
        async def send(message: Any) -> None:
            run_sent.append(message)

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await Retries(waits)(scope, receive, send)

    asyncio.run(through())
    assert seen == [1] and len(run_sent) == 2, "nothing is added to one that has ended"


@pytest.mark.parametrize("begun", [False, True])
def test_nothing_is_asked_or_said_for_a_client_that_has_left(begun: bool) -> None:
    async def stream(scope: Any, receive: Any, send: Any) -> None:
        if begun:
            await send(STREAM)

    run = Run(stream, answers, then={"type": "http.disconnect"})
    assert len(run.scopes) == 1 and run.sent == [STREAM] * begun


def test_a_body_too_large_to_be_kept_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_retries, "_KEPT_BYTES", 10)
    run = Run(dies, answers, said=[b"x" * 6, b"y" * 6])
    assert len(run.scopes) == 1 and run.said()[0] == 503
    run = Run(answers, said=[b"x" * 6, b"y" * 6])
    assert run.bodies == [b"x" * 6 + b"y" * 6]


def test_a_body_that_is_still_being_sent_goes_on_where_it_was() -> None:
    async def dies_meanwhile(scope: Any, receive: Any, send: Any) -> None:
        pass

    run = Run(dies_meanwhile, answers, said=[b"first"], then={"type": "http.request", "body": b", second"})
    assert run.bodies == [b"first, second", b"first, second, second"] and run.sent == [HEAD, WHOLE]


def test_a_young_proxy_waits_for_its_first_route() -> None:
    run = Run(has_no_route, has_no_route, has_no_route, has_no_route, has_no_route, has_no_route, answers)
    assert run.sent == [HEAD, WHOLE]


def test_a_path_without_a_route_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(has_no_route)
    status, body = run.said()
    assert status == 404 and body["error"]["code"] == "unknown_url" and len(run.scopes) > 2
    monkeypatch.setattr(proxy_retries, "_YOUNG_SECONDS", 0.0)
    run = Run(has_no_route)
    assert run.said()[0] == 404 and len(run.scopes) == 1, "a proxy that has been here for a while knows its routes"
    monkeypatch.setattr(proxy_retries, "_KEPT_BYTES", 2)
    assert Run(has_no_route).said()[0] == 404


@pytest.mark.parametrize(("rays", "ours", "code"), [(408, 504, "timeout"), (503, 503, "unavailable")])
def test_what_ray_says_itself_has_openais_shape(rays: int, ours: int, code: str) -> None:
    async def gives_up(scope: Any, receive: Any, send: Any) -> None:
        await send({**LOST, "status": rays})
        await send({**WHOLE, "body": b"Request x timed out after 5s."})

    run = Run(gives_up, answers, headers=[(b"x-request-id", b"mine")])
    status, body = run.said()
    headers = dict(run.sent[0]["headers"])
    assert (status, body["error"]["code"], len(run.scopes)) == (ours, code, 1)
    assert headers[b"x-request-id"] == b"mine" and (headers.get(b"retry-after") == b"1") == (ours == 503)


def test_a_long_plain_text_is_not_held_back() -> None:
    async def text(scope: Any, receive: Any, send: Any) -> None:
        await send({**LOST, "status": 404})
        for part in range(3):
            await send({**WHOLE, "body": NO_ROUTE, "more_body": part < 2})

    run = Run(text)
    assert [message["type"] for message in run.sent].count("http.response.body") == 3 and run.sent[0]["status"] == 404


@pytest.mark.parametrize(
    ("method", "path", "times"),
    [
        ("POST", "/v1/chat/completions", 2), ("POST", "/below/v1/completions", 2), ("GET", "/v1/models", 2),
        ("GET", "/v1/models/a:b", 2), ("GET", "/health", 2), ("POST", "/", 1), ("DELETE", "/v1/models/a", 1),
        ("PUT", "/v1/completions", 1), ("GET", "/", 1), ("GET", "/-/healthz", 1), ("POST", "/v1/completions/x", 1),
    ],
)  # fmt: skip
def test_what_may_change_something_or_is_anothers_is_asked_once(method: str, path: str, times: int) -> None:
    assert len(Run(dies, answers, method=method, path=path).scopes) == times
    if times == 1:
        run = Run(has_no_route, answers, method=method, path=path)
        assert run.sent == [LOST, {**WHOLE, "body": NO_ROUTE}], "and as it is"


def test_ray_counts_what_has_passed_while_it_looks_for_an_ingress() -> None:
    run = Run(dies_late, answers, ray_timeout=5)
    first, second = (scope["headers"] for scope in run.scopes)
    assert b"x-request-timeout-seconds" not in first
    assert 4 < float(second[b"x-request-timeout-seconds"]) < 4.96
    assert b"x-request-timeout-seconds" not in Run(dies_late, answers).scopes[1]["headers"]


def test_bodies_are_kept_up_to_a_sum_of_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_retries, "_KEPT_IN_ALL", 2)
    run = Run(dies, answers)
    assert len(run.scopes) == 1 and run.said()[0] == 503


def test_other_answers_pass_as_they_are_and_are_not_repeated() -> None:
    for status in (400, 404, 429, 500, 503):
        head = {**HEAD, "status": status}

        async def refuses(scope: Any, receive: Any, send: Any, head: Any = head) -> None:
            await send(head)
            await send(WHOLE)

        run = Run(refuses, answers)
        assert run.sent == [head, WHOLE] and len(run.scopes) == 1


def test_websockets_and_errors_pass() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError(scope["type"])

    for kind in ("websocket", "lifespan", "http"):
        scope = {"type": kind, "headers": [], "method": "GET", "path": "/v1/models"}
        with pytest.raises(RuntimeError, match=kind):
            asyncio.run(Retries(app)(scope, None, None))
