"""Every manifest in k8s/, as kustomize puts it together, against KubeRay's schemas and its operator's rules."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import ft_ray
from tests.declarative.kuberay import crd, crd_faults, kind_faults, operator_faults
from tests.declarative.manifests import (
    CLUSTER_SCOPED,
    FOLDER,
    LOADER,
    OVERLAYS,
    RAY,
    ROOT,
    key,
    load_all,
    of_kind,
    pods,
    ray_spec,
    resolve,
)

FILES = sorted(FOLDER.rglob("*.yaml"))


def test_all_are_seen() -> None:
    assert len(FILES) >= 20
    assert {p.name for p in (FOLDER / "overlays").iterdir()} == set(OVERLAYS)
    used = set()
    for file in FILES:
        if file.name == "kustomization.yaml":
            (config,) = load_all(file)
            names = [*config["resources"], *(p["path"] for p in config.get("patches", []))]
            used |= {(file.parent / n).resolve() for n in names} | {file}
    assert [p.relative_to(ROOT).as_posix() for p in FILES if p not in used] == [], "no kustomization uses these"
    others = {p.name for p in FOLDER.rglob("*") if p.is_file() and p.suffix != ".yaml"}
    assert others == {"Dockerfile", "Dockerfile.dockerignore", "endpoint.json"}


def test_no_panel_makes_one_line_of_two_models_or_versions() -> None:
    """That the metrics and their labels exist on a live endpoint is asked in tests/e2e/test_serving.py."""
    dashboard = json.loads((FOLDER / "dashboards" / "endpoint.json").read_text())
    # By which label a metric tells models apart; Serve knows applications alone, which no filter of models names.
    told_by = {"ray_ft_ray": "model", "ray_vllm": "model_name", "ray_serve": "application"}
    seen = set()
    for target in [target for panel in dashboard["panels"] for target in panel["targets"]]:
        query, shown = target["expr"], set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        for name, selector in re.findall(r"\b(ray_\w+)({[^}]*})?", query):
            (label,) = {label for start, label in told_by.items() if name.startswith(start)}
            if name != "ray_ft_ray_replica_info":  # joined to what is filtered
                assert label == "application" or re.search(rf'\b{label}=~"\$model\|?"', selector), query
            seen.add(label)
        groups = [set(labels.split(", ")) for labels in re.findall(r"\b(?:sum|max)(?: by \(([^)]*)\))? \(", query)]
        assert len(groups) == len(re.findall(r"\b(?:sum|max|min|avg|count)\b", query)) >= 1, query
        for labels in groups:
            assert labels & set(told_by.values()) and ("version" not in labels or "model" in labels), query
        assert shown == groups[0] - {"le"}, f"lines of one name: {query}"
        joined = re.findall(r"group_left \(([^)]*)\)", query)
        # vLLM does not know the version: each of its figures is joined to the replica that tells it.
        assert joined == ["model, version"] * query.count("ray_vllm_"), query
        assert query.count("ray_ft_ray_replica_info") == len(joined), query
        assert "ray_vllm_" not in query or {"model", "version"} <= groups[0], query
    assert seen == set(told_by.values())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(FOLDER).as_posix())
def test_opens_with_what_it_is_for_and_its_command(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    head = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert len(head.split("#")[1].strip()) > 20
    commands = re.findall(r"^#     kubectl (apply -k|kustomize) (k8s/\S+)(?: -l ft-ray.io/part=(\w+))?", head, re.M)
    assert commands
    for _, folder, part in commands:
        assert (ROOT / folder / "kustomization.yaml").exists()
        if part:
            assert any(d["metadata"]["labels"]["ft-ray.io/part"] == part for d in resolve(Path(folder).name))
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", ["base", *OVERLAYS, "identity/gke", "identity/eks"])
def test_kustomize_puts_together_what_is_checked_here(name: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed: the overlays are put together by this test's own resolver only")
    folder = FOLDER / (name if name == "base" or "/" in name else f"overlays/{name}")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    real = [d for d in yaml.load_all(done.stdout, Loader=LOADER) if d]
    assert {key(d): d for d in real} == {key(d): d for d in resolve(name)}
    assert len(real) == len(resolve(name))


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_object_has_its_place_and_part(name: str) -> None:
    documents = resolve(name)
    assert len(documents) >= 20
    assert len({key(d) for d in documents}) == len(documents)
    for document in documents:
        assert document["metadata"].get("namespace") == (None if document["kind"] in CLUSTER_SCOPED else "ft-ray")
        part = document["metadata"]["labels"]["ft-ray.io/part"]
        assert part in ("platform", "cluster", "train", "run", "sweep", "serve")
        assert (part == "platform") == (document["kind"] not in RAY)
    assert [d for d in documents if d["kind"] == "Secret"] == [], "secrets are made by hand, never kept in a file"
    (space,) = [d for d in documents if d["kind"] == "Namespace"]
    assert space["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


# Schemas


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("kind", RAY)
def test_kuberays_own_schema_takes_it(name: str, kind: str) -> None:
    documents = of_kind(name, kind)
    assert documents
    for document in documents:
        assert document["apiVersion"] == "ray.io/v1"
        assert crd_faults(document) == []


def test_the_schemas_are_closed() -> None:
    for kind in RAY:
        (document, *_) = of_kind("gpu", kind)
        spec = ray_spec(document)
        spec["headGroupSpec"]["template"]["spec"]["containers"][0]["securityContext"]["readOnlyRootFileSystem"] = True
        spec["workerGroupSpecs"][0]["minReplica"] = 1
        spec["workerGroupSpecs"][0]["maxReplicas"] = "four"
        faults = "\n".join(crd_faults(document))
        assert "readOnlyRootFileSystem" in faults and "minReplica" in faults and "four" in faults


@pytest.mark.parametrize("name", OVERLAYS)
def test_other_kinds_hold_known_keys_only(name: str) -> None:
    documents = [d for d in resolve(name) if d["kind"] not in RAY]
    assert {d["kind"] for d in documents} >= {"Namespace", "NetworkPolicy", "PersistentVolumeClaim", "Deployment"}
    for document in documents:
        assert kind_faults(document) == [], key(document)
    (policy, *_) = of_kind(name, "NetworkPolicy")
    policy["spec"]["podSelectors"] = policy["spec"].pop("podSelector")
    assert len(kind_faults(policy)) == 2


@pytest.mark.parametrize("name", OVERLAYS)
def test_pod_templates_of_other_kinds_fit_kuberays_copy_of_the_pod_schema(name: str) -> None:
    spec = crd("RayCluster").schema["properties"]["spec"]["properties"]
    validator = jsonschema.Draft202012Validator(spec["headGroupSpec"]["properties"]["template"])
    checked = 0
    for where, template, owner in pods(name):
        assert set(template) == {"metadata", "spec"} and set(template["metadata"]) == {"labels"}, where
        if owner["kind"] not in RAY:
            assert [e.message for e in validator.iter_errors(template)] == [], where
            assert owner["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
            checked += 1
    assert checked


# The operator


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_operator_takes_it(name: str) -> None:
    documents = of_kind(name, *RAY)
    assert len(documents) == 5
    assert {key(d): operator_faults(d) for d in documents} == {key(d): [] for d in documents}


def test_the_operators_rules_catch_their_faults() -> None:
    def faults(kind: str, overlay: str, **changes: Any) -> list[str]:
        (document, *_) = of_kind(overlay, kind)
        for path, value in changes.items():
            at: Any = document
            *parts, last = path.split("__")
            for part in parts:
                at = at[int(part)] if part.isdigit() else at[part]
            at[last] = value
        return operator_faults(document)

    assert faults("RayJob", "gpu", spec__shutdownAfterJobFinishes=True) == [
        "deletionRules beside shutdownAfterJobFinishes"
    ]
    assert faults("RayJob", "kueue", spec__rayClusterSpec__workerGroupSpecs__0__idleTimeoutSeconds=60) == [
        "idleTimeoutSeconds without autoscaler v2"
    ]
    assert faults("RayCluster", "ha", metadata__annotations={"ray.io/ft-enabled": "true"}) == [
        "annotations of the old fault tolerance"
    ]
    assert faults("RayCluster", "gpu", spec__rayVersion="2.51.0") == [
        "priority without autoscaler v2", "token authentication before Ray 2.52",
    ]  # fmt: skip
    assert faults("RayService", "gpu", metadata__name="a" * 48) == ["name"]
    assert faults("RayCluster", "gpu", spec__workerGroupSpecs__0__minReplicas=9) == ["replica limits"]
    assert faults("RayCluster", "gpu", spec__upgradeStrategy__type="NewCluster") == ["upgradeStrategy"]
    named = ["redis-username outside gcsFaultToleranceOptions"]
    assert faults("RayCluster", "ha", **{"spec__headGroupSpec__rayStartParams__redis-username": "me"}) == named
    (cluster,) = of_kind("ha", "RayCluster")
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"].append({"name": "REDIS_USERNAME"})
    assert operator_faults(cluster) == named
    for timeout, wrong in [
        ("30m", False), ("1h30m", False), ("1.5h", False), ("1800", False), ("", False),
        ("30 m", True), ("half an hour", True), ("0s", True), ("0", True), ("-5m", True), ("1d", True), ("1.5", True),
    ]:  # fmt: skip
        found = faults("RayService", "gpu", metadata__annotations={"ray.io/initializing-timeout": timeout})
        assert found == (["initializing-timeout"] if wrong else []), timeout


def test_a_standing_cluster_takes_a_change() -> None:
    """KubeRay leaves the pods of a changed RayCluster as they are unless it is told to make them anew."""
    for name in OVERLAYS:
        (cluster,) = of_kind(name, "RayCluster")
        assert cluster["spec"]["upgradeStrategy"] == {"type": "Recreate"}


# Versions


def locked(stack: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / f"{stack}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


@pytest.mark.parametrize("name", OVERLAYS)
def test_versions_agree(name: str) -> None:
    assert {ray_spec(d)["rayVersion"] for d in of_kind(name, *RAY)} == {locked("gpu")["ray"]} == {locked("cpu")["ray"]}
    stack = "cpu" if name == "cpu" else "gpu"
    for where, template, _ in pods(name):
        for container in template["spec"]["containers"]:
            image = container["image"]
            assert re.fullmatch(r"[\w./-]+(:[\w.-]+|@sha256:[0-9a-f]{64})", image), where
            assert not image.endswith(":latest")
            if image.startswith("registry.example.com/"):
                kind = "serve-" if "RayService" in where else ""
                assert image == f"registry.example.com/ft-ray:{ft_ray.__version__}-{kind}{stack}", where


def test_the_dockerfile_has_both_targets_from_the_constraints_and_no_root() -> None:
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    assert text.startswith("# ") and "docker build -f k8s/Dockerfile --target train" in text
    stages: dict[str, list[str]] = {}
    for line in re.sub(r"\\\n", " ", text).splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            stages[rest.split(" AS ")[1]] = current = [line]
        elif word and not word.startswith("#") and stages:
            current.append(line)
    assert set(stages) == {"stack", "train", "serve"}
    for target in ("train", "serve"):
        assert stages[target][0] == f"FROM stack AS {target}"
        assert [line for line in stages[target] if line.startswith("USER")] == ["USER 1000:1000"]
        assert stages[target][-1].startswith("CMD [")
    # The launcher's autoscaler runs inside the head's container, and reaches workers by these two.
    packages = {w for line in stages["stack"] if "apt-get install" in line for w in line.split()}
    assert {"openssh-client", "rsync", "wget", "g++"} <= packages
    installs = [line for line in stages["stack"] if "pip install" in line]
    pinned = [w for line in installs for w in re.findall(r"pip install ([^&;]+)", line)]
    assert len(pinned) == 7
    for words in pinned:
        assert "--no-deps" in words or "--constraint /tmp/lock.txt" in words, words
        assert not re.search(r"[\w-]==\d", words), "a version belongs to the constraints"
    for source in re.findall(r"^COPY (.+) \S+$", text, re.M):
        for name in source.split():
            for stack in ("cpu", "gpu"):
                assert (ROOT / name.replace("${STACK}", stack)).exists(), name
    assert {"s3fs", "gcsfs"} <= set(locked("gpu")) & set(locked("cpu")), "s3:// and gs:// need nothing more"
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[1] == "*" and {"!constraints/*.txt", "!ft_ray", "!pyproject.toml"} <= set(ignored)
    assert not re.search(r"(?i)(token|password|secret)=\S", text)
