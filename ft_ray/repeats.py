"""Duplicates, contradictions and leakage, exact and near, from the hashes of a scan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ft_ray.console import counted
from ft_ray.data_scan import KEEP, Scan
from ft_ray.dataset import SPLITS
from ft_ray.findings import Finding, share
from ft_ray.near_duplicates import THRESHOLD
from ft_ray.sensitive import redacted

__all__ = ["repeats"]

Array = np.ndarray[Any, Any]


def repeats(found: Scan) -> Iterator[Finding]:
    """The findings on rows that repeat or contradict one another, within a split and across."""
    total = len(found)
    if total == 0:
        return
    order = np.lexsort((np.arange(total), found.answer, found.prompt))
    prompt, answer, split = found.prompt[order], found.answer[order], found.split[order]
    same_prompt = np.concatenate([[False], prompt[1:] == prompt[:-1]])
    same_both = same_prompt & np.concatenate([[False], answer[1:] == answer[:-1]])

    yield from _duplicates(found, order, same_both)
    yield from _contradictions(found, order, same_prompt, same_both)
    yield from _leakage(found, order, prompt, split)
    copies = np.zeros(total, bool)
    copies[order[same_prompt]] = True
    yield from _near(found, copies)


def _pair(found: Scan, a: int, b: int, at: int = -2) -> str:
    one = found.row(a)
    return f"{found.place(b, at=at)} (as {one['file']}:{one['line']})"


def _duplicates(found: Scan, order: Array, same_both: Array) -> Iterator[Finding]:
    at = np.flatnonzero(same_both)
    if not len(at):
        return
    yield Finding(
        "warning" if len(at) >= min(50, 0.005 * len(found)) else "info",
        "duplicates",
        f"{share(len(at), len(found))} repeat another row, prompt and answer.",
        "Remove the copies; use a source's weight where rows shall count more.",
        [_pair(found, int(order[i - 1]), int(order[i])) for i in at[:KEEP]],
        len(at),
    )


def _contradictions(found: Scan, order: Array, same_prompt: Array, same_both: Array) -> Iterator[Finding]:
    at = np.flatnonzero(same_prompt & ~same_both)
    if not len(at):
        return
    examples = [_both(found, *sorted((int(order[i - 1]), int(order[i])))) for i in at[:KEEP]]
    yield Finding(
        "warning",
        "contradictions",
        f"{counted(len(at), 'row')} with another answer to a prompt that is the same but for case, spaces or closing "
        "punctuation.",
        "Decide on one answer; where several are right, keep them all and expect a higher loss.",
        examples,
        len(at),
    )


def _both(found: Scan, a: int, b: int) -> str:
    one = found.row(a)
    return f"{found.place(b, at=-2)} → {_short(found, b)}, but {one['file']}:{one['line']} → {_short(found, a)}"


def _short(found: Scan, i: int) -> str:
    text = redacted(" ".join(found.row(i)["messages"][-1]["content"].split()))
    return repr(text[:40] + "…" if len(text) > 41 else text)


def _leakage(found: Scan, order: Array, prompt: Array, split: Array) -> Iterator[Finding]:
    """Prompts of a held-out split that training (or validation) holds too. Splits cut by this project share
    none; sources given apart may."""
    number = np.cumsum(np.concatenate([[False], prompt[1:] != prompt[:-1]]))
    groups = int(number[-1]) + 1
    first = {s: np.full(groups, -1, np.int64) for s in range(3)}
    for s in range(3):
        inside = np.flatnonzero(split == s)[::-1]
        first[s][number[inside]] = order[inside]
    for early, late in ((0, 1), (0, 2), (1, 2)):
        inside = np.flatnonzero(split == late)
        leaked = inside[first[early][number[inside]] >= 0]
        if not len(leaked):
            continue
        held, name, source = len(inside), SPLITS[late], SPLITS[early]
        yield Finding(
            "error" if len(leaked) > 0.01 * held else "warning",
            "leakage",
            f"{share(len(leaked), held, name)} have a prompt that is in {source} too, "
            "so their figures say nothing about new prompts.",
            f"Remove them from one of the two, or give no data.{name} and let data.split cut it.",
            [_pair(found, int(first[early][number[i]]), int(order[i])) for i in leaked[:KEEP]],
            len(leaked),
        )


def _near(found: Scan, copies: Array) -> Iterator[Finding]:
    """Pairs from MinHash whose numbers are equal too: a row with another order number is another example.

    Leakage is of the prompt, as where prompts are equal: a held-out prompt that training has nearly seen says little
    about new ones, whatever its answer (one of two wordings, or a label that then is a contradiction besides). So it
    has one threshold; the lower one, of other answers, finds contradictions only.
    """
    near: list[tuple[int, int]] = []
    against: dict[int, int] = {}
    leaks: dict[tuple[int, int], dict[int, int]] = {}
    for a, b, similarity in found.signatures.pairs(found.own_text, copies, found.digits, found.answer):
        agree = found.answer[a] == found.answer[b]
        if not agree:
            against.setdefault(b, a)
        if found.split[a] != found.split[b]:
            if similarity >= THRESHOLD:
                leaks.setdefault((int(found.split[a]), int(found.split[b])), {}).setdefault(b, a)
        elif agree:
            near.append((a, b))
    yield from _near_contradictions(found, [(a, b) for b, a in against.items()])
    if near:
        yield Finding(
            "warning" if len(near) >= 0.05 * len(found) else "info",
            "near_duplicates",
            f"{share(len(near), len(found))} are nearly the same as another row of their split, "
            "with the same answer." + (" More candidates were not compared." if found.signatures.capped else ""),
            "Remove them or vary their wording: they count as one example and cost as two.",
            [_pair(found, a, b) for a, b in near[:KEEP]],
            len(near),
        )
    for (early, late), leaked in sorted(leaks.items()):
        pairs = [(a, b) for b, a in leaked.items()]
        held = int((found.split == late).sum())
        other = sum(bool(found.answer[a] != found.answer[b]) for a, b in pairs)
        yield Finding(
            "warning" if len(pairs) >= 0.02 * held else "info",
            "near_leakage",
            f"{share(len(pairs), held, SPLITS[late])} have a prompt that is nearly the same as a {SPLITS[early]} row's"
            + (f", {other} of them with another answer." if other else "."),
            "Read their figures with care, or remove them: they test memory.",
            [_pair(found, a, b) for a, b in pairs[:KEEP]],
            len(pairs),
        )


def _near_contradictions(found: Scan, pairs: list[tuple[int, int]]) -> Iterator[Finding]:
    if not pairs:
        return
    # Single pairs may be two fair answers to two questions; half a percent of a set is a fault of the set.
    yield Finding(
        "warning" if len(pairs) >= max(5, 0.005 * len(found)) else "info",
        "near_contradictions",
        f"{share(len(pairs), len(found))} give another answer to a prompt that is nearly the same as another row's.",
        "Read the pairs: decide on one answer, or make the prompts say what sets them apart.",
        [_both(found, a, b) for a, b in pairs[:KEEP]],
        len(pairs),
    )
