"""Base, base with few-shot examples, and tuned, measured on one split; written as figures and predictions."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from ft_ray import lm_harness
from ft_ray.base_model import ModelFiles, resolve
from ft_ray.chat import Chat, chat_of, load_tokenizer
from ft_ray.dataset import prepare
from ft_ray.evaluation import HFModel, Model, evaluate, few_shot, heldout_loss, load_metric
from ft_ray.forgetting import drift, general_data
from ft_ray.local_files import hash_file
from ft_ray.prepared_data import Prepared
from ft_ray.recipe import Recipe
from ft_ray.remote_model import OpenAIModel
from ft_ray.run_folder import Listener
from ft_ray.storage import Store

__all__ = ["score_folder", "score_run", "settings"]

_TRAIN_ROWS = 500  # of training rows answered, where evaluation.max_rows says nothing
_DRAW = 0  # fixed, so that a candidate and a champion of another seed answer the same rows


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
    and, with general data (`forgetting`), `general_loss` before and after training, and `general_drift` of the answers.
    """
    rows = _rows(recipe, prepared, split)
    tokens = prepared.tokens(split)
    if split == "train":
        tokens = tokens.shuffle(seed=_DRAW).select(range(min(len(rows), len(tokens))))
    general = general_data(recipe, files, chat)
    metrics: dict[str, Any] = {"split": split, "rows": len(rows), "settings": settings(recipe)}
    suffix = ("" if split == "test" else f"_{split}") + ("_beside" if endpoint is not None else "")
    artifacts: dict[str, str] = {}
    losses: dict[str, float] = {}
    general_losses: dict[str, float] = {}
    general_answers: dict[str, list[str]] = {}

    def measure(model: Model, name: str, messages: list[dict[str, Any]]) -> None:
        on_event({"kind": "status", "message": f"{name.replace('_', '-')} answers {len(messages)} {split} prompts"})
        started = time.monotonic()
        result = evaluate(model, messages, load_metric(recipe), max_new_tokens=recipe.evaluation.max_new_tokens)
        metrics.setdefault("seconds", {})[name] = time.monotonic() - started
        metrics[name] = result.metrics
        metrics["primary"] = result.primary
        file = f"predictions{suffix}.jsonl" if name == "tuned" else f"predictions{suffix}_{name}.jsonl"
        lines = "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in result.predictions)
        store.write(file, lines.encode())
        artifacts[file] = hashlib.sha256(lines.encode()).hexdigest()

    def measure_general(model: HFModel, name: str) -> None:
        if general is not None:
            on_event({"kind": "status", "message": f"{name} answers {len(general.prompts)} general prompts"})
            general_losses[name] = heldout_loss(model, general.tokens, batch=recipe.evaluation.batch)
            general_answers[name] = model.generate(general.prompts, general.max_new_tokens)

    if recipe.evaluation.baselines or general is not None:
        base = HFModel.load(files.folder, chat, recipe)
        if recipe.evaluation.baselines:
            measure(base, "base", rows)
        if recipe.evaluation.baselines and recipe.evaluation.few_shot:
            examples = few_shot(prepared.rows("train"), recipe.evaluation.few_shot, seed=recipe.seed)
            measure(base, "few_shot", [examples.prepend(row) for row in rows])
        losses["base"] = heldout_loss(base, tokens, batch=recipe.evaluation.batch)
        measure_general(base, "base")
        del base
    if endpoint is not None:
        measure(endpoint, "remote", rows)
    tuned = HFModel.load(store.local("merged"), chat, recipe)
    measure(tuned, "tuned", rows)
    losses["tuned"] = heldout_loss(tuned, tokens, batch=recipe.evaluation.batch)
    metrics["heldout_loss"] = losses
    if recipe.evaluation.lm_eval is not None and split == "test":
        on_event({"kind": "status", "message": "lm-eval measures the base and the tuned model"})
        settings_of = recipe.evaluation.lm_eval
        places = {"base": files.folder, "tuned": store.local("merged")}
        metrics["lm_eval"] = {name: lm_harness.run(settings_of, place) for name, place in places.items()}
    measure_general(tuned, "tuned")
    if general is not None:
        metrics["general_loss"] = general_losses
        metrics["general_drift"] = drift(general_answers["base"], general_answers["tuned"])
    return metrics, artifacts


def settings(recipe: Recipe) -> dict[str, Any]:
    """What an evaluation depends on besides model and rows, the contents of the user's own files included."""
    section: dict[str, Any] = recipe.to_dict()["evaluation"]
    general = recipe.data.general.path if recipe.data.general is not None else None
    named = (section["metric"].rpartition(":")[0], section["schema"], section["forgetting"], general)
    files = {name: hash_file(name) for name in named if name and Path(name).is_file()}
    return section | {"files": files}


def score_folder(
    recipe: Recipe, folder: Path, split: str, *, on_event: Listener | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and predictions of the model in `folder` on a split of the recipe's data."""
    files = resolve(recipe.model)
    rows = _rows(recipe, prepare(recipe, chat_of(recipe.model, files.folder), model_hash=files.hash), split)
    if on_event:
        on_event({"kind": "status", "message": f"the champion answers {len(rows)} {split} prompts"})
    tokenizer = load_tokenizer(folder, trust_remote_code=recipe.model.trust_remote_code)
    model = HFModel.load(folder, Chat(tokenizer), recipe)
    result = evaluate(model, rows, load_metric(recipe), max_new_tokens=recipe.evaluation.max_new_tokens)
    return result.metrics, result.predictions


def _rows(recipe: Recipe, prepared: Prepared, split: str) -> list[dict[str, Any]]:
    """The rows to generate for: all, or `evaluation.max_rows` of them, the same ones for every recipe and seed."""
    rows = prepared.rows(split)
    bound = recipe.evaluation.max_rows or (_TRAIN_ROWS if split == "train" else None)
    if bound is not None and bound < len(rows):
        rows = rows.shuffle(seed=_DRAW).select(range(bound))
    return list(rows)
