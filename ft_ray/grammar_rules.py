"""What a schema or pattern or grammar that an answer is to keep to may cost. Pure functions.

vLLM reads what a request sends of these in the process that streams all answers, and nothing else happens there
meanwhile: a schema nested 800 deep, 19 kB in a string, took half a minute. The engine then compiles it in threads of
its own, for which other requests of that kind wait. Neither has a bound.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DEEPEST", "MOST_COST", "MOST_PATTERN_CHARS", "MOST_TOGETHER", "cost", "depth", "fault"]

DEEPEST = 32
MOST_PATTERN_CHARS = 500
MOST_TOGETHER = 16
MOST_COST = 200_000
"""Of all patterns and grammars of a request, as `cost` counts them."""

_TEXTS = ("json", "structural_tag")  # of structured_outputs: JSON in JSON, if the client likes
_PATTERNS = frozenset(("pattern", "regex", "whitespace_pattern"))
_ANY_PROPERTY = frozenset(("additionalProperties", "patternProperties", "propertyNames", "unevaluatedProperties"))
_COMBINING = frozenset(("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf"))


def depth(value: Any) -> int:
    """How deep a JSON value is nested; DEEPEST + 1 for all that is deeper."""
    level, deepest = [value], 0
    while level and deepest <= DEEPEST:
        deepest += 1
        children: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                children += item.values()
            elif isinstance(item, list):
                children += item
        level = [c for c in children if isinstance(c, dict | list)]
    return deepest


def fault(name: str, value: Any) -> str:
    """What is wrong with the value of a request's field, a sentence; '' where vLLM may see it."""
    level, total = [value], 0.0
    if name == "structured_outputs" and isinstance(value, dict):
        for key in _TEXTS:
            if isinstance(value.get(key), str):
                try:
                    level.append(json.loads(value[key], parse_constant=_no_number))
                    json.dumps(level[-1], ensure_ascii=False).encode()  # half of a character, once more
                except (ValueError, RecursionError):
                    return f"{name}.{key} is not valid JSON."
                if depth(level[-1]) > DEEPEST:
                    return f"{name}.{key} is nested more than {DEEPEST} deep: flatten it, or use $ref."
    if any(_NUL.search(json.dumps(part)) for part in level):  # what reads it takes it for its end, or fails
        return f"{name} holds a NUL character: leave it out."
    if any(_together(part) > MOST_TOGETHER for part in (value if isinstance(value, list) else level)):
        return f"{name} holds more than {MOST_TOGETHER} patterns and formats, some to hold at once: send fewer of them."
    for item in _objects(level):
        own = item.get("patternProperties")
        patterns = [*own] if isinstance(own, dict) else []
        patterns += [text for key, text in item.items() if key in _PATTERNS and isinstance(text, str)]
        if any(len(text) > MOST_PATTERN_CHARS for text in patterns):
            return f"{name} holds a pattern of more than {MOST_PATTERN_CHARS} characters: shorten it, or use an enum."
        total += sum(map(cost, patterns)) + _either(item.get("anyOf")) + _either(item.get("oneOf")) + _optional(item)
        if isinstance(item.get("grammar"), str):
            total += cost(item["grammar"], grammar=True)
        if not total <= MOST_COST:
            return f"{name} takes too long to compile: repeat less, and let less be optional or open."
    return ""


def _objects(values: list[Any]) -> Iterator[dict[str, Any]]:
    left = [*values]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            yield item
            left += item.values()
        elif isinstance(item, list):
            left += item


def _together(schema: Any) -> int:
    """The most patterns and formats of a schema that one text may have to fit; 0 where it is never several.

    A schema with a keyword that xgrammar does not know is read by llguidance, in the same process, which looks whether
    any text can fit all of them: 0.05 s for 16 patterns in `allOf`, 107 s for 25.
    """
    most = 0
    for item in _objects([schema]):
        every, own = item.get("allOf"), _bound(item)
        if (isinstance(every, list) and len(every) > 1) or (own and _COMBINING & item.keys()):
            held = {key: value for key, value in item.items() if key in _COMBINING} | {"": own and {"pattern": ""}}
            linked = any("$ref" in one or "$dynamicRef" in one for one in _objects([held]))
            counts = _by_property(schema if linked else held)
            anywhere = sum(count for name, count in counts.items() if name in _ANY_PROPERTY)
            most = max(most, anywhere + max((n for name, n in counts.items() if name not in _ANY_PROPERTY), default=0))
    return most


