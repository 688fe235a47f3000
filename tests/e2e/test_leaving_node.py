"""A machine that is drained under load: what is in progress on its replica is answered before it goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from ft_ray.chat import Chat, load_tokenizer
from ft_ray.leave_node import serving as serving_below
from ft_ray.serve_args import EngineArgs, Limits, Replicas
from ft_ray.serving import Endpoint, serve
from tests import tiny
from tests.distributed.fault_tools import Nodes, until
from tests.e2e.test_serving_node import homes
from tests.serving_client import SteadyClient

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

LONG = 400
"""Tokens of an answer: some seconds, eight at once."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def endpoint(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A replica on each of two nodes, which have room for no other."""
    folder = tiny.build(tmp_path_factory.mktemp("leaving") / "tiny", hidden=256, layers=8)
    (folder / "ft_ray.json").write_text(json.dumps({"template_hash": Chat(load_tokenizer(folder)).template_hash}))
    with nodes.attached():
        nodes.add("b")
        nodes.add("c")
        until("two machines", lambda: ray.cluster_resources().get("CPU", 0) == 2)
        with serve(
            folder=str(folder), port=0, limits=Limits(max_tokens=LONG, timeout=90), replicas=Replicas(min=2, max=2),
            engine=EngineArgs(max_length=500, max_sequences=16, kv_cache_gib=0.1, dtype="float32", threads=1),
        ) as endpoint:  # fmt: skip
            yield endpoint


def raylet_of(nodes: Nodes, name: str) -> psutil.Process:
    (found,) = [p for p in map(psutil.Process, nodes.pids(name)) if p.name() == "raylet"]
    return found


def test_a_machine_that_leaves_under_load_costs_no_request(endpoint: Endpoint, nodes: Nodes) -> None:
    places = homes()
    assert {node for name, node in places.items() if "Server:" in name} == {nodes.id("b"), nodes.id("c")}, places
    # The one that has the ingress as well, if one of them has it.
    (ingress,) = [node for name, node in places.items() if "Ingress" in name]
    leaving = "c" if ingress == nodes.id("c") else "b"
    raylet = raylet_of(nodes, leaving)
    assert any("Server:tiny" in title for title in serving_below(raylet))
    with SteadyClient(endpoint.url, "tiny", threads=8, tokens=LONG) as client:
        client.wait(more=8)
        until("eight requests in progress", lambda: client.sent - sum(client.outcomes.values()) == 8)
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "ft_ray.leave_node", "100", "--raylet", str(raylet.pid)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        left = time.monotonic() - began
        assert done.returncode == 0, done.stdout + done.stderr
        assert serving_below(raylet) == []
        nodes.kill(leaving)  # as the pod ends
        client.wait(more=16)  # by the replica that is left
        client.stop()
    print(client.sent, dict(client.outcomes), f"longest {client.longest:.1f} s, left after {left:.1f} s")
    assert client.failed() == {} and sum(client.outcomes.values()) == client.sent
