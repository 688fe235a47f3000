"""Ray's ingress with ours around it: how long it waits, and where a request waits while nothing may answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.llm._internal.serve.core.configs.openai_api_models import CompletionResponse
from starlette.exceptions import HTTPException
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionResponseChoice
from vllm.entrypoints.serve.engine.protocol import UsageInfo

from ft_ray import serve_ingress
from ft_ray.serve_ingress import Ingress, ray_ingress

BODY = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "Hello"}])


class Response:
    """Of a replica, as Ray's: an iterator that can be cancelled."""

    def __init__(self, replica: Callable[[], AsyncIterator[Any]]) -> None:
        self._replica, self.cancelled = replica, False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._replica()

    def cancel(self) -> None:
        self.cancelled = True


def replica(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Any], AsyncIterator[Any]]) -> list[Response]:
    """Has every replica answer with what `answer` makes of the ingress; returns the responses."""
    made: list[Response] = []

    async def ask(self: Any, **_: Any) -> Response:
        made.append(Response(lambda: answer(self)))
        return made[-1]

    monkeypatch.setattr(Ingress, "_ask", ask)
    return made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The deployments that requests went to; each takes 0.3 seconds to answer."""
    found: list[str] = []

    async def respond(self: Any) -> AsyncIterator[Any]:
        found.append(self._active)
        await asyncio.sleep(0.3)
        choice = CompletionResponseChoice(index=0, text="Hi")
        usage = UsageInfo(prompt_tokens=1, total_tokens=2)
        yield CompletionResponse(id="1", created=1, model="m", choices=[choice], usage=usage)

    replica(monkeypatch, respond)
    context = SimpleNamespace(app_name="m")
    serve = SimpleNamespace(get_deployment_handle=lambda *_: object(), get_replica_context=lambda: context)
    monkeypatch.setattr(serve_ingress, "serve", serve)
    monkeypatch.setattr(ray_ingress, "DEFAULT_LLM_ROUTER_HTTP_TIMEOUT", 0.1)
    return found


def ingress(timeout: float) -> Any:
    handles: Any = {"m": object()}
    cards: Any = {"m": object()}
    return Ingress(adapters=[], timeout=timeout, llm_deployments=handles, model_cards=cards)


def routing(active: str, **more: Any) -> dict[str, Any]:
    return {"active": active, "version": 1, "args": {}, **more}


async def answer(made: Any) -> str:
    response = await made._process_llm_request(body=BODY, call_method="chat", raw_request=None)
    return str(json.loads(response.body)["choices"][0]["text"])


def test_ray_gives_no_request_up_before_the_gateway_does(asked: list[str]) -> None:
    """With Ray's own 600 seconds (here 0.1) a longer limits.timeout would end in Ray's 408."""
    made = ingress(1200)
    made.reconfigure(routing("a"))
    assert asyncio.run(answer(made)) == "Hi" and asked == ["a"]
    assert ray_ingress.DEFAULT_LLM_ROUTER_HTTP_TIMEOUT > 1200


@pytest.mark.parametrize(
    ("died_after", "attempts"),
    [
        ((0.0, 0.0, 0.0, 0.0, 0.0), 4),  # replicas that were dead before they were asked
        ((0.3, 0.0, 0.0, 0.0, 0.0), 4),
        ((0.3, 0.3, 0.0, 0.0, 0.0), 2),  # the second died with it as well
        ((0.3, 0.0, 0.3, 0.0, 0.0), 3),
    ],
)
def test_a_request_that_replicas_die_of_is_not_handed_to_all_of_them(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, died_after: tuple[float, ...], attempts: int
) -> None:
    tried: list[float] = []

    async def die(_: Any) -> AsyncIterator[Any]:
        tried.append(died_after[len(tried)])
        await asyncio.sleep(tried[-1])
        raise RayActorError
        yield

    async def at_once(seconds: float) -> None:
        await pause(min(seconds, 0.3))

    pause = asyncio.sleep
    replica(monkeypatch, die)
    made = ingress(60)
    made.reconfigure(routing("a"))

    async def scenario() -> None:
        async for _ in made._get_response(raw_request=None):
            pass

    monkeypatch.setattr(serve_ingress.asyncio, "sleep", at_once)
    with pytest.raises(RayActorError):
        asyncio.run(scenario())
    assert len(tried) == attempts and made.in_flight("a") == 0


@pytest.mark.parametrize("given_up", ["in time", "waiting for the first", "waiting for more", "between two", "failed"])
def test_what_a_request_has_asked_for_is_cancelled_where_it_is_given_up(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, given_up: str
) -> None:
    """Ray does so where the request's own task is cancelled, not where a timeout ends a part of it."""

    async def respond(_: Any) -> AsyncIterator[Any]:
        if given_up == "failed":
            raise ValueError
        if given_up == "waiting for the first":
            await asyncio.sleep(60)
        yield 1
        if given_up == "waiting for more":
            await asyncio.sleep(60)
        yield 2

    responses = replica(monkeypatch, respond)

    async def scenario() -> None:
        made = ingress(60)
        made.reconfigure(routing("a"))
        asking = made._get_response(raw_request=None, body=SimpleNamespace(stream=True))
        try:
            async with asyncio.timeout(0.1):
                async for _ in asking:
                    if given_up == "between two":
                        break
        except (TimeoutError, ValueError):
            pass
        await asking.aclose()
        assert made.in_flight("a") == 0

    asyncio.run(scenario())
    (response,) = responses
    assert response.cancelled == (given_up not in ("in time", "failed"))


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_came_whole_is_not_cancelled(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Ray takes the first part of what is not streamed, and drops the rest."""

    async def respond(_: Any) -> AsyncIterator[Any]:
        yield 1

    responses = replica(monkeypatch, respond)

    async def scenario() -> None:
        made = ingress(60)
        made.reconfigure(routing("a"))
        asking = made._get_response(raw_request=None, body=SimpleNamespace(stream=stream))
        assert await anext(asking) == 1
        await asking.aclose()

    asyncio.run(scenario())
    assert responses[0].cancelled == stream


@pytest.mark.parametrize("status", [400, 404, 408, 422, 500, 503, 504])
def test_an_errors_code_says_whose_fault_it_is(status: int) -> None:
    async def scenario() -> tuple[int, str]:
        request: Any = SimpleNamespace(headers={})
        answer = await serve_ingress._openai_error(request, HTTPException(status, "no"))
        return answer.status_code, json.loads(bytes(answer.body))["error"]["code"]

    ours = {404: "not_found", 408: "timeout", 500: "internal_error", 503: "unavailable", 504: "timeout"}
    assert asyncio.run(scenario()) == (status, ours.get(status, "invalid_value"))


def test_a_request_that_is_held_is_answered_by_who_passed_the_gate(asked: list[str]) -> None:
    async def scenario() -> None:
        made = ingress(60)
        made.reconfigure(routing("old"))
        begun = asyncio.create_task(answer(made))
        while not asked:
            await asyncio.sleep(0.01)
        made.reconfigure(routing("old", held=True))
        assert made.active() == "" and made.in_flight("old") == 1
        waiting = asyncio.create_task(answer(made))
        assert await begun == "Hi"  # what has begun ends where it is
        made.reconfigure(routing("new", held=True))
        await asyncio.sleep(0.3)
        assert asked == ["old"] and not waiting.done() and made.in_flight("new") == 0
        made.reconfigure(routing("new"))
        assert await waiting == "Hi" and asked == ["old", "new"] and made.active() == "new"

    asyncio.run(scenario())
