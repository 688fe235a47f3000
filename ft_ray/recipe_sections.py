"""The sections of a recipe: one strict, frozen class for each mapping in the file. `recipe` puts them together."""

from __future__ import annotations

import re
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ft_ray.strict_yaml import nearest

__all__ = [
    "METRICS", "OPTIMIZERS", "Adapter", "Batch", "Budget", "Checkpointing", "Columns", "Data", "Evaluation", "Every",
    "General", "Harness", "Model", "Optim", "Quantization", "Resources", "Schedule", "Sequence", "Serving", "Source",
    "Split", "Strict", "Tracking", "duration_seconds",
]  # fmt: skip

_DURATION = re.compile(r"^(\d+(?:\.\d+)?)(s|m|h)$")


def duration_seconds(text: str) -> float:
    """'90s', '10m' or '1.5h' in seconds; ValueError for anything else."""
    match = _DURATION.match(text)
    if not match:
        raise ValueError(f"{text!r} is not a duration like 90s, 10m or 1.5h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def _duration(value: str) -> str:
    duration_seconds(value)
    return value


Duration = Annotated[str, AfterValidator(_duration)]


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

METRICS = ("exact_match", "json_match", "json_valid")
"""The built-in metrics, as `ft_ray.metrics` computes them; kept here because that module is slow to import."""

OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", "adamw_anyprecision",
    "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad", "adamw_bnb_8bit", "adamw_8bit",
    "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit",
    "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo", "adalomo", "grokadamw",
    "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd", "apollo_adamw", "apollo_adamw_layerwise",
    "stable_adamw",
)  # fmt: skip
"""The optimizers of transformers, for the same reason."""

_USUAL_NAMES = {
    "adam": "adamw_torch", "adamw": "adamw_torch", "adamw_hf": "adamw_torch", "paged_adamw": "paged_adamw_32bit",
}  # fmt: skip


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Model(Strict):
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


class Columns(Strict):
    """Which column holds what. Dotted names reach into objects; `items[].x` makes one row an item."""

    messages: str | None = Field(None, description="Column with a list of role/content (or from/value) turns.")
    system: str | None = None
    prompt: str | None = None
    completion: str | None = None
    instruction: str | None = None
    input: str | None = Field(None, description="Put below the prompt or instruction: its context.")
    output: str | None = None


class Source(Strict):
    """One file, folder or data set."""

    path: str = Field(description="File, folder, pattern (dir/*.jsonl), fsspec address, or id of a hub data set.")
    format: Literal["auto", "jsonl", "json", "csv", "parquet", "hub", "saved"] = "auto"
    weight: float = Field(1.0, gt=0, le=1000, description="Times each row is seen in an epoch; 0.1 draws a tenth.")
    subset: str | None = Field(None, description="Configuration name of a hub data set.")
    split: str = Field("train", description="Split of a hub data set, or of a saved one that has several.")
    revision: str | None = Field(None, description="Revision of a hub data set; pin a commit for data that stay.")
    columns: Columns | None = Field(None, description="Column map of this source; default: data.columns.")


class Split(Strict):
    """Shares cut from train by a hash of the first user turn."""

    validation: Fraction = 0.1
    test: Fraction = 0.1

    @model_validator(mode="after")
    def _leaves_training(self) -> Split:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together leave no training rows; keep their sum below 1")
        return self


class General(Strict):
    """General rows mixed into training against forgetting; they are in no validation or test split."""

    path: str = Field(description="As a source's. A fifth of its rows is kept aside to measure forgetting on.")
    share: float = Field(0.15, gt=0, le=0.5, description="Of an epoch's examples; 0.1 to 0.2 is usual.")
    columns: Columns | None = None


class Data(Strict):
    """Examples and how they are read and split."""

    train: tuple[Source, ...] = Field(min_length=1, description="Sources, mixed by weight.")
    validation: tuple[Source, ...] = Field((), description="Given: used as it is, and not split from train.")
    test: tuple[Source, ...] = Field((), description="Likewise; measured once, at the end.")
    split: Split = Split()
    columns: Columns | None = None
    system: str | None = Field(None, description="System message put before rows that have none.")
    too_long: Literal["error", "drop"] = Field("drop", description="What happens to rows over sequence.max_length.")
    fraction: float = Field(
        1.0, gt=0, le=1, description="Share of the training rows used, drawn by prompt; a larger one holds the smaller."
    )
    answers: Literal["any", "json"] = Field("any", description="json: training rows with another answer are left out.")
    general: General | None = Field(None, description="General data to mix in, against forgetting.")


