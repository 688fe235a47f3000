"""A real Ray cluster on one machine: head and workers as separate `ray start` processes, each ended on its own.

Everything is private: temporary folders, free ports, a token, Redis for the head's state. What a node started is found
by a mark in its environment, so that a node can be killed as a whole, as a machine that loses power.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import requests
import yaml

from tests import tiny

ROOT = Path(__file__).parents[2]
T = TypeVar("T")


def until(what: str, check: Callable[[], T], seconds: float = 120.0) -> T:
    """The first true value of `check`; AssertionError with `what` after a generous limit."""
    deadline = time.monotonic() + seconds
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below the range that the kernel gives to outgoing connections."""
    found: list[int] = []
    while len(found) < count:
        port = 20000 + secrets.randbelow(10000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            found.append(port)
    return found


def marked(mark: str, folder: Path) -> list[int]:
    """Live processes whose environment holds `mark`, however deep they were started, or that write below `folder`.

    A process that gives itself a title writes it over its first environment variables, so the mark alone is not enough.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                known = mark.encode() in (entry / "environ").read_bytes()
                known = known or any(os.readlink(f).startswith(f"{folder}/") for f in (entry / "fd").iterdir())
                if known and (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                    found.append(int(entry.name))
    return found


def kill(mark: str, folder: Path) -> None:
    """SIGKILL to all of them, until none is left."""
    while left := marked(mark, folder):
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


class Cluster:
    """`address` is the job API. Nodes have names; `environment` is what every node and client has set."""

    def __init__(self, **environment: str) -> None:
        # Sockets lie below the folder, and a socket's path may have 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="ftc-", dir="/tmp"))
        self.mark = uuid.uuid4().hex
        self.gcs_port, self.dashboard_port, self.redis_port = free_ports(3)
        self.ip, self.address = "127.0.0.1", f"http://127.0.0.1:{self.dashboard_port}"
        self.token = secrets.token_hex(32)
        self.redis_password = secrets.token_hex(16)
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(self.token, encoding="ascii")
        commands = self.folder / "bin"
        commands.mkdir()
        (commands / "ft-ray").write_text(f'#!/bin/sh\nexec {sys.executable} -m ft_ray "$@"\n')
        (commands / "ft-ray").chmod(0o755)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "FT_RAY_CACHE": str(self.folder / "cache"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "900",  # a head takes its time to come back on a busy machine
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        self.nodes: dict[str, str] = {}
        self.agents: dict[str, int] = {}
        self.children: list[subprocess.Popen[bytes]] = []
        self.clients: list[subprocess.Popen[str]] = []
        self.served, self.key = "", ""

    def start_redis(self) -> None:
        folder = self.folder / "redis"
        folder.mkdir()
        config = folder / "redis.conf"
        config.write_text(
            f"port {self.redis_port}\nbind 127.0.0.1\ndir {folder}\nrequirepass {self.redis_password}\n"
            'daemonize no\nsave ""\nappendonly no\nprotected-mode yes\n'
        )
        redis = shutil.which("redis-server")
        assert redis is not None
        # A child, ended as one: the mark is gone from its environment, over which it writes its title.
        self.children.append(subprocess.Popen([redis, str(config)], env=self.environment, stdout=subprocess.DEVNULL))

        def answers() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.redis_port), timeout=5):
                return True
            return False

        until("Redis to listen", answers)

    def environment_of(self, name: str) -> dict[str, str]:
        self.nodes[name] = f"FT_RAY_TEST_NODE={self.mark}-{name}"
        return {**self.environment, "FT_RAY_TEST_NODE": f"{self.mark}-{name}"}

    def _start(
        self, name: str, *arguments: str, wrapped: str = "", host: Sequence[str] = (), **environment: str
    ) -> None:
        (agent, metrics, runtime) = free_ports(3)
        self.agents[name] = agent
        (self.folder / name).mkdir(exist_ok=True)
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--disable-usage-stats",
            f"--temp-dir={self.folder / name}", f"--dashboard-agent-listen-port={agent}",
            f"--metrics-export-port={metrics}", f"--runtime-env-agent-port={runtime}",
            "--object-store-memory=100000000", *arguments,
        ]  # fmt: skip
        if wrapped:
            command = ["unshare", "--mount", "sh", "-c", f'{wrapped} && exec "$@"', "sh", *command]
        command = [*host, *command]
        for left in (2, 1, 0):
            done = subprocess.run(
                command, env={**self.environment_of(name), **environment}, cwd=self.folder, capture_output=True,
                text=True, timeout=180, check=False,
            )  # fmt: skip
            if done.returncode == 0:
                return
            # Ray gives a node 30 seconds, which is fixed and too little on a machine with much else to do.
            slow = "The current node timed out during startup" in done.stdout + done.stderr
            assert slow and left, done.stdout + done.stderr
            self.kill(name)

    def start_head(
        self, *, redis: bool = False, ip: str = "127.0.0.1", host: Sequence[str] = (), **extra: str
    ) -> None:
        """A head without work. With `redis` its state outlives it. `host`: a command that runs another on that host.

        `extra` are variables of the head alone.
        """
        self.ip, self.address = ip, f"http://{ip}:{self.dashboard_port}"
        if redis:
            extra |= {"RAY_REDIS_ADDRESS": f"127.0.0.1:{self.redis_port}", "RAY_external_storage_namespace": self.mark}
        (client,) = free_ports(1)
        arguments = [
            "--head", f"--port={self.gcs_port}", "--num-cpus=0", f"--dashboard-host={ip}",
            f"--dashboard-port={self.dashboard_port}", f"--ray-client-server-port={client}",
        ]  # fmt: skip
        if redis:
            arguments.append(f"--redis-password={self.redis_password}")
        if host:
            arguments.append(f"--node-ip-address={ip}")
        self._start("head", *arguments, host=host, **extra)
        if not host:
            until("the job API", lambda: self.answers("/api/version"))

    def start_worker(
        self, name: str, cpus: int = 2, *, wrapped: str = "", ip: str = "", host: Sequence[str] = (),
        drives: bool = False,
    ) -> None:  # fmt: skip
        """A worker node. `wrapped`: a shell command run before it, in a mount namespace of its own.

        `drives`: the drivers of jobs may run there. Ray tells them their node by files at the path of the head's
        folder, which each machine has of its own: so this one has its folder mounted there (needs `wrapped`).
        """
        arguments = [f"--address={self.ip}:{self.gcs_port}", f"--num-cpus={cpus}"]
        if ip:
            arguments.append(f"--node-ip-address={ip}")
        if drives:
            wrapped += f" && mount --bind {self.folder / name} {self.folder / 'head'}"
            arguments.append(f"--temp-dir={self.folder / 'head'}")
        self._start(name, *arguments, wrapped=wrapped, host=host)

    def own(self) -> str:
        """What gives a worker a cache and a folder of its own; nothing where processes cannot have mounts."""
        return " && ".join(f"mount -t tmpfs tmpfs {self.folder / n}" for n in ("cache", "private")) if apart() else ""

    def kill(self, name: str) -> None:
        """The whole node at once, as a machine that loses power."""
        kill(self.nodes[name], self.folder / name)

    def pids(self, name: str) -> list[int]:
        return marked(self.nodes[name], self.folder / name)

    def ask(self, method: str, path: str, *, token: bool = True, **options: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.token}"} if token else {}
        return requests.request(method, f"{self.address}{path}", headers=headers, timeout=60, **options)

    def answers(self, path: str) -> bool:
        try:
            return self.ask("GET", path).status_code == 200
        except requests.RequestException:
            return False

    def alive(self) -> int:
        """Nodes that the head counts as alive."""
        rows = self.ask("GET", "/api/v0/nodes").json()["data"]["result"]["result"]
        return sum(row["state"] == "ALIVE" for row in rows)

    def command(
        self, *arguments: str, cwd: Path, host: Sequence[str] = (), **environment: str
    ) -> subprocess.Popen[str]:
        """`ft-ray ARGUMENTS` as a person runs it: with the token, and without Ray of its own."""
        client = subprocess.Popen(
            [*host, sys.executable, "-m", "ft_ray", *arguments], cwd=cwd, env={**self.environment, **environment},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.clients.append(client)  # one that a failed test left following its job ends with the cluster
        return client

    def close(self) -> None:
        kill(self.mark, self.folder)
        for child in (*self.children, *self.clients):
            child.kill()
            child.wait(timeout=60)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def cluster(**environment: str) -> Iterator[Cluster]:
    made = Cluster(**environment)
    try:
        yield made
    finally:
        made.close()


def apart() -> bool:
    """Whether a process can have mounts of its own here."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def machines(**environment: str) -> Iterator[Cluster]:
    """A head without work whose state is in Redis, an MLflow server, and two workers, `one` and `two`.

    Where that is possible each worker has a cache, and a folder `private`, of its own: machines without a shared disk.
    """
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed: the head's state has nowhere to outlive it")
    (port,) = free_ports(1)
    with cluster(**environment, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}") as made:
        registry = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{made.folder}/mlflow.db",
            "--artifacts-destination", str(made.folder / "artifacts"),
        ]  # fmt: skip
        with open(made.folder / "mlflow.log", "w") as log:
            server = subprocess.Popen(registry, env=made.environment_of("mlflow"), stdout=log, stderr=log)
        made.start_redis()
        made.start_head(redis=True)
        for name in ("cache", "private"):
            (made.folder / name).mkdir()
        for name in ("one", "two"):
            made.start_worker(name, wrapped=made.own())
        until("three nodes", lambda: made.alive() == 3)

        def registered() -> bool:
            with contextlib.suppress(requests.RequestException):
                return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
            return False

        until("the registry", registered)
        yield made
        server.terminate()
        server.wait(timeout=60)


