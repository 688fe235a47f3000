"""Whether the output format holds while training goes on: a few validation prompts answered at each evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ft_ray.answer_faults import broken
from ft_ray.chat import IGNORED, Chat
from ft_ray.generate import HFModel
from ft_ray.recipe import Recipe

__all__ = ["validity"]


def validity(recipe: Recipe, net: Any, tokenizer: Any, rows: Any) -> float | None:
    """Share of well-formed answers to `evaluation.format_rows` of the token rows; None where there is no format.

    Every rank computes the same: with a sharded model all of them have to.
    """
    count = min(recipe.evaluation.format_rows, len(rows))
    if not count:
        return None
    template = Path(recipe.model.chat_template).read_text("utf-8") if recipe.model.chat_template else None
    chat = Chat(tokenizer, template)
    step = max(1, len(rows) // count)  # spread over the split: files are often sorted
    chosen = [_cut(rows[i]) for i in range(0, step * count, step)]
    model = HFModel(net, chat, recipe.evaluation.batch)
    said = model.generate_ids([prompt for prompt, _ in chosen], recipe.evaluation.max_new_tokens)
    answers = [
        {"reference": _text(chat, reference), "prediction": _text(chat, answer)}
        for (_, reference), answer in zip(chosen, said, strict=True)
    ]
    kind, bad = broken(answers)
    return 1 - len(bad) / len(answers) if kind else None


def _cut(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """(tokens before the first trained one, the trained ones from there on)."""
    ids, labels = list(row["input_ids"]), list(row["labels"])
    first = next((k for k, label in enumerate(labels) if label != IGNORED), len(labels) - 1)
    end = next((k for k in range(first, len(labels)) if labels[k] == IGNORED), len(labels))
    return ids[:first], ids[first:end]


def _text(chat: Chat, ids: list[int]) -> str:
    return str(chat.tokenizer.decode(ids, skip_special_tokens=True))
