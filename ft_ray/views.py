"""Results as tables and text for a person; the same values go out as JSON elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from ft_ray.console import counted, duration, percent, table
from ft_ray.errors import StorageError
from ft_ray.manifest import Manifest
from ft_ray.recipe import LoadedRecipe, Recipe
from ft_ray.run_folder import earlier
from ft_ray.storage import Store

__all__ = [
    "comparison", "data_tables", "diagnosis_lines", "list_runs", "planned", "rendered", "runs_table",
    "score_table", "summary",
]  # fmt: skip


def rendered(loaded: LoadedRecipe) -> str:
    """The resolved recipe as YAML, every leaf followed by a comment with its origin."""
    lines = list(_render(loaded.recipe.to_dict(), "", 0, loaded.origins))
    width = min(60, max(len(line) for line, origin in lines if origin) + 2)
    return "\n".join(f"{line:<{width}}  # {origin}" if origin else line for line, origin in lines)


def _render(value: Any, path: str, depth: int, origins: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(line, origin) of a mapping's leaves. A list stands on one line where all of it comes from one place."""
    pad = "  " * depth
    for key, item in value.items():
        where = f"{path}.{key}" if path else key
        if isinstance(item, dict) and item:
            yield f"{pad}{key}:", ""
            yield from _render(item, where, depth + 1, origins)
        elif isinstance(item, list) and item and _inside(where, origins):
            yield f"{pad}{key}:", ""
            yield from _items(item, where, depth + 1, origins)
        else:
            yield f"{pad}{key}: {_plain(item)}", origins.get(where, "default")


def _items(items: list[Any], path: str, depth: int, origins: dict[str, str]) -> Iterator[tuple[str, str]]:
    pad = "  " * depth
    for index, item in enumerate(items):
        where = f"{path}[{index}]"
        if isinstance(item, dict):
            given = {k: v for k, v in item.items() if v is not None or _inside(f"{where}.{k}", origins)}
            for number, (line, origin) in enumerate(_render(given, where, depth + 1, origins)):
                yield (line if number else f"{pad}- {line.lstrip()}"), origin
        else:
            yield f"{pad}- {_plain(item)}", origins.get(where, origins.get(path, "default"))


def _inside(where: str, origins: dict[str, str]) -> bool:
    return any(known.startswith((f"{where}[", f"{where}.")) for known in origins)


def _plain(item: Any) -> str:
    return json.dumps(item, ensure_ascii=False)


def planned(recipe: Recipe, stages: list[str], *, fresh: bool = False) -> dict[str, Any]:
    """What a verb would do: each stage 'done' or 'would run'. Raises InputError for the folder of another recipe."""
    manifest = None if fresh else earlier(recipe, Store(recipe.run_path))
    states = {}
    for stage in stages:
        record = manifest.stages.get(stage) if manifest else None
        states[stage] = "done, unless its inputs changed" if record and record.status == "done" else "would run"
    return {"name": recipe.name, "folder": recipe.run_path, "stages": states}


def data_tables(report: dict[str, Any]) -> Iterator[Table | str]:
    stats = report["stats"]
    counts = stats.get("counts", {})
    yield table("Rows", list(counts), [[str(v) for v in counts.values()]])
    rows = [[k.replace("_", " "), *(f"{v[p]:.0f}" for p in ("p50", "p95", "max"))]
            for k, v in stats.items() if isinstance(v, dict) and {"p50", "p95", "max"} <= set(v)]  # fmt: skip
    if rows:
        yield table("Tokens", ["a row", "median", "95%", "most"], rows)
    worst = [f["severity"] for f in report["findings"]]
    names = {"error": "error", "warning": "warning", "info": "note"}
    yield ", ".join(counted(worst.count(severity), name) for severity, name in names.items())


def score_table(scores: dict[str, Any], title: str) -> Table:
    """scores: {'base' | 'few_shot' | 'tuned': {metric: {value, low, high, n}}}."""
    names = [n for n in ("base", "few_shot", "remote", "tuned") if n in scores]
    metrics = list(dict.fromkeys(m for n in names for m in scores[n]))
    rows = [[m, *(percent(scores[n].get(m)) for n in names)] for m in metrics]
    return table(title, ["metric", *(n.replace("_", "-") for n in names)], rows)


