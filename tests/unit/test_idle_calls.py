"""Calls that can wait."""

from __future__ import annotations

import asyncio
import time
from collections import deque

import pytest

from ft_ray import idle_calls
from ft_ray.idle_calls import later


@pytest.fixture(autouse=True)
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests' servers left behind is not made here."""
    monkeypatch.setattr(idle_calls, "_waiting", deque())
    monkeypatch.setattr(idle_calls, "_due_on", None)


def test_calls_are_made_in_turn_soon_and_a_few_at_a_time() -> None:
    made: list[int] = []
    at_once: list[int] = []

    async def check() -> None:
        for number in range(2000):
            later(made.append, number)
        assert made == []
        began = time.monotonic()
        while len(made) < 2000:
            known = len(made)
            await asyncio.sleep(0)
            at_once.append(len(made) - known)
            assert time.monotonic() - began < 10

    asyncio.run(check())
    assert made == list(range(2000))
    assert max(at_once) == 100, "a twentieth of them"


def test_without_a_loop_at_once_and_after_a_loop_has_ended_on_the_next() -> None:
    made: list[str] = []
    later(made.append, "at once")
    assert made == ["at once"]

    async def leave() -> None:
        later(made.append, "left")

    async def wait() -> None:
        later(made.append, "next")
        await asyncio.sleep(0.3)

    asyncio.run(leave())
    assert made == ["at once"]
    asyncio.run(wait())
    assert made == ["at once", "left", "next"]


def test_one_that_fails_keeps_no_other_from_being_made() -> None:
    made: list[str] = []

    def fail() -> None:
        raise RuntimeError("no")

    async def check() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        later(fail)
        later(made.append, "after it")
        await asyncio.sleep(0.3)

    asyncio.run(check())
    assert made == ["after it"] and not idle_calls._waiting


def test_a_second_loop_waits_for_nobody() -> None:
    made: list[str] = []

    async def check() -> None:
        later(made.append, "here")

        async def there() -> None:
            later(made.append, "there")

        await asyncio.to_thread(asyncio.run, there())
        assert made == ["there"]
        await asyncio.sleep(0.3)

    asyncio.run(check())
    assert made == ["there", "here"]
