"""Merging with its proof: the candidate bases are compared with the adapter, the better one is kept.

For LoRA there is one candidate. For QLoRA there are two, the full-precision base and the dequantized 4-bit one
that the adapter was trained against; which of them is closer to adapter-on-4-bit is measured, not assumed.
"""

from __future__ import annotations

import gc
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from ft_ray import recipe as recipes
from ft_ray.adapter_files import EMBEDDINGS, WEIGHTS, Adapter, read_adapter_config
from ft_ray.base_model import ModelFiles
from ft_ray.chat import Chat, load_tokenizer
from ft_ray.errors import DataError, ModelError
from ft_ray.merge_stream import merge, plan
from ft_ray.model_folder import RECORD, copy_tokenizer, read_json, read_record, write_json
from ft_ray.model_loading import compute_dtype, load_model
from ft_ray.parity import Parity, heldout_loss, parity
from ft_ray.precision import on_device
from ft_ray.safetensors_io import Entry, Reader, Writer

__all__ = [
    "Loader", "Tokens", "check_fits", "choose_base", "import_adapter", "merge", "merge_stage", "read_adapter_config",
    "sample_rows",
]  # fmt: skip

logger = logging.getLogger("ft_ray")

_LOSSES_APART = 0.02  # nats for each 1 + nat, of the same weights in memory and rounded to what is served

Mode = Literal["full", "dequantized"]
Loader = Callable[[Path, Path | None, bool], torch.nn.Module]
"""load(folder, adapter or None, quantized) -> the model, ready to run."""


class Tokens(Protocol):
    """The part of `dataset.Prepared` that is needed here."""

    def tokens(self, split: str) -> Iterable[Mapping[str, Any]]: ...


def merge_stage(
    recipe: recipes.Recipe,
    files: ModelFiles,
    chat: Chat,
    prepared: Tokens,
    trained: Path,
    out: Path,
    *,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Merges what was trained (`trained`: adapter folder, or model folder of a full fine-tuning) into `out`.

    Returns {kl, kl_max, top1, tokens, rows, base_mode, candidates: {mode: the same figures}, tensors, bytes, ...}:
    KL in nats of the merged model to the trained one over answer tokens of validation rows. A GPU that torch sees
    merges; where it has no room left, the CPU does. Raises ModelError.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    record = read_record(trained)
    if record.get("template_hash") not in (None, chat.template_hash):
        raise ModelError(
            f"{trained} was trained with another chat template than the recipe's now: train again, or set "
            "model.chat_template back."
        )
    rows = sample_rows(prepared)
    written_in = compute_dtype(recipe)
    recipe, _ = on_device(recipe, device)

    def load(folder: Path, adapter: Path | None, quantized: bool) -> torch.nn.Module:
        precision = recipe if quantized or folder == trained else recipe.model_copy(update={"method": "lora"})
        place = ModelFiles(folder, str(folder), None, "", {})
        model: torch.nn.Module = load_model(place, precision, device=device, quantized=quantized)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter))
        return model.eval()

    def say(message: str) -> None:
        if on_event is not None:
            on_event({"kind": "status", "message": message})

    if recipe.method == "full":
        counts = merge(trained, None, out, dtype=written_in)
        say("comparing the written model with the trained one")
        figures = _compare(load, (trained, None, False), out, rows, recipe.evaluation.batch)
        measured = record.get("validation_loss")
        if measured is not None:
            say("measuring the written model's validation loss")
            figures |= _as_measured(load(out, None, False), prepared, measured, recipe.evaluation.batch)
        found = {"base_mode": "full", "candidates": {"full": figures}, **figures, **counts}
    else:
        found = choose_base(
            files.folder,
            trained,
            out,
            rows,
            load,
            quantization=recipe.quantization if recipe.method == "qlora" else None,
            compute_dtype=compute_dtype(recipe),
            batch=recipe.evaluation.batch,
            device=device,
            say=say,
        )
    write_json(
        out / RECORD,
        {
            **record,
            "template_hash": chat.template_hash,
            "eos_ids": sorted(chat.eos_ids),
            "base": {"source": files.source, "revision": files.revision, "hash": files.hash},
            "base_mode": found["base_mode"],
        },
    )
    return found


