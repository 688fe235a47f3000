"""Direct mode for real: HAProxy in front of two replicas, and the same guards on the ports of all three.

What direct mode does not promise is measured too: what a replica that is killed costs.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from ft_ray import serve_direct
from ft_ray.api_keys import issue_key
from ft_ray.chat import Chat, load_tokenizer
from ft_ray.manifest import key_of
from ft_ray.recipe import from_dict
from ft_ray.registry import Registry
from ft_ray.storage import Store
from tests import tiny
from tests.e2e.fuzzing import ANYTHING, bodies, fields, read_logs, telling
from tests.serving_client import SteadyClient

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = int(os.environ.get("FT_RAY_FUZZ_EXAMPLES", "100"))
SILENT = 5
"""Seconds after which HAProxy gives up a client that stopped in the middle of its request; 60 unless set."""
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
    recipe = {"name": "tiny", "model": {"id": str(store.local("merged"))}, "data": {"train": [{"path": "x"}]}}
    serving = {"replicas": 2, "max_replicas": 2, "max_length": 256}
    store.write_json("recipe.yaml", from_dict({**recipe, "serving": serving}).to_dict())  # JSON is YAML
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
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), serve_direct.CLIENT_TIMEOUT: str(SILENT)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        said = json.loads(process.stdout.readline() or "{}")
        assert "url" in said, f"it did not come up: {said}"
        yield said["url"], key, process
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()


def replicas(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    return [child for child in found if "Server:tiny" in "".join(child.cmdline()[:1])]


def replica_ports(process: subprocess.Popen[str]) -> list[str]:
    """Where the replicas themselves listen: the addresses that HAProxy sends requests to."""
    found = [c.laddr for p in replicas(process) for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return [f"http://127.0.0.1:{a.port}" for a in found if 30000 <= a.port <= 31000]


@pytest.fixture(scope="module")
def doors(served: tuple[str, str, subprocess.Popen[str]]) -> list[str]:
    """HAProxy's address and that of one replica."""
    url, _, process = served
    ports = replica_ports(process)
    assert len(ports) == 2
    return [url, ports[0]]


def test_haproxy_asks_no_python_process_where_a_request_goes(
    served: tuple[str, str, subprocess.Popen[str]],
) -> None:
    _, _, process = served
    tree = psutil.Process(process.pid).children(recursive=True)
    names = [" ".join(child.cmdline()) for child in tree if child.status() != psutil.STATUS_ZOMBIE]
    assert any("haproxy" in name for name in names)
    assert not any("LLMRouter" in name for name in names)
    titles = [name.split()[0] for name in names if "Server:tiny" in name]
    assert len(titles) == 2
    # All versions have one name, so that another one takes the place of this one replica by replica.
    assert not any("Server:tiny-v" in title for title in titles), titles


