"""The steady client against a real HTTP server: what counts as answered, and what does not."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.serving_client import SteadyClient

TOKENS = 3
DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def word(text: str = "one") -> bytes:
    return event({"choices": [{"delta": {"content": text}}], "usage": None})


def usage(tokens: int = TOKENS) -> bytes:
    return event({"choices": [], "usage": {"completion_tokens": tokens}})


ERROR = event({"error": {"message": "Internal server error", "type": "InternalServerError", "code": 500}})


class Server(BaseHTTPRequestHandler):
    """Answers with the `script` of its server; `cut`: without the end that HTTP asks for."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server: Any = self.server
        server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(server.status)
        self.send_header("x-model-version", "7")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in server.script:
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        if server.cut:
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args: Any) -> None:
        return None


@pytest.fixture
def server() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.status, server.script, server.cut, server.asked = 200, [], False, []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def became(server: Any, stream: bool) -> tuple[str, str]:
    client = SteadyClient(f"http://127.0.0.1:{server.server_port}", "m", tokens=TOKENS)
    try:
        return client._one(stream, TOKENS)
    finally:
        client._http.close()


@pytest.mark.parametrize(
    ("script", "cut", "outcome"),
    [
        ([word(), word(), word(), usage(), DONE], False, "200"),
        ([word("the word error, and data: [DONE]"), word('"error"'), word("\u2028"), usage(), DONE], False, "200"),
        ([word()[:9], word()[9:] + word() + word() + usage() + DONE], False, "200"),  # cut anywhere by the network
        ([word(), ERROR, DONE], False, "error event"),
        ([word(), ERROR], False, "error event"),
        ([word(), word(), word(), usage(), ERROR, DONE], False, "error event"),
        ([word(), word(), usage(2), DONE], False, "short"),
        ([word(), word(), word(), DONE], False, "short"),
        ([DONE], False, "short"),
        ([word(), word(), word(), usage()], False, "broken"),
        ([word(), word()[:20]], False, "broken"),
        ([word(), word()[:20], DONE], False, "broken"),
        ([], False, "broken"),
        ([word(), word()], True, "RemoteProtocolError"),
    ],
)
def test_a_stream_is_answered_when_all_of_it_came(server: Any, script: list[bytes], cut: bool, outcome: str) -> None:
    server.script, server.cut = script, cut
    assert became(server, stream=True)[0] == f"stream {outcome}"
    assert server.asked[0]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ('{"usage": {"completion_tokens": 3}}', "200"),
        ('{"usage": {"completion_tokens": 2}}', "short"),
        ('{"choices": []}', "short"),
        ('{"error": {"message": "x"}}', "error"),
        ('{"usage": {"compl', "broken"),
        ("Not found", "broken"),
    ],
)
def test_so_is_a_plain_answer(server: Any, text: str, outcome: str) -> None:
    server.script = [text.encode()]
    assert became(server, stream=False)[0] == f"plain {outcome}"


def test_what_failed_is_counted_and_answers_for_no_version(server: Any) -> None:
    server.script = [word(), ERROR, DONE]
    with SteadyClient(f"http://127.0.0.1:{server.server_port}", "m", threads=2, tokens=TOKENS, pause=0.001) as client:
        while len(server.asked) < 10:
            threading.Event().wait(0.01)
        with pytest.raises(AssertionError, match="no 1 more answers"):
            client.wait(more=1, seconds=0.1)
        client.stop()
    assert set(client.outcomes) == {"stream error event", "plain broken"}
    assert client.failed() == dict(client.outcomes) and sum(client.outcomes.values()) == client.sent
    assert client.versions == {}
