"""Full fine-tuning shared out over the ranks by DeepSpeed: its configuration from the recipe, and its state on disk.

ZeRO (arXiv:1910.02054) keeps one copy of the optimizer states (stage 1), gradients (2) and weights (3) over all ranks.
There is no DeepSpeed JSON beside the recipe. The configuration exists before the model is loaded: transformers then
shards each parameter as it is created, so that no rank holds the whole model. A save takes a snapshot of this rank's
share where `checkpoint.snapshot` wants one, and the file is written later; else it is written at once.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ft_ray import model_shape, nvme, process_groups, whole_layers
from ft_ray.deepspeed_keys import check_values
from ft_ray.errors import ModelError, TrainingError
from ft_ray.fine_tuner import FineTuner, world
from ft_ray.host_memory import total_and_free
from ft_ray.objective import BatchPlan
from ft_ray.recipe import Recipe
from ft_ray.snapshot import Snapshot
from ft_ray.state_files import INDEX, WEIGHT, Index, Piece, StateFiles, unread, write_index, write_part
from ft_ray.storage import Store
from ft_ray.zero_state import Layout, is_zero, layout_of

__all__ = ["Zero", "config", "layer_parameters", "sharding_of"]

logger = logging.getLogger("ft_ray")

_SWITCH = "ACCELERATE_USE_DEEPSPEED"
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
_SMALLEST_BUCKET = 1 << 20  # elements; below a few megabytes a collective's latency is all that counts
_LARGEST_BUCKET = 500_000_000  # DeepSpeed's own
_GIB = 2**30
_MOST_HELD = 0.8  # of the free host memory, by snapshots of all ranks of a machine: what they write is cached there too


def config(recipe: Recipe, batch: BatchPlan, hidden: int, *, on_gpu: bool, layer: int = 0) -> dict[str, Any]:
    """DeepSpeed's configuration of a recipe for a model of width `hidden`, with `layer` parameters in a decoder layer.

    Buckets follow the width as in transformers' integration: a reduction covers a square matrix of it, and what is
    smaller than ten rows stays on every rank. Where layers are taken whole, a reduction covers one and the next one is
    fetched while one computes; where they are not, or their size is not known (0), nine tenths of a square matrix are.
    The recipe's own `deepspeed` mapping is laid over it.
    """
    whole = whole_layers.taken(recipe.deepspeed, layer)
    resources, stage = recipe.resources, recipe.zero_stage
    bucket = min(max(hidden * hidden, _SMALLEST_BUCKET), _LARGEST_BUCKET)
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": on_gpu,  # side streams; a CPU has none
        "reduce_bucket_size": bucket,
    }
    if stage == 3:
        # DeepSpeed lets two reductions be under way (`max_param_reduce_events`) and then waits for the device, so one
        # for a layer instead of several; what that is worth by itself was not measured (benchmarks/README.md).
        # `layer` counts matrices: norms and biases go with them.
        zero["reduce_bucket_size"] = min(max(bucket, layer + 16 * hidden), _LARGEST_BUCKET) if whole else bucket
        zero |= {
            "stage3_prefetch_bucket_size": max(int(0.9 * bucket), layer) if whole else int(0.9 * bucket),
            "stage3_param_persistence_threshold": 10 * hidden,
            "stage3_gather_16bit_weights_on_model_save": False,  # nothing gathers the model: consolidate streams it
            # DeepSpeed's own Linear, in Python, keeps no gathered weight for the backward. A layer that is taken whole
            # and computed again has them all anyway, and torch's is faster.
            "memory_efficient_linear": not (whole and recipe.gradient_checkpointing),
        }
    else:
        zero |= {"allgather_bucket_size": bucket}
    for key, wanted in (
        ("offload_optimizer", resources.offload_optimizer),
        ("offload_param", resources.offload_parameters),
    ):
        if wanted:
            zero[key] = {"device": "cpu", "pin_memory": on_gpu}
    if nvme.path_of(recipe.deepspeed) is not None:
        zero["offload_optimizer"] = {"device": "nvme", "pin_memory": on_gpu}
    derived = {
        "train_batch_size": batch.global_rows,
        "train_micro_batch_size_per_gpu": batch.per_device,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": recipe.optim.max_grad_norm,
        "bf16": {"enabled": recipe.precision == "bf16"},
        "fp16": {"enabled": recipe.precision == "fp16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps in host memory too, and needs no compiler
        "steps_per_print": 1 << 31,
    }
    if batch.accumulation > 1 and recipe.precision != "fp32":
        derived["data_types"] = {"grad_accum_dtype": "fp32"}  # DeepSpeed's own is 16 bits, which lose small addends
    return _over(derived, recipe.deepspeed)


def _over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(below)
    for key, value in above.items():
        known = out.get(key)
        out[key] = _over(known, value) if isinstance(known, dict) and isinstance(value, Mapping) else value
    return out


def sharding_of(recipe: Recipe, model: Mapping[str, Any], device: str) -> Zero | None:
    """How a run keeps its state; None for adapters, and for a full model whose state only fits one process's format.

    `model` is the base's config.json. Raises TrainingError or ModelError where ZeRO was asked for and cannot be.
    """
    if recipe.method != "full":
        return None
    if recipe.zero_stage == 0 and (recipe.optim.name not in _OPTIMIZERS or _stored_otherwise(model)):
        return None
    return Zero(recipe, model, device)


def layer_parameters(model: Mapping[str, Any]) -> int:
    """Parameters of a decoder layer of a config.json; 0 for a family that `model_shape` does not know."""
    try:
        shape = model_shape.read(model)
    except ModelError:
        return 0
    return sum(matrix.parameters for matrix in shape.matrices) // shape.layers


def _stored_otherwise(model: Mapping[str, Any]) -> bool:
    """Whether transformers computes this model with other tensors than its files hold (experts put together)."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    parts = [model, *(value for value in model.values() if isinstance(value, Mapping))]
    return any(get_checkpoint_conversion_mapping(part["model_type"]) for part in parts if "model_type" in part)


