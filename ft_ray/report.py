"""What a run's report says, gathered from its folder: plain values, shown by `report_page` and `report_markdown`.

Nothing is measured again: every figure comes from the manifest, the data check, the predictions and the recipe.
Where a run has not come so far, a part is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ft_ray import gpu_table
from ft_ray.console import counted, percent
from ft_ray.diagnosis import Diagnosis, after, worst_first
from ft_ray.errors import FtRayError, InputError
from ft_ray.manifest import Manifest
from ft_ray.recipe import Recipe, from_dict
from ft_ray.run_folder import read_recipe
from ft_ray.storage import Store
from ft_ray.sweep_diagnosis import after_sweep

__all__ = [
    "Run", "adapter_norms", "benchmarks", "costs", "diagnoses", "gather", "smoothed", "sound", "space_of", "verdict",
]  # fmt: skip

Record = dict[str, Any]
MODELS = ("base", "few_shot", "remote", "tuned")


@dataclass(frozen=True)
class Run:
    """A run folder as read: its recipe and manifest, and what else there is."""

    recipe: Recipe
    manifest: Manifest
    data: Record | None
    history: list[Record]
    predictions: dict[str, list[Record]] = field(default_factory=dict)
    adapter: dict[str, float] = field(default_factory=dict)
    sweep: Record | None = None
    analysis: Record | None = None
    found: list[Diagnosis] = field(default_factory=list)

    def stage(self, name: str) -> Record:
        record = self.manifest.stages.get(name)
        return dict(record.metrics) if record is not None else {}

    @property
    def scores(self) -> Record:
        """Metrics of the test measurement, else of validation's; {} before any."""
        return self.stage("evaluate") or self.stage("evaluate_validation")


def gather(store: Store) -> Run:
    """Reads a run folder. Raises InputError where there is no run."""
    manifest = Manifest.load(store)
    sweep = store.read_json("sweep/sweep.json") if store.exists("sweep/sweep.json") else None
    if manifest is None and sweep is None:
        raise InputError(f"{store.url} has neither manifest.json nor a sweep: it is not a run folder.")
    recipe = read_recipe(store) if store.exists("recipe.yaml") else from_dict((sweep or {}).get("recipe", {}))
    manifest = manifest or Manifest.start(recipe)
    train = manifest.stages.get("train")
    run = Run(
        recipe=recipe,
        manifest=manifest,
        data=store.read_json("data_check.json") if store.exists("data_check.json") else None,
        history=list(train.metrics.get("history", [])) if train is not None else [],
        predictions=_predictions(store, "evaluate" in manifest.stages),
        adapter=adapter_norms(store),
        sweep=sweep,
        analysis=store.read_json("sweep/analysis.json") if sweep and store.exists("sweep/analysis.json") else None,
    )
    run.found.extend(diagnoses(run))
    return run


def diagnoses(run: Run) -> list[Diagnosis]:
    """`diagnose.after` on what the run left, and what its sweep says of its space."""
    train = run.manifest.stages.get("train")
    codes = [f["code"] for f in (run.data or {}).get("findings", [])]
    found = after(
        run.history,
        run.recipe,
        scores=run.scores,
        predictions=run.predictions.get("tuned", []),
        adapter=run.adapter,
        data_codes=codes,
        error=train.error if train is not None and train.status == "failed" else None,
        stopped=train is not None and train.status == "stopped",
    )
    return worst_first([*found, *after_sweep(run.sweep, run.recipe)]) if run.sweep else found


def sound(run: Run) -> str:
    """What may be said of a run without a finding: only what was there to be judged."""
    parts = ["losses"] * bool(run.history) + ["adapter"] * bool(run.adapter)
    scores, primary = run.scores, run.scores.get("primary")
    figure = (scores.get("tuned") or {}).get(primary)
    parts += ["answers"] * bool(run.predictions.get("tuned"))
    if not parts:
        return "Nothing was there to judge yet: no step, no adapter, no answer."
    seen = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
    score = f" {primary} is {percent(figure)}." if figure else " No score was measured."
    return f"No known fault in {seen}.{score}"


def _predictions(store: Store, tested: bool) -> dict[str, list[Record]]:
    suffix = "" if tested else "_validation"
    found = {}
    for name in MODELS:
        file = f"predictions{suffix}.jsonl" if name == "tuned" else f"predictions{suffix}_{name}.jsonl"
        if store.exists(file):
            found[name] = [json.loads(line) for line in store.read(file).splitlines() if line.strip()]
    return found