def choose_base(
    base: Path,
    adapter: Path,
    out: Path,
    rows: Iterable[Mapping[str, Any]],
    load: Loader,
    *,
    quantization: recipes.Quantization | None,
    compute_dtype: torch.dtype | None = None,
    batch: int = 8,
    device: str = "cpu",
    say: Callable[[str], None] = lambda message: None,
    max_shard_bytes: int = 5_000_000_000,
) -> dict[str, Any]:
    """Merges on every candidate base, compares each with the adapter, and leaves the closest in `out`.

    With `quantization` the adapter runs on the 4-bit base and both modes are candidates, else only 'full'. The
    lower mean KL wins, then the higher top-1 agreement, then 'full'. Two models are in memory at most, two merged
    copies on disk. Returns what `merge_stage` does.
    """
    table = list(rows)
    modes: tuple[Mode, ...] = ("full", "dequantized") if quantization is not None else ("full",)
    figures: dict[str, dict[str, Any]] = {}
    counts: dict[str, dict[str, Any]] = {}
    reference = load(base, adapter, quantization is not None)
    best: str | None = None
    for mode in modes:
        say(f"merging into the {'dequantized 4-bit' if mode == 'dequantized' else 'full-precision'} base")
        folder = out / f".{mode}"
        work = partial(
            merge, base, adapter, folder, base_mode=mode, quantization=quantization, compute_dtype=compute_dtype,
            max_shard_bytes=max_shard_bytes,
        )  # fmt: skip
        try:
            counts[mode] = work(device=device)
        except RuntimeError as error:
            if device == "cpu" or not re.search("out of memory|ALLOC_FAILED", str(error)):
                raise
        if mode not in counts:  # outside the handler, which holds on to what the failed merge had on the GPU
            say(f"no room left for the merge on {device}: merging on the CPU")
            gc.collect()
            torch.cuda.empty_cache()
            shutil.rmtree(folder)
            counts[mode] = work(device="cpu")
        say(f"comparing the merged model with the adapter on {len(table)} validation rows")
        candidate = load(folder, None, False)
        figures[mode] = _figures(parity(reference, candidate, table, batch), len(table))
        del candidate
        gc.collect()
        if best is None or _rank(figures[mode]) < _rank(figures[best]):
            if best is not None:
                shutil.rmtree(out / f".{best}")
            best = mode
        else:
            shutil.rmtree(folder)
    del reference
    gc.collect()
    assert best is not None
    for path in sorted((out / f".{best}").iterdir()):
        path.rename(out / path.name)
    (out / f".{best}").rmdir()
    return {**figures[best], **counts[best], "candidates": figures}


def _compare(
    load: Loader, reference: tuple[Path, Path | None, bool], out: Path, rows: list[Mapping[str, Any]], batch: int
) -> dict[str, Any]:
    return _figures(parity(load(*reference), load(out, None, False), rows, batch), len(rows))


def _as_measured(model: torch.nn.Module, prepared: Tokens, measured: float, batch: int) -> dict[str, Any]:
    """The written model's validation loss, beside the one that training measured of these weights in memory.

    That the copy equals what was put together from the ranks' shares says nothing of the putting together. Raises
    ModelError where the two lie further apart than rounding and other kernels can bring them.
    """
    found = heldout_loss(model, prepared.tokens("validation"), batch)
    if not abs(found - measured) <= _LOSSES_APART * (1 + measured):
        raise ModelError(
            f"the written model's validation loss is {found:.4f}, where training measured {measured:.4f}: its weights "
            "were not put together as they were trained; run the same command again, and report it if that stays."
        )
    return {"validation_loss": found, "validation_loss_trained": measured}


def _figures(found: Parity, rows: int) -> dict[str, Any]:
    return {
        "kl": found.kl_mean,
        "kl_max": found.kl_max,
        "top1": found.top1_agreement,
        "tokens": found.tokens,
        "rows": rows,
    }


def _rank(figures: Mapping[str, Any]) -> tuple[float, float]:
    return figures["kl"], -figures["top1"]


def sample_rows(prepared: Tokens, *, answer_tokens: int = 1024) -> list[Mapping[str, Any]]:
    """The first validation rows that hold `answer_tokens` trained tokens together; training rows if there are none.

    No choice between models is made on them but that of the merge base, so training rows serve as well.
    """
    for split in ("validation", "train"):
        rows: list[Mapping[str, Any]] = []
        tokens = 0
        for row in prepared.tokens(split):
            rows.append(row)
            tokens += sum(label != -100 for label in row["labels"])
            if tokens >= answer_tokens:
                break
        if tokens:
            if split == "train":
                logger.warning("there is no validation row: the merge is proved on training rows")
            return rows
    raise DataError("there is no row to prove the merge on: give data.validation or a larger data.split.validation.")


