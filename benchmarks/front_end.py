"""What one request costs the process that answers it: our direct mode beside bare vLLM, with a tiny model.

    python benchmarks/front_end.py [--passes 5] [--requests 512] [--concurrency 32] [--new 1] [--profile FOLDER]
                                   [--json FILE]

Clients that ask at once wait for their first token until that process has taken all of them in: most of the time to a
first token on a fast GPU, and measurable without one. Both sides are up at the same time and measured in turn; each
request has 64 prompt tokens and `--new` new ones (one; with many, what a token costs is most of it); guards and keys
are on. Prints milliseconds of CPU a request (that process alone, with all its threads) and of waiting for the first
byte, medians of the passes, and ours over bare: the median of the passes' ratios, lowest to highest. `--profile` has
py-spy look at that process during the last pass (who is on the CPU, 500 times a second): one folded file a case.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import servers
from servers import about

sys.path.insert(0, str(servers.ROOT))

KINDS = ("plain", "streaming")


def answering(server: servers.Server) -> psutil.Process:
    """The process that turns HTTP into requests of the engine, and its tokens into answers."""
    for process in [server.process, *server.process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            if any(word in " ".join(process.cmdline()) for word in ("ServeReplica:", "api_server")):
                return process
    raise SystemExit("no process answers")


async def ask(server: servers.Server, requests: int, concurrency: int, new: int, stream: bool) -> list[float]:
    """Seconds to the first byte of every answer; `concurrency` ask at the same time, then the next ones."""
    import aiohttp

    headers = {"Authorization": f"Bearer {server.key}"} if server.key else {}
    first: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:

        async def one(number: int) -> None:
            prompt = [3 + (number * 7 + place) % 250 for place in range(64)]
            body = {"model": server.model, "prompt": prompt, "max_tokens": new, "ignore_eos": True}
            began = time.monotonic()
            async with session.post(f"{server.url}/v1/completions", json=body | {"stream": stream}) as answer:
                if answer.status != 200:
                    raise SystemExit(await answer.text())
                await answer.content.readany()
                first.append(time.monotonic() - began)
                await answer.read()

        for begin in range(0, requests, concurrency):
            await asyncio.gather(*(one(begin + number) for number in range(concurrency)))
    return first


@contextlib.contextmanager
def watched(process: psutil.Process, file: Path | None) -> Iterator[None]:
    """py-spy on `process` while inside, its folded stacks in `file`; nothing where that is None."""
    if file is None:
        yield
        return
    command = ["py-spy", "record", "--format", "raw", "--rate", "500", "--duration", "3600"]
    spy = subprocess.Popen([*command, "--output", str(file), "--pid", str(process.pid)], stdout=subprocess.DEVNULL)
    try:
        time.sleep(1)
        yield
    finally:
        spy.send_signal(signal.SIGINT)  # it writes what it has seen
        spy.wait(timeout=60)


def measure(
    server: servers.Server, requests: int, concurrency: int, new: int, stream: bool, profile: Path | None
) -> dict[str, float]:
    def spent() -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    process = answering(server)
    with watched(process, profile):
        before = spent()
        first = asyncio.run(ask(server, requests, concurrency, new, stream))
    return {"cpu_ms": 1000 * (spent() - before) / len(first), "first_ms": 1000 * statistics.median(first)}


def main() -> None:
    parser = servers.options(__doc__ or "")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--requests", type=int, default=512, help="of a case and pass; default: 512")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--new", type=int, default=1, help="tokens a request; default: 1")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="stacks of the last pass, by py-spy")
    arguments = parser.parse_args()
    from tests import tiny

    most = arguments.concurrency
    engine = servers.engine_flags("cpu", most)
    room = {"max_ongoing": 2 * most, "target_ongoing": 2 * most}
    figures: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = tiny.build(Path(scratch) / "model", hidden=128)
        sides = {
            "bare": stack.enter_context(servers.bare(folder, engine)),
            "direct": stack.enter_context(
                servers.ours(folder, engine, mode="direct", limits={"concurrency": 2 * most}, replicas=room)
            ),
        }
        for number, kind in itertools.product(range(arguments.passes + 1), KINDS):
            for name in sides if number % 2 else reversed(sides):
                file = None
                if arguments.profile is not None and number == arguments.passes:
                    arguments.profile.mkdir(parents=True, exist_ok=True)
                    file = arguments.profile / f"{name}-{kind}.folded"
                found = measure(sides[name], arguments.requests, most, arguments.new, kind == "streaming", file)
                if number:  # the first round warms up
                    figures.setdefault(f"{name} {kind}", []).append(found)
    result: dict[str, Any] = {"figures": figures, "ratios": {}, **about()}
    for kind, what in itertools.product(KINDS, ("cpu_ms", "first_ms")):
        bare, direct = ([one[what] for one in figures[f"{side} {kind}"]] for side in ("bare", "direct"))
        ratios = [ours / theirs for ours, theirs in zip(direct, bare, strict=True)]
        result["ratios"][f"{kind} {what}"] = statistics.median(ratios)
        print(
            f"{kind:9} {what:8} bare {statistics.median(bare):6.2f}  direct {statistics.median(direct):6.2f}  ratio "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
