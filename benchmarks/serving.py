"""Our endpoint against bare vLLM: the same model, engine flags and load, one after the other, guards on.

    python benchmarks/serving.py [--device cpu|cuda] [--mode ingress|direct|both] [--unmerged] [--quick] [--keep FILE]
                                 [--json FILE] [--gpus 0,1] [--starts]

The load comes from vLLM's own benchmark client in several processes, so that the client is not the limit: N requests
at once, each of a fixed number of new tokens, plain and streaming. Prints ratios, ours over bare, and asserts nothing.
After a warm-up every case runs `--passes` times on each side, in turn. A ratio is the median of the ratios of the
passes, whose two sides lie next to each other in time with `--gpus 0,0`; `spread` has the lowest and the highest. The
JSON holds `ratios` (output tokens a second, by mode, kind and concurrency), `first_token_ratio` (median, streaming),
`cpu_time_ratio` (CPU time a token of the whole process tree), `guards`, `failed`, `versions`, and every figure behind
them. On a machine of 16 cores or more the clients run on the upper half of them and the servers on the lower.
`--unmerged` adds the same model with a LoRA adapter (r=16 on every projection) that is not merged, in ingress mode, and
`unmerged_over_merged`. With `--gpus 0,1` as many sides start at the same time as there are GPUs named, each on its own,
and are then measured in turn; with `--gpus 0,0,0` they share one (or, with `--device cpu`, its cores), each with the
same memory for keys and values. `--sides` picks some. Each has a folder of compiled kernels of its own below
`--cache`. `--starts` measures how long they take to come up and nothing else: once more with the same folder tells what
kept kernels are worth.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from servers import ROOT, Server, about, bare, engine_flags, model_folder, options, ours

Figures = dict[str, dict[str, Any]]

_CLIENT = """
import argparse, contextlib, io, json, sys
from vllm.benchmarks.lib import endpoint_request_func as client
from vllm.benchmarks.serve import add_cli_args, main

class Handler(client.StreamedResponseHandler):
    def add_chunk(self, chunk):  # an answer that is not streamed is one event: vLLM's client knows no other
        if not self.buffer and chunk.startswith(b"{"):
            self.buffer = "data: "
        return super().add_chunk(chunk)

client.StreamedResponseHandler = Handler
parser = argparse.ArgumentParser()
add_cli_args(parser)
for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()):
        main(parser.parse_args(json.loads(line)))
    print("done", flush=True)
