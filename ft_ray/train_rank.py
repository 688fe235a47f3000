"""A rank of a run on Ray: what Ray Train starts on every worker.

The training stack is imported inside, by the worker alone: the driver and Ray's controller stay light.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train

from ft_ray import checkpoint, objective, precision
from ft_ray.chat import load_tokenizer
from ft_ray.errors import DamagedError, Diverged, StorageError
from ft_ray.lean_imports import collector_paused, load_trl
from ft_ray.recipe import Recipe
from ft_ray.storage import Store
from ft_ray.storage_retries import persistently
from ft_ray.train_control import ToldToEnd, machines_that_go, told_to_end
from ft_ray.upload import Uploads, staging_area

__all__ = ["work"]

# Seconds for which a failing rank waits until what it saved is committed: a share of 48 GB is still to be written and
# hashed. Nobody waits for one whose upload failed, or for a rank that died: the controller ends the ranks then.
_LAST_UPLOAD = 600.0


def work(config: dict[str, Any]) -> None:
    """What Ray Train runs on every worker."""
    rank, workers = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    asked = config["recipe"]
    if workers != asked.resources.workers:  # between resources.min_workers and workers, by what the cluster has
        config = {**config, "recipe": asked.by(workers)}
    if config["seen"] is not None:  # a node that came after the run began was not asked yet
        config["seen"].check()
    with staging_area() as area:
        hooks = _RankHooks(config["board"], Store(config["store"]), config["key"], config["recipe"], area)
        try:
            if rank == 0 and asked.resources.min_workers is not None:
                hooks.say(f"training by {workers} of {asked.resources.workers} workers")
            facts = _train(config, hooks, rank)
        except BaseException as error:
            # What was saved before the fault is kept: the controller commits it, then ends the ranks.
            committed = hooks.uploads.finish(timeout=_LAST_UPLOAD)
            if isinstance(error, Diverged):  # which every rank raises
                hooks.drop_unproven(committed)
            raise
        hooks.uploads.finish()
    leaves = facts.pop("told_to_end")
    if leaves is not None:
        raise ToldToEnd(leaves)
    # A later run goes on from a later one, and the machine's other ranks have long read this: all trained together.
    checkpoint.forget(hooks.store, config["key"])
    if rank == 0:
        ray.get(config["board"].post.remote(facts))


def _train(config: dict[str, Any], hooks: _RankHooks, rank: int) -> dict[str, Any]:
    started = time.monotonic()
    if rank == 0:
        hooks.event({"kind": "start"})
        hooks.event({"kind": "status", "message": "loading the training libraries"})
    with collector_paused(keep=True):
        load_trl()
        from ft_ray import sft  # the heavy part of the start: TRL, PEFT, bitsandbytes
    from ft_ray.placement import local_parts

    recipe = config["recipe"]
    files, prepared = local_parts(recipe, config["files"], config["prepared"])
    device = str(ray.train.torch.get_device())
    if rank == 0:
        hooks.event({"kind": "status", "message": f"loading the model {files.source} on {device}"})
    # All ranks compute in the same, whatever their CPUs are.
    recipe, substitution = precision.on_device(recipe, device, able=_native(recipe, device, hooks))
    substitutions = [substitution] if substitution else []
    if substitution and rank == 0:
        hooks.say(substitution)
    sharding = None
    if recipe.method == "full":
        from ft_ray.zero3 import sharding_of

        sharding = sharding_of(recipe, files.config, device)
    found, resume = _resume_point(hooks, sharding, rank)
    spent = None
    if rank == 0:
        hooks.event({"kind": "resumed", "step": found.step if found is not None else 0})
    ended = objective.ended(recipe, found.progress) if found is not None else None
    if ended is not None:  # its last checkpoint was committed, and a rank lost before it told: a step would be too many
        return {"kind": "result", "stopped": ended, "told_to_end": None, "substitutions": substitutions}
    if found is not None:
        hooks.go_on_from(found.name)
        spent = sft.Progress(**found.progress)
        spent.stopped = ""
        if spent.best_step == spent.step:
            spent.best_checkpoint = found.name
    tokenizer = load_tokenizer(files.folder, trust_remote_code=recipe.model.trust_remote_code)
    trainer = sft.build(recipe, files, prepared, tokenizer, hooks=hooks, device=device, spent=spent, sharding=sharding)
    if rank == 0:
        hooks.event({"kind": "status", "message": f"training (start took {time.monotonic() - started:.0f} s)"})
    progress = sft.run(trainer, resume)
    facts = {"kind": "result", "stopped": progress.stopped, "peak_memory_bytes": trainer.peak_memory()}
    return {**facts, "told_to_end": trainer.told_to_end, "substitutions": substitutions}


def _native(recipe: Recipe, device: str, hooks: _RankHooks) -> bool:
    return device != "cpu" or all(hooks.gather(precision.native(recipe)))


def _resume_point(hooks: _RankHooks, sharding: Any, rank: int) -> tuple[checkpoint.Found | None, Path | None]:
    """The newest checkpoint of which every rank's part is what was recorded, with the folder of this rank's.

    Every rank fetches and hashes what it reads and nothing more; what one finds damaged is left by all.
    """
    store, damaged = hooks.store, set[str]()
    while True:
        found = None
        if rank == 0:
            found = persistently(lambda: checkpoint.find(store, hooks.key, without=damaged), hooks.say)
            if damaged:  # the driver has told another step
                whole = f"going on from the checkpoint of step {found.step}" if found is not None else ""
                hooks.say(whole or "no checkpoint is whole: training starts from the beginning")
        found = hooks.agree(found)
        if found is None:
            return None, None
        folder, fault = None, ""
        try:
            folder = persistently(functools.partial(_fetch_own, store, found.name, sharding, rank), hooks.say)
        except DamagedError as error:
            fault = str(error)
        faults = [one for one in hooks.gather(fault) if one]
        if not faults:
            return found, folder
        if rank == 0:
            hooks.say(checkpoint.tell_damaged(found.name, faults[0]))
        damaged.add(found.name)


def _fetch_own(store: Store, name: str, sharding: Any, rank: int) -> Path:
    """The checkpoint's files that this rank reads, in a local folder."""
    unread = checkpoint.others(store, name, rank)
    if sharding is not None:
        unread |= sharding.unread(store, f"{checkpoint.FOLDER}/{name}")
    return checkpoint.fetch(store, name, unread)


