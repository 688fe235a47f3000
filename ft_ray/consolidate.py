"""From the pieces of all ranks to sharded safetensors that transformers and vLLM load.

One parameter is in memory at a time, whatever the model's size. Tied parameters were trained once and are written once,
under the name of the first, as transformers does; config.json says that they are tied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ft_ray.model_folder import read_json, write_json
from ft_ray.safetensors_io import Entry, Writer, plan_shards, write_index
from ft_ray.state_files import WEIGHT, StateFiles

__all__ = ["consolidate"]


def consolidate(
    checkpoint: Path,
    base: Path,
    out: Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
) -> dict[str, Any]:
    """Writes weights and config.json of the model in a checkpoint to `out`. Returns {tensors, bytes, shards}.

    The fp32 master weights are rounded to `dtype` once. `base` is the folder of the base model, for its config.
    """
    stored = getattr(torch, dtype)
    with StateFiles(checkpoint) as state:
        entries = [Entry(name, stored, tuple(shape)) for name, shape in state.index.shapes.items()]
        buffers = {name: state.buffer(name) for name in state.index.buffers}
        entries += [Entry(name, value.dtype, tuple(value.shape)) for name, value in buffers.items()]
        shards = plan_shards(entries, max_shard_bytes)
        for file, part in shards:
            with Writer(out / file, part) as writer:
                for entry in part:
                    value = buffers.get(entry.name)
                    if value is None:
                        value = state.read(WEIGHT, entry.name).to(stored).reshape(entry.shape)
                    writer.write(entry.name, value)
    write_index(out, shards)
    config = read_json(base / "config.json")
    config.pop("torch_dtype", None)
    write_json(out / "config.json", {**config, "dtype": dtype})
    return {"tensors": len(entries), "bytes": sum(e.nbytes for e in entries), "shards": len(shards)}
