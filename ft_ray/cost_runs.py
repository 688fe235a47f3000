"""docs/cost.md's runs that were measured, beside what a plan says of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from ft_ray import cpu_memory
from ft_ray.cost_models import GIB, METHODS, MODELS, OTHERS, header, row
from ft_ray.gpu_table import find
from ft_ray.model_shape import read
from ft_ray.recipe import Adapter
from ft_ray.step_memory import Memory, Setting, memory
from ft_ray.step_time import sharing_gain, step_seconds

__all__ = ["CPU_RUNS", "MEASURED", "RUNS", "measured_setting", "resident_bytes", "run_bytes", "section"]

# One H100 80 GB, random weights of real shape, LoRA r=16 on all seven projections, checkpointing, fused loss unless
# said. (model, tokens a step and adapter, adapters, fused, peak GiB, tokens/s or None)
MEASURED: tuple[tuple[str, int, int, bool, float, int | None], ...] = (
    ("1B", 512, 1, True, 2.5, 3120), ("1B", 1024, 1, True, 2.6, 6025), ("1B", 2048, 1, True, 2.8, 13093),
    ("1B", 512, 8, True, 3.7, 24240), ("1B", 1024, 8, True, 4.5, 39628), ("1B", 2048, 8, True, 6.0, 42404),
    ("8B", 512, 1, True, 6.0, 1317), ("8B", 1024, 1, True, 6.2, 2888), ("8B", 2048, 1, True, 6.7, 5905),
    ("8B", 512, 8, True, 9.2, 7704), ("8B", 1024, 8, True, 11.2, 8422), ("8B", 2048, 8, True, 15.2, 8670),
    ("8B", 8192, 1, True, 9.6, 8215), ("8B", 8192, 1, False, 19.5, None),
)  # fmt: skip

# The same card, torch 2.13.0+cu130, random weights: benchmarks/memory.py trained each as a rank of a run does, with the
# recipe's defaults and two passes a step (benchmarks/results/memory_h100.json). (method, model, rows, length, peak GiB)
RUNS: tuple[tuple[Literal["lora", "qlora", "full"], str, int, int, float], ...] = (
    ("lora", "135M", 4, 512, 0.60), ("lora", "135M", 2, 2048, 0.80), ("lora", "135M", 1, 8192, 1.06),
    ("lora", "1B", 4, 512, 3.12), ("lora", "1B", 2, 2048, 3.70), ("lora", "1B", 1, 8192, 4.87),
    ("lora", "8B", 4, 512, 16.99), ("lora", "8B", 2, 2048, 18.33), ("lora", "8B", 1, 8192, 21.01),
    ("qlora", "135M", 4, 512, 0.45), ("qlora", "135M", 2, 2048, 0.65), ("qlora", "135M", 1, 8192, 0.82),
    ("qlora", "1B", 4, 512, 1.65), ("qlora", "1B", 2, 2048, 2.11), ("qlora", "1B", 1, 8192, 3.02),
    ("qlora", "8B", 4, 512, 7.16), ("qlora", "8B", 2, 2048, 8.25), ("qlora", "8B", 1, 8192, 10.49),
    ("full", "135M", 4, 512, 2.64), ("full", "135M", 2, 2048, 2.91), ("full", "135M", 1, 8192, 3.23),
    ("full", "1B", 4, 512, 23.08), ("full", "1B", 2, 2048, 23.08), ("full", "1B", 1, 8192, 23.08),
    ("full", "3B", 4, 512, 59.91), ("full", "3B", 2, 2048, 59.91), ("full", "3B", 1, 8192, 59.91),
)  # fmt: skip

# On 2 CPU cores, the resident set of the whole process (benchmarks/results/memory_cpu.json).
CPU_RUNS: tuple[tuple[Literal["lora", "qlora", "full"], str, int, int, float], ...] = (
    ("lora", "20M", 2, 128, 0.98), ("lora", "20M", 2, 256, 1.02), ("lora", "20M", 2, 512, 1.04),
    ("lora", "60M", 2, 128, 1.09), ("lora", "60M", 2, 256, 1.14), ("lora", "60M", 2, 512, 1.16),
    ("lora", "135M", 2, 128, 1.30), ("lora", "135M", 2, 256, 1.34), ("lora", "135M", 2, 512, 1.37),
    ("qlora", "20M", 2, 128, 0.97), ("qlora", "20M", 2, 256, 1.01), ("qlora", "20M", 2, 512, 1.03),
    ("qlora", "60M", 2, 128, 1.04), ("qlora", "60M", 2, 256, 1.09), ("qlora", "60M", 2, 512, 1.13),
    ("qlora", "135M", 2, 128, 1.16), ("qlora", "135M", 2, 256, 1.21), ("qlora", "135M", 2, 512, 1.23),
    ("full", "20M", 2, 128, 1.42), ("full", "20M", 2, 256, 1.68), ("full", "20M", 2, 512, 2.17),
    ("full", "60M", 2, 128, 2.19), ("full", "60M", 2, 256, 2.45), ("full", "60M", 2, 512, 2.96),
    ("full", "135M", 2, 128, 3.40), ("full", "135M", 2, 256, 3.61), ("full", "135M", 2, 512, 4.23),
)  # fmt: skip


def measured_setting(model: str, tokens: int, adapters: int, fused: bool) -> Setting:
    """The setting of a measured row. The prototype of 8 adapters held them in bf16, which its peaks show."""
    quantized = model == "8B"
    return Setting(
        method="qlora" if quantized else "lora",
        rows=1,
        length=tokens,
        fused_loss=fused,
        adapter=Adapter(r=16, dropout=0),
        adapter_bytes=2 if quantized or adapters > 1 else 4,
        adapters=adapters,
    )


def run_bytes(method: Literal["lora", "qlora", "full"], model: str, rows: int, length: int) -> int:
    """What the plan says of a measured run: peak bytes that torch allocates."""
    return _of_run(method, model, rows, length).allocated


def resident_bytes(method: Literal["lora", "qlora", "full"], model: str, rows: int, length: int) -> int:
    """What the plan says of a run measured on a CPU: the resident set at its peak, bytes."""
    return _of_run(method, model, rows, length, on_gpu=False).total


def _of_run(
    method: Literal["lora", "qlora", "full"], model: str, rows: int, length: int, *, on_gpu: bool = True
) -> Memory:
    setting = Setting(method=method, rows=rows, length=length, accumulation=2, on_gpu=on_gpu)
    return memory(read({**MODELS, **OTHERS}[model]), setting)


def section() -> Iterator[str]:
    """The section as lines of Markdown."""
    yield "## Predicted and measured"
    yield ""
    yield (
        "One H100 80 GB, random weights of the real shape (1B in bf16, 8B in NF4 with double quantization), LoRA "
        "r=16 on all seven projections, gradient checkpointing, fused cross-entropy unless said. The peak is torch's "
        "own (without fragmentation and CUDA context, which a plan adds). The memory formulas have no fitted "
        "coefficient, but one choice was read off these rows: that the prototype behind the rows of 8 adapters held "
        "adapters and moments in bf16. The speed formulas are "
        "fitted here: 10.6 ms a layer to launch, and 40% of the card's dense bf16 rate."
    )
    yield ""
    yield (
        "Not in these tables: ZeRO-3, whose plans were 1.00 and 1.08 of the peak on one H200 (1B), 1.01 on two (8B). "
        "Not measured: the memory of offload and of ZeRO 1 and 2, and cards other than H100 and H200. ft-ray's own "
        "sweep engine keeps adapter states in fp32 (16 bytes a trained parameter, 18 without checkpointing, the "
        "prototype here 6), and plans of sweeps count that."
    )
    yield ""
    yield from header("base", "tokens a step and adapter", "adapters", "loss", "peak GiB", "predicted", "off by",
                      "tokens/s", "predicted", "off by")  # fmt: skip
    gpu = find("h100-80gb")
    for model, tokens, adapters, fused, peak, speed in MEASURED:
        shape, setting = read(MODELS[model]), measured_setting(model, tokens, adapters, fused)
        ours = memory(shape, setting).allocated / GIB
        rate = setting.tokens / step_seconds(shape, setting, gpu)
        yield row(
            f"{model} {'NF4' if model == '8B' else 'bf16'}", f"{tokens:,}", adapters, "fused" if fused else "whole",
            peak, f"{ours:.2f}", f"{ours / peak - 1:+.1%}",
            f"{speed:,}" if speed else "-", f"{rate:,.0f}" if speed else "-",
            f"{rate / speed - 1:+.0%}" if speed else "-",
        )  # fmt: skip
    yield ""
    yield from _runs()
    yield "What 8 adapters in one forward gain over one by one, on the same card:"
    yield ""
    yield from header("base", "tokens a step and adapter", "measured", "predicted")
    speeds = {(m, t, a): s for m, t, a, fused, _, s in MEASURED if fused and s}
    for (model, tokens, adapters), speed in speeds.items():
        if adapters == 8:
            gain = sharing_gain(read(MODELS[model]), measured_setting(model, tokens, 1, True), gpu, 8)
            yield row(model, f"{tokens:,}", f"{speed / speeds[model, tokens, 1]:.1f}x", f"{gain:.1f}x")
    yield ""


def _runs() -> Iterator[str]:
    yield (
        "Runs as `ft-ray train` makes them, on the same card with torch 2.13.0 (`python benchmarks/memory.py "
        "--device cuda`, 24 November 2026, random weights): LoRA r=16 with dropout 0.05, AdamW, checkpointing, plain "
        "kernels, two passes a step. Two corrections were made after these figures were seen: "
        "cuBLAS's workspaces, and the gradient of an adapter behind a dropout on a 16-bit base (without it the "
        "LoRA rows of 8,192 tokens were up to 8% short). Full fine-tuning of 1B and 3B is at its peak in the "
        "optimizer's step, whatever the length; of 8B it ran out of memory on this card, as planned. "
        "With fused kernels (packed, H200) 24 plans are 0.972 to 1.032 of the peak; LoRA's update in one product, the "
        "default since, is planned as five runs of 8B were measured (within 2%). Speeds hold then: "
        "8B packed to 2,048 trained 14,800 (LoRA) and 13,600 (QLoRA) tokens/s, a plan says 12,200. Plain kernels "
        "trained 6,700 to 7,100: on them attention computes all pairs of a packed sequence, which no plan counts."
    )
    yield ""
    yield from header("method", "base", "rows x tokens", "peak GiB", "predicted", "off by")
    for method, model, rows, length, peak in RUNS:
        ours = run_bytes(method, model, rows, length) / GIB
        yield row(METHODS[method], model, f"{rows} x {length:,}", peak, f"{ours:.2f}", f"{ours / peak - 1:+.1%}")
    yield ""
    yield (
        "On a CPU a plan is of the resident set of a rank, libraries included (`python benchmarks/memory.py --device "
        "cpu`, 29 November 2026, 2 cores, random weights, the same defaults, random rows, all trained, workers on "
        f"jemalloc). Of it the process before its model is {cpu_memory.PROCESS / GIB:.2f} GiB, measured there too. The "
        "buffers of the output head were read off the code that makes them, and a test counts them. Ray does not run "
        "in these; the demo's worker, with a real tokenizer, Ray and a model read from its files, held 1.95 "
        "GiB after 8 steps and 2.06 after 90, planned 1.92 (-2% and -7%). On glibc's malloc, as on a cluster whose "
        "nodes were not told otherwise, it held 2.37 and 2.54: holes of the heap come on top of a plan there."
    )
    yield ""
    yield from header("method", "base", "rows x tokens", "resident GiB", "predicted", "off by")
    for method, model, rows, length, peak in CPU_RUNS:
        ours = resident_bytes(method, model, rows, length) / GIB
        yield row(METHODS[method], model, f"{rows} x {length:,}", peak, f"{ours:.2f}", f"{ours / peak - 1:+.0%}")
    yield ""
