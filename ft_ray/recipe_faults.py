"""What pydantic found wrong with a recipe, said to a person: file and line, key, what is wanted, nearest name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pydantic_core import ErrorDetails

from ft_ray.strict_yaml import Path, dotted, nearest

__all__ = ["Where", "in_file", "line_of", "worded"]

Where = Callable[[Path], str]
"""The place of a key path, as a person is told it: 'file:line'."""


def line_of(fault: str) -> int:
    """The line of 'FILE:LINE: ...', for order; 0 where a fault has none."""
    found = re.match(r"[^\n]*?:(\d+): ", fault)
    return int(found[1]) if found else 0


def worded(errors: Iterable[ErrorDetails], value: Any, where: Where, schema: dict[str, Any]) -> Iterator[str]:
    """One sentence a fault. A union fails once for each of its members: they become one fault of the field."""
    unions: dict[Path, list[tuple[Path, ErrorDetails]]] = {}
    for error in errors:
        if error["type"] == "too_short" and error["input"]:
            continue  # pydantic counts the valid items only; what is wrong with the others is said already
        loc, field = in_file(error, value)
        unions.setdefault(field, []).append((loc, error))
    for field, tried in unions.items():
        # The member that got further into the value is the one that was meant.
        deeper = [(loc, error) for loc, error in tried if loc != field] or tried[:1]
        for loc, error in deeper:
            others = [e["msg"] for at, e in tried[1:] if at == loc and e is not error]
            yield _fault(loc, error, others, where, schema)


def in_file(error: ErrorDetails, value: Any) -> tuple[Path, Path]:
    """The keys of a fault as they are in the file, and those up to the first union on the way.

    Unions add the name of the tried member to the location; what is no key of the value there is such a name.
    """
    loc: Path = ()
    field: Path | None = None
    for part in error["loc"]:
        listed = isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)
        if listed or (isinstance(value, Mapping) and part in value):
            value = value[part]
        elif not (error["type"] in ("missing", "invalid_key") and part == error["loc"][-1]):
            field = loc if field is None else field
            continue
        loc = (*loc, part)
    return loc, loc if field is None else field


def _fault(
    loc: Path, error: ErrorDetails, others: Iterable[str], where: Where, schema: dict[str, Any]
) -> str:
    name, place = dotted(loc), where(loc)
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key {name!r}{nearest(str(loc[-1]), _keys_at(loc[:-1], schema))}."
    if error["type"] == "missing":
        return f"{place}: {name!r} is missing: add it."
    message = error["msg"]
    own = message.startswith("Value error, ")
    message = message.removeprefix("Value error, ") if own else f"{message[:1].lower()}{message[1:]}"
    if error["type"] == "string_pattern_mismatch":
        message = "use letters, digits, '.', '_' and '-', a letter or digit first, at most 63 in all"
    message = re.sub(r"tuple should have (at least \d+ items?) after validation, not \d+", r"give \1", message)
    message = " or ".join([message, *(other.removeprefix("Input should be ") for other in others)])
    message = re.sub(r", unable to parse string as an? \w+", "", message).replace("a valid tuple", "a list")
    message = re.sub(r"a valid dictionary or instance of \w+", "a mapping", message)
    value = error["input"]
    said = isinstance(value, dict | list) or (isinstance(value, str) and repr(value) in message)
    given = f", not {value!r}" if name and not said else ""
    subject = f"{name!r}: " if name else ""
    return f"{place}: {subject}{message}{given}."


def _keys_at(loc: Path, schema: dict[str, Any]) -> Iterator[str]:
    definitions = schema.get("$defs", {})

    def resolve(node: Any) -> Any:
        if "$ref" in node:
            return resolve(definitions[node["$ref"].rsplit("/", 1)[1]])
        for option in node.get("anyOf", []) + node.get("allOf", []):
            found = resolve(option)
            if "properties" in found or "items" in found:
                return found
        return node

    node = resolve(schema)
    for part in loc:
        node = resolve(node["items"] if isinstance(part, int) else node.get("properties", {}).get(part, {}))
    yield from node.get("properties", {})
