"""N replicas of the endpoint against one, and prefix-aware routing on and off.

    python benchmarks/serving_replicas.py --device cuda --replicas 2 [--mode direct|ingress] [--json FILE]

The load is that of serving.py: `--concurrency` requests at once *a replica*, plain, from several client processes. The
endpoint starts once, with N replicas that route by load; then the same engines route by prefix; then all but one of
them end, and the one that is left is the single replica (it keeps its HTTP front, as many processes as before). Each
side answers random prompts, and prompts of which many begin alike (`--prefixes` beginnings of 1,024 tokens, on a CPU
256, other ones on every side). `--kv-cache-gib` bounds a replica's cache: routing by prefix pays where one replica's
cache cannot hold all beginnings. Guards on. In direct mode HAProxy picks a replica by load; for prefixes it asks one
router process, over a connection and with the prompt of each request. In ingress mode there is one ingress process for
each 64 requests at once. Prints throughput, its ratio to N times one, and the share of prompt tokens that the caches
held, which does not depend on how fast a machine is; asserts nothing. The JSON is written after each side.
"""

from __future__ import annotations

import contextlib
import json
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import cache_hits
from servers import Server, about, engine_flags, model_folder, options, ours
from serving import Clients, load

from ft_ray.serve_direct import FORWARD_BODY

SIDES = ("load", "prefix", "one")


