"""Data quality before a run: what is measured, how bad it is, where, and what to do.

Every finding has a code, a severity, up to five examples with file and line, and the fix. Errors stop a run;
warnings stop it with `strict`. The pass over the data streams (`data_scan`); the judgements are here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ft_ray.chat import IGNORED, Chat
from ft_ray.console import counted
from ft_ray.content_checks import answer_format, are_labels, diversity, labels, text_faults
from ft_ray.data_scan import KEEP, Scan, Tally, scan
from ft_ray.findings import DataReport, Finding, Severity, gate, share
from ft_ray.prepared_data import Prepared
from ft_ray.recipe import Recipe
from ft_ray.repeats import repeats
from ft_ray.review import read_review, write_review
from ft_ray.rows import normal
from ft_ray.sensitive import redacted

__all__ = ["DataReport", "Finding", "check", "gate"]

_ORDER = {"error": 0, "warning": 1, "info": 2}
_FLOOR, _IDEAL = 1_000, 10_000  # rows; the figures of the guide that this project follows
_SAMPLED = 200
_log = logging.getLogger("ft_ray")


def check(recipe: Recipe, prepared: Prepared, chat: Chat, *, review: str | Path | None = None) -> DataReport:
    """Judges prepared data. Reads each row once; memory grows by about 330 bytes a row.

    `review`: a CSV of sampled rows for a person. Written where it does not exist; where it does, its marks are
    read back and judged.
    """
    found = scan(prepared, chat)
    _log.info("looking for repeats, contradictions and leakage among %d rows", len(found))
    parts: list[Iterable[Finding]] = [
        _size(prepared),
        _fields(prepared),
        _lengths(recipe, prepared, found),
        _masking(found),
        _round_trip(prepared, chat, recipe.seed),
        repeats(found),
        labels(found),
        answer_format(found),
        diversity(found),
        text_faults(found),
    ]
    if review is not None:
        parts.append(_review(prepared, Path(review), recipe.seed))
    findings = sorted((f for part in parts for f in part), key=lambda f: _ORDER[f.severity])
    return DataReport(findings, _stats(prepared, found))


def _stats(prepared: Prepared, found: Scan) -> dict[str, Any]:
    def percentiles(values: Any) -> dict[str, float]:
        if not len(values):
            return {}
        points = np.percentile(values, [50, 90, 95, 99])
        named = dict(zip(("p50", "p90", "p95", "p99"), map(float, points), strict=True))
        return {"min": float(values.min()), **named, "max": float(values.max())}

    prompts = found.length - found.trained
    stats: dict[str, Any] = {
        "counts": dict(prepared.counts),
        "distinct": dict(prepared.distinct),
        "dropped": dict(prepared.dropped),
        "tokens": percentiles(found.length),
        "prompt_tokens": percentiles(prompts),
        "trained_tokens": percentiles(found.trained),
        "total_tokens": int(found.length.sum()),
        "train_tokens": _train_tokens(prepared),
        "total_trained_tokens": int(found.trained.sum()),
        "distinct_prompts": len(np.unique(found.prompt)),
        "distinct_answers": len(np.unique(found.answer)),
        "vocabulary_of_sample": len(found.words),
        "words_of_sample": found.words.total(),
    }
    if are_labels(found):
        stats["labels"] = dict(found.answers.most_common(1000))
    if prepared.distinct["train"] and prepared.counts["train"] != prepared.distinct["train"]:
        stats["seen_an_epoch"] = prepared.counts["train"] / prepared.distinct["train"]
    return stats


def _train_tokens(prepared: Prepared) -> dict[str, int] | None:
    """Rows an epoch, their tokens, and the longest row: what `plan` needs for time and cost."""
    lengths = np.asarray(prepared.tokens("train").with_format("numpy")["length"][:])  # a column alone goes row by row
    if not len(lengths):
        return None
    return {"rows": len(lengths), "tokens": int(lengths.sum()), "longest": int(lengths.max())}


# Size, lengths, masking


def _size(prepared: Prepared) -> Iterator[Finding]:
    rows = prepared.distinct["train"]
    if rows < _FLOOR:
        yield Finding(
            "warning",
            "few_rows",
            f"{rows} training rows, under the floor of {_FLOOR:,}.",
            "Add examples; below the floor a model tends to learn them by heart.",
            count=rows,
        )
    elif rows < _IDEAL:
        yield Finding("info", "size", f"{rows} training rows; {_IDEAL:,} are ideal.", "Add examples.", count=rows)
    for name, use in (
        ("validation", "early stopping and sweeps have nothing to choose by"),
        ("test", "the result will not be measured"),
    ):
        held = prepared.counts[name]
        if held == 0:
            yield Finding(
                "warning",
                f"no_{name}",
                f"The {name} split is empty, so {use}.",
                f"Raise data.split.{name} or give data.{name}.",
            )
        elif held < 50:
            width = 100 / held**0.5
            yield Finding(
                "info",
                f"small_{name}",
                f"{held} {name} rows: figures on them are good to ±{width:.0f} points.",
                f"Raise data.split.{name}.",
                count=held,
            )


def _fields(prepared: Prepared) -> Iterator[Finding]:
    """Rows of one file that were read from other fields than the rest of it; an optional `input` may be absent."""
    for file, layouts in prepared.fields.items():
        if len({tuple(f for f in fields.split(", ") if f != "input") for fields in layouts}) < 2:
            continue
        ranked = sorted(layouts, key=lambda k: layouts[k]["rows"], reverse=True)
        other = sum(layouts[k]["rows"] for k in ranked[1:])
        said = ", ".join(f"{layouts[k]['rows']} have {k.replace(', ', ' + ')}" for k in ranked)
        yield Finding(
            "warning",
            "mixed_fields",
            f"The rows of {file} have different fields: {said}.",
            "Write all rows of a file in one layout: what one calls input may be what another calls instruction.",
            [p for k in ranked[1:] for p in layouts[k]["first"]][:KEEP],
            other,
        )


def _lengths(recipe: Recipe, prepared: Prepared, found: Scan) -> Iterator[Finding]:
    limit, dropped = recipe.sequence.max_length, prepared.dropped.get("too_long", 0)
    total = len(found) + dropped
    if dropped:
        severity: Severity = "warning" if dropped / total >= 0.001 else "info"
        yield Finding(
            severity,
            "too_long",
            f"{share(dropped, total)} exceed {limit} tokens and are left out.",
            "Raise sequence.max_length, or shorten them.",
            prepared.too_long[:KEEP],
            dropped,
        )
    longest = int(found.length.max()) if len(found) else 0
    if longest and longest * 2 <= limit and not recipe.sequence.packing:
        fits = 8 * -(-longest // 8)
        yield Finding(
            "info",
            "room",
            f"The longest row has {longest} tokens, sequence.max_length is {limit}.",
            f"sequence.max_length {fits} holds every row; packing would fill the rest.",
        )


def _masking(found: Scan) -> Iterator[Finding]:
    if found.no_eos.count:
        yield Finding(
            "error",
            "eos_not_trained",
            f"{share(found.no_eos.count, len(found))} end no answer in EOS.",
            "Use a chat template that ends each answer with the model's EOS token.",
            found.places(found.no_eos),
            found.no_eos.count,
        )
    bare = np.flatnonzero(found.trained == 1)
    if len(bare):
        yield Finding(
            "warning",
            "nothing_trained",
            f"{share(len(bare), len(found))} train the EOS token only.",
            "Fill or remove their answers.",
            [found.place(int(i)) for i in bare[:KEEP]],
            len(bare),
        )


def _round_trip(prepared: Prepared, chat: Chat, seed: int) -> Iterator[Finding]:
    """On a seeded sample: the prompt is a prefix of the row's tokens, and tokens decode to the rendered text."""
    rows, tokens = prepared.rows("train"), prepared.tokens("train", distinct=True)
    chosen = np.random.default_rng(seed).choice(len(rows), size=min(_SAMPLED, len(rows)), replace=False)
    split_prompt, lossy = Tally(), Tally()
    for i in sorted(chosen.tolist()):
        row, ids, labels = rows[i], tokens[i]["input_ids"], tokens[i]["labels"]
        place = f"{row['file']}:{row['line']}"
        first = next((k for k, label in enumerate(labels) if label != IGNORED), len(labels))
        answers = [k for k, m in enumerate(row["messages"]) if m["role"] == "assistant"]
        # A template that rewrites earlier turns trains the last answer only; that prompt is then the long one.
        prompts = [chat.prompt_ids(row["messages"][:k]) for k in (answers[0], answers[-1])]
        if ids[:first] not in prompts:
            split_prompt.add(i, place)
        text = str(chat.tokenizer.decode(ids, skip_special_tokens=False))
        answer = row["messages"][answers[-1]]["content"].strip()
        if answer not in text and normal(answer) not in normal(text):
            lossy.add(i, f"{place} {redacted(answer)[:60]}")
    if split_prompt.count:
        yield Finding(
            "error",
            "prompt_differs",
            f"{share(split_prompt.count, len(chosen))} of a sample were tokenised "
            "otherwise than the server will do it.",
            "Use a tokenizer.json of the base model.",
            [s for _, s in split_prompt.first],
            split_prompt.count,
        )
    if lossy.count:
        yield Finding(
            "warning",
            "lossy_tokens",
            f"{share(lossy.count, len(chosen))} of a sample do not survive the tokenizer: the model cannot write them.",
            "Choose a base whose tokenizer knows these characters.",
            [s for _, s in lossy.first],
            lossy.count,
        )


def _review(prepared: Prepared, path: Path, seed: int) -> Iterator[Finding]:
    if not path.exists():
        write_review(prepared, path, seed=seed)
        yield Finding(
            "info",
            "review_written",
            f"A sample of rows for you to judge is in {path}.",
            "Mark each row ok, bad or unsure, and check again.",
        )
        return
    result = read_review(path, prepared)
    bad = result.marks["bad"]
    if result.stale:
        yield Finding(
            "warning",
            "review_stale",
            f"Marks of {counted(len(result.stale), 'row')} in {path} do not count: the data no longer hold them like "
            "that.",
            "Write a new sample to another file, and mark that one.",
            result.stale[:KEEP],
            len(result.stale),
        )
    if result.judged and bad / result.judged >= 0.05:
        yield Finding(
            "warning",
            "review",
            f"A person found {bad} of {result.judged} sampled rows bad.",
            "Mend what they have in common, then draw a new sample.",
            result.bad[:KEEP],
            bad,
        )
    else:
        yield Finding(
            "info",
            "review",
            f"A person judged {result.judged} sampled rows: {bad} bad, {result.unmarked} not yet marked.",
            "Mark the rest.",
            result.bad[:KEEP],
            bad,
        )
