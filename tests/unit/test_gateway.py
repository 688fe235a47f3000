"""The guards, driven over ASGI around a real little app: what passes, what is refused, and how."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse

from ft_ray import api_keys, gateway
from ft_ray.api_keys import issue_key, revoke_key
from ft_ray.errors import InputError, StorageError
from ft_ray.gateway import Gateway
from ft_ray.request_rules import WAITED
from ft_ray.serve_args import Limits
from ft_ray.serve_metrics import RequestMetrics
from ft_ray.storage import Store

CHAT = "/v1/chat/completions"
SECRET = "the patient's name is Zebedee"


class App:
    """Answers with what it was sent; `mode` makes it slow, failing, or streaming."""

    def __init__(self, mode: str = "echo") -> None:
        self.mode, self.calls = mode, 0
        self.go = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls += 1
        body = (await receive()).get("body", b"") if scope["method"] == "POST" else b"{}"
        if self.mode == "wait":
            await self.go.wait()
        if self.mode == "fail":
            raise RuntimeError(SECRET)
        kind = b"text/event-stream" if "stream" in self.mode else b"application/json"
        status = 503 if self.mode == "busy" else 200
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        if self.mode == "stream-fail":
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
            raise RuntimeError(SECRET)
        if self.mode == "stream-hang":
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
            await asyncio.sleep(60)
        await send({"type": "http.response.body", "body": body})


def ask(
    app: Any,
    body: Any = None,
    *,
    method: str = "POST",
    path: str = CHAT,
    headers: dict[str, str] | None = None,
    **limits: Any,
) -> httpx.Response:
    guarded = Gateway(app, limits=Limits(**limits), models=["m"]) if not isinstance(app, Gateway) else app
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    return asyncio.run(_send(guarded, method, path, content, headers))


async def _send(
    app: Any, method: str, path: str, content: bytes | None, headers: dict[str, str] | None
) -> httpx.Response:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method, path, content=content, headers=headers)


def said(**changes: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hello"}], **changes}


def error(response: httpx.Response) -> dict[str, Any]:
    value = response.json()["error"]
    assert set(value) == {"message", "type", "param", "code"} and value["message"]
    return dict(value)


def test_a_good_request_passes_unchanged() -> None:
    body = json.dumps(said(temperature=0.5, max_tokens=5, stream=False)).encode()
    response = ask(App(), body)
    assert response.status_code == 200 and response.content == body


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models", 200), ("GET", "/v1/models/m", 200), ("GET", "/health", 200), ("POST", CHAT, 200),
        ("POST", "/v1/completions", 200), ("GET", CHAT, 405), ("POST", "/v1/models", 405), ("OPTIONS", CHAT, 405),
        ("GET", "/metrics", 404), ("POST", "/v1/load_lora_adapter", 404), ("POST", "/tokenize", 404),
        ("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("POST", "/v1/embeddings", 404), ("POST", "/sleep", 404),
        ("GET", "/", 404), ("POST", "/v1/chat/completions/", 404), ("GET", "/v1/models/../x", 404),
    ],
)  # fmt: skip
def test_only_listed_routes_exist(method: str, path: str, status: int) -> None:
    app = App()
    response = ask(app, said(), method=method, path=path)
    assert response.status_code == status
    assert app.calls == (1 if status == 200 and path != "/health" else 0)
    assert "access-control-allow-origin" not in response.headers
    if status != 200:
        assert error(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/models", 200), ("GET", "/v1/models/m", 200), ("GET", "/health", 200), ("POST", CHAT, 200),
     ("GET", CHAT, 405), ("GET", "/metrics", 404), ("GET", "", 404)],
)  # fmt: skip
def test_an_application_with_an_address_of_its_own_has_the_same_routes(method: str, path: str, status: int) -> None:
    """Ray Serve hands a `route_prefix` over in `root_path`, and leaves it in `path`, as it does its own `root_path`."""
    observed: list[dict[str, Any]] = []
    app = App()
    guarded = Gateway(app, limits=Limits(), models=["m"], observer=lambda **seen: observed.append(seen))

    async def below(scope: Any, receive: Any, send: Any) -> None:
        await guarded({**scope, "root_path": "/all/support"}, receive, send)

    async def asked() -> int:
        response = await _send(below, method, f"/all/support{path}", json.dumps(said()).encode(), None)
        await asyncio.sleep(0.3)
        return response.status_code

    assert asyncio.run(asked()) == status
    assert app.calls == (1 if status == 200 and path != "/health" else 0)
    assert len(observed) == (path != "/health"), "the question whether it is well is not counted"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"padding": "max_length", "max_length": 2 * 10**9}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenizer_kwargs": {"padding": "max_length"}}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs"),
        ({"return_assistant_tokens_mask": True}, "return_assistant_tokens_mask"),
        ({"ec_transfer_params": {"remote_host": "10.0.0.1"}}, "ec_transfer_params"),
        ({"logprob_token_ids": list(range(21))}, "logprob_token_ids"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_completion_tokens": 101}, "max_completion_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"n": 5}, "n"),
        ({"best_of": 5}, "best_of"),
        ({"prompt": ["a"] * 5}, "prompt"),
        ({"prompt": [[1, 2]] * 5}, "prompt"),
        ({"prompt": ["a"] * 2, "n": 3}, "prompt"),
        ({"prompt": ["a", [1], "b", 2, "c"]}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 0}, "prompt"),
        ({"top_logprobs": 1000}, "top_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"priority": -5}, "priority"),
        ({"kv_transfer_params": {"remote_host": "10.0.0.1"}}, "kv_transfer_params"),
        ({"cache_salt": "x"}, "cache_salt"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 2001}, "stop"),
        ({"bad_words": ["x"] * 129}, "bad_words"),
        ({"bad_words": ["x" * 1001] * 2}, "bad_words"),
        ({"bad_words": ["\u20ac" * 667]}, "bad_words"),
        ({"allowed_token_ids": [1] * 1025}, "allowed_token_ids"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"stop_token_ids": list(range(101))}, "stop_token_ids"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"use_beam_search": 1, "n": 2}, "use_beam_search"),
        ({"stream_interval": 2**65}, "stream_interval"),
        ({"stream_interval": 0}, "stream_interval"),
        ({"temperature": 1, "top_k": 10**30}, "top_k"),
        ({"top_k": -2}, "top_k"),
        ({"repetition_detection": {"max_pattern_size": 10**30, "min_count": 2}},
         "repetition_detection.max_pattern_size"),
        ({"repetition_detection": {"max_pattern_size": 3, "min_count": 101}}, "repetition_detection.min_count"),
        ({"structured_outputs": {"choice": ["a", "\0a"]}}, "structured_outputs"),
        ({"structured_outputs": {"json": '{"items":' * 40 + "{}" + "}" * 40}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": "x" * 501}}}},
         "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"x": "y" * 30_000}}}, "response_format"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1"}}]}]},
         "messages"),
        ({"messages": [{"role": "user", "content": "x" * 1001}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 501}] * 2}]}, None),
        ({"prompt": ["x" * 501, "y" * 500]}, None),
        ({"prompt": [[1] * 1001]}, None),
        ({"model": 5}, "model"),
    ],
)  # fmt: skip
def test_what_a_request_may_not_ask_for_is_422(change: dict[str, Any], param: str | None) -> None:
    app = App()
    response = ask(app, said(**change), max_tokens=100, n=4, prompt_chars=1000)
    assert response.status_code == 422 and error(response)["param"] == param and app.calls == 0


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "x" * 1000}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x" * 1000: {"type": "string"}}}}}


@pytest.mark.parametrize(
    "change",
    [
        {"documents": [{"title": "x", "text": "x" * 1000}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        {"messages": [{"role": "assistant", "content": "", "reasoning": "x" * 1001}]},
        {"tools": [TOOL]},
        {"chat_template_kwargs": {"documents": [["x" * 500, {"y": "x" * 501}]]}},
        {"chat_template_kwargs": {"numbers": [1] * 1001}},
        {"anything_new": "x" * 1001},
    ],
)
def test_all_that_a_template_may_put_into_the_prompt_counts(change: dict[str, Any]) -> None:
    app = App()
    response = ask(app, said(**change), prompt_chars=1000)
    assert response.status_code == 422 and error(response)["code"] == "context_length_exceeded" and app.calls == 0
    assert ask(app, said(**change), prompt_chars=1200).status_code == 200


def test_what_says_no_to_an_option_or_asks_for_little_of_it_passes() -> None:
    little = {
        "use_beam_search": False, "stream_interval": 1, "top_k": -1, "logit_bias": {"5": 1},
        "allowed_token_ids": [5] * 1024, "repetition_detection": {"max_pattern_size": 3, "min_count": 2},
        "stop_token_ids": [*range(100)], "bad_words": ["\u20ac" * 666], "structured_outputs": {"choice": ["a", "b"]},
    }  # fmt: skip
    assert ask(App(), said(**little)).status_code == ask(App(), said(**dict.fromkeys(little))).status_code == 200


def test_what_is_not_of_the_prompt_does_not_count() -> None:
    others = {"temperature": 0.5, "stop": ["x" * 100], "metadata": {"a": "x" * 100}, "user": "x" * 100, "stream": False,
              "response_format": {"type": "json_schema", "json_schema": {"name": "x" * 100}}}  # fmt: skip
    message = {"role": "user", "content": "x" * 1000}
    assert ask(App(), said(messages=[message], **others), prompt_chars=1000).status_code == 200


@pytest.mark.parametrize(
    "change",
    [{"prompt": list(range(100))}, {"prompt": [list(range(10))] * 4}, {"prompt": ["a"] * 2, "n": 2},
     {"prompt": ["a"] * 4}, {"prompt": "a", "n": 4}, {"prompt": ["a"], "n": 4}, {"prompt": []}, {"prompt": "abcdefgh"}],
)  # fmt: skip
def test_as_many_sequences_as_choices_pass(change: dict[str, Any]) -> None:
    assert ask(App(), said(**change), path="/v1/completions", n=4, prompt_chars=1000).status_code == 200


def test_a_batch_of_prompts_does_not_pass_by_the_cap_on_choices() -> None:
    response = ask(App(), {"model": "m", "prompt": ["a"] * 1024, "n": 8}, path="/v1/completions")
    assert response.status_code == 422 and error(response)["message"] == (
        "1024 prompts with 8 choices each are 8192 answers; at most 8 a request here: send fewer prompts at once."
    )


@pytest.mark.parametrize(
    "body",
    [
        '{"model": "m", "prompt": "\\ud800"}'.encode("utf-16-le"), b'{"model": "m", "\\ud800": 1}',
        b'{"model": "m", "prompt": "\xed\xa0\x80"}', b'\xef\xbb\xbf{"model": "m"',
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": NaN}', b'{"a": Infinity}',
        b"[" * 100_000, b'{"a":' * 50 + b"1" + b"}" * 50, b'{"messages": "\\ud800"}',
        b'{"n": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_malformed_bodies_are_400(body: bytes) -> None:
    app = App()
    response = ask(app, body)
    assert response.status_code == 400 and error(response)["code"] == "invalid_json" and app.calls == 0


def test_an_unknown_model_or_adapter_is_404() -> None:
    guarded = Gateway(App(), limits=Limits(), models=["m", "m:adapter"])
    for name in ("other", "m:other", "m:", ":adapter", ""):
        response = ask(guarded, said(model=name))
        assert response.status_code == 404 and error(response)["code"] == "model_not_found"
    assert ask(guarded, said(model="m:adapter")).status_code == 200


def test_a_large_body_is_413_declared_or_not() -> None:
    app = App()
    response = ask(app, said(messages=[{"role": "user", "content": "x" * 2000}]), body_bytes=1000)
    assert response.status_code == 413 and error(response)["code"] == "request_too_large"

    async def chunks() -> Any:
        for _ in range(100):
            yield b"x" * 100

    async def streamed() -> httpx.Response:
        guarded = Gateway(app, limits=Limits(body_bytes=1000))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=guarded), base_url="http://test") as client:
            return await client.post(CHAT, content=chunks())

    assert asyncio.run(streamed()).status_code == 413 and app.calls == 0


def test_too_many_at_once_are_429_and_places_are_given_back() -> None:
    async def scenario() -> None:
        app = App("wait")
        guarded = Gateway(app, limits=Limits(concurrency=2), models=["m"])
        body = json.dumps(said()).encode()
        waiting = [asyncio.create_task(_send(guarded, "POST", CHAT, body, None)) for _ in range(2)]
        while app.calls < 2:
            await asyncio.sleep(0.01)
        refused = await _send(guarded, "POST", CHAT, body, None)
        assert refused.status_code == 429 and error(refused)["type"] == "rate_limit_error"
        assert refused.headers["retry-after"] == "1"
        assert (await _send(guarded, "GET", "/health", None, None)).status_code == 200
        app.go.set()
        assert [r.status_code for r in await asyncio.gather(*waiting)] == [200, 200]
        assert (await _send(guarded, "POST", CHAT, body, None)).status_code == 200
        cancelled = App("wait")
        guarded = Gateway(cancelled, limits=Limits(concurrency=1), models=["m"])
        task = asyncio.create_task(_send(guarded, "POST", CHAT, body, None))
        while not cancelled.calls:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        cancelled.go.set()
        assert (await _send(guarded, "POST", CHAT, body, None)).status_code == 200

    asyncio.run(scenario())


def test_a_slow_sender_is_408_and_a_slow_answer_504() -> None:
    async def scenario() -> list[int]:
        statuses = []

        async def never() -> dict[str, Any]:
            await asyncio.sleep(60)
            return {}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
        await Gateway(App(), limits=Limits(body_timeout=0.05))(scope, never, send)
        response = await _send(
            Gateway(App("wait"), limits=Limits(timeout=0.05)), "POST", CHAT, json.dumps(said()).encode(), None
        )
        assert error(response)["type"] == "timeout_error"
        return [*statuses, response.status_code]

    assert asyncio.run(scenario()) == [408, 504]


@pytest.mark.parametrize(
    ("waited", "status"), [("59.95", 504), ("1e9", 504), ("59", 200), ("-100", 200), ("nan", 200), ("much", 200)]
)
def test_what_a_request_waited_for_an_ingress_that_died_counts_with_its_time(waited: str, status: int) -> None:
    class Slow(App):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await asyncio.sleep(0.2)
            await super().__call__(scope, receive, send)

    assert ask(Slow(), said(), headers={WAITED.decode(): waited}, timeout=60).status_code == status


def test_a_busy_server_says_when_to_come_back() -> None:
    response = ask(App("busy"), said())
    assert response.status_code == 503 and response.headers["retry-after"] == "1"


def test_failures_say_nothing_of_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    response = ask(App("fail"), said(messages=[{"role": "user", "content": SECRET}]))
    assert response.status_code == 500 and error(response)["type"] == "server_error"
    assert ask(App(), said(messages=[{"role": "user", "content": SECRET}], n=99)).status_code == 422
    assert SECRET not in caplog.text and "RuntimeError" in caplog.text


@pytest.mark.parametrize("mode", ["stream-fail", "stream-hang"])
def test_a_stream_that_breaks_ends_with_an_error_event(mode: str) -> None:
    response = ask(App(mode), said(stream=True), timeout=0.2)
    events = [e for e in response.text.split("\n\n") if e]
    assert response.status_code == 200 and events[0] == "data: 1"
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] in ("server_error", "timeout_error")


def test_request_ids_are_kept_when_harmless_and_made_when_not() -> None:
    assert ask(App(), said(), headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 65, "a;b"):
        made = ask(App(), said(), headers={"x-request-id": bad}).headers["x-request-id"]
        assert made != bad and len(made) == 32
    assert ask(App(), said(n=99)).headers["x-request-id"]


def test_keys_are_stored_hashed_and_revocable_on_a_live_endpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_keys, "_RELOAD_SECONDS", 0.0)
    file = str(tmp_path / "keys.json")
    first, second = issue_key(file, "first"), issue_key(file, "second")
    text = Path(file).read_text()
    assert first not in text and second not in text and first != second
    guarded = Gateway(App(), limits=Limits(), keys=file, models=["m"])

    def status(key: str | None) -> int:
        headers = {"authorization": key} if key is not None else {}
        return ask(guarded, said(), headers=headers).status_code

    assert [status(f"Bearer {first}"), status(f"bearer {second}")] == [200, 200]
    assert [status(k) for k in (None, "", "Bearer", "Bearer x", f"Basic {first}", first)] == [401] * 6
    refused = ask(guarded, said(), path="/v1/models", method="GET")
    assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
    assert error(refused)["type"] == "authentication_error"
    assert ask(guarded, method="GET", path="/health").status_code == 200
    revoke_key(file, "first")
    assert [status(f"Bearer {first}"), status(f"Bearer {second}")] == [401, 200]
    third = issue_key(file, "third")
    assert status(f"Bearer {third}") == 200
    Path(file).write_text("{ broken")
    assert status(f"Bearer {second}") == 200  # the keys known last go on
    with pytest.raises(StorageError):
        Gateway(App(), limits=Limits(), keys=file)


def test_a_storage_that_hangs_holds_up_one_request_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_keys, "_RELOAD_SECONDS", 0.0)
    monkeypatch.setattr(api_keys, "_RELOAD_PATIENCE", 0.1)
    file = str(tmp_path / "keys.json")
    key = issue_key(file, "first")
    known, hangs = api_keys.Keys(file), threading.Event()
    monkeypatch.setattr(api_keys.Keys, "_load", lambda self: hangs.wait(20) and None)

    async def owners() -> list[tuple[str | None, float]]:
        found = []
        for _ in range(5):
            began = time.monotonic()
            found.append((await known.owner(key), time.monotonic() - began))
        hangs.set()
        return found

    found = asyncio.run(owners())
    assert [who for who, _ in found] == ["first"] * 5
    assert found[0][1] >= 0.1 and sum(seconds for _, seconds in found) < 1


def test_who_does_not_read_his_refusal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "_LAST_WORD_SECONDS", 0.1)

    async def scenario() -> float:
        async def send(message: Any) -> None:
            await asyncio.sleep(60)

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": json.dumps(said()).encode(), "more_body": False}

        began = time.monotonic()
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
        await Gateway(App("wait"), limits=Limits(timeout=0.05))(scope, receive, send)
        return time.monotonic() - began

    assert asyncio.run(scenario()) < 5


def test_labels_of_keys(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    issue_key(file, "a")
    with pytest.raises(InputError, match="has a key 'a' already"):
        issue_key(file, "a")
    with pytest.raises(InputError, match="no valid key 'b'"):
        revoke_key(file, "b")
    revoke_key(file, "a")
    issue_key(file, "a")
    Path(file).write_text("[]")
    with pytest.raises(StorageError, match="not a file of API keys"):
        revoke_key(file, "a")


def test_a_key_that_is_issued_meanwhile_does_not_undo_a_revocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has read the file when the other comes: without a lock it would write the revoked key back as valid."""
    file, has_read, go = str(tmp_path / "keys.json"), threading.Event(), threading.Event()
    leaked = issue_key(file, "leaked")
    read = api_keys._entries

    def slowly(store: Store, name: str) -> Any:
        entries = read(store, name)
        if threading.current_thread() is issuing:
            has_read.set()
            go.wait(30)
        return entries

    monkeypatch.setattr(api_keys, "_entries", slowly)
    issuing = threading.Thread(target=issue_key, args=(file, "new"))
    issuing.start()
    assert has_read.wait(30)
    threading.Timer(0.3, go.set).start()
    revoke_key(file, "leaked")
    issuing.join(30)
    monkeypatch.setattr(api_keys, "_entries", read)
    assert asyncio.run(api_keys.Keys(file).owner(leaked)) is None
    revoke_key(file, "new")  # nor was that one lost

    monkeypatch.setattr(api_keys, "_PATIENCE_SECONDS", 0.1)
    with Store(tmp_path).lock(".keys.json.lock"), pytest.raises(StorageError, match=r"is being changed by process"):
        issue_key(file, "third")


