"""Near duplicates by MinHash (datasketch), found by sorting bands instead of filling tables.

datasketch's own LSH keeps a Python set for each bucket, several GB for a million rows; its signatures are
kept here in one array and each band is sorted, which needs 256 bytes a row. They are taken of a batch of texts at
once, which takes a tenth of the time of one by one; a test holds them equal to datasketch's own. Candidates are
verified by their exact Jaccard similarity, so that no pair is reported by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from zlib import crc32

import numpy as np
from datasketch import MinHash

__all__ = ["CONTRADICT", "THRESHOLD", "Signatures", "jaccard", "shingles"]

THRESHOLD = 0.9
"""Jaccard similarity of shingles from which two texts count as near duplicates."""
CONTRADICT = 0.85
"""The same for prompts with different answers: one polite word more on a short prompt is 0.87."""

# 8 bands of 8: a pair at 0.9 is a candidate with probability 0.99, one at 0.85 with 0.92, one at 0.6 with 0.13
# (Leskovec et al., Mining of Massive Datasets, section 3.4).
_PERMUTATIONS, _BANDS = 64, 8
_ROWS = _PERMUTATIONS // _BANDS
_ESTIMATE = CONTRADICT - 0.12  # the estimate from 64 values is off by 0.04 (one standard error) at these
_MAX_VERIFIED = 50_000
_CHARACTERS, _LONG = 5, 400  # of a piece of a short text; the longest such text
_MULTIPLIER = np.uint32(0x9E3779B1)  # odd, so that no character of a piece is lost (Knuth, TAOCP 3, section 6.4)

Array = np.ndarray[Any, Any]


def shingles(text: str) -> set[str]:
    """5-character pieces of a short text, 3-word pieces of one over 400 characters; of normalised text."""
    if len(text) > _LONG:
        words = text.split()
        return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
    return {text[i : i + _CHARACTERS] for i in range(max(1, len(text) - _CHARACTERS + 1))}


def jaccard(a: str, b: str) -> float:
    """Share of common shingles of two normalised texts, 0 to 1."""
    one, two = shingles(a), shingles(b)
    return len(one & two) / len(one | two)


class Signatures:
    """Signatures of texts in the order they were added; then the pairs that are near duplicates."""

    def __init__(self) -> None:
        self._blocks: list[Array] = []
        self.capped = False

    def add(self, texts: Sequence[str]) -> None:
        if not texts:
            return
        block = np.empty((len(texts), _PERMUTATIONS), np.uint32)
        long = np.array([len(t) > _LONG for t in texts])
        for rows, pieces in ((~long, _pieces), (long, _phrases)):
            chosen = np.flatnonzero(rows)
            if len(chosen):
                block[chosen] = _signatures(*pieces([texts[i] for i in chosen]))
        self._blocks.append(block)

    def pairs(
        self, text_of: Callable[[int], str], skip: Array, same: Array, answer: Array
    ) -> Iterator[tuple[int, int, float]]:
        """(earlier, later, similarity) of rows whose texts reach THRESHOLD, or CONTRADICT where their `answer` differs.

        Every member of a cluster is paired with one earlier row of the same answer and one of another, not with all; a
        pair below THRESHOLD does not stand in for one that reaches it. `skip[i]` leaves row i out (an exact copy of
        another); rows are paired only where `same` is equal.
        """
        if not self._blocks:
            return
        table = np.concatenate(self._blocks)
        self._blocks = [table]
        kept = np.flatnonzero(~skip)
        candidates = self._candidates(table, kept, same)
        if len(candidates) > _MAX_VERIFIED:
            self.capped = True
            candidates = candidates[:_MAX_VERIFIED]
        seen: set[tuple[int, bool, bool]] = set()
        for a, b in candidates.tolist():
            agree = bool(answer[a] == answer[b])
            if (b, agree, True) in seen:
                continue
            similarity = jaccard(text_of(a), text_of(b))
            key = (b, agree, similarity >= THRESHOLD)
            if key not in seen and similarity >= (THRESHOLD if agree else CONTRADICT):
                seen.add(key)
                yield a, b, similarity

    def _candidates(self, table: Array, kept: Array, same: Array) -> Array:
        rng = np.random.default_rng(1)
        found = []
        for band in range(_BANDS):
            part = table[kept, band * _ROWS : (band + 1) * _ROWS]
            odd = rng.integers(1, 2**63, _ROWS, dtype=np.uint64) | np.uint64(1)
            key = (part.astype(np.uint64) * odd).sum(axis=1, dtype=np.uint64)
            order = np.argsort(key, kind="stable")  # stable: within a bucket the earliest row comes first
            ordered = key[order]
            start = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
            sizes = np.diff(np.concatenate([start, [len(ordered)]]))
            head = np.repeat(start, sizes)
            later = np.flatnonzero(np.arange(len(order)) != head)
            # Against the first of the bucket and against the one just before.
            for other in (head[later], later - 1):
                a, b = kept[order[other]], kept[order[later]]
                alike = same[a] == same[b]
                a, b = a[alike], b[alike]
                for i in range(0, len(a), 65536):
                    x, y = a[i : i + 65536], b[i : i + 65536]
                    near = (table[x] == table[y]).mean(axis=1) >= _ESTIMATE
                    found.append(np.stack([x[near], y[near]], axis=1))
        return np.unique(np.concatenate(found), axis=0) if found else np.zeros((0, 2), np.int64)


def hashed(piece: str) -> int:
    """The number of one piece of a short text: a polynomial of its characters modulo 2^32."""
    value = 0
    for character in piece.ljust(_CHARACTERS, "\0"):
        value = (value * int(_MULTIPLIER) + ord(character)) % 2**32
    return value


def _pieces(texts: Sequence[str]) -> tuple[Array, Array]:
    """`hashed` of every piece of short texts, one text after another, and where each text's begin."""
    whole = "".join(t.ljust(_CHARACTERS, "\0") for t in texts)
    points = np.frombuffer(whole.encode("utf-32-le", "surrogatepass"), np.uint32)
    values = np.zeros(len(points), np.uint32)
    for k in range(_CHARACTERS):
        values *= _MULTIPLIER
        values[: len(points) - k] += points[k:]
    lengths = np.array([max(len(t), _CHARACTERS) for t in texts])
    kept = np.ones(len(points), bool)
    for k in range(1, _CHARACTERS):  # what begins here reaches into the next text
        kept[np.cumsum(lengths) - k] = False
    return values[kept], np.cumsum(lengths - _CHARACTERS + 1) - (lengths - _CHARACTERS + 1)


def _phrases(texts: Sequence[str]) -> tuple[Array, Array]:
    """The same for the pieces of long texts, by crc32."""
    values = [[crc32(s.encode("utf-8", "replace")) for s in shingles(t)] for t in texts]
    counts = np.array([len(v) for v in values])
    return np.fromiter((v for one in values for v in one), np.uint32, counts.sum()), np.cumsum(counts) - counts


def _signatures(values: Array, starts: Array) -> Array:
    """datasketch's signature of each text: over its pieces the least value of each permutation of their hashes."""
    block = np.empty((len(starts), _PERMUTATIONS), np.uint32)
    # The finalizer of MurmurHash3, with which datasketch mixes first: a weak hash will do.
    mixed = values ^ (values >> np.uint32(16))
    mixed *= np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    mixed *= np.uint32(0xC2B2AE35)
    mixed ^= mixed >> np.uint32(16)
    factors, addends = MinHash(num_perm=_PERMUTATIONS, seed=1, scheme="affine32").permutations
    for k in range(_PERMUTATIONS):
        block[:, k] = np.minimum.reduceat(mixed * factors[k] + addends[k], starts)
    return block
