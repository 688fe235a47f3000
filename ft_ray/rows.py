"""From sources to checked rows: messages, their place, and the prompt group that decides their split."""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from ft_ray.errors import DataError
from ft_ray.layout import Layout, RowError, check, detect_layout, from_columns, guess_columns, unknown_layout
from ft_ray.recipe import Columns, Source, Split
from ft_ray.records import DataFile, records
from ft_ray.row_faults import Faults
from ft_ray.sources import locate

__all__ = [
    "FILL_IN", "SPLITS", "Detected", "Row", "SplitName", "detect", "group_of", "kept_aside", "normal", "read",
    "read_file", "split",
]  # fmt: skip

SplitName = Literal["train", "validation", "test"]
FILL_IN = "FILL_IN"
"""What a new recipe has for a column that the user is to name."""
SPLITS: tuple[str, ...] = ("train", "validation", "test")

_log = logging.getLogger("ft_ray")
_ASKED = ("instruction", "prompt/completion")  # the layouts without turns, which may have keys of their own
_MORE = ("input", "context", "system", "system_prompt")  # what only some rows of a known layout may have
_TURN = ("role", "content", "from", "value", "weight", "train", "training")  # the last three: answers are refused
_TAIL = re.compile(r"[.,!?;:'\"]+(?=\s|$)")


@dataclass(frozen=True)
class Row:
    """One checked row: messages of role and content, its place, the hash of its prompt group, and the source's fields.

    `fields` are those that the messages were read from, as text.
    """

    messages: list[dict[str, str]]
    file: str
    line: int
    group: str
    fields: str = ""


@dataclass(frozen=True)
class Detected:
    """What a source looks like. `columns` is the map to write into a recipe, None where detection needs none.

    `fields`: those of its first row where nothing fits; `example` is empty then.
    """

    format: str
    layout: str
    columns: Columns | None
    example: list[dict[str, str]]
    fields: tuple[str, ...] = ()


# Reading


