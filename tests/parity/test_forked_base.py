"""Adapters of one base in several processes: the same numbers as in one, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from ft_ray.errors import InputError
from ft_ray.forked_base import ForkedBase
from ft_ray.shared_base import SharedBase
from tests import tiny
from tests.parity.test_shared_base import CONFIGS, DATA, STEPS, alone, batch, load

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def forked(folder: Path) -> Iterator[ForkedBase]:
    made = ForkedBase(SharedBase(load(folder)), 3)
    children = [psutil.Process(lane._process.pid) for lane in made._lanes]
    assert len(children) == 2 and all(child.is_running() for child in children)
    yield made
    made.close()
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_an_adapter_trains_as_alone_whichever_process_it_is_in(forked: ForkedBase, folder: Path) -> None:
    names = list(CONFIGS)[:5]
    states, results = {}, {name: [] for name in names}  # type: ignore[var-annotated]
    for name in names:
        forked.attach(name, CONFIGS[name])
    for step in range(STEPS):
        if step == 4:  # one pauses, leaves, and goes on from its state, in another process perhaps
            states["t1"] = forked.snapshot("t1")()
            forked.detach("t1")
        if step == 6:
            forked.attach("t1", CONFIGS["t1"], state=states["t1"])
        active = [name for name in names if name != "t1" or not 4 <= step < 6]
        for name, result in forked.step({name: DATA[name][len(results[name])] for name in active}).items():
            results[name].append(result)
    for step in (STEPS - 2, STEPS - 1):
        results["t1"].append(forked.step({"t1": DATA["t1"][step]})["t1"])
    held_out = forked.evaluate({name: batch(7) for name in names})
    for name in names:
        expected, _, state = alone(load(folder), name)
        assert results[name] == expected, name
        found = forked.snapshot(name)()
        assert found["meta"] == state["meta"]
        assert all(torch.equal(found["tensors"][key], tensor) for key, tensor in state["tensors"].items())
        single = SharedBase(load(folder))
        single.attach(name, CONFIGS[name], state=state)
        assert single.evaluate({name: batch(7)})[name] == held_out[name]
    stats = forked.stats
    assert stats.forwards == STEPS + 2 and stats.mean_k == pytest.approx(5 * STEPS / (STEPS + 2))
    assert stats.trained_tokens == sum(r.tokens for each in results.values() for r in each)
    assert 0 < stats.padding < 1 and stats.k_limit is None


def test_adapters_are_spread_and_a_mistake_is_told(forked: ForkedBase) -> None:
    for name in list(CONFIGS)[:4]:
        forked.attach(name, CONFIGS[name])
    assert sorted(forked._place.values()) == [0, 0, 1, 2]
    with pytest.raises(InputError, match="'t1' is attached already"):
        forked.attach("t1", CONFIGS["t1"])
    with pytest.raises(InputError, match="no adapter 'x' is attached"):
        forked.step({"t1": DATA["t1"][0], "x": batch(1)})
    assert forked.step({"t1": DATA["t1"][0]})["t1"].step == 2, "t1 was trained when x was refused"
    forked.detach("t2")
    forked.attach("t5", CONFIGS["t5"])
    assert forked._place["t5"] == 2, "where there was room"


def test_a_process_that_dies_is_an_error_and_not_a_hang(folder: Path) -> None:
    forked = ForkedBase(SharedBase(load(folder)), 2)
    for name in ("t0", "t1"):
        forked.attach(name, CONFIGS[name])
    os.kill(forked._lanes[0]._process.pid or 0, signal.SIGKILL)
    forked._lanes[0]._process.join(timeout=10)
    with pytest.raises(RuntimeError, match="a process of the sweep's engine has ended"):
        forked.step({name: DATA[name][0] for name in ("t0", "t1")})
    forked.close()


_KILLED = """
import sys, time, torch
torch.set_num_threads(1)
from pathlib import Path
from ft_ray.forked_base import ForkedBase
from ft_ray.shared_base import SharedBase
from tests.parity.test_shared_base import load
forked = ForkedBase(SharedBase(load(Path(sys.argv[1]))), 3)
print(*[lane._process.pid for lane in forked._lanes], flush=True)
time.sleep(600)
"""


def test_they_end_with_the_engine_however_it_ends(folder: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(folder)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert parent.stdout is not None
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    # Nothing that the parent has open is open in them but their own pipe and what was there before Python.
    assert all(len(child.net_connections("all")) <= 1 for child in children)
    parent.kill()
    parent.wait(timeout=30)
    deadline = time.monotonic() + 10
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < deadline, "a forked process outlived the engine"
        time.sleep(0.05)
