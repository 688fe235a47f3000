"""The demo: the ordinary verbs on ordinary files, on real parts, with nothing canned.

It writes a recipe and data that the user can open and copy, then calls the same functions as `ft-ray run`,
`promote` and `serve` do, and asks the endpoint over HTTP.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ft_ray import demo_sweep, ray_session
from ft_ray.console import table
from ft_ray.errors import InputError
from ft_ray.manifest import Manifest
from ft_ray.recipe import Recipe
from ft_ray.run_folder import Listener
from ft_ray.storage import Store
from ft_ray.views import score_table, summary

__all__ = ["demo", "prepare_folder"]

_MARK = ".ft-ray-demo"
_QUESTIONS = 3


def prepare_folder(folder: Path, seed: int) -> Path:
    """Writes the data and a copy of the shipped recipe to `folder`; returns the recipe's path.

    The folder is replaced when an earlier demo made it; a folder of the user's own is refused.
    """
    from ft_ray import demo_data

    if folder.exists():
        if any(folder.iterdir()) and not (folder / _MARK).exists():
            raise InputError(f"{folder} holds files that no demo wrote: choose another --folder.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / _MARK).write_text("Made by ft-ray demo; the next demo replaces this folder.\n", encoding="utf-8")
    demo_data.write(folder, seed=seed)
    shipped = (Path(__file__).parent / "recipes" / "qlora_demo.yaml").read_text(encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(shipped.replace("demo/", f"{folder.as_posix()}/"), encoding="utf-8")
    return recipe


def demo(
    recipe_file: Path,
    overrides: Iterable[str] = (),
    *,
    keep: bool,
    out: Callable[..., None],
    on_event: Listener,
    pause: Callable[[], None],
    space: Path | None = None,
) -> dict[str, Any]:
    """Runs the recipe, promotes, serves, asks three test questions; hands `out` the result and its tables.

    With `space`, a search space, settings are swept first, and the winner is what is served.
    """
    from ft_ray import pipeline, serving
    from ft_ray.promotion import promote

    started = time.monotonic()
    recipe = Recipe.load(recipe_file, overrides)
    with ray_session.session():
        swept: dict[str, Any] = {}
        if space is None:
            manifest = pipeline.run(recipe, on_event=on_event)
        else:
            recipe, manifest, found = demo_sweep.search(recipe, space, on_event)
            swept = {"sweep": found}
        promoted = promote(recipe.name, storage=recipe.storage, uri=recipe.tracking.uri, why="demo", on_event=on_event)
        asked = time.monotonic()
        with serving.serve(
            recipe.name, storage=recipe.storage, uri=recipe.tracking.uri, port=0, on_event=on_event
        ) as endpoint:
            up = time.monotonic()
            answers = _ask(Store(recipe.run_path), endpoint)
            seconds = {name: record.seconds for name, record in manifest.stages.items()}
            seconds |= {"serve": round(up - asked, 1), "ask": round(time.monotonic() - up, 1)}
            seconds["total"] = round(time.monotonic() - started, 1)
            value = _value(recipe, manifest, answers, seconds) | {"promoted": promoted} | swept
            shown = _tables(recipe, manifest, value)
            if keep:
                pause()
                value |= {"url": endpoint.url, "model": endpoint.model, "curl": endpoint.curl()}
                shown += ["The endpoint stays up until Ctrl-C. Ask it:", endpoint.curl()]
            out(value, *shown)
            if keep:
                endpoint.wait()
    return value


def _ask(store: Store, endpoint: Any) -> list[dict[str, str]]:
    """Three test questions through the endpoint, beside what the base answered during evaluation."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{endpoint.url}/v1", api_key=endpoint.api_key or "none", timeout=120)
    tuned = [json.loads(line) for line in store.read("predictions.jsonl").splitlines()]
    base = {row["id"]: row["prediction"] for row in map(json.loads, store.read("predictions_base.jsonl").splitlines())}
    answers = []
    for row in tuned[:: max(1, len(tuned) // _QUESTIONS)][:_QUESTIONS]:
        reply = client.chat.completions.create(
            model=endpoint.model, messages=row["prompt"], max_tokens=96, temperature=0
        )
        answers.append({
            "question": row["prompt"][-1]["content"],
            "expected": row["reference"],
            "base": base[row["id"]],
            "endpoint": reply.choices[0].message.content or "",
        })  # fmt: skip
    return answers


def _value(
    recipe: Recipe, manifest: Manifest, answers: list[dict[str, str]], seconds: dict[str, float]
) -> dict[str, Any]:
    scores = manifest.stages["evaluate"].metrics
    merge, train = manifest.stages["merge"].metrics, manifest.stages["train"].metrics

    def flat(name: str) -> dict[str, float]:
        return {metric: figure["value"] for metric, figure in scores[name].items()}

    return {
        "base": flat("base"),
        "few_shot": flat("few_shot"),
        "tuned": flat("tuned"),
        "merge": {"kl": merge["kl"], "top1": merge["top1"], "base_mode": merge["base_mode"]},
        "quantized_modules": train.get("quantized_modules"),
        "answers": answers,
        "manifest": f"{recipe.run_path}/manifest.json",
        "seconds": seconds,
    }


def _tables(recipe: Recipe, manifest: Manifest, value: dict[str, Any]) -> list[Any]:
    scores = manifest.stages["evaluate"].metrics
    rows = []
    for a in value["answers"]:
        verdict = "✓" if a["endpoint"] == a["expected"] else a["expected"]
        rows.append([a["question"], a["base"].strip()[:160], a["endpoint"], verdict])
    asked = table("Asked over HTTP", ["question", "base", "tuned, from the endpoint", "as expected"], rows)
    asked.show_lines = True
    for column in asked.columns:
        column.justify = "left"
        column.overflow = "fold"
    rest = [item for item in summary(recipe, manifest) if isinstance(item, str) and not item.startswith("seconds")]
    spent = ", ".join(f"{name.replace('_', ' ')} {s:.0f}" for name, s in value["seconds"].items())
    return [
        score_table(scores, f"Test set, {scores['rows']} rows of unseen phrasings, 95% intervals"),
        asked,
        f"{value['quantized_modules']} Linear4bit modules (NF4, double quantization) were trained through",
        *(demo_sweep.lines(value["sweep"]) if "sweep" in value else ()),
        *rest,
        f"seconds: {spent}",
    ]
