"""LoRA adapters: which layers they go to, and putting them there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ft_ray.errors import ModelError
from ft_ray.recipe import Recipe
from ft_ray.strict_yaml import nearest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["attach", "targets"]


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
    from peft import LoraConfig, PeftModel, TaskType, get_peft_model

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
