"""BANKING77 on SmolLM2 by QLoRA, through ft-ray and through TRL's own script: accuracy with intervals, and seconds.

    python benchmarks/banking77.py train.csv [--device cuda] [--quick] [--only ft-ray,trl] [--work FOLDER] [--json FILE]

`ft-ray run benchmarks/banking77.yaml` splits the data, trains, merges and measures the base, the base with few-shot
examples and the tuned model. `python -m trl.scripts.sft` then trains on the same training rows with the same
hyperparameters and epochs, its options alone, and its adapter answers the same test rows through the same code, on the
4-bit base that it was trained on. Prints both accuracies with 95% Wilson intervals, their paired difference, and the
seconds of training. `--quick` trains 4 steps and measures 16 rows: a rehearsal. Asserts nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ft_ray import recipe as recipes  # noqa: E402
from ft_ray.base_model import resolve  # noqa: E402
from ft_ray.chat import chat_of  # noqa: E402
from ft_ray.dataset import prepare  # noqa: E402
from ft_ray.evaluation import HFModel, compare, evaluate, load_metric, split_answer  # noqa: E402

STEPS, ROWS = 4, 16  # of --quick


def overrides(given: argparse.Namespace, work: Path) -> list[str]:
    """What the recipe does not say: where the data and the runs are, and what this machine takes at a time."""
    values = [f"data.train[0].path={given.csv.resolve()}", f"storage={work / 'runs'}", "tracking.to=[]"]
    values += ["batch.per_device=32"] if given.device == "cuda" else []
    if given.quick:
        values += [f"schedule.max_steps={STEPS}", f"evaluation.max_rows={ROWS}", "batch.global=4", "evaluation.batch=8"]
    return values


def run(command: Sequence[str], log: Path) -> float:
    """Seconds of a command whose output goes to `log`; its end is shown where it fails."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    with log.open("wb") as said:
        done = subprocess.run(command, env=environment, stdout=said, stderr=said, check=False)
    if done.returncode not in (0, 3):  # 3: a gate said no, after everything was measured
        raise SystemExit(f"{' '.join(command[:4])} … ended with {done.returncode}:\n{log.read_text()[-3000:]}")
    return time.monotonic() - began


def through_ft_ray(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    recipe = ROOT / "benchmarks" / "banking77.yaml"
    command = [sys.executable, "-m", "ft_ray", "run", str(recipe), *overrides(given, work)]
    seconds = run(command, work / "ft-ray.log")
    folder = work / "runs" / "banking77"
    stages = json.loads((folder / "manifest.json").read_text())["stages"]
    trained, measured = stages["train"], stages["evaluate"]["metrics"]
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return {
        "seconds": seconds, "train_seconds": trained["seconds"], "steps_seconds": trained["metrics"]["seconds"],
        "steps": trained["metrics"]["steps"], "predictions": predictions,
        "accuracy": {side: measured[side]["exact_match"] for side in ("base", "few_shot", "tuned") if side in measured},
    }  # fmt: skip


def through_trl(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    made = recipes.load(ROOT / "benchmarks" / "banking77.yaml", overrides(given, work)).recipe
    files = resolve(made.model)
    chat = chat_of(made.model, files.folder)
    prepared = prepare(made, chat, model_hash=files.hash)
    data, out = work / "trl-data", work / "trl-out"
    data.mkdir(parents=True, exist_ok=True)
    with (data / "train.jsonl").open("w", encoding="utf-8") as file:
        for row in prepared.rows("train"):
            prompt, answer = split_answer(row)
            completion = [{"role": "assistant", "content": answer}]
            file.write(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False) + "\n")
    command = [
        sys.executable, "-m", "trl.scripts.sft", "--model_name_or_path", str(files.folder), "--dataset_name", str(data),
        "--output_dir", str(out), "--use_peft", "--lora_r", str(made.lora.r), "--lora_alpha", str(made.lora.alpha),
        "--lora_dropout", str(made.lora.dropout), "--lora_target_modules", "all-linear", "--load_in_4bit",
        "--bnb_4bit_quant_type", "nf4", "--use_bnb_nested_quant", "--dtype", "bfloat16", "--bf16", "true",
        "--learning_rate", str(made.optim.lr), "--weight_decay", str(made.optim.weight_decay),
        "--optim", made.optim.name, "--max_grad_norm", str(made.optim.max_grad_norm),
        "--lr_scheduler_type", made.schedule.type, "--warmup_steps", str(made.schedule.warmup),
        "--num_train_epochs", str(made.schedule.epochs), "--max_length", str(made.sequence.max_length),
        "--per_device_train_batch_size", str(made.batch.global_), "--gradient_checkpointing", "false",
        "--save_strategy", "no", "--report_to", "none", "--logging_steps", "20", "--seed", str(made.seed),
        "--eos_token", chat.tokenizer.eos_token,
    ]  # fmt: skip
    if given.quick:
        command += ["--max_steps", str(STEPS)]
    if given.device == "cpu":
        command += ["--use_cpu", "true"]
    seconds = run(command, work / "trl.log")
    rows = list(prepared.rows("test"))[: made.evaluation.max_rows]
    model = HFModel.load(files.folder, chat, made, adapter=out, quantized=True)
    began = time.monotonic()
    found = evaluate(model, rows, load_metric(made), max_new_tokens=made.evaluation.max_new_tokens)
    log = (work / "trl.log").read_text(errors="replace")
    return {
        "seconds": seconds, "train_seconds": _runtime(log), "evaluate_seconds": time.monotonic() - began,
        "accuracy": {"tuned": found.metrics["exact_match"]}, "predictions": found.predictions,
    }  # fmt: skip


def _runtime(log: str) -> float | None:
    """What transformers' trainer says its loop took."""
    for part in reversed(log.split("'train_runtime': ")[1:]):
        with contextlib.suppress(ValueError):
            return float(part.split(",")[0].strip("'\" "))
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="train.csv of PolyAI-LDN/task-specific-datasets")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help=f"{STEPS} steps, {ROWS} rows: a rehearsal")
    parser.add_argument("--only", default="ft-ray,trl", help="sides, comma-separated")
    parser.add_argument("--work", type=Path, help="folder for runs and logs; default: one that is removed")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    sides: dict[str, dict[str, Any]] = {}
    result: dict[str, Any] = {"device": given.device, "quick": given.quick, "sides": sides}
    predictions: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        work = given.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        for name, through in (("ft-ray", through_ft_ray), ("trl", through_trl)):
            if name not in given.only.split(","):
                continue
            sides[name] = through(given, work)
            predictions[name] = sides[name].pop("predictions")
            for model, found in sides[name]["accuracy"].items():
                low, high = found["low"], found["high"]
                print(f"{name:7} {model:9} {found['value']:.3f} [{low:.3f}, {high:.3f}] of {found['n']}", flush=True)
            whole, training = sides[name]["seconds"], sides[name]["train_seconds"]
            print(f"{name:7} {whole:.0f} s in all, training {training and round(training)} s", flush=True)
            if len(predictions) == 2:
                result["trl_to_ft_ray"] = compare(predictions["trl"], predictions["ft-ray"])["metrics"]["exact_match"]
            if given.json:
                given.json.write_text(json.dumps(result, indent=1) + "\n")
    if "trl_to_ft_ray" in result:
        paired = result["trl_to_ft_ray"]
        print("ft-ray - TRL: {difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**paired))


if __name__ == "__main__":
    main()