def adapter_norms(store: Store) -> dict[str, float]:
    """Norm of each B matrix of the committed adapter, by module; {} where there is none."""
    if store.tree("adapter") is None:
        return {}
    from safetensors.numpy import load_file

    try:
        tensors = load_file(store.local("adapter") / "adapter_model.safetensors")
    except (OSError, FtRayError, TypeError):  # numpy has no bf16: an imported adapter may be in it
        return {}
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_B.weight"): float(
            math.sqrt(float((tensor.astype("float64") ** 2).sum()))
        )
        for name, tensor in tensors.items()
        if name.endswith(".lora_B.weight")
    }


def smoothed(values: Sequence[float], width: int) -> list[tuple[float, float, float]]:
    """(mean, low, high) around each value over `width` neighbours; low and high are one standard deviation away."""
    out = []
    for i in range(len(values)):
        near = values[max(0, i - width // 2) : i + width // 2 + 1]
        mean = math.fsum(near) / len(near)
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in near) / len(near))
        out.append((mean, mean - spread, mean + spread))
    return out


def verdict(run: Run) -> str:
    """The run in one sentence: what it is, and how good where that was measured."""
    scores, primary = run.scores, run.scores.get("primary")
    recipe = run.recipe
    what = f"{recipe.method} on {recipe.model.id}"
    if primary and primary in (scores.get("tuned") or {}):
        others = [
            f"{name.replace('_', '-')} {percent(scores[name][primary])}"
            for name in ("base", "few_shot", "remote") if primary in (scores.get(name) or {})
        ]  # fmt: skip
        beside = f" ({', '.join(others)})" if others else ""
        return f"{what}: {primary} {percent(scores['tuned'][primary])} on {scores['rows']} rows{beside}."
    last = list(run.manifest.stages.items())[-1:]
    known = [t for t in (run.sweep or {}).get("trials", []) if t.get("best_loss") is not None]
    if not last and known:
        best = min(known, key=lambda t: t["best_loss"])
        count = len((run.sweep or {})["trials"])
        return f"Sweep of {what}: {count} trials, the best {best['id']} with validation loss {best['best_loss']:.4f}."
    return f"{what}: {last[0][0].replace('_', ' ')} {last[0][1].status}." if last else f"{what}: not started."


def space_of(sweep: Mapping[str, Any]) -> Record:
    """The sweep's search space as it is written in a file: what is not set is left out."""
    known = {k: v for k, v in sweep.get("space", {}).items() if v not in (None, [], {})}
    search = known.get("search", {}).items()
    return known | {"search": {path: {k: v for k, v in one.items() if v is not None} for path, one in search}}


def benchmarks(scores: Mapping[str, Any]) -> list[list[str]]:
    """lm-eval's figures: task, metric, base, tuned."""
    base, tuned = ((scores.get("lm_eval") or {}).get(name) or {} for name in ("base", "tuned"))
    return [
        [task, metric, f"{base.get(task, {}).get(metric, float('nan')):.4f}", f"{value:.4f}"]
        for task, values in tuned.items() for metric, value in values.items()
    ]  # fmt: skip


# Cost

_CHARACTERS = 4  # a token, roughly, of English text: no tokenizer is loaded for a report


def costs(run: Run, api: tuple[float, float] | None = None) -> list[Record]:
    """US dollars for 1,000 correct answers: [{model, share, dollars, basis}], of the models that were measured.

    `api`: US dollars a million input and output tokens, of an endpoint that was measured as 'remote' (or, where
    none was, assumed to answer as the few-shot base does). Our own answers cost time of the card: the seconds of the
    evaluation at the price of training. Tuned adds nothing for training: that is paid once, and said apart.
    """
    scores, out = run.scores, []
    primary = scores.get("primary")
    if not primary:
        return []
    price = (run.stage("train").get("cost") or {}).get("usd_per_hour")
    if price is None:
        return []
    seconds = scores.get("seconds") or {}
    for name in MODELS:
        figure = (scores.get(name) or {}).get(primary)
        if not figure or not seconds.get(name) or name == "remote":
            continue
        each = seconds[name] / max(1, figure["n"]) / 3600 * price
        out.append(_cost(name, figure["value"], each, f"{seconds[name]:.0f} s of this machine at ${price:.2f} an hour"))
    reference = "remote" if "remote" in scores else "few_shot"
    figure, rows = (scores.get(reference) or {}).get(primary), run.predictions.get(reference) or []
    if api is not None and figure and rows:
        asked = sum(len(m["content"]) for p in rows for m in p["prompt"]) / _CHARACTERS / len(rows)
        said = sum(len(p["prediction"]) for p in rows) / _CHARACTERS / len(rows)
        each = (asked * api[0] + said * api[1]) / 1e6
        basis = f"about {asked:.0f} + {said:.0f} tokens at ${api[0]:g} and ${api[1]:g} a million"
        if reference == "few_shot":
            basis += ", if it is right as often as the few-shot base"
        out.append(_cost("API", figure["value"], each, basis))
    return out


