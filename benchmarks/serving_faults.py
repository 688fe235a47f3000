"""What a fault costs the clients of an endpoint: one at a time, under a steady load of plain and streamed requests.

    python benchmarks/serving_faults.py [--device cpu|cuda] [--mode ingress|direct] [--quick] [--json FILE]

Faults: kill -9 of a replica, of a replica's engine, of the proxy (in direct mode of HAProxy), of an ingress; a
redeploy of the same configuration; promotion to a second version and rollback; one replica less; ten times more
requests at once than are let in. For each it counts what was sent and what became of it, so that sent = answered +
refused + failed, and tells the slowest request and how many ran into the client's own limit, which is above the
endpoint's (`hung`). On a CPU the model is a tiny one with random weights and two replicas, on a GPU one of 1B with one
replica, and nothing is scaled.

In ingress mode versions change as `ft-ray promote` changes them, in direct mode as `ft-ray deploy` does: the registry's
champion is another one and the application is deployed again. A machine that dies needs a cluster:
`tests/e2e/test_serving_node.py`.
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
from servers import about, engine_flags, options

NAME = "model"
CONCURRENCY = 16
"""Requests that are let in at once: by the ingress, and in direct mode by each replica."""
TIMEOUT = 60.0
"""Seconds after which the endpoint gives a request up; the client waits 15 more for each part of an answer."""
PATIENCE = 240.0


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--mode", choices=["ingress", "direct"], default="ingress")
    parser.add_argument("--ingress", type=int, default=2, help="replicas of it, in that mode; serve/merged.yaml has 2")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the endpoint ends with this script
    from ft_ray import serve_direct

    direct = arguments.mode == "direct"
    with serve_direct.prepare() if direct else contextlib.nullcontext(), tempfile.TemporaryDirectory() as scratch:
        result = measure(arguments, Path(scratch))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")


def register(storage: Path, device: str, seed: int) -> None:
    """Makes a model of its own and registers it as the next version of NAME."""
    from ft_ray.chat import Chat, load_tokenizer
    from ft_ray.manifest import key_of
    from ft_ray.registry import Registry
    from ft_ray.storage import Store
    from tests import tiny

    store = Store(storage / f"run-{seed}")
    with store.stage("merged") as out:
        if device == "cuda":
            from random_base import random_folder

            random_folder("1B", out, device)
        else:
            tiny.build(out, seed=seed, hidden=128)
        chat = Chat(load_tokenizer(out))
        record = {"template_hash": chat.template_hash, "eos_ids": sorted(chat.eos_ids)}
        (out / "ft_ray.json").write_text(json.dumps(record))
    Registry(str(storage)).register(
        NAME, source=store.address("merged"), manifest="", merged_hash=key_of(store.tree("merged")),
        template_hash=chat.template_hash, test_hash="", metrics={},
    )  # fmt: skip


def measure(given: Any, scratch: Path) -> dict[str, Any]:
    import live_replicas
    import psutil
    from ray import serve as ray_serve
    from ray.serve.api import RunTarget, _run_many

    from ft_ray import ray_session, serving
    from ft_ray.registry import Registry
    from ft_ray.rollout import shift
    from ft_ray.rollout_state import Live
    from ft_ray.serve_args import EngineArgs, Limits, Replicas
    from tests.serving_client import SteadyClient

    gpu, direct = given.device == "cuda", given.mode == "direct"
    for seed in (0, 1):
        register(scratch, given.device, seed)
    registry = Registry(str(scratch))
    registry.set_champion(NAME, 1, who="benchmark", why="the first")
    engine = EngineArgs(**engine_flags(given.device, 32)).model_copy(update={"max_length": 256})
    count = 1 if gpu else 2
    replicas = Replicas(min=count, max=count, ingress=1 if direct else given.ingress)
    limits = Limits(concurrency=CONCURRENCY, max_tokens=256, timeout=TIMEOUT)
    faults: dict[str, Any] = {}
    # Two versions stand side by side in a promotion: of cores that are counted, not had, there is room for both.
    with (
        ray_session.session(num_cpus=None if gpu else max(2 * count, os.cpu_count() or 1)),
        serving.serve(
            NAME, storage=str(scratch), port=0, engine=engine, replicas=replicas, limits=limits, mode=given.mode
        ) as endpoint,
    ):

        def arguments(wanted: int) -> dict[str, Any]:
            return {
                "model": NAME, "storage": str(scratch), "engine": engine.model_dump(), "limits": limits.model_dump(),
                "replicas": {"min": wanted, "max": wanted, "ingress": replicas.ingress, "downscale_delay": 0},
                "mode": given.mode,
            }  # fmt: skip

        def processes(name: str) -> list[int]:
            found = []
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if name in "".join(process.cmdline()[:1]):
                        found.append(process.pid)
            return found

        def kill(name: str) -> None:
            os.kill(processes(name)[0], signal.SIGKILL)

        def redeploy() -> None:
            target = RunTarget(target=serving.build(arguments(count)), name=NAME, route_prefix="/")
            _run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=True)

        def change_over(version: int) -> None:
            if direct:
                registry.set_champion(NAME, version, who="benchmark", why="measured")
                redeploy()
            else:
                shift(Live.read(NAME), f"{NAME}@{version}", storage=str(scratch), uri=None,
                      without_room="stop first" if gpu else "refuse")
                registry.set_champion(NAME, version, who="benchmark", why="measured")

        def whole(wanted: int) -> bool:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{endpoint.url}/v1/models", timeout=5):
                application = ray_serve.status().applications[NAME]
                states = [d.replica_states for n, d in application.deployments.items() if n.startswith("Server:")]
                right = [s.get("RUNNING", 0) == wanted == sum(s.values()) for s in states]
                # Serve counts a replica that was killed until it has looked at it.
                there = len(processes(f"ServeReplica:{NAME}:Server:")) == wanted
                return application.status == "RUNNING" and bool(right) and all(right) and there
            return False

        def under_load(
            what: str, do: Callable[[], object], *, threads: int = 8, left: int = count, version: int | None = None
        ) -> None:
            with SteadyClient(
                endpoint.url, NAME, threads=threads, tokens=40, more_tokens=5, pause=0, timeout=TIMEOUT + 15
            ) as client:
                client.wait(more=8)
                began = time.monotonic()
                do()
                time.sleep(2)  # until the controller has seen it; what counts is the state that follows
                while not whole(left) and time.monotonic() < began + PATIENCE:
                    time.sleep(0.2)
                back = whole(left)
                seconds = time.monotonic() - began
                goal = client.outcomes["plain 200"] + (10 if given.quick else 100)
                while client.outcomes["plain 200"] < goal and time.monotonic() < began + PATIENCE:
                    time.sleep(0.2)
                client.stop()
            refused = {k: n for k, n in client.outcomes.items() if k.endswith((" 429", " 503"))}
            found: dict[str, Any] = {
                "sent": client.sent,
                "answered": sum(n for k, n in client.outcomes.items() if k.endswith(" 200")),
                "refused": sum(refused.values()),
                "failed": {k: n for k, n in client.failed().items() if k not in refused},
                "accounted": sum(client.outcomes.values()) == client.sent,
                "hung": sum(n for k, n in client.outcomes.items() if "Timeout" in k),
                "longest_seconds": round(client.longest, 1),
                "whole_again": back,
                "seconds": round(seconds, 1),
            }  # fmt: skip
            if version is not None:
                found["versions"] = dict(client.versions)
            faults[what] = found
            print(f"{what}: {found}", flush=True)

        under_load("kill -9 of a replica", lambda: kill(f"Server:{NAME}"))
        under_load("kill -9 of an engine", lambda: kill("VLLM::EngineCore"))
        under_load("kill -9 of the proxy", lambda: kill("haproxy" if direct else "ray::ProxyActor"))
        if not direct:
            under_load("kill -9 of an ingress", lambda: kill(f"{NAME}:Ingress"))
        under_load("redeploy", redeploy)
        under_load("promotion", lambda: change_over(2), version=2)
        under_load("rollback", lambda: change_over(1), version=1)
        if count > 1:
            under_load("one replica less", lambda: live_replicas.change(arguments(count - 1), False), left=count - 1)
            live_replicas.change(arguments(count), False)
        most = CONCURRENCY * (count if direct else replicas.ingress)
        under_load("ten times too much", lambda: None, threads=10 * most)
        under_load("afterwards", lambda: None)
    return {
        "device": given.device, "mode": given.mode, "quick": given.quick, "replicas": count,
        "ingress": replicas.ingress, "let_in_at_once": most, "timeout": TIMEOUT, "faults": faults, **about(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
