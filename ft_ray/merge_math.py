"""The arithmetic of a merge: a LoRA or DoRA update added and rounded once, and the 4-bit round trip of QLoRA."""

from __future__ import annotations

from pathlib import Path

import torch

from ft_ray.adapter_files import Adapter, Delta
from ft_ray.errors import ModelError
from ft_ray.recipe import Quantization

__all__ = ["add_rows", "by_rows", "check_finite", "quantized_weights", "round_trip", "updated"]

_BLOCK = 64  # bitsandbytes' default, which transformers does not change


def round_trip(weight: torch.Tensor, quantization: Quantization, dtype: torch.dtype | None) -> torch.Tensor:
    """What a 4-bit layer computes with: `weight` quantized by bitsandbytes and dequantized, in `dtype`."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.to(dtype or weight.dtype).contiguous(),
        blocksize=_BLOCK,
        compress_statistics=quantization.double,
        quant_type=quantization.type,
    )
    result: torch.Tensor = dequantize_4bit(packed, state)
    return result


def updated(
    weight: torch.Tensor, delta: Delta, adapter: Adapter, transposed: bool, dtype: torch.dtype
) -> torch.Tensor:
    """`weight` plus the update, rounded once to `dtype`. PEFT's own operations, in its order.

    A weight that is not square shows by its shape whether it is stored as [in, out] (Conv1D of GPT-2);
    `transposed` says so for one that is.
    """
    a = adapter.tensors.read(delta.a).to(weight.device, torch.float32)
    b = adapter.tensors.read(delta.b).to(weight.device, torch.float32)
    update = b @ a
    square = update.shape[0] == update.shape[1]
    flip = delta.embedding or update.shape != weight.shape or (square and transposed)
    update = update.T if flip else update
    update *= delta.scaling
    if delta.magnitude is not None:
        # DoRA: m * (W + BA) / ||W + BA||, the norm over each output's inputs (arXiv:2402.09353, eq. 5)
        magnitude = adapter.tensors.read(delta.magnitude).to(weight.device, torch.float32)
        merged = (weight.T if flip else weight) + (update.T if flip else update)
        factor = magnitude.reshape(-1) / torch.linalg.norm(merged, dim=1)
        scale = factor.view(1, -1) if flip else factor.view(-1, 1)
        scaled: torch.Tensor = scale * (weight + update)
        return scaled.to(dtype)
    if delta.embedding:
        update = update.to(weight.dtype).float()  # PEFT rounds an embedding's update before it adds it
    update += weight
    return update.to(dtype)


def add_rows(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, dtype: torch.dtype
) -> torch.Tensor:
    """Some rows of what `updated` computes for a plain matrix: `b` is those rows of lora_B, in fp32."""
    update = b @ a
    update *= scaling
    update += weight
    return update.to(dtype)


def by_rows(shape: tuple[int, ...], delta: Delta, adapter: Adapter, transposed: bool) -> bool:
    """Whether `add_rows` gives what `updated` does: a row of the result needs nothing of another row."""
    out, inner = adapter.shape(delta.b)[0], adapter.shape(delta.a)[1]
    plain = not delta.embedding and delta.magnitude is None and shape == (out, inner)
    return plain and not (transposed and out == inner)


def check_finite(tensor: torch.Tensor, name: str) -> None:
    if tensor.dtype.is_floating_point and tensor.itemsize > 1 and tensor.numel():
        low, high = torch.aminmax(tensor)  # NaN passes through both; no mask in memory
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ModelError(
                f"the merged tensor {name!r} holds NaN or infinite values: the adapter is damaged, or its values "
                f"overflow {str(tensor.dtype).removeprefix('torch.')}."
            )


def quantized_weights(base: Path) -> dict[str, None]:
    """Names of the weights that transformers turns into 4-bit layers, from a model without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, local_files_only=True))
    kept = get_keys_to_not_convert(model)
    return {
        f"{name}.weight": None
        for name, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    }
