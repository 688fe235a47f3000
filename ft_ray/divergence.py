"""A loss that is no number: noticed before ruined weights take a good checkpoint's place, told with its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ft_ray.batch_sampler import RankBatches
from ft_ray.errors import Diverged

__all__ = ["advice", "check_weights"]

_MOST_NAMED = 8


def check_weights(trainer: Any, step: int) -> None:
    """Raises Diverged, on every rank, where the weights as they are now give no finite loss: not to be saved.

    A step's loss is measured before its update, so a ruinous one shows at the next step, when a checkpoint of it
    would have replaced the last good one. Costs a forward pass over the rank's last batch, with dropout off (no random
    number is drawn), or nothing where the validation loss was measured at this very step. `trainer` is a `FineTuner`.
    """
    last = trainer.progress.history[-1] if trainer.progress.history else {}
    if last.get("kind") == "eval" and last["step"] == step and math.isfinite(last["loss"]):
        return
    if trainer.last_inputs is None:
        return  # nothing was trained since the start
    training = trainer.net.training
    trainer.net.eval()
    try:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            inputs = trainer._prepare_inputs(dict(trainer.last_inputs))
            found = trainer.whole_forward(**inputs, fused_lm_head=True).log_probs.sum()
    finally:
        trainer.net.train(training)
    if trainer.agree(int(not torch.isfinite(found)))[0]:
        raise Diverged(f"the loss became no number by the update of step {step}: {advice(trainer, step)}.")


def advice(trainer: Any, step: int, losses: Sequence[torch.Tensor] = ()) -> str:
    """What to do, which rows to look at, and what is kept; for every rank to ask for at once.

    `losses` are those of this rank's passes in the step; rows of one that is not finite are named alone.
    """
    good = trainer.proven_step
    kept = f"the checkpoint of step {good} is kept" if good else "no earlier checkpoint is known to be good"
    rows = _suspects(trainer, step, losses)
    if trainer.places is not None:
        named = trainer.places(rows[:_MOST_NAMED])
    else:
        kind = "packed sequence" if trainer.recipe.sequence.packing else "row"
        named = [f"{kind} {row}" for row in rows[:_MOST_NAMED]]
    more = f" and {len(rows) - _MOST_NAMED} more" if len(rows) > _MOST_NAMED else ""
    return (
        f"lower optim.lr, lengthen schedule.warmup, or check the rows of its batch ({', '.join(named)}{more}); {kept}"
    )


def _suspects(trainer: Any, step: int, losses: Sequence[torch.Tensor]) -> list[int]:
    """The rows whose forward pass gave no finite loss, on any rank; else all rows of the step's batch."""
    batches = RankBatches(
        len(trainer.train_dataset), trainer.batch, rank=trainer.rank, seed=trainer.recipe.seed
    ).rows_of(step)
    bad = [row for rows, loss in zip(batches, losses, strict=False) if not torch.isfinite(loss) for row in rows]
    parts = [(bad, [row for rows in batches for row in rows])]
    if trainer.workers > 1:
        parts *= trainer.workers
        torch.distributed.all_gather_object(parts, parts[0])
    return [row for part in parts for row in part[0]] or [row for part in parts for row in part[1]]
