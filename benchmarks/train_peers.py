"""Full fine-tuning without ft-ray, one rank each, as torchrun starts them: what train_full.py sets beside it.

    trl     TRL's SFTTrainer with the DeepSpeed configuration that ft-ray derives, with DeepSpeed's own Linear
    whole   the same with decoder layers taken whole and torch's Linear, as ft-ray has it: the rest is Ray Train's
    fsdp2   a bare loop over torch's fully_shard, fp32 masters, bf16 compute and gradients
    loop    a bare loop on one device: fp32 weights, autocast, AdamW

The loops compute the loss in chunks and checkpoint their layers, as the others do. Rank 0 writes the answer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from full_rows import Case, Rows, recipe_of, rows_of, work_file
from step_profile import StepProfile

CHUNK = 2048  # tokens whose logits exist at once
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LOCAL = int(os.environ.get("LOCAL_RANK", "0"))


def device_of(case: Case) -> Any:
    import torch

    if case.device == "cpu":
        torch.set_num_threads(1)
        return torch.device("cpu")
    torch.cuda.set_device(LOCAL)
    return torch.device("cuda", LOCAL)


def _lean(settings: dict[str, Any]) -> None:
    """A candidate, for one rank only: weights that nobody else has a part of are neither released nor gathered.

    What one rank 'gathers' is its own partition, the same memory. DeepSpeed's NVTX ranges and debug texts go too.
    """
    assert WORLD == 1, "several ranks have parts to gather"
    import deepspeed.runtime.zero.partition_parameters as parts
    import deepspeed.utils.nvtx as nvtx
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 10**15
    nvtx.enable_nvtx = False
    parts.print_rank_0 = lambda *_, **__: None
    parts.debug_param2name_id_shape_device = lambda _: ""

    def keep(self: Any) -> None:
        for parameter in self.module.parameters():
            parameter.ds_active_sub_modules.clear()

    DeepSpeedZeRoOffload.partition_all_parameters = keep


def trl(case: Case, whole: bool) -> dict[str, Any]:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    import deepspeed
    import torch
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from ft_ray import kernels
    from ft_ray.objective import plan_batch
    from ft_ray.whole_layers import gather_whole_layers
    from ft_ray.zero3 import config, layer_parameters

    device_of(case)
    on_gpu = case.device == "cuda"
    if not on_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    PartialState(backend="nccl" if on_gpu else "gloo")
    made = recipe_of(case, WORLD)
    batch = plan_batch(made, case.device)
    model = json.loads((Path(case.model) / "config.json").read_text())
    layer = layer_parameters(model) if whole else 0
    settings = config(made, batch, model["hidden_size"], on_gpu=on_gpu, layer=layer)
    settings["zero_optimization"]["memory_efficient_linear"] = not whole
    if whole and case.lean:
        _lean(settings)
    args = SFTConfig(
        output_dir=f"{case.work}/out", per_device_train_batch_size=batch.per_device, max_steps=case.steps,
        gradient_accumulation_steps=batch.accumulation, learning_rate=1e-5, lr_scheduler_type="constant",
        warmup_steps=0, weight_decay=0.0, optim="adamw_torch_fused", bf16=on_gpu, use_cpu=not on_gpu,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, seed=0,
        accelerator_config={"use_configured_state": True}, deepspeed=settings,
    )  # fmt: skip
    ends: list[float] = []
    losses: list[float] = []
    profile = StepProfile(case.steps - 4)

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            ends.append(time.monotonic())
            if case.profile:
                profile.ended(len(ends))

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    dtype = torch.bfloat16 if on_gpu else torch.float32
    net = AutoModelForCausalLM.from_pretrained(case.model, dtype=dtype, attn_implementation="sdpa")
    net.config.use_cache = False
    if whole:
        gather_whole_layers(net)
    if whole and case.fused:
        print(f"fused kernels in {kernels.fuse(net)} modules", flush=True)
    trainer = SFTTrainer(
        net, args=args, train_dataset=Rows(case).tokens("train").remove_columns("length"),
        processing_class=AutoTokenizer.from_pretrained(case.model), callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return {"ends": ends, "losses": losses, "profile": profile.found}


def loop(case: Case, sharded: bool) -> dict[str, Any]:
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy
    from torch.utils.checkpoint import checkpoint
    from transformers import AutoConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from ft_ray.batch_sampler import RankBatches
    from ft_ray.objective import plan_batch

    device, on_gpu = device_of(case), case.device == "cuda"
    if WORLD > 1 or sharded:
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    config = AutoConfig.from_pretrained(case.model, dtype=torch.float32, attn_implementation="sdpa", use_cache=False)

    class Net(nn.Module):
        """The model with its loss inside: a sharded head is whole within forward alone."""

        def __init__(self) -> None:
            super().__init__()
            self.inner: Any = LlamaForCausalLM(config)

        def forward(self, ids: Any, targets: Any) -> Any:
            hidden = self.inner.model(input_ids=ids).last_hidden_state.flatten(0, 1)
            parts = zip(hidden.split(CHUNK), targets.flatten().split(CHUNK), strict=True)
            return torch.stack([checkpoint(self.part, h, t, use_reentrant=False) for h, t in parts]).sum()

        def part(self, hidden: Any, targets: Any) -> Any:
            return cross_entropy(self.inner.lm_head(hidden).float(), targets, reduction="sum", ignore_index=-100)

    with torch.device("meta"):
        net: Any = Net()
    net.inner.gradient_checkpointing_enable({"use_reentrant": False})
    net.train()
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(case.device, (WORLD,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if on_gpu else MixedPrecisionPolicy()
        for layer in net.inner.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(net, mesh=mesh, mp_policy=policy)
    net.to_empty(device=device)
    net.inner.tie_weights()
    net.inner.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    load(net.inner, Path(case.model), device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    batch = plan_batch(recipe_of(case, WORLD), case.device)
    rows = torch.tensor(rows_of(case))
    order = RankBatches(len(rows), batch, rank=RANK, seed=0)
    ends: list[float] = []
    losses: list[float] = []
    profile = StepProfile(case.steps - 4)
    trained = case.global_rows * (case.length - 1)
    compute = torch.autocast("cuda", torch.bfloat16) if on_gpu and not sharded else contextlib.nullcontext()
    for step in range(1, case.steps + 1):
        total = torch.zeros((), device=device)
        for numbers in order.rows_of(step):
            ids = rows[numbers].to(device)
            targets = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
            with compute:
                loss = net(ids, targets) / trained
            (loss * WORLD).backward()  # gradients are averaged over ranks
            total += loss.detach()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if WORLD > 1:
            torch.distributed.all_reduce(total)
        losses.append(float(total))
        ends.append(time.monotonic())
        if case.profile:
            profile.ended(step)
    return {"ends": ends, "losses": losses, "profile": profile.found}


def load(model: Any, folder: Path, device: Any) -> None:
    """The folder's weights into a model that may be sharded, one tensor on the device at a time."""
    import torch
    from safetensors import safe_open
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                    value, target = opened.get_tensor(name).to(device, torch.float32), parameters[name]
                    if isinstance(target, DTensor):  # every rank reads the same: nothing need be sent
                        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
                    target.copy_(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("trl", "whole", "fsdp2", "loop"), required=True)
    parser.add_argument("--case", type=json.loads, required=True)
    parser.add_argument("--name", required=True)
    given = parser.parse_args()
    import torch

    case = Case(**given.case)
    if given.side in ("trl", "whole"):
        found = trl(case, given.side == "whole")
    else:
        found = loop(case, sharded=given.side == "fsdp2")
    peaks = [torch.cuda.max_memory_allocated() if case.device == "cuda" else 0]
    if torch.distributed.is_initialized():
        every: list[Any] = [None] * WORLD
        torch.distributed.all_gather_object(every, peaks[0])
        peaks = every
    if RANK == 0:
        work_file(case, given.name).write_text(json.dumps({**found, "peaks": peaks}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
