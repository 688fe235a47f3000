"""A rank of a run on Ray: what Ray Train starts on every worker.

The training stack is imported inside, by the worker alone: the driver and Ray's controller stay light.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint

from ft_ray import checkpoint
from ft_ray.chat import load_tokenizer
from ft_ray.recipe import Recipe
from ft_ray.storage import Store

__all__ = ["work"]


def work(config: dict[str, Any]) -> None:
    """What Ray Train runs on every worker."""
    started = time.monotonic()
    rank = ray.train.get_context().get_world_rank()
    hooks = _RankHooks(config["board"], Store(config["store"]), config["key"], config["recipe"])
    if rank == 0:
        hooks.event({"kind": "start"})
        hooks.event({"kind": "status", "message": "loading the training libraries"})
    from ft_ray import sft  # the heavy part of the start: TRL, PEFT, bitsandbytes
    from ft_ray.placement import local_parts

    recipe = config["recipe"]
    files, prepared = local_parts(recipe, config["files"], config["prepared"])
    device = str(ray.train.torch.get_device())
    if rank == 0:
        hooks.event({"kind": "status", "message": f"loading the model {files.source} on {device}"})
    found = hooks.agree(checkpoint.find(hooks.store, hooks.key) if rank == 0 else None)
    spent, resume = None, None
    if found is not None:
        resume = hooks.store.local(found.relative)
        spent = sft.Progress(**found.progress)
        spent.stopped = ""
        if spent.best_step == spent.step:
            spent.best_checkpoint = found.name
    tokenizer = load_tokenizer(files.folder, trust_remote_code=recipe.model.trust_remote_code)
    trainer = sft.build(recipe, files, prepared, tokenizer, hooks=hooks, device=device, spent=spent)
    if rank == 0:
        hooks.event({"kind": "status", "message": f"training (start took {time.monotonic() - started:.0f} s)"})
    progress = sft.run(trainer, resume)
    if rank == 0:
        result = {"kind": "result", "stopped": progress.stopped, "peak_memory_bytes": trainer.peak_memory()}
        ray.get(config["board"].post.remote(result))


class _RankHooks:
    """`fine_tuner.Hooks` on Ray: events to the board, checkpoints through ray.train.report and our commit."""

    def __init__(self, board: Any, store: Store, key: str, recipe: Recipe) -> None:
        self.store, self.key, self._board, self._recipe = store, key, board, recipe
        self._rank = ray.train.get_context().get_world_rank()
        self._workers = ray.train.get_context().get_world_size()
        self._answer: Any = None
        self._stop = False
        self._attempt = str(self.agree(uuid.uuid4().hex[:6]))

    def event(self, event: dict[str, Any]) -> None:
        self._answer = self._board.post.remote(event)

    def stop_requested(self) -> bool:
        # Each posted event answers whether to stop; the last answer that has arrived is at most a step old.
        if not self._stop and self._answer is not None:
            ready, _ = ray.wait([self._answer], timeout=0)
            self._stop = bool(ready) and bool(ray.get(ready[0]))
        return self._stop

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self._workers == 1:
            return value
        import torch

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def save(self, folder: Path, progress: Any) -> str:
        """Every rank uploads its own files; once all have, rank 0 writes the commit record and clears old ones."""
        name = checkpoint.name(self.key, progress.step, self._attempt)
        hashes: dict[str, str] = {}

        def upload(_: Any, directory: str) -> Any:
            hashes.update(checkpoint.upload(self.store, folder, directory))
            filesystem = ray.train.get_context().get_storage().storage_filesystem
            return Checkpoint(self.store.path(f"{checkpoint.FOLDER}/{directory}"), filesystem=filesystem)

        ray.train.report(
            {"step": progress.step},
            checkpoint=Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=name,
            checkpoint_upload_fn=upload,
        )
        parts = [hashes]
        if self._workers > 1:
            import torch

            parts = [{} for _ in range(self._workers)]
            torch.distributed.all_gather_object(parts, hashes)
        if self._rank == 0:
            checkpoint.commit(self.store, name, {k: v for part in parts for k, v in part.items()})
            best = name if progress.best_step == progress.step else progress.best_checkpoint
            checkpoint.retain(self.store, self.key, keep=self._recipe.checkpoint.keep, best=best)
        return name