class Adapter(Strict):
    """LoRA (arXiv:2106.09685); unused by method full."""

    r: int = Field(16, ge=1, le=1024, description="Rank of the two small matrices.")
    alpha: float = Field(32, gt=0, description="The update is scaled by alpha/r.")
    dropout: Fraction = Field(0.05, description="On the adapter's input.")
    targets: str | tuple[str, ...] = Field("all-linear", description="'all-linear', 'attention', or module names.")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained too.")
    rslora: bool = Field(False, description="Scale by alpha/sqrt(r) (arXiv:2312.03732).")
    dora: bool = Field(False, description="Weight-decomposed LoRA (arXiv:2402.09353). vLLM serves it merged only.")


class Quantization(Strict):
    """The 4-bit base of method qlora."""

    type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit NormalFloat or plain 4-bit float.")
    double: bool = Field(True, description="Quantize the quantization constants too (arXiv:2305.14314).")
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="auto: as precision.")


class Sequence(Strict):
    """Length of rows, and whether they share a sequence."""

    max_length: int = Field(2048, ge=8, description="Tokens a row, prompt and answer together.")
    packing: bool = Field(False, description="Several rows a sequence, with attention kept apart.")


class Batch(Strict):
    """Rows a step, and how they reach the device."""

    global_: int = Field(16, ge=1, alias="global", description="Rows (packed: sequences) an optimizer step.")
    per_device: int | Literal["auto"] = Field("auto", description="Rows a forward pass; accumulation follows.")


