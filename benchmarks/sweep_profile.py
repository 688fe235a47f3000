"""Where a step of the shared base spends time and memory on a GPU, and what its parts are worth, in one process.

    python benchmarks/sweep_profile.py [--shape 8b] [--tokens 512] [--variants now,groups,...] [--json FILE]

The trials are those of sweep_cuda.py; every variant takes something back, or tries something, on the same base with
the same adapters. For each: seconds of a step, its peak, the peak and the seconds of forward, head, backward and
optimizer, how long the device is busy and with how many launches, and for the first the kernels by kind and by name.
With `--device cpu --shape tiny` it shows that it works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sweep_cuda import ROWS, TRIALS, base, rows, settings, wait  # noqa: E402

KINDS = (
    ("attention", ("flash", "fmha", "attention")),
    ("dequantize", ("dequant",)),
    ("norm, SwiGLU (Liger)", ("rms_norm", "swiglu", "silu_mul")),
    ("AdamW", ("adam",)),
    ("random", ("distribution", "random")),
    ("dropout", ("masked_scale",)),
    ("softmax", ("softmax", "logsumexp")),
    ("matrix products", ("gemm", "cutlass", "nvjet", "xmma", "cublas", "splitk")),
    ("norms, sums", ("reduce",)),
    ("copies, casts", ("copy", "memcpy", "memset", "cat")),
    ("indexing", ("index", "gather", "scatter")),
    ("elementwise", ("elementwise",)),
)


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, words in KINDS if any(word in name for word in words)), "other")


class Phases:
    """Seconds and highest memory of the parts of a step, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peaks: dict[str, float] = defaultdict(float)
        self._since = wait()

    def end(self, name: str) -> None:
        """What went before belongs to `name`."""
        import torch

        now = wait()
        self.seconds[name] += now - self._since
        if torch.cuda.is_available():
            self.peaks[name] = max(self.peaks[name], torch.cuda.max_memory_allocated() / 2**30)
            torch.cuda.reset_peak_memory_stats()
        self._since = wait()

    @contextmanager
    def of(self, shared: Any) -> Iterator[None]:
        """Watches the steps made inside."""
        from ft_ray import token_loss

        losses, head = shared._base.losses, token_loss.token_losses

        def watched(*args: Any) -> Any:
            self.end("optimizer and set-up")
            found, backward = losses(*args)
            self.end("head")

            def run() -> None:
                backward()
                self.end("backward")

            return found, run

        def watched_head(*args: Any, **options: Any) -> Any:
            self.end("forward")
            return head(*args, **options)

        self.end("")
        self.seconds.clear(), self.peaks.clear()
        with (
            mock.patch.object(shared._base, "losses", watched),
            mock.patch.object(token_loss, "token_losses", watched_head),
        ):
            yield
        self.end("optimizer and set-up")


def kept_layers(shared: Any, count: int) -> Callable[[], None]:
    """The last `count` decoder layers keep their activations. Returns what undoes it."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in shared._base._decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    before = [layer.gradient_checkpointing for layer in layers]

    def put(values: list[bool]) -> None:
        for layer, value in zip(layers, values, strict=True):
            layer.gradient_checkpointing = value

    put([i < len(layers) - count for i in range(len(layers))])
    return lambda: put(before)


def patched(target: Any, name: str, value: Any) -> Callable[[], None]:
    before = getattr(target, name)
    setattr(target, name, value)
    return lambda: setattr(target, name, before)


def added_after(shared: Any) -> Callable[[], None]:
    """B's product grouped as well, and added to the base's by a kernel of its own."""
    from ft_ray import grouped_products

    def add(self: Any, step: Any, low: Any, matrices: Any, into: Any) -> None:
        into += grouped_products.grouped_mm(low, matrices[1], offs=self._offsets)

    return patched(grouped_products.Group, "add", add)


def plain_rope(shared: Any) -> Callable[[], None]:
    """As before: transformers' own rotation of queries and keys, some twenty kernels a layer."""
    from ft_ray import kernels

    layers = [m for m in shared.model.modules() if type(m).__name__ in kernels._ATTENTION and "forward" in vars(m)]
    before = [layer.forward for layer in layers]
    for layer in layers:
        del layer.forward

    def undo() -> None:
        for layer, forward in zip(layers, before, strict=True):
            layer.forward = forward

    return undo


def dequantize_each_time(shared: Any) -> Callable[[], None]:
    """As before: also for the backward that follows a recompute."""
    from ft_ray.stacked_linear import StackedLinear

    weight = StackedLinear.weight

    def fresh(self: Any, dtype: Any) -> Any:
        self._kept = None
        return weight(self, dtype)

    return patched(StackedLinear, "weight", fresh)


