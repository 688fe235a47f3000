"""What the fault tests break things with: Ray nodes to kill, and how to find what they leave."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

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


def train_workers(pids: list[int] | None = None, title: bytes = b"TrainWorker") -> list[int]:
    """Which of `pids` are training workers; without it, those below this process, never another Ray's.

    With another `title`, the actors of that name.
    """
    if pids is None:
        pids = [child.pid for child in psutil.Process().children(recursive=True)]
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if title in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


_PTRACE_CONT, _PTRACE_SEIZE, _PTRACE_INTERRUPT = 7, 0x4206, 0x4207
_WALL = 0x40000000  # waitpid: threads too
_FUTEX = "202"  # the system call's number on x86-64


def busiest_thread(pid: int, seconds: float = 1.0) -> int:
    """The thread of a process that takes the most processor time: in a worker, the one that trains."""

    def ticks() -> dict[int, int]:
        found = {}
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
                found[int(task.name)] = int(fields[11]) + int(fields[12])  # utime, stime (proc(5))
        return found

    before = ticks()
    time.sleep(seconds)
    gained = {tid: now - before.get(tid, now) for tid, now in ticks().items()}
    return max(gained, key=lambda tid: gained[tid])


@contextlib.contextmanager
def thread_stopped(pid: int, tid: int) -> Iterator[None]:
    """Inside, one thread of another process stands still, and the process's others run on (ptrace(2), x86-64).

    It is stopped in a futex wait, where Python's lock is not held: without that lock the whole process would be deaf.
    """
    caught, over, faults = threading.Event(), threading.Event(), list[BaseException]()

    def trace() -> None:  # one thread does it all: only the tracer may ask, and its end lets the thread go
        try:
            _stop_in_a_wait(pid, tid)
            caught.set()
            # A thread that is killed is its tracer's to collect, and its process stays as long as it was not.
            while not over.wait(0.1) and os.waitpid(tid, _WALL | os.WNOHANG) == (0, 0):
                pass
        except BaseException as error:
            faults.append(error)
        finally:
            caught.set()

    tracer = threading.Thread(target=trace, name="tracer", daemon=True)
    tracer.start()
    caught.wait()
    try:
        if faults:
            raise faults[0]
        yield
    finally:
        over.set()
        tracer.join()


def _stop_in_a_wait(pid: int, tid: int, seconds: float = 30.0) -> None:
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes, ptrace.restype = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p], ctypes.c_long

    def ask(request: int, data: int = 0) -> None:
        if ptrace(request, tid, None, data) == -1:
            number = ctypes.get_errno()
            raise OSError(number, f"ptrace({request:#x}): {os.strerror(number)}")

    ask(_PTRACE_SEIZE)
    deadline = time.monotonic() + seconds
    while True:
        ask(_PTRACE_INTERRUPT)
        _, status = os.waitpid(tid, _WALL)
        assert os.WIFSTOPPED(status), f"thread {tid} has ended"
        if Path(f"/proc/{pid}/task/{tid}/syscall").read_text().split()[0] == _FUTEX:
            return
        assert time.monotonic() < deadline, f"thread {tid} was not seen to wait in {seconds:.0f} s"
        event = status >> 16  # 0: a signal of its own, to be delivered
        ask(_PTRACE_CONT, 0 if event else os.WSTOPSIG(status))
        time.sleep(0.003)


def orphaned_agents() -> list[int]:
    """Agents of killed nodes of this test run: they live on for a minute, and have lost the mark of their node.

    They write their title over a part of their environment. A node that is just ending has given its memory back, its
    command with it, some tenths of a second before its children are another's.
    """
    found = []
    for pid in marked(f"FT_RAY_TESTS={os.environ['FT_RAY_TESTS']}"):
        with contextlib.suppress(OSError):
            process = Path(f"/proc/{pid}")
            agent = (process / "cmdline").read_bytes().startswith((b"ray::DashboardAgent", b"ray::RuntimeEnvAgent"))
            parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if agent and (parent == "1" or not _command(parent)):
                found.append(pid)
    return found


def _command(pid: str) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


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
        # As good as no memory: a sweep's trials ask for a byte, and would go to the head as well.
        nothing = ("--num-cpus=0", "--memory=1")
        self._start("head", "--head", f"--port={port}", f"--ray-client-server-port={client}", *nothing)

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
