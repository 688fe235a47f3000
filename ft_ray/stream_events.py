"""The events of a stream as text, without a pydantic model of three classes, built and checked, for each token.

vLLM's front end makes an event of every token: a choice and a response (in chats a delta, too), each checked on the way
in and serialized on the way out: 10 and 16 microseconds where 3 do (benchmarks/README.md, "The endpoint"), of some 80
that a token takes at the 12,000 a second at which that process is full. What an event holds is known beforehand, but
for its text. So the classes that vLLM's two generators call are replaced by functions of the same keywords, whose
results write the same characters; whatever is not the usual event becomes vLLM's own model, as before. vLLM is pinned.
"""

from __future__ import annotations

import functools
import json
from json.encoder import encode_basestring as quoted  # escapes what pydantic's serializer does, and leaves the rest
from typing import Any

from vllm.entrypoints.openai.chat_completion import serving as chat_serving
from vllm.entrypoints.openai.completion import serving as completion_serving

__all__ = ["fit"]


class _Delta:
    """What a chat's token adds: a piece of text and nothing else. Reads like vLLM's DeltaMessage."""

    __slots__ = ("content",)
    role = reasoning = None
    tool_calls: tuple[()] = ()

    def __init__(self, content: str) -> None:
        self.content = content


class _Choice:
    """The one choice of an event. `text` is its JSON; `fields` are the keywords it was made with."""

    __slots__ = ("fields", "finish_reason", "text")

    def __init__(self, fields: dict[str, Any], text: str) -> None:
        self.fields, self.text, self.finish_reason = fields, text, fields["finish_reason"]


class _Event:
    """A response with one `_Choice`. What vLLM sets on it afterwards is written by vLLM's own model."""

    __slots__ = ("_fields", "_kind", "system_fingerprint", "usage")

    def __init__(self, kind: _Kind, fields: dict[str, Any]) -> None:
        self._kind, self._fields = kind, fields
        self.usage: Any = None
        self.system_fingerprint: str | None = None

    def model_dump_json(self, **how: Any) -> str:
        if self.usage is not None or self.system_fingerprint is not None or how != {"exclude_unset": True}:
            return self._as_vllm_does(how)
        fields = self._fields
        head = _head(fields["id"], fields["object"], fields["created"], fields["model"])
        return f'{head}{fields["choices"][0].text}]}}'

    def _as_vllm_does(self, how: dict[str, Any]) -> str:
        made = self._kind.full(self._fields)
        if self.system_fingerprint is not None:
            made.system_fingerprint = self.system_fingerprint
        if self.usage is not None:
            made.usage = self.usage
        return str(made.model_dump_json(**how))


@functools.lru_cache(4096)  # the streams that run at the same time
def _head(name: str, kind: str, created: int, model: str) -> str:
    return f'{{"id":{quoted(name)},"object":{quoted(kind)},"created":{created},"model":{quoted(model)},"choices":['


class _Kind:
    """One of vLLM's two generators: its classes, and the keywords of its usual events."""

    object: str
    _response_keys = frozenset(("id", "object", "created", "model", "choices"))

    def __init__(self, response: Any, choice: Any) -> None:
        self._response, self._choice = response, choice

    def response(self, **fields: Any) -> Any:
        usual = fields.keys() == self._response_keys and fields["object"] == self.object
        if usual and len(fields["choices"]) == 1 and type(fields["choices"][0]) is _Choice:
            return _Event(self, fields)
        return self.full(fields)

    def full(self, fields: dict[str, Any]) -> Any:
        """vLLM's own model of these keywords."""
        choices = [self.full_choice(one.fields) if type(one) is _Choice else one for one in fields["choices"]]
        return self._response(**{**fields, "choices": choices})

    def full_choice(self, fields: dict[str, Any]) -> Any:
        return self._choice(**fields)


class _Completions(_Kind):
    object = "text_completion"
    _keys = frozenset(("index", "text", "logprobs", "finish_reason", "stop_reason", "prompt_token_ids", "token_ids"))

    def choice(self, **fields: Any) -> Any:
        usual = fields.keys() == self._keys and fields["logprobs"] is None and fields["token_ids"] is None
        if not usual or fields["prompt_token_ids"] is not None or fields["finish_reason"] not in _REASONS:
            return self.full_choice(fields)
        text = (
            f'{{"index":{fields["index"]},"text":{quoted(fields["text"])},"logprobs":null,'
            f'"finish_reason":{_REASONS[fields["finish_reason"]]},"stop_reason":{_stop(fields["stop_reason"])},'
            '"prompt_token_ids":null,"token_ids":null}'
        )
        return _Choice(fields, text)


class _Chats(_Kind):
    object = "chat.completion.chunk"
    _keys = frozenset(("index", "delta", "logprobs", "finish_reason", "token_ids"))
    _last_keys = _keys | {"stop_reason"}

    def __init__(self, response: Any, choice: Any, delta: Any) -> None:
        super().__init__(response, choice)
        self._delta = delta

    def delta(self, **fields: Any) -> Any:
        return _Delta(fields["content"]) if fields.keys() == {"content"} else self._delta(**fields)

    def choice(self, **fields: Any) -> Any:
        last = "stop_reason" in fields
        usual = fields.keys() == (self._last_keys if last else self._keys) and type(fields["delta"]) is _Delta
        nothing = usual and fields["logprobs"] is None and fields["token_ids"] is None
        if not nothing or fields["finish_reason"] not in _REASONS:
            return self.full_choice(fields)
        stopped = f'"stop_reason":{_stop(fields["stop_reason"])},' if last else ""
        text = (
            f'{{"index":{fields["index"]},"delta":{{"content":{quoted(fields["delta"].content)}}},"logprobs":null,'
            f'"finish_reason":{_REASONS[fields["finish_reason"]]},{stopped}"token_ids":null}}'
        )
        return _Choice(fields, text)

    def full_choice(self, fields: dict[str, Any]) -> Any:
        delta = fields["delta"]
        made = self._delta(content=delta.content) if type(delta) is _Delta else delta
        return self._choice(**{**fields, "delta": made})


_REASONS = {reason: json.dumps(reason) for reason in (None, "stop", "length")}


def _stop(reason: int | str | None) -> str:
    return "null" if reason is None else quoted(reason) if isinstance(reason, str) else str(reason)


def fit() -> None:
    """For this process's servers: their streams are written like this from now on. A second call changes nothing."""
    plain: Any = completion_serving
    if isinstance(plain.CompletionStreamResponse, type):
        one = _Completions(plain.CompletionStreamResponse, plain.CompletionResponseStreamChoice)
        plain.CompletionStreamResponse, plain.CompletionResponseStreamChoice = one.response, one.choice
    chat: Any = chat_serving
    if isinstance(chat.ChatCompletionStreamResponse, type):
        two = _Chats(chat.ChatCompletionStreamResponse, chat.ChatCompletionResponseStreamChoice, chat.DeltaMessage)
        chat.ChatCompletionStreamResponse, chat.ChatCompletionResponseStreamChoice = two.response, two.choice
        chat.DeltaMessage = two.delta
