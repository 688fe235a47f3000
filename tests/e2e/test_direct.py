"""Direct mode for real: HAProxy in front of the replica, and the same guards on both of their ports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from ft_ray.chat import Chat, load_tokenizer
from ft_ray.gateway import issue_key
from ft_ray.manifest import key_of
from ft_ray.registry import Registry
from ft_ray.storage import Store
from tests import tiny
from tests.serving_client import SteadyClient

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).resolve().parents[2]
QUESTION = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, subprocess.Popen[str]]]:
    """(address, API key, process) of `ft-ray serve tiny --direct`, ended by Ctrl-C."""
    root = tmp_path_factory.mktemp("direct")
    store = Store(root / "run")
    with store.stage("merged") as out:
        tiny.build(out, hidden=128)
        chat = Chat(load_tokenizer(out))
        record = {"template_hash": chat.template_hash, "eos_ids": sorted(chat.eos_ids)}
        (out / "ft_ray.json").write_text(json.dumps(record))
    registry = Registry(str(root))
    registry.register(
        "tiny", source=store.address("merged"), manifest="", merged_hash=key_of(store.tree("merged")),
        template_hash=chat.template_hash, test_hash="", metrics={},
    )  # fmt: skip
    registry.set_champion("tiny", 1, who="test", why="test")
    keys = str(root / "keys.json")
    key = issue_key(keys, "test")
    process = subprocess.Popen(
        [sys.executable, "-m", "ft_ray", "serve", "tiny", "--direct", "--port", "0", "--storage", str(root),
         "--keys", keys, "--json", "--verbose"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "it did not come up"
    yield json.loads(line)["url"], key, process
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)


def replica_port(process: subprocess.Popen[str]) -> str:
    """Where the replica itself listens: the address that HAProxy sends requests to."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        if "Server:tiny" in "".join(child.cmdline()[:1]):
            found += [c.laddr for c in child.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    (address,) = [a for a in found if 30000 <= a.port <= 31000]
    return f"http://127.0.0.1:{address.port}"


def test_haproxy_asks_no_python_process_where_a_request_goes(
    served: tuple[str, str, subprocess.Popen[str]],
) -> None:
    _, _, process = served
    tree = psutil.Process(process.pid).children(recursive=True)
    names = [" ".join(child.cmdline()) for child in tree if child.status() != psutil.STATUS_ZOMBIE]
    assert any("haproxy" in name for name in names)
    assert any("Server:tiny" in name for name in names) and not any("LLMRouter" in name for name in names)


def test_the_guards_are_on_the_replicas_own_port_too(served: tuple[str, str, subprocess.Popen[str]]) -> None:
    url, key, process = served
    signed = {"authorization": f"Bearer {key}"}
    for base in (url, replica_port(process)):
        with httpx.Client(base_url=base, timeout=60) as client:

            def ask(change: dict[str, Any] | None = None, headers: dict[str, str] = signed) -> httpx.Response:
                return client.post("/v1/chat/completions", json={**QUESTION, **(change or {})}, headers=headers)

            answer = ask()
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] >= 1, answer.text
            assert answer.headers["x-model-version"] == "1" and answer.headers["x-request-id"]
            streamed = ask({"stream": True})
            assert streamed.text.rstrip().endswith("data: [DONE]")
            assert ask(headers={}).status_code == 401 and ask(headers={"authorization": "Bearer no"}).status_code == 401
            for change, status in (
                ({"chat_template": "{{ 1 }}"}, 422), ({"max_tokens": 10**6}, 422), ({"n": 99}, 422),
                ({"model": "other"}, 404), ({"messages": "x"}, 400), ({"messages": [{"role": "user"}]}, None),
                ({"temperature": "hot"}, 400),
            ):  # fmt: skip
                refused = ask(change)
                assert refused.status_code == status or (status is None and refused.status_code < 500), refused.text
                if refused.status_code >= 400:
                    assert refused.json()["error"]["message"]
            huge = client.post("/v1/chat/completions", content=b"x" * 1_100_000, headers=signed)
            assert huge.status_code == 413
            for path in ("/docs", "/openapi.json", "/tokenize", "/v1/embeddings", "/metrics", "/version", "/"):
                assert client.get(path, headers=signed).status_code == 404, path
            listed = client.get("/v1/models", headers={**signed, "origin": "http://elsewhere"})
            assert [m["id"] for m in listed.json()["data"]] == ["tiny"]
            assert "access-control-allow-origin" not in listed.headers
            assert client.get("/v1/models").status_code == 401


def test_load_and_nothing_left_behind(served: tuple[str, str, subprocess.Popen[str]]) -> None:
    url, key, process = served
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("haproxy" in child.name() for child in children)
    with SteadyClient(url, "tiny", key=key, pause=0) as client:
        client.wait(more=100)
        client.stop()
    assert client.failed() == {}
    process.send_signal(signal.SIGINT)
    process.wait(timeout=90)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    deadline = time.monotonic() + 20
    while True:
        try:
            httpx.get(url, timeout=1)
        except httpx.ConnectError:
            break
        assert time.monotonic() < deadline
