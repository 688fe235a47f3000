"""LoRA and QLoRA of one GPU: ft-ray beside stock TRL + PEFT, each at its best micro-batch, on packed rows.

    python benchmarks/train_lora.py --device cuda --method qlora [--shape 8B] [--model FOLDER] [--json FILE]
    python benchmarks/train_lora.py --device cuda --only ray --fused --model FOLDER   # fused_kernels: true through Ray
    python benchmarks/train_lora.py --device cpu --shape tiny --length 64      # a rehearsal

One process a side tries its variants in turn: rows a forward pass, with and without checkpointing, with fused kernels
(the peer: use_liger_kernel; ours: `fused_kernels`, whole and in part). Ours runs as a
rank of a run does, without Ray; with --model, a folder of the same shape, the best that a recipe can ask for is trained
once more through Ray Train. Weights are random and the same; short rows are packed to `--length` by TRL's bfd; `whole`
rows are of full length, without a mask. The fastest is profiled for one step. MFU counts the operations of a step
without recomputation over the card's dense bf16 peak (989 TFLOP/s, H100).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for _path in (ROOT, ROOT / "benchmarks"):
    sys.path.insert(0, str(_path))
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

from random_base import SHAPES, random_base  # noqa: E402
from runs import end_tree, tail  # noqa: E402

PEAK = 989e12
GLOBAL, STEPS, WARM = 8, 5, 2
# (rows, checkpointing, kernels). True is Liger's norms and MLPs, "varlen" those and attention row by row, "lora" these
# and LoRA's update in one product: `fused_kernels: true`.
# The likeliest come first, for when time runs out.
OURS = [(4, False, "lora"), (2, False, False), (2, False, "lora"), (4, False, "varlen"), (8, True, "lora"),
        (2, False, "varlen"), (1, False, False), (2, False, True), (8, True, "varlen"), (4, True, False),
        (4, True, True), (8, True, False)]  # fmt: skip
KINDS: dict[str, tuple[Any, ...]] = {"": (False,), " fused": ("lora",), " fused in part": (True, "varlen")}
TRL = [(1, False, True), (2, False, True), (4, False, True), (8, True, True), (4, True, True), (2, False, False),
       (1, False, False), (4, True, False)]  # fmt: skip


@dataclass(frozen=True)
class PackedRows:
    """The benchmark's data in the shape of prepared data."""

    length: int
    count: int = GLOBAL * 6

    def tokens(self, split: str) -> Any:
        from datasets import Dataset

        ids = []
        if split == "train":
            steps = [(7 * i, i % 5 + 1) for i in range(self.count)]
            ids = [[3 + (start + by * k) % 250 for k in range(self.length - 1)] + [2] for start, by in steps]
        return Dataset.from_dict({"input_ids": ids, "labels": ids, "length": [self.length] * len(ids)})

    def packed(self) -> Any:
        from datasets import Dataset
        from trl import pack_dataset

        ids, total, shortest = [], 0, max(4, self.length // 20)
        while total < self.count * self.length:
            size = shortest + (len(ids) * 7919) % (self.length // 2 - shortest)
            ids.append([3 + (7 * len(ids) + (len(ids) % 5 + 1) * k) % 250 for k in range(size - 1)] + [2])
            total += size
        return pack_dataset(Dataset.from_dict({"input_ids": ids, "labels": ids}), self.length, "bfd")


def recipe_of(work: dict[str, Any], rows: int, checkpointing: bool, packing: bool, model: str) -> Any:
    from ft_ray.recipe import from_dict

    return from_dict({
        "name": "bench", "model": {"id": model}, "data": {"train": [{"path": "x"}]}, "method": work["method"],
        "lora": {"r": 16, "alpha": 32, "dropout": 0.0}, "sequence": {"max_length": work["length"], "packing": packing},
        "batch": {"global": GLOBAL, "per_device": rows}, "gradient_checkpointing": checkpointing,
        "optim": {"name": "adamw_torch_fused", "lr": 1e-4, "weight_decay": 0.0},
        "schedule": {"max_steps": STEPS, "epochs": 100, "warmup": 0}, "evaluation": {"every": 10_000},
        "checkpoint": {"every": 10_000}, "resources": {"gpus": 1 if work["device"] == "cuda" else 0},
        "fused_kernels": False,  # a variant that wants them puts them on itself
    })  # fmt: skip


def base(work: dict[str, Any]) -> Any:
    shape = {**SHAPES[work["shape"]], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = random_base(shape, work["device"], nf4=work["method"] == "qlora")
    model.config.use_cache = False
    return model


class Clock:
    """Ends of steps, losses and real tokens a step; the profile of the fourth step where one is asked for."""

    def __init__(self, profiled: bool, on_gpu: bool) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.kernels: list[dict[str, Any]] = []
        self.busy = 0.0  # of the profiled step: seconds of kernels
        self._profiled, self._on_gpu = profiled and on_gpu, on_gpu
        self._profiler: Any = None

    def step(self) -> None:
        import torch

        if self._on_gpu:
            torch.cuda.synchronize()
        self.ends.append(time.monotonic())
        if self._profiled and len(self.ends) == STEPS - 2:
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.__enter__()
        elif self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            every = sorted(self._profiler.key_averages(), key=lambda k: -k.self_device_time_total)
            self.busy = sum(k.self_device_time_total for k in every) / 1e6
            self.kernels = [{"kernel": k.key[:120], "ms": k.self_device_time_total / 1000, "calls": k.count}
                            for k in every[:25]]  # fmt: skip
            self._profiler = None

    def seconds(self) -> float:
        gaps = [b - a for a, b in pairwise(self.ends)]
        return statistics.median(gaps[WARM - 1 :] or gaps)


class _Hooks:
    """`fine_tuner.Hooks` of a rank that saves nothing and is never stopped."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def event(self, event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            self.clock.step()
            self.clock.losses.append(event["loss"])

    def stop_requested(self) -> bool:
        return False

    save_requested = told_to_end = stop_requested

    def save(self, folder: Path, progress: Any, *, wait: bool = False) -> str:
        raise AssertionError("no checkpoint is written here")


def ours(work: dict[str, Any], rows: int, checkpointing: bool, fused: bool | str, packing: bool, clock: Clock) -> None:
    from transformers import AutoTokenizer

    from ft_ray import fused_lora, kernels, model_loading, row_attention, sft
    from ft_ray.base_model import ModelFiles

    def load(files: Any, recipe: Any, **_: Any) -> Any:
        model = base(work)
        if fused:
            kernels.fuse(model)
        if fused in ("varlen", "lora"):
            row_attention.use(model)
        model_loading.cure_cpu_faults(model)
        return model

    model_loading.load_model = load  # random weights of this size are made faster than read
    sft.FineTuner._save_checkpoint = lambda *_: None  # type: ignore[method-assign]
    recipe = recipe_of(work, rows, checkpointing, packing, work["tokenizer"])
    device = "cuda:0" if work["device"] == "cuda" else "cpu"
    trainer = sft.build(
        recipe, ModelFiles(Path(work["tokenizer"]), work["shape"], None, "", {}), PackedRows(work["length"]),
        AutoTokenizer.from_pretrained(work["tokenizer"]), hooks=_Hooks(clock), device=device,
    )  # fmt: skip
    if fused == "lora":
        assert fused_lora.use(trainer.net)
    sft.run(trainer)


def trl(work: dict[str, Any], rows: int, checkpointing: bool, fused: bool, packing: bool, clock: Clock) -> None:
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            clock.losses.extend([logs["loss"]] if "loss" in logs else [])

    on_gpu = work["device"] == "cuda"
    data = PackedRows(work["length"]).packed() if packing else PackedRows(work["length"]).tokens("train")
    args = SFTConfig(
        output_dir=tempfile.gettempdir(), per_device_train_batch_size=rows, max_steps=STEPS, learning_rate=1e-4,
        gradient_accumulation_steps=GLOBAL // rows, weight_decay=0.0, optim="adamw_torch_fused", bf16=True,
        use_cpu=not on_gpu, gradient_checkpointing=checkpointing, use_liger_kernel=fused and on_gpu,
        gradient_checkpointing_kwargs={"use_reentrant": False}, logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, max_length=None, padding_free=packing, dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False, train_sampling_strategy="sequential",
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    columns = [c for c in data.column_names if c == "length"]
    trainer = SFTTrainer(
        base(work), args=args, peft_config=lora, train_dataset=data.remove_columns(columns),
        processing_class=AutoTokenizer.from_pretrained(work["tokenizer"]), callbacks=[Steps()],
    )  # fmt: skip
    if not checkpointing:  # TRL turns it on for a quantized base
        trainer.model.gradient_checkpointing_disable()
    trainer.train()


def child(work: dict[str, Any]) -> None:
    """Every variant of one side in this process; the answer grows as they end."""
    import torch

    answer, on_gpu = Path(work["answer"]), work["device"] == "cuda"
    side, found = {"ours": ours, "trl": trl}[work["side"]], []
    variants = [{"rows": r, "checkpointing": c, "fused": f, "packing": True} for r, c, f in work["variants"]]
    again = [{"best": True, "packing": False}, {"best": True, "packing": True, "profiled": True}]
    for variant in [*variants, *again]:
        if variant.pop("best", False):
            done = [one for one in found if "tokens_per_second" in one]
            if not done:
                break
            fastest = max(done, key=lambda one: one["tokens_per_second"])
            variant = {**{k: fastest[k] for k in ("rows", "checkpointing", "fused")}, **variant}
        profiled = variant.pop("profiled", False)
        clock = Clock(profiled, on_gpu)
        one: dict[str, Any] = {**variant, "profiled": profiled}
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            side(work, **variant, clock=clock)  # type: ignore[operator]
            one |= {"seconds": clock.seconds(), "losses": clock.losses}
            if not profiled:
                one["tokens_per_second"] = GLOBAL * work["length"] / clock.seconds()
            else:
                one |= {"kernels": clock.kernels, "busy": clock.busy}
        except torch.OutOfMemoryError as error:
            one["failed"] = f"out of memory: {str(error)[:100]}"
        except Exception as error:  # the others are measured all the same
            one["failed"] = f"{type(error).__name__}: {str(error)[:500]}"
        gc.collect()
        if on_gpu:
            one["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.empty_cache()
        found.append(one)
        shown = {k: v for k, v in one.items() if k not in ("kernels", "losses")}
        print(work["side"], json.dumps(shown), file=sys.stderr, flush=True)
        part = answer.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.replace(answer)
    os._exit(0)


def measured(own: dict[str, Any], log: Path, limit: float, found: Callable[[list[dict[str, Any]]], None]) -> None:
    """A side in a process of its own, which is ended after `limit` seconds; `found` gets its answers as they grow."""
    answer, until, count = Path(own["answer"]), time.monotonic() + limit, 0
    with log.open("wb") as said:
        command = [sys.executable, __file__, "--child", json.dumps(own)]
        process = subprocess.Popen(command, stdout=said, stderr=said)
    try:
        running = True
        while running:
            running = process.poll() is None
            answers = json.loads(answer.read_text()) if answer.exists() else []
            if len(answers) > count:
                count = len(answers)
                found(answers)
            if running and time.monotonic() > until:
                print(f"{own['side']}: ended after {limit:.0f} s", file=sys.stderr, flush=True)
                break
            time.sleep(0.5)
    finally:
        end_tree(process.pid)
        process.wait()
    if process.returncode > 0 or not count:
        print(f"{own['side']} ended with {process.returncode}:\n{tail(log)}", file=sys.stderr, flush=True)


def told(one: dict[str, Any]) -> str:
    line = f"rows {one['rows']} checkpointing {one['checkpointing']} fused {one['fused']} packing {one['packing']}: "
    if "tokens_per_second" in one:
        return line + f"{one['tokens_per_second']:.0f} tok/s, {one.get('peak_gib', 0):.1f} GiB"
    if "failed" in one:
        return line + str(one["failed"])
    line += f"profiled, kernels {one['busy']:.2f} s of a step of {one['seconds']:.2f} s"
    return line + "".join(f"\n  {k['ms']:8.1f} ms {k['calls']:6} x {k['kernel'][:90]}" for k in one["kernels"][:8])


def through_ray(work: dict[str, Any], rows: int, checkpointing: bool, fused: bool) -> dict[str, Any]:
    from ft_ray import ray_session
    from ft_ray.base_model import resolve
    from ft_ray.storage import Store
    from ft_ray.trainer import train

    recipe = recipe_of(work, rows, checkpointing, True, work["model"]).model_copy(update={"fused_kernels": fused})
    said: list[Any] = []
    began = time.monotonic()

    def on_event(event: dict[str, Any]) -> None:
        if event["kind"] in ("status", "step") and not event.get("heartbeat"):
            said.append([round(time.monotonic() - began, 2), event.get("message") or f"step {event['step']}"])

    with ray_session.session(), tempfile.TemporaryDirectory() as store:
        outcome = train(recipe, PackedRows(work["length"]), resolve(recipe.model), Store(store), on_event=on_event)
    ends = [s["seconds"] for s in outcome.history if s["kind"] == "step"]
    seconds = statistics.median([b - a for a, b in pairwise(ends)][WARM - 1 :])
    return {
        "rows": rows, "checkpointing": checkpointing, "fused": fused, "seconds": seconds, "said": said,
        "tokens_per_second": GLOBAL * work["length"] / seconds, "substitutions": outcome.substitutions,
        "peak_gib": outcome.metrics["peak_memory_bytes"] / 2**30, "fused_modules": outcome.metrics["fused_modules"],
        "losses": [s["loss"] for s in outcome.history if s["kind"] == "step"],
    }  # fmt: skip


def mfu(work: dict[str, Any], rate: float) -> float:
    from ft_ray.model_shape import read
    from ft_ray.step_memory import Setting
    from ft_ray.step_time import flops_per_token

    recipe = recipe_of(work, 1, False, False, "x")
    return rate * flops_per_token(read({"model_type": "llama", **SHAPES[work["shape"]]}), Setting.of(recipe)) / PEAK


def summary(work: dict[str, Any], sides: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"best": {}, "ratios": {}}
    for name in ("ours", "trl"):
        for packing in (True, False):
            done = [o for o in sides.get(name, []) if "tokens_per_second" in o and o["packing"] == packing]
            for kind, names in KINDS.items() if name == "ours" else {"": ()}.items():
                fitting = [o for o in done if name == "trl" or o["fused"] in names]
                if fitting:
                    best = max(fitting, key=lambda o: o["tokens_per_second"])
                    kept = {k: v for k, v in best.items() if k != "kernels"}
                    label = f"{name}{kind}{'' if packing else ', whole rows'}"
                    found["best"][label] = {**kept, "mfu": mfu(work, best["tokens_per_second"])}
    if isinstance(sides.get("through Ray"), dict) and "tokens_per_second" in sides["through Ray"]:
        best = sides["through Ray"]
        found["best"]["through Ray"] = {**best, "mfu": mfu(work, best["tokens_per_second"])}
    rates = {name: one["tokens_per_second"] for name, one in found["best"].items()}
    for name in (*(f"ours{kind}" for kind in KINDS), "through Ray"):
        for peer in ("trl", "trl, whole rows"):
            if name in rates and peer in rates:
                found["ratios"][f"{name} / {peer}"] = rates[name] / rates[peer]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--method", choices=("lora", "qlora"), default="qlora")
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--model", type=Path, help="folder of the same shape (random_base.py): also through Ray Train")
    parser.add_argument("--most", type=int, help="variants of a side, the likeliest; default: all")
    parser.add_argument("--only", default="ours,trl,ray", help="sides, comma-separated")
    parser.add_argument("--fused", action="store_true", help="through Ray: `fused_kernels: true`, no checkpointing")
    parser.add_argument("--rows", type=int, default=4, help="rows a forward pass of --fused")
    parser.add_argument("--limit", type=float, default=1800, help="seconds of a side")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child)
    from tests.tiny import build

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a side ends with this script
    only = given.only.split(",")

    sides: dict[str, Any] = {}
    result: dict[str, Any] = {"shape": given.shape, "method": given.method, "length": given.length, "sides": sides}
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'benchmarks'}:{os.environ.get('PYTHONPATH', '')}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = {"device": given.device, "method": given.method, "shape": given.shape, "length": given.length,
                "tokenizer": str(build(folder / "tokenizer")), "model": str(given.model)}  # fmt: skip

        def keep() -> None:
            result.update(summary(work, sides))
            if given.json:
                given.json.write_text(json.dumps(result, indent=1) + "\n")

        for side, variants in (("ours", OURS), ("trl", TRL)):
            if side not in only:
                continue
            chosen: list[tuple[Any, ...]] = list(variants)[: given.most]
            if side == "trl":  # Liger replaces functions of transformers' modules, which later models call too: last
                chosen = sorted(chosen, key=lambda variant: bool(variant[2]))
            own = {**work, "side": side, "variants": chosen, "answer": str(folder / f"{side}.json")}

            def found(answers: list[dict[str, Any]], side: str = side) -> None:
                for one in answers[len(sides.get(side, [])) :]:
                    print(side, told(one), flush=True)
                sides[side] = answers
                keep()

            measured(own, folder / f"{side}.log", given.limit, found)
        plain = result.get("best", {}).get("ours", {"rows": 2, "checkpointing": False})
        if given.fused:
            plain = {"rows": given.rows, "checkpointing": False}
        if given.model and "ray" in only:
            try:
                sides["through Ray"] = through_ray(work, plain["rows"], plain["checkpointing"], given.fused)
            except Exception as error:  # what was measured before is kept
                sides["through Ray"] = {"failed": f"{type(error).__name__}: {error}"}
                print(sides["through Ray"]["failed"], file=sys.stderr, flush=True)
            keep()
    for label, best in result.get("best", {}).items():
        print(f"{label}: {best['tokens_per_second']:.0f} tok/s, MFU {best['mfu']:.3f}, loss {best['losses'][-1]:.4f}")
    print(json.dumps(result.get("ratios", {})))


if __name__ == "__main__":
    main()