# Adapters made elsewhere


def check_fits(adapter: Path | str, base: ModelFiles) -> dict[str, Any]:
    """Whether the adapter belongs to `base`, by shapes, names and recorded hashes; reads no base weight.

    Returns {modules, replaced, r, trained_on, vocabulary}. Another base name is a warning when all fits. Raises
    ModelError when it does not.
    """
    folder = Path(adapter)
    trained_on = read_record(folder).get("base") or {}
    if trained_on.get("hash") and base.hash and trained_on["hash"] != base.hash:
        raise ModelError(
            f"the adapter {folder} was trained on {trained_on.get('source')} ({trained_on['hash'][:12]}), not on "
            f"{base.source} ({base.hash[:12]}): give the base that it was trained on."
        )
    opened = Adapter.open(folder)
    try:
        with Reader.of_model(base.folder) as reader:
            todo = plan(base.folder, reader, opened)
    finally:
        opened.close()
    name = str(opened.config.get("base_model_name_or_path") or "")
    if name and _plain(name) != _plain(base.source):
        logger.warning("the adapter %s names the base %s; its shapes fit %s, which is used", folder, name, base.source)
    vocabulary = next((e.shape[0] for e in todo.entries if e.name.endswith(EMBEDDINGS)), None)
    return {
        "modules": len(opened.deltas),
        "replaced": len(opened.replaced),
        "r": opened.config["r"],
        "trained_on": name,
        "vocabulary": vocabulary,
    }


def _plain(name: str) -> str:
    """A model's name without owner, folder and the suffixes of quantized copies."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return re.sub(r"[-_.](unsloth|bnb|4bit|8bit|nf4)(?=[-_.]|$)", "", last)


def import_adapter(
    adapter: Path | str,
    base: ModelFiles,
    out: Path,
    *,
    template: str | None = None,
    fits: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes an adapter made elsewhere (Axolotl, Unsloth, TRL, LLaMA-Factory) to `out` in this project's layout.

    Keys take PEFT's plain form, the base is named as given, tokenizer, chat template and generation config lie
    beside, and ft_ray.json records template hash, end tokens and base. `template` (Jinja) replaces the chat
    template; `fits` is what `check_fits` said, if it was asked. Returns what that does. Raises ModelError when the
    adapter or its tokenizer does not fit.
    """
    folder = Path(adapter)
    found = fits or check_fits(folder, base)
    out.mkdir(parents=True, exist_ok=True)
    with Reader([folder / WEIGHTS]) as tensors:
        names = {_plain_key(key): key for key in tensors.entries if ".original_module." not in key}
        entries = [Entry(n, tensors.entries[k].dtype, tensors.entries[k].shape) for n, k in names.items()]
        with Writer(out / WEIGHTS, entries) as writer:
            for name, key in names.items():
                writer.write(name, tensors.read(key))
    config = read_adapter_config(folder) | {
        "base_model_name_or_path": base.source,
        "revision": base.revision,
        "inference_mode": True,
    }
    write_json(out / "adapter_config.json", config)
    copy_tokenizer([folder, base.folder], out)
    if template is not None:
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    generation = read_json(base.folder / "generation_config.json") | read_json(folder / "generation_config.json")
    ends = read_json(base.folder / "config.json").get("eos_token_id")
    if ends is not None:  # where engines look in a base without that file, which this folder is not
        generation.setdefault("eos_token_id", ends)
    if generation:
        write_json(out / "generation_config.json", generation)
    chat = Chat(load_tokenizer(out))
    size = len(chat.tokenizer)
    if found["vocabulary"] is not None and size > found["vocabulary"]:
        raise ModelError(
            f"the tokenizer beside the adapter {folder} has {size} tokens, the model {found['vocabulary']}: tokens "
            "were added but the embeddings were not saved; save them (modules_to_save) or remove that tokenizer."
        )
    record = {
        **read_record(folder),
        "imported_from": str(folder),
        "template_hash": chat.template_hash,
        "eos_ids": sorted(chat.eos_ids),
        "base": {"source": base.source, "revision": base.revision, "hash": base.hash},
    }
    record.setdefault("quantization", None)
    write_json(out / RECORD, record)
    logger.info("imported %s: %s", folder, json.dumps(found))
    return found


def _plain_key(key: str) -> str:
    name = key.replace("_orig_mod.", "").removeprefix("base_model.model.")
    name = re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", name)
    name = re.sub(r"(\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.default(?=\.|$)", r"\1", name)
    return f"base_model.model.{name}"
