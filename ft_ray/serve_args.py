"""What can be set about an endpoint: the strict arguments of `ft_ray.serving:build` in a Ray Serve file.

Ray's own schemas let misspelt autoscaling and engine keys through; here every unknown key is refused with
the nearest valid name, and all faults are reported at once. Importing this costs neither ray nor vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ft_ray.errors import RecipeError
from ft_ray.strict_yaml import dotted, nearest

__all__ = ["EngineArgs", "Limits", "Replicas", "Sampling", "ServeArgs", "parse"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Limits(_Strict):
    """What one request may ask for. Concurrency is counted in each ingress replica (one by default)."""

    body_bytes: int = Field(1_000_000, ge=1_000)
    prompt_chars: int = Field(200_000, ge=1, description="Characters (or token ids) of messages, tools and documents.")
    max_tokens: int = Field(
        4096,
        ge=1,
        description="Most new tokens; also what a chat gets that names none (a plain completion gets 16, as OpenAI has "
        "it).",
    )
    n: int = Field(8, ge=1, description="Most answers a request: choices (n) times prompts, of a list of them.")
    concurrency: int = Field(256, ge=1, description="Requests at once; one more is refused with 429.")
    timeout: float = Field(600, gt=0, description="Seconds until a request is given up with 504.")
    body_timeout: float = Field(30, gt=0, description="Seconds a client has to send its request.")

    @property
    def at_the_door(self) -> float:
        """Seconds after which Ray's proxy ends a request (http_options.request_timeout_s): one that no ingress took, or
        that died with one. Whoever answers gives it up before.
        """
        return self.timeout + self.body_timeout + 10

    @property
    def draining(self) -> float:
        """Seconds that what is to stop has for the requests in progress: each may take the timeout."""
        return self.timeout + 10


class Replicas(_Strict):
    """Autoscaling of the model's replicas by requests in progress."""

    min: int = Field(1, ge=0, description="0: scales to zero; the first request waits for a replica.")
    max: int = Field(1, ge=1)
    target_ongoing: float = Field(16, gt=0, description="Requests in progress a replica that scaling aims at.")
    max_ongoing: int = Field(
        128,
        ge=1,
        description="Mode ingress: requests a replica takes at once; more wait in the ingress. In mode direct nothing "
        "waits: limits.concurrency is what a replica takes. Prefix routing goes by load where two replicas differ by "
        "more than an eighth of this.",
    )
    upscale_delay: float = Field(10, ge=0, description="Seconds of load before a replica is added.")
    downscale_delay: float = Field(300, ge=0)
    ingress: int = Field(1, ge=1, description="Replicas of the HTTP ingress; one saturates near 128 requests at once.")
    routing: Literal["load", "prefix"] = Field(
        "load",
        description="Which replica gets a request: by load, or the one whose cache holds how it begins, "
        "while no replica is far busier than another.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class EngineArgs(_Strict):
    """vLLM's settings that matter here. Sampling defaults and the chat template are the model's, not set here."""

    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto: a GPU where the cluster has one.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="auto: as the weights are, but float32 ones in 16 bits (vLLM's way; it is said); on a CPU that "
        "cannot multiply in 16 bits float32.",
    )
    max_length: int | None = Field(None, ge=8, description="Context in tokens; default: the recipe's, else 4096.")
    max_sequences: int = Field(128, ge=1, description="Sequences decoded together.")
    tensor_parallel: int = Field(1, ge=1, description="GPUs a replica.")
    gpu_memory: float = Field(0.9, gt=0, lt=1, description="Share of the GPU's memory that vLLM takes.")
    accelerator: str | None = Field(None, description="Ray's accelerator type, e.g. H100.")
    kv_cache_gib: float | None = Field(
        None,
        gt=0,
        description="Memory for keys and values; default: 1 on a CPU, what gpu_memory leaves on a GPU. Engines that "
        "start at once on one GPU need it: neither can measure what is free.",
    )
    threads: int | Literal["auto"] = Field("auto", description="CPU only: OpenMP threads; auto: all cores but one.")
    compiled: bool | None = Field(
        None, description="torch.compile before serving; default on a GPU. On a CPU it costs a minute for 10-30%."
    )
    max_adapters: int = Field(8, ge=1, description="Adapters in memory at once; others wait and are swapped in.")
    cache: str | None = Field(
        None,
        description="Folder for compiled kernels (vLLM's, Triton's, FlashInfer's): on a volume that outlives the "
        "replica, a compiled model starts in a fraction of the time. Only for folders that nobody else may write.",
    )
    loading: Literal["auto", "runai_streamer", "fastsafetensors"] = Field(
        "auto", description="How weights are read; the last two stream them and need the package of that name."
    )
    tool_parser: str | None = Field(
        None,
        description="vLLM's parser for the model's tool calls (hermes, llama3_json, ...); without one, requests with "
        "tools are refused.",
    )
    trust_remote_code: bool = False


