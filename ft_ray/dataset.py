"""From sources to tokenised splits: read, normalise, split, weigh, tokenise once, cache, pack.

A cache entry is named by a hash of all it depends on (file contents, columns, template, tokenizer, lengths),
appears by one rename, and is memory-mapped by every rank. Nothing here holds more than a batch of rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from ft_ray.chat import Chat
from ft_ray.errors import DataError
from ft_ray.local_files import staged_folder
from ft_ray.manifest import key_of
from ft_ray.prepared_data import Prepared, copies_of, general_weight, in_fraction
from ft_ray.recipe import Recipe, Source, Split
from ft_ray.records import DataFile
from ft_ray.row_faults import Faults
from ft_ray.rows import SPLITS, Detected, Row, detect, group_of, kept_aside, read, read_file, split
from ft_ray.sources import locate
from ft_ray.storage import cache_dir
from ft_ray.storage_faults import storage_errors

__all__ = ["SPLITS", "Detected", "Row", "detect", "group_of", "prepare", "read", "split"]

GENERAL = "general"
_VERSION = 3  # part of every cache key; raise it when the same input would give other tokens
_BATCH = 1000
_PACK_BATCH = 4000  # rows packed together: fuller sequences than TRL's 1,000, still bounded memory
_log = logging.getLogger("ft_ray")

_ROWS = pa.schema(
    {
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "file": pa.string(),
        "line": pa.int64(),
        "group": pa.string(),
    }
)
_TOKENS = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "length": pa.int32()})


@dataclass
class _Part:
    """What one batch adds to one split."""

    rows: list[Row] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)


class _SplitWriter:
    """Writes one split's rows and tokens side by side, batch by batch."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.rows = 0
        self.copies: list[np.ndarray[Any, np.dtype[np.int32]]] = []
        self._sum = 0
        self._streams = [pa.OSFile(str(folder / f"{name}.{kind}.arrow"), "wb") for kind in ("rows", "tokens")]
        self._writers = [
            pa.ipc.new_stream(s, schema) for s, schema in zip(self._streams, (_ROWS, _TOKENS), strict=True)
        ]

    def write(self, part: _Part) -> None:
        rows, ids, labels, copies = part.rows, part.ids, part.labels, part.copies
        table = [[r.messages for r in rows], [r.file for r in rows], [r.line for r in rows], [r.group for r in rows]]
        self._put(0, _ROWS, table)
        self._put(1, _TOKENS, [ids, labels, [len(i) for i in ids]])
        self.rows += len(rows)
        self.copies.append(np.asarray(copies, dtype=np.int32))
        for row in rows:
            text = "\x1f".join(part for m in row.messages for part in (m["role"], m["content"]))
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
            self._sum = (self._sum + int.from_bytes(digest, "big")) % 2**256

    def _put(self, which: int, schema: pa.Schema, columns: Iterable[Any]) -> None:
        arrays = [pa.array(c, type=f.type) for c, f in zip(columns, schema, strict=True)]
        self._writers[which].write_batch(pa.record_batch(arrays, schema=schema))

    def close(self) -> tuple[int, int, str]:
        """Ends the files. Returns examples an epoch, distinct rows, and the hash of the content."""
        for writer, stream in zip(self._writers, self._streams, strict=True):
            writer.close()
            stream.close()
        copies = np.concatenate(self.copies) if self.copies else np.zeros(0, np.int32)
        if (copies != 1).any():
            np.save(self.folder / f"{self.name}.index.npy", np.repeat(np.arange(len(copies)), copies))
        digest = hashlib.sha256(f"{self.rows} {self._sum:x}".encode()).hexdigest()
        return int(copies.sum()), self.rows, digest

    def abandon(self) -> None:
        for part in (*self._writers, *self._streams):
            with contextlib.suppress(Exception):
                part.close()


def prepare(recipe: Recipe, chat: Chat, *, model_hash: str, cache: Path | None = None) -> Prepared:
    """Reads, checks, splits and tokenises the recipe's data, or opens what an earlier call made of the same.

    `cache` defaults to `storage.cache_dir()/datasets`. Raises DataError for every row that cannot be used, at
    once, and then leaves nothing behind.
    """
    chat.verify()  # one error for the template rather than one for each row
    files = [(use, source, locate(source)) for use in SPLITS for source in getattr(recipe.data, use)]
    if recipe.data.general is not None:
        general = Source(path=recipe.data.general.path, columns=recipe.data.general.columns)
        files.append((GENERAL, general, locate(general)))
    root = cache if cache is not None else cache_dir() / "datasets"
    folder = root / _key(recipe, chat, model_hash, files)
    if (folder / "meta.json").exists():
        prepared = Prepared.open(folder)
        _log.info("tokenised data found in %s", folder)
        return prepared
    with storage_errors("preparing the data", str(root), root):
        _sweep(root)
        with staged_folder(folder) as staging:
            _build(recipe, chat, files, staging)
            os.chmod(staging, 0o755)
    return Prepared.open(folder)


