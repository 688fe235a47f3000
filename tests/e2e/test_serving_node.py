"""A machine that dies under load while it serves: two replicas on two nodes of a Ray cluster, one of them killed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
import ray
from ray import serve as ray_serve

from ft_ray.chat import Chat, load_tokenizer
from ft_ray.serve_args import EngineArgs, Limits, Replicas
from ft_ray.serving import Endpoint, serve
from tests import tiny
from tests.distributed.fault_tools import Nodes, until
from tests.serving_client import SteadyClient

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def endpoint(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """With the proxy on the head, which has room for no replica, and a replica on each of two nodes."""
    folder = tiny.build(tmp_path_factory.mktemp("node") / "tiny", hidden=128)
    (folder / "ft_ray.json").write_text(json.dumps({"template_hash": Chat(load_tokenizer(folder)).template_hash}))
    with nodes.attached():
        nodes.add("b")
        nodes.add("c")
        until("two machines", lambda: ray.cluster_resources().get("CPU", 0) == 2)
        with serve(
            folder=str(folder), port=0, limits=Limits(max_tokens=64, timeout=90), replicas=Replicas(min=2, max=2),
            engine=EngineArgs(max_length=256, max_sequences=16, kv_cache_gib=0.1, dtype="float32", threads=1),
        ) as endpoint:  # fmt: skip
            yield endpoint


def running() -> int:
    deployments = ray_serve.status().applications["tiny"].deployments
    return sum(d.replica_states.get("RUNNING", 0) for name, d in deployments.items() if name.startswith("Server:"))


def homes() -> dict[str, str]:
    """Names of Serve's living actors -> ids of their nodes."""
    from ray.util.state import list_actors

    found = list_actors(filters=[("state", "=", "ALIVE")], limit=1000, raise_on_missing_output=False)
    return {str(actor.name): str(actor.node_id) for actor in found if actor.name}


def test_a_machine_that_dies_under_load_costs_no_plain_request(endpoint: Endpoint, nodes: Nodes) -> None:
    places = homes()
    server = {node for name, node in places.items() if "Server:" in name}
    assert server == {nodes.id("b"), nodes.id("c")}, places
    (ingress,) = [node for name, node in places.items() if "Ingress" in name]
    # The one that has no ingress: what dies with that is told in docs/operations.md.
    dying = "c" if ingress != nodes.id("c") else "b"
    with SteadyClient(endpoint.url, "tiny", threads=8) as client:
        client.wait(more=16)
        nodes.kill(dying)
        began = time.monotonic()
        until("Serve to see it", lambda: running() == 1, 60)
        seen = time.monotonic() - began
        client.wait(more=16)  # by the replica that is left
        nodes.add("d")
        until("a new replica on a new machine", lambda: running() == 2, 240)
        back = time.monotonic() - began
        client.wait(more=16)
        client.stop()
    print(client.sent, dict(client.outcomes))
    print(f"longest {client.longest:.1f} s, seen after {seen:.1f} s, two again after {back:.1f} s")
    assert sum(client.outcomes.values()) == client.sent
    failed = client.failed()
    assert set(failed) <= {"stream error event"}, failed  # which had begun on the machine that died
    assert sum(failed.values()) <= 8, failed
