"""docs/cost.md, written from the estimator: predictions beside measurements and beside the source guide's table.

`python -m ft_ray.cost_page > docs/cost.md` writes it; a test checks that the file is current.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Literal

from ft_ray import cpu_memory
from ft_ray.estimate import Option, Plan, TokenStats, plan
from ft_ray.gpu_table import RESERVED_MIB, find, table
from ft_ray.model_shape import lora_parameters, read
from ft_ray.recipe import Adapter, from_dict
from ft_ray.step_memory import Memory, Setting, memory
from ft_ray.step_time import sharing_gain, step_seconds

__all__ = ["CPU_RUNS", "GUIDE", "MEASURED", "RUNS", "render", "resident_bytes", "run_bytes"]

_LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "1B": {**_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "tie_word_embeddings": True},
    "8B": {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "tie_word_embeddings": False},
    "70B": {**_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "tie_word_embeddings": False},
}  # fmt: skip

_SMALL: dict[str, Any] = {**_LLAMA, "vocab_size": 49152, "tie_word_embeddings": True}
_OTHERS: dict[str, dict[str, Any]] = {
    "20M": {**_SMALL, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 4},
    "60M": {**_SMALL, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12,
            "num_attention_heads": 8, "num_key_value_heads": 4},
    "135M": {**_SMALL, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3},
    "3B": {**_LLAMA, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
           "num_attention_heads": 24, "tie_word_embeddings": True},
}  # fmt: skip

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
    ("lora", "20M", 2, 128, 0.98), ("lora", "20M", 2, 256, 1.09), ("lora", "20M", 2, 512, 1.15),
    ("lora", "60M", 2, 128, 1.11), ("lora", "60M", 2, 256, 1.23), ("lora", "60M", 2, 512, 1.42),
    ("lora", "135M", 2, 128, 1.33), ("lora", "135M", 2, 256, 1.51), ("lora", "135M", 2, 512, 1.69),
    ("qlora", "20M", 2, 128, 1.01), ("qlora", "20M", 2, 256, 1.12), ("qlora", "20M", 2, 512, 1.11),
    ("qlora", "60M", 2, 128, 1.08), ("qlora", "60M", 2, 256, 1.24), ("qlora", "60M", 2, 512, 1.32),
    ("qlora", "135M", 2, 128, 1.23), ("qlora", "135M", 2, 256, 1.44), ("qlora", "135M", 2, 512, 1.63),
    ("full", "20M", 2, 128, 1.48), ("full", "20M", 2, 256, 1.68), ("full", "20M", 2, 512, 2.19),
    ("full", "60M", 2, 128, 2.27), ("full", "60M", 2, 256, 2.53), ("full", "60M", 2, 512, 3.07),
    ("full", "135M", 2, 128, 3.57), ("full", "135M", 2, 256, 3.88), ("full", "135M", 2, 512, 4.53),
)  # fmt: skip

# The source guide's own rows: (method, model, card, number of cards, hours, US dollars)
GUIDE: tuple[tuple[str, str, str, int, tuple[int, int], tuple[int, int]], ...] = (
    ("qlora", "8B", "rtx-4090", 1, (2, 4), (10, 20)),
    ("lora", "8B", "a100-40gb", 1, (1, 2), (20, 40)),
    ("qlora", "70B", "a100-80gb", 1, (8, 16), (100, 200)),
    ("full", "8B", "a100-40gb", 4, (4, 8), (200, 400)),
    ("full", "70B", "a100-80gb", 8, (24, 48), (2000, 4000)),
)
# The guide names no data set. 10,000 rows is what it calls ideal; 512 tokens a row is our reading of its hours.
WORKLOAD = TokenStats(rows=10_000, tokens=5_120_000, longest=2048)
GIB = 2**30


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
    return memory(read({**MODELS, **_OTHERS}[model]), setting)


def guide_plan(method: str, model: str, card: str, count: int) -> Plan:
    """Our plan of a row of the guide, with its settings: r=64, 2,048 tokens packed, 16 rows a step, 3 epochs."""
    recipe = from_dict(
        {
            "name": "guide",
            "model": {"id": model},
            "data": {"train": [{"path": "data.jsonl"}]},
            "method": method,
            "lora": {"r": 64, "alpha": 16, "dropout": 0.1},
            "sequence": {"max_length": 2048, "packing": True},
            "batch": {"global": 16},
            "optim": {"name": "adamw_torch" if method == "full" else "paged_adamw_8bit"},
            "schedule": {"epochs": 3},
        }
    )
    return plan(recipe, MODELS[model], gpu=card, count=count, tokens=WORKLOAD)


def render() -> str:
    """The whole page as Markdown."""
    return "\n".join([*_head(), *_measured(), *_guide(), *_memory(), *_cards()]) + "\n"


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _table(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield _row(*["---"] * len(names))


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


def _measured() -> Iterator[str]:
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
        "Not measured yet: ZeRO, offload, other cards. Those are the formulas alone. ft-ray's own "
        "sweep engine keeps adapter states in fp32 (16 bytes a trained parameter, 18 without checkpointing, the "
        "prototype here 6), and plans of sweeps count that."
    )
    yield ""
    yield from _table("base", "tokens a step and adapter", "adapters", "loss", "peak GiB", "predicted", "off by",
                      "tokens/s", "predicted", "off by")  # fmt: skip
    gpu = find("h100-80gb")
    for model, tokens, adapters, fused, peak, speed in MEASURED:
        shape, setting = read(MODELS[model]), measured_setting(model, tokens, adapters, fused)
        ours = memory(shape, setting).allocated / GIB
        rate = setting.tokens / step_seconds(shape, setting, gpu)
        yield _row(
            f"{model} {'NF4' if model == '8B' else 'bf16'}", f"{tokens:,}", adapters, "fused" if fused else "whole",
            peak, f"{ours:.2f}", f"{ours / peak - 1:+.1%}",
            f"{speed:,}" if speed else "-", f"{rate:,.0f}" if speed else "-",
            f"{rate / speed - 1:+.0%}" if speed else "-",
        )  # fmt: skip
    yield ""
    yield from _runs()
    yield "What 8 adapters in one forward gain over one by one, on the same card:"
    yield ""
    yield from _table("base", "tokens a step and adapter", "measured", "predicted")
    speeds = {(m, t, a): s for m, t, a, fused, _, s in MEASURED if fused and s}
    for (model, tokens, adapters), speed in speeds.items():
        if adapters == 8:
            gain = sharing_gain(read(MODELS[model]), measured_setting(model, tokens, 1, True), gpu, 8)
            yield _row(model, f"{tokens:,}", f"{speed / speeds[model, tokens, 1]:.1f}x", f"{gain:.1f}x")
    yield ""


def _runs() -> Iterator[str]:
    yield (
        "Runs as `ft-ray train` makes them, on the same card with torch 2.13.0 (`python benchmarks/memory.py "
        "--device cuda`, 24 November 2026, random weights): LoRA r=16 with dropout 0.05, AdamW, checkpointing, plain "
        "kernels, two passes a step. Two corrections were made after these figures were seen: "
        "cuBLAS's workspaces, and the gradient of an adapter behind a dropout on a 16-bit base (without it the "
        "LoRA rows of 8,192 tokens were up to 8% short). Full fine-tuning of 1B and 3B is at its peak in the "
        "optimizer's step, whatever the length; of 8B it ran out of memory on this card, as planned. "
        "With fused kernels (the default; packed, H200) 24 plans are 0.972 to 1.032 of the peak. Speeds hold then: "
        "8B packed to 2,048 trained 12,500 (LoRA) and 13,100 (QLoRA) tokens/s, a plan says 12,200. Plain kernels "
        "trained 6,700 to 7,100: on them attention computes all pairs of a packed sequence, which no plan counts."
    )
    yield ""
    yield from _table("method", "base", "rows x tokens", "peak GiB", "predicted", "off by")
    for method, model, rows, length, peak in RUNS:
        ours = run_bytes(method, model, rows, length) / GIB
        yield _row(_METHODS[method], model, f"{rows} x {length:,}", peak, f"{ours:.2f}", f"{ours / peak - 1:+.1%}")
    yield ""
    yield (
        "On a CPU a plan is of the resident set of a rank, libraries included (`python benchmarks/memory.py --device "
        "cpu`, 28 November 2026, 2 cores, random weights, the same defaults, random rows, all trained). Of "
        f"it the process before its model is {cpu_memory.PROCESS / GIB:.2f} GiB, measured there too. The buffers of "
        "the output head were read off the code that makes them, and a test counts them; what malloc keeps of freed "
        "blocks follows glibc's rules, applied with seven such runs known, and one block more for each checkpointed "
        "layer, a rule found with all of these known. Ray does not run in these; a real tokenizer, Ray's worker and "
        "reading a model from its files come on top."
    )
    yield ""
    yield from _table("method", "base", "rows x tokens", "resident GiB", "predicted", "off by")
    for method, model, rows, length, peak in CPU_RUNS:
        ours = resident_bytes(method, model, rows, length) / GIB
        yield _row(_METHODS[method], model, f"{rows} x {length:,}", peak, f"{ours:.2f}", f"{ours / peak - 1:+.0%}")
    yield ""


def _guide() -> Iterator[str]:
    yield "## The source guide's table"
    yield ""
    yield (
        "The guide names neither data nor settings for its hours. Ours: 10,000 rows of 512 tokens on average, packed "
        "to 2,048, 3 epochs, 16 sequences a step, r=64 on all seven projections, 8-bit paged Adam for adapters and "
        "fp32 Adam for whole models. Memory is the peak of one card, with fragmentation and context."
    )
    yield ""
    yield from _table("row", "memory a card", "fits", "guide's hours", "ours", "guide's cost", "ours",
                      "guide's dollars a GPU-hour", "ours")  # fmt: skip
    for method, model, card, count, hours, usd in GUIDE:
        option = guide_plan(method, model, card, count).chosen
        assert option is not None and option.seconds is not None and option.usd is not None
        implied = (usd[0] / hours[0] / count, usd[1] / hours[1] / count)
        shown = "-".join(dict.fromkeys(f"{x:.0f}" for x in sorted(implied)))
        yield _row(
            f"{_METHODS[method]} {model}, {count} x {card}",
            f"{option.needed / GIB:.1f} of {option.available / GIB:.1f} GiB",
            _fits(option),
            f"{hours[0]}-{hours[1]}", f"{option.seconds / 3600:.1f}",
            f"${usd[0]:,}-{usd[1]:,}", f"${option.usd:,.2f}", f"${shown}", f"${option.usd_per_hour / count:.2f}",
        )  # fmt: skip
    yield ""
    yield from _differences()


_METHODS = {"qlora": "QLoRA", "lora": "LoRA", "full": "Full"}


def _fits(option: Option) -> str:
    if not option.fits:
        return f"no: {option.reason}"
    return "yes" if not option.changes else f"with {', '.join(option.changes)}"


def _differences() -> Iterator[str]:
    shape = read(MODELS["8B"])
    r64, r32 = (lora_parameters(shape, Adapter(r=r)) for r in (64, 32))
    whole = memory(read(MODELS["70B"]), Setting(method="full", rows=1, length=2048, world=8, zero=3, accumulation=2))
    offloaded = guide_plan("full", "70B", "a100-80gb", 8).chosen
    four, one = (
        memory(shape, Setting(method="full", rows=n, length=2048, world=4, zero=3, accumulation=4 // n)).total / GIB
        for n in (4, 1)
    )
    close = guide_plan("full", "8B", "a100-40gb", 4).chosen
    assert offloaded is not None and close is not None and close.changes
    yield "Why the differences:"
    yield ""
    yield (
        "- **Cost.** The guide's dollars divided by its hours are 5 to 20 dollars a GPU-hour, several times what such "
        "cards are listed at below. Its dollars do not follow from its hours and any price we know."
    )
    yield (
        "- **Hours of LoRA and QLoRA.** We chose one number, 512 tokens a row; it puts all three rows inside the "
        "guide's ranges, so their proportions agree. Other data scale the hours with their tokens."
    )
    yield (
        "- **Hours of full fine-tuning.** A step of full fine-tuning costs 8N operations a token against 6N with a "
        "frozen base, and the cards of a row share it: the same data take less time on 4 cards than LoRA takes on one. "
        "The guide's 4-8 and 24-48 hours mean more data, or cards that wait for each other. Ours assume links of "
        "NVLink speed; over PCIe, ZeRO-3's gathering of parameters rules. For offload they assume 200 GB/s of host "
        "memory."
    )
    yield (
        "- **Full 70B on 8 x 80 GB needs offload.** Weights, gradients (accumulated in fp32) and optimizer are 18 "
        f"bytes a parameter: {whole.total / GIB:.0f} GiB a card with ZeRO-3, where there are 80. With optimizer states "
        f"in host memory {offloaded.needed / GIB:.0f} GiB a card and {offloaded.host / GIB:,.0f} GiB of host memory."
    )
    yield (
        f"- **Full 8B on 4 x 40 GB** misses by a hair: {four:.2f} GiB a card with 4 rows a forward pass and no "
        f"accumulation, {one:.1f} GiB with one row accumulated in fp32, where a process can have "
        f"{close.available / GIB:.2f}. With optimizer states in host memory {close.needed / GIB:.0f} GiB a card and "
        f"{close.host / GIB:,.0f} GiB of host memory."
    )
    yield (
        f"- **Trained parameters.** r=64 on all seven projections of Llama-3.1-8B trains {r64:,} parameters. "
        f"The guide's {r32:,} are those of r=32."
    )
    yield ""


# (what, method, cards, ZeRO stage, optimizer offloaded, parameters offloaded)
_WAYS: tuple[tuple[str, str, int, int, bool, bool], ...] = (
    ("QLoRA", "qlora", 1, 0, False, False), ("LoRA", "lora", 1, 0, False, False),
    ("full", "full", 1, 0, False, False), ("full, ZeRO-3 on 4", "full", 4, 3, False, False),
    ("full, ZeRO-3 on 8", "full", 8, 3, False, False), ("the same, optimizer offloaded", "full", 8, 3, True, False),
)  # fmt: skip

_RULE = {"qlora": 0.5, "lora": 2.0, "full": 18.0}  # GB a billion parameters, github.com/hiyouga/LLaMA-Factory


def _memory() -> Iterator[str]:
    yield "## Memory by method and size"
    yield ""
    yield (
        "One row of 2,048 tokens a forward pass, r=64 on all seven projections, gradient checkpointing, fused "
        "cross-entropy, bf16 (QLoRA: NF4 with double quantization), 8-bit paged Adam for adapters and fp32 Adam for "
        "whole models. GiB of one card at the peak; the total adds fragmentation and context. Beside it the rule that "
        "guides go by (LLaMA-Factory's README: 0.5, 2 and 18 GB a billion parameters for QLoRA, LoRA and full, by the "
        "number of cards); the source guide's own memory figures were not at hand. Such rules count weights and "
        "optimizer: what they leave out is activations (they grow with rows x tokens), the adapter's rank, embeddings "
        "that stay in 16 bits and, for QLoRA, the matrix that is being dequantized."
    )
    yield ""
    yield from _table("base", "method", "weights", "trained: weights, gradients, optimizer", "activations and loss",
                      "working", "total", "rule", "smallest card that holds it", "host memory")  # fmt: skip
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
            )
            peak = memory(shape, setting)
            fitting = sorted((g for g in table().values() if g.bf16 and g.memory >= peak.total), key=lambda g: g.memory)
            yield _row(
                model, what, *(f"{size / GIB:.1f}" for size in (
                    peak.weights, peak.adapters + peak.gradients + peak.optimizer, peak.activations + peak.logits,
                    peak.working, peak.total,
                )),
                "-" if optimizer else f"{_RULE[method] * shape.parameters / 1e9 / world:.1f}",
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
    yield from _table("card", "memory", "TFLOP/s", "GB/s", "$ an hour", "source", "date")
    for gpu in table().values():
        yield _row(
            gpu.name, f"{gpu.memory_mib / 1024:.1f} GiB", f"{gpu.tflops:g}" + ("" if gpu.bf16 else " (fp16)"),
            f"{gpu.bandwidth_gbs:g}", f"{gpu.usd_per_hour:.2f}", f"{gpu.price_source} ({gpu.price_basis})",
            gpu.price_date,
        )  # fmt: skip


if __name__ == "__main__":
    sys.stdout.write(render())
