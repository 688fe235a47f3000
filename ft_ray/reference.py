"""docs/reference.md: every key of the recipe, from the Recipe class itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ft_ray.recipe import Recipe

__all__ = ["keys", "reference"]

_HEAD = """# The recipe's keys

Made from the code by `ft-ray config reference`; do not edit. A dot reaches into a mapping (`lora.r`), `[]` stands for
an entry of a list. Every key can be overridden on the command line: `ft-ray run recipe.yaml lora.r=32`.
Only keys without a default are needed.
"""
_TABLE = ("| key | value | default | meaning |", "|---|---|---|---|")


def keys() -> dict[str, dict[str, Any]]:
    """Dotted key to its JSON schema node, depth first, in the order of the class. Lists appear as `key[]`."""
    schema = Recipe.model_json_schema(by_alias=True)
    return dict(_walk(schema, "", schema.get("$defs", {})))


def reference() -> str:
    """The page as Markdown, one table for the top level and one for each mapping below it."""
    required = _required()
    groups: dict[str, list[str]] = {}
    for key, node in keys().items():
        group, _, name = key.rpartition(".")
        default = "**needed**" if key in required else _code(node["default"]) if "default" in node else ""
        if "properties" in node:
            default = "" if key not in required else default
        row = f"| `{name}` | {_type(node)} | {default} | {_about(node)} |"
        groups.setdefault(group, []).append(row)
    parts, seen = [_HEAD], dict[str, str]()
    for group, rows in groups.items():
        title = f"`{group}`" if group else "Top level"
        first = seen.setdefault("\n".join(rows), group)
        body = [f"As [`{first}`](#{_anchor(first)})."] if first != group else [*_TABLE, *rows]
        parts.append("\n".join([f"## {title}\n", *body]) + "\n")
    return "\n".join(parts)


def _walk(node: dict[str, Any], prefix: str, definitions: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in node.get("properties", {}).items():
        resolved = _resolve(value, definitions)
        key = f"{prefix}{name}"
        yield key, resolved
        yield from _walk(resolved, f"{key}.", definitions)
        if "properties" in (item := _resolve(resolved.get("items", {}), definitions)):
            yield from _walk(item, f"{key}[].", definitions)


def _resolve(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """The node with its reference followed; a mapping that may be null counts as the mapping."""
    if "$ref" in node:
        rest = {key: value for key, value in node.items() if key != "$ref"}
        return {**definitions[node["$ref"].rsplit("/", 1)[1]], **rest}
    for option in node.get("anyOf", []):
        if "$ref" in option:
            return {**_resolve(option, definitions), **{k: v for k, v in node.items() if k != "anyOf"}}
    return node


def _required() -> set[str]:
    schema = Recipe.model_json_schema(by_alias=True)
    definitions = schema.get("$defs", {})
    found = set(schema.get("required", []))
    for key, node in _walk(schema, "", definitions):
        inner = _resolve(node.get("items", {}), definitions) if "items" in node else node
        step = f"{key}[]" if "items" in node else key
        found |= {f"{step}.{name}" for name in inner.get("required", [])}
    return found


def _type(node: dict[str, Any]) -> str:
    if "enum" in node:
        return ", ".join(_code(value) for value in node["enum"])
    if "const" in node:
        return _code(node["const"])
    if "anyOf" in node:
        return " or ".join(dict.fromkeys(_type(option) for option in node["anyOf"]))
    kind = node.get("type", "any")
    if kind == "array":
        if "prefixItems" in node:
            return f"list of {len(node['prefixItems'])} numbers"
        item = node.get("items", {})
        return "list" if "$ref" in item else f"list of {_type(item)}"
    words = {"integer": "whole number", "object": "mapping", "boolean": "true or false", "string": "text"}
    bounds = [
        f"{sign} {node[name]:g}"
        for name, sign in (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
        if name in node
    ]
    return " ".join([words.get(kind, kind), *([", ".join(bounds)] if bounds else [])])


def _about(node: dict[str, Any]) -> str:
    text = str(node.get("description", ""))
    # A mapping's own docstring may go on for paragraphs; the first sentence serves here.
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def _anchor(title: str) -> str:
    """The fragment that GitHub gives a heading."""
    return re.sub(r"[^a-z0-9_-]", "", title.lower().replace(" ", "-"))


def _code(value: Any) -> str:
    if value is None:
        return "none"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"
