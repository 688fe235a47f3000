"""Scores, intervals, paired comparison, few-shot choice, and the client of other endpoints."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ft_ray.errors import DataError, InputError, ServingError
from ft_ray.evaluation import compare, evaluate, few_shot, mcnemar
from ft_ray.metrics import bootstrap, exact_match, interval, json_match, json_valid, metric, wilson
from ft_ray.remote_model import OpenAIModel


class Canned:
    """Answers from a list: stands for a model where only what is done with answers is tested."""

    def __init__(self, answers: list[str]) -> None:
        self.answers = answers

    def generate(self, prompts: Any, max_new_tokens: int) -> list[str]:
        return self.answers

    def score(self, rows: Any) -> tuple[float, int]:
        return 0.0, 0


def row(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "file": "d.jsonl",
        "line": 1,
        **more,
    }


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [("a  b\n", "a b", 1.0), ("A b", "a b", 0.0), ("", "", 1.0), ("ab", "a b", 0.0)],
)
def test_exact_match_ignores_white_space_only(prediction: str, reference: str, score: float) -> None:
    assert exact_match(prediction, reference) == score


@pytest.mark.parametrize(
    ("text", "valid"),
    [('{"a": 1}', 1.0), ("[1]", 1.0), ("{'a': 1}", 0.0), ('{"a": NaN}', 0.0), ('Sure: {"a": 1}', 0.0),
     ('{"a": 1, "a": 2}', 0.0), ("[" * 100_000, 0.0), ("", 0.0)],
)  # fmt: skip
def test_json_valid_is_json_and_nothing_else(text: str, valid: float) -> None:
    assert json_valid(text) == valid


def test_json_match_compares_values_and_fields() -> None:
    reference = '{"intent": "refund", "days": 3, "urgent": true}'
    same = json_match('{"urgent":true, "days": 3.0, "intent":"refund"}', reference)
    assert set(same.values()) == {1.0}
    partly = json_match('{"intent": "refund", "days": 4, "urgent": 1}', reference)
    assert partly == {"json_match": 0.0, "field.intent": 1.0, "field.days": 0.0, "field.urgent": 0.0}
    extra = json_match('{"intent": "refund", "days": 3, "urgent": true, "x": 1}', reference)
    assert (extra["json_match"], extra["field.days"]) == (0.0, 1.0)
    assert sum(json_match("no json", reference).values()) == 0
    with pytest.raises(InputError, match="references that are JSON"):
        json_match("{}", "refund")


def test_schema_validity(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}))
    measure = metric("exact_match", schema=schema)
    assert measure('{"a": 1}', '{"a": 1}', {})["schema_valid"] == 1.0
    assert measure('{"a": "1"}', '{"a": 1}', {})["schema_valid"] == 0.0
    schema.write_text('{"type": "objekt"}')
    with pytest.raises(InputError, match="is not a JSON schema"):
        metric("exact_match", schema=schema)


def test_the_users_own_metric(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def score(prediction, reference, row):\n    return {'long': len(prediction), 'line': row['line']}")
    result = evaluate(Canned(["abcd"]), [row("q", "a")], f"{file}:score")
    assert result.primary == "long"
    assert result.metrics["long"]["value"] == 4.0
    assert "exact_match" in result.metrics
    file.write_text("def score(prediction, reference, row):\n    return prediction == 'abcd'\n")
    assert evaluate(Canned(["abcd"]), [row("q", "a")], f"{file}:score").metrics["score"]["value"] == 1.0


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("x = 1\ndef score(p, r, row):\n    return 1 / 0\n", "score", r"mine.py:3 \(ZeroDivisionError"),
        ("def score(p, r, row):\n    return 'good'\n", "score", "returned 'good'"),
        ("def score(p, r, row):\n    return {'x': float('nan')}\n", "score", "finite number"),
        ("def scor(p, r, row):\n    return 1\n", "score", r"no function 'score' \(did you mean 'scor'"),
        ("def score(:\n", "score", r"mine.py:1: invalid syntax"),
        ("x = 1\nimport nothing_like_it\n", "score", r"mine.py:2: ModuleNotFoundError"),
    ],
)
def test_faults_of_the_users_metric_name_file_and_line(tmp_path: Path, text: str, name: str, words: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(InputError, match=words):
        evaluate(Canned(["a"]), [row("q", "a")], f"{file}:{name}")


def test_unknown_metrics_and_missing_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean 'exact_match'"):
        metric("exact_mach")
    with pytest.raises(InputError, match="does not exist"):
        metric(f"{tmp_path}/none.py:score")


def test_wilson_interval_against_published_values() -> None:
    # Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(5, 5)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_is_seeded_and_near_the_normal_interval() -> None:
    values = [(i * 37 % 101) / 100 for i in range(400)]
    low, high = bootstrap(values, seed=3)
    assert (low, high) == bootstrap(values, seed=3) != bootstrap(values, seed=4)
    mean = sum(values) / 400
    half = 1.96 * (sum((v - mean) ** 2 for v in values) / 400) ** 0.5 / 20
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)
    assert interval([0.5, 0.25])["n"] == 2


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar(10, 2) == pytest.approx(0.03857, abs=1e-5)
    assert mcnemar(2, 10) == mcnemar(10, 2)
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    assert 0 < mcnemar(3000, 2800) < 0.01


def predictions(scores: list[float], name: str = "m") -> list[dict[str, Any]]:
    return [{"id": str(i), "reference": "r", "scores": {name: s}} for i, s in enumerate(scores)]


def test_compare_counts_pairs() -> None:
    a = predictions([0.0] * 10 + [1.0] * 10)
    b = predictions([1.0] * 8 + [0.0] * 2 + [1.0] * 9 + [0.0])
    result = compare(a, list(reversed(b)))
    found = result["metrics"]["m"]
    assert (found["wins"], found["losses"], found["ties"]) == (8, 1, 11)
    assert (found["a"], found["b"], found["difference"]) == (0.5, 0.85, 0.35)
    assert 0 < found["low"] < 0.35 < found["high"]
    assert found["p"] == pytest.approx(mcnemar(8, 1))
    assert result["changed"]["m"]["lost"] == ["19"]
    smaller = compare(a, b, lower_is_better={"m"})["metrics"]["m"]
    assert (smaller["wins"], smaller["losses"]) == (1, 8)
    assert "p" not in compare(predictions([0.2, 0.4]), predictions([0.3, 0.4]))["metrics"]["m"]


def test_compare_refuses_other_rows() -> None:
    with pytest.raises(InputError, match=r"not of the same rows \(1 are in one only\)"):
        compare(predictions([1.0, 0.0]), predictions([1.0]))
    other = predictions([1.0])
    other[0]["reference"] = "x"
    with pytest.raises(InputError, match="another reference"):
        compare(predictions([1.0]), other)


def test_rows_of_equal_text_keep_names_of_their_own() -> None:
    result = evaluate(Canned(["a", "b"]), [row("q", "a"), row("q", "a")], "exact_match")
    assert len({p["id"] for p in result.predictions}) == 2


def test_rows_without_an_answer_are_an_error() -> None:
    with pytest.raises(DataError, match=r"d.jsonl:1: the row does not end in an assistant answer"):
        evaluate(Canned(["a"]), [{**row("q", "a"), "messages": [{"role": "user", "content": "q"}]}], "exact_match")
    with pytest.raises(DataError, match="no row to evaluate"):
        evaluate(Canned([]), [], "exact_match")


def test_few_shot_examples_are_diverse_and_follow_the_seed() -> None:
    rows = [row(f"question {i}", json.dumps({"kind": "ab"[i % 10 == 0], "n": i % 3})) for i in range(60)]
    rows.append({"messages": [*rows[0]["messages"], *rows[1]["messages"]]})  # two turns: not an example
    shots = few_shot(rows, 3, seed=5)
    answers = [json.loads(m["content"]) for m in shots.messages[1::2]]
    assert {a["kind"] for a in answers} == {"a", "b"}
    assert {a["n"] for a in answers} == {0, 1, 2}
    assert shots == few_shot(rows, 3, seed=5)
    asked = {"messages": [{"role": "system", "content": "s"}, *rows[0]["messages"]]}
    roles = [m["role"] for m in shots.prepend(asked)["messages"]]
    assert roles == ["system", *["user", "assistant"] * 4]
    assert few_shot(rows[:1], 5).messages[0]["content"] == "question 0"


# Endpoints


class Endpoint(BaseHTTPRequestHandler):
    """Echoes the last message; the first request for each fails with 503; `busy` records concurrency."""

    seen: set[str]
    busy: int
    most: int
    lock: threading.Lock

    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with server.lock:
            server.busy += 1
            server.most = max(server.most, server.busy)
            first = text not in server.seen
            server.seen.add(text)
        server.gate.wait(0.05)
        with server.lock:
            server.busy -= 1
        if body["model"] != "tuned":
            self.reply(404, {"error": {"message": "no such model"}})
        elif first:
            self.reply(503, {"error": {"message": "starting"}})
        else:
            assert body["temperature"] == 0
            message = {"role": "assistant", "content": f"{text}!"}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "tuned", "choices": [choice]}
            self.reply(200, reply)

    def reply(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After-Ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        return None


@pytest.fixture
def endpoint() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.seen, server.busy, server.most = set(), 0, 0
    server.lock, server.gate = threading.Lock(), threading.Event()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_endpoint_answers_in_order_with_retries_and_bounded_concurrency(endpoint: Any) -> None:
    model = OpenAIModel(f"http://127.0.0.1:{endpoint.server_port}/v1", "tuned", concurrency=3)
    answers = model.generate([[{"role": "user", "content": f"q{i}"}] for i in range(9)], 8)
    assert answers == [f"q{i}!" for i in range(9)]
    assert 1 < endpoint.most <= 3
    with pytest.raises(InputError, match="held-out loss needs the weights"):
        model.score([])


def test_endpoint_errors_are_one_sentence(endpoint: Any) -> None:
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    with pytest.raises(InputError, match="answers 404 for the model 'other'"):
        OpenAIModel(url, "other").generate([[{"role": "user", "content": "q"}]], 8)
    endpoint.seen.clear()
    with pytest.raises(ServingError, match="answers 503"):
        OpenAIModel(url, "tuned", retries=0).generate([[{"role": "user", "content": "q"}]], 8)
    with pytest.raises(ServingError, match="cannot be reached"):
        OpenAIModel("http://127.0.0.1:9/v1", "tuned", retries=0).generate([[{"role": "user", "content": "q"}]], 8)
    with pytest.raises(InputError, match="is not an address"):
        OpenAIModel("localhost:8000", "tuned")
