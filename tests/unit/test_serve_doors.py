"""Headers by which a client would steer Ray Serve do not reach it, and clients that dawdle are sent away."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from ray.serve._private.http_util import call_function_from_import_path, validate_http_proxy_callback_return

from ft_ray import serve_doors
from ft_ray.env_vars import HAPROXY, SERVE_DOORS
from ft_ray.proxy_retries import Retries
from ft_ray.request_rules import WAITED
from ft_ray.serve_doors import PlainHeaders


@pytest.fixture(autouse=True)
def own_uvicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the callback changes in uvicorn is changed for one test."""
    monkeypatch.setattr(serve_doors.auto, "AutoHTTPProtocol", serve_doors.auto.AutoHTTPProtocol)


PLAIN = [(b"authorization", b"Bearer x"), (b"content-type", b"application/json"), (b"accept-language", b"\xff")]


def through(headers: list[tuple[bytes, bytes]], kind: str = "http") -> list[tuple[bytes, bytes]]:
    seen: list[tuple[bytes, bytes]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope.get("headers", []))

    async def nothing(*_: Any) -> Any:
        return {}

    given = {"type": kind, "headers": headers} if kind != "lifespan" else {"type": kind}
    asyncio.run(serve_doors.PlainHeaders(app)(given, nothing, nothing))
    assert given.get("headers", headers) == headers, "the server's own scope stays as it is"
    return seen


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"serve_multiplexed_model_id", b"x"), (b"Serve-Multiplexed-Model-Id", b"x"),
        (WAITED, b"80"), (b"x-request-timeout-seconds", b"0.001"), (b"x-request-disconnect-disabled", b"?1"),
        (b"x-request-id", b"\xff"), (b"x-request-id", b"a b"), (b"x-request-id", b"x" * 65), (b"x-request-id", b""),
        (b"x-session-id", b"\xff"), (b"x_session_id", b"\n"),
    ],
)  # fmt: skip
def test_what_would_steer_ray_is_left_out(name: bytes, value: bytes) -> None:
    assert through([*PLAIN, (name, value)]) == PLAIN


def test_everything_else_passes_as_it_came() -> None:
    headers = [*PLAIN, (b"x-request-id", b"a.B-9_"), (b"x-session-id", b"s1")]
    assert through(headers) == headers
    assert through(headers, "websocket") == headers
    assert through([], "lifespan") == []


@pytest.mark.parametrize(("haproxy", "wanted"), [("0", [Retries, PlainHeaders]), ("1", [PlainHeaders])])
def test_ray_takes_it_from_the_variable(monkeypatch: pytest.MonkeyPatch, haproxy: str, wanted: list[Any]) -> None:
    """In this order: what a client says of its waiting is left out before the proxy's own word is added."""
    monkeypatch.setenv(HAPROXY, haproxy)
    (path,) = SERVE_DOORS.values()
    made = validate_http_proxy_callback_return(call_function_from_import_path(path))
    assert [one.cls for one in made] == wanted


def test_the_proxy_imports_little_with_it() -> None:
    heavy = "'torch', 'transformers', 'ray', 'vllm'"
    code = f"import sys, ft_ray.serve_doors; print([m for m in ({heavy}) if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """uvicorn as Serve starts it, after its callback. By the path an answer is long (64 MB), slow, or a refusal."""
    monkeypatch.setattr(serve_doors, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(serve_doors, "UNREAD_SECONDS", 1.0)
    serve_doors.middleware()
    ended.clear()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while scope["path"] != "/refused" and (await receive()).get("more_body"):
            pass
        if scope["path"] == "/slow":
            await asyncio.sleep(1.5)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        chunks = 1024 if scope["path"] == "/long" else 1
        try:
            for number in range(chunks):
                more = number + 1 < chunks
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": more})
        finally:
            ended.set()

    door = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(lambda: app, factory=True, lifespan="off", log_config=None, log_level=None))
    thread = threading.Thread(target=lambda: asyncio.run(running.serve([door])), daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield door.getsockname()[:2]
    running.should_exit = running.force_exit = True
    thread.join(10)
    assert not thread.is_alive()


ended = threading.Event()


def until_closed(connection: socket.socket) -> tuple[bytes, float]:
    began, found = time.monotonic(), b""
    with connection, contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            found += part
    return found, time.monotonic() - began


@pytest.mark.parametrize("said", [b"", b"POST /v1/chat", b"GET / HTTP/1.1\r\nhost: x\r\nx-half: "])
def test_who_does_not_come_to_the_end_of_a_head_is_sent_away(server: tuple[str, int], said: bytes) -> None:
    connection = socket.create_connection(server, timeout=10)
    connection.sendall(said)
    answer, seconds = until_closed(connection)
    assert answer.startswith(b"HTTP/1.1 408 " if said else b"") and len(answer) < 100 and 0.3 < seconds < 3
    assert said or not answer, "who has said nothing may keep the connection for later, and is told nothing"


@pytest.mark.parametrize("more", [b"\r\n", b"x"])
def test_bytes_that_begin_no_request_do_not_stop_the_clock(server: tuple[str, int], more: bytes) -> None:
    """The rest of a body that was refused, or an empty line: uvicorn's own clock ends with any byte."""
    length = b"content-length: 10\r\n" if more == b"x" else b""
    connection = socket.create_connection(server, timeout=10)
    connection.sendall(b"POST /refused HTTP/1.1\r\nhost: x\r\n" + length + b"\r\n")
    found = b""
    while found.count(b"x") < 65536:
        found += connection.recv(1 << 20)
    connection.sendall(more)
    rest, seconds = until_closed(connection)
    assert 0.3 < seconds < 3 and b"200" not in rest


def test_a_head_that_begins_within_an_answer_does_not_break_it(server: tuple[str, int]) -> None:
    with socket.create_connection(server, timeout=10) as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\nGET / HT")
        found = b""
        while found.count(b"x") < 65536:
            part = connection.recv(1 << 20)
            assert part, "cut off"
            found += part
        answer = found.partition(b"\r\n0\r\n\r\n")[0]  # what follows is the next request's
        assert answer.startswith(b"HTTP/1.1 200 ") and answer.count(b"x") == 65536 and b"408" not in answer


def test_dripping_does_not_help(server: tuple[str, int]) -> None:
    connection = socket.create_connection(server, timeout=10)
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        connection.sendall(b"GET / HTTP/1.1\r\n")
        for _ in range(40):
            connection.sendall(b"x-drip: 1\r\n")
            time.sleep(0.1)
    assert time.monotonic() - began < 3
    connection.close()


def test_slow_bodies_and_later_requests_have_limits_of_their_own(server: tuple[str, int]) -> None:
    """The head's time is the head's alone: bodies are `limits.body_timeout`'s, pauses between requests keep-alive's."""
    with socket.create_connection(server, timeout=10) as connection:
        for body in (b"", b"12345"):
            connection.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body))
            for byte in body:
                time.sleep(0.2)
                connection.sendall(bytes([byte]))
            found = b""
            while found.count(b"x") < 65536:
                found += connection.recv(1 << 20)
            assert found.startswith(b"HTTP/1.1 200 ")
            time.sleep(1)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux alone has TCP_USER_TIMEOUT")
def test_who_does_not_read_loses_the_connection(server: tuple[str, int]) -> None:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(server)
    connection.sendall(b"GET /long HTTP/1.1\r\nhost: x\r\n\r\n")
    assert ended.wait(20), "the server is held by a client that does not read"
    connection.close()
