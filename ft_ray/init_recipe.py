"""`ft-ray init`: a commented recipe for the user's data, model and machine.

Format and columns come from the data (`dataset.detect`), lengths from the model's own tokenizer where the model
is a folder on this machine and from the number of bytes otherwise, the method from the size of the model and
the memory of the GPU. Every choice is written beside its value, for the user to judge and change.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from ft_ray import hub, model_shape, recipe, strict_yaml
from ft_ray.base_model import resolve
from ft_ray.chat import Chat, load_tokenizer
from ft_ray.dataset import Detected, Row, detect, read
from ft_ray.errors import DataError, InputError, ModelError
from ft_ray.init_sources import HELD, Place, column_map, held_out, lines_of, placed, quoted
from ft_ray.records import records
from ft_ray.row_faults import Faults
from ft_ray.sources import locate

__all__ = ["Draft", "Hardware", "draft", "hardware", "init"]

_log = logging.getLogger("ft_ray")
_LIMIT = 2000  # rows measured
_BYTES_A_TOKEN = 3.0  # English text has 4 to 4.5; too low a figure makes the length generous, not short
_TEMPLATE_TOKENS = 8  # marks around one message
_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_FEW_STEPS = 60  # optimizer steps of a run that learns something; more passes over few rows, up to ten, reach them
_ENOUGH_STEPS = 50  # optimizer steps an epoch below which packing would leave too few
_GIB = 2**30
_SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([BM])(?![A-Za-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class Hardware:
    """What training would run on. `memory` is the GPU's, or the machine's without one, in bytes."""

    gpu: str | None
    memory: int


@dataclass(frozen=True)
class Draft:
    """A new recipe, and for each of its sources the path, format, layout, columns, and whether those are guessed."""

    text: str
    sources: list[dict[str, Any]]


@dataclass(frozen=True)
class _Measure:
    """Tokens of the measured rows, sorted; tokens of the longest answer; whether counted or estimated."""

    lengths: list[int]
    answer: int
    counted: bool
    more: bool

    def covering(self, share: float) -> int:
        return self.lengths[min(len(self.lengths) - 1, math.ceil(share * len(self.lengths)) - 1)]


def hardware() -> Hardware:
    """The first GPU that torch sees, else the machine's memory."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        return Hardware(device.name, int(device.total_memory))
    return Hardware(None, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def init(data: list[str], model: str, name: str | None = None, *, machine: Hardware | None = None) -> str:
    """The text of a recipe for these data files and this model: `draft` says more."""
    return draft(data, model, name, machine=machine).text


def draft(data: list[str], model: str, name: str | None = None, *, machine: Hardware | None = None) -> Draft:
    """A recipe for these data files and this model. Reads at most 2,000 rows, and no weights.

    `machine` is what to choose for; default: this one. Data that no layout fits get a column map to fill in, a model
    that is not found a warning. Raises DataError for data that cannot be read, InputError
    for a name that cannot be one, RecipeError when the result would not be a recipe.
    """
    if not data:
        raise InputError("no data given: name a file with --data.")
    places = [placed(path) for path in data]
    found = [detect(place.source.path, split=place.source.split, stub=True) for place in places]
    base = _Base.of(model)
    measure = _measure(places, found, base.chat)
    text = _text(places, found, base, measure, machine or hardware(), name or _name_of(data[0], model))
    recipe.from_dict(strict_yaml.parse(text, "the new recipe").value)
    sources = [
        {"path": path, "format": kind.format, "layout": kind.layout, "columns": column_map(kind),
         "guessed": kind.columns is not None}
        for path, kind in zip(data, found, strict=True)
    ]  # fmt: skip
    return Draft(text, sources)


@dataclass(frozen=True)
class _Base:
    id: str
    parameters: float | None
    chat: Chat | None
    context: int | None

    @classmethod
    def of(cls, model: str) -> _Base:
        """What can be known of the model without its weights: of one on a hub, only config.json is fetched."""
        packaged = model.startswith("package:")
        folder = resolve(recipe.Model.model_validate({"id": model})).folder if packaged else Path(model).expanduser()
        local = folder.is_dir()
        if not local:
            found = None if "://" in model else _config_on_hub(model)
            if found is None:
                return cls(model, _parameters_in_name(model), None, None)
            folder = found
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder}/config.json cannot be read ({error}): give the folder of a model.") from error
        try:
            parameters: float | None = model_shape.read(config).parameters
        except ModelError:  # an architecture that the estimator does not know can still be trained
            parameters = _parameters_in_name(model)
        chat = Chat(load_tokenizer(folder)) if local else None
        return cls(model, parameters, chat, config.get("max_position_embeddings"))


