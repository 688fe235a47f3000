"""Safetensors files read and written one tensor at a time, so that memory is a tensor and not a file.

The library maps a whole file into memory and saves from a dictionary that holds a whole shard. Here a tensor
is read with one `readinto` and written at its place, the header having been written first from names, types
and shapes alone. Format: 8 bytes of header length (little endian), the header as JSON, the data
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors
import torch

from ft_ray.errors import ModelError

__all__ = ["INDEX", "Entry", "Reader", "Writer", "plan_shards", "save_floats", "write_index"]

INDEX = "model.safetensors.index.json"

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Entry:
    """Name, type and shape of a tensor, and where its bytes are (`start` counts from the file's begin)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path | None = None
    start: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Reader:
    """All tensors of some safetensors files, by name. Use as a context manager."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        self._files: dict[Path, IO[bytes]] = {}
        self._opening = threading.Lock()
        for path in paths:
            for entry in _read_header(path):
                if entry.name in self.entries:
                    raise ModelError(
                        f"tensor {entry.name!r} is in both {self.entries[entry.name].path} and {path}: "
                        "remove the weight file that does not belong to this model."
                    )
                self.entries[entry.name] = entry

    @classmethod
    def of_model(cls, folder: Path) -> Reader:
        """The weights of a model folder: those its index names, else model.safetensors, else every *.safetensors."""
        index = folder / INDEX
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise ModelError(f"{index} cannot be read ({error}): fetch the model again.") from error
            return cls(folder / name for name in names)
        single = folder / "model.safetensors"
        paths = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ModelError(f"{folder} holds no *.safetensors weights: give a folder saved by transformers.")
        return cls(paths)

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` in memory of its own. Raises ModelError when the file is cut short."""
        entry = self.entries[name]
        return self.read_part(name, 0, math.prod(entry.shape)).reshape(entry.shape)

    def read_part(self, name: str, start: int, count: int) -> torch.Tensor:
        """Elements [start, start + count) of the flattened tensor. Raises ModelError when the file is cut short."""
        entry = self.entries[name]
        assert entry.path is not None
        with self._opening:
            file = self._files.get(entry.path)
            if file is None:
                file = self._files[entry.path] = open(entry.path, "rb", buffering=0)  # noqa: SIM115
        size, offset = count * entry.dtype.itemsize, entry.start + start * entry.dtype.itemsize
        data = torch.empty(size, dtype=torch.uint8)
        view = memoryview(data.numpy().data)
        done = 0
        while done < size:  # preadv: no shared file position, so that threads may read side by side
            got = os.preadv(file.fileno(), [view[done:]], offset + done)
            if not got:
                raise ModelError(f"{entry.path} is cut short in tensor {name!r}: fetch the file again.")
            done += got
        return data.view(entry.dtype)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _read_header(path: Path) -> Iterator[Entry]:
    damaged = f"{path} is not a whole safetensors file"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ModelError(f"{damaged} (header of {length} bytes): fetch it again.")
            header: dict[str, Any] = json.loads(file.read(length))
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): check the model folder.") from error
    except ValueError as error:
        raise ModelError(f"{damaged} ({error}): fetch it again.") from error
    for name, value in header.items():
        if name == "__metadata__":
            continue
        dtype = _DTYPES.get(value["dtype"])
        if dtype is None:
            raise ModelError(f"{path}: tensor {name!r} has the type {value['dtype']}, which cannot be merged.")
        begin, end = value["data_offsets"]
        entry = Entry(name, dtype, tuple(value["shape"]), path, 8 + length + begin)
        if entry.nbytes != end - begin or entry.start + entry.nbytes > size:
            raise ModelError(f"{damaged} (tensor {name!r} ends outside the file): fetch it again.")
        yield entry


class Writer:
    """One safetensors file of known entries; tensors or parts of them are written in any order, by any thread."""

    def __init__(self, path: Path, entries: list[Entry]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in entries:
            header[entry.name] = {
                "dtype": _NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + entry.nbytes],
            }
            offset += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8, as the library writes it
        self._entries = {entry.name: entry for entry in entries}
        self._places = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in self._entries}
        self._left, self._counting = offset, threading.Lock()
        self._file: IO[bytes] = open(path, "wb", buffering=0)  # noqa: SIM115
        self._put(memoryview(struct.pack("<Q", len(text)) + text), 0)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        assert self._entries[name].shape == tuple(tensor.shape), (self._entries[name], tensor.shape)
        self.write_part(name, 0, tensor)

    def write_part(self, name: str, start: int, tensor: torch.Tensor) -> None:
        """Elements from `start` on of the flattened tensor `name`; every element is written once."""
        entry = self._entries[name]
        end = start + tensor.numel()
        assert entry.dtype == tensor.dtype and end * entry.dtype.itemsize <= entry.nbytes, (entry, tensor.dtype, end)
        if tensor.numel():
            data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self._put(data, self._places[name] + start * entry.dtype.itemsize)
            with self._counting:
                self._left -= len(data)

    def _put(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):  # one write of over 2 GiB is cut short by Linux
            done += os.pwrite(self._file.fileno(), data[done:], offset + done)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._file.close()
        assert kind is not None or not self._left, f"{self._left} bytes were announced and not written"


def save_floats(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """The library's file of contiguous fp32 tensors in the CPU's memory, none of which shares any with another.

    Its own function for torch makes sure of that and takes 60 us a tensor for it: of many small ones, longer than it
    takes to write them. Raises OSError.
    """
    assert all(one.dtype == torch.float32 and one.is_cpu and one.is_contiguous() for one in tensors.values())
    specs = {
        name: safetensors.TensorSpec(
            dtype="float32", shape=one.shape, data_ptr=one.data_ptr(), data_len=4 * one.numel()
        )
        for name, one in tensors.items()
    }
    try:
        safetensors.serialize_file(specs, path, metadata=metadata)
    except safetensors.SafetensorError as error:  # the system's answer is in its text only
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise


def plan_shards(entries: Iterable[Entry], max_bytes: int) -> list[tuple[str, list[Entry]]]:
    """(file name, entries) in order: a new file begins where `max_bytes` would be passed; one tensor is never cut."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    if len(shards) == 1:
        return [("model.safetensors", shards[0])]
    return [(f"model-{i:05d}-of-{len(shards):05d}.safetensors", shard) for i, shard in enumerate(shards, 1)]


def write_index(folder: Path, shards: list[tuple[str, list[Entry]]]) -> None:
    """The index that transformers and vLLM read; none for a single file."""
    if len(shards) == 1:
        return
    index: Mapping[str, Any] = {
        "metadata": {"total_size": sum(e.nbytes for _, shard in shards for e in shard)},
        "weight_map": {e.name: file for file, shard in shards for e in shard},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + os.linesep, encoding="utf-8")
