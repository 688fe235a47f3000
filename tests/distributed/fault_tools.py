"""What the fault tests break things with: an S3 server behind a proxy that fails on command, and Ray nodes to kill."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import psutil

from ft_ray.env_vars import environment

T = TypeVar("T")


def until(what: str, check: Callable[[], T], seconds: float = 120.0) -> T:
    """The first true value of `check`; AssertionError with `what` after a generous limit."""
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)
    return found


def marked(mark: str) -> list[int]:
    """Live processes whose environment holds `mark`, however deep they were started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


def train_workers(pids: list[int] | None = None) -> list[int]:
    """Which of `pids` are training workers; without it, those below this process, never another Ray's."""
    if pids is None:
        pids = [child.pid for child in psutil.Process().children(recursive=True)]
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if b"TrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def orphaned_agents() -> list[int]:
    """Agents of killed nodes of this test run: they live on for a minute, and have lost the mark of their node.

    They write their title over a part of their environment.
    """
    found = []
    for pid in marked(f"FT_RAY_TESTS={os.environ['FT_RAY_TESTS']}"):
        with contextlib.suppress(OSError):
            process = Path(f"/proc/{pid}")
            agent = (process / "cmdline").read_bytes().startswith((b"ray::DashboardAgent", b"ray::RuntimeEnvAgent"))
            if agent and (process / "stat").read_text().rsplit(")", 1)[1].split()[1] == "1":
                found.append(pid)
    return found


class S3Proxy:
    """An S3 server (moto's) on loopback. What `arm` names goes wrong on the way to it; the rest passes."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        self._server.start()
        self._upstream = self._server.get_host_and_port()
        self._rules: list[list[Any]] = []
        self._lock = threading.Lock()
        self.hits: list[str] = []
        self.read: list[str] = []  # names of the files that were fetched
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                action = proxy._action(self.command, self.path)
                if action in ("503", "403"):
                    code = "SlowDown" if action == "503" else "AccessDenied"
                    answer = f"<Error><Code>{code}</Code><Message>No.</Message></Error>".encode()
                    self._answer(int(action), [("Content-Type", "application/xml")], answer)
                    return
                if action == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.close_connection = True
                    return
                if callable(action):
                    action()
                connection = http.client.HTTPConnection(*proxy._upstream, timeout=60)
                try:
                    connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in self.headers.items():
                        connection.putheader(name, value)
                    connection.endheaders(body)
                    response = connection.getresponse()
                    self._answer(response.status, response.getheaders(), response.read())
                finally:
                    connection.close()

            def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
                length = str(len(body))
                with contextlib.suppress(OSError):  # a killed worker hangs up
                    self.send_response_only(status)
                    for name, value in headers:
                        if name.lower() == "content-length":
                            length = value if self.command == "HEAD" else length
                        elif name.lower() not in ("connection", "transfer-encoding"):
                            self.send_header(name, value)
                    self.send_header("Content-Length", length)
                    self.end_headers()
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: Any) -> None:  # clients that were killed
                pass

        self._proxy = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._proxy.server_address[1]}"
        threading.Thread(target=self._proxy.serve_forever, name="s3-proxy", daemon=True).start()

    def arm(self, method: str, ending: str, action: str | Callable[[], object], times: int = 1) -> None:
        """What happens to the next `times` requests of this method whose path ends so.

        They are answered '503' or '403', or cut off ('reset'), or `action` is called and they pass.
        """
        with self._lock:
            self._rules.append([method, ending, action, times])

    def disarm(self) -> None:
        with self._lock:
            self._rules.clear()

    def _action(self, method: str, path: str) -> Any:
        with self._lock:
            if method == "GET" and not path.partition("?")[0].endswith("/"):
                self.read.append(path.partition("?")[0].rsplit("/", 1)[-1])
            for rule in self._rules:
                if rule[3] > 0 and rule[0] == method and path.partition("?")[0].endswith(rule[1]):
                    rule[3] -= 1
                    self.hits.append(rule[2] if isinstance(rule[2], str) else "called")
                    return rule[2]
        return None

    def close(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._server.stop()


@contextlib.contextmanager
def s3() -> Iterator[S3Proxy]:
    """The proxy, with a bucket 'runs' and an environment in which s3:// means it."""
    made = S3Proxy()
    values = {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": made.url, "FSSPEC_S3_ENDPOINT_URL": made.url, "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    try:
        with environment(values):
            import boto3

            boto3.client("s3", endpoint_url=made.url).create_bucket(Bucket="runs")
            yield made
    finally:
        made.close()


class Nodes:
    """A Ray cluster on this machine: a head without work, and nodes that are killed as machines lose power."""

    def __init__(self) -> None:
        # Sockets lie below the folder, and a socket's path may have 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="ftn-", dir="/tmp"))
        self._mark = uuid.uuid4().hex
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="ascii")
        self._ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start"]
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_period_ms": "500",  # a lost node is known after 2 s instead of 15
            "RAY_health_check_failure_threshold": "4",
            "RAY_health_check_initial_delay_ms": "1000",
        }
        port, client = free_ports(2)
        self.address = f"127.0.0.1:{port}"
        self._start("head", "--head", f"--port={port}", f"--ray-client-server-port={client}", "--num-cpus=0")

    def _start(self, name: str, *arguments: str) -> None:
        agent, metrics, runtime, dashboard = free_ports(4)
        command = [
            *self._ray, *arguments, f"--temp-dir={self.folder / name}", f"--dashboard-agent-listen-port={agent}",
            f"--metrics-export-port={metrics}", f"--runtime-env-agent-port={runtime}",
            "--object-store-memory=100000000", "--disable-usage-stats",
        ]  # fmt: skip
        if "--head" in arguments:
            command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        done = subprocess.run(
            command, env={**os.environ, **self.environment, "FT_RAY_NODE": f"{self._mark}-{name}"},
            cwd=self.folder, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def add(self, name: str, cpus: int = 1) -> None:
        self._start(name, f"--address={self.address}", f"--num-cpus={cpus}", f'--resources={{"{name}": 1}}')

    def kill(self, name: str) -> None:
        """All processes of the node at once."""
        self._kill(f"FT_RAY_NODE={self._mark}-{name}")

    @staticmethod
    def _kill(mark: str) -> None:
        while left := marked(mark):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def pids(self, name: str) -> list[int]:
        return marked(f"FT_RAY_NODE={self._mark}-{name}")

    def workers(self, name: str) -> list[int]:
        return train_workers(self.pids(name))

    def id(self, name: str) -> str:
        """Ray's id of the living node of this name."""
        import ray

        return str(next(n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get(name)))

    @contextlib.contextmanager
    def attached(self, **variables: str) -> Iterator[None]:
        """This process is a driver of the cluster inside, with `variables` in its environment."""
        from ft_ray import ray_session

        with (
            environment({**self.environment, "RAY_ADDRESS": self.address, **variables}),
            ray_session._reread_auth(),
            ray_session.session(),
        ):
            yield

    def close(self) -> None:
        self.kill("")
        while left := orphaned_agents():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        shutil.rmtree(self.folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below the range that the kernel gives to outgoing connections."""
    found: list[int] = []
    while len(found) < count:
        port = 20000 + secrets.randbelow(10000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            found.append(port)
    return found
