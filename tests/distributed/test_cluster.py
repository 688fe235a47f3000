"""The whole path on a real cluster, through the job API only: head without work, two workers, token, Redis, faults.

Every node is a set of processes of its own on this machine (`cluster_nodes`); nothing here imports Ray into the test.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import yaml

from ft_ray.storage import Store
from tests import tiny
from tests.distributed.cluster_nodes import Cluster, cluster, free_ports, until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

# Set on the nodes and in the client's shell, as people have them; no job, log or manifest may hold one.
PLANTED = {
    "HF_TOKEN": "hf_" + "Qx7Lm2Vb9Tz4" * 3,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI-planted-bPxRfiCYzzKEY7",
    "OPENAI_API_KEY": "sk-proj-" + "Kd83mPq0Zr5w" * 4,
}


class Cable:
    """A TCP connection to the head that a test can pull out and put back."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        self._lock = threading.Lock()
        self._out = threading.Event()
        self.turned_away = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._out.is_set():
                self.turned_away += 1
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            with self._lock:
                self._ends += [near, far]
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            end.close()

    def pull(self) -> None:
        self._out.set()
        with self._lock:
            ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def plug(self) -> None:
        self._out.clear()

    def close(self) -> None:
        self.pull()
        self._listener.close()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed: the head's state has nowhere to outlive it")
    (port,) = free_ports(1)
    with cluster(**PLANTED, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}") as made:
        registry = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{made.folder}/mlflow.db",
            "--artifacts-destination", str(made.folder / "artifacts"),
        ]  # fmt: skip
        with open(made.folder / "mlflow.log", "w") as log:
            server = subprocess.Popen(registry, env=made._marked("mlflow"), stdout=log, stderr=log)
        made.start_redis()
        made.start_head(redis=True)
        made.start_worker("one")
        made.start_worker("two")
        until("three nodes", lambda: made.alive() == 3)

        def registered() -> bool:
            try:
                return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
            except requests.RequestException:
                return False

        until("the registry", registered)
        yield made
        server.terminate()
        server.wait(timeout=60)


@pytest.fixture(scope="module")
def project(nodes: Cluster) -> Path:
    """A folder as a person has it: a recipe, data beside it, and things that must not travel."""
    folder = nodes.folder / "project"
    folder.mkdir()
    model = tiny.build(nodes.folder / "model", hidden=128, heads=2)
    tiny.rows(folder / "rows.jsonl", 60)
    (folder / ".env").write_text(f"HF_TOKEN={PLANTED['HF_TOKEN']}\n")
    recipe = {
        "name": "across",
        "model": {"id": str(model)},
        "data": {"train": [{"path": "rows.jsonl"}], "split": {"validation": 0.1, "test": 0.1}},
        "lora": {"r": 4, "alpha": 8},
        "sequence": {"max_length": 64},
        "batch": {"global": 4},
        "optim": {"lr": 1e-3},
        "schedule": {"epochs": 40, "max_steps": 60},
        "precision": "fp32",
        "gradient_checkpointing": False,
        "evaluation": {"every": 30, "max_new_tokens": 4, "baselines": False, "max_rows": 4},
        "checkpoint": {"every": 10},
        "resources": {"workers": 2, "gpus": 0, "cpus": 2},
        "storage": str(nodes.folder / "runs"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def finished(process: subprocess.Popen[str], seconds: float = 400) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"not finished after {seconds} s:\n{out[-2000:]}\n{err[-6000:]}") from None
    return process.returncode, out, err


def trains_on(nodes: Cluster, name: str) -> bool:
    for pid in nodes.pids(name):
        try:
            if b"TrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
        except OSError:
            continue
    return False


def test_every_route_that_acts_asks_for_the_token(nodes: Cluster) -> None:
    for method, path in [
        ("POST", "/api/jobs/"), ("GET", "/api/jobs/"), ("POST", "/api/jobs/x/stop"), ("DELETE", "/api/jobs/x"),
        ("GET", "/api/jobs/x/logs"), ("GET", "/api/jobs/x/logs/tail"), ("PUT", "/api/packages/gcs/x.zip"),
        ("PUT", "/api/serve/applications/"), ("GET", "/api/serve/applications/"),
        ("DELETE", "/api/serve/applications/"), ("GET", "/api/v0/nodes"), ("GET", "/api/v0/actors"),
        ("GET", "/api/v0/logs"), ("GET", "/api/cluster_status"), ("GET", "/nodes?view=summary"),
    ]:  # fmt: skip
        assert nodes.ask(method, path, token=False, json={}).status_code == 401, (method, path)
        wrong = requests.request(method, nodes.address + path, headers={"Authorization": f"Bearer {'0' * 64}"}, json={})
        assert wrong.status_code in (401, 403), (method, path)
    for verb in (["jobs", "list"], ["jobs", "stop", "x"]):
        process = nodes.command(*verb, "--address", nodes.address, cwd=nodes.folder, RAY_AUTH_MODE="disabled")
        code, _, said = finished(process)
        assert code == 2 and "asks for the cluster's token: set RAY_AUTH_MODE=token" in said


def test_a_run_survives_a_lost_connection_and_a_lost_node(nodes: Cluster, project: Path) -> None:
    cable = Cable(nodes.dashboard_port)
    process = nodes.command(
        "submit", "--address", f"http://127.0.0.1:{cable.port}", "--json", "--", "run", "recipe.yaml", cwd=project
    )
    store = Store(nodes.folder / "runs" / "across")

    def committed() -> bool:
        assert process.poll() is None, finished(process)
        return any(store.tree(f"checkpoints/{name}") for name in store.list("checkpoints"))

    try:
        until("the first checkpoint", committed, 240)
        assert trains_on(nodes, "one") and trains_on(nodes, "two"), "one worker on each node"
        cable.pull()
        nodes.kill("two")
        nodes.start_worker("three")
        until("the client to try again", lambda: cable.turned_away, 60)
        cable.plug()
        code, out, said = finished(process)
    finally:
        if process.poll() is None:
            process.kill()
        cable.close()
    assert code == 0, said
    ended = json.loads(out)
    assert (ended["status"], ended["exit_code"], ended["new"]) == ("SUCCEEDED", 0, True)
    assert "connection lost" in said and said.count("Running entrypoint for job") == 1
    log = nodes.ask("GET", f"/api/jobs/{ended['job']}/logs").json()["logs"]
    assert said.count("✓ train") == log.count("✓ train") == 1, "no line is lost or told twice"
    assert "a worker was lost: started again" in log
    assert "merge waits for a node with 2 CPU" in log and "evaluate waits for a node with 2 CPU" in log
    manifest = store.read_json("manifest.json")
    assert {name: stage["status"] for name, stage in manifest["stages"].items()} == dict.fromkeys(
        ["data_check", "train", "merge", "evaluate", "register"], "done"
    )
    train = manifest["stages"]["train"]["metrics"]
    assert train["workers"] == 2 and train["steps"] == 60 and train["retries"] >= 1
    assert store.verify("merged") == []


def test_the_same_command_attaches_to_what_it_started(nodes: Cluster, project: Path) -> None:
    command = ["submit", "--address", nodes.address, "--json", "--", "run", "recipe.yaml"]
    code, out, said = finished(nodes.command(*command, cwd=project))
    assert code == 0 and json.loads(out)["new"] is False and "attached to ft-ray-run-across-" in said
    jobs = json.loads(finished(nodes.command("jobs", "list", "--address", nodes.address, "--json", cwd=project))[1])
    assert [j["verb"] for j in jobs["jobs"]] == ["run"], "no second job"
