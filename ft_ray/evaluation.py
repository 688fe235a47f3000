"""Generation metrics with intervals, few-shot baselines, and the paired comparison of two models' answers.

Works over anything that can generate: a transformers model here (`HFModel`), an OpenAI-compatible endpoint in
`remote_model`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

from ft_ray import metrics as measures
from ft_ray.errors import DataError, InputError
from ft_ray.generate import HFModel, Model
from ft_ray.metrics import Metric
from ft_ray.parity import Parity, heldout_loss, parity
from ft_ray.recipe import Recipe

__all__ = [
    "Evaluation", "FewShot", "HFModel", "Metric", "Model", "Parity", "compare", "evaluate", "few_shot",
    "heldout_loss", "load_metric", "parity", "row_id", "split_answer",
]  # fmt: skip

Message = Mapping[str, str]


@dataclass(frozen=True)
class Evaluation:
    """`metrics`: name -> {value, low, high, n}, 95% intervals. `predictions`: one dict a row, as in predictions.jsonl
    (id, file, line, prompt, reference, prediction, scores). `primary`: the name of the figure that decides."""

    metrics: dict[str, dict[str, float | int]]
    predictions: list[dict[str, Any]]
    primary: str


def load_metric(recipe: Recipe) -> Metric:
    """The recipe's evaluation.metric with its evaluation.schema. Raises InputError."""
    return measures.metric(recipe.evaluation.metric, schema=recipe.evaluation.schema_)


def evaluate(
    model: Model,
    rows: Iterable[Mapping[str, Any]],
    metric: Metric | str,
    *,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> Evaluation:
    """Generates an answer to each row's prompt and scores it against the row's last assistant message.

    Rows are dicts with `messages` (and `file`, `line`). Raises DataError for a row without a reference answer.
    """
    measure = measures.metric(metric) if isinstance(metric, str) else metric
    table = list(rows)
    if not table:
        raise DataError("there is no row to evaluate: give the split rows, or raise its share in data.split.")
    pairs = [split_answer(row) for row in table]
    answers = model.generate([prompt for prompt, _ in pairs], max_new_tokens)
    assert len(answers) == len(table)
    predictions: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for row, (prompt, reference), answer in zip(table, pairs, answers, strict=True):
        name = str(row.get("id") or row_id(row["messages"]))
        seen[name] = seen.get(name, 0) + 1
        predictions.append(
            {
                "id": name if seen[name] == 1 else f"{name}#{seen[name]}",
                "file": row.get("file"),
                "line": row.get("line"),
                "prompt": prompt,
                "reference": reference,
                "prediction": answer,
                "scores": measure(answer, reference, row),
            }
        )
    return Evaluation(_summary(predictions, seed), predictions, measure.primary)


def _summary(predictions: Sequence[Mapping[str, Any]], seed: int) -> dict[str, dict[str, float | int]]:
    names = list(dict.fromkeys(name for p in predictions for name in p["scores"]))
    return {
        name: measures.interval([p["scores"][name] for p in predictions if name in p["scores"]], seed=seed)
        for name in names
    }


def split_answer(row: Mapping[str, Any]) -> tuple[list[dict[str, str]], str]:
    """(messages before the last assistant answer, that answer)."""
    messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in row["messages"]]
    if not messages or messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise DataError(
            f"{row.get('file')}:{row.get('line')}: the row does not end in an assistant answer to compare with."
        )
    return messages[:-1], messages[-1]["content"]


def row_id(messages: Sequence[Message]) -> str:
    """A row's name by content, the same whatever file it is read from."""
    text = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Few-shot baseline


