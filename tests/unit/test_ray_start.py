"""The start of a private Ray: imports beside it, and a second chance for servers that were not up in time."""

from __future__ import annotations

import threading

import pytest

from ft_ray import ray_start


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


def test_servers_that_were_not_up_in_time_are_ended_and_started_again() -> None:
    late = Exception("The current node timed out during startup. This could happen because some of the raylet failed")
    for faults, done in (([], "i"), ([late], "ici"), ([late, late], "icic"), ([ValueError("no room")], "ic")):
        said, left = "", list(faults)

        def init(left: list[Exception] = left) -> None:
            nonlocal said
            said += "i"
            if left:
                raise left.pop()

        def clear() -> None:
            nonlocal said
            said += "c"

        if len(faults) == 2 or (faults and faults[0] is not late):
            with pytest.raises(type(faults[0])):
                ray_start.begin(init, clear)
        else:
            ray_start.begin(init, clear)
        assert said == done
