"""From the fields of a record to checked messages: known layouts, column maps, and their detection."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ft_ray.errors import DataError
from ft_ray.recipe import Columns
from ft_ray.row_faults import Alike

__all__ = ["Layout", "RowError", "detect_layout", "from_columns", "guess_columns"]

Messages = list[dict[str, str]]

_TURNS = ("messages", "conversations", "conversation", "dialog", "turns")
_SYSTEMS = ("system", "system_prompt")
_PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("prompt", "answer"), ("prompt", "output"),
    ("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer"),
)  # fmt: skip
_EXTRAS = ("input", "context")  # what a prompt is about: goes below it
_TRAINED = ("weight", "train", "training")  # of a turn: OpenAI's and Axolotl's ways to leave an answer untrained
_ROLES = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "human": "user", "gpt": "assistant",
    "model": "assistant", "bot": "assistant", "chatgpt": "assistant", "developer": "system", "observation": "tool",
    "prompter": "user", "ai": "assistant",
}  # fmt: skip
# Names that people give the two columns of a pair, for the column map that is offered; never used silently.
_PROMPT_LIKE = (
    "text",
    "question",
    "query",
    "sentence",
    "utterance",
    "message",
    "input",
    "source",
    "document",
    "dialogue",
    "article",
    "title",
)
_ANSWER_LIKE = (
    "category",
    "label",
    "intent",
    "answer",
    "response",
    "target",
    "output",
    "summary",
    "completion",
    "class",
)


class RowError(Exception):
    """What is wrong with one row; its reader adds the place."""


@dataclass(frozen=True)
class Layout:
    """How records become messages. `convert` gives one list of messages a row, several where it explodes."""

    name: str
    fields: tuple[str, ...]
    columns: Columns | None
    convert: Callable[[Mapping[str, Any]], Iterator[Messages]]


# Values


def _absent(value: Any) -> bool:
    """Null, or not a number: what tables write where there is no value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(value: Any) -> str:
    """Text of a field; numbers, truth values and objects become JSON, so that labels and records can be answers."""
    if isinstance(value, str):
        return value
    if _absent(value):
        return ""
    return json.dumps(value, ensure_ascii=False, default=str)


def _content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        return "".join(_text(p.get("text")) for p in value)
    if _absent(value):
        return ""
    raise RowError("the content of a turn is neither text nor a list of text parts: this tool trains on text.")


