"""LoRA adapters: which layers they go to, and whether an adapter belongs to a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel

from ft_ray.errors import ModelError
from ft_ray.recipe import Recipe
from ft_ray.strict_yaml import nearest

if TYPE_CHECKING:
    from ft_ray.base_model import ModelFiles

__all__ = ["attach", "check_adapter", "targets"]


def targets(model: PreTrainedModel, asked: str | tuple[str, ...]) -> list[str]:
    """Module names (last part) that `lora.targets` means for this model. Raises ModelError.

    'all-linear' is every linear layer but the output head, 'attention' those inside attention blocks.
    """
    head = model.get_output_embeddings()
    head_name = next((name for name, module in model.named_modules() if module is head), None)
    linear = [
        name for name, module in model.named_modules()
        if module is not head and (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
    ]  # fmt: skip
    names = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if asked == "all-linear":
        return names
    if asked == "attention":
        found = sorted({name.rsplit(".", 1)[-1] for name in linear if "attn" in name or "attention" in name})
        if not found:
            raise ModelError(f"lora.targets 'attention' matches no module; this model has {', '.join(names)}.")
        return found
    wanted = [asked] if isinstance(asked, str) else list(asked)
    for one in wanted:
        if one == "lm_head" or one == head_name:
            raise ModelError("lora.targets: an adapter on the output head is not trained by this loss: leave it out.")
        if not any(name == one or name.endswith(f".{one}") for name in linear):
            raise ModelError(
                f"lora.targets {one!r} matches no linear module{nearest(one, names)}; "
                f"this model has {', '.join(names)}."
            )
    return wanted


def attach(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """Puts a fresh LoRA adapter (fp32 weights, seeded) on the frozen base."""
    lora = recipe.lora
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT scales by alpha / r; a float works as well
        lora_dropout=lora.dropout,
        target_modules=targets(model, lora.targets),
        bias=lora.bias,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )
    torch.manual_seed(recipe.seed)
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def check_adapter(folder: Path, base: ModelFiles) -> None:
    """Raises ModelError when the adapter in `folder` cannot belong to `base`.

    Compares the base's hash when ft-ray trained the adapter, else every tensor's shape with config.json.
    """
    from safetensors import safe_open

    config_file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config_file, weights):
        if not path.exists():
            raise ModelError(f"{folder} is no adapter: {path.name} is missing; give a folder saved by PEFT.")
    record = folder / "ft_ray.json"
    if record.exists():
        trained_on = json.loads(record.read_text(encoding="utf-8")).get("base", {})
        if trained_on.get("hash") and trained_on["hash"] != base.hash:
            raise ModelError(
                f"the adapter {folder} was trained on {trained_on.get('source')} ({trained_on['hash'][:12]}), not on "
                f"{base.source} ({base.hash[:12]}): give the base that it was trained on."
            )
    expected = _linear_shapes(base.folder)
    with safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            module, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
            if kind[:1] not in ("A", "B") or "embedding" in kind:
                continue
            shape = expected.get(f"{module}.weight")
            size = file.get_slice(name).get_shape()
            if shape is None:
                raise ModelError(f"the adapter {folder} adapts {module!r}, which {base.source} does not have.")
            side = shape[1] if kind[0] == "A" else shape[0]
            got = size[1] if kind[0] == "A" else size[0]
            if side != got:
                raise ModelError(
                    f"the adapter {folder} does not fit {base.source}: {module!r} is {shape[0]}x{shape[1]} there, the "
                    f"adapter was made for a width of {got}; give the base that it was trained on."
                )


def _linear_shapes(folder: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                shapes[name] = file.get_slice(name).get_shape()
    return shapes
