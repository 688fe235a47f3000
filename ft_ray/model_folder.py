"""The files beside the weights: config, tokenizer, chat template and generation config, carried to a new folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ft_ray.errors import ModelError

__all__ = ["RECORD", "TOKENIZER_FILES", "copy_tokenizer", "read_json", "read_record", "write_companions", "write_json"]

RECORD = "ft_ray.json"
"""In an adapter or merged folder: template_hash, eos_ids, base {source, revision, hash}, quantization."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_WRITTEN = ("config.json", "generation_config.json", "model.safetensors.index.json", RECORD)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no file. Raises ModelError when it cannot be understood."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}): write that folder again.") from error
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """ft_ray.json of an adapter or model folder; {} when another program wrote the folder."""
    return read_json(folder / RECORD)


def copy_tokenizer(sources: Iterable[Path], out: Path) -> None:
    """Copies the tokenizer of the first folder that has one, and the template of the first that has one.

    A tokenizer is taken whole: files of two never mix, because transformers prefers some over others silently.
    """
    folders = list(sources)
    owner = next((f for f in folders if any((f / name).exists() for name in _VOCABULARIES)), None)
    if owner is None:
        raise ModelError(f"{folders[-1]} holds no tokenizer: copy the tokenizer files there.")
    for name in TOKENIZER_FILES:
        (out / name).unlink(missing_ok=True)
        if (owner / name).exists():
            shutil.copyfile(owner / name, out / name)
    extra = owner / "additional_chat_templates"
    if extra.is_dir():
        shutil.copytree(extra, out / extra.name, dirs_exist_ok=True)
    if read_json(out / "tokenizer_config.json").get("chat_template") and owner == folders[0]:
        return
    for folder in folders:
        if folder == owner:
            if any((out / name).exists() for name in _TEMPLATES):
                return
            continue
        found = [name for name in _TEMPLATES if (folder / name).exists()]
        for name in found:
            shutil.copyfile(folder / name, out / name)
        if found:
            return


def write_companions(
    base: Path, adapter: Path | None, out: Path, *, config: dict[str, Any], dtype: torch.dtype | None
) -> None:
    """Writes what a model folder needs beside its weights to `out`.

    The adapter's tokenizer, chat template and generation config win over the base's; every end token that was
    trained becomes one that stops generation. `config`: changes of config.json.
    """
    for path in sorted(base.iterdir()):
        wanted = path.suffix == ".json" or path.name.upper().startswith(("LICENSE", "NOTICE", "USE_POLICY"))
        custom_code = path.suffix == ".py" and "auto_map" in read_json(base / "config.json")
        if path.is_file() and (wanted or custom_code) and path.name not in (*_WRITTEN, *TOKENIZER_FILES):
            if path.name.startswith(".") or path.name.endswith(".index.json"):
                continue
            shutil.copyfile(path, out / path.name)
    values = read_json(base / "config.json") | config
    if dtype is not None:
        values["torch_dtype" if "torch_dtype" in values else "dtype"] = str(dtype).removeprefix("torch.")
    write_json(out / "config.json", values)
    copy_tokenizer([adapter, base] if adapter is not None else [base], out)
    record = read_record(adapter) if adapter is not None else read_record(base)
    generation = read_json(base / "generation_config.json")
    if adapter is not None:
        generation |= read_json(adapter / "generation_config.json")
    ends = _ids(generation.get("eos_token_id", values.get("eos_token_id")))
    ends += [i for i in sorted(_ids(record.get("eos_ids"))) if i not in ends]
    if ends:
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if generation:
        write_json(out / "generation_config.json", generation)
    if record:
        write_json(out / RECORD, record)


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
