"""What a replica changes in vLLM's front end."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from vllm import envs
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


def test_ray_takes_the_logger_when_it_starts_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_wrappers, "RayPrometheusStatLogger", ray_wrappers.RayPrometheusStatLogger)
    vllm_frontend.fit()
    source = inspect.getsource(VLLMEngine._start_async_llm_engine)
    assert "from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger" in source, "looked up at each start"
    assert ray_wrappers.RayPrometheusStatLogger is vllm_frontend.StatLogger


def test_environment_variables_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        vllm_frontend.settle()
        before = envs.VLLM_LOG_STATS_INTERVAL
        monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", str(before + 1))
        assert before == envs.VLLM_LOG_STATS_INTERVAL
    finally:
        envs.disable_envs_cache()
