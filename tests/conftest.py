"""What every test stands on: offline hubs, a cache of its own, a tiny model, and no process left behind."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before any library reads them: nothing loads from a hub, no Ray of the user's is touched, quiet libraries.
os.environ.update(
    OMP_WAIT_POLICY="PASSIVE",  # as ft-ray's own processes: threads that spin fight with Ray's processes for two cores
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    RAY_USAGE_STATS_ENABLED="0",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
    MLFLOW_DISABLE_TELEMETRY="true",
)
for _name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "FT_RAY_STORAGE", "HF_ENDPOINT"):
    os.environ.pop(_name, None)


# A shell that runs the tests in its background has them ignore Ctrl-C, and with them every process they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Inherited by every process that the tests start, however deep, and by nothing else on the machine.
_MARK = f"FT_RAY_TESTS={uuid.uuid4().hex}"
os.environ["FT_RAY_TESTS"] = _MARK.partition("=")[2]


def _started_here() -> list[str]:
    """'pid command' of every live process that the tests started."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if _MARK.encode() in (entry / "environ").read_bytes():
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(f"{entry.name} {command[:120]}")
        except OSError:  # gone meanwhile, or not ours to read
            continue
    return found


@pytest.fixture(scope="session", autouse=True)
def no_process_left_behind() -> Iterator[None]:
    yield
    for _ in range(20):  # processes that were told to end take a moment
        if not _started_here():
            return
        time.sleep(1)
    raise AssertionError(f"left running: {_started_here()}")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the whole session, so that the demo model is unpacked once."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["FT_RAY_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import tiny

    return tiny.build(tmp_path_factory.mktemp("tiny") / "model")


_fault_tests: set[str] = set()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marks = ("faults", "injected")
    _fault_tests.update(item.nodeid for item in items if any(item.get_closest_marker(mark) for mark in marks))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """`make test-faults`: on Linux with root everything these tests break can be broken, so none may be skipped."""
    outcome: Any = yield
    report = outcome.get_result()
    asked = os.environ.get("FT_RAY_NO_SKIPS") and sys.platform == "linux" and os.geteuid() == 0
    if report.skipped and asked and item.nodeid in _fault_tests and "distributed" in item.path.parts:
        report.outcome, report.longrepr = "failed", f"skipped on Linux with root: {report.longrepr[-1]}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests ran that break something for real, and that none was passed over quietly."""
    outcomes = {
        kind: sum(getattr(r, "nodeid", "") in _fault_tests for r in terminalreporter.stats.get(kind, []))
        for kind in ("passed", "failed", "error", "skipped")
    }
    if any(outcomes.values()):
        told = ", ".join(f"{count} {kind}" for kind, count in outcomes.items())
        terminalreporter.write_line(f"fault tests: {told}")


_sessions: list[pytest.Session] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    _sessions.append(session)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Ends the process with the tests' result, once all is told and what exits has run.

    Native threads of Ray's core and others may still run while the interpreter takes itself down: seen once, when 1,746
    tests had passed, as a segmentation fault that hid their result.
    """
    if _sessions:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(_sessions[0].exitstatus))
