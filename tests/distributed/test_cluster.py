"""The whole path on a real cluster, through the job API only: head without work, two workers, token, Redis, faults.

Serving and asking are jobs as well; the endpoint's API key is a file on the nodes, as a mounted secret is.

Every node is a set of processes of its own on this machine (`cluster_nodes`); nothing here imports Ray into the test.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import requests
import yaml

from ft_ray.storage import Store
from tests.distributed.cluster_nodes import Cluster, finished, free_ports, machines, tiny_project, trains_on, until
from tests.serving_client import SteadyClient

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

PASSWORD = "hunter-" + "Zt5Wc8Ny" * 2
# Set on the nodes and in the client's shell, as people have them; no job, log or manifest may hold one.
PLANTED = {
    "HF_TOKEN": "hf_" + "Qx7Lm2Vb9Tz4" * 3,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI-planted-bPxRfiCYzzKEY7",
    "OPENAI_API_KEY": "sk-proj-" + "Kd83mPq0Zr5w" * 4,
    "HF_ENDPOINT": f"https://me:{PASSWORD}@mirror.example",
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
def nodes() -> Iterator[Cluster]:
    with machines(**PLANTED) as made:
        yield made


@pytest.fixture(scope="module")
def project(nodes: Cluster) -> Path:
    """A folder as a person has it: a recipe, data beside it, and things that must not travel."""
    folder = tiny_project(nodes, name="across", registers=True)
    (folder / ".env").write_text(f"HF_TOKEN={PLANTED['HF_TOKEN']}\n")
    return folder


# Pages and health checks, which tell nothing and change nothing; the browser's log-in, which takes a token.
OPEN = {
    "/", "/favicon.ico", "/api/authentication_mode", "/api/authenticate", "/api/healthz", "/api/gcs_healthz",
    "/api/local_raylet_healthz",
}  # fmt: skip


def routes(where: str) -> list[tuple[str, str]]:
    """(method, path) of every route of Ray's dashboard (`head`) or of the agent on each node, from Ray's own source."""
    folder, found = Path(find_spec("ray").submodule_search_locations[0]) / "dashboard", []  # type: ignore
    for file in sorted(folder.rglob("*.py")):
        if ("agent" in file.stem) == (where == "agent") and "tests" not in file.parts:
            declared = re.findall(r"@routes\.(get|post|put|delete)\(\s*\"([^\"]+)\"", file.read_text(encoding="utf-8"))
            found += [(method.upper(), re.sub(r"\{\w+\}", "x", path)) for method, path in declared]
    return sorted({r for r in found if r[1] not in OPEN})


def test_every_route_but_health_asks_for_the_token(nodes: Cluster) -> None:
    head, agent = routes("head"), routes("agent")
    assert len(head) > 50 and {("POST", "/api/jobs/"), ("PUT", "/api/serve/applications/")} < set(head)
    assert ("POST", "/api/job_agent/jobs/") in agent
    asked = [(nodes.address, *route) for route in head]
    asked += [(f"http://127.0.0.1:{port}", *route) for port in nodes.agents.values() for route in agent]
    for address, method, path in asked:
        answer = requests.request(method, address + path, json={}, timeout=60)
        assert answer.status_code == 401, (method, path, answer.status_code)
        wrong = requests.request(method, address + path, json={}, headers={"Authorization": f"Bearer {'0' * 64}"})
        assert wrong.status_code in (401, 403), (method, path, wrong.status_code)
    code = f"import ray; ray.init('{nodes.ip}:{nodes.gcs_port}')"
    joined = subprocess.run(
        [sys.executable, "-c", code], env={**nodes.environment, "RAY_AUTH_MODE": "disabled"}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert joined.returncode != 0 and "uthenticat" in joined.stderr, "nor does the GCS take a driver without it"
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
        nodes.start_worker("three", wrapped=nodes.own())
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
    assert "starting again from the last checkpoint (retry 1, " in log
    assert "merge waits for a node with 2 CPU" in log and "evaluate waits for a node with 2 CPU" in log
    manifest = store.read_json("manifest.json")
    assert {name: stage["status"] for name, stage in manifest["stages"].items()} == dict.fromkeys(
        ["data_check", "train", "merge", "evaluate", "register"], "done"
    )
    train = manifest["stages"]["train"]["metrics"]
    assert train["workers"] == 2 and train["steps"] == 150 and train["retries"] >= 1
    assert store.verify("merged") == []


def test_the_same_command_attaches_to_what_it_started(nodes: Cluster, project: Path) -> None:
    command = ["submit", "--address", nodes.address, "--json", "--", "run", "recipe.yaml"]
    code, out, said = finished(nodes.command(*command, cwd=project))
    assert code == 0 and json.loads(out)["new"] is False and "attached to ft-ray-run-across-" in said
    jobs = json.loads(finished(nodes.command("jobs", "list", "--address", nodes.address, "--json", cwd=project))[1])
    assert [j["verb"] for j in jobs["jobs"]] == ["run"], "no second job"


SPACE = """
search: {lora.r: {choice: [2, 4]}, optim.lr: {choice: [0.001, 0.003]}}
searcher: random
budget: {trials: 3}
confirm: {top: 1, seeds: 2}
"""


def test_a_sweep_ends_with_a_registered_winner(nodes: Cluster, project: Path) -> None:
    """Its engine, the confirmation and the winner's training and merge are on workers with caches of their own."""
    (project / "space.yaml").write_text(SPACE)
    recipe = yaml.safe_load((project / "recipe.yaml").read_text())
    recipe |= {"name": "swept", "schedule": {"epochs": 100, "max_steps": 24}}
    recipe["evaluation"] |= {"every": 12}
    (project / "swept.yaml").write_text(yaml.safe_dump(recipe))
    command = ["submit", "--address", nodes.address, "--json", "--", "sweep", "swept.yaml", "--space", "space.yaml"]
    code, _, said = finished(nodes.command(*command, cwd=project))
    assert code == 0, said
    store = Store(nodes.folder / "runs" / "swept")
    result, analysis = store.read_json("sweep/sweep.json"), store.read_json("sweep/analysis.json")
    assert [t["status"] for t in result["trials"]] == ["done"] * 3 and result["shared"]
    assert len(analysis["confirmation"]["comparisons"]) == 1
    manifest = store.read_json("manifest.json")
    assert {name: stage["status"] for name, stage in manifest["stages"].items()} == dict.fromkeys(
        ["data_check", "sweep", "train", "merge", "evaluate", "register"], "done"
    )
    assert manifest["lineage"]["sweep"]["matches"] and manifest["stages"]["train"]["metrics"]["workers"] == 2
    assert store.verify("merged") == []


