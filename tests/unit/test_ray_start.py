"""The start of a private Ray: the raylet before the wait for the dashboard, and imports beside both."""

from __future__ import annotations

import threading
import types
from typing import Any

import pytest

from ft_ray import ray_start


def test_the_raylet_starts_before_the_dashboard_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(ray_start._node, "start_api_server", lambda node, **options: done.append((node, options)))
    monkeypatch.setattr(ray_start._node, "start_ray_processes", lambda node: done.append((node, "raylet")))
    before = ray_start._node.start_api_server, ray_start._node.start_ray_processes
    node = types.SimpleNamespace()
    with ray_start.raylet_first():
        ray_start._node.start_api_server(node, include_dashboard=True, raise_on_failure=True)  # as Node does, in turn
        assert done == []
        ray_start._node.start_ray_processes(node)
    assert done == [(node, "raylet"), (node, {"include_dashboard": True, "raise_on_failure": True})]
    assert (ray_start._node.start_api_server, ray_start._node.start_ray_processes) == before


def test_what_is_done_beside_is_over_afterwards_and_its_errors_are_not_ours() -> None:
    inside, seen = threading.Event(), []

    def work() -> None:
        seen.append(inside.wait(10))
        raise ImportError("whoever imports it says so")

    with ray_start.beside(work):
        inside.set()
    assert seen == [True]
    with ray_start.beside(None):
        assert all(thread.name != "ft-ray-imports" for thread in threading.enumerate())


def test_an_error_is_not_kept_waiting_for_what_is_done_beside() -> None:
    over = threading.Event()
    with pytest.raises(RuntimeError, match="no Ray"), ray_start.beside(lambda: over.wait(60)):
        raise RuntimeError("no Ray")
    over.set()
