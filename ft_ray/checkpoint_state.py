"""What a rank writes into a checkpoint and takes out of it: progress, weights, optimizer, scheduler, scaler, RNG.

The files of one rank lie in a folder of its own until they are sent; where a full model is shared out, its weights and
optimizer states are `zero3`'s part.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from ft_ray.errors import TrainingError

__all__ = ["PROGRESS", "TOLD_TO_END", "Progress", "load_sharded", "load_weights", "write"]

PROGRESS = "progress.json"
TOLD_TO_END = "told to end"  # why a run stopped whose worker got SIGTERM: it is saved, and starts again elsewhere
_SCHEDULER = "scheduler.pt"  # the trainer's own name for it


@dataclass
class Progress:
    """Where a run stands; travels in every checkpoint as progress.json. Losses are nats a trained token."""

    step: int = 0
    total: int = 0
    seconds: float = 0.0
    trained_tokens: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    best_checkpoint: str | None = None
    without_gain: int = 0
    last_eval_step: int = 0
    stopped: str = ""
    workers: int = 1
    facts: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Progress:
        return cls(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))


def write(trainer: Any, sharding: Any, folder: Path) -> Callable[[Path], None] | None:
    """Writes this rank's files of a `FineTuner`'s state; `sharding` (or None) is its `fine_tuner.Sharding`.

    Returns what may write the rest later, from a copy, to wherever the files are by then; None: all is written.
    """
    later = None
    if sharding is not None:
        later = sharding.save(trainer, folder)
        if trainer.rank == 0:
            torch.save(trainer.lr_scheduler.state_dict(), folder / _SCHEDULER)
    else:
        trainer._save_optimizer_and_scheduler(str(folder))  # rank 0 alone
        if trainer.rank == 0:
            _save_weights(trainer.accelerator.unwrap_model(trainer.model), folder)
    trainer._save_scaler(str(folder))
    trainer._save_rng_state(str(folder))
    if trainer.rank == 0:
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
        (folder / PROGRESS).write_text(json.dumps(asdict(trainer.progress)), encoding="utf-8")
    return later


def _save_weights(model: Any, folder: Path) -> None:
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder), state_dict=get_peft_model_state_dict(model))
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    else:
        model.save_pretrained(folder)


def load_sharded(trainer: Any, sharding: Any, folder: Path) -> None:
    """Takes a shared-out state over, with the learning rate that its last step left."""
    sharding.load(trainer, folder)
    scheduler, optimizer = trainer.lr_scheduler, trainer.optimizer
    scheduler.load_state_dict(torch.load(folder / _SCHEDULER, weights_only=True))
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate  # a scheduler sets it at its next step only
    trainer._load_scaler(str(folder))


def load_weights(folder: Path, target: Any) -> None:
    """Takes an adapter or a whole model over. Raises TrainingError when the checkpoint is of another one."""
    result: Any
    if isinstance(target, PeftModel):
        result = set_peft_model_state_dict(target, load_file(folder / "adapter_model.safetensors"))
        unexpected = list(result.unexpected_keys)
        missing = [k for k in result.missing_keys if "lora_" in k]
    else:
        state: dict[str, torch.Tensor] = {}
        for shard in sorted(folder.glob("model*.safetensors")):
            state.update(load_file(shard))
        result = target.load_state_dict(state, strict=False)
        tied = set(getattr(target, "_tied_weights_keys", None) or ())
        unexpected, missing = list(result.unexpected_keys), [k for k in result.missing_keys if k not in tied]
    if unexpected or missing:
        raise TrainingError(
            f"the checkpoint {folder} does not fit this model ({len(unexpected)} tensors too many, "
            f"{len(missing)} missing): remove it to start again."
        )
