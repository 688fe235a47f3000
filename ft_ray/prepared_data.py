"""Prepared data as every rank opens it: tokenised splits in one folder, memory-mapped, with what is known of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ft_ray.errors import DataError

__all__ = ["Prepared", "copies_of", "general_weight", "in_fraction"]


def in_fraction(group_hash: str, fraction: float, seed: int) -> bool:
    """Whether a prompt group belongs to the seeded `data.fraction` of the training rows.

    One draw a group, so that rows with the same prompt stay together and every fraction holds all smaller ones.
    The group's hash itself decides its split, so it is hashed again: else a fraction would not be a fair sample.
    """
    if fraction >= 1:
        return True
    digest = hashlib.blake2b(f"fraction {seed} {group_hash}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def copies_of(messages: Sequence[Mapping[str, str]], weight: float, seed: int) -> int:
    """Times a row is seen an epoch: the whole part of the weight, and one more for a seeded part of the rows.

    Drawn from the row's own content, so that appended data change no earlier draw.
    """
    whole, part = int(weight), weight - int(weight)
    if part == 0:
        return whole
    text = "\x1f".join([str(seed), *(m["content"] for m in messages)])
    at = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
    return whole + (at < part * 2**64)


def general_weight(share: float, own: int, rows: float) -> float:
    """The weight at which `rows` general rows make up `share` of an epoch with `own` rows."""
    return max(share / (1 - share) * own / max(rows, 1), 1e-9)


@dataclass(frozen=True)
class Prepared:
    """A committed cache entry. Plain values only, so that it can be sent to workers that see the folder.

    `counts` are the examples that an epoch (train) or an evaluation sees, after weighting; `distinct` those on
    disk. `hashes` identify the content of each split, whatever its order, template or tokenizer. `dropped`
    counts rows left out: 'too_long', 'weight' (not drawn by a weight below 1) and, where data.fraction is below 1,
    'fraction'; `too_long` names the first. `fields`: file -> fields that rows were read from -> {rows, first places}.
    `general`: the share of data.general, and how many `rows` it is drawn from.
    """

    folder: Path
    counts: dict[str, int]
    distinct: dict[str, int]
    hashes: dict[str, str]
    dropped: dict[str, int]
    too_long: list[str]
    sources: list[dict[str, Any]]
    fields: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    general: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path) -> Prepared:
        """The entry in a folder. Raises DataError when it is none."""
        try:
            meta = json.loads((Path(folder) / "meta.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} holds no prepared data ({error}): remove it and run again.") from error
        return cls(folder=Path(folder), **meta)

    def rows(self, split: str) -> datasets.Dataset:
        """Columns messages, file, line, group; one row for each distinct example. Memory-mapped."""
        return datasets.Dataset.from_file(str(self.folder / f"{split}.rows.arrow"), split=split)

    def tokens(self, split: str, *, distinct: bool = False) -> datasets.Dataset:
        """Columns input_ids, labels, length; one row an example, repeated as weights say. Memory-mapped.

        Those of train end in the drawn rows of data.general ('general' alone gives these). With `distinct`, row i
        belongs to row i of `rows`.
        """
        data = datasets.Dataset.from_file(str(self.folder / f"{split}.tokens.arrow"), split=split)
        if distinct:
            return data
        index = self.folder / f"{split}.index.npy"
        data = data.select(np.load(index)) if index.exists() else data
        if split == "train" and (self.folder / "general.tokens.arrow").exists():
            data = datasets.concatenate_datasets([data, self.tokens("general")])
        return data

    def places(self, split: str, numbers: Sequence[int]) -> list[str]:
        """'file:line' of rows of `tokens(split)`, so for train also of those drawn from data.general."""
        index, rows = self.folder / f"{split}.index.npy", self.rows(split)
        order = np.load(index, mmap_mode="r") if index.exists() else range(len(rows))

        def place(number: int) -> str:
            if number >= len(order):
                return self.places("general", [number - len(order)])[0]
            row = rows[int(order[number])]
            return f"{row['file']}:{row['line']}"

        return [place(number) for number in numbers]

    def subset(self, fraction: float, seed: int) -> list[int]:
        """Rows of `tokens("train")` that data.fraction `fraction` would leave, in order: a sweep's nested subsets.

        Those of data.general with them, as many as make up their share of so many own rows.
        """
        groups = self.rows("train")["group"][:]
        kept = np.asarray([in_fraction(group, fraction, seed) for group in groups], dtype=bool)
        index = self.folder / "train.index.npy"
        own = [int(i) for i in np.flatnonzero(kept[np.load(index)] if index.exists() else kept)]
        return [*own, *self._general(len(own), seed)] if self.general else own

    def _general(self, own: int, seed: int) -> list[int]:
        """Rows of `tokens("train")` from data.general that would be drawn beside `own` rows, no more than are there."""
        rows, index = self.rows("general"), self.folder / "general.index.npy"
        drawn = np.load(index) if index.exists() else np.arange(len(rows))
        weight = general_weight(self.general["share"], own, self.general["rows"])
        wanted = np.asarray([copies_of(row["messages"], weight, seed) for row in rows], dtype=np.int64)
        # Copies of a row lie together: the first ones of each are those that a lower weight leaves.
        copy = np.arange(len(drawn)) - np.searchsorted(drawn, drawn)
        return [self.counts["train"] + int(i) for i in np.flatnonzero(copy < wanted[drawn])]

    def packed(self) -> datasets.Dataset:
        """Columns input_ids, labels, seq_lengths (token counts of the rows in one sequence). Memory-mapped."""
        path = self.folder / "packed.arrow"
        if not path.exists():
            raise DataError("the data were prepared without packing: set sequence.packing to true.")
        return datasets.Dataset.from_file(str(path))
