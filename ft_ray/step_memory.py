"""Device and host memory of one training step, by part, from shapes and settings alone.

Sources: parameters, gradients and optimizer states as in ZeRO (arXiv:1910.02054, section 3.1: 2 + 2 + 12 bytes a
parameter for Adam in mixed precision, divided by stage); NF4 and its constants as in QLoRA (arXiv:2305.14314,
section 3); activations by listing the tensors that a layer keeps for its backward, the method of arXiv:2205.05198
(section 4), for a gated MLP, grouped-query attention, attention kernels without a score matrix and RMSNorm in
fp32. The peak is the largest of four moments of a step, because they don't coincide: checkpoints shrink while
gradients grow. docs/cost.md sets the results beside measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ft_ray import cpu_memory, nvme
from ft_ray.model_shape import FUSED, ModelShape, adapted, lora_parameters
from ft_ray.recipe import Adapter, Recipe

__all__ = [
    "Memory", "Setting", "auto_rows", "layer_bytes", "memory", "optimizer_bytes", "trained_parameters", "weight_bytes",
]  # fmt: skip

# Not in torch's own figures: CUDA context and libraries of one process (nvidia-smi against torch on an empty model).
CONTEXT = 600 * 2**20
# What an H100 took beside every part, whatever the model (benchmarks/results/memory_h100.json). The size is that of
# cuBLAS's and cuBLASLt's workspaces, which torch takes from its allocator; other cards were not measured.
WORKSPACE = 64 * 2**20
# The caching allocator rounds to 512 bytes and 2 MiB segments and strands pieces between sizes: an allowance.
FRAGMENTED = 0.05
# DeepSpeed's defaults, in elements: stage3_max_live_parameters, sub_group_size, reduce and all-gather buckets.
LIVE, SUB_GROUP, BUCKET = 10**9, 10**9, 5 * 10**8
# TRL's fused output projection works on tiles of so many tokens and vocabulary entries (trl 1.16, chunked_logprob).
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
# One rank's interpreter with torch, transformers and Ray, and a safetensors shard on its way to the device.
PROCESS, SHARD = int(2.5 * 2**30), 5 * 10**9
# Tokens a forward pass is sized for where batch.per_device is auto. A GPU is launch-bound below this; on a CPU larger
# batches only cost memory.
_AUTO_TOKENS = {"cuda": 16_384, "cpu": 4_096}


@dataclass(frozen=True)
class Setting:
    """What decides a step's memory and time. `rows` x `length` tokens go through one device in a forward pass.

    `adapters` above 1 is a sweep on a shared base: each has its own rows. `adapter_bytes` is the size of a trained
    adapter weight: a run keeps adapters in fp32 (`sft`), the prototype behind some measured rows had them in bf16.
    With `nvme_group` (elements of a sub-group) optimizer states are on NVMe.
    With `snapshot` the host holds what is saved of a GPU's state once more (`checkpoint.snapshot`).
    Off a GPU the same tensors lie in host memory, beside other buffers (`cpu_memory`).
    """

    method: Literal["full", "lora", "qlora"]
    rows: int
    length: int
    accumulation: int = 1
    world: int = 1
    zero: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    nvme_group: int = 0
    checkpointing: bool = True
    fused_loss: bool = True
    fused_kernels: bool = False
    fused_adapters: bool = False
    packed: bool = False
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    optimizer: str = "adamw_torch"
    adapter: Adapter = field(default_factory=Adapter)
    double_quantization: bool = True
    adapter_bytes: int = 4
    adapters: int = 1
    snapshot: bool = False
    on_gpu: bool = True

    def __post_init__(self) -> None:
        if (self.offload_optimizer and not self.zero) or (self.offload_parameters and self.zero < 3):
            raise ValueError("offload is DeepSpeed's: the optimizer from ZeRO stage 1, parameters from stage 3")

    @classmethod
    def of(cls, recipe: Recipe, *, world: int | None = None, rows: int | None = None) -> Setting:
        """The setting a recipe describes on `world` devices; full fine-tuning on several takes ZeRO-3."""
        world = world or recipe.resources.workers
        share = max(1, recipe.batch.global_ // world)
        rows = rows or (1 if recipe.batch.per_device == "auto" else min(recipe.batch.per_device, share))
        zero = recipe.zero_stage
        if recipe.resources.sharding == "auto":
            zero = 3 if recipe.method == "full" and world > 1 else 0
        on_nvme = zero == 3 and nvme.path_of(recipe.deepspeed) is not None
        zero_keys = recipe.deepspeed.get("zero_optimization", {})
        group = int(zero_keys.get("sub_group_size", SUB_GROUP)) if on_nvme else 0
        return cls(
            method=recipe.method,
            rows=rows,
            length=recipe.sequence.max_length,
            accumulation=max(1, share // rows),
            world=world,
            zero=zero,
            offload_optimizer=(recipe.resources.offload_optimizer or on_nvme) and zero > 0,
            nvme_group=group,
            offload_parameters=recipe.resources.offload_parameters and zero == 3,
            checkpointing=recipe.gradient_checkpointing,
            fused_kernels=recipe.fuses,
            fused_adapters=recipe.fuses and not recipe.lora.dora,
            packed=recipe.sequence.packing,
            precision=recipe.precision,
            optimizer=recipe.optim.name,
            adapter=recipe.lora,
            double_quantization=recipe.quantization.double,
            snapshot=recipe.method == "full" and recipe.checkpoint.snapshot is not False,
        )

    @property
    def element(self) -> int:
        """Bytes of a value in the compute dtype."""
        return 4 if self.precision == "fp32" else 2

    @property
    def tokens(self) -> int:
        """Tokens one device works on at a time."""
        return self.rows * self.length * self.adapters

    def but(self, **changes: object) -> Setting:
        return replace(self, **changes)  # type: ignore[arg-type]


def auto_rows(share: int, length: int, *, on_gpu: bool) -> int:
    """Rows a forward pass where batch.per_device is auto: the most that divide a device's share and are few enough."""
    most = max(1, _AUTO_TOKENS["cuda" if on_gpu else "cpu"] // length)
    return max(d for d in range(1, share + 1) if share % d == 0 and d <= most)


class Memory(BaseModel):
    """Bytes at the peak of a step, on each device, by part; `moment` says when the peak is.

    `working` is cuBLAS's workspaces and what is unpacked or gathered for a while (a dequantized matrix, ZeRO's live
    parameters and buckets). `allocated` is what torch.cuda.max_memory_allocated would say; `total` adds what the
    allocator strands (`fragmentation`) and the CUDA context, and is what must fit the card; on a CPU it is the resident
    set of a rank, and `context` its process before the model. `host` is the memory of one host with all ranks.
    """

    model_config = ConfigDict(frozen=True)

    moment: Literal["loss", "backward starts", "backward ends", "update"]
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    working: int
    fragmentation: int
    context: int
    host: int

    @property
    def allocated(self) -> int:
        parts = (self.weights, self.adapters, self.gradients, self.optimizer, self.activations, self.logits)
        return sum(parts) + self.working

    @property
    def total(self) -> int:
        return self.allocated + self.fragmentation + self.context


def trained_parameters(shape: ModelShape, setting: Setting) -> int:
    """Parameters that the optimizer updates, of all adapters together."""
    if setting.method == "full":
        return shape.parameters
    return lora_parameters(shape, setting.adapter) * setting.adapters


def nf4_bits(double: bool) -> float:
    """Bits a weight: 4, a constant in fp32 for each 64, or in 8 bits with an fp32 one for each 256 of those.

    arXiv:2305.14314, section 3: double quantization takes the constants from 0.5 to 0.127 bits.
    """
    return 4 + (8 / 64 + 32 / (64 * 256) if double else 32 / 64)


def weight_bytes(shape: ModelShape, setting: Setting) -> int:
    """The base in device memory, unsharded: compute dtype, or NF4 for what bitsandbytes quantizes.

    A whole model trained without DeepSpeed is its own fp32 master copy, computed with under autocast.
    """
    if setting.method == "full" and not setting.zero:
        return shape.parameters * 4
    if setting.method != "qlora":
        return shape.parameters * setting.element
    packed = shape.linear_weights * nf4_bits(setting.double_quantization) / 8
    return int(packed) + (shape.parameters - shape.linear_weights) * setting.element


def optimizer_bytes(name: str, weight: int) -> float:
    """Bytes of state a trained weight of `weight` bytes has, without a master copy.

    torch keeps moments in the weight's own dtype; bitsandbytes' 8-bit ones add an fp32 constant for each 256
    (arXiv:2110.02861); Adafactor keeps row and column sums only (arXiv:1804.04235). Unknown names count as Adam.
    """
    name = name.lower()
    states = 1 if "lion" in name or "rmsprop" in name or "adagrad" in name else 2
    if "adafactor" in name:
        return 0.02
    if name.startswith("sgd"):
        return 0
    if "8bit" in name:
        return states * (1 + 4 / 256)
    return states * weight


def layer_bytes(shape: ModelShape, setting: Setting) -> tuple[int, int]:
    """Bytes a token: what one layer keeps for its backward, and what that backward needs on top for a while.

    Kept, with e bytes an element, hidden h, MLP width f: gate, up and activation (3ef); queries, keys, values and
    output for the attention kernel; the fp32 input of each RMSNorm (4h). What is trained keeps its input: whole
    models and uncast adapters the norms' outputs and the MLP's product once (e(2h + f)), whole models also the
    norms' normalised values; inputs cast to an adapter's fp32 (PEFT does so on a 16-bit base, and autocast casts
    back; on a 4-bit base under autocast it does not, but on a CPU, where it does not see that autocast is on; the
    forward of `fused_lora` never does) or behind a dropout a copy for each module, and the dropout a mask of one byte,
    on a CPU of the input's own type. A test counts these on real modules with saved-tensor hooks.
    On top: two gradients of the MLP's width, of the product by base and adapter or of gate and up, and one of the
    stream.
    Fused kernels compute the activation again (2ef for gate and up) and norms from their 16-bit input (eh each).
    Packed rows lie in one sequence with a mask of all pairs, of which `sdpa` keeps a copy in the compute dtype, and
    keys and values repeated for every head; `row_attention`, which fused kernels bring, needs neither.
    """
    e, h, f = setting.element, shape.hidden, shape.intermediate
    norms = shape.norms_per_layer
    attention = e * 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    fused = setting.fused_kernels and setting.on_gpu and setting.method != "full" and shape.model_type in FUSED
    if setting.packed and setting.on_gpu and not (fused and shape.window is None):
        attention = e * (4 * shape.heads * shape.head_dim + setting.tokens)
    mlp = (2 if fused else 3 if shape.gated else 5 if shape.tanh_gelu else 1) * e * f
    kept = mlp + attention + norms * (4 if shape.gated and not fused else e) * h
    shared = e * (2 * h + f)
    if setting.method == "full":
        kept += shared + (norms * e * h if shape.gated else 0)
        return kept, 2 * e * f + e * h
    modules = adapted(shape, setting.adapter)
    width = sum(m.d_in * m.copies * m.active for m in modules) / shape.layers
    uncast = setting.on_gpu and (setting.method == "qlora" or setting.fused_adapters)
    cast = setting.adapter_bytes != e and not uncast
    dropped = setting.adapter.dropout > 0
    mask = (1 if setting.on_gpu else setting.adapter_bytes) * dropped
    kept += int(width * (e + mask)) if cast or dropped else shared
    kept += int(sum(m.rank * m.copies * m.active for m in modules) / shape.layers * setting.adapter.r * e)
    # Behind a dropout an uncast adapter's gradient is there in 16 bits, cast to fp32, and once more after the dropout.
    again = e + setting.adapter_bytes if cast and dropped else 0
    return kept, (e + (setting.adapter_bytes if cast else e) + again) * f + e * h


def memory(shape: ModelShape, setting: Setting) -> Memory:
    """Peak memory of a training step on one device, and of its host."""
    trained, tokens, e = trained_parameters(shape, setting), setting.tokens, setting.element
    full, world = setting.method == "full", setting.world
    weights = weight_bytes(shape, setting)
    adapters = 0 if full else trained * setting.adapter_bytes
    value = (e if setting.zero else 4) if full else setting.adapter_bytes
    # What accumulates does so in fp32 (zero3.config): addends of many passes would be lost in 16 bits.
    gradients = trained * (4 if full and setting.accumulation > 1 else value)
    # DeepSpeed updates an fp32 master copy of what it trains in 16 bits.
    master = setting.zero > 0 and value == 2
    optimizer = int(trained * (optimizer_bytes(setting.optimizer, 4 if master else value) + (4 if master else 0)))
    working = WORKSPACE if setting.on_gpu else cpu_memory.packed(shape.largest_matrix, e)
    working += shape.largest_matrix * e if setting.method == "qlora" else 0
    live = autocast = update = 0
    if full and not setting.zero and e == 2:
        autocast = 2 * (shape.parameters - shape.embedding_parameters)  # cached casts, until the forward ends
    if setting.zero == 0:
        if setting.optimizer in ("adamw_torch", "adamw_hf"):
            # torch's default foreach loop holds the square roots of all second moments at once (fused ones do not); on
            # a CPU it goes tensor by tensor, with two such temporaries.
            largest = max(shape.largest_matrix, shape.vocab * shape.hidden) if full else 0
            update = trained * (4 if master else value) if setting.on_gpu else 2 * largest * 4
        if world > 1:
            gradients *= 2  # DistributedDataParallel reduces copies in buckets
    offloaded = optimizer if setting.offload_optimizer else 0
    if setting.nvme_group:  # in memory are DeepSpeed's four fp32 buffers of a sub-group for each rank
        offloaded = 4 * 4 * world * min(setting.nvme_group, trained // world)
    if setting.offload_optimizer:
        optimizer = 0
    if setting.zero >= 1:
        optimizer //= world
        working += 2 * min(BUCKET, trained) * e
    if setting.zero >= 2:
        if setting.offload_optimizer:
            offloaded += gradients
            gradients = 0
        gradients //= world
        update = 0 if setting.offload_optimizer else 4 * min(SUB_GROUP, trained // world)
    if setting.zero >= 3:
        live = min(LIVE, shape.parameters) * e
        if setting.offload_parameters:
            offloaded += weights + adapters
            weights = adapters = 0
        weights, adapters = weights // world, adapters // world

    kept, transient = layer_bytes(shape, setting)
    # Sums of fp32 embeddings and 16-bit branches stay fp32 under autocast.
    stream = tokens * shape.hidden * (4 if autocast else e)
    if setting.checkpointing:
        checkpoints, layer = stream * shape.layers, tokens * (kept + transient)
    else:
        checkpoints, layer = tokens * kept * shape.layers, tokens * transient
    logits = _logits(shape, setting)
    # Accumulated gradients outlive a backward, and DeepSpeed keeps their buffer; else they appear as it goes.
    before = gradients if setting.accumulation > 1 or setting.zero >= 1 else 0
    moments: list[tuple[Literal["loss", "backward starts", "backward ends", "update"], int, int, int, int]] = [
        ("loss", checkpoints, logits, before, live + autocast),
        ("backward starts", checkpoints + layer, 0, before, live),
        ("backward ends", stream + tokens * (kept + transient), 0, gradients, live),
        ("update", 0, 0, gradients, update),
    ]
    moment, activations, logits, gradients, extra = max(moments, key=lambda m: sum(m[1:]))
    changing = activations + logits + gradients + working + extra
    host = world * (PROCESS + min(SHARD, weight_bytes(shape, setting)))
    if setting.snapshot and not setting.offload_optimizer:
        host += int(trained * (4 + optimizer_bytes(setting.optimizer, 4)))  # fp32, shared out over the ranks
    fragmentation, context = int(changing * FRAGMENTED), CONTEXT
    if not setting.on_gpu:
        fragmentation = 0 if setting.checkpointing else cpu_memory.rounded_up(checkpoints)
        context = cpu_memory.PROCESS
        host = world * (weights + adapters + optimizer + changing + fragmentation + context)
    return Memory(
        moment=moment,
        weights=weights,
        adapters=adapters,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        working=working + extra,
        fragmentation=fragmentation,
        context=context,
        host=host + int(1.1 * offloaded),
    )


def _logits(shape: ModelShape, setting: Setting) -> int:
    """Bytes at the loss.

    Whole logits: 12 bytes each under 16 bits, because the backward of torch's cross-entropy holds the log-softmax,
    the gradient on it and the gradient on the fp32 logits together, all fp32 (16 with fp32 logits kept too).
    Fused: a tile, the trained positions' hidden states once more and their fp32 gradient; where the output matrix is
    trained its fp32 gradient and a tile's cast. On a CPU a frozen matrix has a head of our own, and TRL's goes without
    a kernel.
    """
    e, full = setting.element, setting.method == "full"
    if not (setting.on_gpu or full):
        return cpu_memory.frozen_head(setting.tokens, shape.vocab, shape.hidden, e)
    if not setting.fused_loss:
        return setting.tokens * shape.vocab * (12 if e == 2 else 16)
    width, rows = min(shape.vocab, TILE_VOCABULARY), min(setting.tokens, TILE_TOKENS)
    tile = rows * TILE_VOCABULARY * e  # its buffer has one width
    if not setting.on_gpu:
        tile += cpu_memory.trained_head(rows, width) + cpu_memory.packed(width * shape.hidden, e)
    head = shape.hidden * (shape.vocab * 4 + width * e) if full else 0
    return tile + setting.tokens * shape.hidden * (4 + e) + head
