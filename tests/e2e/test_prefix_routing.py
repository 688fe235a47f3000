"""Routing by prefix in direct mode: who was asked a beginning before is asked again, and all replicas have work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ft_ray import serve_direct
from ft_ray.chat import Chat, load_tokenizer
from tests import tiny

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).resolve().parents[2]
BLOCK = 128  # tokens; what vLLM finds again on a CPU
BEGINNINGS, TIMES, LENGTH, ENDING = 8, 4, 2 * BLOCK, 16
SERVES = """
import json, sys
from ft_ray import serve_direct
with serve_direct.prepare():
    from ft_ray.serve_args import EngineArgs, Replicas
    from ft_ray.serving import serve
    with serve(
        folder=sys.argv[1], port=0, mode="direct", replicas=Replicas(min=2, max=2, routing="prefix"),
        engine=EngineArgs(max_length=512, max_sequences=8, kv_cache_gib=0.1, dtype="float32", threads=1),
    ) as endpoint:
        import ray
        node = ray.nodes()[0]
        metrics = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        print(json.dumps({"url": endpoint.url, "metrics": metrics}), flush=True)
        sys.stdin.read()
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tiny.build(tmp_path_factory.mktemp("prefix") / "tiny", hidden=128)
    (folder / "ft_ray.json").write_text(json.dumps({"template_hash": Chat(load_tokenizer(folder)).template_hash}))
    environment = {
        **os.environ, serve_direct.FORWARD_BODY: "1", "RAY_metrics_report_interval_ms": "1000",
        "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [sys.executable, "-c", SERVES, str(folder)], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        line = next((said for said in process.stdout if said.startswith("{")), "")
        assert line, "the endpoint did not come up"
        time.sleep(5)  # the replicas' first question reaches the metrics
        yield json.loads(line)
    finally:
        process.stdin.close()
        process.wait(120)


def tokens(served: dict[str, str], kind: str) -> Counter[str]:
    """Prompt tokens by replica that were looked for in its cache ('queries') or found there ('hits')."""
    found = Counter[str]()
    text = httpx.get(served["metrics"], timeout=30).text
    for labels, value in re.findall(rf"^ray_vllm_prefix_cache_{kind}_total\{{([^}}]*)\}} (\S+)$", text, re.MULTILINE):
        found[re.findall(r'ReplicaId="([^"]*)"', labels)[0]] += int(float(value))
    return found


def prompt(beginning: int, number: int) -> list[int]:
    start = [3 + (37 * beginning + k * (beginning + 1)) % 250 for k in range(LENGTH)]
    return start + [3 + (number * 11 + k) % 250 for k in range(ENDING)]


def test_a_beginning_goes_where_it_went_before_and_both_replicas_work(served: dict[str, str]) -> None:
    looked, hit = tokens(served, "queries"), tokens(served, "hits")
    with httpx.Client(base_url=served["url"], timeout=60) as client:
        for number in range(TIMES):
            for beginning in range(BEGINNINGS):
                body = {"model": "tiny", "prompt": prompt(beginning, number), "max_tokens": 1}
                assert client.post("/v1/completions", json=body).status_code == 200
    asked = BEGINNINGS * TIMES * (LENGTH + ENDING)
    until = time.monotonic() + 60
    while sum((tokens(served, "queries") - looked).values()) < asked and time.monotonic() < until:
        time.sleep(1)
    shares = tokens(served, "queries") - looked
    assert shares == dict.fromkeys(shares, asked // 2) and len(shares) == 2
    # Whole blocks of all but the first time. By load alone, half of the second times would miss, and so on.
    assert sum((tokens(served, "hits") - hit).values()) == BEGINNINGS * (TIMES - 1) * LENGTH
