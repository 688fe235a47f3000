"""What a model computes in: the recipe's precision, or float32 on a CPU that cannot multiply 16-bit matrices.

torch hands 16-bit matrix products on a CPU to oneDNN where the processor can do them. Elsewhere, as on many desktops
and laptops, it falls back to loops of its own: on a server processor with AVX2 alone, bf16 took 6 times as long as
float32 forward, and 27 and 3 times in the two products of the backward (benchmarks/README.md).
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from ft_ray.recipe import Recipe

__all__ = ["compute_name", "cpu_multiplies", "native", "on_device", "serving_dtype"]

_CPUINFO = Path("/proc/cpuinfo")  # not torch, which takes a second to import: `ft-ray plan` asks, too
# What `torch.ops.mkldnn._is_mkldnn_bf16_supported` and its like for fp16 look for; one set of these is enough.
_AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
_AVX2_VNNI_2 = {"avx_vnni", "avx_vnni_int8", "avx_ne_convert"}
_ENOUGH: dict[str, tuple[set[str], ...]] = {
    "bf16": (_AVX512, _AVX2_VNNI_2, {"asimd", "bf16"}),
    "fp16": (_AVX512 | {"avx512_fp16"}, _AVX2_VNNI_2, {"asimd", "asimdhp"}),
}


@functools.cache
def cpu_multiplies(name: str) -> bool:
    """Whether this machine's CPU has instructions for matrices of `name` ('bf16', 'fp16', 'fp32')."""
    if name == "fp32":
        return True
    try:
        said = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux: torch has no oneDNN there
        return False
    listed = re.search(r"^(?:flags|Features)\s*:(.*)$", said, re.MULTILINE)  # of x86 and Arm; all cores have the same
    flags = set(listed[1].split()) if listed else set()
    return any(needed <= flags for needed in _ENOUGH[name])


def compute_name(recipe: Recipe) -> str:
    """What the base computes in, 'bf16', 'fp16' or 'fp32': `quantization.compute_dtype` for QLoRA, else `precision`."""
    if recipe.method == "qlora" and recipe.quantization.compute_dtype != "auto":
        return recipe.quantization.compute_dtype
    return recipe.precision


def native(recipe: Recipe) -> bool:
    """Whether this machine's CPU can do what the recipe asks for."""
    return cpu_multiplies(recipe.precision) and cpu_multiplies(compute_name(recipe))


def on_device(recipe: Recipe, device: str, *, able: bool | None = None) -> tuple[Recipe, str | None]:
    """The recipe in a precision that `device` ('cpu', 'cuda:0') computes in, and what was substituted (None: nothing).

    `able`: whether every CPU that takes part can do what is asked for; default: `native`, of this machine's. The
    recipe's hash changes with it: what is known by the hash of what was asked for takes that first.
    """
    if device != "cpu" or (native(recipe) if able is None else able):
        return recipe, None
    quantization = recipe.quantization.model_copy(update={"compute_dtype": "auto"})
    made = recipe.model_copy(update={"precision": "fp32", "quantization": quantization})
    asked = recipe.precision if recipe.precision != "fp32" else compute_name(recipe)
    return made, f"precision {asked} -> fp32: a CPU without instructions for {asked} matrices is faster in float32"


def serving_dtype(asked: str, device: str) -> str:
    """vLLM's `dtype` on `device` ('cpu' or 'gpu'): what was asked for; 'auto' is float32 where 16 bits are slower."""
    return "float32" if asked == "auto" and device == "cpu" and not cpu_multiplies("bf16") else asked