"""


class Clients:
    """vLLM's benchmark client in several processes that stay: starting one takes longer than most cases."""

    def __init__(self, number: int) -> None:
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the processes
        cores = sorted(os.sched_getaffinity(0))
        self._processes = [
            subprocess.Popen([sys.executable, "-c", _CLIENT], env=env, text=True, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=self._errors)
            for _ in range(number)
        ]  # fmt: skip
        if number and len(cores) >= 16:
            for process in self._processes:
                os.sched_setaffinity(process.pid, cores[len(cores) // 2 :])
            os.sched_setaffinity(0, cores[: len(cores) // 2])  # of this process, and so of the servers it starts

    def run(self, commands: list[list[str]]) -> None:
        """One command a process, all at once; returns when the last one is through."""
        used = self._processes[: len(commands)]
        for process, command in zip(used, commands, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        for process in used:
            assert process.stdout is not None
            if not any(line.strip() == "done" for line in process.stdout):  # vLLM logs there too
                self._errors.seek(0)
                raise SystemExit(f"the benchmark client failed: {self._errors.read()[-2000:]}")

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            process.wait(timeout=60)
        self._errors.close()


def load(
    server: Server, folder: Path, clients: Clients, *, concurrency: int, requests: int, tokens: int, stream: bool,
    processes: int, data: list[str] | None = None, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """One case. Tokens are counted, not taken from texts: every request has exactly `tokens` new ones.

    `data`: the client's options that say what is asked; default: 64 random tokens.
    """
    data = data or ["--dataset-name", "random", "--random-input-len", "64", "--random-output-len", str(tokens)]
    with tempfile.TemporaryDirectory() as results:
        before = server.cpu_seconds()
        commands = []
        for i in range(processes):
            command = [
                "--backend", "openai", "--base-url", server.url, "--endpoint", "/v1/completions",
                "--model", server.model, "--tokenizer", str(folder), *data,
                "--num-prompts", str(requests // processes), "--max-concurrency", str(max(1, concurrency // processes)),
                "--ignore-eos", "--temperature", "0", "--seed", str(seed + i), "--disable-tqdm", "--save-result",
                "--save-detailed", "--result-dir", results, "--result-filename", f"{i}.json",
                "--ready-check-timeout-sec", "0",
            ]  # fmt: skip
            if server.key:
                command += ["--header", f"Authorization=Bearer {server.key}"]
            if not stream:
                command += ["--extra-body", json.dumps({"stream": False, "stream_options": None})]
            commands.append(command)
        clients.run(commands)
        cpu = server.cpu_seconds() - before
        found = [json.loads((Path(results) / f"{i}.json").read_text()) for i in range(processes)]
    starts = [t for f in found for t in f["start_times"]]
    ends = [s + t + sum(i) for f in found for s, t, i in zip(f["start_times"], f["ttfts"], f["itls"], strict=True)]
    done = sum(f["completed"] for f in found)
    if not done:
        raise SystemExit(f"no request was answered: {found[0]['errors'][0][:2000]}")
    seconds = max(ends) - min(starts)  # one clock on one machine
    return {
        "tokens_per_second": done * tokens / seconds,
        "seconds": seconds,
        "requests": len(starts),
        "failed": len(starts) - done,
        "first_token_ms": 1000 * statistics.median(t for f in found for t in f["ttfts"]) if stream else None,
        "cpu_ms_per_token": 1000 * cpu / max(1, done * tokens),
    }


def guarded(server: Server) -> bool:
    """Whether the endpoint that is measured refuses what it should: no key, a wrong one, more tokens than the limit,
    a template of the client's own, an unlisted route."""

    def status(key: str, change: dict[str, Any], path: str = "/v1/chat/completions") -> int:
        body = {"model": server.model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, **change}
        headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
        request = urllib.request.Request(f"{server.url}{path}", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code

    found = [
        status("", {}), status("no", {}), status(server.key, {"max_tokens": 10**7}),
        status(server.key, {"chat_template": "x"}), status(server.key, {}, "/tokenize"), status(server.key, {}),
    ]  # fmt: skip
    right = [401, 401, 422, 422, 404, 200]
    if found != right:
        print(f"  the guards answered {found}, not {right}", file=sys.stderr, flush=True)
    return found == right


def measure(
    servers: dict[str, Server], folder: Path, clients: Clients, plan: dict[str, Any], until: float,
    kept: Callable[[Figures], None],
) -> None:  # fmt: skip
    """Every case `passes` times on each side in turn, the others idle, after one round that warms up.

    A figure is the list of what each pass found; `kept` gets all there are after each case of a side. A side that fails
    is left out from then on; nothing new begins after `until`.
    """

    def case(server: Server, concurrency: int, rounds: int, stream: bool) -> dict[str, Any]:
        return load(
            server, folder, clients, concurrency=concurrency, requests=concurrency * rounds, tokens=plan["tokens"],
            stream=stream, processes=min(plan["clients"], concurrency),
        )  # fmt: skip

    figures: Figures = {}
    for side, server in servers.items():
        figures[side] = {"start_seconds": server.start, "start_parts": server.parts}
        if side != "bare":
            figures[side]["start_guards"] = guarded(server)
    kept(figures)
    for server in servers.values() if plan["passes"] else []:
        with contextlib.suppress(SystemExit):  # which is said when it is measured
            case(server, max(plan["concurrency"]), 1, stream=True)
    alive = dict(servers)
    for number in range(plan["passes"]):
        for concurrency, kind in itertools.product(plan["concurrency"], ("plain", "streaming")):
            # Who goes first changes from pass to pass: a machine that slows down favours neither.
            for side in list(alive) if number % 2 == 0 else reversed(list(alive)):
                if time.monotonic() > until:
                    print("  the time is up", flush=True)
                    return
                name = f"{kind} {concurrency}"
                try:
                    found = case(alive[side], concurrency, plan["rounds"], kind == "streaming")
                except SystemExit as error:
                    print(f"  {side} {name}: {error}", flush=True)
                    del alive[side]
                    continue
                figures[side].setdefault(name, []).append(found)
                print(f"  {side} {name}: {found['tokens_per_second']:.0f} tok/s, {found['failed']} failed", flush=True)
                kept(figures)


def started(stack: contextlib.ExitStack, sides: dict[str, Any]) -> dict[str, Server]:
    """The servers that came up, all started at the same time; of the others it is said why."""

    def enter(start: Any) -> Server | str:
        try:
            server: Server = stack.enter_context(start())
            return server
        except SystemExit as error:
            return str(error)

    with ThreadPoolExecutor(len(sides)) as pool:
        found = dict(zip(sides, pool.map(enter, sides.values()), strict=True))
    for side, server in found.items():
        if isinstance(server, str):
            print(f"{side}: {server}", file=sys.stderr, flush=True)
    return {side: server for side, server in found.items() if isinstance(server, Server)}


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
    parser.add_argument("--sides", nargs="+", choices=["bare", "ingress", "direct", "unmerged"], help="only these")
    parser.add_argument("--concurrency", type=int, nargs="+", help="default: 8 32 on a CPU, 32 128 256 on a GPU")
    parser.add_argument("--gpus", help="GPUs by number, comma-separated: so many sides start at once")
    parser.add_argument("--starts", action="store_true", help="only start the sides")
    parser.add_argument("--cache", help="folder of compiled kernels, one of each side below it; default: a new one")
    parser.add_argument("--model", type=Path, help="model folder; default: see servers.py")
    parser.add_argument("--passes", type=int, help="of every case on each side; default 2, with --quick 1")
    parser.add_argument("--patience", type=float, default=900, help="seconds that a side has to come up")
    parser.add_argument("--keep", type=Path, help="figures of each side as they come; what is there is not run again")
    parser.add_argument("--limit", type=float, default=7200, help="seconds after which no case begins")
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.limit
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers end with this script
    gpu = arguments.device == "cuda"
    concurrency = arguments.concurrency or ([32, 128, 256] if gpu else [8, 32])
    plan = {
        "concurrency": concurrency,
        "tokens": 128 if gpu else 32,
        "rounds": (4 if arguments.quick else 10) if gpu else (1 if arguments.quick else 4),
        "clients": 8 if gpu else 1,
        "passes": 0 if arguments.starts else arguments.passes or (1 if arguments.quick else 2),
    }
    cache = tempfile.mkdtemp(prefix="compiled-") if gpu and not arguments.cache else arguments.cache
    gpus = arguments.gpus.split(",") if arguments.gpus else [None]
    shared = max(gpus.count(one) for one in gpus)
    engine = engine_flags(arguments.device, max(concurrency), sharing=shared)
    most = 2 * max(concurrency)
    # An ingress process saturates near 128 requests at once, so a GPU gets one for every 64.
    replicas = {"max_ongoing": most, "target_ongoing": most, "ingress": max(1, max(concurrency) // 64) if gpu else 1}
    common: dict[str, Any] = {
        "limits": {"concurrency": most, "max_tokens": 1024}, "replicas": replicas, "patience": arguments.patience,
    }  # fmt: skip
    modes = ["ingress", "direct"] if arguments.mode == "both" else [arguments.mode]
    kept = arguments.keep if arguments.keep and arguments.keep.exists() else None
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept else {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = arguments.model or model_folder(arguments.device, Path(scratch))
        clients = Clients(plan["clients"] if plan["passes"] else 0)
        stack.callback(clients.close)
        adapters = {"a": str(adapter(folder, Path(scratch) / "a"))} if arguments.unmerged else {}

        def own(side: str) -> dict[str, Any]:
            return {**engine, "cache": f"{cache}/{side}"} if cache else engine

        sides: dict[str, Any] = {"bare": functools.partial(bare, folder, own("bare"), patience=arguments.patience)}
        for mode in modes:
            sides[mode] = functools.partial(ours, folder, own(mode), mode=mode, **common)
        if arguments.unmerged:
            sides["unmerged"] = functools.partial(ours, folder, own("unmerged"), adapters=adapters, **common)
            modes.append("unmerged")
        waiting = [side for side in sides if side not in figures and side in (arguments.sides or sides)]

        def kept(found: Figures) -> None:
            figures.update(found)
            if arguments.keep:
                arguments.keep.write_text(json.dumps(figures))
            if arguments.json:
                result = summary(arguments, plan, engine, replicas, modes, figures)
                Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")

        while waiting:
            together, waiting = waiting[: len(gpus)], waiting[len(gpus) :]
            with contextlib.ExitStack() as running:
                servers = started(running, {side: functools.partial(sides[side], gpus=one)
                                            for side, one in zip(together, gpus, strict=False)})  # fmt: skip
                if "unmerged" in servers:
                    servers["unmerged"].model += ":a"
                measure(servers, folder, clients, plan, until, kept)
                for server in servers.values():
                    server.leave()
    show(summary(arguments, plan, engine, replicas, modes, figures))


def summary(
    arguments: argparse.Namespace, plan: dict[str, Any], engine: dict[str, Any], replicas: dict[str, Any],
    modes: list[str], figures: Figures,
) -> dict[str, Any]:  # fmt: skip
    """The figures with the ratios of the cases that both sides have."""

    def beside(figure: str, own: str, other: str) -> dict[str, list[float]]:
        """By case, the ratio of each pass that both sides have, in order."""
        cases = {name: passes for name, passes in figures.get(own, {}).items() if not name.startswith("start_")}
        return {
            name: sorted(a[figure] / b[figure] for a, b in zip(passes, figures[other][name], strict=False) if b[figure])
            for name, passes in cases.items()
            if figures.get(other, {}).get(name)
        }

    def median(of: dict[str, list[float]]) -> dict[str, float]:
        return {name: round(statistics.median(ratios), 3) for name, ratios in of.items() if ratios}

    def ratios(figure: str) -> dict[str, dict[str, float]]:
        return {mode: median(beside(figure, mode, "bare")) for mode in modes if mode in figures}

    def spread(figure: str) -> dict[str, dict[str, list[float]]]:
        found = {mode: beside(figure, mode, "bare") for mode in modes if mode in figures}
        return {
            mode: {name: [round(r[0], 3), round(r[-1], 3)] for name, r in of.items() if r} for mode, of in found.items()
        }

    shown = {"tokens_per_second": "tokens_per_second", "cpu_time": "cpu_ms_per_token"}
    unmerged = {name: median(beside(figure, "unmerged", "ingress")) for name, figure in shown.items()}
    cases = [found for side in figures.values() for name, found in side.items() if not name.startswith("start_")]
    return {
        "device": arguments.device, "quick": arguments.quick, "plan": plan, "engine": engine, "replicas": replicas,
        "guards": all(found["start_guards"] for side, found in figures.items() if side != "bare"),
        "ratios": ratios("tokens_per_second"), "first_token_ratio": ratios("first_token_ms"),
        "cpu_time_ratio": ratios("cpu_ms_per_token"), "unmerged_over_merged": unmerged,
        "spread": {name: spread(name) for name in ("tokens_per_second", "first_token_ms", "cpu_ms_per_token")},
        "failed": sum(one["failed"] for passes in cases for one in passes),
        "start_seconds": {side: round(found["start_seconds"], 1) for side, found in figures.items()},
        **about(), "figures": figures,
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    for side, seconds in result["start_seconds"].items():
        print(f"{side} up after {seconds} s {result['figures'][side]['start_parts'] or ''}")
    for mode, found in result["ratios"].items():
        print(f"{mode} over bare vLLM:")
        for case, ratio in found.items():
            low, high = result["spread"]["tokens_per_second"][mode][case]
            first = result["first_token_ratio"][mode].get(case)
            print(
                f"  {case}: tokens/s {ratio:.2f} ({low:.2f} to {high:.2f})"
                + (f", first token {first:.2f}" if first else "")
                + f", CPU time a token {result['cpu_time_ratio'][mode][case]:.2f}"
            )
    for figure, cases in result["unmerged_over_merged"].items():
        print(f"unmerged over merged, {figure.replace('_', ' ')}: {cases}")
    print(f"failed: {result['failed']}")


if __name__ == "__main__":
    main()
