"""Our endpoint against bare vLLM: the same model, engine flags and load, one after the other, guards on.

    python benchmarks/serving.py [--device cpu|cuda] [--mode ingress|direct|both] [--unmerged] [--quick] [--json FILE]

The load comes from vLLM's own benchmark client in several processes, so that the client is not the limit: N requests
at once, each of a fixed number of new tokens, plain and streaming. Prints ratios, ours over bare, and asserts nothing.
Both sides are measured twice in each case, the second pass counts. The JSON holds `ratios` (output tokens a second, by
mode, kind and concurrency), `first_token_ratio` (median, streaming), `cpu_time_ratio` (CPU time a token of the whole
process tree), `guards`, `failed`, `versions`, and every figure behind them. `--unmerged` adds the same model with a
LoRA adapter (r=16 on every projection) that is not merged, in ingress mode.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from servers import ROOT, Server, about, bare, engine_flags, model_folder, options, ours

_CLIENT = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def load(
    server: Server, folder: Path, *, concurrency: int, requests: int, tokens: int, stream: bool, clients: int
) -> dict[str, Any]:
    """One case. Tokens are counted, not taken from texts: every request has exactly `tokens` new ones."""
    with tempfile.TemporaryDirectory() as results:
        before = server.cpu_seconds()
        commands = []
        for i in range(clients):
            command = [
                sys.executable, "-c", _CLIENT, "--backend", "openai", "--base-url", server.url,
                "--endpoint", "/v1/completions", "--model", server.model, "--tokenizer", str(folder),
                "--dataset-name", "random", "--random-input-len", "64", "--random-output-len", str(tokens),
                "--num-prompts", str(requests // clients), "--max-concurrency", str(max(1, concurrency // clients)),
                "--ignore-eos", "--temperature", "0", "--seed", str(i), "--disable-tqdm", "--save-result",
                "--save-detailed", "--result-dir", results, "--result-filename", f"{i}.json",
                "--ready-check-timeout-sec", "0",
            ]  # fmt: skip
            if server.key:
                command += ["--header", f"Authorization=Bearer {server.key}"]
            if not stream:
                command += ["--extra-body", json.dumps({"stream": False, "stream_options": None})]
            commands.append(command)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        processes = [subprocess.Popen(c, env=env, text=True, **quiet) for c in commands]  # type: ignore[call-overload]
        for process in processes:
            _, errors = process.communicate()
            if process.returncode != 0:
                raise SystemExit(f"the benchmark client failed: {errors[-2000:]}")
        cpu = server.cpu_seconds() - before
        found = [json.loads((Path(results) / f"{i}.json").read_text()) for i in range(clients)]
    starts = [t for f in found for t in f["start_times"]]
    ends = [s + t + sum(i) for f in found for s, t, i in zip(f["start_times"], f["ttfts"], f["itls"], strict=True)]
    done = sum(f["completed"] for f in found)
    seconds = max(ends) - min(starts)  # one clock on one machine
    return {
        "tokens_per_second": done * tokens / seconds,
        "seconds": seconds,
        "requests": len(starts),
        "failed": len(starts) - done,
        "first_token_ms": 1000 * statistics.median(t for f in found for t in f["ttfts"]) if stream else None,
        "cpu_ms_per_token": 1000 * cpu / max(1, done * tokens),
    }


def measure(server: Server, folder: Path, plan: dict[str, Any], passes: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"start_seconds": server.start}
    for concurrency in plan["concurrency"]:
        for kind in ("plain", "streaming"):
            for _ in range(passes):
                case = load(
                    server, folder, concurrency=concurrency, requests=concurrency * plan["rounds"],
                    tokens=plan["tokens"], stream=kind == "streaming", clients=min(plan["clients"], concurrency),
                )  # fmt: skip
            figures[f"{kind} {concurrency}"] = case
            print(f"  {kind} {concurrency}: {case['tokens_per_second']:.0f} tok/s, {case['failed']} failed", flush=True)
    return figures


def adapter(base: Path, folder: Path) -> Path:
    """A random LoRA adapter of `base`, which answers as fast as a trained one."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--mode", choices=["ingress", "direct", "both"], default="both")
    parser.add_argument("--unmerged", action="store_true", help="also an adapter that is not merged")
    parser.add_argument("--concurrency", type=int, nargs="+", help="default: 8 32 on a CPU, 32 128 256 on a GPU")
    arguments = parser.parse_args()
    gpu = arguments.device == "cuda"
    concurrency = arguments.concurrency or ([32, 128, 256] if gpu else [8, 32])
    plan = {
        "concurrency": concurrency,
        "tokens": 128 if gpu else 32,
        "rounds": (4 if arguments.quick else 10) if gpu else (1 if arguments.quick else 4),
        "clients": 8 if gpu else 1,
    }
    passes = 1 if arguments.quick else 2
    engine = engine_flags(arguments.device, max(concurrency))
    limits = {"concurrency": 2 * max(concurrency), "max_tokens": 1024}
    modes = ["ingress", "direct"] if arguments.mode == "both" else [arguments.mode]
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(arguments.device, Path(scratch))
        print("bare vLLM", flush=True)
        with bare(folder, engine) as server:
            figures = {"bare": measure(server, folder, plan, passes)}
        for mode in modes:
            print(f"ours, {mode} mode", flush=True)
            with ours(folder, engine, mode=mode, limits=limits) as server:
                figures[mode] = measure(server, folder, plan, passes)
        if arguments.unmerged:
            print("ours, an adapter that is not merged", flush=True)
            adapters = {"a": str(adapter(folder, Path(scratch) / "a"))}
            with ours(folder, engine, limits=limits, adapters=adapters) as server:
                server.model += ":a"
                figures["unmerged"] = measure(server, folder, plan, passes)
            modes.append("unmerged")
    cases = [c for c in figures["bare"] if c != "start_seconds"]

    def ratios(figure: str) -> dict[str, dict[str, float]]:
        return {
            mode: {
                case: round(figures[mode][case][figure] / figures["bare"][case][figure], 3)
                for case in cases
                if figures["bare"][case][figure]
            }
            for mode in modes
        }

    result = {
        "device": arguments.device, "quick": arguments.quick, "plan": plan, "engine": engine, "guards": True,
        "ratios": ratios("tokens_per_second"), "first_token_ratio": ratios("first_token_ms"),
        "cpu_time_ratio": ratios("cpu_ms_per_token"),
        "failed": sum(figures[side][case]["failed"] for side in figures for case in cases),
        **about(), "figures": figures,
    }  # fmt: skip
    for mode in modes:
        print(f"{mode} over bare vLLM:")
        for case in cases:
            first = result["first_token_ratio"][mode].get(case)
            print(
                f"  {case}: tokens/s {result['ratios'][mode][case]:.2f}"
                + (f", first token {first:.2f}" if first else "")
                + f", CPU time a token {result['cpu_time_ratio'][mode][case]:.2f}"
            )
    print(f"failed: {result['failed']}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
