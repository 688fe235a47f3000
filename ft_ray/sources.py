"""Reading data files: JSONL, JSON, CSV, Parquet, saved and hub data sets, from disk or any fsspec address.

Everything streams: one record at a time leaves here, with the file and the line it came from. What cannot be
read is collected in `Faults` and reported together.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import logging
import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ft_ray import hub
from ft_ray.errors import DataError, FtRayError
from ft_ray.recipe import Source
from ft_ray.row_faults import Faults
from ft_ray.storage import cache_dir, hash_file
from ft_ray.storage_faults import client_errors, file_system, redacted, storage_errors

__all__ = ["DataFile", "Record", "locate", "of_hub", "records"]

_log = logging.getLogger("ft_ray")
_SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
}  # fmt: skip
_HUB_ID = re.compile(r"^\w[\w.-]*/[\w.-]+$")
_CHUNK = 1 << 20

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


# Finding


def locate(source: Source) -> list[DataFile]:
    """The local files of a source, downloaded into the cache where they are remote. Raises DataError."""
    path, wanted = source.path, source.format
    if of_hub(source):
        return [_hub(source)]
    for key in ("subset", "revision"):
        if getattr(source, key) is not None:
            raise DataError(f"{key} of the data source {path} is for hub data sets, and this is none: take it out.")
    if "://" in path:
        return _remote(source)
    local = Path(path).expanduser()
    if not local.exists():
        hint = "; for a Hugging Face data set use the form owner/name or set format: hub" if "/" not in path else ""
        raise DataError(f"data file {path} does not exist: check the path{hint}.")
    if local.is_dir():
        if wanted == "saved" or (local / "dataset_info.json").exists() or (local / "dataset_dict.json").exists():
            return [_saved(source, local)]
        found = sorted(p for p in local.rglob("*") if p.is_file() and _format_of(p.name))
        if not found:
            raise DataError(f"folder {path} holds no .jsonl, .json, .csv or .parquet file and no saved data set.")
        return [_file(str(p), p, wanted) for p in found]
    return [_file(path, local, wanted)]


def _file(name: str, path: Path, wanted: str) -> DataFile:
    kind = _format_of(name) if wanted == "auto" else wanted
    if kind is None:
        raise DataError(
            f"the format of {name} cannot be told from its name: let it end in .jsonl, .json, .csv or .parquet, or set "
            "the source's format in the recipe."
        )
    try:
        if path.stat().st_size == 0:
            raise DataError(f"data file {name} is empty: give a file with at least one row.")
        return DataFile(name, path, kind, hash_file(path))
    except OSError as error:
        raise DataError(f"data file {name} cannot be read ({error.strerror}): check its permissions.") from error


def _format_of(name: str) -> str | None:
    stem = name.lower().removesuffix(".gz")
    return next((kind for suffix, kind in _SUFFIXES.items() if stem.endswith(suffix)), None)


def of_hub(source: Source) -> bool:
    """Whether a source is a data set of the hub: said to be one, or named as one where no such file or folder is."""
    path = source.path
    named = bool(_HUB_ID.match(path)) and _format_of(path) is None and not Path(path).exists()
    return source.format == "hub" or (source.format == "auto" and named)


def _remote(source: Source) -> list[DataFile]:
    try:
        fs, root = file_system(source.path)
        # isfile() takes any failure for a no; find() then says what it was.
        names = [root] if fs.isfile(root) else [n for n in sorted(fs.find(root)) if _format_of(n)]
    except FtRayError:
        raise
    except Exception as error:
        if not isinstance(error, (OSError, ValueError, ImportError, *client_errors())):
            raise
        message = f"data at {source.path} cannot be reached ({error}): check the address and the login."
        raise DataError(redacted(message)) from error
    if not names:
        raise DataError(f"data file {redacted(source.path)} does not exist: check the address.")
    out = []
    for name in names:
        address = fs.unstrip_protocol(name)
        with storage_errors("looking up", address):
            try:
                version = fs.ukey(name)
            except (OSError, NotImplementedError):
                version = str(fs.size(name))
        key = hashlib.sha256(f"{address}\n{version}".encode()).hexdigest()[:24]
        target = cache_dir() / "sources" / key / name.rsplit("/", 1)[-1]
        if not target.exists():
            _log.info("downloading %s", address)
            with storage_errors("downloading", address):
                target.parent.mkdir(parents=True, exist_ok=True)
                handle, temporary = tempfile.mkstemp(dir=target.parent)
                os.close(handle)
                try:
                    fs.get_file(name, temporary)
                    os.replace(temporary, target)
                finally:
                    Path(temporary).unlink(missing_ok=True)
        out.append(_file(address, target, source.format))
    return out


def _hub(source: Source) -> DataFile:
    import datasets

    folder = hub.fetch_dataset(source.path, source.subset, source.revision)
    try:
        loaded = datasets.load_dataset(str(folder), source.subset, split=source.split)
    except Exception as error:  # each reader raises kinds of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        page = f"{hub.endpoint()}/datasets/{source.path}"
        message = f"data set {source.path} cannot be loaded ({reason}): check subset and split against {page}."
        raise DataError(redacted(message)) from error
    # The commit says what is in it; a fingerprint would name this machine's folder too.
    content = json.dumps([source.path, folder.name, source.subset, source.split])
    return DataFile(source.path, Path(), "dataset", hashlib.sha256(content.encode()).hexdigest(), loaded)


def _saved(source: Source, folder: Path) -> DataFile:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
        if isinstance(loaded, datasets.DatasetDict):
            if source.split not in loaded:
                have = ", ".join(loaded)
                raise DataError(f"{source.path} has no split {source.split!r}: set split to one of {have}.")
            loaded = loaded[source.split]
    except (OSError, ValueError) as error:
        raise DataError(f"saved data set {source.path} cannot be read ({error}): save it again.") from error
    digest = hashlib.sha256(source.split.encode())
    for file in loaded.cache_files:
        digest.update(hash_file(file["filename"]).encode())
    return DataFile(source.path, folder, "dataset", digest.hexdigest(), loaded)


# Reading


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
            faults.add(f"{file.name}:{number}", "the JSON is nested too deeply: flatten or remove the line.")
            continue
        if isinstance(value, dict):
            yield Record(value, number)
        else:
            faults.add(f"{file.name}:{number}:1", f"the line holds a {type(value).__name__}, not an object in braces.")
    if not seen:
        raise DataError(f"data file {file.name} is empty: give a file with at least one row.")


def _json(file: DataFile, stream: IO[bytes], faults: Faults) -> Iterator[Record]:
    """A JSON array, an object that holds one array of rows, or JSON lines under the wrong name."""
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig")
    try:
        text = reader.read(_CHUNK)
        body = text.lstrip()
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
            opening = re.search(r'"(data|rows|examples|train|instances)"\s*:\s*\[', body)
            if opening is None:
                raise DataError(f"{file.name} holds one object, not a list of rows: give [..] or one object a line.")
            text = body[opening.end() - 1 :]
        elif not body:
            raise DataError(f"data file {file.name} is empty: give a file with at least one row.")
        elif not body.startswith("["):
            faults.add(f"{file.name}:1:1", "not valid JSON (a list of rows begins with '['): mend the file.")
            return
        yield from _array(file, reader, text.lstrip(), faults)
    except UnicodeDecodeError:
        _find_not_utf8(file, faults)


def _array(file: DataFile, reader: IO[str], buffer: str, faults: Faults) -> Iterator[Record]:
    """Rows of an array, of which only the part around the current row is in memory."""
    decoder, at, number, ended = json.JSONDecoder(object_pairs_hook=_object), 1, 0, False
    while True:
        while at < len(buffer) and buffer[at] in " \t\r\n,":
            at += 1
        if at < len(buffer) and buffer[at] == "]":
            if number == 0:
                raise DataError(f"data file {file.name} holds an empty list: give a file with at least one row.")
            return
        try:
            value, at = decoder.raw_decode(buffer, at)
        except json.JSONDecodeError as error:
            more = "" if ended else reader.read(max(_CHUNK, len(buffer) - at))
            if more:
                buffer, at = buffer[at:] + more, 0
                continue
            faults.add(f"{file.name} row {number + 1}", f"not valid JSON ({error.msg}): mend the file there.")
            return
        except _Repeated as error:
            faults.add(f"{file.name} row {number + 1}", f"{error}: keep one.")
            return
        number += 1
        if isinstance(value, dict):
            yield Record(value, number)
        else:
            faults.add(f"{file.name}:{number}", f"the row is a {type(value).__name__}, not an object in braces.")


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
