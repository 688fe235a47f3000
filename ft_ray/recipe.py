"""The Recipe: one strict, frozen description of a fine-tuning run, and how it is read.

A recipe is YAML plus `key=value` overrides. Unknown keys are refused with the nearest valid name, all
faults of a file are reported at once with their lines, and every value remembers where it came from.
Importing this module imports neither torch nor ray.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from ft_ray import nvme, strict_yaml
from ft_ray.deepspeed_keys import check_deepspeed
from ft_ray.errors import RecipeError
from ft_ray.recipe_faults import Where, in_file, line_of, worded
from ft_ray.recipe_sections import (
    Adapter,
    Batch,
    Budget,
    Checkpointing,
    Columns,
    Data,
    Evaluation,
    Every,
    General,
    Harness,
    Model,
    Optim,
    Quantization,
    Resources,
    Schedule,
    Sequence,
    Serving,
    Source,
    Split,
    Strict,
    Tracking,
    duration_seconds,
)
from ft_ray.strict_yaml import dotted

__all__ = [
    "Adapter", "Batch", "Budget", "Checkpointing", "Columns", "Data", "Evaluation", "Every", "General", "Harness",
    "LoadedRecipe", "Model", "Optim", "Quantization", "Recipe", "Resources", "Schedule", "Sequence", "Serving",
    "Source", "Split", "Tracking", "duration_seconds", "from_dict", "load", "overridden", "place_of",
]  # fmt: skip

_RECIPES = FilePath(__file__).parent / "recipes"


class Recipe(Strict):
    """One fine-tuning run. `ft-ray config schema` prints this as JSON schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$", description="Names the run and the model.")
    model: Model
    data: Data
    method: Literal["full", "lora", "qlora"] = Field(
        "lora", description="All weights, an adapter on the base, or an adapter on a 4-bit base."
    )
    lora: Adapter = Adapter()
    quantization: Quantization = Quantization()
    sequence: Sequence = Sequence()
    batch: Batch = Batch()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="Of the computation. A CPU that cannot multiply in 16 bits computes in float32 and says so."
    )
    gradient_checkpointing: bool = Field(True, description="Recompute activations: less memory, more time.")
    fused_kernels: bool | Literal["auto"] = Field(
        "auto",
        description="LoRA and QLoRA on a GPU: the adapter's update in one product, Liger's norms and MLPs, and "
        "attention row by row where rows are packed. Faster, and less memory; Liger's need the extra gpu. auto: with "
        "bf16, and Liger's on an NVIDIA GPU of compute capability 8.0 or more, for a family that they know.",
    )
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpointing = Checkpointing()
    resources: Resources = Resources()
    deepspeed: dict[str, Any] = Field(
        {},
        description="More of DeepSpeed's own configuration for method full, e.g. NVMe for optimizer states; checked.",
    )
    budget: Budget = Budget()
    tracking: Tracking = Tracking()
    serving: Serving = Serving()
    storage: str = Field("runs", description="Folder or s3:// or gs:// address that holds run folders.")
    promote: Literal["manual", "auto"] = Field("manual", description="auto: run promotes past the gates itself.")
    seed: int = Field(0, ge=0, description="Of data order, adapter weights, dropout and samples.")

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        faults = [message for _, message in _misfits(self)]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @field_validator("deepspeed")
    @classmethod
    def _checked(cls, values: dict[str, Any]) -> dict[str, Any]:
        check_deepspeed(values)
        return values

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage (arXiv:1910.02054) of this run; 0: every worker holds everything."""
        asked = self.resources.sharding
        if asked == "auto":
            return 3 if self.method == "full" and self.resources.workers > 1 else 0
        return int(asked.removeprefix("zero")) if asked.startswith("zero") else 0

    def by(self, workers: int) -> Recipe:
        """The same run by another number of workers, who share out as much of the model."""
        fixed = {"sharding": f"zero{self.zero_stage}"} if self.zero_stage else {}
        resources = self.resources.model_copy(update={"workers": workers, **fixed})
        return self.model_copy(update={"resources": resources})

    @property
    def fuses(self) -> bool:
        """Whether fused kernels are wanted of a GPU that has them. auto asks for bf16: what they were measured with."""
        asked = self.fused_kernels is True or (self.fused_kernels == "auto" and self.precision == "bf16")
        return asked and self.method != "full"

    @classmethod
    def load(cls, path: str | FilePath, overrides: Iterable[str] = ()) -> Recipe:
        """The recipe in a file with `key=value` overrides applied. Raises RecipeError."""
        return load(path, overrides).recipe

    @property
    def run_path(self) -> str:
        """The run's folder: storage/name."""
        return f"{self.storage.rstrip('/')}/{self.name}"

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)

    @property
    def hash(self) -> str:
        """SHA-256 over the resolved values; equal for recipes that mean the same."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _misfits(recipe: Recipe) -> Iterator[tuple[tuple[strict_yaml.Path, ...], str]]:
    """(keys, what is wrong) where values are right each by itself and do not fit together."""
    method, batch, resources = recipe.method, recipe.batch, recipe.resources
    rows, per_device, workers = batch.global_, batch.per_device, resources.workers
    sizes: tuple[strict_yaml.Path, ...] = (("batch", "global"), ("resources", "workers"), ("batch", "per_device"))
    fewest = resources.min_workers or workers
    if fewest > workers:
        message = f"resources.min_workers {fewest} is more than workers {workers}"
        yield (("resources", "min_workers"), ("resources", "workers")), message
    if resources.min_workers and recipe.budget.usd is not None:
        yield (
            (("resources", "min_workers"), ("budget", "usd")),
            "budget.usd is counted for all workers and resources.min_workers lets fewer work: set budget.hours instead",
        )
    for count in range(workers, fewest - 1, -1):
        if rows % count:
            yield sizes[:2], f"batch.global {rows} does not divide among {count} workers"
        elif per_device != "auto" and (rows // count) % per_device:
            yield sizes, f"batch.global {rows} is not workers {count} x per_device {per_device} x accumulation"
    if recipe.fused_kernels is True and method == "full":
        yield (("fused_kernels",), ("method",)), "fused_kernels are for method lora and qlora: leave the key out"
    sharding: strict_yaml.Path = ("resources", "sharding")
    asked = resources.sharding if resources.sharding.startswith("zero") else "deepspeed"
    if method != "full" and (asked != "deepspeed" or recipe.deepspeed):
        yield (
            (sharding if asked != "deepspeed" else ("deepspeed",), ("method",)),
            f"{asked} shards the weights of method full; an adapter is small and its base frozen, so method "
            f"{method} copies both to every worker: leave resources.sharding at auto and deepspeed out",
        )
        return
    if recipe.zero_stage == 0 and (resources.offload_optimizer or recipe.deepspeed):
        yield (
            (("resources", "offload_optimizer") if resources.offload_optimizer else ("deepspeed",), sharding,
             ("method",)),
            "resources.offload_optimizer and deepspeed need method full with ZeRO: set resources.sharding to zero3",
        )  # fmt: skip
    if recipe.zero_stage < 3 and resources.offload_parameters:
        yield (
            (("resources", "offload_parameters"), sharding, ("method",)),
            "resources.offload_parameters needs ZeRO-3: set resources.sharding to zero3",
        )
    if nvme.path_of(recipe.deepspeed) is not None:
        yield from _nvme_misfits(recipe)


def _nvme_misfits(recipe: Recipe) -> Iterator[tuple[tuple[strict_yaml.Path, ...], str]]:
    """What cannot be had of optimizer states that lie on NVMe."""
    key: strict_yaml.Path = ("deepspeed", "zero_optimization", "offload_optimizer")
    if recipe.zero_stage < 3:
        yield (key, ("resources", "sharding")), "offload to NVMe needs ZeRO-3: set resources.sharding to zero3"
    if recipe.optim.name == "adagrad":  # DeepSpeed makes its sums anew from weights that are swapped out already
        yield (key, ("optim", "name")), "offload to NVMe cannot keep adagrad's states: use optim.name adamw_torch"
    if recipe.checkpoint.snapshot is True:
        yield (
            (("checkpoint", "snapshot"), key),
            "checkpoint.snapshot: true copies a state that is in memory, and this one is on NVMe: leave it at auto",
        )


class LoadedRecipe(Strict):
    """A recipe with the origin of every value: 'file:line', 'override', or absent for a default."""

    recipe: Recipe
    origins: dict[str, str]


def load(path: str | FilePath, overrides: Iterable[str] = ()) -> LoadedRecipe:
    """Reads a recipe file and applies `key=value` overrides (dotted keys). Raises RecipeError.

    A bare name finds a shipped recipe: `load("qlora_demo")`.
    """
    file = _find(path)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError([f"{path}: not UTF-8 text (byte {error.start}): save the recipe as UTF-8."]) from error
    except OSError as error:
        known = strict_yaml.nearest(file.stem, _shipped()) if file.parent == FilePath(".") else ""
        raise RecipeError([f"{path}: cannot be read ({error.strerror}): check the path{known}."]) from error
    doubled: list[str] = []
    document = strict_yaml.parse(text, str(path), doubled)
    if not isinstance(document.value, dict):
        raise RecipeError([f"{path}: a recipe is a mapping of keys to values; see ft-ray config schema."])
    origins = {
        dotted(where): f"{path}:{line}" for where, line in document.lines.items() if where
    }
    value, faults = document.value, list[str]()
    for key, parsed in _overrides(value, overrides, faults):
        for known in [k for k in origins if k == key or k.startswith((f"{key}.", f"{key}["))]:
            del origins[known]
        origins |= {dotted((key, *inner)): "override" for inner in parsed.lines}

    def where(loc: strict_yaml.Path) -> str:
        for end in range(len(loc), 0, -1):
            if origins.get(dotted(loc[:end])) == "override":
                return "override"
        inside = [place for key, place in origins.items() if key.startswith(f"{dotted(loc)}.")] if loc else []
        if inside and all(place == "override" for place in inside):  # a section that no line of the file begins
            return "override"
        return f"{path}:{document.line(loc) or 1}"

    try:
        recipe = from_dict(value, where)
    except RecipeError as error:
        raise RecipeError([*faults, *sorted([*doubled, *error.faults], key=line_of)]) from error
    if faults or doubled:
        raise RecipeError([*faults, *doubled])
    _origins[recipe.hash] = origins
    return LoadedRecipe(recipe=recipe, origins=origins)


_origins: dict[str, dict[str, str]] = {}
"""Of the recipes that this process has read, by hash: checks that need more than the file name its lines too."""


def place_of(recipe: Recipe, key: str) -> str:
    """'file:line' or 'override' of a dotted key, or of the section it stands in; '' for what no file says."""
    origins = _origins.get(recipe.hash, {})
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return origins.get(key, "")


def from_dict(value: Mapping[str, Any], where: Where = lambda loc: "recipe") -> Recipe:
    """Validates a plain mapping; `where(path)` names the place of a fault."""
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        errors = error.errors()
        fields = [e for e in errors if e["loc"] or e["type"] != "value_error"]
        schema = Recipe.model_json_schema(by_alias=True)
        together = _together(value, [in_file(e, value)[0] for e in fields], where)
        raise RecipeError(sorted([*worded(fields, value, where, schema), *together], key=line_of)) from error


def _together(value: Any, bad: list[strict_yaml.Path], where: Where) -> Iterator[str]:
    """The misfits among the values that are right by themselves: all that is wrong is said at once."""
    if not isinstance(value, Mapping):
        return
    read = ("method", "batch", "resources", "deepspeed", "optim", "checkpoint", "budget")
    sections = {k: value[k] for k in read if k in value}
    for loc in bad:
        inner = sections.get(str(loc[0])) if loc else None
        if len(loc) > 1 and isinstance(inner, Mapping):
            sections[str(loc[0])] = {k: v for k, v in inner.items() if k != loc[1]}
        elif loc:
            sections.pop(str(loc[0]), None)
    try:
        types: dict[str, Any] = {k: Recipe.model_fields[k].annotation for k in sections}
        right = {k: TypeAdapter(types[k]).validate_python(v) for k, v in sections.items()}
    except ValidationError:
        return
    recipe = Recipe.model_construct(None, **right)
    for keys, message in _misfits(recipe):
        if not any(key[: len(loc)] == loc for key in keys for loc in bad if loc):
            there = [key for key in keys if _has(value, key)]
            yield f"{where(there[0] if there else keys[0])}: {message}."


def _has(value: Any, path: strict_yaml.Path) -> bool:
    for part in path:
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True


def overridden(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """The recipe with `key=value` overrides. Raises RecipeError."""
    value, faults = recipe.to_dict(), list[str]()
    for _ in _overrides(value, overrides, faults):
        pass
    if faults:
        raise RecipeError(faults)
    return from_dict(value, lambda loc: "override")


def _overrides(
    value: dict[str, Any], overrides: Iterable[str], faults: list[str]
) -> Iterator[tuple[str, strict_yaml.Document]]:
    """Assigns each `key=value` and yields it parsed; what cannot be assigned is added to `faults`."""
    for override in overrides:
        key, equals, raw = override.partition("=")
        if not equals or not key:
            faults.append(f"override {override!r}: write key=value, for example optim.lr=1e-4.")
            continue
        try:
            parsed = strict_yaml.parse(raw, f"override {key}")
            _assign(value, key.strip(), parsed.value)
        except (RecipeError, ValueError) as error:
            faults.append(f"override {override!r}: {error}")
            continue
        yield key, parsed


def _find(path: str | FilePath) -> FilePath:
    file = FilePath(path)
    if not file.exists() and file.suffix in ("", ".yaml") and file.parent == FilePath("."):
        shipped = _RECIPES / f"{file.stem}.yaml"
        if shipped.exists():
            return shipped
    return file


def _shipped() -> list[str]:
    return [shipped.stem for shipped in _RECIPES.glob("*.yaml")]


def _assign(value: dict[str, Any], key: str, new: Any) -> None:
    target: Any = value
    parts: list[str | int] = [int(p) if p.isdigit() else p for p in re.findall(r"[^.\[\]]+", key)]
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        if isinstance(target, dict):
            part = str(part)
            if following is None:
                target[part] = new
            elif not isinstance(target.get(part), dict | list):
                target[part] = {}
            target = target[part]
        elif isinstance(target, list) and isinstance(part, int) and part < len(target):
            if following is None:
                target[part] = new
            target = target[part]
        else:
            raise ValueError(f"{key} does not lead anywhere in this recipe.")