def test_openais_client_gets_what_it_asks_for(served: tuple[str, str, subprocess.Popen[str]]) -> None:
    """By vLLM's own routes, called by a short way (`direct_routes`), whose events `stream_events` writes."""
    url, key, _ = served
    client: Any = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)
    assert [m.id for m in client.models.list()] == ["tiny"]
    ask = functools.partial(client.chat.completions.create, **{**QUESTION, "max_tokens": 16})

    def streamed(**options: Any) -> tuple[str, Any, str | None]:
        text, usage, reason = "", None, None
        for chunk in ask(stream=True, stream_options={"include_usage": True}, **options):
            for choice in chunk.choices:
                text, reason = text + (choice.delta.content or ""), choice.finish_reason or reason
            usage = chunk.usage or usage
        return text, usage, reason

    plain = ask()
    text, usage, reason = streamed()
    assert text == plain.choices[0].message.content and len(text) > 4
    assert (usage.completion_tokens, usage.prompt_tokens) == (16, plain.usage.prompt_tokens)
    assert reason == plain.choices[0].finish_reason == "length"
    end = text[3:5]
    before = text.partition(end)[0]
    assert streamed(stop=[end])[::2] == (before, "stop") and ask(stop=[end]).choices[0].message.content == before
    hot = {"temperature": 1.5, "max_tokens": 12}
    assert streamed(seed=3, **hot)[0] == streamed(seed=3, **hot)[0] != streamed(seed=4, **hot)[0]
    content = ask(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 16 and all(t.logprob == max(o.logprob for o in t.top_logprobs) for t in content)
    heads = [c.choices[0].logprobs for c in ask(stream=True, logprobs=True)]
    assert [t.logprob for head in heads if head is not None for t in head.content] == [t.logprob for t in content]
    # No object: between its parts random weights may write white space without end.
    schema = {"type": "string", "enum": ["Paris", "Rome"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
    for text in (
        ask(response_format=wanted, max_tokens=40).choices[0].message.content,
        streamed(response_format=wanted, max_tokens=40)[0],
    ):
        assert json.loads(text) in ("Paris", "Rome")
    completed = client.completions.create(model="tiny", prompt="Hello", max_tokens=8)
    pieces = client.completions.create(model="tiny", prompt="Hello", max_tokens=8, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == completed.choices[0].text
    two = client.completions.create(model="tiny", prompt=["Hello", "Bye"], max_tokens=4, stream=True)
    assert {piece.choices[0].index for piece in two} == {0, 1}


def test_the_guards_are_on_the_replicas_own_port_too(
    served: tuple[str, str, subprocess.Popen[str]], doors: list[str]
) -> None:
    signed = {"authorization": f"Bearer {served[1]}"}
    for base in doors:
        with httpx.Client(base_url=base, timeout=60) as client:

            def ask(change: dict[str, Any] | None = None, headers: dict[str, str] = signed) -> httpx.Response:
                return client.post("/v1/chat/completions", json={**QUESTION, **(change or {})}, headers=headers)

            answer = ask()
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] >= 1, answer.text
            assert answer.headers["x-model-version"] == "1" and len(answer.headers.get_list("x-request-id")) == 1
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
            for steering in (
                {"serve_multiplexed_model_id": b"x"}, {"x-request-id": b"\xff"}, {"x-session-id": b"\xff"},
                {"x-request-timeout-seconds": b"0.0001"},
            ):  # fmt: skip
                assert ask(headers=signed | steering).status_code == 200, (base, steering)  # type: ignore[arg-type]
                assert client.get("/v1/models", headers=signed | steering).status_code == 200  # type: ignore[arg-type]
                assert ask(headers=steering).status_code == 401  # type: ignore[arg-type]
            for change in (
                {"return_assistant_tokens_mask": True}, {"chat_template_kwargs": {"padding": "max_length"}},
            ):  # fmt: skip
                assert ask(change).status_code == 422
            huge = client.post("/v1/chat/completions", content=b"x" * 1_100_000, headers=signed)
            assert huge.status_code == 413
            for path in ("/docs", "/openapi.json", "/tokenize", "/v1/embeddings", "/metrics", "/version", "/"):
                assert client.get(path, headers=signed).status_code == 404, path
            listed = client.get("/v1/models", headers={**signed, "origin": "http://elsewhere"})
            assert [m["id"] for m in listed.json()["data"]] == ["tiny"]
            assert "access-control-allow-origin" not in listed.headers
            assert client.get("/v1/models").status_code == client.get("/v1/models/tiny").status_code == 401
            one, none = (client.get(f"/v1/models/{name}", headers=signed) for name in ("tiny", "other"))
            assert one.status_code == 200 and one.json()["id"] == "tiny"  # Ray's route: vLLM's server has none
            assert none.status_code == 404 and "other" in none.text


def test_no_request_however_malformed_is_a_500(
    served: tuple[str, str, subprocess.Popen[str]], doors: list[str]
) -> None:
    """Slow and half-open connections stay open meanwhile: they hold nobody up, and are ended."""
    signed = {"authorization": f"Bearer {served[1]}", "content-type": "application/json"}
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {served[1]}\r\n".encode()
    began = time.monotonic()
    halves = {
        (door, half): [connect(door, said) for _ in range(10)]
        for door in doors
        for half, said in (("head", head), ("body", head + b"content-length: 500\r\n\r\n{"))
    }
    for door in doors:
        with httpx.Client(base_url=door, timeout=60, headers=signed) as client:
            for what, (body, statuses) in bodies("tiny").items():
                for route in ("/v1/chat/completions", "/v1/completions"):
                    reply = client.post(route, content=body)
                    assert reply.status_code in statuses, (door, route, what, reply.status_code, reply.text[:300])
                    assert reply.json()["error"]["message"] and "x-injected" not in reply.headers

            def chunks() -> Iterator[bytes]:
                for _ in range(30):
                    yield b" " * 65_536

            assert client.post("/v1/chat/completions", content=chunks()).status_code == 413  # with no length told

            for route in ("/v1/chat/completions", "/v1/completions"):
                fuzz_fields(client, route)
            for route in ("/v1/chat/completions", "/v1/completions"):
                for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                    fuzz_document(door, signed, route, mode)
            assert client.post("/v1/chat/completions", json=QUESTION).status_code == 200
    time.sleep(max(0, began + 35 - time.monotonic()))  # limits.body_timeout is 30 seconds
    for (door, half), connections in halves.items():
        said = Counter(status(connection) for connection in connections)
        if door == doors[0]:  # HAProxy has heard nothing of them for SILENT seconds
            assert set(said) <= {b"408", b"400"}, (half, said)
        else:
            assert said == {b"408": 10}, (half, said)


def test_no_log_holds_a_prompt(served: tuple[str, str, subprocess.Popen[str]], doors: list[str]) -> None:
    """Ray's logs, vLLM's and HAProxy's, of questions asked at HAProxy's door and a replica's own."""
    signed = {"authorization": f"Bearer {served[1]}"}
    for door in doors:
        with httpx.Client(base_url=door, timeout=60, headers=signed) as client:
            statuses = Counter(
                client.post("/v1/chat/completions", json={"model": "tiny", **body}).status_code for body in telling()
            )
        print(door, dict(statuses))
        assert statuses[200] >= 2 and statuses[400] + statuses[422] >= 6 and max(statuses) < 500, statuses
    told = [a for p in psutil.Process(served[2].pid).children(recursive=True) for a in p.cmdline()[1:]]
    (logs,) = {Path(a.partition("=")[2]) for a in told if a.startswith("--log_dir=")}
    assert read_logs(logs) > 10_000, "there were logs to read"


def connect(door: str, said: bytes) -> socket.socket:
    host, _, port = door.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(said)
    return connection


def status(connection: socket.socket) -> bytes:
    """The status that a connection was ended with, b'open' where it was not."""
    with connection:
        connection.settimeout(0.5)
        try:
            return [*connection.recv(4096).split(b" ", 2), b"nothing"][1]
        except TimeoutError:
            return b"open"


def fuzz_fields(client: httpx.Client, route: str) -> None:
    seen: Counter[int] = Counter()

    @settings(
        max_examples=EXAMPLES // 4, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.dictionaries(st.sampled_from(fields(route)), ANYTHING, max_size=4))
    def ask(change: dict[str, Any]) -> None:
        start = {"messages": QUESTION["messages"]} if "chat" in route else {"prompt": "One,"}
        reply = client.post(route, content=json.dumps({"model": "tiny", **start, "max_tokens": 2, **change}).encode())
        seen[reply.status_code] += 1
        assert reply.status_code < 500, (reply.status_code, reply.text[:300], change)
        if reply.status_code >= 400:
            assert reply.json()["error"]["message"]

    ask()
    print(client.base_url, route, dict(seen))
    assert seen[200] and sum(seen[s] for s in (400, 422))


@functools.cache
def openapi() -> Any:
    """The document of the app that a replica answers with, which is vLLM's own and is not shown."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs
    from vllm.entrypoints.openai.api_server import build_app

    # Nothing is read of a folder that is there; another name would be looked up on the hub.
    given = argparse.Namespace(**(vars(FrontendArgs()) | vars(AsyncEngineArgs(model=str(REPOSITORY)))))
    return schemathesis.openapi.from_dict(build_app(given, ("generate",)).openapi())


def fuzz_document(door: str, headers: dict[str, str], route: str, mode: GenerationMode) -> None:
    """Schemathesis: requests that fit the app's own schema, and requests that just do not."""
    seen: Counter[int] = Counter()

    @settings(
        max_examples=max(5, EXAMPLES // 8), deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(openapi()[route]["POST"].as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and mode == GenerationMode.POSITIVE:
            case.body = {**case.body, "model": "tiny", "max_tokens": 2}  # else nearly all end at the model's name
        reply = case.call(base_url=door, timeout=60, headers={"authorization": headers["authorization"]})
        case.validate_response(reply, checks=[not_a_server_error])
        seen[reply.status_code] += 1

    ask()
    print(door, route, mode, dict(seen))
    assert sum(seen[status] for status in (400, 404, 405, 413, 415, 422))


def test_a_silent_replica_is_waited_for_longer_than_a_silent_client(
    served: tuple[str, str, subprocess.Popen[str]],
) -> None:
    url, key, process = served
    held = replicas(process)
    wake = threading.Timer(SILENT + 2, lambda: [replica.resume() for replica in held])
    for replica in held:
        replica.suspend()
    wake.start()
    try:
        began = time.monotonic()
        reply = httpx.post(
            f"{url}/v1/chat/completions", json=QUESTION, timeout=60, headers={"authorization": f"Bearer {key}"}
        )
        assert reply.status_code == 200 and time.monotonic() - began > SILENT, reply.text
    finally:
        wake.join()


def test_a_killed_replica_costs_what_it_was_answering_and_no_more(
    served: tuple[str, str, subprocess.Popen[str]],
) -> None:
    url, key, process = served
    threads = 4
    with SteadyClient(url, "tiny", key=key, threads=threads, tokens=48, pause=0.02, timeout=60) as client:
        client.wait(more=8)
        victim = replicas(process)[0]
        victim.send_signal(signal.SIGKILL)
        client.wait(more=40)  # the other one answers
        deadline = time.monotonic() + 240
        while len(replica_ports(process)) < 2:
            assert time.monotonic() < deadline, "no new replica"
            time.sleep(0.2)
        client.stop()
    print(client.sent, dict(client.outcomes), f"longest {client.longest:.1f} s")
    assert sum(client.outcomes.values()) == client.sent and client.longest < 60
    # Nothing asks a second time for what was sent to it: these connections broke, or HAProxy said 500.
    kinds = {kind.partition(" ")[2] for kind in client.failed()}
    assert kinds <= {"500", "broken", "ReadError", "RemoteProtocolError"}, client.outcomes
    assert sum(client.failed().values()) <= 2 * threads
    with SteadyClient(url, "tiny", key=key, threads=threads, pause=0.02) as client:
        client.wait(more=20)
        client.stop()
    assert client.failed() == {} and sum(client.outcomes.values()) == client.sent


def test_a_killed_engine_takes_its_replica_with_it(served: tuple[str, str, subprocess.Popen[str]]) -> None:
    url, key, process = served
    threads = 4
    with SteadyClient(url, "tiny", key=key, threads=threads, tokens=48, pause=0.02, timeout=60) as client:
        client.wait(more=8)
        victim = replicas(process)[0]
        (engine,) = (p for p in victim.children(recursive=True) if p.name().startswith("VLLM"))
        began = time.monotonic()
        engine.kill()
        psutil.wait_procs([victim], timeout=10)
        ended = time.monotonic() - began
        assert victim not in replicas(process), "a replica without an engine"
        client.wait(more=40)  # the other one answers
        while len(replica_ports(process)) < 2:
            assert time.monotonic() - began < 240, "no new replica"
            time.sleep(0.2)
        whole = time.monotonic() - began
        client.stop()
    print(client.sent, dict(client.outcomes), f"longest {client.longest:.1f} s, gone {ended:.2f} s, two {whole:.1f} s")
    assert sum(client.outcomes.values()) == client.sent and client.longest < 60 and ended < 5
    # What it was answering, and what HAProxy handed to it until its process was gone.
    kinds = {kind.partition(" ")[2] for kind in client.failed()}
    assert kinds <= {"500", "503", "broken", "error event", "ReadError", "RemoteProtocolError"}, client.outcomes
    assert sum(client.failed().values()) <= 8 * threads  # 5 of 703 when written, its process gone after 0.6 s
    with SteadyClient(url, "tiny", key=key, threads=threads, pause=0.02) as client:
        client.wait(more=20)
        client.stop()
    assert client.failed() == {} and sum(client.outcomes.values()) == client.sent


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
