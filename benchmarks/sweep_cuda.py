"""The GPU side of benchmarks/sweep.py: one process a side, every length of a step in it, steps timed one by one.

Starting and loading take a minute on an 8B base and are the same for one trial or sixteen, so a side loads once, times
the steps of each case, and reports the start by itself. The peer is TRL's SFTTrainer with a PEFT adapter, bf16, the
fused AdamW, no logging, without checkpointing where that fits, with and without Liger's kernels: its fastest is used.
Where a step's time and memory go, and what each part of ours is worth, is sweep_profile.py's.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from random_base import random_base

STARTED = time.perf_counter()
RANKS = (8, 16, 32, 64, 128)  # tune_spaces/lora.yaml
TRIALS, ROWS, WARM = 16, 4, 2
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


def settings() -> list[dict[str, Any]]:
    """The trials: rank, alpha, dropout and learning rate drawn from lora.yaml's space with a fixed seed."""
    rng = random.Random(0)
    found = []
    for seed in range(TRIALS):
        r = RANKS[seed % len(RANKS)]
        found.append({"r": r, "alpha": r * rng.choice((1, 2)), "dropout": rng.choice((0.0, 0.05, 0.1)),
                      "lr": 10 ** rng.uniform(-4.3, -3.3), "seed": seed})  # fmt: skip
    return found


