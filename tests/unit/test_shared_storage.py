"""Which storage and registry a cluster of several nodes may have, and what a node that joins later is asked.

Real nodes are in tests/distributed/test_joining_nodes.py; here the cluster is what `ray.nodes()` says of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config

from ft_ray import ray_session, recipe, shared_storage
from ft_ray.errors import InputError, StorageError
from ft_ray.shared_storage import Seen
from ft_ray.storage import Store

ROOT = Path(__file__).resolve().parents[2]
HEAD = {"NodeID": "head", "Alive": True, "Resources": {"memory": 1}, "NodeManagerAddress": "10.0.0.1", "Labels": {}}
WORKER = {**HEAD, "NodeID": "worker", "Resources": {"CPU": 4, "memory": 1}}
GROUP = {"ray.io/node-group": "head"}

Nodes = Callable[..., None]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Nodes:
    """Sets what the cluster has; this process is on the first node."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def be(*found: dict[str, Any], here: str = "head") -> None:
        monkeypatch.setattr(shared_storage.ray, "nodes", lambda: list(found))
        context = SimpleNamespace(get_node_id=lambda: here)
        monkeypatch.setattr(shared_storage.ray, "get_runtime_context", lambda: context)

    return be


def made(storage: str, **changes: Any) -> recipe.Recipe:
    return recipe.from_dict({
        "name": "x", "model": {"id": "a/b"}, "data": {"train": [{"path": "rows.jsonl"}]}, "storage": storage, **changes,
    })  # fmt: skip


def begin(one: recipe.Recipe, *, registry: bool = False) -> None:
    with shared_storage.check(one, lambda event: None, registry=registry):
        pass


@pytest.mark.parametrize("others", [[{**WORKER}], [{**HEAD, "NodeID": "2", "Labels": GROUP}]], ids=["is", "may come"])
def test_a_sqlite_registry_is_refused_where_a_second_node_is_or_may_come(
    nodes: Nodes, others: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes(HEAD)
    begin(made("s3://b/ft", tracking={"uri": "sqlite:////x.db"}), registry=True)
    nodes(HEAD, *others)
    monkeypatch.setattr(shared_storage, "_ask", lambda *a: None)
    with pytest.raises(InputError, match=r"mlflow.db is a file, and this cluster has several nodes or may get them: s"):
        begin(made("/mnt/nfs/runs"), registry=True)
    with pytest.raises(InputError, match="is a file"):
        begin(made("s3://b/ft", tracking={"uri": "sqlite:////mnt/nfs/mlflow.db"}), registry=True)
    begin(made("s3://b/ft", tracking={"uri": "sqlite:////x.db"}), registry=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    begin(made("s3://b/ft"), registry=True)


def test_a_folder_in_memory_or_in_the_container_is_refused_before_workers_are_waited_for(nodes: Nodes) -> None:
    nodes({**HEAD, "Labels": GROUP})
    with pytest.raises(InputError, match=r"storage /dev/shm/runs is on this machine alone \(tmpfs\).*still to come"):
        begin(made("/dev/shm/runs"))
    begin(made("s3://b/ft"))
    nodes(HEAD)
    begin(made("/dev/shm/runs"))


def test_a_driver_beside_the_only_worker_asks_the_head_for_a_folder(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(shared_storage, "_ask", lambda store, found, tell: asked.append([n["NodeID"] for n in found]))
    head = {**HEAD, "Labels": GROUP}
    nodes(head, WORKER, here="worker")
    begin(made("/mnt/nfs/runs"))
    begin(made("s3://b/ft"))  # an address is the same everywhere
    nodes(HEAD, WORKER, here="worker")
    begin(made("/mnt/nfs/runs"))  # and nobody else comes here
    nodes(head, WORKER, {**WORKER, "NodeID": "other"}, here="worker")
    begin(made("/mnt/nfs/runs"))
    nodes(head)
    begin(made("/mnt/nfs/runs"))
    assert asked == [["head"], ["other"]]


@pytest.mark.parametrize(("file", "grows"), [("single.yaml", False), ("onprem.yaml", True), ("aws.yaml", True)])
def test_a_cluster_of_the_launcher_gets_as_many_nodes_as_its_file_says(
    nodes: Nodes, tmp_path: Path, file: str, grows: bool
) -> None:
    """`ray up` marks the head, and leaves the prepared file there."""
    nodes(HEAD)
    assert not shared_storage.gets_nodes()
    nodes({**HEAD, "Labels": GROUP})
    assert shared_storage.gets_nodes(), "KubeRay marks its pods, and leaves no file"
    with pytest.MonkeyPatch.context() as private:
        private.setattr(ray_session, "_private_now", True)
        assert not shared_storage.gets_nodes()
    config = prepare_config(yaml.safe_load((ROOT / "cluster" / file).read_text()))
    (tmp_path / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(config))
    assert shared_storage.gets_nodes() is grows


def test_a_node_that_joins_later_reads_the_token_back_or_is_refused(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_storage, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(shared_storage.time, "sleep", lambda seconds: None)
    nodes(HEAD)
    store = Store(tmp_path / "runs" / "x")
    with (
        shared_storage.check(made(str(tmp_path / "runs"), tracking={"uri": "sqlite:////x.db"}), print, registry=True),
        shared_storage.seen_here(store) as seen,
    ):
        assert seen is not None and seen.registry == "sqlite:////x.db"
        seen.check()  # the node that wrote it
        nodes(HEAD, WORKER, here="worker")
        with pytest.raises(InputError, match=r"sqlite:////x.db is a file, and this cluster has several nodes"):
            seen.check()
        plain = Seen(seen.store, seen.name, seen.token, seen.node, "")
        plain.check()
        for other in (
            Seen(str(tmp_path / "elsewhere"), seen.name, seen.token, "head", ""),
            Seen(seen.store, seen.name, "another", "head", ""),
        ):
            with pytest.raises(InputError, match=r"is not the same on the node .*set storage to an s3://"):
                other.check()
        monkeypatch.setattr(Store, "read", lambda self, name: denied())
        with pytest.raises(StorageError, match="may not be read"):  # what storage says of itself is not covered up
            plain.check()
    monkeypatch.undo()
    assert not list((tmp_path / "runs").rglob(".seen-*")), "nothing is left behind"


def denied() -> bytes:
    raise StorageError("it may not be read.") from PermissionError()
