"""Training checkpoints below `checkpoints/` of a run folder: upload by rank, one commit, find, retain.

A checkpoint is a folder `KEY-step-00000123-ATTEMPT`. Every rank puts its own files there (see `upload`); when all
have, one process writes the commit record with the hashes, and only a folder with one is a checkpoint. KEY is a
hash of what the weights depend on (base, data, method, schedule, seed): checkpoints of another recipe under
the same name are left alone. Ray's own records are kept out of the run folder
(train_control.ray_records): a cut-off one would make a run unresumable.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ft_ray.consolidate import consolidate
from ft_ray.errors import DamagedError, StorageError
from ft_ray.local_files import files_below, hash_file
from ft_ray.manifest import key_of
from ft_ray.recipe import Recipe
from ft_ray.state_files import StateFiles
from ft_ray.storage import COMMIT, Store, cache_dir

__all__ = [
    "FOLDER",
    "Found",
    "Sent",
    "clean",
    "commit",
    "drop",
    "export_tree",
    "fetch",
    "find",
    "forget",
    "key",
    "name",
    "others",
    "retain",
    "step_of",
    "tell_damaged",
    "upload",
]

logger = logging.getLogger("ft_ray")

FOLDER = "checkpoints"
_PROGRESS = "progress.json"
_NO_RECORD = (FileNotFoundError, NotADirectoryError, ValueError)
_RESUMES = ("optimizer", "rng_state", "scaler", "scheduler")  # files that say nothing of the weights
_TOKENIZER = ("tokenizer", "special_tokens", "vocab", "merges", "added_tokens", "spiece", "tekken")


@dataclass(frozen=True)
class Found:
    """A committed checkpoint: its name, step, and progress.json as it was written."""

    name: str
    step: int
    progress: dict[str, Any]

    @property
    def relative(self) -> str:
        return f"{FOLDER}/{self.name}"


def key(recipe: Recipe, base_hash: str, data: Any) -> str:
    """What a checkpoint's weights depend on, as 8 hex digits. The number of workers does not count."""
    parts = recipe.to_dict()
    counts = ("method", "lora", "quantization", "sequence", "optim", "schedule", "precision", "seed")
    kept = {k: parts[k] for k in counts}
    return key_of(base_hash, data, kept, recipe.batch.global_)[:8]


def name(key: str, step: int, attempt: str) -> str:
    return f"{key}-step-{step:08d}-{attempt}"


class Sent(NamedTuple):
    """What a rank has put into a checkpoint: its files' hashes and sizes in bytes. Ray writes it as JSON."""

    hashes: dict[str, str]
    sizes: dict[str, int]


def upload(
    store: Store, folder: Path, checkpoint: str, trying: Callable[[Callable[[], None]], None] = lambda put: put()
) -> Sent:
    """Moves one rank's files from local `folder` to the checkpoint. Raises StorageError.

    `trying` runs the upload of one file, as often as it sees fit.
    """
    sent = Sent({}, {})
    for path in files_below(folder):
        relative = path.relative_to(folder).as_posix()
        sent.hashes[relative], sent.sizes[relative] = hash_file(path), path.stat().st_size
        trying(functools.partial(store.put, path, f"{FOLDER}/{checkpoint}/{relative}", lasting=True))
    return sent


def commit(store: Store, checkpoint: str, parts: Collection[Sent]) -> None:
    """Makes the checkpoint exist, once every rank's files are in place: what each of them has sent."""
    hashes = {path: digest for part in parts for path, digest in part.hashes.items()}
    sizes = {path: size for part in parts for path, size in part.sizes.items()}
    store.mark_committed(f"{FOLDER}/{checkpoint}", hashes, sizes)