def normal(text: str) -> str:
    """One case, single spaces, no punctuation at the end of words: what makes two prompts near-same."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(_TAIL.sub(" ", text.casefold()).split())


def group_of(messages: Sequence[dict[str, str]]) -> str:
    """Hash (hex) of the first user turn in its normal form.

    Rows of one group always fall into one split: repeated prompts, whatever their answers or system message,
    and the prefixes of one conversation.
    """
    text = next((m["content"] for m in messages if m["role"] == "user"), "")
    return hashlib.blake2b(normal(text).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def split(group_hash: str, fractions: Split) -> SplitName:
    """The split of a prompt group: a pure function of its hash, so that appended data move no row."""
    at = int(group_hash[:16], 16) / 2**64
    if at < fractions.test:
        return "test"
    return "validation" if at < fractions.test + fractions.validation else "train"


def kept_aside(group_hash: str) -> bool:
    """Whether general data of this prompt group measure forgetting (a fifth) rather than train."""
    return split(group_hash, Split(validation=0, test=0.2)) == "test"


def read(
    source: Source, columns: Columns | None = None, system: str | None = None, *, quiet: bool = False
) -> Iterator[Row]:
    """Streams the rows of a source. Raises one DataError at the end for all that cannot be used.

    `columns` is the map for sources that have none of their own; `system` a message for rows without one; `quiet`
    leaves the layout unsaid.
    """
    faults = Faults()
    for file in locate(source):
        yield from read_file(file, source.columns or columns, system, faults, quiet=quiet)
    faults.check()


def read_file(
    file: DataFile, columns: Columns | None, system: str | None, faults: Faults, *, quiet: bool = False
) -> Iterator[Row]:
    """Streams the rows of one located file; what cannot be used goes to `faults`."""
    mapped = from_columns(columns) if columns is not None else None
    layout, said = mapped, quiet
    known: set[str] = set()  # keys that were said, or are used
    later: dict[str, None] = {}
    unfilled = columns is not None and FILL_IN in columns.model_dump().values()
    for record in records(file, faults):
        if unfilled and FILL_IN not in record.value:
            has = ", ".join(map(str, record.value))
            raise DataError(f"{file.name}: the recipe has FILL_IN for its columns: fill them in; the file has: {has}.")
        if layout is None:
            layout = detect_layout(record.value)
        if layout is None:
            faults.add(f"{file.name}:{record.line}", unknown_layout(record.value))
            continue
        if not said:
            unused = _unused(layout, record.value)
            _log.info("%s: %s, read as %s (%s)%s", file.name, file.format, layout.name, ", ".join(layout.fields),
                      _listed("; not used: ", unused))  # fmt: skip
            known.update(layout.fields, unused)
            said = True
        try:
            used, found = _convert(layout, record.value, mapped is None)
            if not quiet and (layout.name not in _ASKED or not record.value.keys() <= known):
                later |= dict.fromkeys(key for key in _unused(used, record.value) if key not in known)
            for messages in found:
                check(messages)
        except RowError as fault:
            faults.add(f"{file.name}:{record.line}", fault.args[0])
            continue
        for messages in found:
            if system and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": system})
            yield Row(messages, file.name, record.line, group_of(messages), ", ".join(used.fields))
    if later:
        _log.info("%s: later rows%s", file.name, _listed(" have what is not used: ", list(later)))


def _convert(layout: Layout, value: dict[str, Any], may_differ: bool) -> tuple[Layout, list[list[dict[str, str]]]]:
    """Messages of a record and the layout they were read by; one whose fields fit another known layout, by that."""
    if may_differ and any(f in value for f in _MORE if f not in layout.fields):
        layout = detect_layout(value) or layout  # the first row had none: that of this one must not be lost
    try:
        return layout, list(layout.convert(value))
    except RowError:
        other = detect_layout(value) if may_differ else None
        if other is not None and other.fields != layout.fields:
            return other, list(other.convert(value))
        if may_differ and other is None and not any(f in value for f in layout.fields):
            raise RowError(unknown_layout(value)) from None
        raise


def _unused(layout: Layout, record: dict[str, Any]) -> list[str]:
    """What a record has that its layout does not read: keys, and keys of its turns."""
    names = [str(k) or "a column without a name" for k in record if k not in layout.fields]
    for field in layout.fields:
        names += [f"{field}[].{key}" for key in _more_of_turns(record.get(field))]
    return names


def _listed(said: str, names: list[str]) -> str:
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"{said}{', '.join(names[:12])}{more}" if names else ""


def _more_of_turns(value: Any) -> list[str]:
    """Keys of a list of turns beside role and content."""
    turns = [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
    if not turns or turns[0].keys().isdisjoint(_TURN):
        return []
    return list(dict.fromkeys(str(k) for turn in turns for k, v in turn.items() if k not in _TURN and v is not None))


def detect(path: str, format: str = "auto", *, split: str = "train", stub: bool = False) -> Detected:
    """Format, layout and one example of a source, for a new recipe; said through logging.

    Where no known layout fits, a column map is guessed from the names and said to be a guess. Raises
    DataError where nothing can be guessed; with `stub`, the fields are returned instead, for the user to map.
    """
    source = Source.model_validate({"path": path, "format": format, "split": split})
    faults, unusable = Faults(), ""
    for file in locate(source):
        for record in islice(records(file, faults), 50):
            layout, columns = detect_layout(record.value), None
            if layout is None:
                columns = guess_columns(record.value)
                if columns is None and stub:
                    _log.warning("%s: %s", path, unknown_layout(record.value))
                    return Detected(file.format, "unknown", None, [], tuple(map(str, record.value)))
                if columns is None:
                    raise DataError(f"{file.name}:{record.line}: {unknown_layout(record.value)}")
                layout = from_columns(columns)
            try:
                messages = next(layout.convert(record.value))
                check(messages)
            except RowError as fault:
                unusable = unusable or f"{file.name}:{record.line}: {fault.args[0]}"
                continue
            except StopIteration:
                continue
            if columns is None:
                _log.info("%s: %s, layout %s (%s)%s", path, file.format, layout.name, ", ".join(layout.fields),
                          _listed("; not used: ", _unused(layout, record.value)))  # fmt: skip
            else:
                mapped = ", ".join(f"{k}: {v}" for k, v in columns.model_dump().items() if v is not None)
                _log.info("%s: %s, no known layout; guessed the columns {%s}: check them", path, file.format, mapped)
            return Detected(file.format, layout.name, columns, messages)
    faults.check()
    raise DataError(f"no row of {path} can be used as it is: {unusable or 'its lists are empty: fill them.'}")