def alike(gpu: bool, prefixes: int, processes: int, tokens: int) -> list[str]:
    """The client's options for prompts that share beginnings; each process has its own beginnings.

    On a CPU they are two of vLLM's blocks of 128 tokens: only whole blocks are found again.
    """
    return [
        "--dataset-name", "prefix_repetition", "--prefix-repetition-prefix-len", "1024" if gpu else "256",
        "--prefix-repetition-suffix-len", "64" if gpu else "16",
        "--prefix-repetition-num-prefixes", str(max(1, prefixes // processes)),
        "--prefix-repetition-output-len", str(tokens),
    ]  # fmt: skip


def summary(result: dict[str, Any], count: int) -> dict[str, Any]:
    """`result` with the ratios of the sides that it has."""
    figures = result["figures"]

    def rate(side: str, name: str) -> float | None:
        found = figures.get(side, {}).get(name)
        return found["tokens_per_second"] if found else None

    single, several = rate("one", "random"), rate("load", "random")
    if single and several:
        result["ratio_to_n_times_one"] = round(several / (count * single), 3)
    single, several = rate("one", "alike"), rate("load", "alike")
    if single and several:
        result["ratio_to_n_times_one_alike"] = round(several / (count * single), 3)
    for name in ("random", "alike"):
        cases = {side: found[name] for side, found in figures.items() if "cache" in found.get(name, {})}
        result.setdefault("cache_hit_share", {})[name] = {side: case["cache"]["share"] for side, case in cases.items()}
    on, off = rate("prefix", "alike"), rate("load", "alike")
    if on and off:
        result["prefix_routing_gain"] = round(on / off, 3)
    return result


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--concurrency", type=int, help="a replica; default: 256 on a GPU, 8 on a CPU")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="only these")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--cache", help="folder of compiled kernels")
    parser.add_argument("--mode", choices=["direct", "ingress"], default="direct")
    parser.add_argument("--prefixes", type=int, help="beginnings; default: 256 on a GPU, 8 on a CPU")
    parser.add_argument("--rounds", type=int, help="times the requests at once; default: 4 on a GPU, 2 on a CPU")
    parser.add_argument("--kv-cache-gib", type=float, help="a replica's; default: 8 on a GPU, 1 on a CPU")
    parser.add_argument("--patience", type=float, default=900, help="seconds that the endpoint has to come up")
    parser.add_argument("--after", type=Path, metavar="FILE", help="start, but measure once this file exists")
    parser.add_argument("--limit", type=float, default=7200, help="seconds after which no case begins")
    given = parser.parse_args()
    until = time.monotonic() + given.limit
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the endpoint ends with this script
    gpu, count = given.device == "cuda", given.replicas
    each = given.concurrency or (256 if gpu else 8)
    tokens, rounds, processes = (128, 4, 16) if gpu else (16, 2, 2)
    rounds = given.rounds or (2 if given.quick else rounds)
    prefixes = given.prefixes or (256 if gpu else 8)
    engine = engine_flags(given.device, each, given.cache) | {"kv_cache_gib": given.kv_cache_gib or (8 if gpu else 1)}
    # Beside the cache a small model needs little: something else may use the GPUs while this starts (`--after`).
    engine |= {"gpu_memory": 0.2} if gpu else {"threads": 1}
    front = max(1, count * each // 64) if gpu else 1
    figures: dict[str, Any] = {}
    result: dict[str, Any] = {
        "device": given.device, "replicas": count, "concurrency_each": each, "mode": given.mode, "engine": engine,
        "prefixes": prefixes, "rounds": rounds, "clients": processes, "ingress_processes": front, "guards": True,
        "figures": figures, **about(),
    }  # fmt: skip

    def keep() -> None:
        summary(result, count)
        if given.json:
            Path(given.json).write_text(json.dumps(result, indent=1) + "\n")

    def replicas(side: str) -> dict[str, Any]:
        number = 1 if side == "one" else count
        return {
            "min": number, "max": number, "max_ongoing": 2 * each, "target_ongoing": 2 * each, "ingress": front,
            "routing": "prefix" if side == "prefix" else "load", "downscale_delay": 0,
        }  # fmt: skip

    def measure(side: str, server: Server, folder: Path, clients: Clients) -> None:
        number = 1 if side == "one" else count
        at_once, own = each * number, min(processes, each)
        figures[side] = {"requests_at_once": at_once}
        for turn, name in enumerate(("warm-up", "random", "alike")):
            if time.monotonic() > until:
                print("the time is up", flush=True)
                return
            before = cache_hits.settled(server.metrics)
            found = load(
                server, folder, clients, concurrency=at_once, requests=at_once * (1 if turn == 0 else rounds),
                tokens=tokens, stream=False, processes=own, seed=1000 * (3 * SIDES.index(side) + turn),
                data=alike(gpu, prefixes, own, tokens) if name == "alike" else None,
            )  # fmt: skip
            figures[side][name] = found
            found["cache"] = cache_hits.share(before, cache_hits.settled(server.metrics))
            said = f"{found['tokens_per_second']:.0f} tok/s, {found['failed']} failed, {found['seconds']:.1f} s"
            said += f", {found['cache']['share']} of {found['cache']['queries']} prompt tokens from the cache"
            print(f"{side} {name}: {said}", flush=True)
            keep()

    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = given.model or model_folder(given.device, Path(scratch))
        clients = Clients(processes)
        stack.callback(clients.close)
        sides = [side for side in SIDES if side in given.sides]
        server = stack.enter_context(
            ours(
                folder, engine, mode=given.mode, replicas=replicas(sides[0]), patience=given.patience,
                limits={"concurrency": 4 * each * count, "max_tokens": 1024},
                more={FORWARD_BODY: "1", **cache_hits.EVERY_SECOND},
            )
        )  # fmt: skip
        result["start_seconds"], result["start_parts"] = server.start, server.parts
        while given.after and not given.after.exists():
            time.sleep(0.2)
        routing = replicas(sides[0])["routing"]
        for side in sides:
            try:
                if side != sides[0]:
                    changed = server.change(replicas(side), replicas(side)["routing"] != routing)
                    routing = replicas(side)["routing"]
                    result.setdefault("changes", {})[side] = changed
                    print(f"{side}: changed in {changed['seconds']} s", flush=True)
                measure(side, server, folder, clients)
            except SystemExit as error:
                figures.setdefault(side, {})["failed"] = str(error)[-2000:]
                print(f"{side}: {str(error)[-2000:]}", flush=True)
            keep()
    for name in ("ratio_to_n_times_one", "ratio_to_n_times_one_alike", "prefix_routing_gain", "cache_hit_share"):
        print(f"{name}: {result.get(name)}", flush=True)


if __name__ == "__main__":
    main()