def find(store: Store, key: str, *, without: Collection[str] = (), contents: bool = False) -> Found | None:
    """The newest checkpoint of `key` whose files are all there in their recorded sizes, none of those in `without`.

    Files are not read, since they are large and most of them are other ranks': whoever uses some compares them with
    their hashes (`fetch`). `contents`: all are read and compared here.
    Raises StorageError where the storage cannot be asked.
    """
    for candidate in _committed(store, key):
        if candidate in without:
            continue
        place = f"{FOLDER}/{candidate}"
        try:
            faults = store.survey(place)
            if contents and not faults:
                store.local(place, place=_downloads(store, key) / candidate)
        except DamagedError as error:
            faults = [str(error)]
        if faults:
            tell_damaged(candidate, faults[0])
            continue
        try:
            progress = store.read_json(f"{place}/{_PROGRESS}")
        except StorageError as error:
            if not isinstance(error.__cause__, _NO_RECORD):
                raise
            tell_damaged(candidate, str(error))
            continue
        return Found(candidate, step_of(candidate), progress)
    return None


def tell_damaged(checkpoint: str, fault: str) -> str:
    """Logs what is wrong with it and returns the sentence."""
    said = f"checkpoint {checkpoint} is damaged ({fault.rstrip('.')}): falling back to an earlier one."
    logger.warning(said)
    return said


def fetch(store: Store, checkpoint: str, without: Collection[str] = ()) -> Path:
    """A checkpoint's files but those in `without`, in a local folder and equal to their hashes.

    From remote storage they are downloaded, each once for all processes of a machine; downloads of the run's other
    checkpoints go. Raises DamagedError; StorageError where the storage fails.
    """
    downloads = _downloads(store, checkpoint.partition("-step-")[0])
    if not store.is_local and downloads.exists():
        for old in downloads.iterdir():
            if old.name != checkpoint:
                shutil.rmtree(old, ignore_errors=True)
    return store.local(f"{FOLDER}/{checkpoint}", without, place=downloads / checkpoint)


def forget(store: Store, key: str) -> None:
    """Removes what this machine has downloaded of a run's checkpoints, if anything: no rank may be about to read it."""
    if not store.is_local:
        shutil.rmtree(_downloads(store, key), ignore_errors=True)


def _downloads(store: Store, key: str) -> Path:
    """Where this machine keeps what it has downloaded of a run's checkpoints."""
    return cache_dir() / "checkpoints" / f"{key}-{hashlib.sha256(store.address().encode()).hexdigest()[:12]}"


def others(store: Store, checkpoint: str, rank: int) -> set[str]:
    """The files of a committed checkpoint that are other ranks' alone, whoever goes on from it: their RNG states.

    The trainer's name for that of a rank is `rng_state_RANK.pth`, and of the only one `rng_state.pth`.
    """
    names = store.tree(f"{FOLDER}/{checkpoint}") or {}
    mine = (f"rng_state_{rank}.pth", "rng_state.pth")
    return {name for name in names if name.startswith("rng_state") and name not in mine}


def retain(
    store: Store, key: str, *, keep: int, best: str | None, newest: str | None = None, proven: str | None = None
) -> list[str]:
    """Removes all checkpoints of `key` but the newest `keep`, the best and `proven`. Returns what was removed.

    `proven` is the last one that a step with finite numbers followed: the newest may hold weights that diverge.
    `newest` is the one just committed. What lies after it was there before it, damaged: training had to go on from
    an earlier one. It counts for nothing and goes.

    The commit record goes first, so that a checkpoint is never seen in part. Folders without one are orphans
    of a killed worker, and go too; those that ranks may be filling now stay (see `clean`).
    """
    committed = _committed(store, key)
    first = committed.index(newest) if newest in committed else 0
    removed = []
    for candidate in committed[:first] + committed[first + keep :]:
        if candidate not in (best, proven):
            drop(store, candidate)
            removed.append(candidate)
    return removed + clean(store, key, newest=newest)


def drop(store: Store, checkpoint: str) -> None:
    """Removes one, its record first. Raises StorageError."""
    store.remove(f"{FOLDER}/{checkpoint}/{COMMIT}")
    store.remove(f"{FOLDER}/{checkpoint}")


