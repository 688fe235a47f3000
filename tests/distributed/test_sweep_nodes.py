"""One sweep over two machines: Ray nodes of one cluster, an engine on each, trials placed by free places."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ft_ray import ray_session
from ft_ray.storage import Store
from tests.distributed.fault_tools import Nodes
from tests.distributed.test_sweep import POINTS, assert_each_mark_once, recipe_of, run, space_of

pytestmark = [pytest.mark.faults, pytest.mark.heavy]


@pytest.fixture(autouse=True)
def session() -> Iterator[None]:
    nodes = Nodes()
    try:
        nodes.add("b")
        nodes.add("c")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in nodes.environment.items():
                patch.setenv(name, value)
            patch.setenv("RAY_ADDRESS", nodes.address)
            with ray_session._reread_auth(), ray_session.session():
                yield
    finally:
        nodes.close()


def test_two_engines_on_two_nodes_share_the_trials(tiny_model: Path, tmp_path: Path) -> None:
    result = run(recipe_of(tiny_model), space_of(engines=2), Store(tmp_path / "run"), points=POINTS[:6])
    assert len({engine.node for engine in result.engines}) == 2
    assert all(engine.trained_tokens > 0 for engine in result.engines)
    assert [trial.status for trial in result.trials] == ["done"] * 6
    for trial in result.trials:
        assert_each_mark_once(trial)
