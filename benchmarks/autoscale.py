"""How the endpoint reacts to a step of load: replicas, requests in progress and waiting times over time, as a plot.

    python benchmarks/autoscale.py [--device cpu|cuda] [--quick] [--json FILE] [--plot FILE.svg]

Starts from zero replicas, asks lightly, then with many clients at once, then lightly, then not at all until it is at
zero again. On a CPU the model is a tiny one with random weights: what is measured is Ray Serve's reaction and the start
of an engine, not the model. Prints seconds from each step to what it caused.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from servers import about, engine_flags, model_folder, options


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--plot", metavar="FILE", help="write the plot here (.svg or .png)")
    arguments = parser.parse_args()
    import torch
    from ray import serve as ray_serve

    from ft_ray.serve_args import EngineArgs, Limits, Replicas
    from ft_ray.serving import serve
    from tests import tiny
    from tests.serving_client import SteadyClient

    gpu = arguments.device == "cuda"
    most = torch.cuda.device_count() if gpu else 2
    replicas = Replicas(min=0, max=most, target_ongoing=4, upscale_delay=2, downscale_delay=10)
    engine = EngineArgs(**engine_flags(arguments.device, 32)).model_copy(update={"max_length": 256})
    series: list[dict[str, float]] = []
    marks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder("cuda", Path(scratch)) if gpu else tiny.build(Path(scratch) / "tiny", hidden=128)
        with serve(
            folder=str(folder), port=0, engine=engine, replicas=replicas, limits=Limits(concurrency=256, max_tokens=256)
        ) as endpoint:
            name, started, over = f"Server:{folder.name}", time.monotonic(), threading.Event()
            current: list[SteadyClient] = []

            def now() -> float:
                return time.monotonic() - started

            def running() -> int:
                states: Any = ray_serve.status().applications[folder.name].deployments[name].replica_states
                return int(states.get("RUNNING", 0))

            def sample() -> None:
                while not over.wait(0.5):
                    asking = sum(c.sent - sum(c.outcomes.values()) for c in current)
                    series.append({"at": now(), "replicas": running(), "in_progress": asking})

            def until(wanted: int, what: str, patience: float = 240) -> None:
                deadline = time.monotonic() + patience
                while running() != wanted:
                    if time.monotonic() > deadline:
                        raise SystemExit(f"{what}: not after {patience:.0f} s")
                    time.sleep(0.1)

            thread = threading.Thread(target=sample, daemon=True)
            thread.start()
            until(0, "to zero at first")
            longest, failed, sent = {}, Counter[str](), 0
            steps = [("one client", 1, 1), ("many clients", 8 * most, most), ("one again", 1, 1), ("nobody", 0, 0)]
            for step, threads, wanted in steps:
                marks[step] = now()
                client = SteadyClient(endpoint.url, folder.name, threads=threads, tokens=48, pause=0.05, timeout=300)
                with client:
                    current[:] = [client]
                    until(wanted, step)
                    marks[f"{step}: {wanted} replicas"] = now()
                    if threads:
                        client.wait(more=10 if arguments.quick else 100, seconds=240)
                    client.stop()
                longest[step], sent = client.longest, sent + client.sent
                failed.update(client.failed())
            time.sleep(1)  # the plot shows the last state too
            over.set()
            thread.join()
    result = {
        "device": arguments.device, "quick": arguments.quick, "replicas": replicas.model_dump(), "marks": marks,
        "seconds": {step: round(marks[f"{step}: {n} replicas"] - marks[step], 1) for step, _, n in steps},
        "longest_request": {k: round(v, 1) for k, v in longest.items()}, "sent": sent, "failed": failed,
        "series": series, **about(),
    }  # fmt: skip
    for step, seconds in result["seconds"].items():
        print(f"{step}: {seconds} s until the replicas fit; slowest request {result['longest_request'][step]} s")
    print(f"sent {sent}, failed {failed or 'none'}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        plot(result, Path(arguments.plot))


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = result["series"]
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 5))
    times = [s["at"] for s in series]
    above.step(times, [s["replicas"] for s in series], where="post", color="tab:blue")
    above.set_ylabel("replicas")
    below.plot(times, [s["in_progress"] for s in series], color="tab:orange")
    below.set_ylabel("requests in progress")
    below.set_xlabel("seconds")
    left, height = -times[-1], 0
    for step, at in result["marks"].items():
        if ":" not in step:
            for axis in (above, below):
                axis.axvline(at, color="grey", linewidth=0.8, linestyle=":")
            height = 0 if at - left > 0.2 * times[-1] else height + 10  # a name would lie on the last one: above it
            above.annotate(
                step, (at, 1), (0, 2 + height), xycoords=("data", "axes fraction"), textcoords="offset points",
                fontsize=8, va="bottom", annotation_clip=False,
            )  # fmt: skip
            left = at
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