def finished(process: subprocess.Popen[str], seconds: float = 400) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"not finished after {seconds} s:\n{out[-2000:]}\n{err[-6000:]}") from None
    return process.returncode, out, err


def trains_on(nodes: Cluster, name: str) -> bool:
    for pid in nodes.pids(name):
        try:
            if b"TrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
        except OSError:
            continue
    return False


def tiny_project(nodes: Cluster, *, name: str, registers: bool, steps: int = 150, workers: int = 2) -> Path:
    """A folder as a person has it: a recipe and its data. Each worker takes a node of 2 CPUs."""
    folder = nodes.folder / "project"
    folder.mkdir()
    model = tiny.build(nodes.folder / "model", hidden=128, heads=2)
    tiny.rows(folder / "rows.jsonl", 60)
    recipe = {
        "name": name,
        "model": {"id": str(model)},
        "data": {"train": [{"path": "rows.jsonl"}], "split": {"validation": 0.1, "test": 0.1}},
        "lora": {"r": 4, "alpha": 8},
        "sequence": {"max_length": 64},
        "batch": {"global": 4},
        "optim": {"lr": 1e-3},
        "schedule": {"epochs": 100, "max_steps": steps},
        "precision": "fp32",
        "gradient_checkpointing": False,
        "evaluation": {"every": steps // 2, "max_new_tokens": 4, "baselines": False, "max_rows": 4},
        "checkpoint": {"every": 10},
        "resources": {"workers": workers, "gpus": 0, "cpus": 2},
        "storage": str(nodes.folder / "runs"),
        "tracking": {"to": ["mlflow"] if registers else []},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder
