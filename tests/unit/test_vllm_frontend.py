"""What a replica changes in vLLM's front end."""

from __future__ import annotations

import asyncio
import gc
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from vllm import envs
from vllm.renderers.base import BaseRenderer
from vllm.v1.metrics import ray_wrappers

from ft_ray import vllm_frontend


def test_one_in_eight_times_between_tokens_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told_values: list[tuple[str, float]] = []

    class Ray:
        def __init__(self, name: str, **_: Any) -> None:
            self.name, self._tag_keys = name, ("model_name", "engine", "ReplicaId")

        def observe(self, value: float, tags: dict[str, str]) -> None:
            told_values.append((self.name, value))

    monkeypatch.setattr(ray_wrappers.ray_metrics, "Histogram", Ray)
    for name in ("vllm:inter_token_latency_seconds", "vllm:e2e_request_latency_seconds"):
        made = vllm_frontend.StatLogger._histogram_cls(
            name=name, documentation="", buckets=[1.0], labelnames=["model_name", "engine"]
        ).labels("m", "0")
        for number in range(16):
            made.observe(float(number))
    assert told_values[:2] == [("vllm_inter_token_latency_seconds", 0.0), ("vllm_inter_token_latency_seconds", 8.0)]
    assert len(told_values) == 2 + 16, "what is told once a request is told each time"


def test_counts_wait_for_the_loop_and_nothing_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, dict[str, str]]] = []

    class Ray:
        def __init__(self, **_: Any) -> None:
            self._tag_keys = ("model_name", "engine", "ReplicaId")

        def inc(self, value: float, tags: dict[str, str]) -> None:
            told.append((value, tags))

    monkeypatch.setattr(ray_wrappers.ray_metrics, "Counter", Ray)
    made = vllm_frontend.StatLogger._counter_cls(name="vllm:prompt_tokens", documentation="", labelnames=["a", "b"])
    one, other = made.labels("m", "0"), made.labels("n", "0")

    async def count() -> None:
        one.inc(3)
        one.inc(0)
        other.inc()
        assert told == []
        await asyncio.sleep(0.3)

    asyncio.run(count())
    assert [(value, tags["model_name"]) for value, tags in told] == [(3, "m"), (1.0, "n")]


def test_ray_takes_the_logger_when_it_starts_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_wrappers, "RayPrometheusStatLogger", ray_wrappers.RayPrometheusStatLogger)
    vllm_frontend.fit()
    source = inspect.getsource(VLLMEngine._start_async_llm_engine)
    assert "from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger" in source, "looked up at each start"
    assert ray_wrappers.RayPrometheusStatLogger is vllm_frontend.StatLogger


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(BaseRenderer, "get_eos_token_id", BaseRenderer.get_eos_token_id)
    thresholds = gc.get_threshold()
    try:
        vllm_frontend.settle()
        yield
    finally:
        envs.disable_envs_cache()
        gc.set_threshold(*thresholds)


def test_environment_variables_are_read_once(settled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = envs.VLLM_LOG_STATS_INTERVAL
    monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", str(before + 1))
    assert before == envs.VLLM_LOG_STATS_INTERVAL


def test_the_end_token_is_looked_up_once_for_each_renderer(settled: None) -> None:
    class Tokenizer:
        asked = 0

        @property
        def eos_token_id(self) -> int:
            Tokenizer.asked += 1
            return 7

    class Renderer(BaseRenderer):  # type: ignore[type-arg]
        render_messages = None
        tokenizer = Tokenizer()

    one, other = object.__new__(Renderer), object.__new__(Renderer)
    assert [r.get_eos_token_id() for r in (one, one, other, one)] == [7] * 4
    assert Tokenizer.asked == 2
