"""Token rows made by hand, in the shape of prepared data: what tests of the training loop feed it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from datasets import Dataset


@dataclass
class TokenRows:
    """Rows of random tokens (ids 3..258 of the tiny model): a prompt part without loss, then a trained part."""

    count: int = 24
    seed: int = 0
    longest: int = 24
    held_out: int = 10

    def _rows(self, count: int, seed: int) -> list[dict[str, list[int] | int]]:
        rng, rows = random.Random(seed), []
        for _ in range(count):
            prompt = [rng.randrange(3, 259) for _ in range(rng.randrange(4, self.longest // 2))]
            start = rng.randrange(3, 200)
            answer = [start + i for i in range(rng.randrange(2, self.longest // 2))] + [2]
            rows.append(
                {
                    "input_ids": prompt + answer,
                    "labels": [-100] * len(prompt) + answer,
                    "length": len(prompt) + len(answer),
                }
            )
        return rows

    def tokens(self, split: str) -> Dataset:
        if split == "train":
            return Dataset.from_list(self._rows(self.count, self.seed))
        rows = self._rows(self.held_out, self.seed + 1000)
        return Dataset.from_list(rows) if rows else Dataset.from_dict({"input_ids": [], "labels": [], "length": []})

    def packed(self) -> Dataset:
        from trl import pack_dataset

        rows = self.tokens("train").select_columns(["input_ids", "labels"])
        return pack_dataset(rows, 3 * self.longest, "bfd")
