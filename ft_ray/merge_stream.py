"""A LoRA adapter merged into its base tensor by tensor: memory is a few tensors, whatever the model's size.

Each result is computed in fp32 and rounded once, with the operations of PEFT 0.21 in their order, so that an
unquantized base gives `merge_and_unload(safe_merge=False)` with an fp32 adapter bit for bit, on a CPU. A GPU may sum
an update's products in another order, so that a weight can round to its neighbour there. One thing differs in the
tied case: PEFT adds an embedding's update to the output head as well, which the adapter never had; here the two are
written apart and the config is untied, so that adapter and merged model agree.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ft_ray.adapter_files import EMBEDDINGS, HEADS, Adapter, Delta, locate, unknown, unsaved
from ft_ray.errors import ModelError
from ft_ray.merge_math import by_rows, quantized_weights, round_trip, updated
from ft_ray.merge_rows import Blocks, Source
from ft_ray.model_folder import write_companions
from ft_ray.recipe import Quantization
from ft_ray.safetensors_io import Entry, Reader, Writer, plan_shards, write_index

__all__ = ["Plan", "merge", "plan"]

logger = logging.getLogger("ft_ray")


@dataclass
class _Op:
    """How one tensor of the result is made: from a base tensor or an adapter tensor, plus an update."""

    name: str
    base: str | None
    replaced: str | None = None
    delta: Delta | None = None
    bias: Delta | None = None
    quantized: bool = False


@dataclass
class Plan:
    """Which tensors the result has and how each is made; `config` holds changes of config.json."""

    ops: list[_Op]
    entries: list[Entry]
    config: dict[str, Any] = field(default_factory=dict)


def merge(
    base: Path,
    adapter: Path | None,
    out: Path,
    *,
    base_mode: str = "full",
    quantization: Quantization | None = None,
    compute_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    device: str = "cpu",
    allow_empty: bool = False,
) -> dict[str, Any]:
    """Writes base + adapter to the folder `out` as a model that transformers and vLLM load. Returns counts.

    `base_mode` 'dequantized' first passes every linear layer that QLoRA keeps in 4 bits through bitsandbytes
    (`quantization`, in `compute_dtype`, on `device`: those of the training), so the update meets the weights it
    was trained against. `dtype` is that of the result, default the base's own. `adapter` None copies the base.
    Raises ModelError; what was written to `out` by then is for the caller to remove (`Store.stage` does).
    """
    if base_mode not in ("full", "dequantized"):
        raise ModelError(f"base_mode {base_mode!r} is unknown: use full or dequantized.")
    if base_mode == "dequantized" and quantization is None:
        raise ModelError("base_mode dequantized needs the quantization that the adapter was trained with.")
    out.mkdir(parents=True, exist_ok=True)
    opened = Adapter.open(adapter, allow_empty=allow_empty) if adapter is not None else None
    with Reader.of_model(base) as reader:
        todo = plan(base, reader, opened, dtype)
        if base_mode == "dequantized":
            names = quantized_weights(base)
            for op in todo.ops:
                op.quantized = op.base is not None and locate(op.name, names) is not None
        shards = plan_shards(todo.entries, max_shard_bytes)
        try:
            with torch.inference_mode():
                _write(todo, shards, reader, opened, out, quantization, compute_dtype, device)
        finally:
            if opened is not None:
                opened.close()
    write_index(out, shards)
    write_companions(base, adapter, out, config=todo.config, dtype=_common_dtype(todo.entries))
    return {
        "tensors": len(todo.entries),
        "updated": sum(op.delta is not None or op.bias is not None for op in todo.ops),
        "replaced": sum(op.replaced is not None for op in todo.ops),
        "dequantized": sum(op.quantized for op in todo.ops),
        "shards": len(shards),
        "bytes": sum(e.nbytes for e in todo.entries),
        "base_mode": base_mode,
    }


def plan(base: Path, reader: Reader, adapter: Adapter | None, dtype: torch.dtype | None = None) -> Plan:
    """Assigns every adapter tensor to a base tensor by headers alone. Raises ModelError when they do not fit."""
    config = _read_config(base)
    ops = {name: _Op(name, name) for name in reader.entries}
    result = Plan([], [])
    if adapter is not None:
        _assign(ops, result, reader, adapter, config, str(base))
    for op in ops.values():
        entry = _entry(op, reader, adapter)
        if dtype is not None and entry.dtype.is_floating_point:
            entry = Entry(entry.name, dtype, entry.shape)
        result.ops.append(op)
        result.entries.append(entry)
    return result


def _assign(
    ops: dict[str, _Op], result: Plan, reader: Reader, adapter: Adapter, config: dict[str, Any], source: str
) -> None:
    names, missing = reader.entries, []
    embedding = next((n for n in names if n.endswith(EMBEDDINGS)), None)
    head_key = next((key for n, key in adapter.replaced.items() if n.endswith(HEADS)), None)
    head_delta = next((m for m in adapter.deltas if f"{m}.weight".endswith(HEADS)), None)
    stored_head = next((n for n in names if n.endswith(HEADS)), None)
    tied = embedding is not None and (stored_head is None or bool(config.get("tie_word_embeddings")))

    def find(name: str) -> _Op | None:
        if tied and name.endswith(HEADS):
            assert embedding is not None
            return ops.setdefault(stored_head or name, _Op(stored_head or name, embedding))
        found = locate(name, names)
        return ops[found] if found is not None else None

    for name, key in adapter.replaced.items():
        op = find(name)
        if op is None:
            missing.append(name)
        else:
            op.replaced = key
    for module, delta in adapter.deltas.items():
        op = find(f"{module}.weight")
        if op is None:
            missing.append(f"{module}.weight")
            continue
        op.delta = delta
        if delta.bias is not None:
            bias = find(f"{module}.bias")
            if bias is None:
                raise ModelError(f"{adapter.folder}: lora_bias on {module!r}, which has no bias: it cannot be merged.")
            bias.bias = delta
    if missing:
        raise unknown(adapter.folder, missing, dict(names), source)
    lacking = unsaved(adapter, names, source)
    if lacking is not None:
        raise lacking
    for op in list(ops.values()):
        _check_shape(op, reader, adapter, result, source)
    if tied:
        assert embedding is not None
        _untie(ops, result, adapter, embedding, stored_head, head_key, head_delta)


def _untie(
    ops: dict[str, _Op],
    result: Plan,
    adapter: Adapter,
    embedding: str,
    stored_head: str | None,
    head_key: str | None,
    head_delta: str | None,
) -> None:
    """Keeps tied embeddings tied when both ends stay equal, else writes the head as a tensor of its own."""
    tied_by_peft = bool(adapter.config.get("ensure_weight_tying"))
    embed_op = ops[embedding]
    changed = embed_op.replaced is not None or embed_op.delta is not None
    if tied_by_peft and (embed_op.delta is not None or head_delta is not None):
        raise ModelError(f"{adapter.folder}: ensure_weight_tying with an adapter on the embedding cannot be merged.")
    if not changed and head_key is None and head_delta is None:
        return
    head = next((n for n in ops if n.endswith(HEADS)), None)
    same_weights = embed_op.replaced is not None and head_key is not None and torch.equal(
        adapter.tensors.read(embed_op.replaced), adapter.tensors.read(head_key)
    )  # fmt: skip
    if embed_op.delta is None and head_delta is None and (same_weights or (tied_by_peft and head_key is None)):
        if head is not None and stored_head is None:
            del ops[head]
        elif stored_head is not None:
            ops[stored_head].replaced = embed_op.replaced
        return
    if head is None:
        name = "lm_head.weight" if not embedding.endswith("embed_in.weight") else "embed_out.weight"
        ops[name] = _Op(name, embedding)
    result.config["tie_word_embeddings"] = False
    logger.warning("the adapter changes one end of the tied embeddings: the merged model stores both")


def _check_shape(op: _Op, reader: Reader, adapter: Adapter, result: Plan, source: str) -> None:
    if op.base is None:
        return
    shape = reader.entries[op.base].shape
    if op.replaced is not None:
        new = adapter.shape(op.replaced)
        if new != shape:
            if len(new) != 2 or new[1:] != shape[1:] or not op.name.endswith(EMBEDDINGS + HEADS):
                raise _misfit(adapter, op.name, shape, new, source)
            result.config["vocab_size"] = new[0]  # tokens were added before training
            shape = new
    if op.delta is not None:
        a, b = adapter.shape(op.delta.a), adapter.shape(op.delta.b)
        made_for: tuple[int, ...] = (b[0], a[1])
        fits: set[tuple[int, ...]] = {shape, shape[::-1]} if len(shape) == 2 else set()
        if op.delta.embedding:
            made_for, fits = (a[1], b[0]), {shape}
        if made_for not in fits:
            raise _misfit(adapter, op.name, shape, made_for, source)


def _misfit(adapter: Adapter, name: str, have: tuple[int, ...], made: tuple[int, ...], source: str) -> ModelError:
    trained_on = adapter.config.get("base_model_name_or_path")
    return ModelError(
        f"the adapter {adapter.folder} does not fit {source}: {name!r} is {list(have)} there and {list(made)} in the "
        f"adapter, which was trained on {trained_on!r}: give that base."
    )


def _entry(op: _Op, reader: Reader, adapter: Adapter | None) -> Entry:
    assert op.base is not None
    entry = reader.entries[op.base]
    shape = entry.shape
    if op.replaced is not None:
        assert adapter is not None
        shape = adapter.shape(op.replaced)
    return Entry(op.name, entry.dtype, shape)


def _write(
    todo: Plan,
    shards: list[tuple[str, list[Entry]]],
    reader: Reader,
    adapter: Adapter | None,
    out: Path,
    quantization: Quantization | None,
    compute_dtype: torch.dtype | None,
    device: str,
) -> None:
    transposed = _transposed(todo, reader, adapter)
    ops = iter(todo.ops)
    with Blocks(device) as blocks:
        for file, entries in shards:
            with Writer(out / file, entries) as writer, blocks.of_one_file():
                for entry in entries:
                    op = next(ops)
                    source, whole = _source(op, reader, adapter)
                    if op.quantized:
                        assert quantization is not None
                        source = _elements(round_trip(whole().to(device), quantization, compute_dtype))
                    update = None
                    if op.delta is not None:
                        assert adapter is not None
                        if by_rows(entry.shape, op.delta, adapter, transposed):
                            a, b = (adapter.tensors.read(key) for key in (op.delta.a, op.delta.b))
                            update = (a.to(device, torch.float32), b.to(device, torch.float32), op.delta.scaling)
                        else:
                            weight = source(0, math.prod(entry.shape)).view(entry.shape).to(device)
                            source = _elements(updated(weight, op.delta, adapter, transposed, entry.dtype))
                    if op.bias is not None:
                        assert adapter is not None and op.bias.bias is not None
                        bias = whole() + adapter.tensors.read(op.bias.bias).float() * op.bias.scaling
                        source = _elements(bias)
                    blocks.write(writer, entry, source, update)


def _source(op: _Op, reader: Reader, adapter: Adapter | None) -> tuple[Source, Callable[[], torch.Tensor]]:
    """Where a tensor of the result comes from: by elements, and whole."""
    base = op.base
    assert base is not None
    if op.replaced is None:
        return partial(reader.read_part, base), partial(reader.read, base)
    assert adapter is not None
    dtype, tensors, key = reader.entries[base].dtype, adapter.tensors, op.replaced
    return (
        lambda start, count: tensors.read_part(key, start, count).to(dtype),
        lambda: tensors.read(key).to(dtype),
    )


def _elements(tensor: torch.Tensor) -> Source:
    flat = tensor.contiguous().view(-1)
    return lambda start, count: flat[start : start + count]


def _transposed(todo: Plan, reader: Reader, adapter: Adapter | None) -> bool:
    """Whether weights are stored as [in, out] (Conv1D of GPT-2): seen from those that are not square."""
    if adapter is None:
        return False
    for op in todo.ops:
        if op.delta is None or op.delta.embedding or op.base is None:
            continue
        shape = reader.entries[op.base].shape
        if shape[0] != shape[1]:
            return adapter.shape(op.delta.b)[0] != shape[0]
    return bool(adapter.config.get("fan_in_fan_out"))


def _read_config(base: Path) -> dict[str, Any]:
    path = base / "config.json"
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}): give a folder saved by transformers.") from error
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "quantized")
        raise ModelError(
            f"{base} holds {method} weights, into which nothing can be merged: give the full-precision base."
        )
    from transformers import AutoConfig

    # A saved config leaves defaults out, and whether embeddings are tied by default depends on the family.
    full = AutoConfig.from_pretrained(base, local_files_only=True)
    return {**config, "tie_word_embeddings": getattr(full.get_text_config(), "tie_word_embeddings", False)}


def _common_dtype(entries: list[Entry]) -> torch.dtype | None:
    """The type that holds most of the values: what config.json names."""
    sizes: dict[torch.dtype, int] = {}
    for entry in entries:
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    return max(sizes, key=lambda d: sizes[d]) if sizes else None
