"""Routing by prefix: requests that begin alike go to the replica whose cache holds the beginning.

Ray 2.60's own router does so in ingress mode, for texts; prompts of token ids and direct mode are here.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Collection
from typing import Any

from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import PrefixCacheAffinityRouter

from ft_ray.known_prefixes import LONGEST, KnownPrefixes

__all__ = ["DirectPrefixRouter", "PrefixRouter", "text_of_ids"]

_ASK_EVERY = 0.25  # seconds
_STALE = 5.0
_PATIENCE = 3  # the answer may take 0.1 s, doubled so often
_LEAST_SHARE = 0.1  # of a prompt: to know less does not matter, as to Ray's
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
    """For direct mode, where one process picks the replica of every request and sends none (`LLMRouter._pick_replica`).

    Ray's router would ask an actor up to three times a pick, while nothing else is picked; two replicas of a 1B model
    were faster without it (benchmarks/README.md, 30 November 2026). It learns from requests that it sends, and knows
    how busy a replica is from what it sends and what is answered, so here it would learn neither. So what was
    given to whom is kept in this process, a pick counts as given, and a replica's load is what it last said, a few
    times a second, and the picks since then.
    """

    def initialize_state(self, **given: Any) -> None:  # type: ignore[override]  # any arguments, as its own base has it
        """Ray calls it with `request_router_kwargs`, which has

        `imbalanced_threshold`: requests by which who knows a beginning may be busier than who has least to do.
        """
        self._most_ahead: float = given["imbalanced_threshold"]
        self._known = KnownPrefixes()
        self._picks: dict[str, int] = {}  # of each replica, so far
        self._loads: dict[str, int] = {}  # requests that it said it had, less the picks when it was asked
        self._characters: dict[str, int] = {}  # given so far: who has fewer goes first among those with the same load
        self._silent: set[str] = set()  # those that did not answer the last time
        self._asked = -math.inf  # when, in seconds
        self._asking: set[asyncio.Task[None]] = set()

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> Any:
        candidates = {replica.replica_id.to_full_id_str(): replica for replica in candidate_replicas}
        if not candidates:
            return []
        self._ask_how_busy(candidates)
        text = self._text(pending_request)
        answering = candidates.keys() - self._silent or candidates.keys()
        loads = {name: self._picks.get(name, 0) + self._loads.get(name, 0) for name in answering}

        def least(names: Collection[str]) -> str:
            return min(names, key=lambda name: (loads[name], self._characters.get(name, 0), random.random()))

        chosen = least(answering)
        length, knowing = self._known.longest(text, answering)
        if length >= _LEAST_SHARE * len(text) > 0:
            best = least(knowing)
            if loads[best] - loads[chosen] <= self._most_ahead:
                chosen = best
        self._known.given(text, chosen)
        self._picks[chosen] = self._picks.get(chosen, 0) + 1
        self._characters[chosen] = self._characters.get(chosen, 0) + len(text)
        return [[candidates[chosen]]]

    def _text(self, request: Any) -> str:
        """What is looked at of the prompt; '' of a request without one, or of bytes that Serve's own proxy sends."""
        if request is None or not request.args:
            return ""
        request.routing_context.should_backoff = True  # Ray waits before it asks again for a replica with room
        try:
            return self._extract_text_from_request(request)[:LONGEST]
        except ValueError:
            return ""

    def _ask_how_busy(self, candidates: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._asked >= _STALE:  # what was said before a pause says nothing of now
            self._loads = {name: -picks for name, picks in self._picks.items()}
        if now - self._asked >= _ASK_EVERY and not self._asking:
            self._asked = now
            for name, replica in candidates.items():  # each by itself: one that is silent does not hold up the others
                task = asyncio.get_running_loop().create_task(self._ask(name, replica))
                self._asking.add(task)
                task.add_done_callback(self._asking.discard)

    async def _ask(self, name: str, replica: Any) -> None:
        before = self._picks.get(name, 0)
        [(_, load)] = await self._probe_queue_lens([replica], _PATIENCE)
        if name not in self._characters:  # it has gone meanwhile
            return
        if load is None:
            self._silent.add(name)
        else:
            self._silent.discard(name)
            self._loads[name] = load - before

    def update_replicas(self, replicas: Any) -> None:
        super(PrefixCacheAffinityRouter, self).update_replicas(replicas)  # past Ray's, which tells its actor
        names = {replica_id.to_full_id_str() for replica_id in self._replica_id_set}
        for gone in self._characters.keys() - names:
            self._forget(gone)
        least = min(self._characters.values(), default=0)
        for new in names - self._characters.keys():  # it does not have to catch up with what the others were given
            self._characters[new] = least

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super(PrefixCacheAffinityRouter, self).on_replica_actor_died(replica_id)
        self._forget(replica_id.to_full_id_str())

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        pass  # a pick has counted already

    def _forget(self, name: str) -> None:
        self._known.forget(name)
        self._silent.discard(name)
        for counted in (self._picks, self._loads, self._characters):
            counted.pop(name, None)
