"""Trials on a shared base against the same trials one after another, side by side in one run.

    python benchmarks/sweep.py [--device cpu|cuda] [--shape tiny|1b|8b] [--quick] [--json FILE]

Three sides train the same trials (rank, alpha, dropout, learning rate) on the same batches of the same random-weight
Llama: ours, the shared base by itself in a process a core, and on one core; `trl`, one TRL + PEFT process a trial;
`loop`, a bare PEFT + torch AdamW loop, which has the least overhead a peer can have. Then the whole sweep, as `ft-ray
sweep` runs it on a private Ray, beside Ray Tune with a process a trial, without and with ASHA (sweep_tune.py;
`--no-tune` leaves Ray Tune out). Prints ratios, peer over ours, and asserts nothing about time. `sequential` is the
wall of the TRL processes, one after another, over that of the whole sweep, both with everything counted, imports and
loading included; `sequential_bare` is over the processes that hold the shared base alone. CUDA is sweep_cuda.py's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is measured: `tokens` bounds the tokens of a step of one trial, `rows` sequences of which make a batch."""

    device: str
    shape: str
    nf4: bool
    trials: int
    steps: int
    tokens: int
    rows: int
    dropout: bool
    folder: str

    @property
    def vocabulary(self) -> int:
        return 259 if self.shape == "tiny" else 128256


def settings(case: Case) -> list[dict[str, Any]]:
    """One dictionary of AdapterConfig fields a trial."""
    rng = random.Random(0)
    ranks = (4, 8, 16, 32) if case.shape == "tiny" else (8, 16, 32, 64, 128)
    found = []
    for trial in range(case.trials):
        r = rng.choice(ranks)
        found.append({
            "r": r, "alpha": r * rng.choice((1, 2)), "dropout": rng.choice((0.0, 0.05, 0.1)) if case.dropout else 0.0,
            "lr": 10 ** rng.uniform(-4, -2.5), "seed": trial, "total_steps": case.steps,
        })  # fmt: skip
    return found


def rows_of(case: Case, trial: int) -> list[list[int]]:
    """Sequences in training order: learnable, lengths between 3/4 and the whole of an equal share of the tokens."""
    rng = random.Random(trial)
    longest = case.tokens // case.rows
    rows = []
    for _ in range(case.steps * case.rows):
        start, stride = rng.randrange(100), rng.randrange(1, 5)
        rows.append([3 + (start + stride * i) % 250 for i in range(rng.randint(longest * 3 // 4, longest))])
    return rows


def build(case: Case) -> None:
    from tests import tiny

    tiny.build(Path(case.folder))


def base(case: Case) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    if case.shape == "tiny":
        return AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32).to(case.device)
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[case.shape], max_position_embeddings=16384, tie_word_embeddings=case.shape == "1b")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(case.device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if case.nf4:
        from transformers.integrations import replace_with_bnb_linear

        plain = dict(model.named_modules())
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        linear = {n: m for n, m in plain.items() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
        weights = {name: module.weight.data.cpu() for name, module in linear.items()}
        model = replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quantization)
        from bitsandbytes.nn import Params4bit

        for name, weight in weights.items():
            module = model.get_submodule(name)
            module.weight = Params4bit(
                weight, requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to(case.device)
        model.is_loaded_in_4bit = True
    return model


def peak(case: Case) -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if case.device == "cuda" else None


def synchronise(case: Case) -> None:
    if case.device == "cuda":
        import torch

        torch.cuda.synchronize()


def side_ours(case: Case, trials: list[int], exact: bool | None, export: bool) -> dict[str, Any]:
    """All trials on one shared base."""
    from ft_ray.segments import MicroBatch
    from ft_ray.shared_base import AdapterConfig, SharedBase

    shared = SharedBase(base(case), exact=exact, gradient_checkpointing=case.shape != "tiny")
    names = {f"t{trial}": trial for trial in trials}
    every = settings(case)
    for name, trial in names.items():
        shared.attach(name, AdapterConfig(**every[trial]))
        if export:
            shared.export(name, Path(case.folder) / f"start{trial}")
    data = {name: rows_of(case, trial) for name, trial in names.items()}
    losses: dict[str, list[float]] = {name: [] for name in names}
    synchronise(case)
    begin = time.perf_counter()
    for step in range(case.steps):
        part = slice(step * case.rows, (step + 1) * case.rows)
        batches = {name: MicroBatch.of((row, row) for row in rows[part]) for name, rows in data.items()}
        for name, result in shared.step(batches).items():
            losses[name].append(result.loss)
    synchronise(case)
    seconds = time.perf_counter() - begin
    return {
        "train_s": seconds, "losses": {names[n]: found for n, found in losses.items()},
        "stats": asdict(shared.stats), "exact": shared.exact, "peak_bytes": peak(case),
    }  # fmt: skip


def side_loop(case: Case, trials: list[int]) -> dict[str, Any]:
    """PEFT and torch AdamW without a trainer, the trials one after another in one process, from our start weights."""
    import torch
    from peft import PeftModel
    from transformers import get_scheduler

    every, losses, seconds = settings(case), {}, 0.0
    for trial in trials:
        one = every[trial]
        model = PeftModel.from_pretrained(base(case), Path(case.folder) / f"start{trial}", is_trainable=True)
        if case.shape != "tiny":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=one["lr"], weight_decay=0.01, fused=True)
        warmup = -(-case.steps * 3 // 100)
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=case.steps)
        rows, found = rows_of(case, trial), []
        synchronise(case)
        begin = time.perf_counter()
        for step in range(case.steps):
            part = rows[step * case.rows : (step + 1) * case.rows]
            longest = max(map(len, part))
            ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in part], device=case.device)
            labels = torch.tensor([[*row, *[-100] * (longest - len(row))] for row in part], device=case.device)
            mask = (labels != -100).long()
            with torch.autocast(case.device, torch.bfloat16, enabled=case.shape != "tiny"):
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        synchronise(case)
        seconds += time.perf_counter() - begin
        losses[trial] = torch.stack(found).tolist()
        del model, optimizer, trained
    return {"train_s": seconds, "losses": losses, "peak_bytes": peak(case)}


def side_trl(case: Case, trials: list[int]) -> dict[str, Any]:
    """TRL's SFTTrainer with a PEFT adapter and nothing in the loop that is not needed: no logs, no saves."""
    import datasets
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    one = settings(case)[trials[0]]
    rows = rows_of(case, trials[0])
    tiny = case.shape == "tiny"
    arguments = SFTConfig(
        output_dir=str(Path(case.folder) / f"trl{trials[0]}"), max_steps=case.steps, seed=one["seed"],
        per_device_train_batch_size=case.rows, learning_rate=one["lr"], lr_scheduler_type="cosine", warmup_steps=0.03,
        weight_decay=0.01, use_cpu=case.device == "cpu", bf16=not tiny, gradient_checkpointing=not tiny,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, max_length=None,
        train_sampling_strategy="sequential", optim="adamw_torch_fused",
    )  # fmt: skip
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=one["r"], lora_alpha=one["alpha"], lora_dropout=one["dropout"],
        target_modules="all-linear",
    )  # fmt: skip
    trainer = SFTTrainer(
        base(case), args=arguments, peft_config=lora, processing_class=AutoTokenizer.from_pretrained(case.folder),
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}),
    )  # fmt: skip
    begin = time.perf_counter()
    trainer.train()
    synchronise(case)
    return {"train_s": time.perf_counter() - begin, "peak_bytes": peak(case)}


