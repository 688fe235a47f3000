"""k8s/ and rendered manifests before tools that others wrote: Kubernetes' own schemas, and checkov on every pod.

kubernetes-validate is a test dependency. checkov is not: it pins boto3, packaging and networkx to versions that this
stack cannot have. A checkov on the PATH, in an environment of its own, is used; without one its test says so.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ft_ray import kube, recipe
from ft_ray.kube_serve import service
from tests.declarative.manifests import OVERLAYS, RAY, ROOT, Doc, pods, pods_of, ray_spec, resolve

CORE = ("v1", "apps/v1", "networking.k8s.io/v1", "policy/v1", "scheduling.k8s.io/v1")
KUBERNETES = "1.34"

# docs/operations.md, section 1, says why: of all pods, and of some only.
EXPLAINED = {"CKV_K8S_43", "CKV_K8S_15", "CKV_K8S_40", "CKV2_K8S_6"}
OF_RAY = {"CKV_K8S_8", "CKV_K8S_9"}
OF_SCALED_HEADS = {"CKV_K8S_38"}


def rendered() -> list[Doc]:
    values = {
        "name": "x", "model": {"id": "a/b"}, "data": {"train": [{"path": "s3://b/d.jsonl"}]}, "storage": "s3://b/ft",
    }  # fmt: skip
    made = [
        recipe.from_dict({**values, "resources": {"workers": 2, "gpus": gpus, "cpus": 4}}) for gpus in (0, 1)
    ]
    configs = [kube.recipe_map(r, kube.Settings()) for r in made]
    return [*configs, *(kube.job(r) for r in made), service(ROOT / "serve" / "merged.yaml")]


def as_pods(found: Any) -> dict[str, Doc]:
    return {
        where: {
            "apiVersion": "v1", "kind": "Pod", "spec": template["spec"],
            "metadata": {"name": where.lower().replace("/", "-"), "namespace": "ft-ray", **template["metadata"]},
        }
        for where, template, _ in found
    }  # fmt: skip


def test_continuous_integration_brings_the_tools_that_are_asked_for_here() -> None:
    """Without them on the PATH, tests of k8s/ would be skipped there."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    named = re.search(r"for name in (.+); do\n  tool ", script)
    assert named and {"checkov", "kubectl"} == set(named[1].split())
    for name in named[1].split():
        lines = (ROOT / "constraints" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        pins = [line for line in lines if line and not line.startswith("#")]
        assert any(pin.startswith(name) for pin in pins) and all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)


def test_kubernetes_own_schemas_take_every_core_object_and_pod() -> None:
    tool = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    checked = 0
    for name in OVERLAYS:
        objects = [d for d in resolve(name) if d["apiVersion"] in CORE]
        for document in [*objects, *as_pods(pods(name)).values()]:
            tool.validate(document, KUBERNETES, strict=True)
            checked += 1
    own = rendered()
    for document in [*(d for d in own if d["apiVersion"] in CORE), *as_pods(pods_of(own)).values()]:
        tool.validate(document, KUBERNETES, strict=True)
        checked += 1
    assert checked > 100
    (bad,) = list(as_pods(pods_of([own[-1]])).values())[:1]
    bad["spec"]["containers"][0]["securityContext"]["readOnlyRootFileSystem"] = True
    with pytest.raises(tool.ValidationError):
        tool.validate(bad, KUBERNETES, strict=True)


def test_checkov_finds_nothing_that_is_not_explained(tmp_path: Path) -> None:
    checkov = shutil.which("checkov")
    if checkov is None:
        pytest.skip("checkov is not on the PATH: the rules of test_k8s_rules stand alone")
    made = [*pods("ha"), *pods_of(rendered())]
    found = as_pods(made)
    of_ray = {where: ray_spec(owner) for where, _, owner in made if owner["kind"] in RAY}
    scaled = [w for w, spec in of_ray.items() if w.endswith("/head") and spec.get("enableInTreeAutoscaling")]
    for i, pod in enumerate(found.values()):
        (tmp_path / f"{i}.yaml").write_text(yaml.safe_dump(pod))
    words = [checkov, "-d", str(tmp_path), "--framework", "kubernetes", "-o", "json", "--skip-download", "--quiet"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    report = json.loads(done.stdout)
    named = {f"Pod.ft-ray.{pod['metadata']['name']}": where for where, pod in found.items()}
    pairs = {(check["check_id"], named[check["resource"]]) for check in report["results"]["failed_checks"]}
    unexplained = [
        (check, where) for check, where in pairs
        if check not in EXPLAINED
        and not (check in OF_RAY and where in of_ray)
        and not (check in OF_SCALED_HEADS and where in scaled)
    ]  # fmt: skip
    assert report["summary"]["resource_count"] >= len(found) and unexplained == []
    failed = {check for check, _ in pairs}
    guide = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert [check for check in failed if check not in guide] == []
