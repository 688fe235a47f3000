"""Ray's own proxy asks again, for real: two replicas of an ingress that end their own process while they answer.

No model: what they serve are a few routes. What a replica was asked it writes down before it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ray import serve as ray_serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ft_ray import endpoint, ray_session
from tests.distributed.fault_tools import until

pytestmark = [pytest.mark.injected, pytest.mark.timeout(240)]

PATHS = {
    "plain": "plain/v1/completions", "stream": "stream/v1/chat/completions", "silent": "silent/v1/completions",
}  # fmt: skip
PATIENCE = 15.0
"""Seconds that Serve has for a request."""
LATE = 0.3
"""Seconds after which a replica dies: it may have died of the request."""
BODY = secrets.token_bytes(300_000)


def application(folder: Path) -> Any:
    """Serve pickles these functions as they are, so that its replicas import nothing of the tests."""

    async def note(request: Request) -> dict[str, Any]:
        """Writes down that this process was asked, and returns it; `times` counts from 1."""
        body, file = await request.body(), folder / request.query_params["name"]
        asked = {
            "times": 1 + (len(file.read_text().splitlines()) if file.exists() else 0), "pid": os.getpid(),
            "id": request.headers["x-request-id"], "hash": hashlib.sha256(body).hexdigest(),
        }  # fmt: skip
        with file.open("a") as out:
            out.write(json.dumps(asked) + "\n")
        return asked

    def die_later() -> None:
        threading.Timer(LATE, os.kill, (os.getpid(), signal.SIGKILL)).start()  # whatever becomes of the request

    async def plain(request: Request) -> Response:
        """Dies in the first `deaths` times."""
        asked = await note(request)
        if asked["times"] <= int(request.query_params["deaths"]):
            die_later()
            await asyncio.sleep(60)
        return JSONResponse(asked)

    async def stream(request: Request) -> Response:
        """Dies after its head and `events` events."""
        await note(request)

        async def told() -> AsyncIterator[str]:
            die_later()
            for number in range(int(request.query_params["events"])):
                yield f'data: {{"number": {number}}}\n\n'
            await asyncio.sleep(60)

        return StreamingResponse(told(), media_type="text/event-stream")

    async def silent(request: Request) -> Response:
        await note(request)
        await asyncio.sleep(60)
        raise AssertionError("Ray has given it up before")

    paths = {"/plain/v1/completions": plain, "/stream/v1/chat/completions": stream, "/orders": plain}
    paths["/silent/v1/completions"] = silent
    routes = [Route(path, asked, methods=["POST"]) for path, asked in paths.items()]
    dying = ray_serve.deployment(
        ray_serve.ingress(Starlette(routes=routes))(), name="Dying", num_replicas=2, health_check_period_s=0.5,
        graceful_shutdown_timeout_s=0.5, graceful_shutdown_wait_loop_s=0.1, ray_actor_options={"num_cpus": 0},
    )  # fmt: skip
    return dying.bind()


class Doors:
    """Serve's proxy, and what the replicas behind it have written down."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder

    def ask(self, route: str, name: str, timeout: float = 30, **parameters: int) -> httpx.Response:
        url, given = f"{self.url}/{PATHS.get(route, route)}", {"name": name, **parameters}
        return httpx.post(url, params=given, content=BODY, timeout=timeout)

    def asked(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Doors, httpx.Response]]:
    """With the answer to a request that came before there was a route."""
    folder = tmp_path_factory.mktemp("asked")
    before = psutil.Process().children(recursive=True)
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.delenv("RAY_ADDRESS", raising=False)
        stack.enter_context(ray_session.session())
        free, door = endpoint._free_port("127.0.0.1", 0), {"request_timeout_s": PATIENCE}
        port, _ = endpoint._start_serve(stack, "127.0.0.1", free, door)
        doors = Doors(f"http://127.0.0.1:{port}", folder)
        with ThreadPoolExecutor() as pool:
            early = pool.submit(doors.ask, "plain", "early", deaths=0)
            time.sleep(0.5)
            ray_serve.run(application(folder), name="doors", route_prefix="/")
            yield doors, early.result()
        ours = [p for p in psutil.Process().children(recursive=True) if p not in before]
    assert psutil.wait_procs(ours, timeout=20)[1] == []


