"""Requests that no client in its right mind sends: by fields, by an OpenAPI document, and byte by byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

__all__ = ["ANYTHING", "PLANTED", "QUESTION", "bodies", "fields", "read_logs", "telling"]

QUESTION = [{"role": "user", "content": "What is 2+2?"}]

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec=None), max_size=12) | st.sampled_from(["\x00", "\u202e", "\ud800", "a" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip

PLANTED = "zanzibar-4711-quokka"
"""A text that `telling` requests hold and no log may."""


def telling() -> list[dict[str, Any]]:
    """Fields of chat requests that hold PLANTED: answered, refused by the guards, by validators, templates, engine."""
    said = [{"role": "user", "content": f"Remember {PLANTED}."}]
    changes: list[dict[str, Any]] = [
        {}, {"stream": True}, {"max_tokens": 65}, {"temperature": PLANTED}, {"stop": [5, PLANTED]}, {"tools": PLANTED},
        {"tools": [{"type": "function", "function": {"name": PLANTED, "parameters": PLANTED}}]},
        {"tool_choice": {"type": "function", "function": {"name": PLANTED}}}, {"model": PLANTED},
        {"response_format": {"type": "json_schema", "json_schema": {"name": PLANTED, "schema": PLANTED}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": PLANTED}}}},
        {"messages": [{"role": PLANTED, "content": PLANTED}]}, {"messages": [{"role": "user", "content": [PLANTED]}]},
        {"messages": [{"role": "tool", "tool_call_id": PLANTED, "content": None}]},
        {"messages": [*said, {"role": "assistant", "content": None, "tool_calls": [{"function": PLANTED}]}]},
        {"chat_template_kwargs": {"date_string": {"a": PLANTED}}}, {"logit_bias": {PLANTED: 1}}, {PLANTED: PLANTED},
        {"messages": [{"role": "user", "content": f"{PLANTED} " * 600}]},
    ]  # fmt: skip
    return [{"messages": said, "max_tokens": 4, **change} for change in changes]


def read_logs(folder: Path) -> int:
    """Reads every file below and returns the bytes that were read; fails where PLANTED is among them."""
    read = 0
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            text = path.read_bytes()
            read += len(text)
            at = text.find(PLANTED.encode())
            assert at < 0, f"{path.name}: {text[max(0, at - 300) : at + 200]!r}"
    return read


def fields(route: str) -> list[str]:
    """The names that vLLM's own schema of a request lists."""
    from ray.llm._internal.serve.core.configs import openai_api_models as models

    kind = models.ChatCompletionRequest if "chat" in route else models.CompletionRequest
    return sorted(kind.model_fields)


def bodies(model: str) -> dict[str, tuple[bytes, set[int]]]:
    """What is wrong -> a body of that kind, and the statuses that tell a client so."""

    def body(**change: Any) -> bytes:
        return json.dumps({"model": model, "messages": QUESTION, "max_tokens": 2, **change}).encode()

    deep = b'{"model": "' + model.encode() + b'", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    schema = '{"items":' * 1300 + "{}" + "}" * 1300
    long = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"pattern": "(" * 3000 + "a" + ")" * 3000}}}
    return {
        "nothing": (b"", {400}),
        "no JSON": (b"model=x", {400}),
        "half of it": (body()[:-20], {400}),
        "no UTF-8": (b'{"model": "\xff\xfe"}', {400}),
        "a zero byte": (b"\x00" + body(), {400}),
        "not a number": (body()[:-1] + b', "temperature": NaN}', {400}),
        "a list": (b"[1, 2]", {400}),
        "deep": (deep, {400}),
        "a long number": (body()[:-1] + b', "seed": ' + b"9" * 5000 + b"}", {400}),
        "another model": (body(model="../../etc/passwd"), {404}),
        "a control character for a model": (body(model="\x00\x1b[2J\r\nx-injected: 1"), {404}),
        "a number for a model": (body(model=5), {422}),
        "messages of a wrong type": (body(messages={"role": "user"}), {400, 422}),
        "a role of a wrong type": (body(messages=[{"role": ["user"], "content": "x"}]), {400, 422}),
        "half a character": (body(messages=[{"role": "user", "content": "\ud83d"}]), {400}),
        "a negative length": (body(max_tokens=-1), {422}),
        "a text for a length": (body(max_tokens="many"), {422}),
        "a schema nested in a string": (body(structured_outputs={"json": schema}), {422}),
        "a tag nested in a string": (body(structured_outputs={"structural_tag": "[" * 1500 + "]" * 1500}), {422}),
        "no JSON for a schema": (body(structured_outputs={"json": "{"}), {422}),
        "half a character in a string": (body(structured_outputs={"json": '{"enum": ["\\ud83d"]}'}), {422}),
        "patterns for one text": (body(structured_outputs={"json": {"allOf": [{"pattern": "^.*a"}] * 30}}), {422}),
        "a zero byte for a choice": (body(structured_outputs={"choice": ["a", "\x00a"]}), {422}),
        "a pattern of many ways": (body(structured_outputs={"json": {"type": "string", "pattern": ".?" * 200}}), {422}),
        "a pattern that is long": (body(response_format=long), {422}),
        "repeats without end": (body(repetition_detection={"max_pattern_size": 10**30, "min_count": 2}), {422}),
        "an interval without end": (body(stream_interval=2**65), {422}),
        "more best tokens than there are numbers": (body(temperature=1, top_k=10**30), {422}),
        "an interval of a stream without end": (body(stream_interval=2**65, stream=True), {422}),
        "ids without end": (body(allowed_token_ids=[1] * 1025), {422}),
        "huge": (b" " * 1_100_000, {413}),
    }
