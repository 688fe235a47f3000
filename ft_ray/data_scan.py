"""One pass over prepared data that keeps numbers, not rows: hashes, lengths, signatures and a few places.

About 330 bytes a row stay in memory, most of them the MinHash signature.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ft_ray.chat import IGNORED, Chat
from ft_ray.dataset import SPLITS
from ft_ray.near_duplicates import Signatures
from ft_ray.prepared_data import Prepared
from ft_ray.rows import normal
from ft_ray.sensitive import find, masked, redacted

__all__ = ["KEEP", "Scan", "Tally", "scan"]

Array = np.ndarray[Any, Any]
_BATCH = 1000
_MAX_LABELS = 5000  # distinct short answers counted before they are no labels
KEEP = 5


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


@dataclass
class Tally:
    """Rows with one fault: how many, and the first few as (global row, what to show)."""

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)

    def add(self, row: int, shown: str = "") -> None:
        self.count += 1
        if len(self.first) < KEEP:
            self.first.append((row, shown))


@dataclass
class Scan:
    """What one pass found. Arrays have one element a distinct row, splits one after another."""

    prepared: Prepared
    start: dict[str, int] = field(default_factory=dict)
    split: Array = field(default_factory=lambda: np.zeros(0, np.uint8))
    prompt: Array = field(default_factory=lambda: np.zeros(0, np.uint64))
    answer: Array = field(default_factory=lambda: np.zeros(0, np.uint64))
    digits: Array = field(default_factory=lambda: np.zeros(0, np.uint64))
    length: Array = field(default_factory=lambda: np.zeros(0, np.int32))
    trained: Array = field(default_factory=lambda: np.zeros(0, np.int32))
    signatures: Signatures = field(default_factory=Signatures)
    answers: Counter[str] = field(default_factory=Counter)
    answers_of: dict[str, set[str]] = field(default_factory=lambda: {s: set() for s in SPLITS})
    label_first: dict[str, int] = field(default_factory=dict)
    labels_overflowed: bool = False
    long_answers: int = 0
    systems: int = 0
    json_answers: int = 0
    json_keys: Counter[tuple[str, ...]] = field(default_factory=Counter)
    json_first: dict[tuple[str, ...], Tally] = field(default_factory=dict)
    json_types: dict[str, dict[str, Tally]] = field(default_factory=dict)
    not_json: Tally = field(default_factory=Tally)
    text_faults: dict[tuple[str, str], Tally] = field(default_factory=dict)
    no_eos: Tally = field(default_factory=Tally)
    words: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.split)

    def row(self, i: int) -> dict[str, Any]:
        """Global row i, from disk."""
        name = SPLITS[int(self.split[i])]
        return dict(self._rows(name)[i - self.start[name]])

    def _rows(self, name: str) -> Any:
        cached = self.__dict__.setdefault("_open", {})
        if name not in cached:
            cached[name] = self.prepared.rows(name)
        return cached[name]

    def place(self, i: int, shown: str | None = None, at: int = -1) -> str:
        """'file:line' and a short excerpt of message `at`, or what is given instead."""
        row = self.row(i)
        text = redacted(" ".join(row["messages"][at]["content"].split())) if shown is None else shown
        return f"{row['file']}:{row['line']} {text[:77] + '…' if len(text) > 78 else text}".rstrip()

    def places(self, tally: Tally) -> list[str]:
        return [self.place(i, shown or None) for i, shown in tally.first]

    def own_text(self, i: int) -> str:
        """The prompt that signatures were made of."""
        messages = self.row(i)["messages"]
        return _own([m["content"] for m in messages], system=messages[0]["role"] == "system")


def _prompt(contents: Sequence[str]) -> str:
    return "\n".join(contents[:-1])


def _own(contents: Sequence[str], *, system: bool) -> str:
    """The prompt without its system message: a long one, shared by all rows, would make every row alike."""
    return normal(_prompt(contents[int(system) :]))


def scan(prepared: Prepared, chat: Chat) -> Scan:
    """Streams every split once."""
    out = Scan(prepared)
    arrays: dict[str, list[Array]] = {k: [] for k in ("split", "prompt", "answer", "digits", "length", "trained")}
    specials = _special_pattern(chat)
    at = 0
    for number, name in enumerate(SPLITS):
        out.start[name] = at
        rows = prepared.rows(name).with_format("arrow")
        for table in rows.iter(_BATCH) if len(rows) else ():
            hashes = _text_batch(out, name, table.column("messages").combine_chunks(), at, specials)
            for key, values in zip(("prompt", "answer", "digits"), hashes, strict=True):
                arrays[key].append(np.array(values, np.uint64))
            arrays["split"].append(np.full(len(table), number, np.uint8))
            at += len(table)
        tokens = prepared.tokens(name, distinct=True).with_format("arrow")
        done = out.start[name]
        eos = np.array(sorted(chat.eos_ids))
        for table in tokens.iter(_BATCH) if len(tokens) else ():
            length, trained = _token_batch(out, table.column("labels").combine_chunks(), done, eos)
            arrays["length"].append(length)
            arrays["trained"].append(trained)
            done += len(table)
    for key, blocks in arrays.items():
        if blocks:
            setattr(out, key, np.concatenate(blocks))
    return out


def _special_pattern(chat: Chat) -> re.Pattern[str] | None:
    texts = sorted({str(t) for t in chat.tokenizer.all_special_tokens if len(str(t)) > 3}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def _chunk(array: Any) -> Any:
    return array.chunk(0) if hasattr(array, "num_chunks") else array


def _text_batch(
    out: Scan, name: str, messages: Any, at: int, specials: re.Pattern[str] | None
) -> tuple[list[int], list[int], list[int]]:
    messages = _chunk(messages)
    offsets = messages.offsets.to_pylist()
    values = messages.values
    roles, contents = values.field("role").to_pylist(), values.field("content").to_pylist()
    prompts: list[int] = []
    answers: list[int] = []
    digits: list[int] = []
    own: list[str] = []
    joined: list[str] = []
    for k in range(len(offsets) - 1):
        first, end = offsets[k], offsets[k + 1]
        turns = contents[first:end]
        system = roles[first] == "system"
        out.systems += system
        own.append(_own(turns, system=system))
        text, answer = normal(_prompt(turns)) if system else own[-1], turns[-1]
        prompts.append(_hash(text))
        answers.append(_hash(normal(answer)))
        digits.append(_hash(" ".join(re.findall(r"\d+", own[-1]))))
        _answer(out, name, answer, at + k)
        joined.append("\n".join(turns))
    out.signatures.add(own)
    starts, total = [], 0
    for text in joined:
        starts.append(total)
        total += len(text) + 2
    whole = "\n\0".join(joined)
    seen: set[tuple[int, str]] = set()
    found = [(kind.code, kind.name, offset, masked(kind, match)) for kind, offset, match in find(whole)]
    if specials is not None:
        found += [("special_token", "special token", m.start(), repr(m[0])) for m in specials.finditer(whole)]
    for code, kind_name, offset, shown in found:
        row = at + bisect_right(starts, offset) - 1
        if (row, kind_name) not in seen:
            seen.add((row, kind_name))
            out.text_faults.setdefault((code, kind_name), Tally()).add(row, shown)
    for text in own[:20]:  # a bounded sample of the vocabulary
        out.words.update(text.split()[:50])
    return prompts, answers, digits


def _answer(out: Scan, name: str, answer: str, row: int) -> None:
    stripped = answer.strip()
    if stripped[:1] == "{" or stripped.startswith("```"):
        try:
            value = json.loads(stripped)
        except ValueError:
            value = None
        if isinstance(value, dict):
            out.json_answers += 1
            keys = tuple(sorted(value))
            if len(out.json_keys) < 1000 or keys in out.json_keys:
                out.json_keys[keys] += 1
                out.json_first.setdefault(keys, Tally()).add(row)
            _types(out, value, row)
        else:
            out.not_json.add(row)
    else:
        out.not_json.add(row)
    if len(answer) > 80 or "\n" in stripped:
        out.long_answers += 1
    elif not out.labels_overflowed:
        out.answers_of[name].add(answer)
        if name == "train":
            out.answers[answer] += 1
            out.label_first.setdefault(answer, row)
        if max(len(out.answers), len(out.answers_of[name])) > _MAX_LABELS:
            out.labels_overflowed = True


_TYPES = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def _types(out: Scan, value: dict[str, Any], row: int) -> None:
    """Counts the type of each field; null says nothing of it."""
    for key, one in value.items():
        if one is not None and (key in out.json_types or len(out.json_types) < 1000):
            out.json_types.setdefault(key, {}).setdefault(_TYPES[type(one)], Tally()).add(row)


def _token_batch(out: Scan, labels: Any, at: int, eos: Array) -> tuple[Array, Array]:
    labels = _chunk(labels)
    offsets = np.asarray(labels.offsets)
    flat = np.asarray(labels.values)[offsets[0] : offsets[-1]]
    offsets = offsets - offsets[0]
    on = flat != IGNORED
    sums = np.concatenate([[0], np.cumsum(on)])
    trained = (sums[offsets[1:]] - sums[offsets[:-1]]).astype(np.int32)
    # A trained run ends where the next token is not trained or belongs to the next row.
    ends = on & ~np.concatenate([on[1:], [False]])
    last = offsets[1:] - 1
    ends[last] |= on[last]
    wrong = np.flatnonzero(ends & ~np.isin(flat, eos))
    bad = np.union1d(np.searchsorted(offsets, wrong, side="right") - 1, np.flatnonzero(trained == 0))
    for row in bad.tolist():
        out.no_eos.add(at + row)
    return np.diff(offsets).astype(np.int32), trained
