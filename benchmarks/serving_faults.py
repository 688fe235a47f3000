"""What a fault costs the clients of an endpoint: one at a time, under a steady load of plain and streamed requests.

    python benchmarks/serving_faults.py [--device cpu|cuda] [--mode ingress|direct] [--quick] [--json FILE]

Faults: kill -9 of a replica, of the proxy (in direct mode of HAProxy), of the whole ingress; a redeploy of the same
configuration; ten times more requests than are let in. For each it counts what was sent and what became of it, so that
sent = answered + refused + failed, and the slowest request. On a CPU the model is a tiny one with random weights.
A node that dies is the first two faults at once; that needs a cluster and is not done here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from servers import about, engine_flags, model_folder, options


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--mode", choices=["ingress", "direct"], default="ingress")
    arguments = parser.parse_args()
    from ft_ray import serve_direct

    direct = arguments.mode == "direct"
    with serve_direct.prepare() if direct else contextlib.nullcontext(), tempfile.TemporaryDirectory() as scratch:
        result = measure(arguments, Path(scratch))
    for fault, counts in result["faults"].items():
        print(f"{fault}: {counts}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")


def measure(arguments: Any, scratch: Path) -> dict[str, Any]:
    import psutil
    from ray import serve as ray_serve
    from ray.serve.api import RunTarget, _run_many

    from ft_ray import serving
    from ft_ray.serve_args import EngineArgs, Limits, Replicas, parse
    from tests import tiny
    from tests.serving_client import SteadyClient

    gpu, direct = arguments.device == "cuda", arguments.mode == "direct"
    folder = model_folder("cuda", scratch) if gpu else tiny.build(scratch / "tiny", hidden=128)
    engine = EngineArgs(**engine_flags(arguments.device, 32)).model_copy(update={"max_length": 256})
    replicas = Replicas(min=1, max=1) if gpu else Replicas(min=2, max=2)
    limits = Limits(concurrency=32, max_tokens=256, timeout=120)
    faults: dict[str, Any] = {}
    with serving.serve(
        folder=str(folder), port=0, engine=engine, replicas=replicas, limits=limits, mode=arguments.mode
    ) as endpoint:

        def kill(name: str) -> None:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if name in "".join(process.cmdline()[:1]):
                        os.kill(process.pid, signal.SIGKILL)
                        return
            raise SystemExit(f"no process {name}")

        def redeploy() -> None:
            args = parse({"folder": str(folder), "engine": engine.model_dump(), "limits": limits.model_dump(),
                          "replicas": replicas.model_dump(), "mode": arguments.mode})  # fmt: skip
            application = serving.application(serving.find(args))
            target = RunTarget(target=application, name=folder.name, route_prefix="/")
            _run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=True)

        def whole() -> bool:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{endpoint.url}/v1/models", timeout=5):
                return ray_serve.status().applications[folder.name].status == "RUNNING"
            return False

        def under_load(do: Callable[[], None], threads: int = 8) -> dict[str, Any]:
            with SteadyClient(endpoint.url, folder.name, threads=threads, tokens=48, pause=0.05) as client:
                client.wait(more=8)
                do()
                time.sleep(2)  # until the controller has seen it; what counts is the state that follows
                deadline = time.monotonic() + 240
                while not whole() and time.monotonic() < deadline:
                    time.sleep(0.2)
                goal = client.outcomes["plain 200"] + (10 if arguments.quick else 100)
                while client.outcomes["plain 200"] < goal and time.monotonic() < deadline:
                    time.sleep(0.2)
                client.stop()
            answered = sum(n for k, n in client.outcomes.items() if k.endswith(" 200"))
            refused = sum(n for k, n in client.outcomes.items() if k.endswith((" 429", " 503")))
            return {
                "sent": client.sent, "answered": answered, "refused": refused,
                "failed": {k: n for k, n in client.failed().items() if not k.endswith((" 429", " 503"))},
                "accounted": sum(client.outcomes.values()) == client.sent, "longest_seconds": round(client.longest, 1),
            }  # fmt: skip

        faults["kill -9 of a replica"] = under_load(lambda: kill(f"Server:{folder.name}"))
        faults["kill -9 of the proxy"] = under_load(lambda: kill("haproxy" if direct else "ray::ProxyActor"))
        if not direct:
            faults["kill -9 of the ingress"] = under_load(lambda: kill(f"{folder.name}:Ingress"))
        faults["redeploy"] = under_load(redeploy)
        faults["ten times too much"] = under_load(lambda: None, threads=320)
        faults["afterwards"] = under_load(lambda: None)
    return {"device": arguments.device, "mode": arguments.mode, "quick": arguments.quick, "faults": faults, **about()}


if __name__ == "__main__":
    main()
