"""A Ray to work in: the one RAY_ADDRESS names, or a private local one that ends with the work.

A private Ray asks for a token kept in a 0600 file of its own, so that no other user of the machine can run
code in it; `ray.init()` alone would write the user's ~/.ray/auth_token and change how every later client of
theirs connects. Its files are in a temporary folder, and every process it started is ended with it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray._private.utils import get_num_cpus

from ft_ray.env_vars import SERVE_DOORS, environment
from ft_ray.errors import TrainingError
from ft_ray.ray_start import begin, beside, without_idle_servers
from ft_ray.storage_faults import redacted

__all__ = ["accelerators", "collective_timeout", "head_api", "may_grow", "run_behind", "session", "train_settings"]

logger = logging.getLogger("ft_ray")

_MARK = "FT_RAY_SESSION"
_BEHIND = 10  # niceness
_private_now = False
# Raylet sockets live below the temporary folder, and a socket's path may have 107 bytes.
_LONGEST_TMP = 30

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how late the end of the last worker is seen
    # A proxy that died is missed after three checks, which Ray makes every ten seconds.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a relative path in a recipe means the same in every process
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    # Threads of an operation that wait for one another sleep instead of spinning. Spinning pays only on cores that
    # nothing else wants; beside another program the same products took 2 to 8 times as long (2 cores, 2 threads).
    "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
# Workers on CPUs take their memory from jemalloc, which Ray brings and gives to its own servers: glibc's heap keeps
# holes between activations of changing sizes. Blocks of 8 MiB and more, which are most of a step's, would go back to
# the system as soon as they are freed, to be zeroed again at the next step: a quarter of its time (jemalloc(3),
# oversize_threshold; benchmarks/README.md, "Memory, planned and measured" and "Ray Train").
CPU_ALLOCATOR = {"RAY_LD_PRELOAD_ON_WORKERS": "1", "MALLOC_CONF": "oversize_threshold:0"}
# What workers of an attached cluster take over from here. Secrets are not: a runtime_env is world-readable there.
_CARRIED = ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HOME", "FT_RAY_CACHE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@contextlib.contextmanager
def session(num_cpus: int | None = None, *, meanwhile: Callable[[], object] | None = None) -> Iterator[None]:
    """Ray is connected inside. Nested sessions share the outer one. Raises TrainingError when Ray won't start.

    `meanwhile` imports what is needed inside, in a thread beside Ray's start, most of which is waiting. What it raises
    is left to who needs those modules.
    """
    if ray.is_initialized():
        yield
        return
    with _clean_stdout(), _attached(meanwhile) if os.environ.get("RAY_ADDRESS") else _private(num_cpus, meanwhile):
        yield


def may_grow() -> bool:
    """Whether the connected Ray may get more machines than it has: any but a private one of one machine."""
    return not _private_now


def collective_timeout(timeout: float) -> float:
    """Seconds for which ranks wait for one another, where each may be deaf for `timeout`.

    It may rightly be longer: rank 0 checks a checkpoint alone.
    """
    return max(60.0, 3 * timeout)


@contextlib.contextmanager
def train_settings(timeout: float, start: float) -> Iterator[None]:
    """What Ray Train takes from the environment when a run starts, in seconds; what the user set there stays."""
    values = {
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{timeout:g}",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{start:g}",
        # A rank that answers and never reports its checkpoint: Ray would let the others wait for ever.
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": f"{collective_timeout(timeout):g}",
    }
    with environment({name: value for name, value in values.items() if name not in os.environ}):
        yield


def accelerators() -> list[str]:
    """Kinds of GPUs in the connected Ray, as it names them; [] where there is none."""
    return [name.split(":", 1)[1] for name in ray.cluster_resources() if name.startswith("accelerator_type:")]


def head_api() -> str:
    """The http:// address of the head's API, as the Ray that RAY_ADDRESS names tells it: a job knows no other way.

    Raises TrainingError where no Ray answers, or its head has no such API.
    """
    from ray._private.worker import get_dashboard_url

    with session():
        found = get_dashboard_url()
    if not found:
        raise TrainingError("the head of this Ray has no dashboard: start it with --include-dashboard=true.")
    return f"http://{found}"


@contextlib.contextmanager
def _clean_stdout() -> Iterator[None]:
    """Ray prints what a raylet reports (a killed worker, say) on stdout, which belongs to --json: log it instead."""
    from ray._private import worker

    def log(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        for line in data["lines"]:
            logger.debug("ray: %s", line)

    original = worker.print_to_stdstream
    worker.print_to_stdstream = log
    try:
        yield
    finally:
        worker.print_to_stdstream = original


@contextlib.contextmanager
def _attached(meanwhile: Callable[[], object] | None) -> Iterator[None]:
    carried = {name: os.environ[name] for name in _CARRIED if name in os.environ}
    carried = {name: value for name, value in carried.items() if redacted(value) == value}  # a mirror's password
    variables = {**_ENVIRONMENT, **carried}
    # In a job, both the job's and these variables hold; without the first Ray refuses a name that is in both.
    with environment({"RAY_OVERRIDE_JOB_RUNTIME_ENV": "1", **_ENVIRONMENT}):
        address = os.environ["RAY_ADDRESS"]
        try:
            with _own_sigterm(), beside(meanwhile):
                ray.init(
                    address=address, log_to_driver=False, logging_level=logging.ERROR,
                    runtime_env={"env_vars": variables},
                )  # fmt: skip
        except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            message = f"no Ray answers at RAY_ADDRESS={address} ({reason}): start it, or unset RAY_ADDRESS."
            raise TrainingError(redacted(message)) from error
        except BaseException:
            ray.shutdown()
            raise
        try:
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _private(num_cpus: int | None, meanwhile: Callable[[], object] | None) -> Iterator[None]:
    root = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="ftr-", dir=root if len(root) <= _LONGEST_TMP else "/tmp"))
    mark = uuid.uuid4().hex
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="ascii")
    preload = {} if _has_gpu() else {name: os.environ.get(name, value) for name, value in CPU_ALLOCATOR.items()}
    paths = [str(Path(__file__).resolve().parent.parent), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    own = {
        **_ENVIRONMENT,
        **preload,
        _MARK: mark,
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # also how late a checkpoint is known to be committed
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one more process, for nodes that a cloud takes back
        "RAY_worker_niceness": "0",  # Ray's 15 makes training yield to all else: as a script started by hand it is not
        # Workers in process groups of their own: the terminal's Ctrl-C is for the driver, which stops them in step.
        "RAY_process_group_cleanup_enabled": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        **SERVE_DOORS,  # for Serve's proxy; here every process can import what it names
    }
    started = time.monotonic()
    try:
        with environment(own), _reread_auth():
            try:
                init = functools.partial(
                    ray.init,
                    address="local",
                    num_cpus=num_cpus or _cores(),
                    include_dashboard=True,  # without it Train never frees a stopped trial's workers
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=str(folder / "ray"),
                )
                with _own_sigterm(), without_idle_servers(), beside(meanwhile):
                    begin(init, lambda: _reap(mark))
            except BaseException as error:  # Ray raises many kinds here, and Ctrl-C may come while it starts
                ray.shutdown()
                _reap(mark)
                if not isinstance(error, Exception):
                    raise
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise TrainingError(f"Ray did not start on this machine ({reason}).") from error
            os.environ.pop(_MARK)  # marks Ray's processes only, not what this one starts later
            _let_bookkeeping_yield()
            logger.info("private Ray started in %.1f s", time.monotonic() - started)
            global _private_now
            _private_now = True
            try:
                yield
            finally:
                _private_now = False
                ray.shutdown()
                _reap(mark)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_behind(pid: int) -> None:
    """Lets every thread of a process yield to those of the usual priority, for good: only root could undo it.

    To Linux niceness and policy are a thread's, not a process's (sched(7)). A thread of SCHED_BATCH that wakes up does
    not interrupt what runs.
    """
    threads = [pid]
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # it has ended
            threads = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
    for thread in threads:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, max(os.getpriority(os.PRIO_PROCESS, thread), _BEHIND))
            if sys.platform == "linux" and os.sched_getscheduler(thread) == os.SCHED_OTHER:
                os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))


def _let_bookkeeping_yield() -> None:
    """Ray's dashboard and reporting agent run behind what trains here; the raylet and the GCS stay as they are."""
    import psutil
    from ray._private import worker

    node: Any = worker._global_node
    started = {kind: [info.process.pid for info in found] for kind, found in node.all_processes.items()}
    roots = [pid for kind, pids in started.items() if kind not in ("raylet", "gcs_server") for pid in pids]
    for pid in (*roots, *started.get("raylet", [])):
        with contextlib.suppress(psutil.Error):
            top = psutil.Process(pid)
            for process in (top, *top.children(recursive=True)):
                with contextlib.suppress(psutil.Error):  # one that has ended meanwhile
                    if pid in roots or process.name().startswith("ray::Dash"):
                        run_behind(process.pid)


def _cores() -> int:
    """CPUs that this process may use, by the container's limit and its own affinity (taskset, a Slurm job).

    Ray by itself looks at the container's only. It starts an idle worker for each.
    """
    counted = int(get_num_cpus(override_docker_cpu_warning=True))
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else counted
    return max(1, min(counted, allowed))


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Around ray.init: this process's own handler of SIGTERM holds again afterwards.

    Ray puts one of its own in its place, and the crash handler of its core library aborts a process three seconds
    after the signal (absl's `alarm_on_failure_secs`): too soon to save a checkpoint or to end an endpoint.
    """
    mine = signal.getsignal(signal.SIGTERM)
    yield

    def handler(number: int, frame: FrameType | None) -> None:
        signal.alarm(0)
        assert callable(mine)
        mine(number, frame)

    if callable(mine) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _reread_auth() -> Iterator[None]:
    """Ray reads RAY_AUTH_* once a process; this makes it read them again, now and after the session."""
    raylet: Any = importlib.import_module("ray._raylet")  # compiled, and without type stubs for these two
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    try:
        yield
    finally:
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def _reap(mark: str, patience: float = 10.0) -> None:
    """Ends what a private Ray left running: its processes are those that inherited its mark.

    Those that may have work to finish get time to do so by themselves, the others are told at once.
    """
    deadline = time.monotonic() + patience
    while (left := _marked(mark)) and time.monotonic() < deadline:
        late = time.monotonic() > deadline - patience * 0.7
        for pid in left:
            if late or _has_no_work(pid):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGTERM)
        time.sleep(0.1)
    for pid in _marked(mark):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _has_no_work(pid: int) -> bool:
    """Whether it is a part of Ray's dashboard, the process they are forked from, or a worker that is still starting.

    A worker takes a title of Ray's before it can be given work (`ray._private.worker.connect`), and imports for a
    second or two before it sees that there is no Ray any more.
    """
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    # By whole arguments: the raylet's hold the command of its workers.
    arguments = command.split(b"\0")
    starting = any(argument.endswith(b"/default_worker.py") for argument in arguments)
    forks = any(argument.startswith(b"from multiprocessing.forkserver import ") for argument in arguments)
    return command.startswith(b"ray-dashboard-") or starting or forks


def _marked(mark: str) -> list[int]:
    if sys.platform != "linux":
        return []
    needle, found = f"{_MARK}={mark}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if needle in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found
