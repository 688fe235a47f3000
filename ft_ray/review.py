"""A seeded sample of rows for a person to judge, as a CSV that any spreadsheet opens, and its way back."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ft_ray.errors import DataError, StorageError
from ft_ray.prepared_data import Prepared
from ft_ray.rows import SPLITS

__all__ = ["MARKS", "Review", "read_review", "write_review"]

MARKS = ("ok", "bad", "unsure")
_COLUMNS = ("mark", "note", "place", "prompt", "answer")


@dataclass(frozen=True)
class Review:
    """What a person marked: counts by mark, rows not marked yet, and the places marked bad with their notes.

    `stale` are the places of marked rows that the data no longer hold as they were marked; their marks do not count.
    """

    marks: dict[str, int]
    unmarked: int
    bad: list[str]
    stale: list[str] = field(default_factory=list)

    @property
    def judged(self) -> int:
        return sum(self.marks.values())


def write_review(prepared: Prepared, path: str | Path, *, rows: int = 50, seed: int = 0) -> Path:
    """Writes `rows` training rows, drawn with the seed, to be marked ok, bad or unsure.

    An existing file is left as it is: it may hold marks. Raises StorageError when it cannot be written.
    """
    target = Path(path)
    if target.exists():
        return target
    data = prepared.rows("train")
    chosen = np.sort(np.random.default_rng(seed).choice(len(data), size=min(rows, len(data)), replace=False))
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(_COLUMNS)
    for i in chosen.tolist():
        row = data[i]
        *before, answer = row["messages"]
        writer.writerow(["", "", f"{row['file']}:{row['line']}", _plain(_prompt(before)), _plain(answer["content"])])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(buffer.getvalue(), encoding="utf-8-sig", newline="")  # the BOM makes Excel read UTF-8
    except OSError as error:
        raise StorageError(
            f"review file {target} cannot be written ({error.strerror}): choose another place."
        ) from error
    return target


def _plain(text: str) -> str:
    # A spreadsheet would run a cell that begins like a formula.
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _words(text: str | None) -> list[str]:
    return (text or "").removeprefix("'").split()  # spreadsheets change line ends, and `_plain` may have put a quote


def _still_there(rows: Sequence[Mapping[str, str | None]], prepared: Prepared) -> Callable[[Mapping[str, Any]], bool]:
    """Whether the data still hold a row of the file at its place, with the text that was shown."""
    wanted = {row["place"] for row in rows}
    texts: dict[str, list[tuple[list[str], list[str]]]] = {}
    for split in SPLITS:
        data = prepared.rows(split)
        files, lines = (data.with_format("arrow")[name][:].to_pylist() for name in ("file", "line"))
        for i, place in enumerate(f"{file}:{line}" for file, line in zip(files, lines, strict=True)):
            if place in wanted:
                *before, answer = data[i]["messages"]
                texts.setdefault(place, []).append((_words(_prompt(before)), _words(answer["content"])))

    def there(row: Mapping[str, Any]) -> bool:
        shown = [(k, _words(row.get(name))) for k, name in enumerate(("prompt", "answer")) if row.get(name)]
        return any(all(text[k] == words for k, words in shown) for text in texts.get(row["place"], []))

    return there


def _prompt(messages: Sequence[Mapping[str, str]]) -> str:
    return "\n".join(f"[{m['role']}] {m['content']}" for m in messages)


def read_review(path: str | Path, prepared: Prepared | None = None) -> Review:
    """Reads the marks back; those of rows that `prepared` no longer holds do not count.

    Raises DataError for a mark that is none of MARKS, with its line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"review file {path} cannot be read ({error}): save it as CSV in UTF-8.") from error
    first = text.split("\n", 1)[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
    if not {"mark", "place"} <= set(reader.fieldnames or ()):
        raise DataError(f"review file {path} has no columns mark and place: write it anew and mark that one.")
    marks, unmarked, bad, stale, faults = dict.fromkeys(MARKS, 0), 0, [], [], []
    rows = list(reader)
    there = _still_there(rows, prepared) if prepared is not None else lambda _: True
    for number, row in enumerate(rows, 2):
        mark = (row["mark"] or "").strip().lower()
        if not mark:
            unmarked += 1
        elif mark not in marks:
            faults.append(f"row {number} has the mark {mark!r}")
        elif not there(row):
            stale.append(row["place"])
        else:
            marks[mark] += 1
            if mark == "bad":
                note = (row.get("note") or "").strip()
                bad.append(row["place"] + (f": {note}" if note else ""))
    if faults:
        raise DataError(f"review file {path}: {'; '.join(faults[:5])}: use ok, bad or unsure.")
    return Review(marks, unmarked, bad, stale)
