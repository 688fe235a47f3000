"""A run's report as Markdown, for a pull request or a terminal. No text of models and data acts as markup."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ft_ray import report
from ft_ray.report import Run
from ft_ray.report_blocks import Block, Chart, Charts, Code, Items, Marks, Note, Sample, Sub, Table, Text
from ft_ray.report_sections import facts, sections

__all__ = ["markdown"]

_MOST = 500  # characters of an answer


def markdown(run: Run, *, api: tuple[float, float] | None = None, command: str = "") -> str:
    """The sections that `report_page.html` shows; of charts their captions only."""
    out = [f"# {_md(run.recipe.name)}", "", _md(report.verdict(run)), ""]
    out += [*(f"- {_md(name)}: {_md(value)}" for name, value in facts(run)), ""]
    for section in sections(run, api=api, command=command):
        out += [f"## {section.title}", ""]
        for block in section.blocks:
            out += _SHOWN[type(block)](block)
    return "\n".join(out).rstrip() + "\n"


def _md(text: object) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no new cell."""
    shown = " ".join(str(text).split())
    for sign in ("\\", "`", "*", "_", "[", "]", "|", "#"):
        shown = shown.replace(sign, f"\\{sign}")
    return shown.replace("<", "&lt;").replace(">", "&gt;")


def _rows(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(map(_md, head)) + " |", "|" + " --- |" * len(head)]
    return [*lines, *("| " + " | ".join(_md(c) for c in row) + " |" for row in rows), ""]


def _table(block: Table) -> list[str]:
    rows = [list(row) for row in block.rows]
    for row, state in zip(rows, block.states, strict=False):
        row[1] = Marks[state]
    return _rows(block.head, rows)


def _items(items: Sequence[str], code: bool = False) -> list[str]:
    # Backticks around text that has some would end the code early.
    return [f"- `{i}`" if code and "`" not in i and "\n" not in i else f"- {_md(i)}" for i in items]


def _code(block: Code) -> list[str]:
    return [*(f"    {line}" for line in block.text.rstrip().splitlines()), ""]


def _note(block: Note) -> list[str]:
    lead = f" {_md(block.lead)}" if block.lead else ""
    items = [f"  {line}" for line in _items(block.items, code=True)]
    return [f"- **{_md(block.title)}** ({_md(block.severity)}): {_md(block.text)}{lead}", *items, ""]


def _sample(block: Sample) -> list[str]:
    rows = [["prompt", block.prompt[:_MOST], ""]]
    rows += [[name, text[:_MOST], "" if score is None else f"{score:g}"] for name, text, score in block.answers]
    return _rows(["who", "text", "score"], rows)


def _chart(block: Chart) -> list[str]:
    return [_md(block.said), ""] if block.said and not block.key else []


_SHOWN: dict[type[Block], Callable[[Any], list[str]]] = {
    Text: lambda block: [_md(block.text), ""],
    Items: lambda block: [*_items(block.items, block.code), ""],
    Sub: lambda block: [f"### {_md(block.title)}", ""],
    Table: _table, Code: _code, Note: _note, Sample: _sample, Chart: _chart,
    Charts: lambda block: [line for chart in block.charts for line in _chart(chart)],
}  # fmt: skip
