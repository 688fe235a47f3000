"""The base model as it is loaded for training and merging: its type, its device, its quantization."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ft_ray import recipe as recipes
from ft_ray.base_model import ModelFiles
from ft_ray.errors import MissingPackageError, ModelError
from ft_ray.lean_imports import load_transformers
from ft_ray.precision import compute_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["compute_dtype", "count_quantized", "cure_cpu_faults", "load_model"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compute_dtype(recipe: recipes.Recipe) -> torch.dtype:
    """What the base computes in; for a CPU, of a recipe from `precision.on_device`."""
    return _DTYPES[compute_name(recipe)]


def load_model(
    files: ModelFiles, recipe: recipes.Recipe, *, device: str, quantized: bool, placed: bool = False
) -> PreTrainedModel:
    """Loads the base on `device` ('cpu', 'cuda:0'), as 4-bit NF4/FP4 when `quantized`, in `compute_dtype`.

    The dtype is given at load: casting afterwards would round the rotary `inv_freq` buffer as well. Full
    fine-tuning keeps fp32 master weights and computes in `precision` under autocast; with `placed`, DeepSpeed keeps
    the masters itself, shards the weights while they are loaded, and moves them to the device.
    """
    load_transformers()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # our own progress says what goes on
    dtype = compute_dtype(recipe)
    if recipe.method == "full" and not quantized and not placed:
        dtype = torch.float32
    options: dict[str, Any] = {} if placed else {"device_map": {"": device}}
    if quantized:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise MissingPackageError("bitsandbytes", "method: qlora", "") from error
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=recipe.quantization.type,
            bnb_4bit_use_double_quant=recipe.quantization.double,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        with _freed_memory_returned() if placed or device == "cpu" else contextlib.nullcontext():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                files.folder,
                dtype=dtype,
                attn_implementation="sdpa",
                trust_remote_code=recipe.model.trust_remote_code,
                use_safetensors=True,
                local_files_only=True,
                **options,
            )
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{files.source} cannot be loaded as a causal language model ({first}).") from error
    model.config.use_cache = False
    if quantized and device == "cpu":
        _leave_the_file(model)
    cure_cpu_faults(model)
    return model


def _leave_the_file(model: torch.nn.Module) -> None:
    """Copies the weights that were not quantized: on a CPU they are views of the mapped file of all 16-bit weights.

    One view keeps the whole file mapped, and what was read of it in the resident set: 0.2 GB of the demo model's.
    """
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            parameter.data = parameter.data.clone()


@contextlib.contextmanager
def _freed_memory_returned() -> Iterator[None]:
    """Keeps glibc from holding on to the tensors that ZeRO-3 frees after it has taken a rank's share of them.

    And to the 16-bit matrices that were quantized: the demo model's left up to 0.36 GB behind. Under jemalloc
    (`ray_session`) it changes nothing.

    Freed blocks of a few megabytes raise glibc's mmap threshold, later ones then come from a heap in which the shares
    leave holes: loading 0.6 GB on two ranks peaked at 0.69 GB a rank instead of 0.32. Afterwards the thresholds are
    what they would have become, because training is faster with reused memory (mallopt(3)).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # no glibc
        yield
        return
    trim, mmap = -1, -3
    mallopt(mmap, 1 << 18)
    try:
        yield
    finally:
        mallopt(mmap, 32 << 20)
        mallopt(trim, 64 << 20)


def cure_cpu_faults(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights into its CPU inference layout.

    A no-grad forward in eval mode packs them on a CPU with avx512_bf16, and `train()` does not undo it: the
    base then passes no gradient on, and a merge reads the packed bytes as if they were plain (bitsandbytes
    0.50.2). The layout is chosen by a plain attribute, so turning it off cures both.
    """
    for module in _linear4bit(model):
        module.support_avx512bf16_for_cpu = False


def count_quantized(model: torch.nn.Module) -> int:
    """How many linear layers hold 4-bit weights."""
    return sum(1 for _ in _linear4bit(model))


def _linear4bit(model: torch.nn.Module) -> Iterator[Any]:
    """By name, so that a base without such layers need not wait a second for bitsandbytes to be loaded."""
    for module in model.modules():
        kinds = type(module).__mro__
        if any(kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes.") for kind in kinds):
            yield module
