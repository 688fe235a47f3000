"""Reading data files: JSONL, JSON, CSV, Parquet and data sets in memory.

Everything streams: one record at a time leaves here, with the file and the line it came from. What cannot be
read is collected in `Faults` and reported together.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import logging
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ft_ray.errors import DataError
from ft_ray.row_faults import Faults

__all__ = ["DataFile", "Record", "records"]

_log = logging.getLogger("ft_ray")
_CHUNK = 1 << 20
_ROWS = ("data", "rows", "examples", "train", "instances")  # names of the list of rows in a JSON object
_DEEP = "the JSON is nested too deeply: flatten or remove"

csv.field_size_limit(1 << 30)  # the default of 128 KiB refuses long documents


@dataclass(frozen=True)
class Record:
    """One object of a file. `line` counts from 1: lines of text files, rows of JSON arrays and Parquet."""

    value: dict[str, Any]
    line: int


@dataclass(frozen=True)
class DataFile:
    """One readable part of a source: `name` as the user knows it, `path` on this machine, its content hash."""

    name: str
    path: Path
    format: str
    hash: str
    dataset: Any = field(default=None, compare=False, repr=False)


def records(file: DataFile, faults: Faults) -> Iterator[Record]:
    """Streams the records of one file; what cannot be parsed goes to `faults`."""
    if file.format == "dataset":
        for start in range(0, len(file.dataset), 1000):
            rows = file.dataset[start : start + 1000]
            names = list(rows)
            for k, values in enumerate(zip(*rows.values(), strict=True)):
                yield Record(dict(zip(names, values, strict=True)), start + k + 1)
        return
    if file.format == "parquet":
        yield from _parquet(file, faults)
        return
    try:
        yield from _text_records(file, faults)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"data file {file.name} is not a whole gzip file ({error}): compress it again.") from error


def _text_records(file: DataFile, faults: Faults) -> Iterator[Record]:
    with _open(file) as stream:
        mark = stream.read(4)
        stream.seek(0)
        if mark.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            faults.add(f"{file.name}:1:1", "the file is UTF-16, not UTF-8: save it as UTF-8.")
            return
        if file.format == "csv":
            yield from _csv(file, stream, faults)
        elif file.format == "json":
            yield from _json(file, stream, faults)
        else:
            yield from _jsonl(file, stream, faults)


def _open(file: DataFile) -> IO[bytes]:
    if file.name.lower().endswith(".gz"):
        return io.BufferedReader(gzip.open(file.path, "rb"), _CHUNK)
    return open(file.path, "rb", buffering=_CHUNK)


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} is not UTF-8: save the file as UTF-8."


class _Repeated(Exception):
    """A key that one JSON object has twice; only the last value would be read."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Repeated(f"the key {next(k for k in found if keys.count(k) > 1)!r} appears twice in one object")
    return found


def _jsonl(file: DataFile, stream: IO[bytes], faults: Faults) -> Iterator[Record]:
    loads, number, seen = json.JSONDecoder(object_pairs_hook=_object).decode, 0, False
    for number, raw in enumerate(stream, 1):
        try:
            # The BOM that some editors put first is no part of the JSON.
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.isspace() or not text:
                continue
            seen = True
            value = loads(text.rstrip())
        except UnicodeDecodeError as error:
            seen = True
            faults.add(f"{file.name}:{number}:{error.start + 1}", _not_utf8(error))
            continue
        except json.JSONDecodeError as error:
            faults.add(f"{file.name}:{number}:{error.colno}", f"not valid JSON ({error.msg}): mend or remove the line.")
            continue
        except _Repeated as error:
            seen = True
            faults.add(f"{file.name}:{number}", f"{error}: keep one.")
            continue
        except RecursionError:
            faults.add(f"{file.name}:{number}", f"{_DEEP} the line.")
            continue
        if isinstance(value, dict):
            yield Record(value, number)
        else:
            faults.add(f"{file.name}:{number}:1", f"the line holds a {type(value).__name__}, not an object in braces.")
    if not seen:
        raise DataError(f"data file {file.name} is empty: give a file with at least one row.")


class _Json:
    """A place in a JSON text, of which only the part around it is in memory."""

    def __init__(self, reader: IO[str], buffer: str) -> None:
        self.reader, self.buffer, self.at = reader, buffer, 0
        self.decode = json.JSONDecoder(object_pairs_hook=_object).raw_decode

    def _more(self) -> bool:
        more = self.reader.read(max(_CHUNK, len(self.buffer) - self.at))
        self.buffer, self.at = self.buffer[self.at :] + more, 0
        return bool(more)

    def peek(self, between: str = "") -> str:
        """The next character that is neither white space nor in `between`; '' at the end."""
        between += " \t\r\n"
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in between:
                self.at += 1
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self._more():
                return ""

    def value(self) -> Any:
        while True:
            try:
                value, end = self.decode(self.buffer, self.at)
            except json.JSONDecodeError:
                if self._more():
                    continue
                raise
            if end == len(self.buffer) and self._more():  # a number may go on
                continue
            self.at = end
            return value

    def items(self) -> Iterator[Any]:
        """The values of the list that begins here, one at a time."""
        self.at += 1
        while self.peek(",") != "]":
            yield self.value()
        self.at += 1