def rows(tokens: int, steps: int, seed: int) -> list[list[int]]:
    """`ROWS` sequences a step, between 3/4 and the whole of an equal share of the step's tokens."""
    rng = random.Random(seed)
    longest = tokens // ROWS
    return [
        [3 + (rng.randrange(100) + 3 * i) % 250 for i in range(rng.randint(longest * 3 // 4, longest))]
        for _ in range(steps * ROWS)
    ]


def base(shape: str, nf4: bool, device: str) -> Any:
    return random_base({**SHAPES[shape], "tie_word_embeddings": shape == "1b"}, device, nf4=nf4)


def peak(reset: bool = False) -> float:
    """GiB of the device's peak."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    found = torch.cuda.max_memory_allocated() / 2**30
    if reset:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return found


def wait() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(work: dict[str, Any], keep: Callable[[Any], None]) -> dict[str, Any]:
    from ft_ray.segments import MicroBatch
    from ft_ray.shared_base import AdapterConfig, SharedBase

    model = base(work["shape"], work["nf4"], work["device"])
    loaded = time.perf_counter() - STARTED
    every, cases = settings(), []
    for case in work["cases"]:
        peak(reset=True)
        shared = SharedBase(
            model, gradient_checkpointing=case.get("checkpointing", False), k_limit=case.get("k_limit")
        )
        steps = case["steps"]
        chosen = case.get("trials") or list(range(TRIALS))
        for trial in chosen:
            shared.attach(f"t{trial}", AdapterConfig(**every[trial], total_steps=steps, warmup=0.0))
        data = {f"t{trial}": rows(case["tokens"], steps, trial) for trial in chosen}
        seconds, losses = [], []
        for step in range(steps):
            part = slice(step * ROWS, (step + 1) * ROWS)
            begin = wait()
            batches = {name: MicroBatch.of((row, row) for row in own[part]) for name, own in data.items()}
            results = shared.step(batches)
            seconds.append(wait() - begin)
            losses.append({name: result.loss for name, result in results.items()})
        stats = shared.stats
        cases.append({
            **case, "k_limit_given": case.get("k_limit"), "seconds": statistics.median(seconds[WARM:]),
            "all_seconds": seconds, "peak_gib": peak(),
            "mean_k": stats.mean_k, "k_limit": stats.k_limit, "out_of_memory": stats.out_of_memory,
            "checkpointed": model.is_gradient_checkpointing, "losses": losses,
            "stopped": sorted({r.stopped for r in results.values() if r.stopped}),
        })  # fmt: skip
        keep({"start_s": loaded, "cases": cases})
        shown = {k: v for k, v in cases[-1].items() if k not in ("losses", "all_seconds")}
        print(json.dumps(shown), file=sys.stderr)
        shared.close()
        del shared, results
    return {"start_s": loaded, "cases": cases}


def trl(work: dict[str, Any], keep: Callable[[Any], None]) -> dict[str, Any]:
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(wait())

    model = base(work["shape"], work["nf4"], work["device"])
    loaded = time.perf_counter() - STARTED
    tokenizer = AutoTokenizer.from_pretrained(work["folder"])
    cases = []
    for case in work["cases"]:
        for checkpointing in (False, True):
            peak(reset=True)
            clock = Clock()
            data = rows(case["tokens"], case["steps"], 0)
            arguments = SFTConfig(
                output_dir=str(Path(work["folder"]) / "trl"), max_steps=case["steps"], learning_rate=1e-4,
                per_device_train_batch_size=ROWS, lr_scheduler_type="cosine", weight_decay=0.01,
                use_cpu=work["device"] == "cpu", bf16=True, gradient_checkpointing=checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False},
                use_liger_kernel=case["liger"] and work["device"] == "cuda",
                logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, max_length=None,
                train_sampling_strategy="sequential", optim="adamw_torch_fused",
            )  # fmt: skip
            lora = LoraConfig(
                task_type="CAUSAL_LM", r=case["r"], lora_alpha=2 * case["r"], lora_dropout=case["dropout"],
                target_modules="all-linear",
            )  # fmt: skip
            try:
                trainer = SFTTrainer(
                    model, args=arguments, peft_config=lora, processing_class=tokenizer, callbacks=[clock],
                    train_dataset=datasets.Dataset.from_dict({"input_ids": data, "labels": data}),
                )  # fmt: skip
                if not checkpointing:
                    trainer.model.gradient_checkpointing_disable()
                trainer.train()
            except torch.OutOfMemoryError:
                clock.ends = []
            seconds = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
            if seconds and not case.get("warm_up"):
                cases.append({**case, "checkpointing": checkpointing, "seconds": statistics.median(seconds[WARM - 1 :]),
                              "peak_gib": peak()})  # fmt: skip
                keep({"start_s": loaded, "cases": cases})
                print(json.dumps(cases[-1]), file=sys.stderr)
            trainer.optimizer = None
            model = trainer.model.unload()
            del trainer
            if seconds and not case.get("both"):
                break
    return {"start_s": loaded, "cases": cases}


def child(side: str, work: dict[str, Any], limit: float) -> dict[str, Any]:
    """One side in a process of its own: the cases that it ended within `limit` seconds."""
    answer, begin = Path(work["folder"]) / f"{side}.json", time.perf_counter()
    command = [sys.executable, __file__, "--child", side, "--work", json.dumps(work), "--json", str(answer)]
    failed: dict[str, Any] = {}
    process = subprocess.Popen(command)
    try:
        if process.wait(limit):
            failed = {"failed": process.returncode}
    except subprocess.TimeoutExpired:
        failed = {"failed": f"ended after {limit:.0f} s"}
    finally:
        process.kill()
        process.wait()
    found = json.loads(answer.read_text()) if answer.exists() else {"cases": []}
    return {**found, **failed, "wall_s": time.perf_counter() - begin}


def measure(
    shape: str, nf4: bool, device: str, folder: str, quick: bool, limit: float, keep: Callable[[Any], None]
) -> None:
    """Runs both sides; `keep` gets ratios, the curve over tokens a step, memory, and every number behind them.

    It is called after the first side, which may be all that there is time for (`limit`: seconds of a side), and again.
    """
    lengths = (512, 2048) if quick else (512, 1024, 2048, 4096, 8192)
    steps = {512: 12, 1024: 8, 2048: 6, 4096: 5, 8192: 4}
    common = {"shape": shape, "nf4": nf4, "device": device, "folder": folder}
    our_cases: list[dict[str, Any]] = [{"tokens": t, "steps": steps[t]} for t in lengths]
    our_cases.insert(1, {"tokens": 512, "steps": 8, "checkpointing": True})  # least memory
    our_cases.insert(2, {"tokens": 512, "steps": 6, "trials": [2]})  # one alone: the same losses?
    if not quick:
        our_cases += [{"tokens": t, "steps": steps[t], "k_limit": k} for t, k in ((512, 8), (512, 4), (1024, 4))]
        our_cases.append({"tokens": 1024, "steps": steps[1024], "checkpointing": True})
    peer_cases = [{"tokens": 512, "steps": 12, "r": r, "liger": liger, "dropout": 0.05}
                  for liger in (False, True) for r in ((32,) if liger else RANKS)]  # fmt: skip
    peer_cases += [{"tokens": t, "steps": steps[t], "r": 32, "liger": False, "dropout": 0.05} for t in lengths[1:]]
    peer_cases += [{"tokens": t, "steps": steps[t], "r": 32, "liger": True, "dropout": 0.05} for t in lengths[1:]]
    peer_cases.insert(0, {"tokens": 512, "steps": 16, "r": 8, "liger": False, "dropout": 0.05, "warm_up": True})
    left = child("ours", {**common, "cases": our_cases}, limit)
    keep({"ours": left})
    right = child("trl", {**common, "cases": peer_cases}, limit)
    keep({**summary(left, right, lengths), "ours": left, "trl": right})


def summary(left: dict[str, Any], right: dict[str, Any], lengths: tuple[int, ...]) -> dict[str, Any]:
    from ft_ray.manifest import package_versions

    curve = []
    drawn = [one["r"] for one in settings()]
    for tokens in lengths:
        mine = [c for c in left["cases"] if c["tokens"] == tokens and not c.get("trials")]
        peers = [c for c in right["cases"] if c["tokens"] == tokens]
        if not mine or not peers:
            continue
        best = min(mine, key=lambda c: c["seconds"])
        peer = min((c for c in peers if c["r"] == 32), key=lambda c: c["seconds"], default=None)
        if peer is None:
            continue
        curve.append({
            "tokens": tokens, "peer_step_s": peer["seconds"], "peer": {k: peer[k] for k in ("liger", "checkpointing")},
            "our_step_s": best["seconds"], "mean_k": best["mean_k"], "checkpointed": best["checkpointed"],
            "peak_gib": best["peak_gib"],
            "ratio": TRIALS * peer["seconds"] / best["seconds"],
        })  # fmt: skip
    by_rank = {c["r"]: c for c in right["cases"] if c["tokens"] == 512 and not c["liger"]}
    ratios: dict[str, Any] = {}
    if curve and set(drawn) <= set(by_rank):
        apart = sum(by_rank[r]["seconds"] for r in drawn)
        gain = curve[0]["peer_step_s"] / by_rank[32]["seconds"]  # the peer's fastest setting, measured at rank 32
        ratios["sequential_training_only"] = gain * apart / curve[0]["our_step_s"]
        steps = 200
        ratios["sequential"] = (TRIALS * right["start_s"] + gain * apart * steps) / (
            left["start_s"] + curve[0]["our_step_s"] * steps
        )
        together = sum(by_rank[r]["peak_gib"] for r in drawn)
        # By case of ours, so that it can be seen whether one of them is fast and small at once.
        ratios["by_case"] = [
            {
                "checkpointed": one["checkpointed"], "k_limit": one["k_limit_given"],
                "rank_32": TRIALS * curve[0]["peer_step_s"] / one["seconds"],
                "own_ranks": gain * apart / one["seconds"],
                "peak_memory": one["peak_gib"] / together if together else None,
            }
            for one in left["cases"] if one["tokens"] == 512 and not one.get("trials")
        ]  # fmt: skip
    alone = [c for c in left["cases"] if c.get("trials")]
    packed = [c for c in left["cases"] if c["tokens"] == 512 and not c.get("trials")]
    difference = None
    if alone and packed:
        name = f"t{alone[0]['trials'][0]}"
        pairs = zip(alone[0]["losses"], packed[0]["losses"], strict=False)
        difference = max(abs(a[name] - b[name]) for a, b in pairs)
    return {"ratios": ratios, "curve": curve, "max_loss_difference": difference,
            "mean_k": packed[0]["mean_k"] if packed else None, "versions": package_versions()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", choices=("ours", "trl"), required=True)
    parser.add_argument("--work", type=json.loads, required=True)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

    def keep(found: Any) -> None:
        part = given.json.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.replace(given.json)

    keep({"ours": ours, "trl": trl}[given.child](given.work, keep))


if __name__ == "__main__":
    main()