ASK = """
import json, sys, urllib.error, urllib.request
url, model, key_file = sys.argv[1:]
body = {"model": model, "messages": [{"role": "user", "content": "1 add 2 3 4"}], "max_tokens": 4}
def ask(**headers):
    headers["content-type"] = "application/json"
    request = urllib.request.Request(url + "/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.load(reply)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        return error.code, ""
status, answer = ask(authorization="Bearer " + open(key_file).read())
print("asked", json.dumps([ask()[0], ask(authorization="Bearer ft-other")[0], status, answer]))
"""


def test_the_winner_is_promoted_served_and_asked(nodes: Cluster, project: Path) -> None:
    submit = ("submit", "--address", nodes.address, "--json", "--")
    code, out, said = finished(nodes.command(*submit, "promote", "swept.yaml", cwd=project))
    assert code == 0, said
    keys = str(nodes.folder / "keys.json")
    code, out, said = finished(nodes.command("keys", "issue", keys, "first-client", cwd=project))
    assert code == 0, said
    nodes.key = out.strip()
    key_file = nodes.folder / "client_key"
    key_file.touch(mode=0o600)
    key_file.write_text(nodes.key)
    code, out, said = finished(nodes.command("serve", "swept.yaml", "--keys", keys, "--print-config", cwd=project))
    assert code == 0, said
    config = yaml.safe_load(out)
    (port,) = free_ports(1)
    # One machine plays all nodes: only one of them can have the port.
    config |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}}
    config["applications"][0]["args"]["engine"] |= {
        "device": "cpu", "max_length": 128, "max_sequences": 8, "kv_cache_gib": 0.1, "threads": 1,
    }  # fmt: skip
    file = project / "service.yaml"
    for model, ends in (("swept@9", 1), ("swept@champion", 0)):
        config["applications"][0]["args"]["model"] = model
        file.write_text(yaml.safe_dump(config))
        code, out, said = finished(nodes.command(*submit, "deploy", file.name, cwd=project))
        assert code == ends, said
        told = "swept did not start: ft_ray.errors.InputError: " if ends else "swept is up; Serve listens on 127.0.0.1:"
        assert told in " ".join(said.split()), said
    nodes.served = f"http://127.0.0.1:{port}/v1"

    asking = nodes.folder / "asking"
    asking.mkdir()
    (asking / "ask.py").write_text(ASK)
    ray = str(Path(sys.executable).parent / "ray")
    command = ["job", "submit", "--address", nodes.address, "--working-dir", ".", "--", "python", "ask.py"]
    done = subprocess.run(
        [ray, *command, nodes.served, "swept", str(key_file)], cwd=asking, env=nodes.environment, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("asked ")]
    without, wrong, status, answer = json.loads(line.removeprefix("asked "))
    assert (without, wrong, status) == (401, 401, 200) and answer == asked(nodes)