def _json(file: DataFile, stream: IO[bytes], faults: Faults) -> Iterator[Record]:
    """A JSON array, an object that holds an array of rows, or JSON lines under the wrong name."""
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig")
    try:
        body = reader.read(_CHUNK).lstrip()
        if body.startswith("{"):
            first = body.split("\n", 1)[0]
            try:
                json.loads(first)
                single = not body[len(first) :].strip()
            except json.JSONDecodeError:
                single = True
            if not single:
                _log.info("%s holds JSON lines", file.name)
                raw = reader.detach()
                raw.seek(0)
                yield from _jsonl(file, raw, faults)
                return
            yield from _rows_of_object(file, _Json(reader, body), faults)
        elif not body:
            raise DataError(f"data file {file.name} is empty: give a file with at least one row.")
        elif not body.startswith("["):
            faults.add(f"{file.name}:1:1", "not valid JSON (a list of rows begins with '['): mend the file.")
        else:
            yield from _rows(file, _Json(reader, body), faults)
    except UnicodeDecodeError:
        _find_not_utf8(file, faults)
    except json.JSONDecodeError as error:
        faults.add(file.name, f"not valid JSON ({error.msg}): mend the file.")
    except _Repeated as error:
        faults.add(file.name, f"{error}: keep one.")
    except RecursionError:
        faults.add(file.name, f"{_DEEP} what is.")


def _rows_of_object(file: DataFile, text: _Json, faults: Faults) -> Iterator[Record]:
    """The rows under the first of the object's own keys that names rows; other lists are said to be left out."""
    read, left = "", []
    text.at += 1
    while text.peek(",") != "}":
        key = text.value()
        if text.peek() != ":":
            raise json.JSONDecodeError("Expecting ':' delimiter", text.buffer, text.at)
        text.at += 1
        if text.peek() != "[":
            text.value()
        elif read or key not in _ROWS:
            left.append(key)
            for _ in text.items():
                pass
        else:
            read = key
            if not (yield from _rows(file, text, faults)):
                return
    if not read:
        raise DataError(f"{file.name} holds one object, not a list of rows: give [..] or one object a line.")
    if left:
        _log.warning("%s: the list %r is read; left out: %s", file.name, read, ", ".join(map(repr, left)))


def _rows(file: DataFile, text: _Json, faults: Faults) -> Generator[Record, None, bool]:
    """Rows of the array that begins here; whether its end was reached."""
    number, values = 0, text.items()
    while True:
        try:
            value = next(values)
        except StopIteration:
            break
        except json.JSONDecodeError as error:
            faults.add(f"{file.name} row {number + 1}", f"not valid JSON ({error.msg}): mend the file there.")
            return False
        except _Repeated as error:
            faults.add(f"{file.name} row {number + 1}", f"{error}: keep one.")
            return False
        except RecursionError:
            faults.add(f"{file.name} row {number + 1}", f"{_DEEP} the row.")
            return False
        number += 1
        if isinstance(value, dict):
            yield Record(value, number)
        else:
            faults.add(f"{file.name}:{number}", f"the row is a {type(value).__name__}, not an object in braces.")
    if number == 0:
        raise DataError(f"data file {file.name} holds an empty list: give a file with at least one row.")
    return True


def _find_not_utf8(file: DataFile, faults: Faults) -> None:
    with _open(file) as stream:
        for number, raw in enumerate(stream, 1):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                faults.add(f"{file.name}:{number}:{error.start + 1}", _not_utf8(error))


def _csv(file: DataFile, stream: IO[bytes], faults: Faults) -> Iterator[Record]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    try:
        header = text.readline()
        delimiter = max(",;\t", key=header.count) if not file.name.lower().endswith((".tsv", ".tsv.gz")) else "\t"
        text.seek(0)
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        names = next(reader, None)
        if not names:
            raise DataError(f"data file {file.name} is empty: give a file with at least one row.")
        names = [n.strip() for n in names]
        doubled = sorted({n for n in names if names.count(n) > 1})
        if doubled:
            raise DataError(f"{file.name}:1: the column {doubled[0]!r} appears twice: rename one.")
        line, seen = reader.line_num + 1, False
        for values in reader:
            start, line = line, reader.line_num + 1
            if not values:
                continue
            seen = True
            if len(values) != len(names):
                faults.add(
                    f"{file.name}:{start}",
                    f"{len(values)} fields where the header has {len(names)}: quote fields that hold {delimiter!r}.",
                )
                continue
            yield Record(dict(zip(names, values, strict=True)), start)
        if not seen:
            raise DataError(f"data file {file.name} has a header and no rows: give at least one row.")
    except csv.Error as error:
        faults.add(f"{file.name}:{reader.line_num}", f"not valid CSV ({error}): mend the quotes there.")
    except UnicodeDecodeError:
        _find_not_utf8(file, faults)


def _parquet(file: DataFile, faults: Faults) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path, memory_map=True) as table:
            if table.metadata.num_rows == 0:
                raise DataError(f"data file {file.name} is empty: give a file with at least one row.")
            line = 0
            for batch in table.iter_batches(batch_size=1000):
                for value in batch.to_pylist():
                    line += 1
                    yield Record(value, line)
    except (pa.ArrowException, OSError) as error:
        faults.add(file.name, f"not a readable Parquet file ({error}): write it again.")
