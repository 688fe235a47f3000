"""What an engine that starts is said to be doing, read from real processes and the logs that they leave."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ft_ray.engine_progress import doing

LINES = """\
(EngineCore pid=7) INFO {0} [core.py:90] Initializing a V1 LLM engine
(EngineCore pid=7) INFO {0} [model_runner.py:961] Graph capturing finished in 8 secs, took 0.53 GiB
a line of something else
"""


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[int]:
    """Pid of a process called as Ray calls a replica of the application 'm', with a compiler below it."""
    compiler = shutil.copy("/bin/sleep", tmp_path / "cicc")
    title = "ray::SERVE_REPLICA::m#Server:m#x:ServeReplica:m:Server:m"
    script = f'while [ ! -e {tmp_path}/compile ]; do sleep 0.05; done; {compiler} 60 & wait'
    process = subprocess.Popen(["bash", "-c", f'exec -a "{title}" bash -c \'{script}\''], start_new_session=True)
    yield process.pid
    os.killpg(process.pid, 9)
    process.wait()


def until(said: str, logs: Path | None) -> str:
    deadline = time.monotonic() + 20
    while said not in (found := doing("m", logs)):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def test_the_last_word_of_the_engine_and_how_old_it_is(replica: int, tmp_path: Path) -> None:
    log = tmp_path / f"worker-abc-01000000-{replica}.out"
    assert doing("m", tmp_path) == ""  # nothing was said yet
    spoke = time.localtime(time.time() - 75)
    log.write_text(LINES.format(time.strftime("%m-%d %H:%M:%S", spoke)))  # what is no word of vLLM's is new
    said = until("Graph capturing finished", tmp_path)
    assert said.startswith((" (75 s ago: ", " (76 s ago: ", " (77 s ago: ")) and said.endswith("took 0.53 GiB)")
    assert doing("other", tmp_path) == "" and doing("m", None) == ""


def test_a_compiler_below_it_says_why_it_is_silent(replica: int, tmp_path: Path) -> None:
    (tmp_path / f"worker-abc-01000000-{replica}.out").write_text(LINES.format("11-29 04:55:40"))
    (tmp_path / "compile").touch()
    assert until("compiling", tmp_path) == " (compiling CUDA kernels)"
