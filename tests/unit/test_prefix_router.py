"""Routing by prefix: what a request's prompt is as text, and that direct mode's picks count."""

from __future__ import annotations

import asyncio
import itertools
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


class Tree:
    """Ray's tree of known beginnings in this process: whole texts, by who got them."""

    def __init__(self, tenants: list[str]) -> None:
        self.texts: dict[str, list[str]] = {tenant: [] for tenant in tenants}

    def insert(self, said: str, tenant: str, _: float) -> None:
        self.texts[tenant].append(said)

    def prefix_match(self, said: str, _: list[str]) -> tuple[str, list[str]]:
        def common(other: str) -> int:
            return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(said, other, strict=False)))

        best = {tenant: max(map(common, texts), default=0) for tenant, texts in self.texts.items()}
        most = max(best.values())
        return said[:most], [tenant for tenant, length in best.items() if length == most]

    def get_smallest_tenants(self) -> list[str]:
        sizes = {tenant: sum(map(len, texts)) for tenant, texts in self.texts.items()}
        return [tenant for tenant, size in sizes.items() if size == min(sizes.values())]


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A DirectPrefixRouter of two replicas whose queues are as told in `queues`, without Ray."""
    from ray.llm._internal.serve.routing_policies.prefix_aware import prefix_aware_router as rays
    from ray.serve._private.common import DeploymentID, ReplicaID

    ids = [ReplicaID(name, DeploymentID("Server", "app")) for name in ("one", "two")]
    tree = Tree([i.to_full_id_str() for i in ids])
    remote = SimpleNamespace(**{
        name: SimpleNamespace(remote=getattr(tree, name)) for name in ("insert", "prefix_match", "get_smallest_tenants")
    })
    monkeypatch.setattr(rays.ray, "get", lambda value: value)
    made: Any = DirectPrefixRouter.__new__(DirectPrefixRouter)
    replicas = [SimpleNamespace(replica_id=i, max_ongoing_requests=64) for i in ids]
    made.__dict__.update(
        _tree_actor=remote, _imbalanced_threshold=8, _match_rate_threshold=0.1,
        _replicas=dict(zip(ids, replicas, strict=True)),
        _use_replica_queue_len_cache=True, queues=dict.fromkeys(ids, 0), replicas=replicas, tree=tree,
    )  # fmt: skip
    made._replica_queue_len_cache = SimpleNamespace(get=lambda i: made.queues[i])
    monkeypatch.setattr(DirectPrefixRouter, "apply_locality_routing", lambda self, **_: set(self._replicas))
    return made


def pick(router: Any, prompt: str) -> str:
    request = SimpleNamespace(
        args=[SimpleNamespace(prompt=prompt)], metadata=SimpleNamespace(multiplexed_model_id=""),
        routing_context=SimpleNamespace(),
    )  # fmt: skip
    ranked = asyncio.run(router.choose_replicas(router.replicas, request))
    return str(ranked[0][0].replica_id.unique_id)


def test_beginnings_that_differ_are_shared_out_and_alike_ones_stay_together(router: Any) -> None:
    letters = "abcdefgh"
    first = {letter: pick(router, letter * 50) for letter in letters}
    assert sorted(first.values()) == ["one"] * 4 + ["two"] * 4  # by what each has been given, nothing having been sent
    again = {letter: pick(router, letter * 50 + " and more") for letter in reversed(letters)}
    assert again == first


def test_a_busy_replica_is_relieved_of_what_it_knows(router: Any) -> None:
    owner = pick(router, "a" * 50)
    busy = next(i for i in router.queues if i.unique_id == owner)
    router.queues[busy] = 40
    other = next(i.unique_id for i in router.queues if i != busy)
    assert {pick(router, "a" * 50) for _ in range(20)} == {other}


def test_the_router_of_each_mode_exists() -> None:
    from ft_ray.serve_app import _ROUTERS

    assert all(issubclass(getattr(prefix_router, name), PrefixRouter) for name in _ROUTERS.values())
