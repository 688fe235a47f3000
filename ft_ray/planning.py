"""`plan` for a recipe: finds the model's config.json, and the token counts when the data was read before.

Neither weights nor torch nor ray are needed; of a hub model only config.json is fetched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ft_ray import gpu_table, hub
from ft_ray.errors import FtRayError, InputError, ModelError
from ft_ray.estimate import Plan, TokenStats
from ft_ray.estimate import plan as estimate
from ft_ray.model_shape import read
from ft_ray.recipe import Model, Recipe
from ft_ray.step_memory import Setting, memory
from ft_ray.storage import Store

__all__ = ["actual_cost", "config_of", "guessed_tokens", "memory_plan", "plan", "tokens_of"]


def plan(recipe: Recipe, *, gpu: str | None = None, count: int | None = None, price: float | None = None) -> Plan:
    """Memory, time and cost of `recipe`. Time and cost need token counts: from the run's data check, else guessed.

    Raises ModelError when there is no config.json, InputError for an unknown GPU.
    """
    tokens = tokens_of(recipe) or guessed_tokens(recipe)
    found = estimate(recipe, config_of(recipe.model), gpu=gpu, count=count, price=price, tokens=tokens)
    if gpu is not None or _gpu_here():
        return found
    note = "This machine has no GPU: a run here computes on the CPU, and how long that takes is not estimated."
    return found.model_copy(update={"notes": (*found.notes, note)})


def _gpu_here() -> bool:
    """Whether a driver (NVIDIA, WSL, ROCm) shows a device: torch, which would know for sure, takes seconds to load."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


def memory_plan(recipe: Recipe, config: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any] | None:
    """What the plan says of the run that `facts` (of training) describe: {memory: {part: bytes}, total}.

    On a GPU `total` is what torch allocates, on a CPU the resident set of a rank. No row is longer than the data check
    found the longest to be. None for an unknown model.
    """
    on_gpu = str(facts.get("device", "")).startswith("cuda")
    setting, tokens = Setting.of(recipe, rows=facts.get("per_device")), tokens_of(recipe)
    fused = {"fused_kernels": bool(facts.get("fused_modules")), "fused_adapters": bool(facts.get("fused_adapters"))}
    setting = setting.but(on_gpu=on_gpu, **fused)
    if tokens is not None and not recipe.sequence.packing:
        setting = setting.but(length=min(setting.length, tokens.longest))
    try:
        peak = memory(read(config), setting)
    except FtRayError:
        return None
    parts = {k: v for k, v in peak.model_dump().items() if k not in ("moment", "fragmentation", "context", "host")}
    if not on_gpu:
        parts |= {"fragmentation": peak.fragmentation, "process": peak.context}
    return {"memory": parts, "total": sum(parts.values())}


def actual_cost(recipe: Recipe, facts: dict[str, Any], accelerators: list[str]) -> dict[str, Any]:
    """{hours, usd, usd_per_hour, price_source} of a training; usd is None where no price is known.

    Hours are of the training loop, all its runs together; loading, and steps lost with a worker, are not in them.
    """
    hours = float(facts.get("seconds") or 0.0) / 3600
    price, source = recipe.budget.usd_per_hour, "budget.usd_per_hour"
    if price is None:
        source = "no price for this machine: set budget.usd_per_hour"
        if str(facts.get("device", "")).startswith("cuda") and len(accelerators) == 1:
            try:
                card = gpu_table.find(accelerators[0])
                price = card.usd_per_hour * int(facts.get("workers") or 1)
                source = f"{card.name}: {card.price_source}, {card.price_date}"
            except InputError:
                pass
    usd = None if price is None else hours * price
    return {"hours": hours, "usd": usd, "usd_per_hour": price, "price_source": source}


def config_of(model: Model) -> dict[str, Any]:
    """The model's config.json. Raises ModelError."""
    if model.id.startswith("package:"):
        from ft_ray.base_model import resolve  # unpacks the demo model; the one case that loads torch

        return dict(resolve(model).config)
    folder = Path(model.id).expanduser()
    if "://" in model.id:
        return dict(Store(model.id).read_json("config.json"))
    if not folder.is_dir():
        folder = hub.fetch_config(model.id, model.revision)
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model.id}: config.json cannot be read ({error}): give a folder saved by transformers."
        ) from error


def tokens_of(recipe: Recipe) -> TokenStats | None:
    """Token counts from the run folder's data check, None before there is one."""
    store = Store(recipe.run_path)
    if not store.exists("data_check.json"):
        return None
    stats = store.read_json("data_check.json").get("stats", {})
    known = stats.get("train_tokens")
    return TokenStats.model_validate(known) if known else None


_BYTES = 4  # of text a token, roughly, as in English with a vocabulary of 32,000 or more
_HEAD = 32 << 20  # bytes of a file that are looked at; the rest is taken to be like them
_BY_LINE = (".jsonl", ".csv")


def guessed_tokens(recipe: Recipe) -> TokenStats | None:
    """Token counts from the sizes of the data files, before anything was read; None where they are not local lines.

    A row is a line, and its punctuation stands for the template's tokens. Rows over sequence.max_length are dropped.
    """
    rows = tokens = longest = 0
    for source in recipe.data.train:
        path = Path(source.path).expanduser()
        if path.suffix not in _BY_LINE or not path.is_file():
            return None
        with path.open("rb") as file:
            lines = [len(line) // _BYTES + 1 for line in file.readlines(_HEAD) if line.strip()]
            more = path.stat().st_size / max(1, file.tell())
        lines = [line for line in lines[path.suffix == ".csv" :] if line <= recipe.sequence.max_length]
        rows += round(len(lines) * more * source.weight)
        tokens += round(sum(lines) * more * source.weight)
        longest = max([longest, *lines])
    split = recipe.data.split
    share = recipe.data.fraction * (1 - (0 if recipe.data.validation else split.validation)
                                    - (0 if recipe.data.test else split.test))  # fmt: skip
    rows, tokens = int(rows * share), int(tokens * share)
    return TokenStats(rows=rows, tokens=tokens, longest=longest, guessed=True) if rows else None
