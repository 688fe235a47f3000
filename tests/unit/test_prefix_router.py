"""Routing by prefix: what a request's prompt is as text, and that direct mode's picks count."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from ft_ray import prefix_router
from ft_ray.prefix_router import DirectPrefixRouter, PrefixRouter, text_of_ids

HELLO = "Hello, you"


def text(router: type[PrefixRouter], **body: Any) -> str:
    made = router.__new__(router)
    return made._extract_text_from_request(SimpleNamespace(args=[SimpleNamespace(**body)]))


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"prompt": HELLO}, HELLO),
        ({"prompt": [HELLO, " two"]}, f"{HELLO} two"),
        ({"prompt": [72, 105]}, "Hi"),
        ({"prompt": [[72], [105]]}, "Hi"),
        ({"messages": [{"role": "user", "content": HELLO}]}, HELLO),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": HELLO}]}]}, HELLO),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "\0"),
        ({"prompt": []}, "\0"),
    ],
)
def test_every_prompt_has_a_text_that_is_not_empty(body: dict[str, Any], found: str) -> None:
    assert text(PrefixRouter, **body) == text(DirectPrefixRouter, **body) == found


def test_token_ids_are_told_apart_and_make_a_text_that_can_be_sent() -> None:
    ids = [0, 0xD7FF, 0xD800, 0xDFFF, 0xE000, 262_143]
    assert len(set(text_of_ids(ids))) == len(ids) and text_of_ids(ids).encode("utf-8")
    assert text_of_ids([-1]) == text_of_ids([2**31]) == text_of_ids("text") == ""


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A DirectPrefixRouter without Ray: `queues` is what its replicas answer when they are asked how busy they are."""
    from ray.serve._private.common import DeploymentID, ReplicaID
    from ray.serve._private.request_router.request_router import RequestRouter

    ids = [ReplicaID(name, DeploymentID("Server", "app")) for name in ("one", "two")]
    made: Any = DirectPrefixRouter.__new__(DirectPrefixRouter)
    made.initialize_state(imbalanced_threshold=8)
    made.replicas, made.queues, made.slow = [SimpleNamespace(replica_id=i) for i in ids], {}, ""

    async def probe(replicas: list[Any], _: int) -> list[tuple[Any, int | None]]:
        answers = [made.queues.get(replica.replica_id.unique_id, 0) for replica in replicas]
        if made.slow in {replica.replica_id.unique_id for replica in replicas}:
            await asyncio.sleep(0.05)
        return list(zip(replicas, answers, strict=True))

    def update(self: Any, replicas: list[Any]) -> None:
        self._replica_id_set = {replica.replica_id for replica in replicas}

    monkeypatch.setattr(prefix_router, "_ASK_EVERY", 0)
    monkeypatch.setattr(DirectPrefixRouter, "_probe_queue_lens", lambda self, *given: probe(*given))
    monkeypatch.setattr(RequestRouter, "update_replicas", update)
    monkeypatch.setattr(RequestRouter, "on_replica_actor_died", lambda self, replica_id: None)
    made.update_replicas(made.replicas)
    return made


async def choose(router: Any, prompt: str | None) -> str:
    args = [b"{}"] if prompt is None else [SimpleNamespace(prompt=prompt)]
    request = SimpleNamespace(args=args, routing_context=SimpleNamespace(should_backoff=False))
    [[chosen]] = await router.choose_replicas(router.replicas, request)
    assert request.routing_context.should_backoff, "without it Ray asks again and again for a replica with room"
    for _ in range(4):  # the replicas answer how busy they are
        await asyncio.sleep(0)
    return str(chosen.replica_id.unique_id)


def pick(router: Any, prompt: str | None) -> str:
    return asyncio.run(choose(router, prompt))


def test_beginnings_that_differ_are_shared_out_and_alike_ones_stay_together(router: Any) -> None:
    letters = "abcdefgh"
    first = {letter: pick(router, letter * 200) for letter in letters}
    assert sorted(first.values()) == ["one"] * 4 + ["two"] * 4  # by what each was given: all have been answered
    again = {letter: pick(router, letter * 200 + " and more") for letter in reversed(letters)}
    assert again == first