class Zero:
    """`fine_tuner.Sharding` of method full: ZeRO of any stage, or with stage 0 every rank holding everything.

    `model` is the base's config.json. Raises TrainingError for an optimizer whose states cannot be shared out.
    """

    def __init__(self, recipe: Recipe, model: Mapping[str, Any], device: str) -> None:
        self.recipe, self.stage, self._on_gpu = recipe, recipe.zero_stage, device.startswith("cuda")
        self._snapshot: Snapshot | None = None
        self._prepared = False
        self._swap: Path | None = None
        text = model.get("text_config") or model
        self._layer = layer_parameters(model)
        self._hidden = next((int(text[k]) for k in ("hidden_size", "n_embd", "d_model") if k in text), 0)
        if self.stage and not self._hidden:
            raise ModelError("config.json has no hidden_size, from which ZeRO's buckets follow: add it.")
        if _stored_otherwise(model):
            raise ModelError(
                f"{model.get('model_type')} models are stored in other tensors than transformers computes with, which "
                "shares of ZeRO cannot be turned back into: use method lora, or resources.sharding: ddp."
            )
        if self.stage and recipe.optim.name not in _OPTIMIZERS:
            raise TrainingError(
                f"optim.name {recipe.optim.name} does not keep one state for each weight, which ZeRO shares out by "
                f"element: use one of {', '.join(_OPTIMIZERS)}, or resources.sharding: ddp."
            )

    @property
    def shards_weights(self) -> bool:
        return self.stage == 3

    @property
    def places_model(self) -> bool:
        """Whether DeepSpeed puts the model on its device and gives it its type."""
        return self.stage > 0

    def arguments(self, batch: BatchPlan) -> dict[str, Any]:
        """More arguments of the trainer. Before the model is loaded, because loading reads them."""
        whole_layers.restore_linear()
        if self.stage == 0:
            # What an earlier run of this process left behind would shard this one.
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            os.environ.pop(_SWITCH, None)
            unset_hf_deepspeed_config()
            return {}
        import deepspeed
        from accelerate import PartialState
        from accelerate.state import AcceleratorState

        if not self._on_gpu:
            # An extension for inference that DeepSpeed would compile for a minute at its first start.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # On a CPU accelerate takes no backend by itself, and would train alone without a word.
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ[_SWITCH] = "true"
        PartialState(backend="nccl" if self._on_gpu else "gloo")
        process_groups.share_timeout()
        values = config(self.recipe, batch, self._hidden, on_gpu=self._on_gpu, layer=self._layer)
        path = nvme.path_of(self.recipe.deepspeed)
        if path is not None:
            self._swap = self._prepare_swap(path)
            values["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(self._swap)
        check_values(values)
        return {
            "deepspeed": values,
            "accelerator_config": {"use_configured_state": True},
        }

    def prepare_model(self, model: torch.nn.Module) -> None:
        """What has to be done to a loaded model before the trainer wraps it."""
        if self.stage == 3 and whole_layers.taken(self.recipe.deepspeed, self._layer):
            whole_layers.gather_whole_layers(model)

    def _prepare_swap(self, path: str) -> Path:
        """This rank's own folder on NVMe, and the means to reach it. Raises TrainingError."""
        from deepspeed.ops.op_builder import AsyncIOBuilder

        folder = nvme.folder_of(path, f"{self.recipe.run_path} {self.recipe.by(1).hash}", world()[0])
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(
                f"deepspeed.zero_optimization.offload_optimizer.nvme_path {path} cannot be written to "
                f"({error.strerror}): give a folder on a local disk of every worker."
            ) from error
        lacking = nvme.missing()
        if lacking:
            raise TrainingError(f"offload to NVMe needs DeepSpeed's async_io, which cannot be built here: {lacking}.")
        try:
            AsyncIOBuilder().load(verbose=False)  # compiled once for a machine, which takes minutes
        except (RuntimeError, ImportError, OSError) as error:
            raise TrainingError(
                f"offload to NVMe needs DeepSpeed's async_io, which cannot be built here ({error}): python -m "
                "deepspeed.env_report says more."
            ) from error
        return folder

    def unread(self, store: Store, checkpoint: str) -> set[str]:
        """Files of a committed checkpoint (its path in `store`) that this rank need not read to go on from it."""
        names = store.tree(checkpoint) or {}
        if INDEX not in names:
            return set()
        try:
            index = json.loads(store.read(f"{checkpoint}/{INDEX}"))
        except ValueError:
            return set()  # damaged: it is fetched with the others, whose hashes are compared
        return unread(names, index, self._name, *world()) if isinstance(index, dict) else set()

    @property
    def _name(self) -> str:
        return f"zero{self.stage}" if self.stage else "ddp"

    def prepare_saves(self, trainer: FineTuner) -> None:
        """Begins to set memory aside for snapshots, once, where the recipe wants them and there is room."""
        asked = self.recipe.checkpoint.snapshot
        if self._prepared or (asked is False and self._swap is None):
            return
        self._prepared = True
        layout = self._layout(trainer)  # which looks at what is swapped
        if layout.swapped:
            return  # it is brought into memory a group at a time, and written at once
        pieces = _pieces(layout)
        devices = {layout.read(kind, piece).device for kind, piece in pieces}
        if len(devices) != 1 or (asked == "auto" and next(iter(devices)).type != "cuda"):
            return  # a state in host memory is there for want of room
        values = sum(piece.count for _, piece in pieces)
        room = total_and_free()[1] // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if asked == "auto" and 4 * values > _MOST_HELD * room:
            self._no_snapshot(trainer, f"a rank would need {4 * values / _GIB:.1f} GiB, {room / _GIB:.1f} are free")
            return
        self._snapshot = Snapshot(devices.pop(), [layout.inner])
        self._snapshot.make_room(values)

    def end_saves(self) -> None:
        """No save comes any more: frees the memory of snapshots once the last one is written, and the space on NVMe."""
        if self._snapshot is not None:
            self._snapshot.close()
        if self._swap is not None:
            nvme.remove(self._swap)

    def save(self, trainer: FineTuner, folder: Path) -> Callable[[Path], None] | None:
        """Writes this rank's pieces of weights and optimizer states to `folder`; rank 0 adds what all share.

        From a snapshot the pieces are still to be written: what is returned writes them to the folder that it is given.
        """
        layout, rank = self._layout(trainer), trainer.rank
        kinds, pieces = layout.kinds(), _pieces(layout)
        buffers = {k: b.detach().to("cpu", copy=True) for k, b in _buffers(trainer.net).items()} if rank == 0 else {}
        write = partial(write_part, rank=rank, workers=trainer.workers, pieces=pieces, buffers=buffers)
        taken = self._take(trainer, layout, pieces)
        if taken is None:
            try:
                write(folder, read=lambda kind, piece: [layout.read(kind, piece)])
            finally:
                layout.release()
        if rank == 0:
            index = Index(
                shapes={name: list(_shape(parameter)) for name, parameter in _trained(trainer.net).items()},
                kinds=kinds,
                scalars=layout.scalars(),
                optimizer=self._optimizer(trainer),
                sharding=self._name,
                workers=trainer.workers,
                loss_scale=layout.loss_scale(),
                buffers=list(buffers),
            )
            write_index(folder, index)
        if taken is None:
            return None

        def later(folder: Path) -> None:
            try:
                write(folder, read=taken.read)
            finally:
                taken.release()

        return later

    def _take(self, trainer: FineTuner, layout: Layout, pieces: list[tuple[str, Piece]]) -> Snapshot | None:
        """The snapshot with this state in it; None where there is to be none."""
        if self._snapshot is None:
            return None
        values = sum(piece.count for _, piece in pieces)
        room = self._snapshot.make_room(values)
        if not room.done():
            _say(trainer, f"waiting for {4 * values / _GIB:.1f} GiB of host memory for the first snapshot")
        error = room.exception()
        if error is None:
            self._snapshot.take(pieces, layout.read)
        else:
            self._no_snapshot(trainer, str(error).partition("\n")[0])
            self._snapshot.close()
            self._snapshot = None
        return self._snapshot

    @staticmethod
    def _no_snapshot(trainer: FineTuner, why: str) -> None:
        _say(trainer, f"no host memory for snapshots ({why}): training stands still while checkpoints are written")

    def load(self, trainer: FineTuner, folder: Path) -> None:
        """Takes weights and optimizer states over from a checkpoint of any sharding and number of workers."""
        if not StateFiles.within(folder):
            raise TrainingError(
                f"the checkpoint {folder} was not written by sharded training and cannot be shared out: remove it "
                "to start again."
            )
        with StateFiles(folder) as state:
            state.check({n: _shape(p) for n, p in _trained(trainer.net).items()}, self._optimizer(trainer))
            with torch.no_grad():
                self._layout(trainer).load(state)
                for name, buffer in _buffers(trainer.net).items():
                    buffer.copy_(state.buffer(name))
        if self.stage:
            engine: Any = trainer.model_wrapped
            engine.global_steps = trainer.state.global_step

    def _layout(self, trainer: FineTuner) -> Layout:
        optimizer: Any = trainer.optimizer
        while hasattr(optimizer, "optimizer") and not (self.stage and is_zero(optimizer)):
            optimizer = optimizer.optimizer
        return layout_of(_trained(trainer.net), optimizer, self.stage, *world())

    def _optimizer(self, trainer: FineTuner) -> str:
        inner: Any = trainer.optimizer
        while hasattr(inner, "optimizer"):
            inner = inner.optimizer
        return type(inner).__name__


def _say(trainer: FineTuner, message: str) -> None:
    if trainer.rank == 0:
        trainer.hooks.event({"kind": "status", "message": message})
    else:
        logger.warning("rank %d: %s", trainer.rank, message)


def _pieces(layout: Layout) -> list[tuple[str, Piece]]:
    """What this rank writes: each of its pieces of the weights and of every optimizer state."""
    kinds = (WEIGHT, *layout.kinds())
    return [(kind, piece) for piece in layout.pieces() if piece.count for kind in kinds]


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters by name, tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the model's weights on disk."""
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}