def _sweep(root: Path) -> None:
    """Removes what a killed process left staged more than a day ago."""
    for left in root.glob(".staging-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86400:
                shutil.rmtree(left, ignore_errors=True)


_Located = list[tuple[str, Source, list[DataFile]]]


def _key(recipe: Recipe, chat: Chat, model_hash: str, files: _Located) -> str:
    data = recipe.data
    parts = [
        _VERSION, model_hash, chat.template_hash, sorted(chat.eos_ids), _plain(files),
        data.columns.model_dump() if data.columns else None, data.system, data.too_long, data.split.model_dump(),
        recipe.sequence.model_dump(), recipe.seed,
    ]  # fmt: skip
    if data.fraction < 1:
        parts.append(["fraction", data.fraction])
    if data.general is not None or data.answers != "any":
        parts.append([data.general and data.general.share, data.answers])
    if data.general is not None:
        parts.append("general rows counted")  # earlier entries do not say how many there were
    if recipe.sequence.packing:
        import trl

        parts.append([trl.__version__, _PACK_BATCH])
    return key_of(*parts)[:32]


def _plain(files: _Located) -> list[dict[str, Any]]:
    """The located sources as plain values: use, settings, and name and hash of each file."""
    return [
        {"use": use, **source.model_dump(mode="json"), "files": [[f.name, f.format, f.hash] for f in found]}
        for use, source, found in files
    ]


def _build(recipe: Recipe, chat: Chat, files: _Located, staging: Path) -> None:
    data, faults = recipe.data, Faults()
    # A split that has sources of its own is not cut from train.
    fractions = Split(
        validation=0.0 if data.validation else data.split.validation, test=0.0 if data.test else data.split.test
    )
    names = (*SPLITS, GENERAL) if data.general is not None else SPLITS
    writers = {name: _SplitWriter(staging, name) for name in names}
    build = _Build(recipe, chat, faults, writers)
    try:
        for use, source, found in files:
            if use == GENERAL:
                build.add_general(source, found)
                continue
            for file in found:
                rows = read_file(file, source.columns or data.columns, data.system, faults)
                while batch := list(islice(rows, _BATCH)):
                    build.add(batch, use, source, fractions)
        faults.check()
        build.verdict()
        counts, distinct, hashes = {}, {}, {}
        for name, writer in writers.items():
            counts[name], distinct[name], hashes[name] = writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()
    meta = {
        "counts": counts, "distinct": distinct, "hashes": hashes, "dropped": build.dropped,
        "too_long": build.too_long, "fields": build.fields,
        "sources": _plain(files), "general": build.general,
    }  # fmt: skip
    (staging / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    if recipe.sequence.packing:
        _pack(Prepared.open(staging), recipe)
    _log.info("data ready: %s", ", ".join(f"{n} {c}" for n, c in counts.items()))


class _Build:
    """Tokenises batches into splits, and remembers what was left out."""

    def __init__(self, recipe: Recipe, chat: Chat, faults: Faults, writers: dict[str, _SplitWriter]) -> None:
        self.recipe, self.chat, self.faults, self.writers = recipe, chat, faults, writers
        self.dropped = {"too_long": 0, "weight": 0} | ({"fraction": 0} if recipe.data.fraction < 1 else {})
        self.dropped |= {"answers": 0} if recipe.data.answers != "any" else {}
        self.too_long: list[str] = []
        self.shortest = 0
        self.fields: dict[str, dict[str, dict[str, Any]]] = {}
        self.general: dict[str, float] = {}

    def add(self, batch: Sequence[Row], use: str, source: Source, fractions: Split) -> None:
        limit = self.recipe.sequence.max_length
        parts: dict[str, _Part] = {}
        for row, encoded in zip(batch, self.chat.encode_many([r.messages for r in batch]), strict=True):
            where = f"{row.file}:{row.line}"
            if use != GENERAL:
                seen = self.fields.setdefault(row.file, {}).setdefault(row.fields, {"rows": 0, "first": []})
                seen["rows"] += 1
                if len(seen["first"]) < 5:
                    seen["first"].append(where)
            if isinstance(encoded, DataError):
                self.faults.add(where, str(encoded))
                continue
            length = len(encoded.input_ids)
            if length > limit:
                if self.recipe.data.too_long == "error":
                    self.faults.add(where, f"{length} tokens, over sequence.max_length {limit}: shorten or raise it.")
                self.dropped["too_long"] += 1
                if len(self.too_long) < 5:
                    self.too_long.append(f"{where} {length} tokens")
                self.shortest = min(self.shortest or length, length)
                continue
            name = split(row.group, fractions) if use == "train" else use
            if name == "train" and not in_fraction(row.group, self.recipe.data.fraction, self.recipe.seed):
                self.dropped["fraction"] += 1
                continue
            if name == "train" and self.recipe.data.answers == "json" and not _is_json(row):
                self.dropped["answers"] += 1
                continue
            # Validation and test rows are measured once each, whatever the weight in training.
            drawn = name in ("train", GENERAL)
            copies = copies_of(row.messages, source.weight, self.recipe.seed) if drawn else 1
            if copies == 0:
                self.dropped["weight"] += 1
                continue
            part = parts.setdefault(name, _Part())
            part.rows.append(row)
            part.ids.append(encoded.input_ids)
            part.labels.append(encoded.labels)
            part.copies.append(copies)
        for name, part in parts.items():
            self.writers[name].write(part)

    def add_general(self, source: Source, files: list[DataFile]) -> None:
        """Draws as many general rows as make up their share of an epoch; those kept aside for measuring stay out."""
        assert self.recipe.data.general is not None
        share, columns = self.recipe.data.general.share, source.columns

        def rows(faults: Faults) -> Iterator[Row]:
            for file in files:
                yield from (r for r in read_file(file, columns, None, faults) if not kept_aside(r.group))

        count = sum(1 for _ in rows(Faults()))
        own = sum(int(c.sum()) for c in self.writers["train"].copies)
        self.general = {"share": share, "rows": count}
        drawn = source.model_copy(update={"weight": general_weight(share, own, count)})
        stream = rows(self.faults)
        while batch := list(islice(stream, _BATCH)):
            self.add(batch, GENERAL, drawn, Split())

    def verdict(self) -> None:
        """Raises DataError when nothing is left to train on."""
        dropped = self.dropped["too_long"]
        if self.writers["train"].rows == 0:
            if dropped:
                raise DataError(
                    f"all {dropped} rows are longer than sequence.max_length {self.recipe.sequence.max_length} tokens "
                    f"(the shortest has {self.shortest}): raise sequence.max_length or shorten the rows."
                )
            if self.dropped.get("fraction"):
                raise DataError(
                    f"data.fraction {self.recipe.data.fraction:g} leaves none of {self.dropped['fraction']} training "
                    "rows: raise it."
                )
            raise DataError(
                "the train split is empty: rows with the same first user turn share a split, so give more distinct "
                "prompts, or lower data.split."
            )
        if dropped:
            _log.warning(
                "%d rows over sequence.max_length %d tokens were left out; set data.too_long: error to refuse them",
                dropped, self.recipe.sequence.max_length,
            )  # fmt: skip


def _is_json(row: Row) -> bool:
    try:
        return isinstance(json.loads(row.messages[-1]["content"]), dict | list)
    except (ValueError, RecursionError):
        return False


def _pack(prepared: Prepared, recipe: Recipe) -> None:
    from trl.data_utils import pack_dataset

    tokens = prepared.tokens("train").select_columns(["input_ids", "labels"])
    # Packing sorts by length within a batch, so neighbours in the file would always share a sequence.
    tokens = tokens.select(np.random.default_rng(recipe.seed).permutation(len(tokens)))
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        packed = pack_dataset(
            tokens,
            recipe.sequence.max_length,
            "bfd",
            {"cache_file_name": str(prepared.folder / "packed.arrow"), "batch_size": _PACK_BATCH},
        )
    finally:
        if not shown:
            datasets.enable_progress_bars()
    _log.info("packed %d rows into %d sequences of at most %d tokens", len(tokens), len(packed),
              recipe.sequence.max_length)  # fmt: skip