def asked(nodes: Cluster) -> str:
    question = {"model": "swept", "messages": [{"role": "user", "content": "1 add 2 3 4"}], "max_tokens": 4}
    headers = {"Authorization": f"Bearer {nodes.key}"}
    answer = requests.post(f"{nodes.served}/chat/completions", json=question, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.mark.timeout(900)  # a run, three promotions and deployments, each a process of its own
def test_versions_change_on_the_endpoint_that_a_file_started(nodes: Cluster, project: Path) -> None:
    """A deployed file takes a new champion up; a promotion in a job changes the live endpoint and fails no request."""
    submit = ("submit", "--address", nodes.address, "--json", "--")
    fresh = ("--fresh", "optim.lr=0.002", "resources.workers=1")  # the endpoint has one of the nodes' four CPUs
    code, _, said = finished(nodes.command(*submit, "run", "swept.yaml", *fresh, cwd=project))
    assert code == 0, said

    def version() -> str:
        body = {"model": "swept", "messages": [{"role": "user", "content": "1 add 2"}], "max_tokens": 1}
        headers = {"Authorization": f"Bearer {nodes.key}"}
        answer = requests.post(f"{nodes.served}/chat/completions", json=body, headers=headers, timeout=120)
        return f"{answer.headers['x-model-version']}" if answer.status_code == 200 else answer.text

    storage = str(nodes.folder / "runs")
    assert version() == "1"
    # Where no Ray is named only the registry changes; the file is the same as before, and means another version.
    code, _, said = finished(nodes.command("promote", "swept", "2", "--force", "--storage", storage, cwd=project))
    assert code == 0 and version() == "1", said
    code, _, said = finished(nodes.command(*submit, "deploy", "service.yaml", cwd=project))
    assert code == 0 and version() == "2", said

    with SteadyClient(nodes.served.removesuffix("/v1"), "swept", threads=2, tokens=4, key=nodes.key) as client:
        client.wait("2")
        promote = nodes.command(*submit, "promote", "swept", "1", "--force", "--storage", storage, cwd=project)
        code, _, said = finished(promote)
        assert code == 0 and "The live endpoint went from version 2 to 1" in " ".join(said.split()), said
        client.wait("1")
        client.stop()
    assert client.failed() == {} and sum(client.outcomes.values()) == client.sent
    assert version() == "1" and set(client.versions) == {"1", "2"}
    listed = json.loads(finished(nodes.command("jobs", "list", "--address", nodes.address, "--json", cwd=project))[1])
    assert listed["jobs"][-1]["verb"] == "promote" and listed["jobs"][-1]["exit_code"] == 0


COUNTER = """
import os, sys, ray
ray.init(namespace="kept")
@ray.remote(num_cpus=0.1, lifetime="detached", name="counter", get_if_exists=True)
class Counter:
    def __init__(self): self.count = 0
    def more(self):
        self.count += 1
        return self.count, os.getpid()
print("counted", *ray.get(Counter.remote().more.remote()))
"""


def test_the_head_s_state_outlives_its_gcs(nodes: Cluster) -> None:
    """GCS is killed and started again with the same command line, as a supervisor does; its state is in Redis."""

    def count(job: str) -> list[str]:
        body = {"entrypoint": "python -c '" + COUNTER + "'", "submission_id": job}
        assert nodes.ask("POST", "/api/jobs/", json=body).status_code == 200
        ended = until(job, lambda: status(job) in ("SUCCEEDED", "FAILED") and status(job))
        log = nodes.ask("GET", f"/api/jobs/{job}/logs").json()["logs"]
        assert ended == "SUCCEEDED", log
        return next(line.split()[1:] for line in log.splitlines() if line.startswith("counted"))

    def status(job: str) -> str:
        try:
            return str(nodes.ask("GET", f"/api/jobs/{job}").json()["status"])
        except (requests.RequestException, ValueError, KeyError):
            return ""

    first = count("count-1")
    before, answer = nodes.alive(), asked(nodes)
    (gcs,) = [p for p in nodes.pids("head") if b"gcs_server" in Path(f"/proc/{p}/cmdline").read_bytes().split(b"\0")[0]]
    command = Path(f"/proc/{gcs}/cmdline").read_text().split("\0")[:-1]
    entries = Path(f"/proc/{gcs}/environ").read_bytes().decode().split("\0")
    environment = dict(entry.split("=", 1) for entry in entries if "=" in entry)
    os.kill(gcs, signal.SIGKILL)
    assert asked(nodes) == answer, "the endpoint does not need the GCS to answer"

    def start() -> None:
        nodes.children.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )

    def back() -> bool:
        if nodes.children[-1].poll() is not None:
            start()
        return nodes.answers("/api/v0/nodes") and nodes.alive() == before

    start()
    try:
        until("the head to be back", back, 240)
    except AssertionError as error:
        logs = sorted((nodes.folder / "head").rglob("gcs_server.*"))
        tail = "".join(f"\n{log.name}: {log.read_text()[-2000:]}" for log in logs if not log.is_symlink())
        raise AssertionError(f"{error}, GCS ended with {nodes.children[-1].poll()}{tail}") from None
    second = count("count-2")
    assert second[1] == first[1], "the same process"
    assert (first[0], second[0]) == ("1", "2"), "with what it had in memory"
    assert asked(nodes) == answer
    known = {j["submission_id"] for j in nodes.ask("GET", "/api/jobs/").json()}
    assert any((k or "").startswith("ft-ray-run-across") for k in known), "earlier jobs are still listed"