def child(case: Case, side: str, trials: list[int], **options: Any) -> dict[str, Any]:
    """Runs one side in a process of its own; adds the wall of that process as `wall_s`."""
    work = json.dumps({"case": asdict(case), "side": side, "trials": trials, "options": options})
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, "--child", work, "--json", answer.name], capture_output=True, text=True
        )
        wall = time.perf_counter() - begin
        if done.returncode:
            raise SystemExit(f"the {side} side failed:\n{done.stderr[-3000:]}")
        result: dict[str, Any] = json.loads(Path(answer.name).read_text())
    print(f"{side:>6} {options or trials} train {result['train_s']:.2f} s, process {wall:.2f} s", file=sys.stderr)
    return {**result, "wall_s": wall}


def engines(case: Case, count: int, **options: Any) -> dict[str, Any]:
    """Our side without Ray: `count` processes at a time, one a core, the trials shared out."""
    shares = [list(range(case.trials))[i::count] for i in range(count)]
    begin = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda trials: child(case, "ours", trials, **options), shares))
    return {
        **found[0], "wall_s": time.perf_counter() - begin, "train_s": max(one["train_s"] for one in found),
        "losses": {trial: losses for one in found for trial, losses in one["losses"].items()},
        "stats": {**found[0]["stats"], "mean_k": statistics.fmean(one["stats"]["mean_k"] for one in found)},
    }  # fmt: skip


def serve_child(work: dict[str, Any]) -> dict[str, Any]:
    import torch

    case, trials, options = Case(**work["case"]), work["trials"], work["options"]
    threads = options.pop("threads", 1)
    if case.device == "cpu":
        torch.set_num_threads(threads)
    sides = {"ours": side_ours, "loop": side_loop, "trl": side_trl}
    return sides[work["side"]](case, trials, **options)


def difference(one: dict[str, Any], other: dict[str, Any], trials: list[int]) -> float:
    return max(
        abs(a - b) for t in trials for a, b in zip(one["losses"][str(t)], other["losses"][str(t)], strict=True)
    )


