"""N replicas of the endpoint against one, and prefix-aware routing on and off.

    python benchmarks/serving_replicas.py --device cuda --replicas 2 [--one serving.json] [--json FILE]

The load is that of serving.py: `--concurrency` requests at once *a replica*, plain. Throughput of one replica is
measured, or read from serving.py's JSON with `--one` (its direct mode at the same concurrency). Then N replicas answer
random prompts, and prompts of which many begin alike (64 beginnings of 1,024 tokens); with `routing: prefix` once more.
Direct mode, guards on. Prints throughput and its ratio to N times one; asserts nothing.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from servers import about, engine_flags, model_folder, options, ours
from serving import Clients, load

from ft_ray.serve_direct import FORWARD_BODY


def alike(gpu: bool, requests: int, processes: int, tokens: int) -> list[str]:
    """The client's options for prompts that share beginnings; each process has its own beginnings."""
    prefixes = max(1, min(64, requests // 8) // processes)
    return [
        "--dataset-name", "prefix_repetition", "--prefix-repetition-prefix-len", "1024" if gpu else "96",
        "--prefix-repetition-suffix-len", "64" if gpu else "16", "--prefix-repetition-num-prefixes", str(prefixes),
        "--prefix-repetition-output-len", str(tokens),
    ]  # fmt: skip


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--concurrency", type=int, help="a replica; default: 256 on a GPU, 8 on a CPU")
    parser.add_argument("--one", type=Path, help="JSON of serving.py with the figures of one replica")
    parser.add_argument("--sides", nargs="+", choices=["one", "load", "prefix"], help="only these")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--cache", help="folder of compiled kernels")
    parser.add_argument("--mode", choices=["direct", "ingress"], default="direct")
    parser.add_argument("--patience", type=float, default=900)
    given = parser.parse_args()
    gpu, count = given.device == "cuda", given.replicas
    each = given.concurrency or (256 if gpu else 8)
    tokens, rounds, processes = (128, 4, 16) if gpu else (16, 2, 2)
    if given.quick:
        rounds = 2
    engine = engine_flags(given.device, each, given.cache)
    one = None
    if given.one and given.one.exists():
        one = json.loads(given.one.read_text())["figures"].get(given.mode, {}).get(f"plain {each}")
    sides = given.sides or ([] if one else ["one"]) + ["load", "prefix"]
    figures: dict[str, Any] = {"one": {"random": one}} if one else {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = given.model or model_folder(given.device, Path(scratch))
        clients = Clients(processes)
        stack.callback(clients.close)
        for side in sides:
            number = 1 if side == "one" else count
            replicas = {
                "min": number, "max": number, "max_ongoing": 2 * each, "target_ongoing": 2 * each,
                "routing": "prefix" if side == "prefix" else "load", "ingress": max(1, number * each // 64),
            }  # fmt: skip
            try:
                with ours(
                    folder, engine, mode=given.mode, replicas=replicas, patience=given.patience,
                    limits={"concurrency": 4 * each * number, "max_tokens": 1024},
                    more={FORWARD_BODY: "1"} if side == "prefix" else None,
                ) as server:  # fmt: skip
                    at_once = each * number

                    def case(data: list[str] | None, rounds: int, server: Any = server, at_once: int = at_once) -> Any:
                        return load(
                            server, folder, clients, concurrency=at_once, requests=at_once * rounds, tokens=tokens,
                            stream=False, processes=min(processes, at_once), data=data,
                        )  # fmt: skip

                    case(None, 1)
                    shared = alike(gpu, at_once * rounds, min(processes, at_once), tokens)
                    figures[side] = {"random": case(None, rounds), "alike": case(shared, rounds)}
                    figures[side]["start_seconds"] = server.start
            except SystemExit as error:
                figures[side] = {"failed": str(error)[-2000:]}
                print(f"{side}: {str(error)[-2000:]}", flush=True)
                continue
            for name in ("random", "alike"):
                print(f"{side} {name}: {figures[side][name]['tokens_per_second']:.0f} tok/s", flush=True)
            if given.json:
                Path(given.json).write_text(json.dumps({"figures": figures}) + "\n")  # in case of an early end

    def rate(side: str, name: str) -> float | None:
        found = (figures.get(side) or {}).get(name)
        return found["tokens_per_second"] if found else None

    result: dict[str, Any] = {
        "device": given.device, "replicas": count, "concurrency_each": each, "mode": given.mode, "engine": engine,
        "guards": True, "figures": figures, **about(),
    }  # fmt: skip
    single, several = rate("one", "random"), rate("load", "random")
    if single and several:
        result["ratio_to_n_times_one"] = round(several / (count * single), 3)
        print(f"{count} replicas / ({count} x one): {result['ratio_to_n_times_one']}")
    on, off = rate("prefix", "alike"), rate("load", "alike")
    if on and off:
        result["prefix_routing_gain"] = round(on / off, 3)
        print(f"prompts that begin alike, prefix-aware / by load: {result['prefix_routing_gain']}")
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
