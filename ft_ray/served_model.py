"""A model that may be served: found in the registry or a folder, and proved to be what was trained.

Nothing here needs ray or vLLM. Weights must have the hashes recorded when they were committed, the chat template
and the end tokens those recorded at training; adapters must belong to the base.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from ft_ray.chat import Chat, load_tokenizer
from ft_ray.errors import InputError, ModelError
from ft_ray.manifest import key_of
from ft_ray.model_folder import read_json, read_record
from ft_ray.recipe_sections import SERVED_LENGTH
from ft_ray.registry import ModelVersion, Registry
from ft_ray.run_folder import read_recipe
from ft_ray.serve_args import Replicas, Sampling, ServeArgs
from ft_ray.storage import Store

__all__ = ["Served", "find", "split"]

logger = logging.getLogger("ft_ray")


@dataclass(frozen=True)
class Served:
    """`source`: address of the model folder; `adapters`: name -> address; `rank`: the largest r among them.

    `args` are resolved: replicas, sampling and engine.max_length are given. `tree_hash` and, by name, `adapter_hashes`
    are of the trees that were checked, for whoever fetches them later; a folder without a record has none.
    """

    name: str
    source: str
    version: int | None
    args: ServeArgs
    adapters: dict[str, str] = field(default_factory=dict)
    rank: int = 0
    tree_hash: str = ""
    adapter_hashes: dict[str, str] = field(default_factory=dict)


def split(address: str) -> tuple[Store, str]:
    """The store that holds a tree, and the tree's name in it."""
    parent, _, tree = address.rstrip("/").rpartition("/")
    return Store(parent or "."), tree


def find(args: ServeArgs) -> Served:
    """Resolves the model and checks it. Raises InputError, ModelError or StorageError; starts nothing."""
    registered: ModelVersion | None = None
    if args.model is not None:
        registered = Registry(args.storage, args.uri).resolve(args.model)
        store, tree = split(registered.source)
    else:
        store, tree = split(str(args.folder))
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
    _whole(store, tree)
    folder = store.local(tree)
    chat = Chat(load_tokenizer(folder, trust_remote_code=args.engine.trust_remote_code))
    trained = read_record(folder).get("template_hash") or (registered.template_hash if registered else None)
    _same_as_trained(chat, folder, trained, read_record(folder).get("eos_ids", []), str(folder))
    _say_if_computed_otherwise(args, folder)
    adapters, adapter_hashes, rank = _adapters(args, chat, folder)
    return Served(
        name=args.name or (registered.name if registered else tree),
        source=source,
        version=registered.version if registered else None,
        args=_resolved(args, store, tree),
        adapters=adapters,
        rank=rank,
        tree_hash=key_of(hashes) if hashes is not None else "",
        adapter_hashes=adapter_hashes,
    )


def _whole(store: Store, tree: str) -> None:
    if store.tree(tree) is not None and (faults := store.verify(tree)):
        raise ModelError(f"{faults[0]}: it was changed or damaged after training; make it again, or fetch it again.")


def _same_as_trained(chat: Chat, folder: Path, trained: str | None, ends: list[int], what: str) -> None:
    """The template and the end tokens in `folder` against those `what` was trained with, where they are known."""
    if trained and chat.template_hash != trained:
        raise ModelError(
            f"the chat template in {folder} (sha256 {chat.template_hash[:12]}…) is not the one {what} was trained with "
            f"({trained[:12]}…): answers would suffer; put the trained template back, or train again with this one."
        )
    given = read_json(folder / "generation_config.json").get("eos_token_id")
    given = given if given is not None else read_json(folder / "config.json").get("eos_token_id")
    stops = {int(i) for i in (given if isinstance(given, list) else [given] if given is not None else [])}
    missing = sorted(set(ends) - stops - {chat.tokenizer.eos_token_id})
    if missing:
        raise ModelError(
            f"{what} was trained to end answers with the tokens {missing}, but generation_config.json in {folder} "
            "does not stop at them: add them to eos_token_id."
        )
    extra = sorted(stops - set(ends) - {chat.tokenizer.eos_token_id}) if ends else []
    if extra:
        raise ModelError(
            f"generation_config.json in {folder} stops at the tokens {extra}, which were no ends of answers when "
            f"{what} was trained: answers would be cut there; take them out of eos_token_id, or train again with them."
        )


def _say_if_computed_otherwise(args: ServeArgs, folder: Path) -> None:
    """vLLM 0.29 takes float32 weights down to 16 bits by itself (`_resolve_auto_dtype`), with a line of its own log."""
    config = read_json(folder / "config.json")
    if args.engine.dtype == "auto" and "float32" in (config.get("dtype"), config.get("torch_dtype")):
        logger.warning(
            "the weights in %s are float32 and vLLM computes them in 16 bits where it can, so that answers may differ "
            "from those measured: engine.dtype float32 serves them as they are, at twice the memory.", folder,
        )  # fmt: skip


def _adapters(args: ServeArgs, chat: Chat, base: Path) -> tuple[dict[str, str], dict[str, str], int]:
    """Addresses, hashes of trees and largest rank of the adapters; each is checked against the base and against vLLM.

    What vLLM serves merged only is refused.
    """
    addresses: dict[str, str] = {}
    hashes: dict[str, str] = {}
    rank = 0
    if not args.adapters:
        return addresses, hashes, rank
    # PEFT and bitsandbytes take seconds to import, which every replica of a plain model would pay.
    from ft_ray.base_model import resolve
    from ft_ray.merging import check_fits
    from ft_ray.recipe import Model

    files = resolve(Model(id=str(base)))
    for name, address in args.adapters.items():
        store, tree = split(address)
        if (recorded := store.tree(tree)) is not None:
            hashes[name] = key_of(recorded)
        _whole(store, tree)
        folder = store.local(tree)
        check_fits(folder, files)
        config, record = read_json(folder / "adapter_config.json"), read_record(folder)
        unserved = [k for k in ("use_dora", "modules_to_save") if config.get(k)]
        unserved += ["bias"] if config.get("bias", "none") != "none" else []
        if unserved:
            raise ModelError(f"the adapter {name} uses {unserved[0]}, which vLLM serves merged only: merge it first.")
        _same_as_trained(chat, base, record.get("template_hash"), record.get("eos_ids", []), f"the adapter {name}")
        addresses[name] = store.address(tree)
        rank = max(rank, int(config.get("r", 8)), *(config.get("rank_pattern") or {}).values())
    return addresses, hashes, rank


def _resolved(args: ServeArgs, store: Store, tree: str) -> ServeArgs:
    """Fills what is not set from the recipe beside the tree, else from the defaults, and from the model's config."""
    serving = read_recipe(store).serving if store.exists("recipe.yaml") else None
    own = int(store.read_json(f"{tree}/config.json").get("max_position_embeddings") or SERVED_LENGTH)
    wanted = args.engine.max_length or (serving.max_length if serving else None) or min(own, SERVED_LENGTH)
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
