"""A run folder on NFS, by Linux's own client and server: locks, commits and removals of two clients.

A user-mode Linux kernel runs it, as a process of this machine, whose own kernel needs no NFS and changes no mount:
`nfs_guest.py` is that kernel's first process and says what it checks.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import nfs_guest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.heavy
@pytest.mark.skipif(shutil.which("linux.uml") is None, reason="needs user-mode Linux: apt-get install user-mode-linux")
@pytest.mark.skipif(shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None, reason="needs iproute2")
def test_two_nfs_clients_share_a_run_folder(tmp_path: Path) -> None:
    kernel = [
        "linux.uml", "mem=768M", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "quiet", "con=null",
        "con0=fd:0,fd:1", f"uml_dir={tmp_path}", f"init={sys.executable}", "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
        "--", nfs_guest.__file__, str(ROOT),
    ]  # fmt: skip
    started = subprocess.Popen(
        kernel, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = started.communicate(timeout=280)
    finally:  # its threads are processes here
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    if "ptrace set fp regs failed" in said:  # its kernel panics before the guest's first instruction
        pytest.skip("user-mode Linux cannot save this processor's registers, of which it knows too few")
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    for one in found:
        assert one["fault"] is None, f"{one['check']}: {one['fault']}"
    assert [one["check"] for one in found] == [check.__name__ for check in nfs_guest.CHECKS], said