def test_lifespan_passes_and_websockets_do_not() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    async def scenario() -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        guarded = Gateway(app, limits=Limits())
        await guarded({"type": "lifespan"}, None, send)  # type: ignore[arg-type]
        await guarded({"type": "websocket"}, None, send)  # type: ignore[arg-type]
        return sent

    assert asyncio.run(scenario())[0]["type"] == "websocket.close" and seen == ["lifespan"]


def test_an_observer_hears_of_every_request_and_nothing_of_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "later", lambda call: call())
    heard: list[dict[str, Any]] = []
    app = Gateway(App(), limits=Limits(), models=["m"], observer=lambda **seen: heard.append(seen))
    ask(app, said())
    ask(app, said(model=SECRET))
    ask(app, b"{")
    ask(app, path="/health", method="GET")
    assert [(h["model"], h["status"], h["reason"]) for h in heard] == [
        ("m", 200, ""), ("m", 404, "model_not_found"), ("m", 400, "invalid_json"),
    ]  # fmt: skip
    assert SECRET not in str(heard)
    streaming = Gateway(App("stream"), limits=Limits(), models=["m"], observer=lambda **seen: heard.append(seen))
    ask(streaming, said(stream=True))
    assert heard[-1]["stream"] and 0 <= heard[-1]["first"] <= heard[-1]["seconds"]


