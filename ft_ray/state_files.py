"""Training state on disk, independent of how many ranks wrote it: weights and optimizer states as flat fp32 pieces.

Every rank writes `state-RANK-of-WORKERS.safetensors` with the pieces that it owns, named KIND/PARAMETER@START: elements
from START of the flattened parameter, of kind `weight` or of an optimizer state such as `exp_avg`. Rank 0 adds
state.json with shapes, optimizer scalars and topology. A reader takes any range of any parameter out of whatever pieces
there are, so a run goes on with other workers or another sharding; nothing is pickled, nothing is held whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ft_ray.errors import ModelError, TrainingError
from ft_ray.safetensors_io import Entry, Reader, Writer

__all__ = ["INDEX", "WEIGHT", "Index", "Piece", "StateFiles", "unread", "write_index", "write_part"]

INDEX = "state.json"
WEIGHT = "weight"
_FORMAT = 1


@dataclass(frozen=True)
class Piece:
    """`count` elements of the flattened parameter `name`, from element `start`."""

    name: str
    start: int
    count: int


@dataclass(frozen=True)
class Index:
    """state.json: shapes of the trained parameters in the model's order, and what is the same on every rank.

    `scalars` are optimizer states that are one number ('step'); `kinds` those with a value for each element. `buffers`
    are the model's persistent buffers, in rank 0's file as `buffer/NAME`. `sharding` and `workers` tell who wrote it.
    """

    shapes: dict[str, list[int]]
    kinds: list[str]
    scalars: dict[str, float]
    optimizer: str
    sharding: str
    workers: int
    loss_scale: dict[str, float]
    buffers: list[str]
    format: int = _FORMAT


def write_part(
    folder: Path,
    rank: int,
    workers: int,
    pieces: Iterable[tuple[str, Piece]],
    read: Callable[[str, Piece], Iterable[torch.Tensor]],
    buffers: dict[str, torch.Tensor],
) -> None:
    """Writes one rank's file; `read(kind, piece)` returns its values in parts, one of which is in memory at a time."""
    todo = [(kind, piece) for kind, piece in pieces if piece.count]
    entries = [Entry(f"{kind}/{p.name}@{p.start}", torch.float32, (p.count,)) for kind, p in todo]
    entries += [Entry(f"buffer/{name}", value.dtype, tuple(value.shape)) for name, value in buffers.items()]
    with Writer(folder / _part(rank, workers), entries) as writer:
        for (kind, piece), entry in zip(todo, entries, strict=False):
            start = 0
            for part in read(kind, piece):
                writer.write_part(entry.name, start, part.detach().to("cpu", torch.float32))
                start += part.numel()
        for name, value in buffers.items():
            writer.write(f"buffer/{name}", value.detach().cpu())


def write_index(folder: Path, index: Index) -> None:
    (folder / INDEX).write_text(json.dumps(asdict(index), indent=1) + "\n", encoding="utf-8")


def _part(rank: int, workers: int) -> str:
    return f"state-{rank:05d}-of-{workers:05d}.safetensors"


def unread(names: Iterable[str], index: Mapping[str, Any], sharding: str, rank: int, workers: int) -> set[str]:
    """Files of a checkpoint that rank `rank` of `workers` does not read, given its state.json.

    ZeRO-3 shares every parameter out by the number of ranks alone: with the same number a rank reads its own part only.
    """
    if sharding != "zero3" or (index.get("sharding"), index.get("workers")) != (sharding, workers):
        return set()
    others = {_part(other, workers) for other in range(workers) if other != rank}
    if index.get("buffers"):
        others.discard(_part(0, workers))
    return others & set(names)


class StateFiles:
    """The state in a checkpoint folder. Use as a context manager.

    Parts may be missing: only what is read must be there. Raises TrainingError.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            values = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            if values.get("format") != _FORMAT:
                raise TrainingError(
                    f"{folder} has training state of format {values.get('format')}, this version reads {_FORMAT}: "
                    "go on with the version that wrote it."
                )
            self.index = Index(**values)
        except (OSError, ValueError, TypeError) as error:
            raise TrainingError(f"{folder / INDEX} cannot be read ({error}): remove that checkpoint.") from error
        paths = [folder / _part(rank, self.index.workers) for rank in range(self.index.workers)]
        self._missing = [path.name for path in paths if not path.exists()]
        try:
            self._reader = Reader(path for path in paths if path.exists())
        except ModelError as error:
            raise TrainingError(f"{error} It belongs to the checkpoint {folder}.") from error
        self._pieces: dict[tuple[str, str], list[tuple[int, Entry]]] = {}
        for entry in self._reader.entries.values():
            kind, _, rest = entry.name.partition("/")
            if kind != "buffer":
                name, _, start = rest.rpartition("@")
                self._pieces.setdefault((kind, name), []).append((int(start), entry))

    @staticmethod
    def within(folder: Path) -> bool:
        """Whether a checkpoint folder holds state of this kind."""
        return (folder / INDEX).exists()

    def read(self, kind: str, name: str, start: int = 0, count: int | None = None) -> torch.Tensor:
        """Elements [start, start + count) of the flattened parameter, fp32; count None: to its end."""
        total = math.prod(self.index.shapes[name])
        count = total - start if count is None else count
        out = torch.empty(count, dtype=torch.float32)
        filled = 0
        for begin, entry in self._pieces.get((kind, name), []):
            low, high = max(start, begin), min(start + count, begin + entry.shape[0])
            if low < high:
                out[low - start : high - start] = self._reader.read_part(entry.name, low - begin, high - low)
                filled += high - low
        if filled != count:
            lacks = f" and lacks {self._missing[0]}" if self._missing else ""
            raise TrainingError(
                f"{self.folder} has {filled} of {count} elements of {kind} of {name}{lacks}: remove that checkpoint, "
                "an earlier one is used then."
            )
        return out

    def buffer(self, name: str) -> torch.Tensor:
        return self._reader.read(f"buffer/{name}")

    def check(self, shapes: dict[str, Sequence[int]], optimizer: str) -> None:
        """Raises TrainingError when the state is of another model or another optimizer."""
        other = [n for n in {**self.index.shapes, **shapes} if self.index.shapes.get(n) != list(shapes.get(n, [-1]))]
        if other:
            raise TrainingError(
                f"the checkpoint {self.folder} does not fit this model ({len(other)} parameters differ, first: "
                f"{other[0]}): remove it to start again."
            )
        if self.index.optimizer != optimizer:
            raise TrainingError(
                f"the checkpoint {self.folder} has states of {self.index.optimizer}, this run steps with {optimizer}: "
                "go on with the optim.name and the kind of device that wrote it."
            )

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> StateFiles:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()
