"""Many LoRA adapters trained in one forward over one frozen base: the core of a shared-base sweep, without Ray.

`SharedBase` takes over the Linear layers and the attention of a transformers model. Adapters attach and detach between
steps; `step` takes a batch of each adapter that is to go on, runs them through the base together, and gives each its
own loss, clipping, AdamW, learning rate and step count. Nothing ever adds up across adapters, so each one's numbers are
what they would be alone, and a NaN stays with its owner.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ft_ray import adapter_state, lora, token_loss
from ft_ray.adapter_config import AdapterConfig, HeldOut, Stats, StepResult
from ft_ray.adapter_stack import Bucket, TargetShape
from ft_ray.adapter_state import Attached
from ft_ray.batch_sampler import DataOrder
from ft_ray.dropout_masks import Dropout
from ft_ray.errors import InputError
from ft_ray.forward_groups import Member, in_groups, out_of_memory, rounds
from ft_ray.frozen_base import FrozenBase
from ft_ray.segments import MicroBatch
from ft_ray.stacked_linear import Part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["RANK_BUCKETS", "AdapterConfig", "DataOrder", "HeldOut", "SharedBase", "Stats", "StepResult", "padded"]

logger = logging.getLogger("ft_ray")

RANK_BUCKETS = (8, 16, 32, 64, 128, 256)

Batch = MicroBatch | Sequence[MicroBatch]
"""What one adapter trains on in one step: a micro-batch, or several whose gradients add up."""


def padded(rank: int, buckets: Sequence[int] = RANK_BUCKETS) -> int:
    """The rank whose memory an adapter of `rank` takes. `buckets` in ascending order. InputError above the last."""
    for bucket in buckets:
        if rank <= bucket:
            return bucket
    raise InputError(f"lora.r {rank} is above {buckets[-1]}, the largest rank bucket: lower it.")


@dataclass
class _Counters:
    steps: int = 0
    forwards: int = 0
    adapters: int = 0
    slots: int = 0
    tokens: int = 0
    trained: int = 0
    out_of_memory: int = 0


class SharedBase:
    """One frozen base and the adapters on it. Not thread-safe: one caller, one step at a time.

    `exact` computes every matrix product adapter by adapter, which makes k adapters equal one alone bit for bit at some
    cost; None means where it is promised: fp32 on a CPU. `rank_buckets` are the ranks that adapters are padded up to:
    fewer buckets are fewer kernels, more of them less memory. `k_limit` bounds the adapters of a forward and is lowered
    when memory runs out. `logits_budget` is how many logits exist at a time: by default as many as make a GPU's matrix
    product efficient (512 tokens of a vocabulary of 128K), and a quarter of that on a CPU.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        exact: bool | None = None,
        rank_buckets: Sequence[int] = RANK_BUCKETS,
        k_limit: int | None = None,
        gradient_checkpointing: bool = False,
        logits_budget: int | None = None,
    ) -> None:
        self.model = model
        self.rank_buckets = tuple(sorted(rank_buckets))
        self.k_limit = k_limit
        budget = logits_budget or (2**26 if model.device.type == "cuda" else 2**24)
        self._base = FrozenBase(model, exact, gradient_checkpointing, budget)
        self.device, self.dtype, self.exact = self._base.device, self._base.dtype, self._base.exact
        self._adapters: dict[str, Attached] = {}
        self._buckets: dict[tuple[int, tuple[str, ...]], Bucket] = {}
        self._count = _Counters()
        self._measured_limit: int | None = None  # adapters of a forward in a measurement, once memory ran out in one

    # Adapters come and go

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    def attach(
        self,
        adapter_id: str,
        config: AdapterConfig,
        order: DataOrder | None = None,
        *,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds an adapter, fresh from its seed or from a `state_dict`. InputError for a name that is taken.

        Whatever it raises, running out of memory for one, nothing of the adapter stays.
        """
        if adapter_id in self._adapters:
            raise InputError(f"adapter {adapter_id!r} is attached already: detach it, or choose another id.")
        bucket = self._bucket(config.r, self._target_names(config))
        try:
            slot = bucket.add(adapter_id)
            self._adapters[adapter_id] = Attached(config, bucket, order)
            if state is None:
                bucket.initialise(slot, config.r, config.seed)
            else:
                self.load_state(adapter_id, state)
        except BaseException:
            if adapter_id in self._adapters:
                self.detach(adapter_id)
            self._drop_empty()
            raise

    def detach(self, adapter_id: str) -> None:
        """Forgets the adapter; its slot is compacted away, and an empty bucket gives its memory back."""
        adapter = self._get(adapter_id)
        adapter.bucket.remove(adapter_id)
        del self._adapters[adapter_id]
        self._drop_empty()

    def _drop_empty(self) -> None:
        for key in [key for key, bucket in self._buckets.items() if not bucket.ids]:
            del self._buckets[key]

    def next_rows(self, adapter_id: str) -> list[int]:
        """Rows of the adapter's next batch by its data order. InputError when it was attached without one."""
        adapter = self._get(adapter_id)
        if adapter.order is None:
            raise InputError(f"adapter {adapter_id!r} was attached without a data order: give one to attach.")
        return adapter.order.at(adapter.position)

    def bytes_per_adapter(self, config: AdapterConfig) -> int:
        """Memory an attached adapter takes: weights, gradient and two moments in fp32."""
        names = self._target_names(config)
        size = Bucket(self._padded(config.r), [self._shape(n) for n in names], torch.device("meta"), self.dtype).size
        return size * 16

    # Training

    def step(self, batches: Mapping[str, Batch]) -> dict[str, StepResult]:
        """One optimizer step of every adapter named, together; the others pause and cost nothing.

        An adapter whose loss or gradient is not finite stops with its last good weights, and the rest go on. When
        memory runs out, the step is done again with fewer adapters a forward. InputError for an unknown adapter.
        """
        micros: dict[str, list[MicroBatch]] = {}
        results: dict[str, StepResult] = {}
        for adapter_id, batch in batches.items():
            adapter = self._get(adapter_id)
            micros[adapter_id] = [batch] if isinstance(batch, MicroBatch) else list(batch)
            if adapter.stopped is None and not any(micro.trained for micro in micros[adapter_id]):
                adapter.stopped = "its batch holds no trained token"
            if adapter.stopped is not None:
                results[adapter_id] = self._result(adapter, math.nan, math.nan, 0)
                del micros[adapter_id]
        waiting = self._line_up(set(micros))
        for bucket in {id(b): b for _, b, _ in waiting}.values():
            bucket.begin_step(sum(1 for _, b, _ in waiting if b is bucket))
        while waiting:
            group = waiting[: self.k_limit]
            try:
                losses, norms = self._forward_backward(group, micros)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._count.out_of_memory += 1
                for _, bucket, slot in group:
                    bucket.grads[slot].zero_()
                error.__traceback__ = None  # it holds the frames, and they hold the activations
                self._make_room(group, results)
                waiting = [one for one in waiting if one[0] not in results]
                continue
            for (adapter_id, bucket, slot), loss, norm in zip(group, losses, norms, strict=True):
                results[adapter_id] = self._finish(adapter_id, bucket, slot, loss, norm, micros[adapter_id])
            waiting = waiting[len(group) :]
        self._count.steps += bool(micros)
        return {adapter_id: results[adapter_id] for adapter_id in batches}

    def evaluate(self, batches: Mapping[str, Batch]) -> dict[str, HeldOut]:
        """Held-out loss of the adapters, without dropout: sums of token losses, and each sequence's own.

        When memory runs out, it goes on with fewer adapters and sequences a forward. InputError for an unknown adapter.
        """
        for adapter_id in batches:
            self._get(adapter_id)
        micros = {i: [b] if isinstance(b, MicroBatch) else list(b) for i, b in batches.items()}
        members = self._line_up(set(micros))
        most = min(self._measured_limit or len(members), self.k_limit or len(members))

        def ran_out(size: int) -> None:
            self._count.out_of_memory += 1
            self._free()
            logger.warning("out of memory with %d adapters in a measurement: going on with fewer at a time", size)

        sums, size = in_groups(members, micros, max(1, most), self._held_out, ran_out)
        if size < most:
            self._measured_limit = size
        return {
            i: HeldOut(math.fsum(loss for loss, _ in sums[i]), sum(n for _, n in sums[i]), tuple(sums[i]))
            for i in batches
        }

    @property
    def stats(self) -> Stats:
        c = self._count
        return Stats(
            steps=c.steps,
            forwards=c.forwards,
            mean_k=c.adapters / c.forwards if c.forwards else 0.0,
            tokens=c.tokens,
            trained_tokens=c.trained,
            padding=1 - c.tokens / c.slots if c.slots else 0.0,
            out_of_memory=c.out_of_memory,
            k_limit=self.k_limit,
        )

    # State and export

    def state_dict(self, adapter_id: str) -> dict[str, Any]:
        """Everything that makes the adapter go on as if never interrupted: `tensors` (CPU, fp32) and JSON-able `meta`.

        Dropout needs no generator state: its masks are a function of the seed and the step.
        """
        return self.snapshot(adapter_id)()

    def snapshot(self, adapter_id: str) -> Callable[[], dict[str, Any]]:
        """`state_dict` in two steps: copies now, and lays the copy out when called, which any thread may do."""
        return adapter_state.take(self._get(adapter_id), adapter_id)

    def load_state(self, adapter_id: str, state: Mapping[str, Any]) -> None:
        """Puts an attached adapter where `state_dict` found it. InputError when the state is of another adapter."""
        adapter_state.put(self._get(adapter_id), adapter_id, state)

    def gradients(self, adapter_id: str) -> dict[str, Tensor]:
        """`NAME.A` [r, d] and `NAME.B` [o, r] of the last step, after clipping. For tests and diagnosis."""
        adapter = self._get(adapter_id)
        return adapter.bucket.save("grads", adapter.bucket.ids.index(adapter_id), adapter.config.r)

    def export(self, adapter_id: str, folder: Path) -> Path:
        """Writes adapter_config.json and adapter_model.safetensors (fp32) as PEFT does; peft and vLLM load them."""
        adapter = self._get(adapter_id)
        return adapter_state.export(adapter, adapter_id, self.model, folder)

    def close(self) -> None:
        """Gives the model back as it came; the adapters are gone."""
        self._base.close()
        self._adapters.clear()
        self._buckets.clear()

    # Inside a step

    def _forward_backward(
        self, group: Sequence[Member], micros: Mapping[str, list[MicroBatch]]
    ) -> tuple[list[float], list[float]]:
        """Losses and gradient norms of a group; gradients are left in the buckets."""
        tokens = {i: sum(micro.trained for micro in micros[i]) for i, _, _ in group}
        sums = {i: torch.zeros((), device=self.device) for i, _, _ in group}
        for round_, present in rounds(group, micros):
            used = [micros[adapter_id][round_] for adapter_id, _, _ in present]
            parts = self._parts(present, training=True)
            own = [self._adapters[adapter_id] for adapter_id, _, _ in present]
            dropouts = [Dropout.of(a.config.dropout, a.config.seed, a.step, round_) for a in own]
            with torch.enable_grad():  # the caller may evaluate and train under one no_grad
                losses, backward = self._base.losses(used, parts, [tokens[i] for i, _, _ in present], dropouts)
            backward()
            for (adapter_id, _, _), each in zip(present, losses, strict=True):
                sums[adapter_id] += each.sum()
            self._count.forwards += 1
            self._count.adapters += len(present)
            self._count.slots += max(batch.slots for batch in used) * len(used)
            self._count.tokens += sum(len(ids) for batch in used for ids, _ in batch.sequences)
        norms = torch.cat([bucket.norms(slot, slot + 1) for _, bucket, slot in group])
        both = torch.stack([torch.stack([sums[i] for i, _, _ in group]), norms]).tolist()  # the step's only wait
        return [loss / tokens[i] for loss, (i, _, _) in zip(both[0], group, strict=True)], both[1]

    def _held_out(
        self, group: Sequence[Member], micros: Mapping[str, list[MicroBatch]]
    ) -> dict[str, list[tuple[float, int]]]:
        """Sum of token losses and trained tokens of each sequence, by adapter; one wait for the device a forward."""
        sums: dict[str, list[tuple[float, int]]] = {adapter_id: [] for adapter_id, _, _ in group}
        with torch.no_grad():
            for round_, present in rounds(group, micros):
                used = [micros[adapter_id][round_] for adapter_id, _, _ in present]
                losses, _ = self._base.losses(used, self._parts(present), None)
                counts = [[MicroBatch((one,)).trained for one in batch.sequences] for batch in used]
                pieces = [own.double().split(each) for own, each in zip(losses, counts, strict=True)]
                found = torch.stack([piece.sum() for each in pieces for piece in each]).tolist()
                for (adapter_id, _, _), each in zip(present, counts, strict=True):
                    sums[adapter_id] += [(found.pop(0), n) for n in each]
        return sums

    def _parts(self, members: Sequence[Member], training: bool = False) -> list[Part]:
        """Runs of members that lie side by side in a bucket."""
        parts: list[Part] = []
        start = 0
        for stop in range(1, len(members) + 1):
            _, bucket, slot = members[start]
            if stop < len(members) and members[stop][1] is bucket and members[stop][2] == slot + stop - start:
                continue
            own = [self._adapters[adapter_id].config for adapter_id, _, _ in members[start:stop]]
            scales = [c.scale / (1 - c.dropout) if training else c.scale for c in own]
            on_device = torch.tensor(scales, dtype=torch.float32).view(-1, 1, 1).to(self.device, non_blocking=True)
            parts.append(Part(bucket, start, stop, slot, scales, on_device))
            start = stop
        return parts

    def _finish(
        self, adapter_id: str, bucket: Bucket, slot: int, loss: float, norm: float, micros: Sequence[MicroBatch]
    ) -> StepResult:
        adapter = self._adapters[adapter_id]
        tokens = sum(micro.trained for micro in micros)
        lr = adapter.config.lr_at(adapter.step)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            adapter.stopped = f"its {what} was not finite at step {adapter.step + 1}"
            logger.warning("adapter %s stops: %s; the others go on", adapter_id, adapter.stopped)
            return self._result(adapter, loss, norm, tokens)
        c = adapter.config
        bucket.update(
            slot, lr=lr, weight_decay=c.weight_decay, betas=c.betas, eps=c.eps,
            clip=token_loss.clip_factor(norm, c.max_grad_norm),
        )  # fmt: skip
        adapter.step += 1
        adapter.position += 1
        self._count.trained += tokens
        return replace(self._result(adapter, loss, norm, tokens), lr=lr)

    def _result(self, adapter: Attached, loss: float, norm: float, tokens: int) -> StepResult:
        lr = adapter.config.lr_at(adapter.step)
        return StepResult(loss, norm, lr, tokens, adapter.step, adapter.stopped)

    def _make_room(self, group: Sequence[Member], results: dict[str, StepResult]) -> None:
        """After running out of memory: checkpointed layers first, then half the adapters a forward, down to one.

        In this order because a recomputed forward costs less than a second one of half the size: 1.31 against 1.46 s
        for 16 adapters of 512 tokens on an 8B base (benchmarks/README.md).
        """
        self._free()
        if not self._base.checkpointing:
            logger.warning("out of memory with %d adapters in a forward: checkpointing layers", len(group))
            self._base.checkpoint()
            return
        if len(group) > 1:
            self.k_limit = max(1, len(group) // 2)
            logger.warning("out of memory with %d adapters in a forward: going on with %d", len(group), self.k_limit)
            return
        adapter_id = group[0][0]
        adapter = self._adapters[adapter_id]
        adapter.stopped = "its batch does not fit in memory even alone"
        logger.warning("adapter %s stops: %s; the others go on", adapter_id, adapter.stopped)
        results[adapter_id] = self._result(adapter, math.nan, math.nan, 0)

    def _free(self) -> None:
        """What the last forward left, and what torch keeps for later, goes back to the device."""
        self._base.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _line_up(self, active: set[str]) -> list[Member]:
        """The active adapters, bucket by bucket in the order of their slots, those of the same targets together."""
        members: list[Member] = []
        for _, bucket in sorted(self._buckets.items(), key=lambda one: one[0][1]):
            front = bucket.bring_forward(active)
            members += [(bucket.ids[slot], bucket, slot) for slot in range(front)]
        return members

    # Set-up

    def _get(self, adapter_id: str) -> Attached:
        try:
            return self._adapters[adapter_id]
        except KeyError:
            raise InputError(
                f"no adapter {adapter_id!r} is attached (there are: {', '.join(self._adapters) or 'none'})."
            ) from None

    def _padded(self, rank: int) -> int:
        return padded(rank, self.rank_buckets)

    def _shape(self, name: str) -> TargetShape:
        layer = self._base.layers[name]
        return TargetShape(name, layer.base.in_features, layer.base.out_features, layer.block.index)

    def _target_names(self, config: AdapterConfig) -> tuple[str, ...]:
        suffixes = lora.targets(self.model, config.targets)
        return tuple(n for n in self._base.layers if any(n == s or n.endswith(f".{s}") for s in suffixes))

    def _bucket(self, rank: int, names: tuple[str, ...]) -> Bucket:
        key = (self._padded(rank), names)
        if key not in self._buckets:
            self._buckets[key] = Bucket(key[0], [self._shape(n) for n in names], self.device, self.dtype)
        return self._buckets[key]