def turns(value: Any, where: str) -> Messages:
    """Messages of a role/content or from/value list. Raises RowError."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":  # CSV holds lists as JSON text
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowError(f"{where!r} holds text that is not a JSON list ({error.msg}).") from error
    if not isinstance(value, list | tuple):
        raise RowError(f"{where!r} holds {type(value).__name__}, not a list of turns.")
    out: Messages = []
    for k, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise RowError(f"turn {k} of {where!r} is {type(turn).__name__}, not an object with role and content.")
        role, content = turn.get("role"), turn.get("content")
        if role is None:
            role, content = turn.get("from"), turn.get("value")
        if role is None:
            raise RowError(
                f"turn {k} of {where!r} has the fields {', '.join(map(repr, turn))}: "
                "use role and content, or from and value."
            )
        known = _ROLES.get(str(role).lower())
        if known is None:
            raise RowError(f"turn {k} has the role {role!r}: use system, user, assistant or tool.")
        if turn.get("tool_calls"):
            raise RowError(f"turn {k} holds tool_calls: this tool trains on text, so write the call into content.")
        off = next((key for key in _TRAINED if known == "assistant" and turn.get(key) not in (None, 1)), None)
        if off is not None:
            said = (
                f"turn {k} has {off}: {json.dumps(turn[off], default=str)}, but every answer is trained here, and all "
                f"alike: take {off} out, or the turns that are not to be trained."
            )
            raise RowError(Alike(said))
        out.append({"role": known, "content": _content(content)})
    return out


def check(messages: Messages) -> None:
    """Role order and empty contents. Raises RowError."""
    if not messages:
        raise RowError("the conversation has no turns.")
    previous = ""
    for k, message in enumerate(messages, 1):
        role = message["role"]
        if not message["content"].isascii():
            try:
                message["content"].encode()
            except UnicodeEncodeError:
                raise RowError(f"turn {k} holds half of a character (a lone surrogate): mend its escapes.") from None
        if role == "system":
            if k > 1:
                raise RowError(f"wrong role order: turn {k} is a system turn, which must come first.")
        elif role == "user":
            if previous not in ("", "system", "assistant"):
                raise RowError(f"wrong role order: turn {k} is a {role} turn after a {previous} turn.")
        elif role == "assistant":
            if previous not in ("user", "tool"):
                after = (
                    f"after {'an' if previous == 'assistant' else 'a'} {previous} turn"
                    if previous
                    else "without a user turn before it"
                )
                raise RowError(f"wrong role order: turn {k} is an assistant turn {after}.")
            if not message["content"].strip():
                raise RowError("the answer is empty: fill or remove the row.")
        elif previous not in ("assistant", "tool"):
            raise RowError(f"wrong role order: turn {k} is a tool turn after a {previous or 'missing'} turn.")
        if role == "user" and not message["content"].strip():
            raise RowError("the prompt is empty: fill or remove the row.")
        previous = role
    if previous != "assistant":
        raise RowError(f"the last turn is a {previous} turn, so there is no answer to train on: end with assistant.")


def _pair(prompt: str, answer: str, system: str) -> Messages:
    messages = [{"role": "system", "content": system}] if system.strip() else []
    return [*messages, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


# Known layouts


def detect_layout(record: Mapping[str, Any]) -> Layout | None:
    """The layout whose fields this record has, or None."""
    for name in _TURNS:
        value = record.get(name)
        if isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("[{")):
            return _turns_layout(name, record)
    system = next((s for s in _SYSTEMS if s in record), None)
    extra = next((e for e in _EXTRAS if e in record), None)
    for output in ("output", "response"):
        if "instruction" in record and output in record:
            return _known("instruction", system=system, instruction="instruction", input=extra, output=output)
    for prompt, completion in _PAIRS:
        if prompt in record and completion in record:
            if isinstance(record[prompt], list):
                return _conversational_pair(prompt, completion)
            return _known("prompt/completion", prompt=prompt, input=extra, completion=completion, system=system)
    return None


def _columns(**given: str | None) -> Columns:
    return Columns.model_validate(given)


def _known(name: str, **given: str | None) -> Layout:
    layout = from_columns(_columns(**given))
    return Layout(name, layout.fields, None, layout.convert)


def _turns_layout(name: str, record: Mapping[str, Any]) -> Layout:
    system = next((s for s in _SYSTEMS if s in record), None)
    value = record[name]
    sharegpt = isinstance(value, list) and value and isinstance(value[0], dict) and "from" in value[0]
    return _known("sharegpt" if sharegpt else "messages", messages=name, system=system)


def _conversational_pair(prompt: str, completion: str) -> Layout:
    def convert(record: Mapping[str, Any]) -> Iterator[Messages]:
        yield turns(record.get(prompt), prompt) + turns(record.get(completion), completion)

    return Layout("prompt/completion messages", (prompt, completion), None, convert)


# Column maps


def _complete(given: Mapping[str, Any]) -> bool:
    keys = given.keys()
    return "messages" in keys or {"prompt", "completion"} <= keys or {"instruction", "output"} <= keys


def _getter(path: str) -> tuple[str | None, Callable[[Any], Any]]:
    """(explode prefix or None, function from record or item to value)."""
    prefix, explode, rest = path.partition("[]")
    parts = tuple(p for p in (rest.lstrip(".") if explode else path).split(".") if p)

    def get(value: Any) -> Any:
        for part in parts:
            if not isinstance(value, Mapping) or part not in value:
                return _MISSING
            value = value[part]
        return value

    if not explode:
        # A column may have a dot in its own name.
        return None, lambda record: record[path] if path in record else get(record)
    return prefix, get


_MISSING = object()


def from_columns(columns: Columns) -> Layout:
    """The layout of a column map. Raises DataError for a map from which no row can be made."""
    given = {k: v for k, v in columns.model_dump().items() if v is not None}
    if not _complete(given):
        raise DataError(
            f"the column map {{{', '.join(given)}}} makes no row: give messages, or prompt and completion, "
            "or instruction (with input) and output."
        )
    getters = {key: _getter(path) for key, path in given.items()}
    prefixes = {prefix for prefix, _ in getters.values() if prefix is not None}
    if len(prefixes) > 1:
        raise DataError(f"the column map explodes {' and '.join(sorted(prefixes))}: only one list can make the rows.")
    prefix = next(iter(prefixes), None)
    outer = _getter(prefix)[1] if prefix is not None else None

    def value(key: str, record: Mapping[str, Any], item: Any, required: bool) -> Any:
        if key not in getters:
            return ""
        inside, get = getters[key]
        found = get(item if inside is not None else record)
        if found is _MISSING or _absent(found):
            if required:
                answer = "the answer is missing: " if key in ("completion", "output") else ""
                state = "is not there" if found is _MISSING else "is null" if found is None else "is NaN"
                if found is _MISSING:
                    state += _near(given[key], record)
                said = f"{answer}field {given[key]!r} {state}{_has(record)}."
                raise RowError(Alike(said) if found is _MISSING else said)
            return ""
        return found

    def one(record: Mapping[str, Any], item: Any) -> Messages:
        system = _text(value("system", record, item, False))
        if "messages" in given:
            messages = turns(value("messages", record, item, True), given["messages"])
            if system.strip() and (not messages or messages[0]["role"] != "system"):
                messages.insert(0, {"role": "system", "content": system})
            return messages
        asked, answered = ("prompt", "completion") if "prompt" in given else ("instruction", "output")
        prompt = _text(value(asked, record, item, True))
        extra = _text(value("input", record, item, False))
        if extra.strip():
            prompt = f"{prompt}\n\n{extra}"
        return _pair(prompt, _text(value(answered, record, item, True)), system)

    def convert(record: Mapping[str, Any]) -> Iterator[Messages]:
        if outer is None:
            yield one(record, record)
            return
        items = outer(record)
        if not isinstance(items, list):
            raise RowError(f"field {prefix!r} is no list of items{_has(record)}.")
        for item in items:
            yield one(record, item)

    fields = tuple(dict.fromkeys(re.split(r"[.\[]", path)[0] for path in given.values()))
    return Layout("column map", fields, columns, convert)


def _near(field: str, record: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(field, [str(k) for k in record], n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _has(record: Mapping[str, Any]) -> str:
    return f" (the row has {', '.join(map(repr, list(record)[:8]))})"


# When nothing matches


def guess_columns(record: Mapping[str, Any]) -> Columns | None:
    """A column map that probably fits a record of no known layout; to be offered, not to be used silently."""
    names = {str(k).lower(): str(k) for k in record}
    nested = _guess_nested(record, names)
    if nested is not None:
        return nested
    prompt = next((names[n] for n in _PROMPT_LIKE if n in names), None)
    answer = next((names[n] for n in _ANSWER_LIKE if n in names and names[n] != prompt), None)
    if prompt is None or answer is None:
        texts = [str(k) for k, v in record.items() if isinstance(v, str)]
        if len(record) == 2 and len(texts) == 2:
            prompt, answer = texts
    return _columns(prompt=prompt, completion=answer) if prompt and answer else None


def _guess_nested(record: Mapping[str, Any], names: Mapping[str, str]) -> Columns | None:
    """An instruction beside a list of objects with the answers, as Self-Instruct has it."""
    instruction = next((names[n] for n in ("instruction", *_PROMPT_LIKE) if n in names), None)
    for key, value in record.items():
        if instruction is None or not isinstance(value, list) or not value or not isinstance(value[0], dict):
            continue
        answer = next((n for n in ("output", *_ANSWER_LIKE) if n in value[0]), None)
        if answer is not None:
            extra = f"{key}[].input" if "input" in value[0] else None
            return _columns(instruction=instruction, input=extra, output=f"{key}[].{answer}")
    return None


def unknown_layout(record: Mapping[str, Any]) -> str:
    """Says which fields a record has, the nearest layout, and the column map that would mend it."""
    has = ", ".join(map(repr, list(record)[:12]))
    if "chosen" in record and "rejected" in record:
        return Alike(f"the fields {has} are preference pairs, which are not trained on here; {_chosen(record)}.")
    layouts: list[Sequence[str]] = [("messages",), ("conversations",), ("instruction", "input", "output"),
                                    ("prompt", "completion")]  # fmt: skip
    names = [str(k) for k in record]

    def score(layout: Sequence[str]) -> float:
        return sum(max((difflib.SequenceMatcher(None, f, n.lower()).ratio() for n in names), default=0.0)
                   for f in layout) / len(layout)  # fmt: skip

    nearest = max(layouts, key=score)
    guess = guess_columns(record) or _near_map(nearest, names)
    if guess is not None:
        mapped = ", ".join(f"{k}: {v}" for k, v in guess.model_dump().items() if v is not None)
        mend = f"if these are your columns, set data.columns to {{{mapped}}}"
    else:
        mend = "name them in data.columns, for example {prompt: question, completion: answer}"
    near = f" (nearest: {'/'.join(nearest)})" if score(nearest) >= 0.5 else ""
    return Alike(f"the fields {has} match no known layout{near}; {mend}.")


def _chosen(record: Mapping[str, Any]) -> str:
    """How to fine-tune on the preferred answers of preference pairs."""
    prompt = next((n for n in ("prompt", *_PROMPT_LIKE) if isinstance(record.get(n), str)), None)
    if prompt and isinstance(record["chosen"], str):
        columns = f"{{prompt: {prompt}, completion: chosen}}"
    elif isinstance(record["chosen"], list) and not isinstance(record.get("prompt"), list):
        columns = "{messages: chosen}"
    else:
        return "to fine-tune on the chosen answers alone, write each with its prompt as messages"
    return f"to fine-tune on the chosen answers alone, set data.columns to {columns}"


def _near_map(layout: Sequence[str], names: Sequence[str]) -> Columns | None:
    found: dict[str, str] = {}
    for want in layout:
        near = difflib.get_close_matches(want, [n for n in names if n not in found.values()], n=1, cutoff=0.6)
        if near:
            found["messages" if want == "conversations" else want] = near[0]
    return _columns(**found) if _complete(found) else None
