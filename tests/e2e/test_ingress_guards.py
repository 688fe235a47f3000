"""Ingress mode with API keys over Ray's proxy: what the guards stop there, and what is left of what was given up."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from ft_ray.api_keys import issue_key
from ft_ray.chat import Chat, load_tokenizer
from ft_ray.serve_args import EngineArgs, Limits
from ft_ray.serving import Endpoint, serve
from tests import tiny
from tests.e2e.fuzzing import QUESTION, bodies

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(400)]

SECONDS = 10
LENGTH = 32_768
"""More tokens than the model writes in SECONDS."""


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    root = tmp_path_factory.mktemp("guarded")
    folder = tiny.build(root / "tiny", hidden=128)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": LENGTH}))
    (folder / "ft_ray.json").write_text(json.dumps({"template_hash": Chat(load_tokenizer(folder)).template_hash}))
    keys = str(root / "keys.json")
    key = issue_key(keys, "test")
    limits = Limits(max_tokens=LENGTH - 100, timeout=SECONDS)
    engine = EngineArgs(max_length=LENGTH, max_sequences=8, kv_cache_gib=0.5, dtype="float32")
    with serve(folder=str(folder), port=0, keys=keys, limits=limits, engine=engine) as one:
        one.api_key = key
        yield one


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {endpoint.api_key}", "content-type": "application/json"}
    with httpx.Client(base_url=endpoint.url, timeout=60, headers=headers) as one:
        yield one


@pytest.fixture
def engine(endpoint: Endpoint) -> psutil.Process:
    (found,) = (p for p in psutil.Process().children(recursive=True) if p.name().startswith("VLLM"))
    return found


def cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_ends_in_the_engine_too(
    client: httpx.Client, engine: psutil.Process, stream: bool
) -> None:
    began, used = time.monotonic(), cpu(engine)
    long = {"model": "tiny", "messages": QUESTION, "max_tokens": LENGTH - 200, "ignore_eos": True, "stream": stream}
    answer = client.post("/v1/chat/completions", json=long)
    assert SECONDS <= time.monotonic() - began < SECONDS + 5 and cpu(engine) - used > 1, "it was generating"
    if stream:
        error = json.loads(answer.text.rstrip().rpartition("data: ")[2])["error"]
    else:
        assert answer.status_code == 504
        error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "timeout")
    time.sleep(1)
    used = cpu(engine)
    time.sleep(2)
    assert cpu(engine) - used < 0.4, "it generates on for nobody"
    assert client.post("/v1/chat/completions", json={**long, "max_tokens": 2, "stream": False}).status_code == 200


def test_no_malformed_body_is_a_500_and_none_passes_without_a_key(client: httpx.Client, engine: psutil.Process) -> None:
    for what, (body, statuses) in bodies("tiny").items():
        for route in ("/v1/chat/completions", "/v1/completions"):
            reply = client.post(route, content=body)
            assert reply.status_code in statuses, (route, what, reply.status_code, reply.text[:300])
            assert reply.json()["error"]["message"] and "x-injected" not in reply.headers
            # No key: nothing of the body is looked at.
            unsigned = client.post(route, content=body, headers={"authorization": "Bearer no"})
            assert unsigned.status_code == 401 and unsigned.json()["error"]["code"] == "invalid_api_key", what

    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 65_536

    assert client.post("/v1/chat/completions", content=chunks()).status_code == 413  # with no length told
    assert client.get("/v1/models").status_code == 200
    assert client.get("/v1/models", headers={"authorization": ""}).status_code == 401
    assert client.post("/v1/chat/completions", json={"model": "tiny", "messages": QUESTION, "max_tokens": 2}).is_success
    assert engine.is_running()