def test_a_beginning_of_a_small_share_of_the_prompt_does_not_matter(router: Any) -> None:
    owner = pick(router, "a" * 640)
    other = {"one": "two", "two": "one"}[owner]
    assert pick(router, "a" * 640 + "b" * 5_760) == owner  # a tenth
    assert pick(router, "a" * 640 + "c" * 5_824) == other  # less, and the other one was given less


def test_a_busy_replica_is_relieved_of_what_it_knows(router: Any) -> None:
    owner = pick(router, "a" * 200)
    other = {"one": "two", "two": "one"}[owner]
    router.queues = {owner: 8}
    pick(router, "b" * 200)
    assert pick(router, "a" * 200) == owner, "by as many requests it may be ahead"
    router.queues = {owner: 40}
    pick(router, "c" * 200)
    assert {pick(router, "a" * 200) for _ in range(20)} == {other}
    for busier, free in ((owner, other), (other, owner)):  # both know it now
        router.queues = {busier: 1}
        pick(router, "d" * 200)
        assert pick(router, "a" * 200) == free


def test_picks_that_no_replica_has_told_of_yet_count_as_load(router: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def burst() -> list[str]:
        monkeypatch.setattr(prefix_router, "_ASK_EVERY", 1_000)
        return [await choose(router, "a" * 200) for _ in range(40)]

    got = asyncio.run(burst())
    assert got[:9] == got[:1] * 9 and 14 <= got.count(got[0]) <= 26  # it gets eight ahead, then both get the same


def test_a_request_without_a_prompt_goes_to_who_has_least_to_do(router: Any) -> None:
    router.queues = {"one": 3}
    pick(router, None)
    assert {pick(router, None) for _ in range(5)} == {"two"}


def test_a_replica_that_does_not_answer_is_passed_over_unless_none_does(router: Any) -> None:
    owner = pick(router, "a" * 200)
    other = {"one": "two", "two": "one"}[owner]
    router.queues = {owner: None}
    pick(router, "b" * 200)
    assert {pick(router, "a" * 200) for _ in range(3)} == {other}
    router.queues = {owner: None, other: None}
    pick(router, "b" * 200)
    assert {pick(router, letter * 200) for letter in "efgh"} == {owner, other}
    router.queues = {}
    pick(router, "b" * 200)
    assert pick(router, "c" * 200) in {owner, other} and not router._silent


def test_who_answers_late_has_the_picks_since_it_was_asked_as_load(router: Any) -> None:
    owner = pick(router, "a" * 200)
    router.slow, router.queues = owner, {owner: 5}
    [name] = [i.to_full_id_str() for i in router._replica_id_set if i.unique_id == owner]

    async def burst() -> int:
        assert {await choose(router, "a" * 200) for _ in range(4)} == {owner}  # it is asked after the first one
        await asyncio.sleep(0.1)
        return int(router._picks[name] + router._loads[name])

    assert asyncio.run(burst()) == 5 + 3


def test_what_was_said_before_a_pause_does_not_count(router: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    router.queues = {"one": 30}
    pick(router, "a" * 200)
    router.queues = {}
    monkeypatch.setattr(prefix_router, "_STALE", 0)
    assert {pick(router, letter * 200) for letter in "efg"} == {"one", "two"}


def test_replicas_come_and_go(router: Any) -> None:
    owner = pick(router, "a" * 200)
    other = {"one": "two", "two": "one"}[owner]
    [lost] = [replica for replica in router.replicas if replica.replica_id.unique_id == owner]
    router.on_replica_actor_died(lost.replica_id)
    router.replicas.remove(lost)
    router.update_replicas(router.replicas)
    assert pick(router, "a" * 200) == other
    router.replicas.append(lost)
    router.update_replicas(router.replicas)  # nothing is left of what it was given, and it does not get all for that
    assert pick(router, "a" * 200) == other
    shares = [pick(router, letter * 200) for letter in "efghijklmno"]
    assert (shares.count(owner), shares.count(other)) == (6, 5)


def test_without_replicas_there_is_nothing_to_choose(router: Any) -> None:
    assert asyncio.run(router.choose_replicas([], SimpleNamespace(args=[]))) == []


def test_the_router_of_each_mode_exists() -> None:
    from ft_ray.serve_app import _ROUTERS

    assert all(issubclass(getattr(prefix_router, name), PrefixRouter) for name in _ROUTERS.values())
