"""Prepared data as every rank opens it: tokenised splits in one folder, memory-mapped, with what is known of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ft_ray.errors import DataError

__all__ = ["Prepared", "in_fraction"]


def in_fraction(group_hash: str, fraction: float, seed: int) -> bool:
    """Whether a prompt group belongs to the seeded `data.fraction` of the training rows.

    One draw a group, so that rows with the same prompt stay together and every fraction holds all smaller ones.
    The group's hash itself decides its split, so it is hashed again: else a fraction would not be a fair sample.
    """
    if fraction >= 1:
        return True
    digest = hashlib.blake2b(f"fraction {seed} {group_hash}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


@dataclass(frozen=True)
class Prepared:
    """A committed cache entry. Plain values only, so that it can be sent to workers that see the folder.

    `counts` are the examples that an epoch (train) or an evaluation sees, after weighting; `distinct` those on
    disk. `hashes` identify the content of each split, whatever its order, template or tokenizer. `dropped`
    counts rows left out: 'too_long', 'weight' (not drawn by a weight below 1) and, where data.fraction is below 1,
    'fraction'; `too_long` names the first. `fields`: file -> fields that rows were read from -> {rows, first places}.
    """

    folder: Path
    counts: dict[str, int]
    distinct: dict[str, int]
    hashes: dict[str, str]
    dropped: dict[str, int]
    too_long: list[str]
    sources: list[dict[str, Any]]
    fields: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

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
        """Rows of `tokens("train")` that data.fraction `fraction` would leave, in order: a sweep's nested subsets."""
        groups = self.rows("train")["group"][:]
        kept = np.asarray([in_fraction(group, fraction, seed) for group in groups], dtype=bool)
        index = self.folder / "train.index.npy"
        return [int(i) for i in np.flatnonzero(kept[np.load(index)] if index.exists() else kept)]

    def packed(self) -> datasets.Dataset:
        """Columns input_ids, labels, seq_lengths (token counts of the rows in one sequence). Memory-mapped."""
        path = self.folder / "packed.arrow"
        if not path.exists():
            raise DataError("the data were prepared without packing: set sequence.packing to true.")
        return datasets.Dataset.from_file(str(path))
