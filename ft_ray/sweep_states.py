"""Trials in storage: adapter, optimizer and history of each at its marks, committed atomically, collected by us.

sweep/trials/ID/step-00000040/ is a PEFT adapter folder plus `state.safetensors` (AdamW's moments) and `state.json`
(position, settings, history). Tune holds pointers to these folders; what is true of a trial is here.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_ray.errors import StorageError
from ft_ray.manifest import key_of
from ft_ray.storage import COMMIT, Store

__all__ = ["OUTCOME", "SavedTrial", "best_of", "collect", "commit", "keep_only", "load_tensors", "newest", "point_of"]

logger = logging.getLogger("ft_ray")

TRIALS = "trials"
OUTCOME = "outcome.json"
"""What a trial that ran alone leaves in its folder."""
_STEP = re.compile(r"step-\d+")
_STATE, _MOMENTS, _ADAPTER = "state.json", "state.safetensors", "adapter_model.safetensors"


@dataclass(frozen=True)
class SavedTrial:
    """A committed state. `record` is state.json: point, key, meta, history, tokens, stopped."""

    relative: str
    step: int
    hash: str
    record: dict[str, Any]


def folder(trial: str, step: int) -> str:
    return f"{TRIALS}/{trial}/step-{step:08d}"


def step_of(relative: str) -> int:
    return int(relative.rsplit("step-", 1)[1])


def steps(store: Store, trial: str) -> list[int]:
    """Steps of the trial's folders, newest first, committed or not."""
    return sorted((step_of(n) for n in store.list(f"{TRIALS}/{trial}") if _STEP.fullmatch(n)), reverse=True)


def commit(
    store: Store, trial: str, step: int, state: Mapping[str, Any], record: Mapping[str, Any], texts: Mapping[str, str]
) -> SavedTrial:
    """Writes one state; `texts` are small files that go beside it. Raises StorageError."""
    from ft_ray.safetensors_io import save_floats

    relative = folder(trial, step)
    with store.stage(relative) as out:
        weights, moments = {}, {}
        for name, tensor in state["tensors"].items():
            kind, _, rest = name.partition(".")
            if kind == "weights":
                module, _, matrix = rest.rpartition(".")
                weights[f"base_model.model.{module}.lora_{matrix}.weight"] = tensor
            else:
                moments[name] = tensor
        save_floats(weights, out / _ADAPTER, metadata={"format": "pt"})
        save_floats(moments, out / _MOMENTS)
        written = {**record, "meta": state["meta"]}
        (out / _STATE).write_text(json.dumps(written), encoding="utf-8")
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")
    return SavedTrial(relative, step, key_of(store.tree(relative)), written)


def newest(store: Store, trial: str, *, key: str | None = None) -> SavedTrial | None:
    """The newest state whose files all match their hashes. `key`: only of the same point, base and data."""
    for step in steps(store, trial):
        relative = folder(trial, step)
        faults = store.verify(relative)
        if faults:
            logger.warning("state %s is damaged (%s): falling back to an earlier one.", relative, faults[0])
            continue
        try:
            record = store.read_json(f"{relative}/{_STATE}")
        except StorageError as error:
            logger.warning("%s Falling back to an earlier state.", error)
            continue
        if key is not None and record.get("key") != key:
            continue
        return SavedTrial(relative, step, key_of(store.tree(relative)), record)
    return None


def load_tensors(store: Store, saved: SavedTrial) -> dict[str, Any]:
    """The state as `SharedBase.attach` takes it."""
    from safetensors.torch import load_file

    local: Path = store.local(saved.relative)
    tensors = dict(load_file(local / _MOMENTS))
    for name, tensor in load_file(local / _ADAPTER).items():
        module, _, matrix = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        tensors[f"weights.{module}.{matrix}"] = tensor
    return {"tensors": tensors, "meta": saved.record["meta"]}


def point_of(step: int, validation: float | None, train: float | None, tokens: int) -> dict[str, Any]:
    """One entry of a history; what is not finite is None, and `diverged` says that the validation loss was not."""

    def finite(x: float | None) -> float | None:
        return x if x is not None and math.isfinite(x) else None

    found = {"step": step, "validation_loss": finite(validation), "train_loss": finite(train), "tokens": tokens}
    return found if validation is None or math.isfinite(validation) else {**found, "diverged": True}


def best_of(history: Iterable[Mapping[str, Any]]) -> tuple[int, float] | None:
    """(step, loss) of the lowest validation loss; without validation rows, of the last step by training loss."""
    found = list(history)
    measured = [(p["validation_loss"], p["step"]) for p in found if p["validation_loss"] is not None]
    if measured:
        loss, step = min(measured)
        return step, loss
    trained = [(p["step"], p["train_loss"]) for p in found if p["train_loss"] is not None]
    return max(trained) if trained else None


def collect(store: Store, trial: str, history: Iterable[Mapping[str, Any]], *, newest: int = 2) -> list[str]:
    """Removes the trial's states but the newest and the best. Returns what was removed."""
    best = best_of(history)
    found = steps(store, trial)
    keep = {*found[:newest], *([best[0]] if best else [])}
    return [_remove(store, folder(trial, step)) for step in found if step not in keep]


def keep_only(store: Store, wanted: Iterable[str]) -> None:
    """Removes every trial and every state of the experiment but `wanted`, relative to the sweep's folder."""
    keep = set(wanted)
    for trial in store.list(TRIALS):
        if not any(relative.startswith(f"{TRIALS}/{trial}/") for relative in keep):
            for step in steps(store, trial):
                _remove(store, folder(trial, step))
            store.remove(f"{TRIALS}/{trial}")
            continue
        for step in steps(store, trial):
            if folder(trial, step) not in keep:
                _remove(store, folder(trial, step))


def _remove(store: Store, relative: str) -> str:
    store.remove(f"{relative}/{COMMIT}")  # first, so that it is never seen in part
    store.remove(relative)
    return relative
