"""A node that joins a real Ray after the run has begun: refused before it trains or merges where it sees other things.

The head does no work and no worker is up when a job starts, as on a cluster with an autoscaler.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ft_ray.storage import Store
from tests.distributed.cluster_nodes import Cluster, apart, cluster, finished, tiny_project, until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
ALONE = "a folder of one node alone needs root and mount namespaces"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with cluster() as made:
        made.start_head()
        for name in ("cache", "private"):
            (made.folder / name).mkdir()
        yield made


@pytest.fixture(scope="module")
def project(nodes: Cluster) -> Path:
    return tiny_project(nodes, name="joined", registers=False, steps=20, workers=1)


def submitted(nodes: Cluster, project: Path, verb: str, *changes: str) -> subprocess.Popen[str]:
    return nodes.command("submit", "--address", nodes.address, "--json", "--", verb, "recipe.yaml", *changes,
                         cwd=project)  # fmt: skip


def log(nodes: Cluster, run: str, verb: str) -> str:
    for job in nodes.ask("GET", "/api/jobs/").json():
        if (job["metadata"] or {}).get("run") == run and job["metadata"]["verb"] == verb:
            found = nodes.ask("GET", f"/api/jobs/{job['submission_id']}/logs")
            return str(found.json()["logs"]) if found.status_code == 200 else ""
    return ""


def refused(process: subprocess.Popen[str]) -> str:
    code, out, said = finished(process)
    assert code == json.loads(out)["exit_code"] == 2, said
    return " ".join(said.split())


@pytest.mark.skipif(not apart(), reason=ALONE)
def test_what_a_joining_node_does_not_see_is_refused_before_it_trains(nodes: Cluster, project: Path) -> None:
    alone = submitted(nodes, project, "train", "name=alone", f"storage={nodes.folder}/private/runs")
    filed = submitted(nodes, project, "run", "name=filed", f"tracking.uri=sqlite:///{nodes.folder}/mine.db")
    for run, verb in (("alone", "train"), ("filed", "run")):
        until(f"{run} to wait", lambda r=run, v=verb: "waiting up to" in log(nodes, r, v))  # type: ignore[misc]
    nodes.start_worker("apart", wrapped=nodes.own())
    message = refused(alone)
    assert "is not the same on the node" in message and "set storage to an s3:// or gs:// address" in message
    message = refused(filed)
    assert "is a file, and this cluster has several nodes or may get them" in message
    for store in (Store(nodes.folder / "private" / "runs" / "alone"), Store(nodes.folder / "runs" / "filed")):
        assert store.list("checkpoints") == [] and not [n for n in store.list() if n.startswith(".seen")]
    nodes.kill("apart")


@pytest.mark.skipif(not apart(), reason=ALONE)
def test_a_stage_is_refused_where_its_node_joined_after_the_training(nodes: Cluster, project: Path) -> None:
    changes = ("name=later", f"storage={nodes.folder}/private/runs")
    training = submitted(nodes, project, "train", *changes)
    until("later to wait", lambda: "waiting up to" in log(nodes, "later", "train"))
    nodes.start_worker("same")  # it sees the head's folder
    code, _, said = finished(training)
    assert code == 0, said
    held = nodes.ask("POST", "/api/jobs/", json={
        "entrypoint": "sleep 900", "submission_id": "holder", "entrypoint_num_cpus": 2,
    })  # fmt: skip
    assert held.status_code == 200
    until("its node to be busy", lambda: nodes.ask("GET", "/api/jobs/holder").json()["status"] == "RUNNING")
    merging = submitted(nodes, project, "merge", *changes)
    until("the merge to wait", lambda: "merge waits for a node with 2 CPU" in log(nodes, "later", "merge"))
    nodes.start_worker("apart", wrapped=nodes.own())
    message = refused(merging)
    assert "is not the same on the node" in message and "set storage to an s3:// or gs:// address" in message
    assert Store(nodes.folder / "private" / "runs" / "later").tree("merged") is None
    assert nodes.ask("POST", "/api/jobs/holder/stop").status_code == 200


def test_a_cluster_that_may_get_nodes_refuses_before_any_is_there() -> None:
    """The head is marked as Ray's launcher and KubeRay mark it; nothing else is up."""
    with cluster() as made:
        made.start_head(RAY_NODE_TYPE_NAME="head")
        project = tiny_project(made, name="early", registers=False, workers=1)
        message = refused(submitted(made, project, "run", f"tracking.uri=sqlite:///{made.folder}/mine.db"))
        assert "is a file, and this cluster has several nodes or may get them" in message
        message = refused(submitted(made, project, "train", f"storage=/dev/shm/{made.mark}"))
        assert "is on this machine alone (tmpfs), and this cluster's workers are still to come" in message
        assert not (made.folder / "runs").exists() and not Path(f"/dev/shm/{made.mark}").exists()
