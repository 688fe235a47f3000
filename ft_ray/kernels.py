"""Fused GPU kernels for a model's norms, MLPs and rotation: Liger's (arXiv:2410.10989), where they compute the same.

A norm and a SwiGLU of a decoder layer are a dozen small kernels and as many intermediate tensors; in Liger they are
one each. They are put on the modules of one model, not into transformers: a second model in the process, on a CPU
perhaps, keeps its own.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ft_ray.model_shape import FUSED

__all__ = ["count", "fuse", "fuse_rotary", "unfit"]

_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "SmolLM3RMSNorm")
_ATTENTION = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention", "SmolLM3Attention")
_ROTATION = "apply_rotary_pos_emb"
_GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP")


def fuse(model: nn.Module) -> int:
    """Gives the model's norms and SwiGLU MLPs fused forwards. Returns how many: 0 off CUDA or without Liger."""
    on_cuda = next(model.parameters()).device.type == "cuda" and torch.version.hip is None
    if not on_cuda or importlib.util.find_spec("liger_kernel") is None:
        return 0
    fused = 0
    for module in model.modules():
        kind = type(module).__name__
        if kind in _NORMS:
            module.forward = types.MethodType(_norm, module)
        elif kind in _GATED and getattr(module.config, "hidden_act", None) in ("silu", "swish"):
            module.forward = types.MethodType(_gated, module)
        else:
            continue
        fused += 1
    return fused


def fuse_rotary(model: nn.Module) -> int:
    """Has the attention of a model that was fused rotate queries and keys by Liger's kernel. Returns how many do.

    transformers calls the rotation by a global name of the family's module, so each attention gets its forward once
    more with that name meaning something else: other models in the process keep theirs.
    """
    made: dict[Any, Any] = {}
    fused = 0
    for module in model.modules():
        forward = getattr(module.forward, "__func__", None)
        ours = type(module).__name__ in _ATTENTION and type(module).__module__.startswith("transformers.models.")
        if not ours or _ROTATION not in getattr(getattr(forward, "__code__", None), "co_names", ()):
            continue
        if forward not in made:
            made[forward] = _seeing(forward, {_ROTATION: _rotated})
        module.forward = types.MethodType(made[forward], module)
        fused += 1
    return fused


def _seeing(function: Any, names: dict[str, Any]) -> Any:
    """The function with other globals of these names."""
    seen = {**function.__globals__, **names}
    made = types.FunctionType(
        function.__code__, seen, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def unfit(model: Any) -> str:
    """Why a model of transformers is better left as it is, where it lies; '' where it can be fused."""
    device = next(model.parameters()).device
    if device.type != "cuda" or torch.version.hip is not None:
        return "there is no NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU's compute capability is below 8.0"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed (extra gpu)"
    if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang")):
        return "Triton needs a C compiler (gcc or clang), and there is none"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Triton compiles against Python.h, which is not installed (python3-dev)"
    if model.config.model_type not in FUSED:
        return f"there is nothing to fuse in a {model.config.model_type}"
    return ""


def count(model: nn.Module) -> int:
    """How many of the model's modules have a fused forward."""
    return sum(getattr(m.forward, "__func__", None) in (_norm, _gated) for m in model.modules())


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # casting 'llama': the square mean in fp32, the product with the weight in the input's precision, as transformers;
    # not in place: the incoming gradient may be somebody else's too.
    normed: Tensor = LigerRMSNormFunction.apply(
        hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False, None
    )
    return normed


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rope import LigerRopeFunction

    # As one long row: the kernel is compiled anew for each number of rows. [K, H, T, D], laid out as [K, T, H, D].
    rows, length = q.shape[0], q.shape[2]
    q, k = (x.transpose(1, 2).reshape(1, rows * length, x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k))
    cos, sin = (x.expand(rows, -1, -1).reshape(1, rows * length, x.shape[-1]) for x in (cos, sin))
    q, k = LigerRopeFunction.apply(q, k, cos, sin)
    q, k = (x.transpose(1, 2).view(rows, length, x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k))
    return q, k


def _gated(self: Any, x: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    out: Tensor = self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))
    return out
