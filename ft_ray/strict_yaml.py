"""YAML read strictly: 2e-4 is a number, a duplicate key is an error, and every value knows its line.

PyYAML follows YAML 1.1, where `2e-4` is a string, `no` is false, and a repeated key silently wins.
A recipe that trains for hours must not hinge on any of these, so scalars resolve as in YAML 1.2's
core schema (https://yaml.org/spec/1.2.2/#103-core-schema).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from ft_ray.errors import RecipeError

__all__ = ["Document", "Path", "dotted", "nearest", "parse"]

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A parsed file: its value, and the 1-based line of every key path in it."""

    value: Any
    lines: dict[Path, int] = field(default_factory=dict)

    def line(self, path: Path) -> int | None:
        """The line of `path`, or of its nearest parent that is in the file."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None


class _Loader(yaml.SafeLoader):
    pass


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("int", r"[-+]?[0-9]+(?:_[0-9]+)*", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
]:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), [*_first, *([""] if _tag == "null" else [])]
    )


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    # PyYAML reads a leading zero as octal; YAML 1.2 does not.
    return int(str(loader.construct_scalar(node)).replace("_", ""), 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def dotted(path: Path) -> str:
    """('data', 'train', 0, 'path') -> 'data.train[0].path'."""
    out = ""
    for part in path:
        out += f"[{part}]" if isinstance(part, int) else (f".{part}" if out else str(part))
    return out


def nearest(name: str, valid: Iterable[str]) -> str:
    """' (did you mean …?)' for the closest of `valid`, or the list when nothing is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.55)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (valid here: {', '.join(names)})" if names else ""


def parse(text: str, name: str, found: list[str] | None = None) -> Document:
    """Parses one YAML document. Raises RecipeError with every duplicate key, or the syntax error.

    With `found`, faults of keys are added to it instead, and the first of each key counts.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[Path, int] = {}
        faults: list[str] = [] if found is None else found
        if node is not None:
            _walk(node, (), lines, faults, name, set())
        if faults and found is None:
            raise RecipeError(faults)
        value = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError([f"{where}: not valid YAML: {problem}; check the indentation and quoting there."]) from error
    finally:
        loader.dispose()
    return Document(value, lines)


def _walk(
    node: yaml.Node, path: Path, lines: dict[Path, int], faults: list[str], name: str, seen: set[int]
) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if id(node) in seen:  # an alias: its anchor was walked already
        return
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        kept = []
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                faults.append(f"{name}:{line}: a key must be a plain word, not a list or mapping.")
                continue
            key = str(key_node.value)
            if key in first:
                faults.append(
                    f"{name}:{line}: duplicate key {dotted((*path, key))!r}, first set on line {first[key]}: keep one."
                )
                continue
            first[key] = line
            kept.append((key_node, value_node))
            lines[(*path, key)] = line
            _walk(value_node, (*path, key), lines, faults, name, seen | {id(node)})
        node.value = kept
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), lines, faults, name, seen | {id(node)})
