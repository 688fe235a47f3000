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
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from ft_ray import strict_yaml
from ft_ray.errors import RecipeError
from ft_ray.strict_yaml import dotted, nearest

__all__ = [
    "Adapter",
    "Batch",
    "Budget",
    "Checkpointing",
    "Columns",
    "Data",
    "Evaluation",
    "LoadedRecipe",
    "Model",
    "Optim",
    "Quantization",
    "Recipe",
    "Resources",
    "Schedule",
    "Sequence",
    "Serving",
    "Source",
    "Split",
    "Tracking",
    "duration_seconds",
    "load",
]

_DURATION = re.compile(r"^(\d+(?:\.\d+)?)(s|m|h)$")


def duration_seconds(text: str) -> float:
    """'90s', '10m' or '1.5h' in seconds; ValueError for anything else."""
    match = _DURATION.match(text)
    if not match:
        raise ValueError(f"{text!r} is not a duration like 90s, 10m or 1.5h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def _every(value: Any) -> Any:
    if isinstance(value, str) and value != "epoch":
        duration_seconds(value)
    elif isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("give a number of steps, a fraction of the run below 1, 'epoch', or a duration like 10m")
    elif isinstance(value, int | float) and (value <= 0 or (value >= 1 and value != int(value))):
        raise ValueError("steps are whole numbers from 1, fractions of the run lie between 0 and 1")
    return value


Every = Annotated[int | float | str, BeforeValidator(_every)]
"""How often: steps (50), a fraction of the run (0.1), 'epoch', or a duration ('10m')."""

Fraction = Annotated[float, Field(ge=0, lt=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(_Strict):
    """The base model."""

    id: str = Field(description="A folder, a hub id, or an s3:// or gs:// address of safetensors weights.")
    revision: str | None = Field(None, description="Hub revision; pin a commit for a run that can be repeated.")
    trust_remote_code: bool = Field(False, description="Runs Python from the model's repository. Needs a revision.")
    chat_template: str | None = Field(None, description="A Jinja file to use instead of the model's own template.")

    @model_validator(mode="after")
    def _pinned(self) -> Model:
        if self.trust_remote_code and not self.revision and not FilePath(self.id).exists():
            raise ValueError("trust_remote_code needs a pinned revision: set model.revision to a commit hash")
        return self


class Columns(_Strict):
    """Which column holds what. Dotted names reach into objects; `items[].x` makes one row an item."""

    messages: str | None = Field(None, description="Column with a list of role/content (or from/value) turns.")
    system: str | None = None
    prompt: str | None = None
    completion: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None


class Source(_Strict):
    """One file, folder or data set."""

    path: str = Field(description="File, folder, fsspec address, or the id of a Hugging Face data set.")
    format: Literal["auto", "jsonl", "json", "csv", "parquet", "hub", "saved"] = "auto"
    weight: float = Field(1.0, gt=0, description="Times each row is seen in an epoch; 0.1 draws a tenth.")
    subset: str | None = Field(None, description="Configuration name of a hub data set.")
    split: str = Field("train", description="Split of a hub data set.")
    columns: Columns | None = Field(None, description="Column map of this source; default: data.columns.")


class Split(_Strict):
    """Shares cut from train by a hash of the first user turn."""

    validation: Fraction = 0.1
    test: Fraction = 0.1

    @model_validator(mode="after")
    def _leaves_training(self) -> Split:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together leave no training rows; keep their sum below 1")
        return self


class Data(_Strict):
    """Examples and how they are read and split."""

    train: tuple[Source, ...] = Field(min_length=1, description="Sources, mixed by weight.")
    validation: tuple[Source, ...] = Field((), description="Given: used as it is, and not split from train.")
    test: tuple[Source, ...] = Field((), description="Likewise; measured once, at the end.")
    split: Split = Split()
    columns: Columns | None = None
    system: str | None = Field(None, description="System message put before rows that have none.")
    too_long: Literal["error", "drop"] = Field("drop", description="What happens to rows over sequence.max_length.")


class Adapter(_Strict):
    """LoRA (arXiv:2106.09685); unused by method full."""

    r: int = Field(16, ge=1, le=1024, description="Rank of the two small matrices.")
    alpha: float = Field(32, gt=0, description="The update is scaled by alpha/r.")
    dropout: Fraction = Field(0.05, description="On the adapter's input.")
    targets: str | tuple[str, ...] = Field("all-linear", description="'all-linear', 'attention', or module names.")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained too.")
    rslora: bool = Field(False, description="Scale by alpha/sqrt(r) (arXiv:2312.03732).")
    dora: bool = Field(False, description="Weight-decomposed LoRA (arXiv:2402.09353). vLLM serves it merged only.")


class Quantization(_Strict):
    """The 4-bit base of method qlora."""

    type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit NormalFloat or plain 4-bit float.")
    double: bool = Field(True, description="Quantize the quantization constants too (arXiv:2305.14314).")
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="auto: as precision.")


class Sequence(_Strict):
    """Length of rows, and whether they share a sequence."""

    max_length: int = Field(2048, ge=8, description="Tokens a row, prompt and answer together.")
    packing: bool = Field(False, description="Several rows a sequence, with attention kept apart.")


class Batch(_Strict):
    """Rows a step, and how they reach the device."""

    global_: int = Field(16, ge=1, alias="global", description="Rows (packed: sequences) an optimizer step.")
    per_device: int | Literal["auto"] = Field("auto", description="Rows a forward pass; accumulation follows.")

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Optim(_Strict):
    """The optimizer."""

    name: str = Field("adamw_torch", description="Any optimizer name of transformers, e.g. paged_adamw_8bit.")
    lr: float = Field(2e-4, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled; norms and biases are spared.")
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping by global norm; 0 turns it off.")


class Schedule(_Strict):
    """How long, and how the learning rate falls."""

    type: Literal["cosine", "linear", "constant"] = Field("cosine", description="After the warm-up, towards 0.")
    warmup: float = Field(0.03, ge=0, description="Below 1: fraction of the steps; from 1: steps.")
    epochs: float = Field(3, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(None, ge=1, description="Stops there even when epochs are left.")


class Evaluation(_Strict):
    """Validation while training, and the measurement of the result."""

    every: Every = Field("epoch", description="How often the validation loss is measured during training.")
    metric: str = Field("exact_match", description="exact_match, json_match, or file.py:function.")
    mode: Literal["max", "min"] = Field("max", description="Whether more or less of the metric is better.")
    early_stop: int | None = Field(None, ge=1, description="Stop after this many evaluations without a gain.")
    max_new_tokens: int = Field(256, ge=1)
    max_rows: int | None = Field(None, ge=1, description="Bound on the rows generated for, drawn with the seed.")
    few_shot: int = Field(3, ge=0, description="Training examples in the few-shot baseline's prompt; 0: none.")
    baselines: bool = Field(True, description="Also measure the base and the base with few-shot examples.")
    batch: int = Field(16, ge=1, description="Prompts generated together.")
    schema_: str | None = Field(None, alias="schema", description="JSON schema file that answers must satisfy.")
    forgetting: str | None = Field(None, description="General data; loss on it before and after training.")
    parity_kl: float = Field(0.02, gt=0, description="Gate: mean KL (nats) of the merged model to the adapter.")

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Checkpointing(_Strict):
    """Points that a run can go on from."""

    every: Every = Field("epoch", description="How often one is committed.")
    keep: int = Field(2, ge=1, description="The newest that are kept, besides the best.")


class Resources(_Strict):
    """What Ray is asked for."""

    workers: int = Field(1, ge=1, description="Training processes; they share out batch.global.")
    gpus: float | Literal["auto"] = Field("auto", description="GPUs a worker; auto: 1 where there is one, else 0.")
    cpus: int | Literal["auto"] = Field("auto", description="CPUs a worker.")
    retries: int = Field(3, ge=0, description="Times a lost worker is replaced before the run fails.")


class Budget(_Strict):
    """Limits of training; at a limit a run stops with a checkpoint."""

    hours: float | None = Field(None, gt=0, description="Hours of training.")
    usd: float | None = Field(None, gt=0, description="US dollars of training.")
    usd_per_hour: float | None = Field(
        None, gt=0, description="Price of all workers together; usd needs it or a GPU of known price."
    )


class Tracking(_Strict):
    """Where parameters and metrics are written."""

    to: tuple[Literal["mlflow", "wandb", "tensorboard"], ...] = Field(("mlflow",), description="Any of them.")
    uri: str | None = Field(None, description="MLflow server; default MLFLOW_TRACKING_URI, else sqlite in storage.")
    experiment: str = Field("ft-ray", description="Experiment in MLflow, project in Weights & Biases.")


class Serving(_Strict):
    """The endpoint."""

    replicas: int = Field(1, ge=0, description="Copies that always run; 0 scales to zero.")
    max_replicas: int = Field(1, ge=1, description="Copies at most, under load.")
    max_length: int | None = Field(None, ge=8, description="Context of the endpoint; default: the model's own.")
    temperature: float = Field(0.0, ge=0, description="Default of requests that set none; 0 is greedy.")


class Recipe(_Strict):
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
    precision: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="Of the computation.")
    gradient_checkpointing: bool = Field(True, description="Recompute activations: less memory, more time.")
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpointing = Checkpointing()
    resources: Resources = Resources()
    budget: Budget = Budget()
    tracking: Tracking = Tracking()
    serving: Serving = Serving()
    storage: str = Field("runs", description="Folder or s3:// or gs:// address that holds run folders.")
    promote: Literal["manual", "auto"] = Field("manual", description="auto: run promotes past the gates itself.")
    seed: int = Field(0, ge=0, description="Of data order, adapter weights, dropout and samples.")

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        per_device, workers = self.batch.per_device, self.resources.workers
        if self.batch.global_ % workers:
            raise ValueError(f"batch.global {self.batch.global_} does not divide among {workers} workers")
        if per_device != "auto" and (self.batch.global_ // workers) % per_device:
            raise ValueError(
                f"batch.global {self.batch.global_} is not workers {workers} x per_device {per_device} x accumulation"
            )
        return self

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


class LoadedRecipe(_Strict):
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
        raise RecipeError([f"{path}: cannot be read ({error.strerror}): check the path."]) from error
    document = strict_yaml.parse(text, str(path))
    if not isinstance(document.value, dict):
        raise RecipeError([f"{path}: a recipe is a mapping of keys to values; see ft-ray config schema."])
    origins = {
        dotted(where): f"{path}:{line}" for where, line in document.lines.items() if where
    }
    value, faults = document.value, []
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
        for known in [k for k in origins if k == key or k.startswith((f"{key}.", f"{key}["))]:
            del origins[known]
        origins |= {dotted((key, *inner)): "override" for inner in parsed.lines}
    if faults:
        raise RecipeError(faults)

    def where(loc: strict_yaml.Path) -> str:
        for end in range(len(loc), 0, -1):
            if origins.get(dotted(loc[:end])) == "override":
                return "override"
        return f"{path}:{document.line(loc) or 1}"

    return LoadedRecipe(recipe=from_dict(value, where), origins=origins)


def from_dict(value: Mapping[str, Any], where: Any = lambda loc: "recipe") -> Recipe:
    """Validates a plain mapping; `where(path)` names the place of a fault."""
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        raise RecipeError([_fault(e, where) for e in error.errors()]) from error


def _find(path: str | FilePath) -> FilePath:
    file = FilePath(path)
    if not file.exists() and file.suffix in ("", ".yaml") and file.parent == FilePath("."):
        shipped = FilePath(__file__).parent / "recipes" / f"{file.stem}.yaml"
        if shipped.exists():
            return shipped
    return file


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


def _fault(error: ErrorDetails, where: Any) -> str:
    # Unions add the name of the tried member to the location; keep only what is a key in the file.
    loc = tuple(p for p in error["loc"] if isinstance(p, int) or re.fullmatch(r"[a-z_]+", p))
    while loc and error["type"] != "extra_forbidden" and loc[-1] in ("int", "float", "str", "literal"):
        loc = loc[:-1]
    name = dotted(loc)
    place = where(loc)
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key {name!r}{nearest(str(loc[-1]), _keys_at(loc[:-1]))}."
    if error["type"] == "missing":
        return f"{place}: {name!r} is missing: add it."
    message = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error["input"], dict | list) or not name else f", not {error['input']!r}"
    subject = f"{name!r}: " if name else ""
    return f"{place}: {subject}{message[:1].lower()}{message[1:]}{given}."


def _keys_at(loc: strict_yaml.Path) -> Iterator[str]:
    schema: Any = Recipe.model_json_schema(by_alias=True)
    definitions = schema.get("$defs", {})

    def resolve(node: Any) -> Any:
        if "$ref" in node:
            return resolve(definitions[node["$ref"].rsplit("/", 1)[1]])
        for option in node.get("anyOf", []) + node.get("allOf", []):
            found = resolve(option)
            if "properties" in found or "items" in found:
                return found
        return node

    node = resolve(schema)
    for part in loc:
        node = resolve(node["items"] if isinstance(part, int) else node.get("properties", {}).get(part, {}))
    yield from node.get("properties", {})