@pytest.mark.parametrize("status", [200, 400, 404, 422, 500, 503])
def test_what_the_app_refuses_is_no_answer_either(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own errors: their time is not that of an answer, and they count among the refusals."""
    monkeypatch.setattr(gateway, "later", lambda call: call())
    heard: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await JSONResponse({"error": {"message": SECRET}}, status_code=status)(scope, receive, send)

    ask(observed(app, heard), said())
    assert [(h["status"], h["reason"]) for h in heard] == [(status, f"status_{status}" if status >= 400 else "")]


def observed(app: Any, heard: list[dict[str, Any]], models: tuple[str, ...] = ("m",), **limits: Any) -> Gateway:
    return Gateway(app, limits=Limits(**limits), models=models, observer=lambda **seen: heard.append(seen))


def test_refusals_are_the_only_models_and_nobodys_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "later", lambda call: call())
    heard: list[dict[str, Any]] = []
    unnamed = {key: value for key, value in said().items() if key != "model"}
    for models in (("m",), ("m", "m:a")):
        guarded = observed(App(), heard, models)
        ask(guarded, said(n=99))
        ask(guarded, path="/nowhere")
        ask(guarded, unnamed)
        ask(guarded, said())
        ask(guarded, path="/v1/models", method="GET")
    assert [(h["model"], h["status"]) for h in heard[:5]] == [
        ("m", 422), ("m", 404), ("m", 200), ("m", 200), ("", 200),  # the list is no answer of a model: its time is not
    ]  # fmt: skip
    assert [h["model"] for h in heard[5:]] == ["", "", "", "m", ""]


class Events:
    """Streams these bodies as vLLM does: each event by itself, the end said after all of them."""

    def __init__(self, *events: bytes) -> None:
        self.events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        kind = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        for event in (*self.events, b"data: [DONE]\n\n"):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


TOKEN = b'data: {"choices": [{"delta": {"content": "data: {\\"error\\""}}]}\n\n'
VLLM_ERROR = b'data: {"error": {"message": "Zebedee", "type": "InternalServerError", "param": null, "code": %s}}\n\n'


@pytest.mark.parametrize(
    ("events", "reason", "has_first"),
    [
        ((TOKEN, TOKEN), "", True),
        ((TOKEN, VLLM_ERROR % b"500"), "stream_error_500", True),
        ((b'data: {"error":{"message":"x","code":400}}\n\n',), "stream_error_400", False),
        ((TOKEN, VLLM_ERROR % b"500", VLLM_ERROR % b"400"), "stream_error_500", True),
        ((TOKEN, VLLM_ERROR % b'"Zebedee"'), "stream_error", True),
        ((TOKEN, VLLM_ERROR % b"123456"), "stream_error", True),
        ((TOKEN, VLLM_ERROR % b"true"), "stream_error", True),
        ((b'data: {"error": "Zebedee"}\n\n',), "stream_error", False),
        ((b'data: {"error": {"mess',), "stream_error", False),
    ],
)
def test_a_stream_in_which_vllm_says_an_error_has_failed(
    events: tuple[bytes, ...], reason: str, has_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "later", lambda call: call())
    heard: list[dict[str, Any]] = []
    response = ask(observed(Events(*events), heard), said(stream=True))
    assert response.content == b"".join(events) + b"data: [DONE]\n\n"  # the client gets what vLLM said
    assert [(h["status"], h["reason"], h["first"] is not None) for h in heard] == [(200, reason, has_first)]


def test_an_error_in_a_plain_answer_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "later", lambda call: call())
    heard: list[dict[str, Any]] = []
    ask(observed(App(), heard), b'{"model": "m", "prompt": "data: {\\"error\\""}')
    assert [h["reason"] for h in heard] == [""]


@pytest.mark.parametrize(("timeout", "reason"), [(0.1, "timeout"), (60, "")])
def test_a_timeout_after_a_lone_head_is_no_first_token(
    timeout: float, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "later", lambda call: call())
    monkeypatch.setattr(gateway, "_HEAD_SECONDS", 0.02)
    heard: list[dict[str, Any]] = []

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        kind = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        await asyncio.sleep(0.3)
        await send({"type": "http.response.body", "body": TOKEN})

    response = ask(observed(slow, heard, timeout=timeout), said(stream=True))
    assert response.status_code == 200 and ('"code": "timeout"' in response.text) is (reason != "")
    assert (heard[0]["reason"], heard[0]["first"] is None) == (reason, reason != "")


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("begun", [0, 1, 2])
def test_who_goes_away_was_not_answered(cancelled: bool, begun: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`begun`: messages of a stream that were sent before. Ray cancels the task, or the app ends in silence."""
    monkeypatch.setattr(gateway, "later", lambda call: call())
    heard: list[dict[str, Any]] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        kind = [(b"content-type", b"text/event-stream")]
        stream = [{"type": "http.response.start", "status": 200, "headers": kind},
                  {"type": "http.response.body", "body": TOKEN, "more_body": True}]  # fmt: skip
        for message in stream[:begun]:
            await send(message)
        if cancelled:
            raise asyncio.CancelledError

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(said(stream=True)).encode()}

    async def send(message: Any) -> None:
        sent.append(message)

    async def scenario() -> None:
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
        await asyncio.gather(observed(app, heard)(scope, receive, send), return_exceptions=True)

    asyncio.run(scenario())
    status = 200 if begun == 2 else 0  # a head that waits for its first event was not seen by anybody
    assert [(h["status"], h["reason"], h["model"]) for h in heard] == [(status, "disconnected", "m")]
    assert (heard[0]["first"] is not None) is (begun == 2) and len(sent) == (2 if begun == 2 else 0)


