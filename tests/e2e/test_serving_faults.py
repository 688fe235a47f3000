"""One endpoint that scales from zero to two replicas, under kills, overload and slow clients.

Every request that is sent is accounted for: answered, refused, or ended by an error that says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray import serve as ray_serve
from ray.serve.api import RunTarget, _run_many

from ft_ray import serving
from ft_ray.chat import Chat, load_tokenizer
from ft_ray.serve_args import EngineArgs, Limits, Replicas
from ft_ray.serving import Endpoint
from tests import tiny
from tests.serving_client import SteadyClient

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

CONCURRENCY = 24
# With a body_timeout of 2 one of 726 requests got 408 as the application was deployed again, on 2 cores at a load of 45
# to 90; with 20 all of 719 and of 694 were answered. A body that came late would explain it; it was not seen, and two
# clean runs do not rule out one that is lost. A lost one still fails here, after 20 seconds.
LIMITS = Limits(max_tokens=64, concurrency=CONCURRENCY, timeout=90, body_timeout=20)
ENGINE = EngineArgs(max_length=256, max_sequences=16, kv_cache_gib=0.1, dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.build(tmp_path_factory.mktemp("faults") / "tiny", hidden=128)
    chat = Chat(load_tokenizer(folder))
    (folder / "ft_ray.json").write_text(json.dumps({"template_hash": chat.template_hash}))
    return folder


@pytest.fixture(scope="module")
def endpoint(folder: Path) -> Iterator[Endpoint]:
    scaled = Replicas(min=0, max=2, target_ongoing=4, upscale_delay=1, downscale_delay=3)
    with serving.serve(folder=str(folder), port=0, limits=LIMITS, engine=ENGINE, replicas=scaled) as endpoint:
        yield endpoint


def replicas(state: str = "RUNNING") -> int:
    states: Any = ray_serve.status().applications["tiny"].deployments["Server:tiny"].replica_states
    return int(states.get(state, 0))


def until(true: Callable[[], bool], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def processes(name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            found += [process] if name in "".join(process.cmdline()[:1]) else []
    return found


def test_scales_to_zero_and_a_request_waits_for_the_first_replica(endpoint: Endpoint) -> None:
    until(lambda: replicas() == 0, "it did not scale to zero")
    assert httpx.get(f"{endpoint.url}/health").status_code == 200  # the guards answer all the same
    with SteadyClient(endpoint.url, "tiny", threads=2) as client:
        client.wait(more=4)
        client.stop()
    assert client.failed() == {} and replicas() >= 1
    print(f"the first answer after zero took {client.longest:.1f} s")


def test_scales_up_with_load_and_down_under_it_without_a_failed_request(endpoint: Endpoint) -> None:
    with SteadyClient(endpoint.url, "tiny", threads=16, tokens=48, pause=0) as client:
        until(lambda: replicas() == 2, "it did not scale up")
        client.wait(more=20)
        client.stop()
    assert client.failed() == {} and sum(client.outcomes.values()) == client.sent
    with SteadyClient(endpoint.url, "tiny", threads=2) as client:
        until(lambda: replicas() == 1, "it did not scale down")
        client.wait(more=4)
        client.stop()
    assert client.failed() == {} and sum(client.outcomes.values()) == client.sent


def test_a_killed_replica_fails_no_plain_request(endpoint: Endpoint) -> None:
    with SteadyClient(endpoint.url, "tiny", threads=4, tokens=48, pause=0) as client:
        client.wait(more=8)
        for victim in processes("Server:tiny"):
            os.kill(victim.pid, signal.SIGKILL)
        client.wait(more=8)
        client.stop()
    print(dict(client.outcomes), f"longest {client.longest:.1f} s")
    # A stream that had begun ends with an event that says so; nothing else may happen to a request.
    assert set(client.failed()) <= {"stream error event"} and client.failed().get("stream error event", 0) <= 2
    assert sum(client.outcomes.values()) == client.sent


def test_a_killed_engine_fails_no_plain_request(endpoint: Endpoint) -> None:
    """kill -9 of one engine of two: its replica, which would refuse at once and so be preferred, ends with it."""
    with SteadyClient(endpoint.url, "tiny", threads=12, tokens=48, pause=0) as client:
        until(lambda: replicas() == 2 and len(processes("VLLM::EngineCore")) == 2, "it did not scale up")
        client.wait(more=20)
        engine, began = processes("VLLM::EngineCore")[0], time.monotonic()
        replica = next(parent for parent in engine.parents() if "Server:tiny" in "".join(parent.cmdline()[:1]))
        os.kill(engine.pid, signal.SIGKILL)
        psutil.wait_procs([replica], timeout=10)
        ended = time.monotonic() - began
        assert not replica.is_running() or replica.status() == psutil.STATUS_ZOMBIE, "a replica without an engine"
        until(lambda: len(processes("VLLM::EngineCore")) == 2 and replicas() == 2, "no other replica", seconds=180)
        whole = time.monotonic() - began
        client.wait(more=20)
        client.stop()
    print(dict(client.outcomes), f"longest {client.longest:.1f} s, replica gone {ended:.2f} s, two again {whole:.1f} s")
    assert ended < 5
    # What was on it is asked again; of a stream that had begun its client is told. 12 clients, half of them stream.
    assert set(client.failed()) <= {"stream error event"} and client.failed().get("stream error event", 0) <= 6
    assert sum(client.outcomes.values()) == client.sent
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    said = [file for file in logs.rglob("*") if file.is_file() and b"vLLM's engine died" in file.read_bytes()]
    assert said, "the log says what happened"


def test_a_killed_proxy_is_back_soon(endpoint: Endpoint) -> None:
    with SteadyClient(endpoint.url, "tiny", threads=4) as client:
        client.wait(more=4)
        (proxy,) = processes("ray::ProxyActor")
        os.kill(proxy.pid, signal.SIGKILL)
        until(lambda: [p.pid for p in processes("ray::ProxyActor")] not in ([], [proxy.pid]), "no new proxy")
        answered = client.outcomes["plain 200"]
        until(lambda: client.outcomes["plain 200"] > answered + 4, f"no answer: {client.outcomes}")
        client.stop()
    print(client.sent, dict(client.outcomes), f"longest {client.longest:.1f} s")
    # Its clients lose their connections, which no retry behind it could prevent: they see it at once. A new proxy knows
    # no route at first, and has its first requests wait for it.
    broken = {k.partition(" ")[2] for k in client.failed()}
    assert broken <= {"ConnectError", "ReadError", "RemoteProtocolError", "WriteError"}, client.outcomes
    assert sum(client.outcomes.values()) == client.sent  # a ReadTimeout would be a hang


def test_ten_times_too_much_is_refused_and_what_follows_is_answered(endpoint: Endpoint) -> None:
    async def flood() -> Counter[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=120, limits=limits, base_url=endpoint.url) as client:

            async def one(i: int) -> httpx.Response:
                body = {"messages": [{"role": "user", "content": str(i)}], "max_tokens": 48, "ignore_eos": True}
                return await client.post("/v1/chat/completions", json={"model": "tiny", **body})

            replies = await asyncio.gather(*(one(i) for i in range(10 * CONCURRENCY)))
        for reply in replies:
            if reply.status_code != 200:
                assert reply.headers["retry-after"] and reply.json()["error"]["type"] == "rate_limit_error"
        return Counter(r.status_code for r in replies)

    seen = asyncio.run(flood())
    print(dict(seen))
    assert set(seen) == {200, 429} and seen[200] >= CONCURRENCY and sum(seen.values()) == 10 * CONCURRENCY
    with SteadyClient(endpoint.url, "tiny", threads=2) as client:
        client.wait(more=4)
        client.stop()
    assert client.failed() == {}


def test_slow_senders_hold_nobody_up_and_are_ended(endpoint: Endpoint) -> None:
    host, _, port = endpoint.url.removeprefix("http://").partition(":")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{"
    slow = [socket.create_connection((host, int(port)), timeout=30) for _ in range(CONCURRENCY)]
    try:
        for connection in slow:
            connection.sendall(head)
        with SteadyClient(endpoint.url, "tiny", threads=2) as client:
            client.wait(more=4)
            client.stop()
        assert client.failed() == {}
        said = Counter(connection.recv(4096).split(b" ")[1] for connection in slow)
        assert said == {b"408": CONCURRENCY}
    finally:
        for connection in slow:
            connection.close()


def test_deployed_again_with_another_setting_under_load_fails_no_request(endpoint: Endpoint, folder: Path) -> None:
    """What `ft-ray deploy` of a changed file has Serve do: all replicas, of the model and the ingress, are others."""
    old = {p.pid for p in [*processes("Server:tiny"), *processes("tiny:Ingress")]}
    until(lambda: replicas() <= 1, "it did not scale down")
    with SteadyClient(endpoint.url, "tiny", threads=4) as client:
        client.wait(more=8)
        run_again(folder, max_tokens=48)
        until(lambda: not old & {p.pid for p in psutil.Process().children(recursive=True)}, "old ones are still there")
        until(lambda: ray_serve.status().applications["tiny"].status == "RUNNING", "not up again")
        client.wait(more=8)
        client.stop()
    print(client.sent, dict(client.outcomes), f"longest {client.longest:.1f} s")
    assert client.failed() == {} and sum(client.outcomes.values()) == client.sent
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 49}
    assert httpx.post(f"{endpoint.url}/v1/chat/completions", json=body, timeout=60).status_code == 422  # the new one


def run_again(folder: Path, max_tokens: int) -> None:
    """Deploys the application over itself, with one model replica and another limit."""
    target = serving.build({
        "folder": str(folder), "limits": {**LIMITS.model_dump(), "max_tokens": max_tokens},
        "engine": ENGINE.model_dump(), "replicas": {"min": 1, "max": 1},
    })  # fmt: skip
    _run_many(
        [RunTarget(target=target, name="tiny", route_prefix="/")], wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )  # fmt: skip


def test_a_killed_ingress_fails_no_plain_request(endpoint: Endpoint) -> None:
    with SteadyClient(endpoint.url, "tiny", threads=8, more_tokens=3, pause=0) as client:
        client.wait(more=8)
        (ingress,) = processes("tiny:Ingress")
        began = time.monotonic()
        os.kill(ingress.pid, signal.SIGKILL)
        until(lambda: [p.pid for p in processes("tiny:Ingress")] not in ([], [ingress.pid]), "no new ingress")
        back = time.monotonic() - began
        client.wait(more=8)
        client.stop()
    print(client.sent, dict(client.outcomes), f"longest {client.longest:.1f} s, back {back:.1f} s")
    assert sum(client.outcomes.values()) == client.sent
    # What it was handling is asked again of the next one, as soon as there is one; a stream that had begun ends with an
    # event that says so. 8 clients, half of them stream.
    assert set(client.failed()) <= {"stream error event"} and sum(client.failed().values()) <= 4, client.outcomes


def test_nothing_is_left_behind(endpoint: Endpoint) -> None:
    started = psutil.Process().children(recursive=True)
    endpoint.close()
    assert psutil.wait_procs(started, timeout=20)[1] == []
