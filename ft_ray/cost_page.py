"""docs/cost.md, written from the estimator: predictions beside measurements and beside the source guide's tables.

`python -m ft_ray.cost_page > docs/cost.md` writes it; a test checks that the file is current.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from ft_ray import cost_guide, cost_runs
from ft_ray.cost_models import GIB, MODELS, header, row
from ft_ray.gpu_table import RESERVED_MIB, table
from ft_ray.model_shape import read
from ft_ray.recipe import Adapter
from ft_ray.step_memory import Setting, memory

__all__ = ["render"]


def render() -> str:
    """The whole page as Markdown."""
    return "\n".join([*_head(), *cost_runs.section(), *cost_guide.section(), *_memory(), *_cards()]) + "\n"


def _head() -> Iterator[str]:
    yield "# Memory, time and cost"
    yield ""
    yield "<!-- Written by `python -m ft_ray.cost_page > docs/cost.md`. A test keeps it current: edit the code. -->"
    yield ""
    yield (
        "`ft-ray plan RECIPE` predicts these from the recipe and the model's config.json, without weights or a GPU. "
        "The formulas and their sources are in the docstrings of `ft_ray/step_memory.py` and `ft_ray/step_time.py`; "
        "cards and prices are data in `ft_ray/gpus.yaml`, and `--price` puts your own in their place."
    )
    yield ""


# (what, method, cards, ZeRO stage, optimizer offloaded, parameters offloaded)
_WAYS: tuple[tuple[str, str, int, int, bool, bool], ...] = (
    ("QLoRA", "qlora", 1, 0, False, False), ("LoRA", "lora", 1, 0, False, False),
    ("full", "full", 1, 0, False, False), ("full, ZeRO-3 on 4", "full", 4, 3, False, False),
    ("full, ZeRO-3 on 8", "full", 8, 3, False, False), ("the same, optimizer offloaded", "full", 8, 3, True, False),
)  # fmt: skip


def _memory() -> Iterator[str]:
    yield "## Memory by method and size"
    yield ""
    yield (
        "One row of 2,048 tokens a forward pass, r=64 on all seven projections, gradient checkpointing, fused "
        "cross-entropy, bf16 (QLoRA: NF4 with double quantization), 8-bit paged Adam for adapters and fp32 Adam for "
        "whole models. GiB of one card at the peak; the total adds fragmentation and context. Rules of thumb count "
        "weights and optimizer; they leave out activations, which grow with rows x tokens, the adapter's rank, "
        "embeddings that stay in 16 bits and, for QLoRA, the matrix that is being dequantized. Host memory of whole "
        "models holds the copy from which checkpoints are written (`checkpoint.snapshot`)."
    )
    yield ""
    yield from header("base", "method", "weights", "trained: weights, gradients, optimizer", "activations and loss",
                      "working", "total", "smallest card that holds it", "host memory")  # fmt: skip
    for model in MODELS:
        shape = read(MODELS[model])
        for what, method, world, zero, optimizer, parameters in _WAYS:
            setting = Setting(
                method=method,  # type: ignore[arg-type]
                rows=1,
                length=2048,
                accumulation=max(1, 16 // world),
                world=world,
                zero=zero,
                offload_optimizer=optimizer,
                offload_parameters=parameters,
                optimizer="adamw_torch" if method == "full" else "paged_adamw_8bit",
                adapter=Adapter(r=64),
                fused_kernels=method != "full",
                fused_adapters=method != "full",
                snapshot=method == "full",
            )
            peak = memory(shape, setting)
            fitting = sorted(
                (g for g in table().values() if g.bf16 and g.memory >= peak.total),
                key=lambda g: (round(g.memory_mib / 1024), g.usd_per_hour),
            )
            yield row(
                model, what, *(f"{size / GIB:.1f}" for size in (
                    peak.weights, peak.adapters + peak.gradients + peak.optimizer, peak.activations + peak.logits,
                    peak.working, peak.total,
                )),
                f"{world} x {fitting[0].name}" if fitting else "none of the table", f"{peak.host / GIB:,.0f}",
            )  # fmt: skip
    yield ""


def _cards() -> Iterator[str]:
    yield "## Cards and prices"
    yield ""
    yield (
        "TFLOP/s are dense bf16 (fp16 where there is no bf16). Listed prices were read on that date in a public "
        "price list or a page quoting it, recalled ones were not read again on that date. Prices differ by a "
        "factor of three between sellers: give your own. Memory is what the driver calls total; plans take "
        f"{RESERVED_MIB} MiB less, which it keeps for itself."
    )
    yield ""
    yield from header("card", "memory", "TFLOP/s", "GB/s", "$ an hour", "source", "date")
    for gpu in table().values():
        yield row(
            gpu.name, f"{gpu.memory_mib / 1024:.1f} GiB", f"{gpu.tflops:g}" + ("" if gpu.bf16 else " (fp16)"),
            f"{gpu.bandwidth_gbs:g}", f"{gpu.usd_per_hour:.2f}", f"{gpu.price_source} ({gpu.price_basis})",
            gpu.price_date,
        )  # fmt: skip


if __name__ == "__main__":
    sys.stdout.write(render())
