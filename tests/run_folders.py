"""A finished run's folder written by hand, from the records a run leaves: what reports and exports are tested on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from ft_ray.manifest import Manifest, StageRecord
from ft_ray.recipe import Recipe, from_dict
from ft_ray.storage import Store


def history(steps: int = 60) -> list[dict[str, Any]]:
    """A sound training: the loss falls, the validation loss with it."""
    out: list[dict[str, Any]] = []
    for i in range(1, steps + 1):
        loss = 2.2 * math.exp(-i / 15) + 0.1 + 0.05 * math.sin(i * 1.7)
        out.append({
            "kind": "step", "step": i, "total": steps, "epoch": i / 20, "loss": loss, "accuracy": 1 - loss / 4,
            "lr": 2e-4 * (1 - i / steps), "grad_norm": 0.5 + loss / 3, "tokens": 512, "tokens_per_second": 900.0,
            "seconds": i * 0.6,
        })  # fmt: skip
        if i % 20 == 0:
            out.append({"kind": "eval", "step": i, "loss": loss + 0.08, "tokens": 900, "best": True})
    return out


def figure(value: float, n: int = 40) -> dict[str, Any]:
    return {"value": value, "low": max(0.0, value - 0.12), "high": min(1.0, value + 0.12), "n": n}


def predictions(answer: str, right: int, n: int = 40) -> list[dict[str, Any]]:
    return [
        {
            "id": f"r{i}", "file": "rows.jsonl", "line": i + 1,
            "prompt": [{"role": "user", "content": f"<b>Where</b> is order {i}? {'long ' * (i % 7)}"}],
            "reference": f'{{"order":"{i}"}}', "prediction": f'{{"order":"{i}"}}' if i < right else answer,
            "scores": {"json_match": float(i < right), "json_valid": float(i < right)},
        }
        for i in range(n)
    ]  # fmt: skip


def run_folder(root: Path, model: Path, *, merged: bool = True, **changes: Any) -> tuple[Recipe, Store]:
    """Writes the folder; returns its recipe and store."""
    recipe = from_dict({
        "name": "support", "model": {"id": str(model)}, "data": {"train": [{"path": "rows.jsonl"}]},
        "evaluation": {"metric": "json_match"}, "storage": str(root), **changes,
    })  # fmt: skip
    store = Store(recipe.run_path)
    manifest = Manifest.start(recipe)
    manifest.lineage.data_hash = {"train": "ab" * 32, "validation": "cd" * 32, "test": "ef" * 32}
    manifest.lineage.substitutions = ["out of memory: batch.per_device 8 -> 4, batch.global 16 kept"]
    manifest.lineage.hardware |= {"device": "cpu", "workers": 1}
    gib = 2**30
    cost = {"hours": 0.01, "usd": 0.018, "usd_per_hour": 1.8, "price_source": "budget.usd_per_hour"}
    plan = {"memory": {"weights": gib, "activations": gib // 2, "process": 2 * gib}, "total": int(3.5 * gib)}
    train = {
        "history": history(), "steps": 60, "trained_tokens": 30720, "tokens_per_second": 900.0, "seconds": 36.0,
        "trainable_parameters": 123456, "peak_memory_bytes": int(3.3 * gib), "device": "cpu", "cost": cost,
        "plan": plan,
    }  # fmt: skip
    scores = {
        "split": "test", "rows": 40, "primary": "json_match",
        "seconds": {"base": 30.0, "few_shot": 50.0, "tuned": 20.0},
        "base": {"json_match": figure(0.05), "json_valid": figure(0.3)},
        "few_shot": {"json_match": figure(0.4), "json_valid": figure(0.8)},
        "tuned": {"json_match": figure(0.95), "json_valid": figure(1.0)},
        "heldout_loss": {"base": 2.1, "tuned": 0.11}, "general_loss": {"base": 2.0, "tuned": 2.4},
        "general_drift": {"rows": 32, "changed": 20, "similarity": 0.61, "length": 0.4},
        "lm_eval": {"base": {"arc_easy": {"acc": 0.41}}, "tuned": {"arc_easy": {"acc": 0.39}}},
    }  # fmt: skip
    stages = {
        "data_check": {"errors": 0, "warnings": 1},
        "train": train,
        "merge": {"kl": 3e-5, "top1": 0.999},
        "evaluate": scores,
    }
    for name, metrics in stages.items():
        manifest.stages[name] = StageRecord(status="done", key="k", started=0.0, seconds=5.0, metrics=metrics)
    manifest.save(store)
    store.write("recipe.yaml", json.dumps(recipe.to_dict()).encode())
    finding = {
        "severity": "warning", "code": "few_rows", "message": "160 training rows, under the floor of 1,000.",
        "fix": "Add examples.", "examples": ["rows.jsonl:3 <i>x</i>"], "count": 160,
    }  # fmt: skip
    tokens = {"min": 20.0, "p50": 40.0, "p95": 61.0, "max": 70.0}
    stats = {"counts": {"train": 160, "validation": 20, "test": 40}, "tokens": tokens}
    store.write_json("data_check.json", {"findings": [finding], "stats": stats})
    evil = "<script>document.title='broken'</script><img src=x onerror=alert(1)>"
    for name, answer, right in (
        ("base", "I do not know " * 30, 2),
        ("few_shot", "{order: 1}", 16),
        ("tuned", evil, 38),
    ):
        file = "predictions.jsonl" if name == "tuned" else f"predictions_{name}.jsonl"
        rows = predictions(answer, right)
        store.write(file, "".join(json.dumps(p) + "\n" for p in rows).encode())
    if merged:
        from ft_ray.chat import Chat, load_tokenizer  # slow to import, and reports need none

        with store.stage("merged") as out:
            shutil.copytree(model, out, dirs_exist_ok=True)
            chat = Chat(load_tokenizer(model))
            record = {"template_hash": chat.template_hash, "eos_ids": sorted(chat.eos_ids)}
            (out / "ft_ray.json").write_text(json.dumps(record))
    return recipe, store