class Optim(Strict):
    """The optimizer."""

    name: str = Field("adamw_torch", description="Any optimizer name of transformers, e.g. paged_adamw_8bit.")
    lr: float = Field(2e-4, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled; norms and biases are spared.")
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping by global norm; 0 turns it off.")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in OPTIMIZERS:
            plain = re.sub(r"(?<=[a-z])(?=\d+bit)", "_", name.lower().replace("-", "_").replace("adam_w", "adamw"))
            meant = plain if plain in OPTIMIZERS else _USUAL_NAMES.get(plain)
            near = f" (did you mean {meant!r}?)" if meant else nearest(plain, OPTIMIZERS)
            raise ValueError(f"transformers has no such optimizer{near}")
        return name


class Schedule(Strict):
    """How long, and how the learning rate falls."""

    type: Literal["cosine", "linear", "constant"] = Field("cosine", description="After the warm-up, towards 0.")
    warmup: float = Field(0.03, ge=0, description="Below 1: fraction of the steps; from 1: steps.")
    epochs: float = Field(3, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(None, ge=1, description="Stops there even when epochs are left.")


class Harness(Strict):
    """Public benchmarks through lm-eval (the extra of that name). The data sets must be in its cache, or be fetched."""

    tasks: tuple[str, ...] = Field(min_length=1, description="Names as lm-eval ls tasks prints them.")
    include: str | None = Field(None, description="Folder with task files of your own, in lm-eval's YAML.")
    few_shot: int | None = Field(None, ge=0, description="Examples in the prompt; default: the task's own.")
    limit: int | None = Field(None, ge=1, description="Rows a task, for a quick look.")


class Evaluation(Strict):
    """Validation while training, and the measurement of the result."""

    every: Every = Field("epoch", description="How often the validation loss is measured during training.")
    metric: str = Field("exact_match", description="exact_match, json_match, json_valid, or file.py:function.")
    mode: Literal["max", "min"] = Field("max", description="Whether more or less of the metric is better.")
    early_stop: int | None = Field(None, ge=1, description="Stop after this many evaluations without a gain.")
    max_new_tokens: int = Field(256, ge=1)
    max_rows: int | None = Field(None, ge=1, description="Most rows generated for; the same for every seed.")
    few_shot: int = Field(3, ge=0, description="Training examples in the few-shot baseline's prompt; 0: none.")
    baselines: bool = Field(True, description="Also measure the base and the base with few-shot examples.")
    batch: int = Field(16, ge=1, description="Prompts generated together.")
    schema_: str | None = Field(None, alias="schema", description="JSON schema file that answers must satisfy.")
    forgetting: str | None = Field(None, description="General data; loss on it before and after training.")
    format_rows: int = Field(0, ge=0, description="Validation rows answered at each evaluation to see the format.")
    lm_eval: Harness | None = Field(None, description="Public benchmarks, base and tuned.")
    parity_kl: float = Field(0.02, gt=0, description="Gate: mean KL (nats) of the merged model to the adapter.")

    @field_validator("metric")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in METRICS and ".py" not in name:
            raise ValueError(f"unknown metric{nearest(name, METRICS)}: use a built-in one or file.py:function")
        return name


class Checkpointing(Strict):
    """Points that a run can go on from."""

    every: Every = Field("epoch", description="What a fault may cost at most; one is saved halfway too.")
    keep: int = Field(2, ge=1, description="The newest; the best, and the last that a good step followed, stay too.")
    snapshot: bool | Literal["auto"] = Field(
        "auto",
        description="Copy method full's state to host memory and write it while training goes on; auto: from a GPU, "
        "where host memory has room.",
    )


class Resources(Strict):
    """What Ray is asked for, and how method full is shared out."""

    workers: int = Field(1, ge=1, description="Training processes; they share out batch.global.")
    min_workers: int | None = Field(
        None, ge=1, description="On a cluster: as few do while machines are missing; default: workers."
    )
    sharding: Literal["auto", "zero3", "zero2", "zero1", "ddp"] = Field(
        "auto", description="What workers share of a full model: weights, gradients, optimizer, or nothing (ddp)."
    )
    offload_optimizer: bool = Field(False, description="Optimizer states of method full in host memory (ZeRO).")
    offload_parameters: bool = Field(False, description="Weights of method full in host memory (ZeRO-3).")
    gpus: float | Literal["auto"] = Field("auto", description="GPUs a worker; auto: 1 where there is one, else 0.")
    cpus: int | Literal["auto"] = Field("auto", description="CPUs a worker.")
    retries: int = Field(3, ge=0, description="Times a lost worker is replaced before the run fails.")
    timeout: Duration = Field("10m", description="A worker that does not answer for so long is replaced.")
    wait: Duration = Field("15m", description="How long a run waits for machines that the cluster does not have yet.")


class Budget(Strict):
    """Limits of training; at a limit a run stops with a checkpoint."""

    hours: float | None = Field(None, gt=0, description="Hours of training.")
    usd: float | None = Field(None, gt=0, description="US dollars of training.")
    usd_per_hour: float | None = Field(
        None, gt=0, description="Price of all workers together; usd needs it or a GPU of known price."
    )


class Tracking(Strict):
    """Where parameters and metrics are written."""

    to: tuple[Literal["mlflow", "wandb", "tensorboard"], ...] = Field(("mlflow",), description="Any of them.")
    uri: str | None = Field(None, description="MLflow server; default MLFLOW_TRACKING_URI, else sqlite in storage.")
    experiment: str = Field("ft-ray", description="Experiment in MLflow, project in Weights & Biases.")


SERVED_LENGTH = 4096
"""Tokens of context an endpoint has where neither recipe nor command line says more: long contexts take cache."""


class Serving(Strict):
    """The endpoint."""

    replicas: int = Field(1, ge=0, description="Copies that always run; 0 scales to zero.")
    max_replicas: int = Field(1, ge=1, description="Copies at most, under load.")
    max_length: int | None = Field(None, ge=8, description="Context; default: the model's own, at most 4096.")
    temperature: float = Field(0.0, ge=0, description="Default of requests that set none; 0 is greedy.")

    @model_validator(mode="after")
    def _room(self) -> Serving:
        if self.replicas > self.max_replicas:
            raise ValueError(
                f"replicas {self.replicas} is more than max_replicas {self.max_replicas}; raise max_replicas too"
            )
        return self
