"""Ray Tune with a process a trial against ft-ray's sweep, without and with ASHA; and what ASHA saves and costs.

    python benchmarks/sweep_tune.py [--device cpu|cuda] [--trials 16] [--steps 200] [--only SIDE]... [--json FILE]

Sides, each in a process of its own, wall time with everything counted (imports, Ray, loading, measuring):

    ours, ours_asha   ft_ray.sweep on a private Ray: thin trials, one shared base
    tune, tune_asha   Ray Tune as documented: each trial a process that loads TRL, PEFT and base; as many at once
                      as there are cores (or one a GPU), one thread each
    tune_reuse        the same without ASHA, with `reuse_actors`: a process goes on to the next trial

Both get the same trials, rows and steps, and measure at the same steps. Ours also writes every trial's adapter and
optimizer there; the peer saves nothing. `ratios_without_ray` leave Ray's own start and end out on both sides, and with
the start the imports that ours does meanwhile.

`--regret` answers another question, cheaply: of `--seeds` full sweeps, recorded to the end, what share of the tokens
would ASHA have trained, and was its winner among the best two? The curves are real trainings and the decisions are
those of the real scheduler (ray.tune's, as ft-ray makes it); only the waiting is left out: all trials come to a rung
together, in shuffled order, as they do on a shared base.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for _path in (ROOT, ROOT / "benchmarks"):
    sys.path.insert(0, str(_path))
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

import sweep as solo  # noqa: E402 - benchmarks/sweep.py: the case, its base and its settings

# One in four goes on at 1/20, 1/5 and 4/5 of the steps. In lock-step ASHA lets the first at a rung pass, so an early
# and strict first rung is what saves tokens.
REDUCTION, GRACE = 4, 0.05
VALIDATION = 24
SIDES = ("ours", "ours_asha", "tune", "tune_asha")
EVERY = 0.1


@dataclass(frozen=True)
class Rows:
    """The benchmark's rows in the shape of prepared data: one training set for all trials, one validation set."""

    count: int
    longest: int
    seed: int = 0

    def _rows(self, count: int, seed: int) -> list[dict[str, Any]]:
        rng = random.Random(seed)
        rows = []
        for _ in range(count):
            start, stride = rng.randrange(100), rng.randrange(1, 5)
            ids = [3 + (start + stride * i) % 250 for i in range(rng.randint(self.longest * 3 // 4, self.longest))]
            rows.append({"input_ids": ids, "labels": ids, "length": len(ids)})
        return rows

    def tokens(self, split: str) -> Any:
        import datasets

        found = self._rows(self.count, self.seed) if split == "train" else self._rows(VALIDATION, self.seed + 1000)
        return datasets.Dataset.from_list(found)

    def packed(self) -> Any:
        raise NotImplementedError("the benchmark packs nothing")


def data(case: solo.Case, seed: int = 0) -> Rows:
    return Rows(min(case.steps * case.rows, 2000), case.tokens // case.rows, seed)


def points(case: solo.Case, seed: int = 0) -> list[dict[str, Any]]:
    """The trials as dotted overrides. The values are those of benchmarks/sweep.py's trials for seed 0."""
    rng, found = random.Random(seed), []
    ranks = (4, 8, 16, 32) if case.shape == "tiny" else (8, 16, 32, 64, 128)
    for _ in range(case.trials):
        r = rng.choice(ranks)
        found.append({
            "lora.r": r, "lora.alpha": r * rng.choice((1, 2)), "lora.dropout": rng.choice((0.0, 0.05, 0.1)),
            "optim.lr": float(f"{10 ** rng.uniform(-4, -2.5):.6g}"),
        })  # fmt: skip
    return found


def recipe(case: solo.Case, seed: int = 0, every: float = EVERY) -> Any:
    from ft_ray.recipe import from_dict

    return from_dict({
        "name": "bench", "model": {"id": case.folder}, "data": {"train": [{"path": "unused.jsonl"}]},
        "method": "qlora" if case.nf4 else "lora", "lora": {"r": 8, "alpha": 16, "dropout": 0.0},
        "sequence": {"max_length": max(8, case.tokens // case.rows)},
        "batch": {"global": case.rows, "per_device": case.rows},
        "optim": {"name": "adamw_torch", "lr": 1e-3}, "schedule": {"epochs": 1000, "max_steps": case.steps},
        "precision": "fp32" if case.shape == "tiny" else "bf16", "gradient_checkpointing": case.shape != "tiny",
        "evaluation": {"every": every}, "resources": {"workers": 1, "gpus": 0 if case.device == "cpu" else 1},
        "tracking": {"to": []}, "storage": f"{case.folder}/runs", "seed": seed,
    })  # fmt: skip


def space(case: solo.Case, seed: int, asha: bool) -> Any:
    """A space that draws exactly the points: they are its first points, and there are no others."""
    from ft_ray import search_space

    found = points(case, seed)
    choices = {key: sorted({point[key] for point in found}) for key in found[0]}
    scheduler = {"type": "asha", "reduction": REDUCTION, "grace": GRACE} if asha else {"type": "none"}
    return search_space.parse({
        "search": {key: {"choice": values} for key, values in choices.items()}, "first": found, "searcher": "random",
        "scheduler": scheduler, "budget": {"trials": len(found)}, "confirm": {"top": 0}, "seed": seed,
    })  # fmt: skip


def rungs(case: solo.Case) -> list[int]:
    step, found = max(1, round(case.steps * GRACE)), []
    while step < case.steps:
        found.append(step)
        step *= REDUCTION
    return [*found, case.steps]


def measured(case: solo.Case, asha: bool) -> list[int]:
    """Steps at which both sides measure a trial: `EVERY`, and ASHA's rungs."""
    every = round(case.steps * EVERY)
    return sorted({*range(every, case.steps + 1, every), *(rungs(case) if asha else [])})


@contextlib.contextmanager
def ray_timed(times: dict[str, float], meanwhile: Callable[[], object] | None = None) -> Iterator[None]:
    """A private Ray on the cores this process may use; adds to `times` what its start and its end took."""
    from ft_ray import ray_session

    begin = time.perf_counter()
    with ray_session.session(num_cpus=len(os.sched_getaffinity(0)), meanwhile=meanwhile):
        times["ray_s"] = time.perf_counter() - begin
        yield
        begin = time.perf_counter()
    times["ray_s"] += time.perf_counter() - begin


def side_ours(case: solo.Case, asha: bool) -> dict[str, Any]:
    def libraries() -> None:  # beside Ray's start, as `ft-ray sweep` does
        from ft_ray import tuning  # noqa: F401

    made, times = recipe(case), {}
    with ray_timed(times, libraries):
        from ft_ray import base_model
        from ft_ray.storage import Store
        from ft_ray.tuning import sweep

        result = sweep(
            made, space(case, 0, asha), data(case), base_model.resolve(made.model), Store(made.run_path),
            on_event=lambda event: None,
        )  # fmt: skip
    return {
        "tokens": result.trained_tokens, "mean_k": result.mean_k, "train_s": result.seconds,
        "losses": [t.best_loss for t in result.trials], "steps": sum(t.steps for t in result.trials), **times,
    }  # fmt: skip


def trainable(config: dict[str, Any]) -> None:
    """One Tune trial as its documentation has it: loads everything, trains, measures and reports."""
    import torch
    from ray import tune
    from transformers import TrainerCallback

    case = solo.Case(**config["case"])
    torch.set_num_threads(1)
    report = config["measured"]

    class Report(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_evaluate = state.global_step in report

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            tune.report({"validation_loss": metrics["eval_loss"], "step": state.global_step})

    trainer = _trl(case, config["point"], Report())
    trainer.train()


def _trl(case: solo.Case, point: Mapping[str, Any], callback: Any) -> Any:
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tiny, rows = case.shape == "tiny", data(case)
    arguments = SFTConfig(
        output_dir=tempfile.gettempdir(), max_steps=case.steps, seed=0, per_device_train_batch_size=case.rows,
        per_device_eval_batch_size=case.rows, learning_rate=point["optim.lr"], lr_scheduler_type="cosine",
        warmup_steps=0.03, weight_decay=0.01, use_cpu=case.device == "cpu", bf16=not tiny,
        gradient_checkpointing=not tiny, logging_strategy="no", save_strategy="no", report_to="none",
        disable_tqdm=True, max_length=None, optim="adamw_torch_fused", dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=point["lora.r"], lora_alpha=point["lora.alpha"], lora_dropout=point["lora.dropout"],
        target_modules="all-linear",
    )  # fmt: skip
    return SFTTrainer(
        solo.base(case), args=arguments, peft_config=lora, callbacks=[callback],
        processing_class=AutoTokenizer.from_pretrained(case.folder),
        train_dataset=rows.tokens("train").remove_columns("length"),
        eval_dataset=rows.tokens("validation").remove_columns("length"),
    )  # fmt: skip


def side_tune(case: solo.Case, asha: bool, reuse: bool = False) -> dict[str, Any]:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    order = points(case)
    random.Random(0).shuffle(order)
    scheduler = None
    if asha:
        scheduler = ASHAScheduler(
            time_attr="step", max_t=case.steps, grace_period=max(1, round(case.steps * GRACE)),
            reduction_factor=REDUCTION,
        )  # fmt: skip
    resources = {"CPU": 1} if case.device == "cpu" else {"CPU": 1, "GPU": 1}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    os.environ["PYTHONPATH"] = paths
    times: dict[str, float] = {}
    with ray_timed(times):
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources),
            param_space={"point": tune.grid_search(order), "case": asdict(case), "measured": measured(case, asha)},
            tune_config=tune.TuneConfig(
                metric="validation_loss", mode="min", scheduler=scheduler, reuse_actors=reuse,
            ),
            run_config=tune.RunConfig(storage_path=f"{case.folder}/tune", verbose=0),
        )
        begin = time.perf_counter()
        found = tuner.fit()
        seconds = time.perf_counter() - begin
    if found.errors:
        raise SystemExit(f"{len(found.errors)} trials failed: {found.errors[0]}")
    losses = [min(result.metrics_dataframe["validation_loss"]) for result in found]
    steps = sum(int(result.metrics["step"]) for result in found)
    return {"losses": losses, "train_s": seconds, "steps": steps, **times}


def side_regret(case: solo.Case, seed: int) -> dict[str, Any]:
    """One full sweep, its curves recorded; then ASHA's decisions on them."""
    import torch
    from transformers import AutoModelForCausalLM

    from ft_ray import search_space, sweep_search
    from ft_ray.packed_training import train_packed
    from ft_ray.shared_base import SharedBase

    torch.set_num_threads(1)
    marks = rungs(case)
    shared = SharedBase(AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32), exact=False)
    rows, made = data(case, seed), recipe(case, seed, every=marks[0])
    trials = {f"t{i}": (search_space.apply(made, point), rows) for i, point in enumerate(points(case, seed))}
    found = train_packed(shared, trials)
    curves = {name: dict(run.history) for name, run in found.items()}
    scheduler = sweep_search.scheduler(space(case, seed, asha=True), case.steps)
    return {**replay(curves, marks, scheduler, seed), "train_s": 0}


def replay(
    curves: Mapping[str, Mapping[int, float]], marks: Sequence[int], scheduler: Any, seed: int
) -> dict[str, Any]:
    """What `scheduler` would have done: trials come to each rung together, in shuffled order."""
    from ray.tune.schedulers import TrialScheduler

    assert scheduler.set_search_properties("validation_loss", "min")
    trials = {name: SimpleNamespace(trial_id=name) for name in curves}
    order = list(curves)
    random.Random(seed).shuffle(order)
    for name in order:
        scheduler.on_trial_add(None, trials[name])
    alive, steps = list(order), dict.fromkeys(curves, 0)
    for mark in marks:
        for name in list(alive):
            steps[name] = mark
            result = {"training_iteration": mark, "step": mark, "validation_loss": curves[name][mark]}
            decision = scheduler.on_trial_result(None, trials[name], result)
            if mark < marks[-1] and decision == TrialScheduler.STOP:
                alive.remove(name)
    # Each trial's best checkpoint counts, in the sweep with ASHA as in the full one.
    full = {name: min(curve.values()) for name, curve in curves.items()}
    seen = {name: min(loss for step, loss in curves[name].items() if step <= steps[name]) for name in curves}
    winner = min(seen, key=lambda name: seen[name])
    rank = sorted(full, key=lambda name: full[name]).index(winner) + 1
    return {"token_ratio": sum(steps.values()) / (len(curves) * marks[-1]), "rank": rank, "finished": len(alive),
            "best": min(full.values()), "found": seen[winner]}  # fmt: skip


def child(case: solo.Case, side: str, **options: Any) -> dict[str, Any]:
    """Runs one side in a process of its own; adds the wall of that process."""
    work = json.dumps({"case": asdict(case), "side": side, "options": options, "asha": [REDUCTION, GRACE]})
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, "--child", work, "--json", answer.name], capture_output=True, text=True
        )
        wall = time.perf_counter() - begin
        if done.returncode:
            raise SystemExit(f"the side {side} failed:\n{done.stderr[-3000:]}")
        result: dict[str, Any] = json.loads(Path(answer.name).read_text())
    short = {key: value for key, value in result.items() if not isinstance(value, list)}
    print(f"{side} {options or ''} {wall:.1f} s: {short}", file=sys.stderr)
    return {**result, "wall_s": wall}


def serve_child(work: dict[str, Any]) -> dict[str, Any]:
    global REDUCTION, GRACE
    case, side = solo.Case(**work["case"]), work["side"]
    REDUCTION, GRACE = work["asha"]
    if side == "regret":
        return side_regret(case, **work["options"])
    asha = side.endswith("_asha")
    return side_ours(case, asha) if side.startswith("ours") else side_tune(case, asha, side == "tune_reuse")


def measure(case: solo.Case, sides: Sequence[str]) -> dict[str, Any]:
    found = {side: child(case, side) for side in sides}
    walls = {side: result["wall_s"] for side, result in found.items()}
    bare = {side: wall - found[side]["ray_s"] for side, wall in walls.items()}
    pairs = [
        (peer, ours) for peer, ours in (("tune", "ours"), ("tune_asha", "ours_asha"), ("tune_reuse", "ours"))
        if peer in walls and ours in walls
    ]  # fmt: skip
    return {
        "ratios": {peer: walls[peer] / walls[ours] for peer, ours in pairs},
        "ratios_without_ray": {peer: bare[peer] / bare[ours] for peer, ours in pairs},
        "sides": found,
    }


def regret(case: solo.Case, seeds: int) -> dict[str, Any]:
    found = [child(case, "regret", seed=seed) for seed in range(seeds)]
    return {
        "asha": {
            "token_ratio": statistics.mean(one["token_ratio"] for one in found),
            "token_ratios": [one["token_ratio"] for one in found],
            "top2": sum(one["rank"] <= 2 for one in found), "ranks": [one["rank"] for one in found], "seeds": seeds,
            "how": "full curves recorded, decisions by ray.tune's scheduler replayed on them",
        }
    }  # fmt: skip


def main() -> None:
    global REDUCTION, GRACE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=("tiny", *solo.SHAPES), default="tiny")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64, help="tokens a step of one trial, at most")
    sides = (*SIDES, "tune_reuse")
    parser.add_argument("--only", action="append", choices=sides, help="run this side; repeat for several")
    parser.add_argument("--regret", action="store_true", help="ASHA's token share and the rank of its winner")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--reduction", type=int, default=REDUCTION, help="ASHA: one in so many goes on at a rung")
    parser.add_argument("--grace", type=float, default=GRACE, help="ASHA: the first rung, as a share of the steps")
    given = parser.parse_args()
    if given.child:
        given.json.write_text(json.dumps(serve_child(json.loads(given.child))))
        from ft_ray.cli_output import leave

        leave(0)  # both sides end as the command does
    REDUCTION, GRACE = given.reduction, given.grace
    with tempfile.TemporaryDirectory() as folder:
        case = solo.Case(
            device=given.device, shape=given.shape, nf4=False, trials=given.trials, steps=given.steps,
            tokens=given.tokens, rows=4, dropout=True, folder=folder,
        )  # fmt: skip
        solo.build(case)
        result = regret(case, given.seeds) if given.regret else measure(case, given.only or SIDES)
        result["asha_rules"] = {"reduction": REDUCTION, "grace": GRACE, "rungs": rungs(case)}
        result["case"] = {key: value for key, value in asdict(case).items() if key != "folder"}
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