def _bound(item: dict[str, Any]) -> bool:
    return isinstance(item.get("pattern"), str) or isinstance(item.get("format"), str)


def _by_property(schema: Any) -> Counter[str]:
    """How many parts of a schema have a pattern or a format, by the name of the property that they are of.

    Those of unlike names never have to hold at once; a name in one place counts with the same name in another.
    """
    counts: Counter[str] = Counter()
    left = [("", schema)]
    while left:
        name, item = left.pop()
        if isinstance(item, list):
            left += [(name, one) for one in item]
        elif isinstance(item, dict):
            counts[name] += _bound(item)
            for key, value in item.items():
                if key == "properties" and isinstance(value, dict):
                    left += [(f".{own}", one) for own, one in value.items()]
                else:
                    left.append((key if key in _ANY_PROPERTY else name, value))
    return counts


def _either(schemas: Any) -> float:
    """What strings of several lengths cost where an answer may be any of them: a single one has no other ways."""
    if not isinstance(schemas, list):
        return 0
    bounds = ([schema.get(key) for key in ("minLength", "maxLength")] for schema in schemas if isinstance(schema, dict))
    # In this order min() makes a bound of what is no number at all.
    longest = [max((min(_NO_MORE, n) for n in pair if isinstance(n, int | float)), default=0.0) for pair in bounds]
    # As far as one alone is longest, there is one way only.
    return _WIDE / 2 * (sum(longest) - max(longest, default=0.0)) * max(0, sum(n > 0 for n in longest) - 1)


def _optional(schema: dict[str, Any]) -> float:
    """What properties cost that may be left out: after each of them, any of the later ones may come.

    xgrammar with 49,152 tokens, seconds of one core to compile: 400 of any type 0.8, 640 1.7, 1,200 14; 640 strings
    0.4. Where their number is bounded as well, a state for each number: 80 0.4, 160 7.4.
    """
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict):
        return 0
    needed = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
    own = [value for name, value in properties.items() if name not in needed]
    many = len(own)
    told = sum(isinstance(one, dict) and one.get("type") in _BEGIN_ALIKE for one in own)
    found = (many - told / 2) ** 2
    if "minProperties" not in schema and "maxProperties" not in schema:
        return found
    most = schema.get("maxProperties")
    numbers = min(many, most) if isinstance(most, int | float) and most > 0 else many
    return found + many**2 * numbers / 5


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_BEGIN_ALIKE = ("string", "object", "array")
"""Types whose values begin with one character each."""
_WIDE, _FEW = 100, 10
"""Weights of a state after which nearly any character may come, and of one after which digits may: few tokens are."""
# In JSON. The text of an escape, which patterns hold, has one backslash more there.
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_DEEPEST_GROUP = 100
_NO_MORE = 1e12  # counting further says nothing, and ends in numbers that cannot be multiplied
_COUNTED = re.compile(r"\{\s*(\d{1,9})\s*(?:(,)\s*(?:(\d{1,9})\s*)?)?\}")
_DIGITS = re.compile(r"\[(?:\\d|[0-9a-fA-F-])+\]")
_CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]?", re.DOTALL)
_SAID = re.compile(r'"(?:\\.|[^"\\\n])*"?|#[^\n]*')  # a grammar's strings and comments


@dataclass
class _Part:
    """`size`: states that a machine for it has; `ways`: how many more than one of them an answer may be in at once."""

    size: float = 0
    ways: float = 0

    def __add__(self, other: _Part) -> _Part:
        return _Part(self.size + other.size, self.ways + other.ways)