def _cost(model: str, share: float, each: float, basis: str) -> Record:
    return {"model": model, "share": share, "dollars": 1000 * each / share if share > 0 else None, "basis": basis}


def price_basis() -> str:
    """When the prices of cards were read, for a footnote."""
    dates = sorted({gpu.price_date for gpu in gpu_table.table().values()})
    return f"card prices were read between {dates[0]} and {dates[-1]}"


def samples(run: Run, most: int = 8) -> list[Record]:
    """Rows side by side: {prompt, reference, answers: {model: (text, score)}}; wrong tuned answers first."""
    tuned = run.predictions.get("tuned", [])
    primary = run.scores.get("primary")
    others = {name: {p["id"]: p for p in rows} for name, rows in run.predictions.items()}

    def score(prediction: Mapping[str, Any]) -> float:
        return float(prediction["scores"].get(primary, 0.0))

    ranked = sorted(tuned, key=score)
    chosen = ranked[: most // 2] + ranked[len(ranked) - (most - most // 2) :] if len(ranked) > most else ranked
    out = []
    for p in chosen:
        answers = {name: others[name][p["id"]] for name in MODELS if p["id"] in others.get(name, {})}
        out.append({
            "prompt": p["prompt"][-1]["content"],
            "reference": p["reference"],
            "answers": {name: (a["prediction"], score(a)) for name, a in answers.items()},
        })  # fmt: skip
    return out


def gates(run: Run) -> list[tuple[str, bool | None, str]]:
    """(gate, passed or None when not reached, what it measured)."""
    stages = run.manifest.stages
    out: list[tuple[str, bool | None, str]] = []
    check = stages.get("data_check")
    if check is not None:
        said = ", ".join(counted(check.metrics.get(f"{what}s", 0), what) for what in ("error", "warning"))
        out.append(("data check", check.status == "done", said))
    merge = stages.get("merge")
    if merge is not None and "kl" in merge.metrics:
        limit = run.recipe.evaluation.parity_kl
        said = f"mean KL {merge.metrics['kl']:.2e} nats (limit {limit:g}), top-1 {merge.metrics.get('top1', 0):.4f}"
        out.append(("merged = trained", merge.status == "done", said))
    scores, primary = run.scores, run.scores.get("primary")
    if primary and primary in (scores.get("tuned") or {}) and primary in (scores.get("base") or {}):
        tuned, base = scores["tuned"][primary], scores["base"][primary]
        better = (
            tuned["value"] > base["value"] if run.recipe.evaluation.mode == "max" else tuned["value"] < base["value"]
        )
        out.append(("better than the base", better, f"{primary} {tuned['value']:.3f} against {base['value']:.3f}"))
        shot = (scores.get("few_shot") or {}).get(primary)
        if shot:
            better = (
                tuned["value"] > shot["value"]
                if run.recipe.evaluation.mode == "max"
                else tuned["value"] < shot["value"]
            )
            out.append(("better than few-shot", better, f"{primary} {tuned['value']:.3f} against {shot['value']:.3f}"))
    return out


def lineage(run: Run) -> Mapping[str, Any]:
    """Flat figures of where the run comes from."""
    known = run.manifest.lineage
    flat: Record = {
        "recipe": known.recipe_hash, "base": known.base, "base revision": known.base_revision,
        "base weights": known.base_hash, "chat template": known.template_hash, "git commit": known.git_commit,
        **{f"data, {name}": value for name, value in known.data_hash.items()},
        **{k: v for k, v in known.hardware.items() if v is not None},
    }  # fmt: skip
    return {k: v for k, v in flat.items() if v is not None}
