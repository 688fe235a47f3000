"""The data of a new recipe: which split is trained on, which ones are held out, and the YAML of each source."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass

from ft_ray import strict_yaml
from ft_ray.dataset import Detected
from ft_ray.recipe import Source
from ft_ray.rows import FILL_IN
from ft_ray.sources import splits_of

__all__ = ["HELD", "Place", "column_map", "held_out", "lines_of", "placed", "quoted"]

_log = logging.getLogger("ft_ray")
HELD = {"validation": ("validation", "valid", "val", "dev", "eval"), "test": ("test",)}  # names of splits


@dataclass(frozen=True)
class Place:
    """Where training rows are, and the other splits of the data set that they are a part of."""

    source: Source
    others: list[str]

    def __str__(self) -> str:
        return self.source.path


def placed(path: str) -> Place:
    """The split to train on: `train`, else the first whose name begins so, or the only one, said aloud."""
    source = Source.model_validate({"path": path})
    splits = splits_of(source)
    split = next((name for name in splits if name == "train"), None)
    if split is None and splits:
        split = next((name for name in splits if name.startswith("train")), splits[0] if len(splits) == 1 else None)
        if split is not None:
            _log.warning("%s: no split 'train'; the rows of %r are for training", path, split)
            source = source.model_copy(update={"split": split})
    return Place(source, [name for name in splits if name != split])


def column_map(kind: Detected) -> dict[str, str] | None:
    """The column map that the recipe gets."""
    if kind.fields:
        return {"prompt": FILL_IN, "completion": FILL_IN}
    return kind.columns.model_dump(exclude_none=True) if kind.columns is not None else None


def held_out(data: list[Place], found: list[Detected]) -> dict[str, list[str]]:
    """The validation and test splits that data sets bring, as sources; other splits are said to be left out."""
    held: dict[str, list[str]] = {}
    for place, kind in zip(data, found, strict=True):
        left = list(place.others)
        suffix = place.source.split.removeprefix("train")  # train_sft goes with test_sft, else with test
        suffix = suffix if suffix[:1] in ("_", "-", ".") else ""
        for use, names in HELD.items():
            wanted = [name + suffix for name in names] + list(names)
            split = next((name for name in wanted if name in left), None)
            if split is not None:
                left.remove(split)
                held.setdefault(use, []).extend(lines_of(place.source.model_copy(update={"split": split}), kind))
                _log.info("%s: its split %s is data.%s", place, split, use)
        if left:
            _log.warning("%s: not used: its splits %s", place, ", ".join(left))
    return held


def lines_of(source: Source, kind: Detected) -> list[str]:
    """The YAML of one source of the recipe."""
    lines = [f"    - path: {quoted(source.path)}", f"      # {kind.format}, read as {kind.layout}"]
    if kind.fields:
        lines[1] = f"      # {kind.format}; no known layout: name the columns of prompt and answer here"
        names = ", ".join(" ".join(name.split()) for name in kind.fields[:12])
        lines.append(f"      columns: {{prompt: {FILL_IN}, completion: {FILL_IN}}}   # of: {names}")
    if kind.columns is not None:
        mapped = ", ".join(f"{k}: {quoted(v)}" for k, v in kind.columns.model_dump(exclude_none=True).items())
        lines.append(f"      columns: {{{mapped}}}   # guessed from the names: check it")
    if source.split != "train":
        lines.append(f"      split: {quoted(source.split)}")
    return lines


def quoted(text: str) -> str:
    """The text as a YAML scalar that reads back as the same string."""
    plain = re.fullmatch(r"[A-Za-z/][A-Za-z0-9/._-]*|[A-Za-z][A-Za-z0-9]*:[A-Za-z0-9/._-]+", text)
    return text if plain and strict_yaml.parse(text, "").value == text else json.dumps(text)