def summary(recipe: Recipe, manifest: Manifest) -> Iterator[Table | str]:
    stages = manifest.stages
    evaluated = [s for s in ("evaluate_validation", "evaluate") if s in stages and stages[s].status == "done"]
    for name in evaluated:
        metrics = stages[name].metrics
        n = metrics.get("rows")
        yield score_table(metrics, f"{recipe.name} on {n} {metrics.get('split', 'test')} rows, 95% intervals")
        for what in ("heldout_loss", "general_loss"):
            for key, loss in (metrics.get(what) or {}).items():
                yield f"{what.replace('heldout', 'held-out').replace('_', ' ')}, {key}: {loss:.4f}"
    if "merge" in stages and "kl" in stages["merge"].metrics:
        merge = stages["merge"].metrics
        yield f"merge: base {merge.get('base_mode')}, KL {merge['kl']:.2e} nats, top-1 {merge['top1']:.4f}"
    if "register" in stages and stages["register"].status == "done":
        yield f"registered as {recipe.name}@{stages['register'].metrics['version']}"
    yield "seconds: " + ", ".join(f"{name} {record.seconds:.0f}" for name, record in stages.items())
    yield f"manifest: {recipe.run_path}/manifest.json"


def next_step(recipe: Recipe, manifest: Manifest) -> list[str]:
    """What to do with a registered candidate that waits for a person."""
    register = manifest.stages.get("register")
    if register is None or register.status != "done" or recipe.promote == "auto":
        return []
    where = "" if recipe.storage == "runs" else f" --storage {recipe.storage}"
    return [f"next: ft-ray promote {recipe.name}{where}, then ft-ray serve {recipe.name}{where}"]


def list_runs(storage: str) -> list[dict[str, Any]]:
    root = Store(storage)
    found: list[dict[str, Any]] = []
    for name in root.list():
        try:
            manifest = Manifest.load(root.sub(name)) if root.exists(f"{name}/manifest.json") else None
        except StorageError:
            found.append({"name": name, "status": "unreadable manifest"})
            continue
        if manifest is None:
            continue
        last = list(manifest.stages.items())[-1:]
        evaluated = manifest.stages.get("evaluate")
        found.append({
            "name": name,
            "created": manifest.created,
            "base": manifest.lineage.base,
            "stage": last[0][0] if last else None,
            "status": last[0][1].status if last else "new",
            "seconds": round(sum(s.seconds for s in manifest.stages.values()), 1),
            "metrics": evaluated.metrics.get("tuned", {}) if evaluated else {},
        })  # fmt: skip
    return found


def runs_table(runs: list[dict[str, Any]]) -> Table | str:
    if not runs:
        return "No runs here."
    rows = []
    for run in runs:
        first = next(iter(run.get("metrics", {}).items()), None)
        score = f"{first[0]} {percent(first[1])}" if first else "-"
        rows.append([run["name"], str(run.get("base", "-")), f"{run.get('stage') or '-'} {run['status']}",
                     duration(run.get("seconds", 0)), score])  # fmt: skip
    return table("Runs", ["name", "base", "last stage", "time", "tuned, test"], rows)


def diagnosis_lines(found: list[dict[str, Any]]) -> Iterator[str]:
    """One paragraph a finding: what, why, and the change."""
    for d in found:
        change = ", ".join(f"{k}: {v}" for k, v in d["patch"].items())
        yield f"{d['severity']}: {d['code'].replace('_', ' ')}. {d['sentence']}"
        if change:
            yield f"  change {change}"


def comparison(value: dict[str, Any]) -> Iterator[Table | str]:
    a, b = value["a"], value["b"]
    rows = [
        [m, f"{c['a']:.3f}", f"{c['b']:.3f}", f"{c['difference']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]",
         f"{c['wins']}/{c['losses']}/{c['ties']}"]
        for m, c in value["metrics"].items()
    ]  # fmt: skip
    yield table(f"{b} against {a} on {value['rows']} rows", ["metric", a, b, "difference", "wins/losses/ties"], rows)
    if value["recipe"]:
        yield table("Recipe", ["key", a, b], [[k, str(x), str(y)] for k, x, y in value["recipe"]])
    yield "data: " + ("the same" if not value["data"] else "differs in " + ", ".join(value["data"]))
