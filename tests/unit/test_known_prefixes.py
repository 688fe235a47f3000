"""Which replica has seen the beginning of a prompt."""

from __future__ import annotations

from ft_ray.known_prefixes import BLOCK, LONGEST, KnownPrefixes

BOTH = ("one", "two")


def text(*blocks: str) -> str:
    return "".join(block * BLOCK for block in blocks)


def test_the_longest_beginning_and_who_was_given_it() -> None:
    known = KnownPrefixes()
    assert known.longest(text("a"), BOTH) == (0, set())
    known.given(text("a", "b", "c"), "one")
    known.given(text("a", "b") + "?", "two")
    assert known.longest(text("a", "b", "c"), BOTH) == (3 * BLOCK, {"one"})
    assert known.longest(text("a", "b", "d"), BOTH) == (2 * BLOCK, {"one", "two"})
    assert known.longest(text("a", "b", "c"), ["two"]) == (2 * BLOCK, {"two"})
    assert known.longest(text("b", "c"), BOTH) == (0, set()), "a block counts where it stood"
    assert known.longest("a" * (BLOCK - 1), BOTH) == (0, set()), "whole blocks only"
    assert known.longest(text("a"), ["three"]) == (0, set())


def test_the_least_recently_given_is_forgotten_from_its_end() -> None:
    known = KnownPrefixes(most=4)
    known.given(text("a", "b", "c"), "one")
    known.given(text("d", "e"), "two")
    assert known.longest(text("a", "b", "c"), BOTH) == (2 * BLOCK, {"one"})
    known.given(text("a"), "one")  # used again
    known.given(text("f"), "two")
    assert known.longest(text("a", "b"), BOTH) == (BLOCK, {"one"})
    assert known.longest(text("d", "e"), BOTH) == (2 * BLOCK, {"two"})


def test_of_a_very_long_text_only_the_beginning_is_kept() -> None:
    known = KnownPrefixes()
    known.given("x" * 10_000_000, "one")
    assert known.longest("x" * 10_000_000, BOTH) == (LONGEST, {"one"})


def test_nothing_of_a_replica_that_is_gone_is_left_to_those_that_come() -> None:
    """Many more replicas than one number has bits, as with autoscaling over weeks."""
    known = KnownPrefixes()
    known.given(text("a", "b"), "stays")
    for number in range(500):
        name = f"replica {number}"
        assert known.longest(text("a", "c"), [name]) == (0, set())
        known.given(text("a", "c"), name)
        assert known.longest(text("a", "c"), ["stays", name]) == (2 * BLOCK, {name})
        known.forget(name)
        assert known.longest(text("a", "c"), ["stays", name]) == (BLOCK, {"stays"})
    assert max(known._who.values()) < 1 << 65
    known.forget("never seen")
