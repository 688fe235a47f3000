"""Training rows that no good trial could learn: candidates for a wrong label, which only a sweep can tell cheaply.

One unlucky run leaves many rows badly fitted. Rows whose loss stays high whatever the rank, the learning rate and the
seed are another matter: most are mislabelled, contradict others or miss what the answer needs. (Loss over several
trainings as the sign of a wrong label: arXiv:1911.00068; over one training's epochs: arXiv:2009.10795.)
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ft_ray.errors import InputError
from ft_ray.segments import MicroBatch
from ft_ray.shared_base import AdapterConfig, SharedBase

__all__ = ["HardRow", "attach_folder", "hard_rows", "row_losses", "to_csv"]

_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class HardRow:
    """A row (number in the data), and its loss in each good trial: nats a trained token."""

    row: int
    losses: dict[str, float]

    @property
    def least(self) -> float:
        return min(self.losses.values())


def hard_rows(
    losses: Mapping[str, Sequence[float]], *, share: float = 0.05, above: float = 0.5, most: int = 200
) -> list[HardRow]:
    """Rows that every trial finds hard, hardest first: their least loss over the trials decides.

    losses: trial -> one mean token loss a row. In one trial a row is hard when it is in the top `share`, `above` nats
    over the median, and beyond Tukey's far fence, the third quartile plus three times the quartiles' distance
    (Exploratory Data Analysis, 1977); it counts when it is hard in all of them. Data without such rows give none.
    """
    if not losses:
        return []
    counts = {len(found) for found in losses.values()}
    if len(counts) != 1:
        raise InputError(f"trials have losses of {sorted(counts)} rows: measure all of them on the same rows.")
    limits = {}
    for trial, found in losses.items():
        known = sorted(loss for loss in found if math.isfinite(loss))
        if not known:
            return []
        cut = known[max(0, math.ceil(len(known) * (1 - share)) - 1)]
        low, middle, high = (known[int((len(known) - 1) * part)] for part in (0.25, 0.5, 0.75))
        limits[trial] = max(cut, middle + above, high + 3 * (high - low))
    hard = [
        HardRow(row, {trial: found[row] for trial, found in losses.items()})
        for row in range(counts.pop())
        if all(found[row] >= limits[trial] and math.isfinite(found[row]) for trial, found in losses.items())
    ]
    return sorted(hard, key=lambda one: (-one.least, one.row))[:most]


def to_csv(hard: Sequence[HardRow], rows: Any) -> str:
    """A CSV to relabel from: place, text and losses of each row. `rows` gives messages, file and line by row number."""
    text = io.StringIO()
    trials = list(hard[0].losses) if hard else []
    writer = csv.writer(text)
    writer.writerow(["file", "line", "prompt", "answer", "least_loss", *(f"loss_{trial}" for trial in trials)])
    for one in hard:
        row = rows[one.row]
        messages = row["messages"]
        prompt = "\n".join(_safe(m["content"]) for m in messages[:-1] if m["role"] != "system")
        values = [f"{one.losses[trial]:.4f}" for trial in trials]
        answer = _safe(messages[-1]["content"])
        writer.writerow([row["file"], row["line"], prompt, answer, f"{one.least:.4f}", *values])
    return text.getvalue()


def _safe(text: str) -> str:
    """A cell that a spreadsheet takes as text: a leading =, +, - or @ would make it a formula (OWASP CSV injection)."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def row_losses(
    shared: SharedBase, adapters: Sequence[str], tokens: Any
) -> Iterator[tuple[int, dict[str, list[float]]]]:
    """Yields (rows done, mean token loss of each adapter on the next rows), all adapters in one forward a batch.

    `tokens` has columns input_ids and labels, one example a row. A row without a trained token has loss NaN.
    """
    batch: list[tuple[list[int], list[int]]] = []
    size, longest = 0, 0
    for number in range(len(tokens)):
        row = tokens[number]
        batch.append((row["input_ids"], row["labels"]))
        longest = max(longest, len(row["input_ids"]))
        size = longest * len(batch) * max(1, len(adapters))
        if size >= _BATCH_TOKENS or number == len(tokens) - 1:
            found = shared.evaluate({name: MicroBatch.of(batch) for name in adapters})
            losses = {n: [s / c if c else math.nan for s, c in held.sequences] for n, held in found.items()}
            batch, longest = [], 0
            yield number + 1, losses


def attach_folder(shared: SharedBase, name: str, folder: Path, config: AdapterConfig) -> None:
    """Attaches the trained adapter of a PEFT folder, for measuring. InputError when `config` is not its own."""
    shared.attach(name, config)
    state = shared.state_dict(name)
    tensors = load_file(folder / "adapter_model.safetensors")
    for key in [k for k in state["tensors"] if k.startswith("weights.")]:
        layer, _, matrix = key.removeprefix("weights.").rpartition(".")
        stored = tensors.get(f"base_model.model.{layer}.lora_{matrix}.weight")
        if stored is None or stored.shape != state["tensors"][key].shape:
            shared.detach(name)
            raise InputError(f"{folder} is not the adapter of trial {name}: {layer} is missing or of another rank.")
        state["tensors"][key] = stored
    shared.load_state(name, state)
