"""What an answer may be made to keep to: refused where it would hold all others up, and only there."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from xgrammar import Grammar

from ft_ray.grammar_rules import DEEPEST, MOST_COST, cost, depth, fault


def nested(levels: int) -> str:
    return '{"type":"array","items":' * levels + "{}" + "}" * levels


def schema(pattern: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}}


def format_of(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}


OVERLAPPING = "(" + "|".join(f".{{1,{i}}}x" for i in range(10, 55)) + ")"


SEVERAL = [{"type": "string", "pattern": f"^.*a{i}.*$"} for i in range(17)]
LINKED = {f"d{i}": {**one, "$ref": f"#/$defs/d{i + 1}"} for i, one in enumerate(SEVERAL)}


def optional(many: int, **kind: str) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": kind for i in range(many)}}


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"json": nested(800)}, "json is nested more than 32 deep"),
        ({"json": nested(100_000)}, "json is not valid JSON"),
        ({"json": "{"}, "json is not valid JSON"),
        ({"json": '{"enum": ["\\ud83d"]}'}, "json is not valid JSON"),
        ({"structural_tag": "[" * 50 + "]" * 50}, "structural_tag is nested more than 32 deep"),
        ({"choice": ["a", "\0a"]}, "NUL"),
        ({"json": json.dumps({"enum": ["\0"]})}, "NUL"),
        ({"regex": "x" * 501}, "more than 500 characters"),
        ({"json": json.dumps(schema("x" * 501))}, "more than 500 characters"),
        ({"json": {"patternProperties": {"x" * 501: {}}}}, "more than 500 characters"),
        ({"json": schema(OVERLAPPING)}, "too long to compile"),
        ({"json": json.dumps(schema(".?" * 200))}, "too long to compile"),
        ({"regex": "(.{1,900}x.{1,900}y.{1,900}){1,9}"}, "too long to compile"),
        ({"json": {"anyOf": [schema(f".{{1,{i}}}x") for i in range(10, 60)]}}, "too long to compile"),
        ({"json": {"anyOf": [{"type": "string", "maxLength": 500 + i} for i in range(50)]}}, "too long to compile"),
        ({"json": {"allOf": SEVERAL}}, "to hold at once"),
        ({"json": {"allOf": [{"properties": {"a": one}} for one in SEVERAL]}}, "to hold at once"),
        ({"json": {"allOf": [{"properties": {"a": one}} for one in SEVERAL[:9]]
                   + [{"additionalProperties": one} for one in SEVERAL[:9]]}}, "to hold at once"),
        ({"json": {"allOf": [{"$ref": f"#/$defs/{i}"} for i in range(17)], "$defs": dict(enumerate(SEVERAL))}},
         "to hold at once"),
        ({"json": {"anyOf": [{"maxLength": 10**400}, {"maxLength": 10**400}]}}, "too long to compile"),
        ({"json": {"anyOf": [{"maxLength": 1e999}] * 2, "regex": ".?" * 200}}, "too long to compile"),
        ({"json": optional(1200)}, "too long to compile"),
        ({"json": json.dumps(optional(450))}, "too long to compile"),
        ({"json": optional(900, type="string")}, "too long to compile"),
        ({"json": {"anyOf": [optional(300), optional(400)]}}, "too long to compile"),
        ({"json": optional(160) | {"minProperties": 80, "maxProperties": 120}}, "too long to compile"),
        ({"json": optional(160) | {"minProperties": 1}}, "too long to compile"),
        ({"json": optional(600) | {"minProperties": 300, "maxProperties": 1e999}}, "too long to compile"),
        ({"json": '{"a": NaN}'}, "json is not valid JSON"),
        ({"json": json.dumps({"properties": {"a": {"allOf": SEVERAL}}})}, "to hold at once"),
        ({"json": {"$ref": "#/$defs/d0", "$defs": {**LINKED, "d17": {}}}}, "to hold at once"),
        ({"grammar": "root ::= " + OVERLAPPING.replace(".", "[^a]").replace("x", '"x"')}, "too long to compile"),
        ({"grammar": "start: '[' x ']'  // it's\nx: [^a]{1,2000}"}, "too long to compile"),
        ({"structural_tag": json.dumps({"format": {"type": "regex", "pattern": ".?" * 200}})}, "too long to compile"),
        ({"structural_tag": json.dumps({"format": {"type": "grammar", "grammar": "root ::= " + "[^a]? " * 200}})},
         "too long to compile"),
    ],
)  # fmt: skip
def test_what_would_hold_others_up_is_refused(value: dict[str, Any], why: str) -> None:
    said = fault("structured_outputs", value)
    assert said.startswith("structured_outputs") and why in said and said.endswith(".")


def test_response_formats_and_tools_are_looked_at_too() -> None:
    assert fault("response_format", format_of(schema(OVERLAPPING)))
    assert fault("tools", [{"type": "function", "function": {"name": "f", "parameters": schema(OVERLAPPING)}}])
    assert fault("response_format", None) == fault("tools", "x") == fault("structured_outputs", 5) == ""


ORDINARY = [
    r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
    r"^[\w.+-]{1,64}@[\w-]{1,63}(\.[\w-]{1,63}){1,4}$",
    r"^\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}:\d{2}(\.\d+)?Z?)?$",
    r"^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
    r"^https?://[\w.-]+(/[\w./?%&=-]*)?$",
    r"^.{1,500}$",
    "^(" + "|".join(f"word{i}" for i in range(60)) + ")$",
    r"[)|(]+ \[ \( \| [^\]|]*",
    r"^(\+\d{1,2}\s)?\(?\d{3}\)?[\s.-]\d{3}[\s.-]\d{4}$",
    r"^[a-zA-Z0-9.!#$%&'*+/=?^_`{|}~-]+@[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)*$",
    r"^(([0-9a-fA-F]{1,4}:){7,7}[0-9a-fA-F]{1,4}|([0-9a-fA-F]{1,4}:){1,7}:|([0-9a-fA-F]{1,4}:){1,6}:[0-9a-fA-F]{1,4}|:((:[0-9a-fA-F]{1,4}){1,7}|:))$",
    r"^[^\u0000-\u001F]*$",  # the text, with a backslash
    r"^[\s\S]{1,1000}$",
]
DATE_OF_ZOD = (
    r"^(?:(?:\d\d[2468][048]|\d\d[13579][26]|\d\d0[48]|[02468][048]00|[13579][26]00)-02-29|\d{4}-(?:(?:0[13578]|1[02])"
    r"-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|(?:02)-(?:0[1-9]|1\d|2[0-8])))"
    r"T(?:(?:[01]\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:\.\d+)?)?(?:Z))$"
)
SUMS = """
?start: sum  // a sum's parts
sum: product (("+" | "-") product)*
product: NUMBER (("*" | "/") NUMBER)* | '(' sum ')'
NUMBER: [0-9]+ ("." [0-9]+)?
"""
QUERY = """
root ::= "SELECT " columns " FROM " name where? ";" # a query
columns ::= "*" | name (", " name)*
name ::= [a-zA-Z_] [a-zA-Z0-9_]{0,30}
where ::= " WHERE " name " " ("=" | "<" | ">") " " ("\\"" [^"]* "\\"" | [0-9]+)
"""


@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_patterns_pass(pattern: str) -> None:
    assert fault("response_format", format_of(schema(pattern))) == "", cost(pattern)
    assert fault("structured_outputs", {"regex": pattern}) == ""


def test_ordinary_grammars_and_schemas_pass() -> None:
    for grammar in (SUMS, QUERY, "\n".join(f"r{i} ::= [a-z]+ r{i + 1}? [0-9]*" for i in range(40))):
        assert fault("structured_outputs", {"grammar": grammar}) == "", cost(grammar, grammar=True)
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(400)}}
    either = {"oneOf": [{"type": "string", "maxLength": 10**6}, {"type": "null"}, {"maxLength": 0}, 5]}
    words = {"enum": [f"value {i}" for i in range(1000)]}
    needed = optional(900) | {"required": [f"p{i}" for i in range(900)], "minProperties": 900}
    few = optional(300) | {"maxProperties": 3}, optional(90) | {"minProperties": 1}
    passing = [wide, needed, *few, either, words, {"anyOf": [{"maxLength": 100}] * 3}, {"pattern": {"type": "string"}}]
    for value in passing:
        assert fault("structured_outputs", {"json": json.dumps(value)}) == fault("tools", [value]) == ""
    assert fault("structured_outputs", {"choice": ["yes", "no"]}) == ""
    zod = {"properties": {f"p{i}": {"format": "date-time", "pattern": DATE_OF_ZOD} for i in range(30)}}
    assert fault("response_format", format_of(zod)) == "", cost(DATE_OF_ZOD)
    both = {"allOf": [{"properties": {f"{part}{i}": {"format": "date"} for i in range(17)}} for part in "ab"]}
    beside = {"properties": {**{f"p{i}": {"format": "uuid", "pattern": "^x"} for i in range(40)},
                             "q": {"allOf": [{"pattern": "a"}, {"pattern": "b"}]}}}  # fmt: skip
    lengths = {"anyOf": [{"maxLength": 4000}, {"maxLength": 100}]}
    for value in (both, beside, lengths):
        assert fault("response_format", format_of(value)) == ""
    dated = {"properties": {f"p{i}": {"anyOf": [{"format": "date"}, {"type": "null"}]} for i in range(40)}}
    assert fault("response_format", format_of(dated)) == fault("response_format", {"allOf": SEVERAL[:16]}) == ""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"allOf": SEVERAL[:9]}}}
    assert fault("tools", [tool, tool]) == "", "one answer need not fit both"


@pytest.mark.parametrize("text", ["", *"()|*{[\\", "{1", "(?", "((((", "a{,5}", "a{5,}", "a{2}{3}"])
@pytest.mark.parametrize("grammar", [False, True])
def test_what_is_no_pattern_has_a_cost_all_the_same(text: str, grammar: bool) -> None:
    assert 0 <= cost(text, grammar) <= 100


def test_repetitions_multiply() -> None:
    assert cost("[xy]{3}") == 300 and cost("([xy]{2}x){3}") == 603 and cost("(.{1,2}){2}") == 400 * 1.5
    assert cost("[0-9a-f]{3}") == cost(r"\d{3}") == 30, "few tokens are digits"
    assert cost("a{9999999}" * 40) > MOST_COST < cost("((" * 40 + "a" + "{999999999})?)" * 40)
    assert cost("((((a{999}){999}){999}){999}){999}" * 10) > MOST_COST


@pytest.mark.parametrize(
    "value",
    [
        nested(DEEPEST - 1), json.dumps(schema("[^x]{1,900}")), json.dumps(schema("." * 500)),
        json.dumps({"type": "string", "minLength": 10**6, "maxLength": 10**9}),
        json.dumps({"type": "object", "properties": {f"p{i}": {"enum": list(range(20))} for i in range(150)}}),
    ],
)  # fmt: skip
def test_what_passes_is_read_soon(value: str) -> None:
    """Seconds of a core: the process that streams does nothing else meanwhile."""
    assert depth(json.loads(value)) <= DEEPEST and fault("structured_outputs", {"json": value}) == ""
    began = time.process_time()
    Grammar.from_json_schema(value)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("text", ["\n", "a\n", "[", "(", "{", "a{ ", "'", '"', "a :", "#", "\\", "(?", "[a](", ".{9}"])
def test_a_long_text_is_counted_soon(text: str) -> None:
    began = time.process_time()
    for grammar in (False, True):
        cost(text * (20_000 // len(text)), grammar)
    assert time.process_time() - began < 0.5
