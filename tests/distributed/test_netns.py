"""Two hosts with addresses of their own, in network namespaces; one is cut off while it trains, and comes back.

A driver beside the only worker is here too: Ray takes nodes of one address for one host. By hand, as root:
`make test-faults TESTS=tests/distributed/test_netns.py`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ft_ray.run_lock import mount_of
from ft_ray.shared_storage import _OF_ONE_MACHINE
from ft_ray.storage import Store
from tests.distributed.cluster_nodes import cluster, finished, tiny_project, trains_on, until
from tests.distributed.netns import Hosts, two_hosts

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with two_hosts() as made:
        yield made


def test_a_host_that_is_cut_off_does_no_harm_when_it_returns(hosts: Hosts) -> None:
    with cluster(
        # Seen as lost after about half a minute of silence, even on a busy machine.
        RAY_health_check_period_ms="2000", RAY_health_check_timeout_ms="5000", RAY_health_check_failure_threshold="4",
    ) as nodes:  # fmt: skip
        nodes.start_head(ip=hosts.ip_a, host=hosts.a)
        nodes.start_worker("far", ip=hosts.ip_b, host=hosts.b)
        project = tiny_project(nodes, name="cut", registers=False, steps=200, workers=1)
        store = Store(nodes.folder / "runs" / "cut")
        command = ["submit", "--address", nodes.address, "--json", "--", "train", "recipe.yaml"]
        process = nodes.command(*command, cwd=project, host=hosts.a)

        def committed() -> bool:
            assert process.poll() is None, finished(process)
            return any(store.tree(f"checkpoints/{name}") for name in store.list("checkpoints"))

        try:
            until("the first checkpoint", committed, 240)
            assert trains_on(nodes, "far")
            hosts.cut()
            nodes.start_worker("near", ip=hosts.ip_a, host=hosts.a)
            code, _, said = finished(process)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        assert code == 0, said
        assert "starting again from the last checkpoint (retry 1, " in said
        train = store.read_json("manifest.json")["stages"]["train"]["metrics"]
        assert train["steps"] == 200 and train["retries"] >= 1
        assert [r["step"] for r in train["history"] if r["kind"] == "step"] == list(range(1, 201))
        before = contents(nodes.folder / "runs")

        assert nodes.pids("far"), "the host lives on by itself"
        hosts.mend()
        # Ray tells a node that it had given up to end; its workers end with it.
        until("the host to end", lambda: not raylet(nodes.pids("far")) and not trains_on(nodes, "far"))
        assert contents(nodes.folder / "runs") == before, "it wrote nothing when it was back"
        assert store.verify("adapter") == []
        for name in store.list("checkpoints"):
            if store.tree(f"checkpoints/{name}") is not None:
                assert store.verify(f"checkpoints/{name}") == []


def test_a_driver_beside_the_only_worker_asks_the_head_without_work(hosts: Hosts) -> None:
    """Its storage is on a disk of the worker's host, and the head is the only other node there is to ask."""
    with cluster() as nodes:
        for name in ("disk", "private"):
            (nodes.folder / name).mkdir()
        if (kind := mount_of(nodes.folder)[0]) in _OF_ONE_MACHINE:
            pytest.skip(f"the temporary folder is no disk here but {kind}, which is refused without asking")
        # Marked as Ray's launcher and KubeRay mark it: such a cluster may get more nodes.
        nodes.start_head(ip=hosts.ip_a, host=hosts.a, RAY_NODE_TYPE_NAME="head")
        own = f"mount --bind {nodes.folder}/disk {nodes.folder}/private"
        nodes.start_worker("alone", wrapped=own, ip=hosts.ip_b, host=hosts.b, drives=True)
        project = tiny_project(nodes, name="beside", registers=False, workers=1)
        command = ["submit", "--address", nodes.address, "--json", "--num-cpus", "1", "--", "train", "recipe.yaml"]
        command.append(f"storage={nodes.folder}/private/runs")
        code, out, said = finished(nodes.command(*command, cwd=project, host=hosts.a), 240)
        assert code == json.loads(out)["exit_code"] == 2, said
        message = " ".join(said.split())
        assert "is not the same on the node" in message and "set storage to an s3:// or gs:// address" in message
        left = [path for path in (nodes.folder / "disk").rglob("*") if path.is_file()]
        assert left == [], "nothing was begun where only the worker sees it"


def raylet(pids: list[int]) -> bool:
    for pid in pids:
        with contextlib.suppress(OSError):
            if b"raylet/raylet" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
    return False


def contents(folder: Path) -> dict[str, int]:
    """Every file with the time of its last change, nanoseconds."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}
