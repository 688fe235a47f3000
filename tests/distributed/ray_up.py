"""`ray up cluster/onprem.yaml` for real, on two hosts inside this machine: test_ray_up.py runs it in namespaces.

    unshare --pid --fork --kill-child --mount --mount-proc --net python -m tests.distributed.ray_up

Host a is this process's namespaces, host b has a network and processes of its own; each runs an sshd with keys made
here. The commands of the file begin with `ray stop`, which ends every Ray that it sees: here it sees only its host's.
Prints one JSON object: what was seen of the cluster.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
import yaml

ROOT = Path(__file__).parents[2]
HOME = Path("/tmp/home")
A, B = "10.99.0.1", "10.99.0.2"
API = "http://127.0.0.1:8265"


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=240, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[int]:
    """A descriptor of `folder`, which leads there whatever is mounted over its path."""
    descriptor = os.open(folder, os.O_PATH)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def private_files() -> None:
    """Folders, accounts and sshd's needs that only this process and its children see."""
    with open_folder(ROOT) as here:
        for place in ("/tmp", "/run"):
            run("mount", "-t", "tmpfs", "tmpfs", place)
            if ROOT.is_relative_to(place):  # a clone below /tmp is seen there as before
                ROOT.mkdir(parents=True)
                run("mount", "-c", "--bind", f"/proc/{os.getpid()}/fd/{here}", str(ROOT))  # not by its name
    for folder in (HOME / ".ssh", Path("/run/sshd"), Path("/tmp/ray"), Path("/tmp/token"), Path("/tmp/bin")):
        folder.mkdir(parents=True)
    HOME.chmod(0o700)
    # root's home is HOME, and its login is not locked: in copies of the files, bound over them in this namespace.
    for name, field, value in (("passwd", 5, str(HOME)), ("shadow", 1, "*")):
        lines = [line.split(":") for line in Path(f"/etc/{name}").read_text().splitlines()]
        for line in lines:
            if line[0] == "root":
                line[field] = value
        copy = Path(f"/tmp/{name}")
        copy.write_text("\n".join(":".join(line) for line in lines) + "\n")
        run("mount", "--bind", str(copy), f"/etc/{name}")
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/tmp/host_key")
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/tmp/user_key")
    shutil.copy("/tmp/user_key.pub", HOME / ".ssh" / "authorized_keys")
    shim = Path("/tmp/bin/ft-ray")
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m ft_ray "$@"\n')
    shim.chmod(0o755)
    path = f"/tmp/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    (HOME / ".bashrc").write_text(f"export PATH={path} PYTHONPATH={ROOT} PYTHONDONTWRITEBYTECODE=1\n")
    token = Path("/tmp/token/auth_token")
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))


def sshd(address: str) -> list[str]:
    config = Path(f"/tmp/sshd_{address}")
    config.write_text(
        f"ListenAddress {address}\nHostKey /tmp/host_key\nPidFile none\nUsePAM no\nStrictModes no\n"
        "PasswordAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    found = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert found is not None
    return [found, "-D", "-f", str(config)]


def hosts() -> None:
    """Addresses, the cable between a and b, and an sshd on each."""
    run("ip", "link", "set", "lo", "up")
    inside = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "sh", "-c"]
    own = "mount -t tmpfs tmpfs /tmp/ray && touch /tmp/b && until ip link show cable 2>/dev/null; do sleep 0.1; done"
    up = f"ip link set lo up && ip addr add {B}/24 dev cable && ip link set cable up"
    subprocess.Popen([*inside, f"{own} && {up} && exec {' '.join(sshd(B))}"], stdout=subprocess.DEVNULL)
    until("host b", lambda: Path("/tmp/b").exists())
    run("ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(of_another_network()))
    run("ip", "addr", "add", f"{A}/24", "dev", "cable")
    run("ip", "link", "set", "cable", "up")
    subprocess.Popen(sshd(A))
    for address in (A, B):
        words = ["ssh", "-i", "/tmp/user_key", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        until(f"sshd on {address}", lambda w=[*words, f"root@{address}", "true"]: subprocess.run(w).returncode == 0)  # type: ignore[misc]


def of_another_network() -> int:
    """A process of host b."""
    own = os.readlink("/proc/self/ns/net")
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if os.readlink(entry / "ns" / "net") != own:
                    return int(entry.name)
    raise SystemExit("host b is not there")


def until(what: str, check: Any, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := check()):
        if time.monotonic() > deadline:
            logs = sorted(Path("/tmp/ray/session_latest/logs").glob("monitor*"))
            tails = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-3000:]}" for log in logs)
            raise SystemExit(f"waited {seconds} s for {what}\n{tails}")
        time.sleep(0.3)
    return found