def _config_on_hub(model: str) -> Path | None:
    """A folder with the model's config.json; None, said aloud, where there is no such model or it cannot be seen."""
    try:
        return hub.fetch_config(model)
    except ModelError as error:
        _log.warning("the model %s was not found, so the recipe goes by its name alone: %s", model, error)
        return None


def _parameters_in_name(model: str) -> float | None:
    """3e9 from 'org/Model-3B-Instruct', None where the name has no size."""
    match = _SIZE.search(PurePosixPath(model).name)
    return float(match[1]) * {"B": 1e9, "M": 1e6}[match[2].upper()] if match else None


def _name_of(data: str, model: str) -> str:
    words = [PurePosixPath(data.rstrip("/")).name.split(".")[0], PurePosixPath(model.rstrip("/")).name.split(":")[-1]]
    plain = re.sub(r"[^a-zA-Z0-9._-]+", "-", "-".join(words)).strip("-._").lower()
    return plain[:62] or "my-run"


# Measuring


def _measure(data: list[Place], found: list[Detected], chat: Chat | None) -> _Measure:
    lengths: list[int] = []
    answer, more = 1, False
    count = _counter(chat)
    for place, kind in zip(data, found, strict=True):
        if kind.fields:
            # Which columns will be the prompt and the answer is not known: all of them together is the most.
            sizes = [count(text) for text in islice(_texts(place.source), _LIMIT // len(data))]
            lengths += [size + 2 * _TEMPLATE_TOKENS for size in sizes]
            answer = max(answer, *sizes)
            continue
        rows = _usable(place.source, kind)
        for row in islice(rows, _LIMIT // len(data)):
            parts = [count(m["content"]) for m in row.messages]
            lengths.append(sum(parts) + _TEMPLATE_TOKENS * len(parts))
            answer = max(answer, parts[-1])
        more = more or next(rows, None) is not None
    if not lengths:
        raise DataError(f"no row of {_names(data)} can be used as it is: see the reasons with ft-ray data check.")
    return _Measure(sorted(lengths), answer, chat is not None, more)


def _counter(chat: Chat | None) -> Callable[[str], int]:
    if chat is None:
        return lambda text: math.ceil(len(text.encode("utf-8", "surrogatepass")) / _BYTES_A_TOKEN)
    tokenizer = chat.tokenizer
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _usable(source: recipe.Source, kind: Detected) -> Iterator[Row]:
    """The rows that can be read; `data check` names the others."""
    try:
        yield from read(source, kind.columns, quiet=True)
    except DataError:
        return


def _texts(source: recipe.Source) -> Iterator[str]:
    """All values of each row, for a file of unknown layout."""
    for file in locate(source):
        for record in records(file, Faults()):
            yield " ".join(map(str, record.value.values()))


# Choosing and writing


def _method(base: _Base, machine: Hardware) -> tuple[str, str]:
    """lora or qlora, and why. bf16 weights take 2 bytes a parameter; half as much again is kept for the rest."""
    memory = f"{machine.memory / _GIB:.0f} GiB"
    place = f"{machine.gpu} with {memory}" if machine.gpu else f"{memory}, no GPU"
    if base.parameters is None:
        return "qlora", f"the size of the model is not known here; QLoRA needs the least memory ({place})"
    millions = base.parameters / 1e6
    size = f"{millions / 1e3:.3g}B" if millions >= 1e3 else f"{millions:.0f}M" if millions >= 1 else f"{millions:.2g}M"
    needed = 3 * base.parameters + (4 if machine.gpu else 2) * _GIB
    if needed <= machine.memory:
        return "lora", f"{size} parameters fit in bf16 ({place})"
    return "qlora", f"{size} parameters would be tight in bf16 ({place})"


def _names(data: list[Place]) -> str:
    return ", ".join(map(str, data))


def _text(
    data: list[Place], found: list[Detected], base: _Base, measure: _Measure, machine: Hardware, name: str
) -> str:
    gpu = machine.gpu is not None
    held = held_out(data, found)
    method, why = _method(base, machine)
    longest = base.context or _LENGTHS[-1]
    fits = [length for length in _LENGTHS if length <= longest] or [longest]
    wanted = measure.covering(0.99)
    length = next((n for n in fits if n >= wanted), fits[-1])
    batch = 16 if gpu else 8
    packed_steps = sum(measure.lengths) / (length * batch)
    packing = gpu and packed_steps >= _ENOUGH_STEPS
    small = base.parameters is not None and base.parameters < 5e8
    # The usual 2e-4 is for billions of parameters. In a few steps it moves weights by less than bf16 can hold.
    rate = "1e-3                       # a small model bears it" if small else "2e-4"
    steps = math.ceil((1 if held else 0.8) * len(measure.lengths) / batch)
    epochs = min(10, max(3, math.ceil(_FEW_STEPS / steps)))
    few = f"   # {steps} steps an epoch: few rows need more passes" if epochs > 3 else ""
    checkpointing = "false   # small enough without" if small else "true    # less memory, about a third more time"
    metric, about = _metric(found)
    rows = f"{'at least ' if measure.more else ''}{len(measure.lengths):,} rows"
    how = "counted with the model's tokenizer" if measure.counted else "estimated from bytes, generously"
    answer = f"{measure.answer} token" + ("" if measure.answer == 1 else "s")
    new_tokens = min(4096, 2 ** math.ceil(math.log2(measure.answer + 8)))
    lines = [
        f"# Fine-tunes {base.id} on {rows} of {_names(data)}.",
        "# Written by ft-ray init; every value is yours to change.",
        "#",
        "#   ft-ray data check RECIPE     what the model will see, and what is wrong with the data",
        "#   ft-ray run RECIPE            train, merge, prove, evaluate; ends with a registered candidate",
        "",
        f"name: {quoted(name)}",
        "",
        "model:",
        f"  id: {quoted(base.id)}",
        *([] if base.chat else ["  # revision: COMMIT             # pin a commit, so that the run can be repeated"]),
        "",
        "data:",
        "  train:",
    ]
    for place, kind in zip(data, found, strict=True):
        lines += lines_of(place.source, kind)
    for use, sources in held.items():
        lines += [f"  {use}:", *sources]
    shares = ", ".join(f"{use}: 0.1" for use in HELD if use not in held)
    if shares:
        lines.append(f"  split: {{{shares}}}   # by a hash of the prompt: added rows move no row to another split")
    lines += [
        "",
        f"method: {method}                   # {why}",
        "lora:",
        "  r: 16",
        "  alpha: 32                      # the update is scaled by alpha / r",
        "  dropout: 0.05",
        "  targets: all-linear",
    ]
    if method == "qlora":
        lines += ["quantization: {type: nf4, double: true}"]
    lines += [
        "",
        "sequence:",
        f"  max_length: {length:<18} # 99 of 100 rows have at most {wanted} tokens ({how})",
        f"  packing: {str(packing).lower():<21} # {_why_packing(gpu, packing)}",
        "batch:",
        f"  global: {batch:<22} # rows an optimizer step",
        "  per_device: auto               # what fits; accumulation follows",
        "optim:",
        f"  name: {'paged_adamw_8bit' if gpu and method == 'qlora' else 'adamw_torch'}",
        f"  lr: {rate}",
        "  weight_decay: 0.01",
        f"schedule: {{type: cosine, warmup: 0.03, epochs: {epochs}}}{few}",
        "precision: bf16",
        f"gradient_checkpointing: {checkpointing}",
        "",
        "evaluation:",
        "  every: epoch",
        f"  metric: {metric:<22} # {about}",
        f"  max_new_tokens: {new_tokens:<14} # the longest answer seen has {answer}",
        "  early_stop: 2                  # evaluations without a gain",
        *([] if gpu else ["  max_rows: 200                  # generation is slow without a GPU"]),
        "checkpoint: {every: epoch, keep: 2}",
        "",
        "storage: runs",
        "promote: manual",
        "seed: 0",
        "",
    ]
    return "\n".join(lines)


def _why_packing(gpu: bool, packing: bool) -> str:
    if packing:
        return "short rows share a sequence, attention kept apart"
    return "too few rows: packed, an epoch would have too few steps" if gpu else "gains nothing without a GPU"


def _metric(found: list[Detected]) -> tuple[str, str]:
    """The metric that fits the example's answer, and what to say about it."""
    answers = [kind.example[-1]["content"] for kind in found if kind.example]
    if not answers:
        return "exact_match", "compares the whole answer"
    if all(isinstance(_parsed(answer), dict | list) for answer in answers):
        return "json_match", "the example's answer is JSON: compared as parsed, and per field"
    if all(len(answer.split()) <= 5 for answer in answers):
        return "exact_match", "answers look like labels"
    return "exact_match", "answers are free text, which this judges harshly: write your own as metrics.py:score"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
