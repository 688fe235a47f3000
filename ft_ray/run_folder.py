"""A run folder opened for work: its lock, its manifest, and stages that are skipped when already done."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from ft_ray.errors import BudgetSpent, FtRayError, InputError, Interrupted, StorageError
from ft_ray.local_files import is_left_behind, put_back
from ft_ray.manifest import Manifest, StageRecord
from ft_ray.recipe import Recipe, from_dict
from ft_ray.run_lock import check_held, is_held
from ft_ray.storage import Store
from ft_ray.strict_yaml import parse

__all__ = ["Listener", "RunFolder", "differences", "earlier", "read_recipe", "trained_by", "whoami"]

log = logging.getLogger("ft_ray")

Listener = Callable[[dict[str, Any]], None]
"""Receives progress events: a dict with fields and `kind` (stage, status, preview, step, eval, diagnosis…)."""

_TRAINED_BY = (
    "model", "data", "method", "lora", "quantization", "sequence", "batch", "optim", "schedule", "precision",
    "deepspeed", "seed",
)  # fmt: skip
_CHOSEN_BY = ("every", "early_stop")  # of evaluation: which step's weights are the best one, and which is the last


def whoami() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # a container whose user has no name
        return socket.gethostname()


def trained_by(recipe: Recipe) -> dict[str, Any]:
    """What decides the trained weights. A run folder holds one value of these; the rest may change freely."""
    values = recipe.to_dict()
    evaluation = {k: values["evaluation"][k] for k in _CHOSEN_BY}
    return {k: values[k] for k in _TRAINED_BY} | {"evaluation": evaluation}


def read_recipe(store: Store) -> Recipe:
    """The recipe that a run folder was made with. Raises StorageError when there is none."""
    name = store.address("recipe.yaml")
    return from_dict(parse(store.read("recipe.yaml").decode(), name).value, lambda loc: name)


def differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, value in a, value in b) for every leaf in which two nested mappings differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(k for k in b if k not in a)]
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{path}.{k}" if path else k)]
    return [] if a == b else [(path, a, b)]


class RunFolder:
    """Made by `opened`, or by `locked` and `begin`. `stage` runs one step and records it."""

    def __init__(self, recipe: Recipe, store: Store, manifest: Manifest, on_event: Listener) -> None:
        self.recipe, self.store, self.manifest, self.on_event = recipe, store, manifest, on_event
        self._fresh = False

    @classmethod
    @contextlib.contextmanager
    def opened(cls, recipe: Recipe, on_event: Listener) -> Iterator[RunFolder]:
        """`locked` and begun at once."""
        with cls.locked(recipe, on_event) as folder:
            folder.begin()
            yield folder

    @classmethod
    @contextlib.contextmanager
    def locked(cls, recipe: Recipe, on_event: Listener, *, fresh: bool = False) -> Iterator[RunFolder]:
        """Locks the run folder and loads or starts its manifest; until `begin`, nothing in it is changed.

        A folder trained from another recipe is refused with what differs, because resuming into it would mix two
        runs; with `fresh`, `begin` removes it. A new folder that was not begun is gone afterwards.
        """
        store = Store(recipe.run_path)
        store.check_writable()
        with store.lock():
            new = not set(store.list()) - {".lock"}
            try:
                manifest = None if fresh else earlier(recipe, store)
                folder = cls(recipe, store, manifest or Manifest.start(recipe), on_event)
                folder._fresh = fresh
                yield folder
            finally:
                with contextlib.suppress(StorageError):  # what ended the work says more
                    if new and not set(store.list()) - {".lock"}:
                        store.remove("")

    def begin(self) -> None:
        """Writes recipe and manifest; first removes what killed processes left, with `fresh` all of an earlier run.

        Whoever holds the lock is the only one that works here, so nothing half-made is anybody's. A tree that was moved
        aside for one that never came is put back.
        """
        if self.store.is_local and not self._fresh:
            put_back(self.store.root)
        for name in self.store.list():
            if is_left_behind(name) or (self._fresh and name != ".lock"):
                self.store.remove(name)
        recipe = yaml.safe_dump(self.recipe.to_dict(), sort_keys=False, allow_unicode=True)
        self.store.write("recipe.yaml", recipe.encode())
        self.manifest.save(self.store)

    def status(self, message: str) -> None:
        self.on_event({"kind": "status", "message": message})

    def hashes(self, *names: str) -> dict[str, str]:
        """SHA-256 of files of the run folder, by name: what a stage wrote."""
        return {name: hashlib.sha256(self.store.read(name)).hexdigest() for name in names}

    def intact(self, artifacts: dict[str, str]) -> bool:
        """Whether every recorded artifact is still committed (trees) or present (files)."""
        return all(self.store.tree(a) is not None or self.store.exists(a) for a in artifacts)

    def stage(self, name: str, key: str, work: Callable[[], tuple[dict[str, Any], dict[str, str]]]) -> StageRecord:
        """Runs `work` -> (metrics, artifacts) unless the manifest shows it done for this key."""
        record = self.manifest.stages.get(name)
        if record is not None and self.manifest.done(name, key) and self.intact(record.artifacts):
            self.on_event({"kind": "stage", "stage": name, "state": "skipped", "seconds": record.seconds})
            return record
        earlier = record.seconds if record is not None and record.key == key and record.status == "stopped" else 0.0
        check_held(self.store.url)
        started = time.time()
        record = StageRecord(status="running", key=key, started=started)
        self.manifest.stages[name] = record
        self.manifest.save(self.store)
        self.on_event({"kind": "stage", "stage": name, "state": "start"})
        try:
            record.metrics, record.artifacts = work()
            record.status = "done"
        except (KeyboardInterrupt, Interrupted, BudgetSpent) as error:
            record.status, record.error = "stopped", str(error) or "interrupted"
            if isinstance(error, FtRayError):
                raise
            raise Interrupted(f"interrupted during {name}: the same command goes on from there.") from error
        except FtRayError as error:
            record.status, record.error = "failed", str(error)
            raise
        except Exception as error:
            record.status, record.error = "failed", f"{type(error).__name__}: {error}"
            raise
        finally:
            record.seconds = round(earlier + time.time() - started, 3)
            if is_held(self.store.url):  # else the manifest is that of who took over
                self.manifest.save(self.store)
            self.on_event({"kind": "stage", "stage": name, "state": record.status, "seconds": record.seconds})
        return record


def earlier(recipe: Recipe, store: Store) -> Manifest | None:
    """The manifest of what the folder holds, now this recipe's. Raises InputError for weights of another one."""
    manifest = Manifest.load(store)
    if manifest is None or manifest.lineage.recipe_hash == recipe.hash:
        return manifest
    old, swept = read_recipe(store), manifest.lineage.sweep
    if recipe.hash in (swept.get("recipe_hash"), swept.get("winner_hash")):
        old = recipe  # a sweep and its winner share a folder: neither is a stranger in it
    changed = differences(trained_by(old), trained_by(recipe))
    if changed and "train" in manifest.stages:
        what = ", ".join(f"{key} {was!r} -> {now!r}" for key, was, now in changed[:4])
        raise InputError(
            f"{store.url} holds a run of another recipe ({what}): "
            "give this one another name; to replace that run, use ft-ray run --fresh, or remove its folder."
        )
    manifest.lineage.recipe_hash = recipe.hash
    return manifest


def check_sweepable(manifest: Manifest | None, store: Store) -> None:
    """Raises InputError where a run folder holds a training of its own, which a sweep's winner would replace."""
    if manifest is not None and "train" in manifest.stages and not manifest.lineage.sweep:
        raise InputError(
            f"{store.url} holds a training of its own, which a sweep's winner would replace: give the sweep another "
            "name, or replace that run with --fresh."
        )
