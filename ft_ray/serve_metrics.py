"""The endpoint's own metrics, beside those of Serve and vLLM, on Ray's Prometheus port of every node.

Labels are few: a model that is served, a version, a status, the code of a refusal. No part of a request is one.
vLLM labels its figures with the replica; `ft_ray_replica_info` says which version that replica serves, so that
`... * on (ReplicaId) group_left (version) max_over_time(ray_ft_ray_replica_info[2m])` is a figure per version.
"""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["RequestMetrics", "say_version"]

_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]


class RequestMetrics:
    """Counts what the gateway saw, answered or not. Made where the app is built, used in its replicas.

    ft_ray_requests (counter: model, version, stream, status), ft_ray_refusals (counter: model, reason),
    ft_ray_request_seconds of answers that came to their end and, of streams, ft_ray_first_token_seconds (histograms:
    model, version).
    A stream that failed within has status 200, as its client saw it, and counts among the refusals; so does what a
    client left, reason 'disconnected', status 0 where it had nothing yet, and what vLLM refuses, reason 'status_400'.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_metrics": None}

    def __call__(
        self, *, model: str, version: str, stream: bool, status: int, reason: str, seconds: float, first: float | None
    ) -> None:
        metrics = self._made()
        labels = {"model": model, "version": version}
        metrics["requests"].inc(1, {**labels, "stream": str(stream).lower(), "status": str(status)})
        if reason:
            metrics["refusals"].inc(1, {"model": model, "reason": reason})
        else:
            metrics["seconds"].observe(seconds, labels)
        if first is not None:
            metrics["first"].observe(first, labels)

    def _made(self) -> dict[str, Any]:
        if self._metrics is None:
            from ray.serve import metrics

            labels: Any = ("model", "version")  # typed as a tuple of one there
            refused: Any = ("model", "reason")
            self._metrics = {
                "requests": metrics.Counter(
                    "ft_ray_requests", "Requests by what became of them.", (*labels, "stream", "status")
                ),
                "refusals": metrics.Counter(
                    "ft_ray_refusals", "Requests refused, failed or left by their client, by code.", refused
                ),
                "seconds": metrics.Histogram(
                    "ft_ray_request_seconds", "Time to the end of an answer.", _SECONDS, labels
                ),
                "first": metrics.Histogram(
                    "ft_ray_first_token_seconds", "Time to the first token of a stream.", _SECONDS, labels
                ),
            }
        return self._metrics


def say_version(model: str, version: int | None, replica: str) -> None:
    """Sets ft_ray_replica_info. Ray forgets a gauge once it was collected: say it again at every health check."""
    gauge = _info()
    gauge.set(1, {"model": model, "version": str(version or ""), "ReplicaId": replica})


@functools.cache
def _info() -> Any:
    from ray.util.metrics import Gauge

    return Gauge("ft_ray_replica_info", "Which version a replica serves.", ("model", "version", "ReplicaId"))