def clean(store: Store, key: str, *, newest: str | None = None) -> list[str]:
    """Removes folders of `key` without a commit record.

    `newest` is the checkpoint just committed, while training goes on: what the same attempt writes after it is
    on its way, since a rank sends one after the other. Without it no rank may be saving.
    """
    committed = set(_committed(store, key))
    orphans = [n for n in store.list(FOLDER) if n.startswith(f"{key}-step-") and n not in committed]
    if newest is not None:
        step, attempt = step_of(newest), newest.rsplit("-", 1)[1]
        orphans = [n for n in orphans if n.rsplit("-", 1)[1] != attempt or step_of(n) < step]
    for orphan in orphans:
        store.remove(f"{FOLDER}/{orphan}")
    return orphans


def _committed(store: Store, key: str) -> list[str]:
    """Names of committed checkpoints, newest first: by step, then by time of commit.

    Raises StorageError where a record may be there and cannot be read: taken for an orphan, it would be removed.
    """
    found = []
    for candidate in store.list(FOLDER):
        if not candidate.startswith(f"{key}-step-"):
            continue
        try:
            record = store.read_json(f"{FOLDER}/{candidate}/{COMMIT}")
        except StorageError as error:
            if not isinstance(error.__cause__, _NO_RECORD):
                raise
            continue
        with contextlib.suppress(KeyError, TypeError, ValueError):
            found.append((step_of(candidate), float(record["committed"]), candidate))
    return [candidate for _, _, candidate in sorted(found, reverse=True)]


def step_of(checkpoint: str) -> int:
    """The optimizer step in a checkpoint's name."""
    return int(checkpoint.split("-step-")[1].split("-")[0])


def export_tree(
    store: Store,
    checkpoint: str,
    tree: str,
    extra: dict[str, Any],
    base: Path,
    template: str,
    *,
    dtype: str | None = None,
) -> None:
    """Commits a checkpoint's weights as the run's `tree`, with tokenizer, template and `extra` as ft_ray.json.

    `dtype` ('bfloat16', 'float16') rounds a full model's fp32 master weights once, shard by shard. Raises DamagedError
    where the checkpoint's files are not what was recorded.
    """
    names = store.tree(f"{FOLDER}/{checkpoint}") or {}
    source = fetch(store, checkpoint, [n for n in names if n.startswith(_RESUMES)])
    with store.stage(tree) as out:
        sharded = StateFiles.within(source)
        if sharded:
            consolidate(source, base, out, dtype=dtype or "float32")
        for path in sorted(source.iterdir()):
            if path.name.startswith(("adapter_", "model", "config.json", "generation_config.json")):
                shutil.copy2(path, out / path.name)
        settings = out / "config.json"  # not of an adapter, whose base stays where it is
        own_code = settings.exists() and "auto_map" in json.loads(settings.read_text(encoding="utf-8"))
        for path in sorted(base.iterdir()):
            of_model = path.name.startswith(_TOKENIZER) or (own_code and path.suffix == ".py")
            if of_model or (path.name == "generation_config.json" and not (out / path.name).exists()):
                shutil.copy2(path, out / path.name)
        if dtype is not None and not sharded:
            _cast(out, dtype)
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
        (out / "ft_ray.json").write_text(json.dumps(extra, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        config = out / "adapter_config.json"
        if config.exists():
            values = json.loads(config.read_text(encoding="utf-8"))
            values["base_model_name_or_path"] = extra["base"]["source"]
            values["revision"] = extra["base"]["revision"]
            config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.chmod(out, 0o755)
    forget(store, checkpoint.partition("-step-")[0])


def _cast(folder: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    size = 0
    for path in sorted(folder.glob("model*.safetensors")):
        cast = {k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for k, v in load_file(path).items()}
        size += sum(v.numel() * v.element_size() for v in cast.values())
        save_file(cast, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        values = json.loads(index.read_text(encoding="utf-8"))
        values.setdefault("metadata", {})["total_size"] = size
        index.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    config = folder / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("torch_dtype", None)
    config.write_text(json.dumps({**values, "dtype": dtype}, indent=2) + "\n", encoding="utf-8")