@dataclass(frozen=True)
class FewShot:
    """Example turns (user, assistant, user, ...) that go before a row's own first user message."""

    messages: tuple[dict[str, str], ...]

    def prepend(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of `row` with the examples; its id stays that of the row without them."""
        own = list(row["messages"])
        system = [m for m in own[:1] if m["role"] == "system"]
        return {
            **row,
            "id": row.get("id") or row_id(own),
            "messages": [*system, *self.messages, *own[len(system) :]],
        }


def few_shot(rows: Iterable[Mapping[str, Any]], k: int, *, seed: int = 0) -> FewShot:
    """`k` single-turn training rows as examples: drawn with the seed, with answers as different as can be.

    Each next example is the one whose answer brings the most that is new: for JSON answers field values, else
    the answer itself. Shorter ones win ties, so that the prompt stays short.
    """
    pool = []
    for row in rows:
        turns = [m for m in row["messages"] if m["role"] != "system"]
        if [m["role"] for m in turns] == ["user", "assistant"]:
            pool.append([{"role": str(m["role"]), "content": str(m["content"])} for m in turns])
    rng = random.Random(seed)
    pool = rng.sample(pool, min(len(pool), 512))
    chosen: list[dict[str, str]] = []
    seen: set[str] = set()
    for _ in range(min(k, len(pool))):
        best = max(pool, key=lambda turns: (len(_facts(turns) - seen), -sum(len(m["content"]) for m in turns)))
        pool.remove(best)
        seen |= _facts(best)
        chosen += best
    return FewShot(tuple(chosen))


def _facts(turns: Sequence[Message]) -> set[str]:
    valid, value = measures.parse_json(turns[-1]["content"])
    if valid and isinstance(value, dict):
        return {json.dumps([k, v], sort_keys=True) for k, v in value.items()}
    return {turns[-1]["content"]}


# Comparison of two models on the same rows


def compare(
    a: Sequence[Mapping[str, Any]],
    b: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    lower_is_better: Container[str] = (),
) -> dict[str, Any]:
    """Two models' predictions compared row by row.

    Returns {rows, metrics: {name: {a, b, difference, low, high, wins, losses, ties, p}}, changed}. `difference` is
    b - a with a 95% paired bootstrap interval; wins are rows where b is better (lower for metrics `lower_is_better`);
    `p` is McNemar's exact two-sided test, for 0/1 scores only. `changed`: ids of the rows won and lost. Raises
    InputError when the predictions are not of the same rows.
    """
    one, two = {p["id"]: p for p in a}, {p["id"]: p for p in b}
    if one.keys() != two.keys():
        only = len(one.keys() ^ two.keys())
        raise InputError(
            f"the two sets of predictions are not of the same rows ({only} are in one only): "
            "evaluate both on one test set."
        )
    different = [i for i in one if one[i]["reference"] != two[i]["reference"]]
    if different:
        raise InputError(f"row {different[0]} has another reference in each set: evaluate both on one test set.")
    metrics: dict[str, Any] = {}
    changed: dict[str, Any] = {}
    for name in dict.fromkeys(n for p in a for n in p["scores"]):
        ids = [i for i in one if name in one[i]["scores"] and name in two[i]["scores"]]
        if not ids:
            continue
        sign = -1.0 if name in lower_is_better else 1.0
        first, second = [one[i]["scores"][name] for i in ids], [two[i]["scores"][name] for i in ids]
        deltas = [y - x for x, y in zip(first, second, strict=True)]
        low, high = measures.paired_bootstrap(deltas, seed=seed)
        wins = [i for i, d in zip(ids, deltas, strict=True) if sign * d > 0]
        losses = [i for i, d in zip(ids, deltas, strict=True) if sign * d < 0]
        metrics[name] = {
            "a": sum(first) / len(ids),
            "b": sum(second) / len(ids),
            "difference": sum(deltas) / len(ids),
            "low": low,
            "high": high,
            "wins": len(wins),
            "losses": len(losses),
            "ties": len(ids) - len(wins) - len(losses),
        }
        if all(v in (0.0, 1.0) for v in [*first, *second]):
            metrics[name]["p"] = mcnemar(len(wins), len(losses))
        changed[name] = {"won": wins, "lost": losses}
    return {"rows": len(one), "metrics": metrics, "changed": changed}


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p of as uneven a split of the rows that differ, both ways being equally likely."""
    n, fewer = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    # Integers throughout: 2.0 ** n overflows beyond a thousand differing rows.
    as_uneven = 2 * sum(comb(n, i) for i in range(fewer + 1))
    return min(1.0, as_uneven / (1 << n))
