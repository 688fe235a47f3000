"""Requests that no client in its right mind sends: by fields, by an OpenAPI document, and byte by byte."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

__all__ = ["ANYTHING", "QUESTION", "bodies", "fields"]

QUESTION = [{"role": "user", "content": "What is 2+2?"}]

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec=None), max_size=12) | st.sampled_from(["\x00", "\u202e", "\ud800", "a" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


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
        "huge": (b" " * 1_100_000, {413}),
    }