class Sampling(_Strict):
    """What a request gets that sets nothing. Never taken silently from generation_config.json."""

    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)


class ServeArgs(_Strict):
    """One application. Give `model`, a registered name, or `folder`, a merged model folder or its address."""

    model: str | None = Field(None, description="NAME, NAME@champion or NAME@VERSION.")
    folder: str | None = Field(None, description="A model folder (local, NFS, s3://, gs://) without a registry.")
    adapters: dict[str, str] = Field(
        default_factory=dict,
        description="Name -> LoRA adapter folder or address, of this base; asked for as model: BASE:NAME.",
    )
    name: str | None = Field(None, description="Name that clients use; default: the registered name, or the folder's.")
    storage: str = Field("runs", description="Where the default registry is.")
    uri: str | None = Field(None, description="MLflow server; default MLFLOW_TRACKING_URI, else sqlite in storage.")
    keys: str | None = Field(None, description="File or address of hashed API keys; none: no key is asked for.")
    mode: Literal["ingress", "direct"] = Field(
        "ingress",
        description="ingress: adapters, scale to zero, retries, promotion without loss. direct: one merged model, "
        "HAProxy in front of its replicas, highest throughput.",
    )
    replicas: Replicas | None = Field(None, description="Default: the recipe's serving section.")
    engine: EngineArgs = EngineArgs()
    limits: Limits = Limits()
    sampling: Sampling | None = Field(None, description="Default: the recipe's serving section.")

    @model_validator(mode="after")
    def _one_source(self) -> ServeArgs:
        if (self.model is None) == (self.folder is None):
            raise ValueError("give either model (a registered name) or folder (a model folder)")
        bad = [name for name in self.adapters if not name or set(name) & set(":/@ ")]
        if bad:
            raise ValueError(f"adapter name {bad[0]!r} holds one of ': / @' or a space; use letters, digits, - and .")
        if self.mode == "direct":
            if self.adapters:
                raise ValueError("mode direct serves one merged model: leave adapters out, or use mode ingress")
            if self.replicas is not None and self.replicas.min == 0:
                raise ValueError("mode direct cannot scale to zero, since nothing queues: set replicas.min to 1")
        return self


def parse(args: Mapping[str, Any], where: str = "args") -> ServeArgs:
    """The arguments of an application. Raises RecipeError (an InputError) with every fault at once."""
    try:
        return ServeArgs.model_validate(dict(args))
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            loc = tuple(p for p in fault["loc"] if p not in ("int", "literal['auto']"))
            name = dotted(loc)
            if fault["type"] == "extra_forbidden":
                faults.append(f"{where}: unknown key {name!r}{nearest(str(loc[-1]), _keys(loc[:-1]))}.")
            else:
                message = fault["msg"].removeprefix("Value error, ")
                subject = f"{name!r}: " if name else ""
                faults.append(f"{where}: {subject}{message[:1].lower()}{message[1:]}.")
        raise RecipeError(faults) from error


def _keys(loc: tuple[Any, ...]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "replicas": Replicas, "engine": EngineArgs, "limits": Limits, "sampling": Sampling,
    }  # fmt: skip
    owner = sections.get(str(loc[0]), ServeArgs) if loc else ServeArgs
    return list(owner.model_fields)
