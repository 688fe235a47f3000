"""The cluster launcher on machines of one's own: `ray up` and `ray down` over SSH, with cluster/onprem.yaml."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.distributed.cluster_nodes import ROOT

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

NAMESPACES = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--net"]


def test_ray_up_over_ssh() -> None:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    tools = ("sshd", "ssh", "ssh-keygen", "rsync", "ip", "unshare")
    missing = [tool for tool in tools if shutil.which(tool, path=path) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if os.geteuid() != 0 or subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False).returncode:
        pytest.skip("two hosts on one machine need root and namespaces")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"PATH": path}
    done = subprocess.run(
        [*NAMESPACES, sys.executable, "-m", "tests.distributed.ray_up"], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=380, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen == {
        "nodes": [["10.99.0.1", True, 0], ["10.99.0.2", False, 1.0]],
        "without_token": 401,
        "gets_nodes": True,
        "job_ran_on": "10.99.0.2",
        "down": True,
    }
