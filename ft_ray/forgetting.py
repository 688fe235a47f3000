"""Forgetting, measured: the loss on general data before and after training, and how far the answers drifted.

The general data are `evaluation.forgetting`, else the fifth of `data.general` that training never sees. Where both
name one file, that fifth alone is measured on, so that mixing it in cannot flatter the figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from ft_ray.base_model import ModelFiles
from ft_ray.chat import Chat
from ft_ray.dataset import prepare
from ft_ray.errors import DataError
from ft_ray.evaluation import split_answer
from ft_ray.recipe import Data, Recipe, Source, Split
from ft_ray.rows import kept_aside

__all__ = ["General", "drift", "general_data"]

_ANSWERED = 32  # prompts that are answered to see the drift
_MOST_TOKENS = 96


@dataclass(frozen=True)
class General:
    """`tokens`: rows for the loss; `prompts`: messages to answer before and after; `max_new_tokens` for them."""

    tokens: Any
    prompts: list[list[dict[str, str]]]
    max_new_tokens: int


def general_data(recipe: Recipe, files: ModelFiles, chat: Chat) -> General | None:
    """The recipe's general data, tokenised; None where it names none. Raises DataError when all rows are mixed in."""
    mixed, path = recipe.data.general, recipe.evaluation.forgetting
    if path is None and mixed is None:
        return None
    columns = mixed.columns if mixed is not None and (path is None or path == mixed.path) else None
    source = Source.model_validate({"path": path or (mixed and mixed.path), "columns": columns})
    data = Data(train=(source,), split=Split(validation=0, test=0))
    prepared = prepare(recipe.model_copy(update={"data": data}), chat, model_hash=files.hash)
    tokens, rows = prepared.tokens("train", distinct=True), prepared.rows("train")
    if mixed is not None and source.path == mixed.path:
        aside = [i for i, group in enumerate(rows["group"]) if kept_aside(group)]
        if not aside:
            raise DataError(f"data.general {mixed.path} has no row to keep aside for measuring: give more rows.")
        tokens, rows = tokens.select(aside), rows.select(aside)
    chosen = rows.shuffle(seed=0).select(range(min(_ANSWERED, len(rows))))
    prompts = [split_answer(row)[0] for row in chosen]
    return General(tokens, prompts, min(_MOST_TOKENS, recipe.evaluation.max_new_tokens))


def drift(before: Sequence[str], after: Sequence[str]) -> dict[str, Any]:
    """How two models' answers to the same prompts differ.

    {rows, changed: answers that are not the same, similarity: mean share of common words in order (0..1, Ratcliff and
    Obershelp as in difflib), length: mean words after / before}.
    """
    pairs = [(a.split(), b.split()) for a, b in zip(before, after, strict=True)]
    same = [SequenceMatcher(None, a, b, autojunk=False).ratio() for a, b in pairs]
    words = [sum(map(len, side)) for side in zip(*pairs, strict=True)] if pairs else [0, 0]
    return {
        "rows": len(pairs),
        "changed": sum(a != b for a, b in pairs),
        "similarity": sum(same) / len(same) if same else 1.0,
        "length": words[1] / words[0] if words[0] else None,
    }