@dataclass
class _Group:
    branches: list[list[_Part]] = field(default_factory=lambda: [[]])

    def whole(self) -> _Part:
        found = [sum(branch, _Part()) for branch in self.branches]
        # Words alone are told apart as they are read: a list of them has no more ways. Others of a fixed length are
        # told apart at their end at the latest, and until then all of them are looked at.
        varied = sum(part.ways > 0 for part in found)
        fixed = [part.size for part in found if part.size >= _WIDE and not part.ways]
        return sum(found, _Part(max(fixed, default=0) * max(0, len(fixed) - 1), max(0, varied - 1)))


def cost(text: str, grammar: bool = False) -> float:
    """Roughly what a regular expression, or a `grammar` of rules made of them, takes to read and to compile.

    Its states, all repetitions written out, times the ways in which an answer may be in it at once. Of a state after
    which many characters may come ('.', a class) nearly the whole vocabulary is looked at, of another one hardly any.
    Rules are counted each by itself: what they make of one another is not known before they are compiled.

    xgrammar with 49,152 tokens, seconds of one core to read and to compile: `.{1,500}` 0.1 and 0.1, 500 times `.` 0.0
    and 2.4. Refused: `.{1,2000}` 1.4 and 1.4; ten alternatives `.{1,40}x`, `.{1,41}x` and so on 0.0 and 3.3; 45 of
    them, 439 characters in all, or 200 times `.?` above 12, where it was ended. What passes: up to
    1,500 of any character, line ends too, 0.0 and 1.0; 20 rules of a grammar, each such an alternative, up to 7,
    measured when MOST_COST was 120,000. The engine's own threads compile beside its work.
    """
    return sum(_cost(rule, True) for rule in _rules(text)) if grammar else _cost(text, False)


def _cost(text: str, grammar: bool) -> float:
    groups, at = [_Group()], 0
    while at < len(text):
        char, size, end = text[at], 1, at + 1
        here = groups[-1].branches[-1]
        if char == "(":
            if len(groups) > _DEEPEST_GROUP:
                return _NO_MORE
            groups.append(_Group())
            at += 2 if text[end : end + 1] == "?" else 1  # (?:
            continue
        if char == "|":
            groups[-1].branches.append([])
        elif char == ")" and len(groups) > 1:
            groups[-2].branches[-1].append(groups.pop().whole())
        elif char in "*?+" and here:
            here[-1] += _Part(0, 0.25 if char == "+" else 1)
        elif char == "{" and here and (found := _COUNTED.match(text, at)):
            least, most, end = int(found[1]), int(found[3] or 0), found.end()
            many = max(least, most, 1)
            # What may be left out makes for more ways than what may be longer.
            more = 0 if not found[2] else 0.25 if least else 1
            here[-1] = _Part(min(here[-1].size * many, _NO_MORE), min(here[-1].ways * many + more, _NO_MORE))
        else:
            if char == "\\":
                size, end = _FEW if text[end : end + 1] == "d" else 1, at + 2
                size = _WIDE if text[at + 1 : end] in tuple("DwWsSpP") else size
            elif char == "[" and (found := _CLASS.match(text, at)):
                size, end = _FEW if _DIGITS.fullmatch(found[0]) else _WIDE, found.end()
            elif grammar and (found := _SAID.match(text, at)):
                size, end = found.end() - at, found.end()
            elif char == ".":
                size = _WIDE
            here.append(_Part(size))
        at = end
    while len(groups) > 1:  # not closed, as whoever reads it will say
        groups[-2].branches[-1].append(groups.pop().whole())
    whole = groups[0].whole()
    return whole.size * (1 + whole.ways)


def _rules(grammar: str) -> list[str]:
    """The rules as xgrammar sees them: vLLM makes strings and comments of Lark's those of EBNF."""
    if "::=" not in grammar:
        lines = [re.sub(r"(#|//).*$", "", line) for line in grammar.split("\n")]
        grammar = "\n".join(re.sub(r"'([^']*)'", r'"\1"', line) for line in lines)
    return re.split(r"^(?=[ \t]*[?!]?[\w.-]+[ \t]*:)", grammar, flags=re.MULTILINE)