def measure(case: Case, repeats: int, trl_trials: int) -> dict[str, Any]:
    import torch
    import transformers

    build(case)
    trials = list(range(case.trials))
    cores = len(os.sched_getaffinity(0))
    ours = [engines(case, cores, exact=None, export=turn == 0) for turn in range(repeats)]
    one_core = [child(case, "ours", trials, exact=None, export=False) for _ in range(repeats)]
    fast = [engines(case, cores, exact=False, export=False) for _ in range(repeats)]
    loop = [child(case, "loop", trials) for _ in range(repeats)]
    # A process a trial has all cores to itself: it is given as many threads as make it fastest.
    threads = min((1, cores), key=lambda n: child(case, "trl", [0], threads=n)["train_s"])
    trl = [child(case, "trl", [trial], threads=threads) for trial in trials[:trl_trials]]
    single = [child(case, "ours", [trial], exact=None, export=False) for trial in trials[:3]]

    def median(runs: list[dict[str, Any]], key: str) -> float:
        return statistics.median(run[key] for run in runs)

    # With fewer TRL processes than trials, their mean stands for the rest, and the result says so.
    share = case.trials / len(trl)
    undropped = [t for t, one in enumerate(settings(case)) if one["dropout"] == 0]
    losses = {trial: run["losses"] for trial, run in enumerate(single)}
    merged = {"losses": {key: found for each in losses.values() for key, found in each.items()}}
    return {
        "ratios": {
            "sequential_bare": share * sum(run["wall_s"] for run in trl) / median(ours, "wall_s"),
            "sequential_training_only": share * sum(run["train_s"] for run in trl) / median(ours, "train_s"),
            "sequential_training_only_on_one_core": share
            * sum(run["train_s"] for run in trl)
            / median(one_core, "train_s"),
            "loop_training_only": median(loop, "train_s") / median(ours, "train_s"),
            "fast_training_only": median(ours, "train_s") / median(fast, "train_s"),
        },
        "max_loss_difference": difference(ours[0], merged, trials[:3]),
        "max_loss_difference_fast": difference(fast[0], merged, trials[:3]),
        "peft_loss_difference": difference(ours[0], loop[0], undropped) if undropped else None,
        "mean_k": ours[0]["stats"]["mean_k"],
        "seconds": {
            "ours": median(ours, "train_s"), "ours_fast": median(fast, "train_s"), "loop": median(loop, "train_s"),
            "trl_each": [run["train_s"] for run in trl], "trl_processes_each": [run["wall_s"] for run in trl],
            "ours_process": median(ours, "wall_s"),
        },
        "trl_processes_run": len(trl),
        "trl_threads": threads,
        "engines": cores,
        "exact": ours[0]["exact"],
        "peak_bytes": {"ours": ours[0]["peak_bytes"], "ours_fast": fast[0]["peak_bytes"],
                       "loop": loop[0]["peak_bytes"], "trl": trl[0]["peak_bytes"]},
        "case": {key: value for key, value in asdict(case).items() if key != "folder"},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()},
        "machine": torch.cuda.get_device_name() if case.device == "cuda" else platform.machine(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=("tiny", *SHAPES), help="default: tiny on a CPU, 8b in NF4 on CUDA")
    parser.add_argument("--no-nf4", action="store_true", help="keep a 1b or 8b base in bf16")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--tokens", type=int, help="tokens a step of one trial, at most")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--no-dropout", action="store_true")
    parser.add_argument("--trl-trials", type=int, help="TRL processes to run; the rest is taken as their mean")
    parser.add_argument("--no-tune", action="store_true", help="leave out Ray Tune with a process a trial")
    parser.add_argument("--quick", action="store_true", help="4 trials of 30 steps, once")
    parser.add_argument("--limit", type=float, default=1800, help="on CUDA: seconds of a side")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        given.json.write_text(json.dumps(serve_child(json.loads(given.child))))
        return
    if given.device == "cuda":
        import sweep_cuda

        from tests import tiny

        with tempfile.TemporaryDirectory() as folder:
            tiny.build(Path(folder))  # for its tokenizer

            def keep(found: dict[str, Any]) -> None:
                print(json.dumps({k: v for k, v in found.items() if k not in ("ours", "trl")}, indent=1), flush=True)
                if given.json:
                    given.json.write_text(json.dumps(found, indent=1))

            sweep_cuda.measure(given.shape or "8b", not given.no_nf4, "cuda", folder, given.quick, given.limit, keep)
        return
    shape = given.shape or "tiny"
    tokens = given.tokens or (64 if shape == "tiny" else 512)
    with tempfile.TemporaryDirectory() as folder:
        case = Case(
            device=given.device,
            shape=shape,
            nf4=shape != "tiny" and not given.no_nf4,
            trials=given.trials or (4 if given.quick else 16),
            steps=given.steps or (30 if given.quick else 200 if given.device == "cpu" else 20),
            tokens=tokens,
            rows=4,
            dropout=not given.no_dropout,
            folder=folder,
        )
        repeats = given.repeats or (1 if given.quick else 3)
        result = measure(case, repeats, given.trl_trials or (2 if given.quick else case.trials))
        import sweep_tune

        beside = sweep_tune.measure(case, ("ours",) if given.no_tune else sweep_tune.SIDES)
        whole = beside["sides"]["ours"]["wall_s"]
        sequential = result["ratios"]["sequential_bare"] * result["seconds"]["ours_process"] / whole
        result["ratios"] = {"sequential": sequential, **result["ratios"], **beside.pop("ratios")}
        result["tune"] = beside
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