@pytest.fixture
def doors(started: tuple[Doors, httpx.Response]) -> Doors:
    """With two replicas that live."""
    until("two replicas", lambda: len(replicas()) == 2 == running(), seconds=60)
    return started[0]


def replicas() -> set[int]:
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            found |= {process.pid} if "doors:Dying" in "".join(process.cmdline()[:1]) else set()
    return found


def running() -> int:
    return int(ray_serve.status().applications["doors"].deployments["Dying"].replica_states.get("RUNNING", 0))


def test_a_request_that_comes_before_the_first_route_waits_for_it(started: tuple[Doors, httpx.Response]) -> None:
    doors, early = started
    assert early.status_code == 200, early.text
    assert early.json() == doors.asked("early")[-1] and early.json()["hash"] == hashlib.sha256(BODY).hexdigest()


def test_a_request_whose_replica_died_is_answered_by_the_other(doors: Doors) -> None:
    alive = replicas()
    reply = doors.ask("plain", "once", deaths=1)
    assert reply.status_code == 200, reply.text
    first, second = doors.asked("once")
    assert reply.json() == second and {first["pid"], second["pid"]} == alive
    assert first["hash"] == second["hash"] == hashlib.sha256(BODY).hexdigest()
    assert first["id"] == second["id"] == reply.headers["x-request-id"]


def test_a_request_that_kills_whoever_reads_it_kills_two(doors: Doors) -> None:
    reply = doors.ask("plain", "always", deaths=1000)
    asked = doors.asked("always")
    assert reply.status_code == 503 and reply.headers["content-type"] == "application/json", reply.text
    assert reply.json()["error"]["code"] == "unavailable" and reply.json()["error"]["type"] == "server_error"
    assert reply.headers["retry-after"] == "1" and {one["id"] for one in asked} == {reply.headers["x-request-id"]}
    time.sleep(3)
    assert len(doors.asked("always")) == len({one["pid"] for one in asked}) == 2


def test_what_is_no_completion_may_change_something_and_is_asked_once(doors: Doors) -> None:
    reply = doors.ask("orders", "order", deaths=1)
    assert reply.status_code == 500 and len(doors.asked("order")) == 1


def test_what_ray_gives_up_has_openais_shape_too(doors: Doors) -> None:
    began = time.monotonic()
    reply = doors.ask("silent", "silent")
    assert 0.8 * PATIENCE < time.monotonic() - began < 1.6 * PATIENCE and len(doors.asked("silent")) == 1
    assert reply.status_code == 504 and reply.json()["error"]["code"] == "timeout", reply.text
    assert reply.headers["x-request-id"] == doors.asked("silent")[0]["id"]


@pytest.mark.parametrize("events", [0, 1])
def test_a_stream_that_is_cut_off_says_so_and_ends(doors: Doors, events: int) -> None:
    reply = doors.ask("stream", f"stream{events}", events=events)  # without an end it raises RemoteProtocolError
    *told, last, rest = reply.text.split("\n\n")
    assert reply.status_code == 200 and told == ['data: {"number": 0}'] * events and rest == ""
    assert last.startswith('data: {"error"') and json.loads(last[len("data: ") :])["error"]["code"] == "unavailable"
    assert len(doors.asked(f"stream{events}")) == 1, "one that has begun is not begun again"


def test_nothing_is_asked_again_for_a_client_that_has_left(doors: Doors) -> None:
    with pytest.raises(httpx.ReadTimeout):
        doors.ask("plain", "left", timeout=LATE / 2, deaths=1)
    (one,) = doors.asked("left")
    until("its death", lambda: one["pid"] not in replicas())
    time.sleep(2)
    assert len(doors.asked("left")) == 1