class Counted:
    """Ray's counter or histogram, which refuses labels that it does not have; keeps what it is told."""

    def __init__(self, real: Any) -> None:
        self.real, self.seen = real, list[tuple[float, dict[str, str]]]()

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.real.inc(value, tags)
        self.seen.append((value, tags))

    def observe(self, value: float, tags: dict[str, str]) -> None:
        self.real.observe(value, tags)
        self.seen.append((value, tags))


def test_only_what_came_to_its_end_has_a_time_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "later", lambda call: call())
    metrics = RequestMetrics()
    kept = {name: Counted(real) for name, real in metrics._made().items()}
    monkeypatch.setattr(metrics, "_metrics", kept)

    async def gone(scope: Any, receive: Any, send: Any) -> None:
        return None

    for app in (Events(TOKEN), Events(TOKEN, VLLM_ERROR % b"500"), gone):
        guarded = Gateway(app, limits=Limits(), models=["m"], observer=metrics)
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
        body = json.dumps(said(stream=True)).encode()

        async def receive(body: bytes = body) -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        async def send(message: Any) -> None:
            return None

        asyncio.run(guarded(scope, receive, send))  # type: ignore[arg-type]
    assert [tags["status"] for _, tags in kept["requests"].seen] == ["200", "200", "0"]
    assert [tags for _, tags in kept["refusals"].seen] == [
        {"model": "m", "reason": "stream_error_500"}, {"model": "m", "reason": "disconnected"},
    ]  # fmt: skip
    assert len(kept["seconds"].seen) == 1 and len(kept["first"].seen) == 2


def test_slow_senders_take_no_place_of_those_that_are_answered() -> None:
    async def run() -> list[int]:
        guarded = Gateway(App(), limits=Limits(concurrency=1, body_timeout=60), models=["m"])
        release = asyncio.Event()

        async def slow() -> dict[str, Any]:
            await release.wait()
            return {"type": "http.disconnect"}

        statuses: list[int] = []

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
        senders = [asyncio.create_task(guarded(dict(scope), slow, send)) for _ in range(1)]
        await asyncio.sleep(0)
        answered = await _send(guarded, "POST", CHAT, json.dumps(said()).encode(), None)
        senders += [asyncio.create_task(guarded(dict(scope), slow, send)) for _ in range(2)]
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(*senders)
        return [answered.status_code, *statuses]

    # One slow sender holds nobody up; a third is more than two for each place.
    assert asyncio.run(run()) == [200, 429, 400, 400]