def expandable(shared: Any) -> Callable[[], None]:
    import torch

    torch.cuda.empty_cache()
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    return lambda: torch.cuda.memory._set_allocator_settings("expandable_segments:False")


def nothing() -> None:
    """Undoes what changed nothing."""


VARIANTS: dict[str, Callable[[Any], Callable[[], None]]] = {
    "now": lambda shared: nothing,
    "stored_masks": lambda shared: patched(shared._base._context, "seeded", False),  # made for a block, and kept
    "groups": lambda shared: patched(shared._base, "varlen", False),  # attention by padded length, as before
    "small_head": lambda shared: patched(shared._base, "logits_budget", 2**24),  # 128 rows at a time
    "large_head": lambda shared: patched(shared._base, "logits_budget", 2**27),
    "masks_again": lambda shared: patched(shared._base._context, "checkpointing", False),  # x kept, masked twice
    "dequantize_each_time": dequantize_each_time,
    "keep_0": lambda shared: kept_layers(shared, 0),
    "keep_2": lambda shared: kept_layers(shared, 2),
    "keep_4": lambda shared: kept_layers(shared, 4),
    "keep_8": lambda shared: kept_layers(shared, 8),
    "keep_16": lambda shared: kept_layers(shared, 16),
    "by_rank": lambda shared: patched(shared._base, "grouped", False),  # a product for each rank, as before
    "added_after": added_after,
    "plain_rope": plain_rope,
    "expandable": expandable,
    "keep_all": lambda shared: kept_layers(shared, 10**6),  # no checkpointing: last, it may run out of memory
}


def kernels_of(step: Callable[[], Any], on_gpu: bool) -> dict[str, Any]:
    import torch

    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profiler:
        step()
        wait()
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    every = [(e.key, getattr(e, field) / 1e6, e.count) for e in profiler.key_averages()]
    if on_gpu:  # runtime calls are in the list too, and take no time of the device
        every = [one for one in every if one[1] > 0]
    kinds: dict[str, float] = defaultdict(float)
    for name, seconds, _ in every:
        kinds[kind_of(name)] += seconds
    top = sorted(every, key=lambda one: -one[1])[:25]
    return {
        "busy_s": sum(s for _, s, _ in every), "launches": sum(n for *_, n in every),
        "kinds": dict(sorted(kinds.items(), key=lambda one: -one[1])),
        "top": [{"name": name[:110], "s": round(s, 4), "count": n} for name, s, n in top],
    }  # fmt: skip


def memory_now() -> float:
    import torch

    return torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--shape", default="8b", choices=("tiny", "1b", "8b"))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6, help="of a variant; the first two are not counted")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    import torch

    from ft_ray.segments import MicroBatch
    from ft_ray.shared_base import AdapterConfig, SharedBase

    on_gpu = given.device == "cuda"
    model = base(given.shape, given.shape != "tiny", given.device)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__,
        "tokens": given.tokens, "loaded_gib": memory_now(), "variants": {},
    }  # fmt: skip
    shared = SharedBase(model, gradient_checkpointing=True)
    for trial, one in enumerate(settings()):
        shared.attach(f"t{trial}", AdapterConfig(**one, total_steps=10**4, warmup=0.0))
    found |= {"attached_gib": memory_now(), "varlen": shared._base.varlen}
    print(json.dumps(found), flush=True)
    data = [rows(given.tokens, given.steps, trial) for trial in range(TRIALS)]

    def step(number: int) -> None:
        part = slice(number * ROWS, (number + 1) * ROWS)
        shared.step({f"t{t}": MicroBatch.of((row, row) for row in own[part]) for t, own in enumerate(data)})

    for name in given.variants.split(","):
        one = found["variants"][name] = {}
        undo = nothing
        try:
            undo = VARIANTS[name](shared)
            seconds = []
            for number in range(given.steps):
                if number == 2 and on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                begin = wait()
                step(number)
                seconds.append(wait() - begin)
            one |= {"seconds": statistics.median(seconds[2:]), "all_seconds": seconds}
            if on_gpu:
                one |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30}  # fmt: skip
            phases = Phases()
            with phases.of(shared):
                step(0)
            one |= {"phase_seconds": dict(phases.seconds), "phase_peaks_gib": dict(phases.peaks)}
            kernels, first = kernels_of(lambda: step(1), on_gpu), name == given.variants.split(",")[0]
            one |= kernels if first else {"busy_s": kernels["busy_s"], "launches": kernels["launches"]}
        except Exception as error:
            one["error"] = f"{type(error).__name__}: {error}"[:400]
        finally:
            undo()
        print(json.dumps({name: {k: v for k, v in one.items() if k != "all_seconds"}}, indent=1), flush=True)
        found["out_of_memory"] = shared.stats.out_of_memory
        if given.json:
            given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
