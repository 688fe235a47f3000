"""Events of a stream are written without vLLM's models, and are the same characters."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.openai.chat_completion import protocol as chat
from vllm.entrypoints.openai.chat_completion import serving as chat_serving
from vllm.entrypoints.openai.completion import protocol as plain
from vllm.entrypoints.openai.completion import serving as plain_serving
from vllm.entrypoints.serve.engine.protocol import UsageInfo

from ft_ray import stream_events

TEXTS = [
    "", " hello", 'a "quoted" \\ word', "\n\r\t\b\f", "".join(map(chr, range(0x20))), "\x7f\x80\xa0", "\u2028\u2029",
    "\ufffd", "Grüße, 世界", "\U0001f600", "</script>&<>'",
]  # fmt: skip
NAMES = ["CompletionStreamResponse", "CompletionResponseStreamChoice"]
CHAT_NAMES = ["ChatCompletionStreamResponse", "ChatCompletionResponseStreamChoice", "DeltaMessage"]


@pytest.fixture(autouse=True)
def fitted() -> Iterator[None]:
    before = [(module, name, getattr(module, name)) for module, names in
              ((plain_serving, NAMES), (chat_serving, CHAT_NAMES)) for name in names]  # fmt: skip
    stream_events.fit()
    stream_events.fit()
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def completion(source: Any, text: str, *, choice: dict[str, Any] | None = None, **more: Any) -> Any:
    fields = {"index": 0, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}
    fields |= {"prompt_token_ids": None, "token_ids": None, **(choice or {})}
    made = source.CompletionResponseStreamChoice(**fields)
    head = {"id": "cmpl-0a.b_c-1", "object": "text_completion", "created": 1764460000, "model": "team/Ünï"}
    return source.CompletionStreamResponse(**head, choices=[made], **more)


def chunk(source: Any, delta: Any, *, choice: dict[str, Any] | None = None, **more: Any) -> Any:
    fields = {"index": 1, "delta": delta, "logprobs": None, "finish_reason": None, "token_ids": None, **(choice or {})}
    made = source.ChatCompletionResponseStreamChoice(**fields)
    head = {"id": "chatcmpl-7", "object": "chat.completion.chunk", "created": 1764460000, "model": 'm"x'}
    return source.ChatCompletionStreamResponse(**head, choices=[made], **more)


ENDS: list[dict[str, Any]] = [
    {"finish_reason": reason, "stop_reason": stop}
    for reason, stop in itertools.product((None, "stop", "length", "abort"), (None, 7, "###", 'end"'))
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_completions_event_is_the_same_text(text: str) -> None:
    for end in ENDS:
        ours, theirs = completion(plain_serving, text, choice=end), completion(plain, text, choice=end)
        assert ours.model_dump_json(exclude_unset=True) == theirs.model_dump_json(exclude_unset=True)
    assert type(completion(plain_serving, text)) is stream_events._Event, "it was ours that wrote"


@pytest.mark.parametrize("text", TEXTS)
def test_a_chats_event_is_the_same_text(text: str) -> None:
    for end in [None, *ENDS]:
        ours = chunk(chat_serving, chat_serving.DeltaMessage(content=text), choice=end)
        theirs = chunk(chat, DeltaMessage(content=text), choice=end)
        assert ours.model_dump_json(exclude_unset=True) == theirs.model_dump_json(exclude_unset=True)
    last = chunk(chat_serving, chat_serving.DeltaMessage(content=text), choice=ENDS[4])
    assert type(last) is stream_events._Event and last.model_dump_json(exclude_unset=True).count("stop_reason") == 1


def test_what_vllm_sets_on_an_event_afterwards_is_written() -> None:
    usage = UsageInfo(prompt_tokens=3, completion_tokens=4, total_tokens=7)
    pairs = [
        (completion(plain_serving, "a"), completion(plain, "a")),
        (chunk(chat_serving, chat_serving.DeltaMessage(content="a")), chunk(chat, DeltaMessage(content="a"))),
    ]
    for ours, theirs in pairs:
        for how in ({"exclude_unset": True}, {"exclude_unset": False, "exclude_none": True}):
            assert ours.model_dump_json(**how) == theirs.model_dump_json(**how)
        for made in (ours, theirs):
            made.system_fingerprint = "fp"
        assert ours.model_dump_json(exclude_unset=True) == theirs.model_dump_json(exclude_unset=True)
        for made in (ours, theirs):
            made.usage = usage
        written = ours.model_dump_json(exclude_unset=True)
        assert written == theirs.model_dump_json(exclude_unset=True)
        assert json.loads(written)["usage"]["total_tokens"] == 7


def test_an_unusual_event_is_vllms_own() -> None:
    logprobs = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [None], "text_offset": [0]}
    for choice in ({"logprobs": logprobs}, {"token_ids": [1]}, {"prompt_token_ids": [1, 2]}):
        made = completion(plain_serving, "a", choice=choice)
        assert type(made) is plain.CompletionStreamResponse
        assert made.model_dump_json() == completion(plain, "a", choice=choice).model_dump_json()
    role = chunk(chat_serving, chat_serving.DeltaMessage(role="assistant", content=""), prompt_text=None)
    assert type(role) is chat.ChatCompletionStreamResponse
    told = chunk(chat, DeltaMessage(role="assistant", content=""), prompt_text=None)
    assert role.model_dump_json(exclude_unset=True) == told.model_dump_json(exclude_unset=True)
    for choice in ({"token_ids": [5]}, {"logprobs": {"content": []}}):
        made = chunk(chat_serving, chat_serving.DeltaMessage(content="a"), choice=choice)
        assert type(made) is chat.ChatCompletionStreamResponse
        told = chunk(chat, DeltaMessage(content="a"), choice=choice)
        assert made.model_dump_json(exclude_unset=True) == told.model_dump_json(exclude_unset=True)
    none = plain_serving.CompletionStreamResponse(id="i", created=1, model="m", choices=[], usage=UsageInfo())
    assert type(none) is plain.CompletionStreamResponse and none.choices == []
