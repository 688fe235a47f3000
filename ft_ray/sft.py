"""The fine-tuning of one rank: the recipe turned into TRL's SFTTrainer over prepared rows.

One path for full, LoRA and QLoRA, for one process and for a rank of many.

TRL keeps a `labels` column as it is when dataset preparation is skipped, sums token losses over the global
batch (`num_items_in_batch`), and computes them in tiles without the full logits. It would also round QLoRA's
adapter weights to bf16, in which small updates are lost; here they stay fp32.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed
from trl import SFTConfig

from ft_ray import fused_lora, kernels, lora, model_loading, objective, row_attention
from ft_ray.base_model import ModelFiles
from ft_ray.chat import chat_of
from ft_ray.checkpoint_state import Progress
from ft_ray.errors import MissingPackageError, TrainingError
from ft_ray.fine_tuner import FineTuner, world
from ft_ray.objective import BatchPlan, StepPlan
from ft_ray.rank_hooks import Hooks, Sharding
from ft_ray.recipe import Recipe

__all__ = ["FineTuner", "Hooks", "Progress", "Rows", "build", "run"]

_SEEDS = 100_003  # more than there are ranks: no two of them begin with the same seed


class Rows(Protocol):
    """The prepared data as a rank needs it; `dataset.Prepared` is one."""

    def tokens(self, split: str) -> Any: ...
    def packed(self) -> Any: ...


@runtime_checkable
class _Placed(Protocol):
    """Rows that know where they come from."""

    def places(self, split: str, numbers: Sequence[int]) -> list[str]: ...


def build(
    recipe: Recipe,
    files: ModelFiles,
    prepared: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    hooks: Hooks,
    device: str,
    spent: Progress | None = None,
    sharding: Sharding | None = None,
) -> FineTuner:
    """Loads the model, attaches the adapter and returns this rank's trainer. Raises ModelError, RecipeError.

    `sharding` shares a full model out over the ranks; without one, every rank holds and rank 0 saves all of it.
    """
    _, workers = world()
    packing = recipe.sequence.packing
    rows = prepared.packed() if packing else prepared.tokens("train")
    if not len(rows):
        raise TrainingError("there are no training rows left after the data check: add rows or raise max_length.")
    validation = prepared.tokens("validation")
    quantized = recipe.method == "qlora"
    batch, steps = objective.plan_batch(recipe, device), objective.plan_steps(recipe, len(rows))
    assert batch.workers == workers, f"{workers} ranks run a recipe for {batch.workers}"
    more = sharding.arguments(batch) if sharding is not None else {}
    arguments = _arguments(recipe, batch, steps, device, more)  # before the model: ZeRO-3 shards it as it is loaded
    placed = sharding is not None and sharding.places_model
    model: Any = model_loading.load_model(files, recipe, device=device, quantized=quantized, placed=placed)
    if sharding is not None:
        sharding.prepare_model(model)
    fuses = recipe.fuses and device.startswith("cuda")
    said = _speed_up(model, recipe) if fuses else ""
    if recipe.method != "full":
        model = lora.attach(model, recipe)
        updates = fused_lora.use(model) if fuses else 0
        said += f", {updates} LoRA updates in one product each" if updates else ""
    if said and world()[0] == 0:
        hooks.event({"kind": "status", "message": said})
    # TRL rounds a quantized model's adapter to bf16; a data swap afterwards keeps our fp32 weights.
    kept = {n: p.data.clone() for n, p in model.named_parameters() if p.requires_grad} if quantized else {}
    trainer = FineTuner(
        recipe,
        model=model,
        args=arguments,
        rows=rows,
        validation=validation,
        tokenizer=tokenizer,
        batch=batch,
        steps=steps,
        hooks=hooks,
        progress=spent or Progress(),
        eos_ids=chat_of(recipe.model, files.folder).eos_ids,
        sharding=sharding,
        places=partial(prepared.places, "train") if isinstance(prepared, _Placed) and not packing else None,
    )
    for name, parameter in trainer.net.named_parameters():
        if name in kept:
            parameter.data = kept[name]
    return trainer


def _speed_up(model: Any, recipe: Recipe) -> str:
    """Fused kernels for what can have them; says which are used."""
    if recipe.fused_kernels is True and importlib.util.find_spec("liger_kernel") is None:
        raise MissingPackageError("liger_kernel", "fused_kernels: true", "gpu")
    unfit = kernels.unfit(model)
    if recipe.fused_kernels == "auto" and unfit:
        return f"plain kernels: {unfit}"
    fused = kernels.fuse(model)
    by_rows = bool(fused) and recipe.sequence.packing and row_attention.fits(model.config)
    if by_rows:
        row_attention.use(model)
    said = f"fused kernels in {fused} modules" + (", attention row by row" if by_rows else "")
    return f"{said} ({unfit})" if unfit else said


def run(trainer: FineTuner, resume: Path | None = None) -> Progress:
    """Trains to the end, or to a stop. `resume` is a checkpoint folder. Raises TrainingError."""
    rank, _ = world()
    if trainer.agree(int(rank == 0 and trainer.hooks.stop_requested()))[0]:
        trainer.progress.stopped = "interrupted"  # asked while loading: nothing was trained, nothing is lost
        return trainer.progress
    # Dropout differs from rank to rank. One that goes on takes up its generators' states below, where there are some:
    # a rank that was not there before begins with its own.
    set_seed((trainer.recipe.seed + rank + _SEEDS * trainer.progress.step) % 2**32)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if trainer.sharding is not None:  # after a failure the process ends, and CUDA might wait for a lost rank here
        trainer.sharding.end_saves()
    return trainer.progress


def _arguments(recipe: Recipe, batch: BatchPlan, steps: StepPlan, device: str, more: dict[str, Any]) -> SFTConfig:
    on_gpu = device.startswith("cuda")
    optimizer, _ = objective.optimizer_name(recipe.optim.name, device)
    return SFTConfig(
        output_dir=tempfile.gettempdir(),  # never written to: checkpoints go through Hooks.save
        per_device_train_batch_size=batch.per_device,
        gradient_accumulation_steps=batch.accumulation,
        max_steps=steps.total,
        learning_rate=recipe.optim.lr,
        weight_decay=recipe.optim.weight_decay,
        adam_beta1=recipe.optim.betas[0],
        adam_beta2=recipe.optim.betas[1],
        adam_epsilon=recipe.optim.eps,
        max_grad_norm=recipe.optim.max_grad_norm,
        optim=optimizer,
        lr_scheduler_type=objective.schedule_name(recipe),
        warmup_steps=steps.warmup,
        bf16=recipe.precision == "bf16",
        fp16=recipe.precision == "fp16",
        gradient_checkpointing=recipe.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=recipe.seed,
        use_cpu=not on_gpu,
        ddp_backend=("nccl" if on_gpu else "gloo") if torch.distributed.is_initialized() else None,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        max_length=None,
        packing=False,
        padding_free=recipe.sequence.packing,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        **more,
    )
