"""Base, base with few-shot examples, and tuned, measured on one split; written as figures and predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ft_ray.base_model import ModelFiles, resolve
from ft_ray.chat import Chat, load_tokenizer
from ft_ray.dataset import Prepared, prepare
from ft_ray.evaluation import HFModel, Model, evaluate, few_shot, heldout_loss, load_metric
from ft_ray.recipe import Data, Recipe, Source, Split
from ft_ray.remote_model import OpenAIModel
from ft_ray.run_folder import Listener
from ft_ray.storage import Store

__all__ = ["score_folder", "score_run"]


def score_run(
    recipe: Recipe,
    files: ModelFiles,
    chat: Chat,
    prepared: Prepared,
    store: Store,
    *,
    split: str,
    on_event: Listener,
    endpoint: OpenAIModel | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Measures the merged model and the recipe's baselines on `split` ('validation' or 'test').

    `endpoint` is one more baseline, recorded as 'remote'.

    Returns (metrics, artifacts): metrics hold `primary` (name of the recipe's figure), `rows`, `settings`, and
    for each of base, few_shot, remote and tuned {metric: {value, low, high, n}}, plus `heldout_loss` (nats a token)
    and, with evaluation.forgetting, `general_loss`: the same on general data, before and after training.
    """
    rows = _rows(recipe, prepared, split)
    tokens = prepared.tokens(split)
    general = _general(recipe, files, chat)
    metrics: dict[str, Any] = {"split": split, "rows": len(rows), "settings": recipe.to_dict()["evaluation"]}
    suffix = "" if split == "test" else f"_{split}"
    artifacts: dict[str, str] = {}
    losses: dict[str, float] = {}
    general_losses: dict[str, float] = {}

    def measure(model: Model, name: str, messages: list[dict[str, Any]]) -> None:
        on_event({"kind": "status", "message": f"{name.replace('_', '-')} answers {len(messages)} {split} prompts"})
        result = evaluate(model, messages, load_metric(recipe), max_new_tokens=recipe.evaluation.max_new_tokens)
        metrics[name] = result.metrics
        metrics["primary"] = result.primary
        file = f"predictions{suffix}.jsonl" if name == "tuned" else f"predictions{suffix}_{name}.jsonl"
        lines = "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in result.predictions)
        store.write(file, lines.encode())
        artifacts[file] = ""

    if recipe.evaluation.baselines:
        base = HFModel.load(files.folder, chat, recipe)
        measure(base, "base", rows)
        if recipe.evaluation.few_shot:
            shots = list(prepared.rows("train"))
            examples = few_shot(shots, recipe.evaluation.few_shot, seed=recipe.seed)
            measure(base, "few_shot", [examples.prepend(row) for row in rows])
        losses["base"] = heldout_loss(base, tokens, batch=recipe.evaluation.batch)
        if general is not None:
            general_losses["base"] = heldout_loss(base, general, batch=recipe.evaluation.batch)
        del base
    if endpoint is not None:
        measure(endpoint, "remote", rows)
    tuned = HFModel.load(store.local("merged"), chat, recipe)
    measure(tuned, "tuned", rows)
    losses["tuned"] = heldout_loss(tuned, tokens, batch=recipe.evaluation.batch)
    metrics["heldout_loss"] = losses
    if general is not None:
        general_losses["tuned"] = heldout_loss(tuned, general, batch=recipe.evaluation.batch)
        metrics["general_loss"] = general_losses
    return metrics, artifacts


def _general(recipe: Recipe, files: ModelFiles, chat: Chat) -> Any:
    """Token rows of evaluation.forgetting, or None: general data, on which a loss that grows shows forgetting."""
    path = recipe.evaluation.forgetting
    if path is None:
        return None
    data = Data(train=(Source.model_validate({"path": path}),), split=Split(validation=0, test=0))
    return prepare(recipe.model_copy(update={"data": data}), chat, model_hash=files.hash).tokens("train")


def score_folder(
    recipe: Recipe, folder: Path, split: str, *, on_event: Listener | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and predictions of the model in `folder` on a split of the recipe's data."""
    files = resolve(recipe.model)
    base_chat = Chat(load_tokenizer(files.folder, trust_remote_code=recipe.model.trust_remote_code))
    rows = _rows(recipe, prepare(recipe, base_chat, model_hash=files.hash), split)
    if on_event:
        on_event({"kind": "status", "message": f"the champion answers {len(rows)} {split} prompts"})
    model = HFModel.load(folder, Chat(load_tokenizer(folder)), recipe)
    result = evaluate(model, rows, load_metric(recipe), max_new_tokens=recipe.evaluation.max_new_tokens)
    return result.metrics, result.predictions


def _rows(recipe: Recipe, prepared: Prepared, split: str) -> list[dict[str, Any]]:
    """The rows to generate for: all, or `evaluation.max_rows` of them drawn with the seed."""
    rows = prepared.rows(split)
    bound = recipe.evaluation.max_rows
    if bound is not None and bound < len(rows):
        rows = rows.shuffle(seed=recipe.seed).select(range(bound))
    return list(rows)
