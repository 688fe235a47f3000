"""Ray's ingress with ours around it: how long it waits, and where a request waits while nothing may answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.llm._internal.serve.core.configs.openai_api_models import CompletionResponse
from ray.llm._internal.serve.core.ingress.ingress import OpenAiIngress
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionResponseChoice
from vllm.entrypoints.serve.engine.protocol import UsageInfo

from ft_ray import serve_ingress
from ft_ray.serve_ingress import Ingress, ray_ingress

BODY = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "Hello"}])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The deployments that requests went to; each takes 0.3 seconds to answer."""
    found: list[str] = []

    async def respond(self: Any, **_: Any) -> AsyncIterator[Any]:
        found.append(self._active)
        await asyncio.sleep(0.3)
        choice = CompletionResponseChoice(index=0, text="Hi")
        usage = UsageInfo(prompt_tokens=1, total_tokens=2)
        yield CompletionResponse(id="1", created=1, model="m", choices=[choice], usage=usage)

    monkeypatch.setattr(OpenAiIngress, "_get_response", respond)
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

    async def die(self: Any, **_: Any) -> AsyncIterator[Any]:
        tried.append(died_after[len(tried)])
        await asyncio.sleep(tried[-1])
        raise RayActorError
        yield

    async def at_once(seconds: float) -> None:
        await pause(min(seconds, 0.3))

    pause = asyncio.sleep
    monkeypatch.setattr(OpenAiIngress, "_get_response", die)
    made = ingress(60)
    made.reconfigure(routing("a"))

    async def scenario() -> None:
        async for _ in made._get_response(raw_request=None):
            pass

    monkeypatch.setattr(serve_ingress.asyncio, "sleep", at_once)
    with pytest.raises(RayActorError):
        asyncio.run(scenario())
    assert len(tried) == attempts and made.in_flight("a") == 0


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