class _RankHooks:
    """`fine_tuner.Hooks` on Ray: events to the board, checkpoints sent in the background and committed when whole."""

    def __init__(self, board: Any, store: Store, key: str, recipe: Recipe, area: Path) -> None:
        self.store, self.key, self._board, self._recipe = store, key, board, recipe
        self._rank = ray.train.get_context().get_world_rank()
        self._workers = ray.train.get_context().get_world_size()
        self._answer: Any = None
        self._stop, self._saved_for = False, frozenset[str]()
        self._sent, self._proven = "", ""  # the last checkpoint, and the last that a good step followed; told by rank 0
        self._save_began = 0.0
        self._attempt = str(self.agree(uuid.uuid4().hex[:6]))
        self.uploads = Uploads(store, area, self.say)

    def say(self, message: str) -> None:
        self._board.post.remote({"kind": "status", "message": message})

    def event(self, event: dict[str, Any]) -> None:
        if event["kind"] == "checkpoint":  # on this rank's disk: the controller tells when it is committed
            return
        if event["kind"] == "step":
            self._proven = self._sent
        self._answer = self._board.post.remote(event)

    def stop_requested(self) -> bool:
        # Each posted event answers whether to stop; the last answer that has arrived is at most a step old.
        if not self._stop and self._answer is not None:
            ready, _ = ray.wait([self._answer], timeout=0)
            self._stop = bool(ready) and bool(ray.get(ready[0]))
        return self._stop

    def save_requested(self) -> bool:
        """Once for every notice that a machine is taken back: save at this step, whatever the recipe's interval."""
        going = machines_that_go()
        if going <= self._saved_for:
            return False
        self._saved_for = going
        self.say("a machine is being taken back: saving a checkpoint now")
        return True

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self._workers == 1:
            return value
        import torch

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self._workers == 1:
            return [value]
        import torch

        values = [None] * self._workers
        torch.distributed.all_gather_object(values, value)
        return values

    def told_to_end(self) -> bool:
        return told_to_end()

    def go_on_from(self, name: str) -> None:
        self._sent = self._proven = name  # whatever follows, there may be none before it

    def drop_unproven(self, committed: bool) -> None:
        """Removes the last checkpoint where no good step followed it: going on from it would diverge again."""
        if self._rank == 0 and committed and self._sent != self._proven:
            step = checkpoint.step_of(self._sent)
            try:
                persistently(lambda: checkpoint.drop(self.store, self._sent), self.say)
                self.say(f"the checkpoint of step {step}, from just before, is removed")
            except StorageError as error:
                self.say(f"the checkpoint of step {step}, from just before, could not be removed: {error}")
        with contextlib.suppress(RuntimeError):  # the first rank that fails ends them all: not before this is done
            self.agree(None)

    def begin_save(self) -> None:
        self._save_began = time.monotonic()
        self.uploads.finish()

    def save(
        self, folder: Path, progress: Any, *, later: Callable[[Path], None] | None = None, wait: bool = False
    ) -> str:
        """Takes over this rank's files; they are committed once every rank's are uploaded, while training goes on."""
        name = checkpoint.name(self.key, progress.step, self._attempt)
        best = name if progress.best_step == progress.step else progress.best_checkpoint
        facts = {"step": progress.step, "name": name, "best": best, "proven": self._proven, "workers": self._workers}
        self._sent = name
        if best == name:  # by its validation loss
            self._proven = name
        self.uploads.send(folder, name, facts, self._save_began, later)
        shutil.rmtree(folder, ignore_errors=True)
        if wait:
            self.uploads.finish()
        return name
