"""What a report's sections are made of: plain values without markup, which HTML and Markdown each render."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Block", "Chart", "Charts", "Code", "Items", "Note", "Sample", "Section", "Sub", "Table", "Text"]

Marks = {True: "passed", False: "refused", None: "not reached"}


@dataclass(frozen=True)
class Text:
    """A paragraph; `good` where it is good news."""

    text: str
    good: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of plain cells. `states` gives row k's second cell a state (passed, refused, not reached) as its text.

    `stacked`: on a narrow screen each row becomes a block of its own, so that no column is out of sight.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    stacked: bool = False
    plain: bool = False
    states: Sequence[bool | None] = ()


@dataclass(frozen=True)
class Items:
    """A list; `code` where its items are to be copied."""

    items: Sequence[str]
    code: bool = False


@dataclass(frozen=True)
class Code:
    """Text to be copied as it is."""

    text: str


@dataclass(frozen=True)
class Sub:
    """A heading within a section."""

    title: str


@dataclass(frozen=True)
class Note:
    """A finding: its severity, what it is called, what it says, and examples or changes."""

    severity: str
    title: str
    text: str
    lead: str = ""
    items: Sequence[str] = ()


@dataclass(frozen=True)
class Sample:
    """One row's answers side by side: (who, text, score or None for the reference)."""

    prompt: str
    answers: Sequence[tuple[str, str, float | None]]


@dataclass(frozen=True)
class Chart:
    """A picture as SVG, made here; `said` is its caption. Markdown shows the caption, but no `key` to colours."""

    svg: str
    said: str = ""
    wide: bool = False
    key: bool = False


@dataclass(frozen=True)
class Charts:
    """Small pictures beside one another, where there is room."""

    charts: Sequence[Chart]


Block = Text | Table | Items | Code | Sub | Note | Sample | Chart | Charts


@dataclass(frozen=True)
class Section:
    """A titled part of a report; without blocks it is left out."""

    title: str
    blocks: list[Block] = field(default_factory=list)