def test_no_planted_secret_is_in_jobs_logs_or_manifests(nodes: Cluster, project: Path) -> None:
    recipe = yaml.safe_load((project / "recipe.yaml").read_text())
    recipe |= {"model": {"id": "acme/base"}, "data": {"train": [{"path": "s3://acme/rows.jsonl"}]}}
    (project / "pods.yaml").write_text(yaml.safe_dump({**recipe, "storage": "s3://acme/ft"}))
    code, out, said = finished(nodes.command("k8s", "render", "pods.yaml", cwd=project))
    assert code == 0, said
    for secret in (*PLANTED.values(), f"http://me:{PASSWORD}@mlflow:5000"):
        if secret == PLANTED["AWS_SECRET_ACCESS_KEY"]:
            continue  # forty letters that look like any other text
        planted = nodes.command("k8s", "render", "pods.yaml", f"data.system=use {secret}", cwd=project)
        code, *told = finished(planted)
        assert code == 2 and "data.system holds a secret" in told[1], told
        assert not [text for text in told if secret in text or PASSWORD in text], "nor is it said"
    places = {"the rendered manifest": out.encode(), "/api/jobs/": nodes.ask("GET", "/api/jobs/").content}
    for job in nodes.ask("GET", "/api/jobs/").json():
        if job["submission_id"]:
            places[job["submission_id"]] = nodes.ask("GET", f"/api/jobs/{job['submission_id']}/logs").content
    for root in ("runs", *nodes.nodes):  # run folders, and all of Ray's logs on every node
        for path in (nodes.folder / root).rglob("*"):
            with contextlib.suppress(OSError):  # a log that was rotated away meanwhile
                if path.is_file() and not path.is_symlink() and path.stat().st_size < 2**24:
                    places[str(path.relative_to(nodes.folder))] = path.read_bytes()
    assert len(places) > 60 and any("manifest.json" in p for p in places) and any("/logs/" in p for p in places)
    for secret in (*PLANTED.values(), PASSWORD, nodes.token, nodes.key):
        assert [place for place, content in places.items() if secret.encode() in content] == [], secret[:6]
