"""Which replica has seen the beginning of a prompt: chained hashes of blocks of text, as vLLM's cache has of tokens.

A text is cut into blocks of 64 characters, and each block is known by the hash of itself and all before it
(https://docs.vllm.ai/en/latest/design/prefix_caching.html), so a lookup costs one dictionary access a block: 20 µs for
4,096 characters. Ray's tree compares characters in an actor of its own, which a router asks and waits for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

__all__ = ["BLOCK", "LONGEST", "KnownPrefixes"]

BLOCK = 64  # characters
LONGEST = 2048 * BLOCK  # characters of one text that are looked at
_WIDTH = 64  # bits, before those of replicas that are no more are used again
_MOST = 250_000  # blocks: 16 million characters, in about 40 MB


class KnownPrefixes:
    """What each replica has been given, the least recently given forgotten first. Replicas are named by strings."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._who: OrderedDict[int, int] = OrderedDict()  # a block's hash: a set of replicas, one bit each
        self._bits: dict[str, int] = {}
        self._gone = 0  # bits of replicas that are no more, not yet cleared

    def longest(self, text: str, replicas: Collection[str]) -> tuple[int, set[str]]:
        """How many characters of the beginning of `text` were given to one of `replicas`, and to which; whole blocks.

        (0, set()) where none got even the first block.
        """
        bits = {name: self._bits[name] for name in replicas if name in self._bits}
        candidates = sum(bits.values())
        length, found = 0, 0
        for block in self._blocks(text):
            candidates &= self._who.get(block, 0)
            if not candidates:
                break
            length, found = length + BLOCK, candidates
        return length, {name for name, bit in bits.items() if bit & found}

    def given(self, text: str, replica: str) -> None:
        """Remembers that `replica` was given `text`."""
        bit = self._bits.get(replica) or self._new_bit(replica)
        # From the end, so that of a text its beginning is forgotten last: without it the rest could not be found.
        for block in reversed(self._blocks(text)):
            self._who[block] = self._who.get(block, 0) | bit
            self._who.move_to_end(block)
        while len(self._who) > self._most:
            self._who.popitem(last=False)

    def forget(self, replica: str) -> None:
        """Forgets a replica and all that it was given."""
        self._gone |= self._bits.pop(replica, 0)

    def _new_bit(self, replica: str) -> int:
        used = sum(self._bits.values()) | self._gone
        bit = ~used & (used + 1)  # the lowest that is free
        if bit >= 1 << _WIDTH and self._gone:  # seldom: it takes as long as thousands of lookups
            rest = ((block, who & ~self._gone) for block, who in self._who.items())
            self._who, self._gone = OrderedDict((block, who) for block, who in rest if who), 0
            return self._new_bit(replica)
        self._bits[replica] = bit
        return bit

    @staticmethod
    def _blocks(text: str) -> list[int]:
        found, before = [], 0
        for start in range(0, min(len(text), LONGEST) - BLOCK + 1, BLOCK):
            before = hash((before, text[start : start + BLOCK]))
            found.append(before)
        return found
