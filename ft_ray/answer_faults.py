"""What is wrong with a run's answers: their form, the same answer to everything, none at all, and a low score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ft_ray.metrics import parse_json
from ft_ray.recipe import Recipe
from ft_ray.verdicts import Diagnosis, Record, made

__all__ = ["answer_faults", "broken"]

_FEW = 8  # answers below which none are judged


def answer_faults(
    predictions: Sequence[Record], scores: Mapping[str, Any], recipe: Recipe, data_codes: Sequence[str] = ()
) -> Iterator[Diagnosis]:
    """The findings on a run's predictions and on its `scores`, metrics of the evaluate stage."""
    if len(predictions) >= _FEW:
        yield from _empty(predictions, recipe)
        yield from _constant(predictions, recipe)
        yield from _format([p for p in predictions if _plain(p["prediction"])], recipe, data_codes)
    yield from _low(predictions, scores, recipe)


def _plain(text: str) -> str:
    return " ".join(text.split())


def _kind(references: Sequence[str]) -> str:
    """'json' where references are JSON objects or lists, 'label' where few short ones repeat, else ''."""
    structured = [isinstance(parse_json(r)[1], dict | list) for r in references]
    if structured and sum(structured) >= 0.8 * len(structured):
        return "json"
    kinds = set(references)
    few = len(references) >= 40 and len(kinds) <= len(references) / 4
    return "label" if few and max(map(len, kinds)) <= 80 else ""


def broken(predictions: Sequence[Record]) -> tuple[str, list[Record]]:
    """(kind of the references, predictions that are not of it): invalid JSON, or no label that occurs."""
    kind = _kind([p["reference"] for p in predictions])
    if kind == "json":
        return kind, [p for p in predictions if not isinstance(parse_json(p["prediction"])[1], dict | list)]
    if kind == "label":
        labels = {_plain(p["reference"]) for p in predictions}
        return kind, [p for p in predictions if _plain(p["prediction"]) not in labels]
    return kind, []


def _empty(predictions: Sequence[Record], recipe: Recipe) -> Iterator[Diagnosis]:
    bad = [p for p in predictions if not _plain(p["prediction"]) and _plain(p["reference"])]
    if len(bad) > 0.02 * len(predictions):
        yield made(
            "empty_answers", "error" if len(bad) > 0.1 * len(predictions) else "warning",
            f"{len(bad)} of {len(predictions)} answers are empty: the model ends its answer at once.",
            recipe, empty=len(bad), rows=len(predictions),
        )  # fmt: skip


def _constant(predictions: Sequence[Record], recipe: Recipe) -> Iterator[Diagnosis]:
    said = Counter(_plain(p["prediction"]) for p in predictions)
    meant = Counter(_plain(p["reference"]) for p in predictions)
    (answer, often), (_, usual) = said.most_common(1)[0], meant.most_common(1)[0]
    rows = len(predictions)
    others = rows - usual  # rows that the most frequent reference does not answer
    # Imbalanced labels repeat too: the one answer must be given clearly more often than any is right.
    if answer and often >= 0.8 * rows and often - usual > 0.05 * rows and others >= max(3, 0.05 * rows):
        yield made(
            "constant_answers", "error" if often >= 0.95 * rows else "warning",
            f"{often} of {rows} answers are the same, {answer[:80]!r}, where the references are {len(meant)} different "
            "ones: the model does not look at the prompt.",
            recipe, answer=answer[:200], times=often, rows=rows, references=len(meant),
        )  # fmt: skip


def _format(predictions: Sequence[Record], recipe: Recipe, data_codes: Sequence[str]) -> Iterator[Diagnosis]:
    if len(predictions) < _FEW:
        return
    kind, bad = broken(predictions)
    # A label that training knows may be missing among few references: a tenth, not one in fifty, is a fault there.
    if len(bad) <= (0.02 if kind == "json" else 0.1) * len(predictions):
        return
    longest = max(len(p["reference"]) for p in predictions)
    cut = [p for p in bad if p["prediction"].lstrip()[:1] in "{[" and len(p["prediction"]) >= longest]
    what = "are no valid JSON" if kind == "json" else "are none of the labels"
    faulty = [c for c in data_codes if c in ("answer_format", "answer_fields", "answer_types")]
    cause = ": training rows break the format too" if faulty else "; write them out with --corrections and read them"
    yield made(
        "broken_format", "error" if len(bad) > 0.1 * len(predictions) else "warning",
        f"{len(bad)} of {len(predictions)} answers {what}{cause}.",
        recipe, kind=kind, broken=len(bad), rows=len(predictions), cut_off=bool(bad) and len(cut) > len(bad) / 2,
        broken_training_rows=bool(faulty), examples=[str(p["prediction"])[:200] for p in bad[:3]],
    )  # fmt: skip


def _low(predictions: Sequence[Record], scores: Mapping[str, Any], recipe: Recipe) -> Iterator[Diagnosis]:
    """A primary score that is no better than the base's, or below one half where answers are labels or JSON."""
    primary = scores.get("primary")
    tuned, base = ((scores.get(name) or {}).get(primary) for name in ("tuned", "base"))
    if not primary or not tuned:
        return
    value, sign = tuned["value"], 1 if recipe.evaluation.mode == "max" else -1
    if base and sign * (value - base["value"]) <= 0:
        full = sign > 0 and value >= 0.95  # nothing was left to gain
        if not full:
            yield made("no_gain", "warning",
                       f"Nothing was gained: {primary} is {value:.3g}, the base's is {base['value']:.3g}.",
                       recipe, metric=primary, tuned=value, base=base["value"])  # fmt: skip
    elif sign > 0 and value < 0.5 and value >= 0 and _kind([p["reference"] for p in predictions]):
        yield made("low_score", "warning",
                   f"The score is low: {primary} is {value:.3g} where 1 is right throughout; write the wrong answers "
                   "out with --corrections and read them.", recipe, metric=primary, tuned=value)  # fmt: skip
