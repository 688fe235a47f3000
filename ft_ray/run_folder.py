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

from ft_ray.errors import BudgetSpent, FtRayError, InputError, Interrupted
from ft_ray.manifest import Manifest, StageRecord
from ft_ray.recipe import Recipe, from_dict
from ft_ray.storage import Store
from ft_ray.strict_yaml import parse

__all__ = ["Listener", "RunFolder", "differences", "read_recipe", "whoami"]

log = logging.getLogger("ft_ray")

Listener = Callable[[dict[str, Any]], None]
"""Receives progress events: a dict with fields and `kind` (stage, status, preview, step, eval, diagnosis…)."""

# What changes the trained weights. A run folder holds one value of these; the rest may change freely.
_TRAINED_BY = (
    "model", "data", "method", "lora", "quantization", "sequence", "batch", "optim", "schedule", "precision", "seed",
)  # fmt: skip


def whoami() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # a container whose user has no name
        return socket.gethostname()


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
    """Made by `opened`. `stage` runs one step and records it."""

    def __init__(self, recipe: Recipe, store: Store, manifest: Manifest, on_event: Listener) -> None:
        self.recipe, self.store, self.manifest, self.on_event = recipe, store, manifest, on_event

    @classmethod
    @contextlib.contextmanager
    def opened(cls, recipe: Recipe, on_event: Listener, *, fresh: bool = False) -> Iterator[RunFolder]:
        """Locks the run folder and loads or starts its manifest.

        `fresh` removes what an earlier run of the same name left. Without it, a folder trained from another
        recipe is refused with what differs, because resuming into it would mix two runs.
        """
        store = Store(recipe.run_path)
        store.check_writable()
        with store.lock():
            if fresh:
                for name in store.list():
                    if name != ".lock":
                        store.remove(name)
            manifest = Manifest.load(store)
            if manifest is None:
                manifest = Manifest.start(recipe)
            elif manifest.lineage.recipe_hash != recipe.hash:
                old = read_recipe(store).to_dict()
                swept = manifest.lineage.sweep
                if recipe.hash in (swept.get("recipe_hash"), swept.get("winner_hash")):
                    old = recipe.to_dict()  # a sweep and its winner share a folder: neither is a stranger in it
                changed = differences({k: old.get(k) for k in _TRAINED_BY}, _part(recipe, _TRAINED_BY))
                if changed and "train" in manifest.stages:
                    what = ", ".join(f"{key} {was!r} -> {now!r}" for key, was, now in changed[:4])
                    raise InputError(
                        f"{store.url} holds a run of another recipe ({what}): "
                        "give this one another name, or replace that run with --fresh."
                    )
                manifest.lineage.recipe_hash = recipe.hash
            store.write("recipe.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True).encode())
            manifest.save(store)
            yield cls(recipe, store, manifest, on_event)

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
            self.manifest.save(self.store)
            self.on_event({"kind": "stage", "stage": name, "state": record.status, "seconds": record.seconds})
        return record


def _part(recipe: Recipe, keys: tuple[str, ...]) -> dict[str, Any]:
    values = recipe.to_dict()
    return {k: values.get(k) for k in keys}
