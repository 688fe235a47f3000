"""What vLLM's front end does for every token, done less often where that changes no answer.

One process turns the engine's tokens into answers, and with a small model on a fast GPU it is what limits throughput:
of its time on an H200 (1B shape, 32 to 256 requests at once) 7% went into histograms of Ray's, 2.8 microseconds a
token, and 5% into reading environment variables (benchmarks/README.md, "The endpoint"); how it writes a stream's events
is `stream_events`' matter. vLLM is pinned.
"""

from __future__ import annotations

import functools
import gc
from typing import Any

import vllm.v1.metrics.ray_wrappers as ray_wrappers
from vllm import envs
from vllm.renderers.base import BaseRenderer
from vllm.utils.gc_utils import freeze_gc_heap

from ft_ray import stream_events
from ft_ray.idle_calls import later

__all__ = ["StatLogger", "fit", "settle"]

_ONE_IN = 8
_GARBAGE = 20_000  # new objects
_INTER_TOKEN = "vllm:inter_token_latency_seconds"


class _Histogram(ray_wrappers.RayHistogramWrapper):
    """Takes one in eight of the times between tokens: all shares and the mean stay as they are, the count does not."""

    def __init__(self, name: str, *rest: Any, **options: Any) -> None:
        super().__init__(name, *rest, **options)
        self._one_in = _ONE_IN if name == _INTER_TOKEN else 1
        self._seen = 0

    def observe(self, value: float) -> None:
        if self._seen % self._one_in == 0:
            later(super().observe, value)
        self._seen += 1


class _Counter(ray_wrappers.RayCounterWrapper):
    def inc(self, value: float = 1.0) -> None:
        if value:  # several count nothing at most steps
            later(super().inc, value)


class StatLogger(ray_wrappers.RayPrometheusStatLogger):
    """vLLM's metrics on Ray's port, without a call into Ray for each token, nor while requests wait for theirs."""

    _counter_cls = _Counter
    _histogram_cls = _Histogram


def fit() -> None:
    """For engines that this process starts from now on."""
    wrappers: Any = ray_wrappers
    wrappers.RayPrometheusStatLogger = StatLogger
    stream_events.fit()


def settle() -> None:
    """Once the engine runs: what stays is not collected, what no longer changes is not looked up again.

    The first two are what vLLM does in processes of its own. Looking for garbage after every 700 new objects, as Python
    does, is several times a request; the end token's id goes through four layers of the tokenizer for every request.
    """
    envs.enable_envs_cache()
    freeze_gc_heap()
    gc.set_threshold(_GARBAGE, 20, 20)
    renderer: Any = BaseRenderer
    renderer.get_eos_token_id = functools.cache(renderer.get_eos_token_id)
