"""An attached adapter's state: taken, put back, and exported in PEFT's format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from ft_ray import lora
from ft_ray.adapter_config import AdapterConfig
from ft_ray.adapter_stack import Bucket
from ft_ray.batch_sampler import DataOrder
from ft_ray.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Attached", "export", "peft_config", "put", "take"]

_KINDS = ("weights", "first", "second")


@dataclass
class Attached:
    """An adapter on a shared base: `step` counts optimizer steps, `position` batches taken from the data order."""

    config: AdapterConfig
    bucket: Bucket
    order: DataOrder | None
    step: int = 0
    position: int = 0
    stopped: str | None = None


def take(adapter: Attached, adapter_id: str) -> Callable[[], dict[str, Any]]:
    """Copies the state as it is now. What is returned lays it out, on any thread, while training goes on:

    `tensors`: weights and AdamW's moments by layer, CPU, fp32; `meta`: the rest, JSON-able.
    """
    bucket, slot, rank = adapter.bucket, adapter.bucket.ids.index(adapter_id), adapter.config.r
    rows = {kind: bucket.copy(kind, slot) for kind in _KINDS}
    meta = {
        "config": asdict(adapter.config),
        "order": asdict(adapter.order) if adapter.order else None,
        "step": adapter.step,
        "optimizer_step": float(bucket.steps[slot]),
        "position": adapter.position,
        "stopped": adapter.stopped,
    }

    def laid_out() -> dict[str, Any]:
        tensors = {f"{kind}.{name}": t for kind, row in rows.items() for name, t in bucket.cut(row, rank).items()}
        return {"tensors": tensors, "meta": meta}

    return laid_out


def put(adapter: Attached, adapter_id: str, state: Mapping[str, Any]) -> None:
    """Writes a state into the adapter's slot. InputError when ranks or targets differ; nothing is written then."""
    bucket, slot = adapter.bucket, adapter.bucket.ids.index(adapter_id)
    tensors, meta = state["tensors"], state["meta"]
    rank = adapter.config.r
    expected = {
        f"{kind}.{name}.{matrix}": shape
        for kind in _KINDS
        for name, target in bucket.targets.items()
        for matrix, shape in (("A", (rank, target.shape.inputs)), ("B", (target.shape.outputs, rank)))
    }
    if expected != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
        raise InputError(
            f"the state given to adapter {adapter_id!r} is of another rank or other targets: attach it with the "
            "configuration it was saved with."
        )
    for kind in _KINDS:
        cut = {name.removeprefix(f"{kind}."): t for name, t in tensors.items() if name.startswith(f"{kind}.")}
        bucket.load(kind, slot, rank, cut)
    bucket.steps[slot].fill_(meta["optimizer_step"])
    adapter.step, adapter.position, adapter.stopped = meta["step"], meta["position"], meta["stopped"]
    if adapter.order is None and meta["order"]:
        adapter.order = DataOrder(**meta["order"])


def export(adapter: Attached, adapter_id: str, model: PreTrainedModel, folder: Path) -> Path:
    """Writes adapter_config.json and adapter_model.safetensors (fp32) to `folder`, which the caller commits."""
    config, bucket = adapter.config, adapter.bucket
    tensors = {}
    for key, tensor in bucket.save("weights", bucket.ids.index(adapter_id), config.r).items():
        name, _, matrix = key.rpartition(".")
        tensors[f"base_model.model.{name}.lora_{matrix}.weight"] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(peft_config(config, model), encoding="utf-8")
    return folder


def peft_config(config: AdapterConfig, model: PreTrainedModel) -> str:
    """adapter_config.json as PEFT reads it; what is not said there has PEFT's defaults.

    Written without PEFT, whose import takes an engine a second between two steps.
    """
    whole = config.alpha == int(config.alpha)
    found = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name_or_path,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": int(config.alpha) if whole else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(lora.targets(model, config.targets)),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": config.rslora,
    }
    return json.dumps(found, indent=2, sort_keys=True)
