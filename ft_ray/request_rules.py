"""What the body of one completion request may hold. Pure functions: bytes in, a JSON object or a refusal out."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NoReturn

from ft_ray.grammar_rules import DEEPEST, depth, fault
from ft_ray.serve_args import Limits

__all__ = ["BAD_WORD_TOKENS", "COMPLETIONS", "WAITED", "Refused", "check", "parse"]

COMPLETIONS = ("/v1/chat/completions", "/v1/completions")

WAITED = b"x-ft-ray-waited"
"""Header by which the proxy tells an ingress how many seconds a request has had already."""

BAD_WORD_TOKENS = 49_152
"""Tokens of bad words that an engine must have room for: more than any tokenizer makes of those that pass `check`.

A token is of a byte at least, and each word may be there twice, once behind a space (of three bytes in SentencePiece).
What normalizes before it (NFKC) makes up to 11 bytes of one: 2 * (11 * 2,000 + 3 * 128).
"""

# Fields of vLLM's requests that a client has no business with: what the model was trained with, the queue,
# other machines' addresses, other clients' caches, code. With a mask of the assistant's tokens the tokenizer runs
# inside the template's call, before any length is looked at.
_REFUSED = (
    "chat_template", "priority", "kv_transfer_params", "ec_transfer_params", "mm_processor_kwargs", "media_io_kwargs",
    "vllm_xargs", "prompt_embeds", "request_id", "logits_processors", "cache_salt", "return_assistant_tokens_mask",
    "routed_experts_prompt_start",
)  # fmt: skip
# transformers' own parameters of `apply_chat_template`: vLLM hands them on, and to pad a prompt to two billion tokens
# takes the memory of the machine. A template's own variables pass, but for the special tokens, 'bos_token' and so on.
_REFUSED_IN_TEMPLATE = frozenset((
    "chat_template", "conversation", "messages", "max_length", "padding", "return_assistant_tokens_mask", "return_dict",
    "return_tensors", "tokenize", "tokenizer_kwargs", "truncation",
))  # fmt: skip
# Fields of a body that no template reads, beside those counted on their own; every other one counts with the prompt.
_NOT_OF_PROMPT = frozenset((
    "messages", "prompt", "model", "stop", "stop_token_ids", "bad_words", "allowed_token_ids", "logit_bias", "user",
    "metadata", "response_format", "structured_outputs", "stream_options", "tool_choice",
))  # fmt: skip
_MOST_LOGPROBS = 20
# vLLM's runner for GPUs has rows of fixed length for what a request says of tokens, and a request that has more ends
# the engine with all others in it (v1/worker/gpu/sample): 1,024 ids allowed, 1,024 biases, 128 ids that stop, those
# that the model itself has for its end included.
_MOST_ENTRIES = {"stop": 16, "bad_words": 128, "allowed_token_ids": 1024, "logit_bias": 1024, "stop_token_ids": 100}
# In UTF-8, of all of a field's. vLLM tokenizes each bad word twice, in the process that streams, and its runner has a
# row for their tokens as well: `BAD_WORD_TOKENS`.
_MOST_WORD_BYTES = {"stop": 2_000, "bad_words": 2_000}
_MOST_GRAMMAR_CHARS = 20_000
_MOST_INTERVAL = 10_000
_MOST_TOP_K = 2**31 - 1


@dataclass
class Refused(Exception):
    """A refusal with OpenAI's error fields."""

    status: int
    code: str
    message: str
    param: str | None = None

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "timeout_error" if self.status in (408, 504) else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def check(body: dict[str, Any], limits: Limits, models: Collection[str]) -> str:
    """The model that a body asks for, '' when it names none. Raises Refused for one that is not to reach the engine."""
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise Refused(422, "invalid_type", "model must be a string.", "model")
    if models and model is not None and model not in models:
        served = ", ".join(sorted(models))
        message = f"the model {model[:100]!r} does not exist here; served: {served}."
        raise Refused(404, "model_not_found", message, "model")
    for name in _REFUSED:
        if body.get(name) is not None:
            raise Refused(422, "unsupported_parameter", f"{name} cannot be set by a request.", name)
    if body.get("use_beam_search"):
        # For each token it asks the engine anew, one beam after the other, and copies all that was said so far in the
        # process that streams.
        message = "use_beam_search cannot be set by a request: ask for several answers with n."
        raise Refused(422, "unsupported_parameter", message, "use_beam_search")
    kwargs = body.get("chat_template_kwargs")
    if isinstance(kwargs, dict) and any(k in _REFUSED_IN_TEMPLATE or k.endswith("_token") for k in kwargs):
        message = "chat_template_kwargs can set a template's own variables only."
        raise Refused(422, "unsupported_parameter", message, "chat_template_kwargs")
    choices = _whole(body, "n", limits.n) or 1
    _whole(body, "best_of", limits.n)
    prompts = _prompts(body.get("prompt"))
    if prompts * choices > limits.n:  # the engine has a sequence for each, whatever the number of requests
        message = (
            f"{prompts} prompts with {choices} choices each are {prompts * choices} answers; at most {limits.n} a "
            "request here: send fewer prompts at once."
        )
        raise Refused(422, "value_too_large", message, "prompt")
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        if not isinstance(body.get(name), bool):
            _whole(body, name, _MOST_LOGPROBS, least=-1 if name == "prompt_logprobs" else 0)
    if body.get("prompt_logprobs") == -1:
        raise Refused(422, "value_too_large", f"prompt_logprobs must be at most {_MOST_LOGPROBS}.", "prompt_logprobs")
    for name, most in _MOST_ENTRIES.items():
        entries = body.get(name)
        if isinstance(entries, list | dict) and len(entries) > most:
            raise Refused(422, "value_too_large", f"{name} holds more than {most} entries.", name)
    for name, most in _MOST_WORD_BYTES.items():
        words = body.get(name)
        entries = words if isinstance(words, list) else [words]
        if sum(len(word.encode()) for word in entries if isinstance(word, str)) > most:
            raise Refused(422, "value_too_large", f"{name} is longer than {most} bytes in all.", name)
    ids = body.get("logprob_token_ids")
    if isinstance(ids, list) and len(ids) > _MOST_LOGPROBS:
        message = f"logprob_token_ids holds more than {_MOST_LOGPROBS} entries."
        raise Refused(422, "value_too_large", message, "logprob_token_ids")
    for name in ("response_format", "structured_outputs", "tools"):
        if body.get(name) is None:
            continue
        if len(json.dumps(body[name])) > _MOST_GRAMMAR_CHARS:
            raise Refused(422, "value_too_large", f"{name} is longer than {_MOST_GRAMMAR_CHARS} characters.", name)
        if wrong := fault(name, body[name]):
            raise Refused(422, "invalid_value", wrong, name)
    length = _prompt_length(body)
    if length > limits.prompt_chars:
        raise Refused(
            422, "context_length_exceeded", f"the prompt has {length} characters, more than {limits.prompt_chars}."
        )
    for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
        _whole(body, name, limits.max_tokens)
    # Larger ones than these do nothing; those of more than 64 bits vLLM cannot send its engine.
    _whole(body, "stream_interval", _MOST_INTERVAL, least=1)
    _whole(body, "top_k", _MOST_TOP_K, least=-1)
    repeats = body.get("repetition_detection")
    if isinstance(repeats, dict):
        for name in ("max_pattern_size", "min_pattern_size", "min_count"):
            field = f"repetition_detection.{name}"
            _whole({field: repeats.get(name)}, field, limits.max_tokens)
    return model or ""


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_constant)
_ENCODER = json.JSONEncoder(ensure_ascii=False)


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises Refused for anything else, and for what passes JSON but no tokenizer."""
    try:
        text = raw.decode(json.detect_encoding(raw))
        body = _DECODER.decode(text)
        deepest = depth(body)
        # Half of a character can only come from an escape. It passes JSON and fails in the tokenizer.
        if deepest <= DEEPEST and "\\u" in text:
            _ENCODER.encode(body).encode()
    except (ValueError, RecursionError) as error:
        what = "half of a character (a lone surrogate)" if isinstance(error, UnicodeEncodeError) else "not valid JSON"
        raise Refused(400, "invalid_json", f"the request body holds {what}.") from None
    if deepest > DEEPEST:
        raise Refused(400, "invalid_json", f"the request body is nested more than {DEEPEST} deep.")
    if not isinstance(body, dict):
        raise Refused(400, "invalid_json", "the request body is not a JSON object.")
    return body


def _whole(body: dict[str, Any], name: str, most: int, least: int = 0) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused(422, "invalid_type", f"{name} must be a whole number.", name)
    if value > most:
        raise Refused(422, "value_too_large", f"{name} is {value}; at most {most} here.", name)
    if value < least:
        raise Refused(422, "value_too_small", f"{name} is {value}; at least {least}.", name)
    return value


def _prompts(prompt: Any) -> int:
    """How many sequences a prompt starts: vLLM makes one of each text or list of token ids in a list."""
    if not isinstance(prompt, list) or all(isinstance(item, int | float) for item in prompt):
        return 1  # token ids of one
    return len(prompt)


def _prompt_length(body: dict[str, Any]) -> int:
    """Characters of all that a template may put into the prompt; a prompt of token ids counts its ids."""
    total = 0
    prompt = body.get("prompt")
    for item in prompt if isinstance(prompt, list) else [prompt]:
        total += len(item) if isinstance(item, str | list) else item is not None
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            total += len(content)
        for part in content if isinstance(content, list) else []:
            if not isinstance(part, dict) or part.get("type") not in ("text", "refusal"):
                raise Refused(422, "unsupported_content", "only text content is served here.", "messages")
            total += len(str(part.get("text", "")))
        if isinstance(message, dict):  # tool_calls with their arguments, reasoning, whatever a template asks for
            total += _chars({k: v for k, v in message.items() if k not in ("role", "content")})
    others = (value for name, value in body.items() if name not in _NOT_OF_PROMPT)
    return total + sum(_chars(value) for value in others if isinstance(value, str | dict | list))


def _chars(value: Any) -> int:
    """Characters of all strings and keys in a JSON value; any other value in it counts as one."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + _chars(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(map(_chars, value))
    return 1
