"""Jobs on a real cluster: Ray's own command line, a job that is stopped and one whose driver dies, what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ft_ray.checkpoint import step_of
from ft_ray.storage import Store
from tests.distributed.cluster_nodes import Cluster, apart, finished, machines, tiny_project, trains_on, until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with machines() as made:
        yield made


@pytest.fixture(scope="module")
def project(nodes: Cluster) -> Path:
    return tiny_project(nodes, name="plain", registers=True, steps=20)


def test_ray_s_own_command_line_does_it(nodes: Cluster, project: Path) -> None:
    ray = str(Path(sys.executable).parent / "ray")
    command = ["job", "submit", "--address", nodes.address, "--working-dir", ".", "--", "ft-ray", "run", "recipe.yaml"]
    done = subprocess.run(
        [ray, *command], cwd=project, env=nodes.environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    manifest = Store(nodes.folder / "runs" / "plain").read_json("manifest.json")
    assert {name: stage["status"] for name, stage in manifest["stages"].items()} == dict.fromkeys(
        ["data_check", "train", "merge", "evaluate", "register"], "done"
    )
    assert manifest["stages"]["train"]["metrics"]["workers"] == 2
    refused = subprocess.run(
        [ray, *command], cwd=project, env={**nodes.environment, "RAY_AUTH_MODE": "disabled"}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert refused.returncode != 0 and "oken authentication is enabled" in refused.stderr


def driver(nodes: Cluster) -> list[int]:
    """The process of `ft-ray train` on the head, and what it was started through."""
    found = []
    for pid in nodes.pids("head"):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"ft_ray" in words and b"train" in words:
                found.append(pid)
    return found


def test_a_stopped_job_and_one_whose_driver_died_are_resumed_by_the_same_command(nodes: Cluster, project: Path) -> None:
    changes = ["name=long", "schedule.max_steps=100000", "schedule.epochs=100000", "evaluation.every=50000"]
    command = ["submit", "--address", nodes.address, "--json", "--", "train", "recipe.yaml", *changes]
    store, seen = Store(nodes.folder / "runs" / "long"), 0

    def newest() -> int:
        names = [n for n in store.list("checkpoints") if "-step-" in n]
        return max((step_of(n) for n in names if store.tree(f"checkpoints/{n}") is not None), default=0)

    for attempt, (suffix, end) in enumerate([("", "stop"), ("-2", "kill"), ("-3", "stop")]):
        process = nodes.command(*command, cwd=project)

        def trained(process: subprocess.Popen[str] = process, seen: int = seen) -> bool:
            assert process.poll() is None, finished(process)
            return newest() > seen

        try:
            until("a checkpoint", trained, 240)
            running = [j for j in nodes.ask("GET", "/api/jobs/").json() if j["status"] == "RUNNING"]
            (job,) = [j["submission_id"] for j in running if j["submission_id"]]
            assert job.startswith("ft-ray-train-long-") and job[len("ft-ray-train-long-") + 10 :] == suffix
            if end == "stop":
                stop = nodes.command("jobs", "stop", job, "--address", nodes.address, "--json", cwd=project)
                code, out, said = finished(stop)
                assert code == 0 and json.loads(out)["status"] == "STOPPED", said
            else:
                for pid in driver(nodes):
                    os.kill(pid, signal.SIGKILL)
            code, out, said = finished(process)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        assert code == json.loads(out)["exit_code"] == (130 if end == "stop" else 1), said
        assert ("going on from the checkpoint of step" in said) == bool(attempt)
        if end == "stop":
            record = store.read_json("manifest.json")["stages"]["train"]
            assert record["status"] == "stopped" and record["metrics"]["steps"] == newest() > seen, "stopped in step"
        seen = newest()
        until("the workers to end", lambda: not (trains_on(nodes, "one") or trains_on(nodes, "two")))
    for name in store.list("checkpoints"):
        if store.tree(f"checkpoints/{name}") is not None:
            assert store.verify(f"checkpoints/{name}") == []
    code, out, _ = finished(nodes.command("jobs", "list", "--address", nodes.address, "--json", cwd=project))
    rows = [(j["verb"], j["status"], j["exit_code"]) for j in json.loads(out)["jobs"] if j["run"] == "long"]
    assert code == 0 and rows == [("train", "STOPPED", 130), ("train", "FAILED", 1), ("train", "STOPPED", 130)]
    code, out, _ = finished(nodes.command("jobs", "logs", job, "--address", nodes.address, cwd=project))
    assert code == 130 and "going on from the checkpoint of step" in out


@pytest.mark.skipif(not apart(), reason="a folder of one node alone needs root and mount namespaces")
def test_storage_of_one_node_is_refused_before_anything_is_trained(nodes: Cluster, project: Path) -> None:
    command = ["submit", "--address", nodes.address, "--json", "--", "train", "recipe.yaml", "name=alone"]
    code, out, said = finished(nodes.command(*command, f"storage={nodes.folder}/private/runs", cwd=project))
    assert code == json.loads(out)["exit_code"] == 2
    message = " ".join(said.split())
    assert "is not the same on the node" in message and "set storage to an s3:// or gs:// address" in message
    assert not (nodes.folder / "private" / "runs" / "alone").exists()


def test_a_registry_of_one_node_is_refused_before_anything_is_trained(nodes: Cluster, project: Path) -> None:
    uri = f"tracking.uri=sqlite:///{nodes.folder}/mine.db"
    command = ["submit", "--address", nodes.address, "--json", "--", "run", "recipe.yaml", "name=filed", uri]
    code, out, said = finished(nodes.command(*command, cwd=project))
    assert code == json.loads(out)["exit_code"] == 2
    message = " ".join(said.split())
    assert "several nodes or may get them: set tracking.uri or MLFLOW_TRACKING_URI to an MLflow server" in message
    assert not (nodes.folder / "runs" / "filed").exists()