def config() -> Path:
    """cluster/onprem.yaml with this machine's addresses and key, and without containers."""
    made = yaml.safe_load((ROOT / "cluster" / "onprem.yaml").read_text(encoding="utf-8"))
    del made["docker"]  # and with it the variables that the container would have
    made["provider"] |= {"head_ip": A, "worker_ips": [B]}
    made["auth"] = {"ssh_user": "root", "ssh_private_key": "/tmp/user_key"}
    made["initialization_commands"] = []  # the login of a host has the id of the container's user; root needs none
    made |= {"min_workers": 1, "max_workers": 1, "file_mounts": {f"{HOME}/.ft-ray": "/tmp/token"}}
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        made[key] = [c.replace("/home/ray/.ft-ray", f"{HOME}/.ft-ray") for c in made[key]]
    # One machine has one /dev/shm and few cores; the addresses are not the ones that Ray would guess.
    made["head_start_ray_commands"][1] += f" --node-ip-address={A} --object-store-memory=100000000"
    made["worker_start_ray_commands"][1] += f" --node-ip-address={B} --object-store-memory=100000000 --num-cpus=1"
    path = Path("/tmp/onprem.yaml")
    path.write_text(yaml.safe_dump(made))
    return path


def main() -> None:
    private_files()
    hosts()
    file = str(config())
    token = Path("/tmp/token/auth_token").read_text()
    os.environ |= {
        "HOME": str(HOME), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/tmp/token/auth_token",
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    ray = str(Path(sys.executable).parent / "ray")
    run(ray, "up", "-y", "--no-config-cache", "--disable-usage-stats", file)

    def nodes() -> list[dict[str, Any]]:
        with contextlib.suppress(requests.RequestException, KeyError, ValueError):
            answer = requests.get(f"{API}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"}, timeout=30)
            rows = answer.json()["data"]["result"]["result"]
            return [row for row in rows if row["state"] == "ALIVE"]
        return []

    until("both nodes", lambda: len(nodes()) == 2, float(os.environ.get("T", 180)))
    seen: dict[str, Any] = {
        "nodes": sorted((n["node_ip"], n["is_head_node"], n["resources_total"].get("CPU", 0)) for n in nodes())
    }
    seen["without_token"] = requests.post(f"{API}/api/jobs/", json={"entrypoint": "true"}, timeout=30).status_code
    # What tells a run that more nodes may come: the label of the launcher's nodes, and its file on the head.
    words = [ray, "job", "submit", "--address", API, "--", sys.executable, "-c"]
    grows = "import ray; from ft_ray import shared_storage; ray.init(); print(shared_storage.gets_nodes())"
    seen["gets_nodes"] = "True" in run(*words, grows).stdout.split()
    words = [ray, "job", "submit", "--address", API, "--entrypoint-num-cpus", "1", "--"]
    words += ["sh", "-c", "ft-ray config schema --json >/dev/null && ip -4 -o addr show cable"]
    job = run(*words)
    seen["job_ran_on"] = B if f"inet {B}/" in job.stdout else job.stdout[-2000:]
    run(ray, "down", "-y", file)
    until("the cluster to go", lambda: not nodes())
    seen["down"] = True
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
