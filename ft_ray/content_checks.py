"""Judgements on what the rows say: labels, the form of answers, diversity, and faults in the text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ft_ray.console import counted
from ft_ray.data_scan import KEEP, Scan, Tally
from ft_ray.findings import Finding, Severity, share

__all__ = ["answer_format", "are_labels", "diversity", "labels", "text_faults"]


def are_labels(found: Scan) -> bool:
    """Whether the answers are few short texts that repeat."""
    rows, kinds = found.answers.total(), len(found.answers)
    few = max(20, rows // 20)
    short = found.long_answers <= len(found) // 100 and not found.labels_overflowed
    # Many different numbers are results, not classes.
    numbers = kinds > 10 and sum(a.strip().lstrip("-").replace(".", "", 1).isdigit() for a in found.answers) > kinds / 2
    return short and 2 <= kinds <= few and rows >= 5 * kinds and not numbers


def labels(found: Scan) -> Iterator[Finding]:
    if not are_labels(found):
        yield from _dominant(found)
        return
    ranked = found.answers.most_common()
    counts = [c for _, c in ranked]
    median = sorted(counts)[len(counts) // 2]
    (top, most), (_, least) = ranked[0], ranked[-1]
    skewed = most >= 10 * least if len(counts) <= 3 else most >= 10 * max(median, 1)
    if skewed:
        yield Finding(
            "warning",
            "imbalance",
            f"The label {top!r} has {most} rows, the median label {median}, the rarest {least}.",
            "Balance the labels, or give the rare ones a source of their own with a weight above 1.",
            [found.place(found.label_first[a]) for a, _ in ranked[-KEEP:]],
            len(counts),
        )
    rare = [(a, c) for a, c in ranked if c < 5]
    if rare:
        yield Finding(
            "warning",
            "rare_labels",
            f"Fewer than 5 training rows for {len(rare)} of {len(counts)} labels.",
            "Add rows for them, or correct them if they are misspelt.",
            [found.place(found.label_first[a]) for a, _ in rare[:KEEP]],
            len(rare),
        )
    written: dict[str, list[str]] = {}
    for answer in found.answers:
        written.setdefault("".join(c for c in answer.casefold() if c.isalnum()), []).append(answer)
    double = [names for key, names in written.items() if key and len(names) > 1]
    if double:
        yield Finding(
            "warning",
            "label_spelling",
            f"{counted(len(double), 'label')} written in more than one way.",
            "Write each label in one way.",
            [f"{found.place(found.label_first[n[1]], repr(n[1]))} and {n[0]!r}" for n in double[:KEEP]],
            len(double),
        )
    unseen = sorted((found.answers_of["validation"] | found.answers_of["test"]) - found.answers_of["train"])
    if unseen:
        yield Finding(
            "warning",
            "unseen_labels",
            f"{counted(len(unseen), 'label')} of validation or test, but not of training: "
            f"{', '.join(map(repr, unseen[:KEEP]))}.",
            "Add training rows for them.",
            count=len(unseen),
        )


def _dominant(found: Scan) -> Iterator[Finding]:
    """One answer given to very many prompts that are not labels, such as a canned refusal."""
    if found.labels_overflowed or len(found) < 20 or not found.answers:
        return
    answer, most = found.answers.most_common(1)[0]
    rows = int((found.split == 0).sum())
    if most >= 5 and most >= 0.2 * rows:
        yield Finding(
            "warning",
            "canned_answer",
            f"{share(most, rows)} have the same answer {answer[:60]!r}.",
            "Remove most of them: the model will give it to everything.",
            [found.place(found.label_first[answer])],
            most,
        )


def answer_format(found: Scan) -> Iterator[Finding]:
    total = len(found)
    if found.json_answers >= 0.8 * total and total:
        if found.not_json.count:
            yield Finding(
                "warning",
                "answer_format",
                f"{share(found.not_json.count, total)} have answers that are no JSON objects, where the others are.",
                "Mend or remove them.",
                found.places(found.not_json),
                found.not_json.count,
            )
        keys, most = found.json_keys.most_common(1)[0]
        other = found.json_answers - most
        if other and most >= 0.9 * found.json_answers:
            places = [p for k in found.json_keys if k != keys for p in found.places(found.json_first[k])]
            yield Finding(
                "warning",
                "answer_fields",
                f"{share(other, total)} have answers with other fields than {', '.join(keys)}.",
                "Give every answer the same fields.",
                places[:KEEP],
                other,
            )
        yield from _value_types(found)
    if total and 0.02 * total < found.systems < 0.98 * total:
        yield Finding(
            "info",
            "system_messages",
            f"{share(found.systems, total)} have a system message, the others none.",
            "Set data.system to give every row one, if the endpoint will use one.",
            count=found.systems,
        )


def _value_types(found: Scan) -> Iterator[Finding]:
    odd: list[tuple[str, str, str, Tally]] = []
    for key, kinds in found.json_types.items():
        usual = max(kinds, key=lambda k: kinds[k].count)
        # Where types are mixed throughout, a field means to hold either.
        if kinds[usual].count >= 0.9 * sum(t.count for t in kinds.values()):
            odd += [(key, kind, usual, tally) for kind, tally in kinds.items() if kind != usual]
    if odd:
        said = ", ".join(f"{key!r} is {kind} in {tally.count} (else {usual})" for key, kind, usual, tally in odd[:KEEP])
        places = [p for _, _, _, tally in odd for p in found.places(tally)]
        yield Finding(
            "warning",
            "answer_types",
            f"Fields of answers hold values of another type than elsewhere: {said}.",
            "Give every field one type.",
            list(dict.fromkeys(places))[:KEEP],
            sum(tally.count for _, _, _, tally in odd),
        )


def diversity(found: Scan) -> Iterator[Finding]:
    total, prompts = len(found), len(np.unique(found.prompt))
    if total >= 50 and prompts < 0.5 * total:
        yield Finding(
            "warning",
            "few_prompts",
            f"{total} rows hold only {prompts} different prompts.",
            "Add different prompts rather than more answers to the same.",
            count=total - prompts,
        )
    words = found.words.total()
    if words >= 5000 and len(found.words) < 0.005 * words:
        yield Finding(
            "warning",
            "narrow_vocabulary",
            f"{words} words of sampled prompts are {len(found.words)} different ones.",
            "Vary the wording; templates alone teach the template.",
            count=len(found.words),
        )


_TEXT: dict[str, tuple[Severity, str]] = {
    "secret": ("warning", "Revoke the secret and remove it: a model can repeat what it was trained on."),
    "pii": ("warning", "Remove or replace personal data: a model can repeat what it was trained on."),
    "special_token": ("warning", "Remove the model's own control tokens from the text."),
    "broken_text": ("warning", "Read the source in its own encoding and save it as UTF-8 again."),
    "placeholder": ("warning", "Fill the template or remove the row."),
    "boilerplate": ("info", "Remove it unless the model should say so."),
}


def text_faults(found: Scan) -> Iterator[Finding]:
    for code, (severity, fix) in _TEXT.items():
        kinds = {name: tally for (c, name), tally in found.text_faults.items() if c == code}
        if not kinds:
            continue
        named = ", ".join(f"{name} in {tally.count}" for name, tally in kinds.items())
        # One of each kind first, so that a rare kind is not hidden behind a common one.
        firsts = [t.first[k] for k in range(KEEP) for t in kinds.values() if k < len(t.first)]
        yield Finding(
            severity,
            code,
            f"{named} of {len(found)} rows.",
            fix,
            [found.place(i, shown) for i, shown in firsts[:KEEP]],
            sum(t.count for t in kinds.values()),
        )
