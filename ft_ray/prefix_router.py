"""Routing by prefix: requests that begin alike go to the replica whose cache holds the beginning.

Ray 2.60's own router does so in ingress mode. Two things it lacks are here.
"""

from __future__ import annotations

import random
from typing import Any

from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import PrefixCacheAffinityRouter

__all__ = ["DirectPrefixRouter", "PrefixRouter", "text_of_ids"]

_IDS = 0x110000 - 0x800  # characters there are


def text_of_ids(prompt: Any) -> str:
    """Token ids, or a list of such lists, as a text with one character an id; '' for anything else."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], list):
        return "".join(text_of_ids(part) for part in prompt)
    if not isinstance(prompt, list) or not all(isinstance(i, int) and 0 <= i < _IDS for i in prompt):
        return ""
    return "".join(chr(i + 0x800 if i >= 0xD800 else i) for i in prompt)  # past the surrogates, which no text may hold


class PrefixRouter(PrefixCacheAffinityRouter):
    """Ray's, for prompts of token ids as well: Ray takes them for an empty text, and divides by its length."""

    def _normalize_prompt_to_string(self, prompt: Any) -> str:
        found = text_of_ids(prompt) or super()._normalize_prompt_to_string(prompt)
        return found or "\0"  # a message of pictures alone, say


class DirectPrefixRouter(PrefixRouter):
    """For direct mode, where who picks a replica never sends the request (`LLMRouter._pick_replica`).

    Ray tells its router of requests that are sent, so of none here: the tree of known beginnings stays empty, and of
    several replicas with equally little text the same one is first each time. With two replicas, one got every
    request (benchmarks/README.md). So a pick counts as sent, and among equals the one with the fewest requests.
    """

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> Any:
        ranked: Any = await super().choose_replicas(candidate_replicas, pending_request)
        equals = list(ranked[0]) if ranked else []
        if not equals:
            return ranked
        random.shuffle(equals)
        chosen = await self._select_from_candidate_replicas(equals, 0) or equals[0]
        nothing: Any = None  # no result is looked at
        self.on_request_routed(pending_request, chosen.replica_id, nothing)
        return [[chosen]]
