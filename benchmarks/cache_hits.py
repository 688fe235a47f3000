"""How many prompt tokens the replicas of an endpoint found in their caches: vLLM's counters on Ray's metrics port.

Counts, which do not depend on how fast a machine is: vLLM adds the tokens of every prompt that it schedules to
prefix_cache_queries, and those whose keys and values its cache held to prefix_cache_hits.
"""

from __future__ import annotations

import re
import time
import urllib.request
from typing import Any

__all__ = ["EVERY_SECOND", "read", "settled", "share"]

EVERY_SECOND = {"RAY_metrics_report_interval_ms": "1000"}
"""For the environment of Ray: its processes report their counters as often, instead of every ten seconds."""

Counts = dict[str, dict[str, int]]

_SAMPLE = re.compile(r"^ray_vllm_prefix_cache_(queries|hits)_total\{([^}]*)\} ([0-9.e+]+)$", re.MULTILINE)


def read(address: str) -> Counts:
    """Replica -> {queries, hits} since each began, from a metrics page such as http://127.0.0.1:8080/metrics."""
    with urllib.request.urlopen(address, timeout=30) as reply:
        text = reply.read().decode()
    found: Counts = {}
    for kind, labels, value in _SAMPLE.findall(text):
        replica = dict(re.findall(r'(\w+)="([^"]*)"', labels)).get("ReplicaId", "")
        counts = found.setdefault(replica, {"queries": 0, "hits": 0})
        counts[kind] += int(float(value))
    return found


def settled(address: str, patience: float = 60) -> Counts:
    """The counts once they are the same for five seconds: they arrive some seconds after the requests."""
    until, since, last = time.monotonic() + patience, time.monotonic(), read(address)
    while time.monotonic() - since < 5 and time.monotonic() < until:
        time.sleep(1)
        now = read(address)
        if now != last:
            since, last = time.monotonic(), now
    return last


def share(before: Counts, after: Counts) -> dict[str, Any]:
    """What came between: queries and hits in tokens, the hits' share of the queries, and the same by replica.

    `share` is None where nothing was asked. A replica that did nothing is left out.
    """
    none = {"queries": 0, "hits": 0}
    by_replica: dict[str, dict[str, Any]] = {}
    for replica, counts in after.items():
        did: dict[str, Any] = {kind: n - before.get(replica, none)[kind] for kind, n in counts.items()}
        if did["queries"]:
            by_replica[replica] = {**did, "share": round(did["hits"] / did["queries"], 3)}
    queries, hits = (sum(did[kind] for did in by_replica.values()) for kind in ("queries", "hits"))
    return {
        "queries": queries, "hits": hits, "share": round(hits / queries, 3) if queries else None,
        "by_replica": by_replica,
    }  # fmt: skip
