"""Wrong answers of a run beside their references, in a file that a person reviews and training then reads.

Each row is an ordinary training row (messages that end in the reference) with what the model said instead, so that a
reviewer sees both and may mend the reference. Only rows marked ok become training rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ft_ray.answer_faults import broken
from ft_ray.errors import DataError, StorageError
from ft_ray.review import MARKS

__all__ = ["accepted", "write", "wrong_answers"]


def wrong_answers(predictions: Iterable[Mapping[str, Any]], primary: str, most: int = 200) -> list[dict[str, Any]]:
    """Rows for review: answers of a wrong form first, then those with a `primary` score below 1."""
    rows = list(predictions)
    _, malformed = broken(rows)
    bad = {p["id"] for p in malformed}
    wrong = malformed + [p for p in rows if p["id"] not in bad and p["scores"].get(primary, 1.0) < 1.0]
    return [
        {
            "mark": "",
            "why": "not the format" if p["id"] in bad else f"{primary} {p['scores'].get(primary, 0.0):g}",
            "said": p["prediction"],
            "messages": [*p["prompt"], {"role": "assistant", "content": p["reference"]}],
            "from": f"{p.get('file')}:{p.get('line')}",
        }
        for p in wrong[:most]
    ]


def write(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows for review as JSONL; an existing file is refused, it may hold marks. Returns their number."""
    target = Path(path)
    if target.exists():
        raise StorageError(f"{target} exists and may hold marks: choose another name, or remove it.")
    lines = [json.dumps(dict(row), ensure_ascii=False) for row in rows]
    try:
        target.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{target} cannot be written ({error.strerror}): choose another place.") from error
    return len(lines)


def accepted(path: str | Path, out: str | Path) -> int:
    """Writes the rows marked ok as training rows to `out`; returns their number. Raises DataError.

    A reviewer may change the reference before marking it.
    """
    kept, faults = [], []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): save it as UTF-8.") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            mark, messages = str(row["mark"]).strip().lower(), row["messages"]
        except (ValueError, KeyError, TypeError):
            faults.append(f"{path}:{number}: no row with mark and messages")
            continue
        if mark and mark not in MARKS:
            faults.append(f"{path}:{number}: the mark {mark!r}")
        elif mark == "ok":
            kept.append({"messages": messages})
    if faults:
        raise DataError(f"{'; '.join(faults[:5])}: use ok, bad or unsure.")
    if not kept:
        raise DataError(f"{path} has no row marked ok: read the rows and mark those whose reference is right.")
    Path(out).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept), encoding="utf-8")
    return len(kept)
