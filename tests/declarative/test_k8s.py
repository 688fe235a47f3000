"""Every manifest in k8s/, as kustomize puts it together: KubeRay's schemas, its operator's rules, and ours.

The overlays use little of kustomize (resources, namespace, images, JSON patches), so `resolve` below does the same; where
kubectl is there, it is compared with the real thing. KubeRay's CRDs are not part of this repository:
FT_RAY_KUBERAY_CRDS names a folder with a release's own files (rayclusters.yaml or .yaml.gz, and so on).
"""

from __future__ import annotations

import copy
import functools
import gzip
import ipaddress
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main
import yaml

import ft_ray
from ft_ray import cli, recipe
from ft_ray.serve_args import parse

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "k8s"
FILES = sorted(FOLDER.rglob("*.yaml"))
OVERLAYS = ["cpu", "gpu", "kueue", "ha"]
CLUSTER_SCOPED = {"Namespace", "PriorityClass", "ResourceFlavor", "ClusterQueue"}
RAY = {"RayCluster": ("spec",), "RayJob": ("spec", "rayClusterSpec"), "RayService": ("spec", "rayClusterConfig")}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Doc = dict[str, Any]


def load_all(path: Path) -> list[Any]:
    return [d for d in yaml.load_all(path.read_text(encoding="utf-8"), Loader=LOADER) if d is not None]


# What kustomize does, as far as it is used here


def patched(document: Doc, operations: list[Doc]) -> None:
    """JSON patch (RFC 6902): add, replace and remove."""
    for operation in operations:
        *path, last = [p.replace("~1", "/").replace("~0", "~") for p in operation["path"].split("/")[1:]]
        at: Any = document
        for part in path:
            at = at[int(part)] if isinstance(at, list) else at[part]
        value = copy.deepcopy(operation.get("value"))
        match operation["op"], at:
            case "add", list():
                at.insert(len(at) if last == "-" else int(last), value)
            case "add", dict():
                at[last] = value
            case "replace", list():
                at[int(last)] = value
            case "replace", dict():
                assert last in at, f"nothing to replace at {operation['path']}"
                at[last] = value
            case "remove", list():
                del at[int(last)]
            case "remove", dict():
                del at[last]
            case other:
                raise AssertionError(other)


def with_images(value: Any, images: list[Doc]) -> None:
    if isinstance(value, dict):
        for container in [c for k in ("containers", "initContainers") for c in value.get(k) or []]:
            for image in images:
                if container.get("image") == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
        for inner in value.values():
            with_images(inner, images)
    elif isinstance(value, list):
        for inner in value:
            with_images(inner, images)


@functools.cache
def _resolved(folder: Path) -> tuple[Doc, ...]:
    (config,) = load_all(folder / "kustomization.yaml")
    assert set(config) <= {"apiVersion", "kind", "namespace", "resources", "images", "patches"}, "resolve knows no more"
    documents: list[Doc] = []
    for name in config["resources"]:
        place = (folder / name).resolve()
        documents += copy.deepcopy(list(_resolved(place))) if place.is_dir() else load_all(place)
    for document in documents:
        if "namespace" in config and document["kind"] not in CLUSTER_SCOPED:
            document["metadata"]["namespace"] = config["namespace"]
    for patch in config.get("patches", []):
        target = patch["target"]
        chosen = [
            d for d in documents
            if d["kind"] == target["kind"] and target.get("name", d["metadata"]["name"]) == d["metadata"]["name"]
        ]  # fmt: skip
        assert chosen, f"{folder.name}: the patch {patch['path']} meets nothing"
        for document in chosen:
            patched(document, load_all(folder / patch["path"])[0])
    for document in documents:
        with_images(document, config.get("images", []))
    # Aliases of one file are one object in memory; a patch of one place must not show up in another.
    return tuple(copy.deepcopy(documents))


def resolve(name: str) -> list[Doc]:
    folder = FOLDER / ("base" if name == "base" else f"overlays/{name}")
    return copy.deepcopy(list(_resolved(folder)))


def key(document: Doc) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


def of_kind(name: str, *kinds: str) -> list[Doc]:
    return [d for d in resolve(name) if d["kind"] in kinds]


def ray_spec(document: Doc) -> Doc:
    value: Doc = document
    for part in RAY[document["kind"]]:
        value = value[part]
    return value


def pods(name: str) -> Iterator[tuple[str, Doc, Doc]]:
    """(where, pod template, owner) of every pod that the manifests ask for."""
    for document in resolve(name):
        label = "/".join(key(document))
        if document["kind"] in RAY:
            spec = ray_spec(document)
            yield f"{label}/head", spec["headGroupSpec"]["template"], document
            for group in spec["workerGroupSpecs"]:
                yield f"{label}/{group['groupName']}", group["template"], document
            if "submitterPodTemplate" in document["spec"]:
                yield f"{label}/submitter", document["spec"]["submitterPodTemplate"], document
        elif document["kind"] in ("Deployment", "StatefulSet"):
            yield label, document["spec"]["template"], document


def amount(text: str | int) -> float:
    """A Kubernetes quantity: 500m, 48Gi, 2."""
    number, unit = re.fullmatch(r"([\d.]+)(m|Mi|Gi|Ti)?", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * {None: 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[unit]


# The files


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
    assert others == {"Dockerfile", "Dockerfile.dockerignore"}


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


@pytest.mark.parametrize("name", ["base", *OVERLAYS])
def test_kustomize_puts_together_what_is_checked_here(name: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed: the overlays are put together by this test's own resolver only")
    folder = FOLDER / ("base" if name == "base" else f"overlays/{name}")
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
        assert part in ("platform", "cluster", "train", "run", "serve")
        assert (part == "platform") == (document["kind"] not in RAY)
    assert [d for d in documents if d["kind"] == "Secret"] == [], "secrets are made by hand, never kept in a file"
    (space,) = [d for d in documents if d["kind"] == "Namespace"]
    assert space["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


# Schemas


def crd_folder() -> Path | None:
    places = [os.environ.get("FT_RAY_KUBERAY_CRDS"), ROOT.parent / "shared" / "kuberay"]
    return next((Path(p) for p in places if p and list(Path(p).glob("*rayclusters*.yaml*"))), None)


def closed(schema: Any) -> Any:
    """OpenAPI v3 as JSON Schema: unknown keys fail, and what has a default is not required."""
    if isinstance(schema, list):
        return [closed(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    out = {k: v for k, v in schema.items() if k in ("enum", "minimum", "maximum", "pattern", "minItems", "maxItems")}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "type" in schema:
        out["type"] = [schema["type"], "null"] if schema.get("nullable") else schema["type"]
    if "items" in schema:
        out["items"] = closed(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = closed(schema["additionalProperties"])
    if "properties" in schema:
        out["properties"] = {k: closed(v) for k, v in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            out["additionalProperties"] = False
        defaults = {k for k, v in schema["properties"].items() if "default" in v}
        out["required"] = [k for k in schema.get("required", []) if k not in defaults]
    return out


@functools.cache
def crd(kind: str) -> Any:
    """The closed schema of a kind's `ray.io/v1` objects."""
    folder = crd_folder()
    if folder is None:
        pytest.skip("KubeRay's CRDs are not here: set FT_RAY_KUBERAY_CRDS to a folder with rayclusters.yaml and others")
    (file,) = folder.glob(f"*{kind.lower()}s.yaml*")
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    (version,) = [v for v in yaml.load(text, Loader=LOADER)["spec"]["versions"] if v["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    return jsonschema.Draft202012Validator(closed(schema))


def crd_faults(document: Doc) -> list[str]:
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in crd(document["kind"]).iter_errors(document)]


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


ANY: Doc = {}
TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def obj(required: str = "", **properties: Any) -> Doc:
    return {
        "type": "object", "properties": properties, "required": required.split(), "additionalProperties": False,
    }  # fmt: skip


def many(items: Any) -> Doc:
    return {"type": "array", "items": items, "minItems": 1}


SELECTOR = obj(
    matchLabels=TEXTS,
    matchExpressions=many(obj("key operator", key=TEXT, operator={"enum": ["In", "Exists"]}, values=many(TEXT))),
)
PORT = obj("port", name=TEXT, port=NUMBER, targetPort=ANY, protocol={"enum": ["TCP", "UDP"]})
PEER = obj(
    podSelector=SELECTOR, namespaceSelector=SELECTOR, ipBlock=obj("cidr", cidr=TEXT, **{"except": many(TEXT)})
)
CLAIM = obj(
    "accessModes resources",
    accessModes=many({"enum": ["ReadWriteOnce", "ReadWriteMany"]}),
    resources=obj("requests", requests=obj("storage", storage=TEXT)),
    storageClassName=TEXT,
)
ENDPOINTS = many(obj("port interval", port=TEXT, interval=TEXT))
ALERT = obj("alert expr for labels", alert=TEXT, expr=TEXT, labels=TEXTS, **{"for": TEXT})
QUOTA = obj("name nominalQuota", name=TEXT, nominalQuota=TEXT)
KINDS: dict[tuple[str, str], Doc] = {  # the part of each kind that is used here, closed
    ("v1", "Namespace"): obj(),
    ("v1", "ServiceAccount"): obj("automountServiceAccountToken", automountServiceAccountToken={"const": False}),
    ("v1", "ConfigMap"): obj("data", data=TEXTS),
    ("v1", "PersistentVolumeClaim"): obj("spec", spec=CLAIM),
    ("v1", "Service"): obj("spec", spec=obj("selector ports", selector=TEXTS, ports=many(PORT))),
    ("scheduling.k8s.io/v1", "PriorityClass"): obj(
        "value", value=NUMBER, preemptionPolicy={"enum": ["Never", "PreemptLowerPriority"]}, description=TEXT
    ),
    ("apps/v1", "Deployment"): obj(
        "spec",
        spec=obj(
            "selector template", replicas=NUMBER, selector=SELECTOR, template=ANY, strategy=obj("type", type=TEXT)
        ),
    ),
    ("apps/v1", "StatefulSet"): obj(
        "spec",
        spec=obj(
            "selector template serviceName", replicas=NUMBER, selector=SELECTOR, template=ANY, serviceName=TEXT,
            volumeClaimTemplates=many(obj("metadata spec", metadata=obj("name", name=TEXT), spec=CLAIM)),
        ),
    ),
    ("networking.k8s.io/v1", "NetworkPolicy"): obj(
        "spec",
        spec=obj(
            "podSelector policyTypes",
            podSelector=SELECTOR,
            policyTypes=many({"enum": ["Ingress", "Egress"]}),
            ingress=many(obj("from", ports=many(PORT), **{"from": many(PEER)})),
            egress=many(obj("to", ports=many(PORT), to=many(PEER))),
        ),
    ),
    ("policy/v1", "PodDisruptionBudget"): obj(
        "spec", spec=obj("selector", selector=SELECTOR, maxUnavailable=NUMBER, minAvailable=NUMBER)
    ),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): obj(
        "spec", spec=obj("selector endpoints", selector=SELECTOR, endpoints=ENDPOINTS)
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): obj(
        "spec", spec=obj("selector podMetricsEndpoints", selector=SELECTOR, podMetricsEndpoints=ENDPOINTS)
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): obj(
        "spec", spec=obj("groups", groups=many(obj("name rules", name=TEXT, rules=many(ALERT))))
    ),
    ("kueue.x-k8s.io/v1beta2", "ResourceFlavor"): obj(spec=obj(nodeLabels=TEXTS)),
    ("kueue.x-k8s.io/v1beta2", "LocalQueue"): obj("spec", spec=obj("clusterQueue", clusterQueue=TEXT)),
    ("kueue.x-k8s.io/v1beta2", "ClusterQueue"): obj(
        "spec",
        spec=obj(
            "namespaceSelector resourceGroups",
            namespaceSelector=SELECTOR,
            resourceGroups=many(
                obj(
                    "coveredResources flavors",
                    coveredResources=many(TEXT),
                    flavors=many(obj("name resources", name=TEXT, resources=many(QUOTA))),
                )
            ),
        ),
    ),
}  # fmt: skip
METADATA = obj("name labels", name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)


def kind_faults(document: Doc) -> list[str]:
    schema = copy.deepcopy(KINDS[document["apiVersion"], document["kind"]])
    schema["properties"] |= {"apiVersion": TEXT, "kind": TEXT, "metadata": METADATA}
    return [e.message[:200] for e in jsonschema.Draft202012Validator(schema).iter_errors(document)]


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


# The operator's rules, which no schema holds (KubeRay 1.7, controllers/ray/utils/validation.go)


def operator_faults(document: Doc) -> list[str]:
    """What KubeRay's operator would refuse in an object that its schema takes."""
    kind, spec, cluster = document["kind"], document["spec"], ray_spec(document)
    found: list[str] = []

    def must(fine: Any, message: str) -> None:
        if not fine:
            found.append(message)

    longest = {"RayCluster": 53, "RayJob": 47, "RayService": 47}[kind]
    name = document["metadata"]["name"]
    must(len(name) <= longest and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name), "name")
    head = cluster["headGroupSpec"]
    scaling, options = cluster.get("enableInTreeAutoscaling", False), cluster.get("autoscalerOptions", {})
    v2 = scaling and options.get("version") == "v2"
    version = tuple(int(p) for p in cluster.get("rayVersion", "0").split("."))
    groups = cluster["workerGroupSpecs"]
    for group in [head, *groups]:
        sized = {"num-cpus", "num-gpus", "memory", "resources"} & set(group.get("rayStartParams", {}))
        must(not (sized and group.get("resources")), "resources given twice")
        must("labels" not in group.get("rayStartParams", {}), "labels in rayStartParams")
        if v2:
            must(group["template"]["spec"].get("restartPolicy", "Never") == "Never", "restartPolicy under autoscaler v2")
    must(len({g["groupName"] for g in groups}) == len(groups), "group names")
    for group in groups:
        low, high = group.get("minReplicas"), group.get("maxReplicas")
        must(scaling or (low is not None and high is not None), "replica limits without autoscaling")
        must(low is None or high is None or 0 <= low <= group.get("replicas", low) <= high, "replica limits")
        must(group.get("idleTimeoutSeconds") is None or v2, "idleTimeoutSeconds without autoscaler v2")
        must(not group.get("priority") or (v2 and version >= (2, 56)), "priority without autoscaler v2")
    variables = {e["name"] for e in head["template"]["spec"]["containers"][0].get("env", [])}
    if cluster.get("gcsFaultToleranceOptions"):
        must(not variables & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"}, "redis in the head's environment")
        must("storage" not in cluster["gcsFaultToleranceOptions"], "storage belongs to rocksdb")
        must("redis-password" not in head["rayStartParams"], "redis-password in rayStartParams")
        annotated = {"ray.io/ft-enabled", "ray.io/external-storage-namespace"} & set(
            document["metadata"].get("annotations", {})
        )
        must(not annotated, "annotations of the old fault tolerance")
    must("RAY_enable_autoscaler_v2" not in variables, "autoscaler version given twice")
    if cluster.get("authOptions", {}).get("mode") == "token":
        must(version >= (2, 52), "token authentication before Ray 2.52")
        must("enableK8sTokenAuth" not in cluster["authOptions"], "Kubernetes tokens beside a secret")
    for alpha in ("networkPolicy", "tlsOptions", "historyServerOptions"):
        must(alpha not in cluster, f"{alpha} is behind a feature gate")
    if kind == "RayJob":
        found += job_faults(spec, scaling)
    if kind == "RayService":
        must("name" not in head.get("headService", {}).get("metadata", {}), "headService has a name")
        must(spec.get("upgradeStrategy", {}).get("type") in ("NewCluster", "None"), "upgradeStrategy")
    if kind != "RayCluster":
        must("upgradeStrategy" not in cluster, "upgradeStrategy of a cluster that another object owns")
    return found


def job_faults(spec: Doc, scaling: bool) -> list[str]:
    found = []
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    done = spec.get("shutdownAfterJobFinishes", False)
    if rules and done:
        found.append("deletionRules beside shutdownAfterJobFinishes")
    if not done and spec.get("ttlSecondsAfterFinished", 0):
        found.append("a time to live without shutdownAfterJobFinishes")
    if spec.get("suspend") and not done:
        found.append("suspend without shutdownAfterJobFinishes")
    seen: dict[tuple[str, str], dict[str, int]] = {}
    for rule in rules:
        condition = {k: v for k, v in rule["condition"].items() if k != "ttlSeconds"}
        if len(condition) != 1:
            found.append("a deletion rule has one status")
            continue
        at = seen.setdefault(next(iter(condition.items())), {})
        if rule["policy"] in at:
            found.append("a deletion rule twice")
        if rule["policy"] == "DeleteWorkers" and scaling:
            found.append("DeleteWorkers under autoscaling")
        at[rule["policy"]] = rule["condition"].get("ttlSeconds", 0)
    for times in seen.values():
        order = [times[p] for p in ("DeleteWorkers", "DeleteCluster", "DeleteSelf") if p in times]
        if order != sorted(order):
            found.append("deletion rules out of order")
    if spec.get("submissionMode") == "SidecarMode" and {"submitterPodTemplate", "submitterConfig"} & set(spec):
        found.append("a submitter in SidecarMode")
    if min(spec.get(k, 1) for k in ("activeDeadlineSeconds", "preRunningDeadlineSeconds")) <= 0:
        found.append("deadlines")
    return found


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_operator_takes_it(name: str) -> None:
    documents = of_kind(name, *RAY)
    assert len(documents) == 4
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
    assert re.search(r'EXTRA="gcsfs==([\d.]+)"', text)[1] == locked("gpu")["fsspec"]  # type: ignore[index]
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[1] == "*" and {"!constraints/*.txt", "!ft_ray", "!pyproject.toml"} <= set(ignored)
    assert not re.search(r"(?i)(token|password|secret)=\S", text)


# Pods


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_are_confined(name: str) -> None:
    seen = 0
    for where, template, owner in pods(name):
        spec = template["spec"]
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"] is True and pod["runAsUser"] >= 1000 and pod["runAsGroup"] >= 1000, where
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & set(spec), where
        scaled = where.endswith("/head") and ray_spec(owner)["enableInTreeAutoscaling"]
        assert spec["automountServiceAccountToken"] is bool(scaled), where
        assert scaled or spec["serviceAccountName"] == "ft-ray", where
        volumes = {v["name"]: v for v in spec["volumes"]}
        for volume in volumes.values():
            kinds = set(volume) - {"name"}
            assert kinds <= {"emptyDir", "persistentVolumeClaim", "secret", "configMap"}, where
            assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"], where
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            confined(container, where)
            mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
            assert "emptyDir" in volumes[mounts["/tmp"]], where
            claimed = {t["metadata"]["name"] for t in owner["spec"].get("volumeClaimTemplates", [])}
            assert set(mounts.values()) <= set(volumes) | claimed, where
            for mount in container["volumeMounts"]:
                if {"secret", "configMap"} & set(volumes.get(mount["name"], {})):
                    assert mount["readOnly"] is True and "subPath" not in mount, f"{where}: would not follow a change"
            home = {e["name"]: e.get("value") for e in container.get("env", [])}.get("HOME", "/tmp")
            assert home in mounts, f"{where}: nothing can be written to its home"
            seen += 1
    assert seen >= 12


def confined(container: Doc, where: str) -> None:
    context = container["securityContext"]
    assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True, where
    assert context["capabilities"] == {"drop": ["ALL"]} and not context.get("privileged"), where
    resources = container["resources"]
    wanted = {"cpu", "memory"} | ({"ephemeral-storage"} if container.get("name") else set())
    assert set(resources["requests"]) >= wanted and set(resources["limits"]) >= wanted, where
    for what, limit in resources["limits"].items():
        assert 0 < amount(resources["requests"][what]) <= amount(limit), f"{where}: {what}"


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_autoscaler_beside_the_head_is_confined_too(name: str) -> None:
    scaled = [d for d in of_kind(name, *RAY) if ray_spec(d)["enableInTreeAutoscaling"]]
    assert len(scaled) == (2 if name == "kueue" else 4)
    for document in of_kind(name, *RAY):
        spec = ray_spec(document)
        assert ("autoscalerOptions" in spec) == (document in scaled)
        if document in scaled:
            confined(spec["autoscalerOptions"], "autoscaler")
            assert {"name": "tmp", "mountPath": "/tmp"} in spec["autoscalerOptions"]["volumeMounts"]
            assert spec["autoscalerOptions"]["version"] == "v2"


@pytest.mark.parametrize("name", OVERLAYS)
def test_ray_asks_for_its_token_and_the_head_does_no_work(name: str) -> None:
    for document in of_kind(name, *RAY):
        spec = ray_spec(document)
        assert spec["authOptions"] == {"mode": "token", "secretName": "ft-ray-token"}
        head = spec["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0" == head["rayStartParams"]["num-gpus"]
        assert head["serviceType"] == "ClusterIP" and not head.get("enableIngress")


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_is_referred_to_exists(name: str) -> None:
    documents = {key(d) for d in resolve(name)}
    guide = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    secrets = set()
    for where, template, _ in pods(name):
        for volume in template["spec"]["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in documents, where
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in documents, where
            if "secret" in volume:
                secrets.add(volume["secret"]["secretName"])
        if "priorityClassName" in template["spec"]:
            assert ("PriorityClass", template["spec"]["priorityClassName"]) in documents, where
        if "serviceAccountName" in template["spec"]:
            assert ("ServiceAccount", template["spec"]["serviceAccountName"]) in documents, where
    for document in of_kind(name, *RAY):
        spec = ray_spec(document)
        secrets.add(spec["authOptions"]["secretName"])
        if name == "ha" and document["kind"] != "RayJob":
            tolerance = spec["gcsFaultToleranceOptions"]
            secrets.add(tolerance["redisPassword"]["valueFrom"]["secretKeyRef"]["name"])
            assert ("Service", tolerance["redisAddress"].split(":")[0]) in documents
    assert len(secrets) >= 4
    for secret in secrets:
        assert f"create secret generic {secret} " in guide, f"docs/operations.md does not say how {secret} is made"


@pytest.mark.parametrize("name", OVERLAYS)
def test_secrets_come_by_reference_only(name: str) -> None:
    def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            yield path, value
            for k, v in value.items():
                yield from walk(v, f"{path}.{k}")
        elif isinstance(value, list):
            for i, v in enumerate(value):
                yield from walk(v, f"{path}[{i}]")
        else:
            yield path, value

    for document in resolve(name):
        for path, value in walk(document):
            if isinstance(value, dict) and "name" in value and re.search(r"(?i)token|secret|passw|_key", str(value["name"])):
                # A variable with such a name holds a path, or takes its value from a Secret.
                plain = str(value.get("value", ""))
                assert "value" not in value or plain.startswith("/"), f"{key(document)}{path}"
            if isinstance(value, str):
                assert not re.search(r"hf_[A-Za-z0-9]{16,}|AKIA[0-9A-Z]{16}|-----BEGIN|sk-[A-Za-z0-9]{16,}", value), path
            if path.endswith("runtimeEnvYAML"):
                raise AssertionError("a runtime_env shows up in the job API: mount secrets instead")
    patched_in = copy.deepcopy(of_kind(name, "RayCluster")[0])
    patched_in["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"].append(
        {"name": "HF_TOKEN", "value": "abc"}
    )
    assert any(
        isinstance(v, dict) and v.get("name") == "HF_TOKEN" and not v["value"].startswith("/")
        for _, v in walk(patched_in)
    )


# The network


def selects(selector: Doc, labels: Doc) -> bool:
    fits = selector.get("matchLabels", {}).items() <= labels.items()
    return fits and all(e["operator"] == "Exists" and e["key"] in labels for e in selector.get("matchExpressions", []))


def open_between(policies: list[Doc], source: Any, target: Any, port: int, protocol: str = "TCP") -> bool:
    """Whether policies let a connection pass; an end is (namespace labels, pod labels) or an address."""

    def own(end: Any) -> bool:
        return isinstance(end, tuple) and end[0].get("kubernetes.io/metadata.name") == "ft-ray"

    def peer(rule: Doc, end: Any) -> bool:
        if "ipBlock" in rule:
            if isinstance(end, tuple):
                return False
            address, block = ipaddress.ip_address(end), rule["ipBlock"]
            outside = any(address in ipaddress.ip_network(n) for n in block.get("except", []))
            return address in ipaddress.ip_network(block["cidr"]) and not outside
        if not isinstance(end, tuple):
            return False
        space = selects(rule["namespaceSelector"], end[0]) if "namespaceSelector" in rule else own(end)
        return space and selects(rule.get("podSelector", {}), end[1])

    def passes(end: Any, other: Any, direction: str, word: str) -> bool:
        if not own(end):
            return True  # another namespace's own policies
        mine = [p["spec"] for p in policies if selects(p["spec"]["podSelector"], end[1])]
        mine = [p for p in mine if direction in p["policyTypes"]]
        if not mine:
            return True
        return any(
            any(peer(r, other) for r in rule[word])
            and ("ports" not in rule or any((p["port"], p["protocol"]) == (port, protocol) for p in rule["ports"]))
            for p in mine
            for rule in p.get(direction.lower(), [])
        )

    return passes(source, target, "Egress", "to") and passes(target, source, "Ingress", "from")


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_network_is_closed_but_for_what_is_needed(name: str) -> None:
    policies = of_kind(name, "NetworkPolicy")
    (deny,) = [p for p in policies if p["metadata"]["name"] == "default-deny"]
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    here = {"kubernetes.io/metadata.name": "ft-ray"}
    labels = {where: template["metadata"]["labels"] for where, template, _ in pods(name)}
    head, worker = (here, labels["RayJob/ft-ray-run/head"]), (here, labels["RayJob/ft-ray-run/gpu"] if name != "cpu" else
                    labels["RayJob/ft-ray-run/cpu"])  # fmt: skip
    submitter = (here, labels["RayJob/ft-ray-run/submitter"])
    service = (here, labels["RayService/ft-ray-serve/head"])
    model = (here, next(v for k, v in labels.items() if k.startswith("RayService") and not k.endswith("head")))
    mlflow, stranger = (here, labels["Deployment/mlflow"]), (here, {"app": "other"})
    client = ({"kubernetes.io/metadata.name": "shop", "ft-ray.io/client": "true"}, {"app": "shop"})
    other = ({"kubernetes.io/metadata.name": "other"}, {"app": "other"})
    operator = ({"kubernetes.io/metadata.name": "kuberay"}, {"app.kubernetes.io/name": "kuberay-operator"})
    prometheus = ({"kubernetes.io/metadata.name": "monitoring"}, {"app": "prometheus"})
    dns = ({"kubernetes.io/metadata.name": "kube-system"}, {"k8s-app": "kube-dns"})

    def passes(*flow: Any) -> bool:
        return open_between(policies, *flow)

    for source, target, port in [
        (worker, head, 6379), (head, worker, 40000), (worker, worker, 8076), (submitter, head, 8265),
        (operator, head, 8265), (operator, service, 8265), (operator, model, 8000), (client, model, 8000),
        (worker, mlflow, 5000), (head, mlflow, 5000), (service, mlflow, 5000), (model, mlflow, 5000),
        (model, service, 6379), (worker, "52.216.0.1", 443), (model, "52.216.0.1", 443), (head, "10.96.0.1", 443),
        (head, "10.0.0.5", 6443), (prometheus, worker, 8080), (prometheus, head, 8080),
    ]:  # fmt: skip
        assert passes(source, target, port), (source, target, port)
    assert passes(worker, dns, 53, "UDP") and passes(mlflow, dns, 53, "UDP")
    for source, target, port in [
        (worker, model, 8000), (model, head, 6379), (worker, service, 8265), (stranger, head, 8265),
        (stranger, worker, 10001), (stranger, mlflow, 5000), (submitter, head, 6379), (submitter, head, 10001),
        (submitter, mlflow, 5000), (client, head, 8265), (client, service, 8265), (client, model, 8080),
        (other, model, 8000), (other, head, 8265), (other, mlflow, 5000), (operator, head, 10001),
        (prometheus, head, 8265), (worker, "169.254.169.254", 80), (worker, "169.254.169.254", 443),
        (head, "169.254.169.254", 443), (worker, "10.96.0.1", 443), (worker, "52.216.0.1", 80),
        (mlflow, "52.216.0.1", 443), (mlflow, head, 8265), (submitter, "52.216.0.1", 443),
    ]:  # fmt: skip
        assert not passes(source, target, port), (source, target, port)
    if name == "ha":
        redis = (here, labels["StatefulSet/redis"])
        assert passes(head, redis, 6379) and passes(service, redis, 6379)
        assert not any(passes(end, redis, 6379) for end in (worker, model, submitter, mlflow, client, stranger))
        assert not passes(redis, "52.216.0.1", 443)


# Jobs


def parsed(command: str) -> tuple[str, Doc]:
    """The verb and parameters of an ft-ray command line, by the command line's own parser."""
    program, *arguments = shlex.split(command)
    assert program == "ft-ray"
    group: Any = typer.main.get_command(cli.app)
    with group.make_context("ft-ray", list(arguments)) as context:
        verb, chosen, rest = group.resolve_command(context, arguments)
        assert chosen is not None and verb is not None
        with chosen.make_context(verb, rest, parent=context) as inner:
            return verb, dict(inner.params)


def recipe_of(name: str, path: str, overrides: Any, folder: Path) -> recipe.Recipe:
    (config,) = of_kind(name, "ConfigMap")
    file = folder / Path(path).name
    file.write_text(config["data"][file.name], encoding="utf-8")
    return recipe.load(file, overrides or ()).recipe


@pytest.mark.parametrize("name", OVERLAYS)
def test_jobs_run_commands_that_parse_and_go_on_where_they_stopped(name: str, tmp_path: Path) -> None:
    jobs = of_kind(name, "RayJob")
    assert {parsed(j["spec"]["entrypoint"])[0] for j in jobs} == {"train", "run"}
    for job in jobs:
        spec = job["spec"]
        _, parameters = parsed(spec["entrypoint"])
        assert not parameters["fresh"], "a retry would start over"
        wanted = recipe_of(name, parameters["recipe"], parameters["overrides"], tmp_path)
        assert "://" in wanted.storage, "a retry on new nodes finds nothing in a local folder"
        assert not parameters["recipe"].startswith("s3:") and parameters["recipe"].startswith("/recipes/")
        assert spec["backoffLimit"] >= 1 and spec["activeDeadlineSeconds"] and spec["preRunningDeadlineSeconds"]
        submitter = spec["submitterPodTemplate"]["spec"]
        assert submitter["restartPolicy"] == "Never" and len(submitter["containers"]) == 1
        fits(spec, wanted)


def fits(spec: Doc, wanted: recipe.Recipe) -> None:
    """Driver and workers fit one pod, and what the trainer counts at its start is there by then."""
    need = wanted.resources
    assert not isinstance(need.gpus, str) and not isinstance(need.cpus, str), "auto counts the nodes that are up"
    assert need.workers == 1, "for several, minReplicas must bring them all before the trainer counts"
    cpus, gpus = need.cpus + spec["entrypointNumCpus"], need.gpus + spec.get("entrypointNumGpus", 0)
    groups = spec["rayClusterSpec"]["workerGroupSpecs"]
    places = []
    for group in groups:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        if amount(limits["cpu"]) >= cpus and amount(limits.get("nvidia.com/gpu", 0)) >= gpus and group["maxReplicas"]:
            places.append(group)
    assert places
    if need.gpus:
        assert gpus <= 1 and spec["entrypointNumGpus"] > 0, "the driver merges and evaluates: it needs the GPU too"
    elif spec["rayClusterSpec"]["enableInTreeAutoscaling"]:
        assert any(g["minReplicas"] for g in places), "the trainer counts CPUs before the autoscaler adds any"


def test_spot_comes_first_and_on_demand_takes_its_place() -> None:
    for document in of_kind("gpu", "RayCluster", "RayJob"):
        groups = {g["groupName"]: g for g in ray_spec(document)["workerGroupSpecs"]}
        spot, demand = groups["gpu-spot"], groups["gpu"]
        assert spot["priority"] > demand["priority"] and spot["minReplicas"] == demand["minReplicas"] == 0
        assert spot["template"]["spec"]["nodeSelector"] != demand["template"]["spec"]["nodeSelector"]
        same = [{k: v for k, v in g["template"]["spec"].items() if k != "nodeSelector"} for g in (spot, demand)]
        assert same[0] == same[1]


def test_kueue_can_queue_the_jobs() -> None:
    queues = {d["kind"]: d for d in of_kind("kueue", "LocalQueue", "ClusterQueue", "ResourceFlavor")}
    assert queues["LocalQueue"]["spec"]["clusterQueue"] == queues["ClusterQueue"]["metadata"]["name"]
    (group,) = queues["ClusterQueue"]["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    assert flavor["name"] == queues["ResourceFlavor"]["metadata"]["name"]
    assert [r["name"] for r in flavor["resources"]] == group["coveredResources"]
    quota = {r["name"]: amount(r["nominalQuota"]) for r in flavor["resources"]}
    for job in of_kind("kueue", "RayJob"):
        spec = job["spec"]
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queues["LocalQueue"]["metadata"]["name"]
        assert spec["shutdownAfterJobFinishes"] is True and not ray_spec(job)["enableInTreeAutoscaling"]
        assert "clusterSelector" not in spec
        groups = ray_spec(job)["workerGroupSpecs"]
        assert groups and all(g["replicas"] == g["minReplicas"] == g["maxReplicas"] >= 1 for g in groups)
        counted = [(ray_spec(job)["headGroupSpec"]["template"], 1), (spec["submitterPodTemplate"], 1)]
        counted += [(g["template"], g["replicas"]) for g in groups]
        need: dict[str, float] = {}
        for template, times in counted:
            for container in template["spec"]["containers"]:
                for what, size in container["resources"]["requests"].items():
                    need[what] = need.get(what, 0) + times * amount(size)
        assert set(need) <= set(quota), "Kueue admits nothing that asks for what the queue does not cover"
        assert all(need[what] <= quota[what] for what in need), need


# The endpoint

# What a file in serve/ may not say the same way in a pod: where it listens, who may ask, where the runs are.
MAY_DIFFER = {"proxy_location", "http_options.host", "args.keys", "args.storage", "args.engine.threads"}


def flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in flat(inner, f"{path}.{name}".lstrip(".")).items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{path}[{i}]").items()}
    return {path: value}


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_service_is_the_file_in_serve(name: str, tmp_path: Path) -> None:
    (service,) = of_kind(name, "RayService")
    spec = service["spec"]
    served = yaml.safe_load(spec["serveConfigV2"])
    file = service["metadata"]["annotations"]["ft-ray.io/serve-file"]
    own = yaml.safe_load((ROOT / "serve" / file).read_text(encoding="utf-8"))
    if file != "cpu.yaml":
        assert served == own
    here, there = flat(served), flat(own)
    different = {k for k in here.keys() | there.keys() if here.get(k) != there.get(k)}
    assert {k.removeprefix("applications[0].") for k in different} <= MAY_DIFFER
    assert (file == "cpu.yaml") == bool(different)
    (application,) = served["applications"]
    args = parse(application["args"])
    assert application["import_path"] == "ft_ray.serving:build"
    assert served["http_options"]["host"] == "0.0.0.0" and args.keys == "/etc/ft-ray/keys.json"
    assert args.storage.startswith("s3://")
    # The proxies that the service sends requests to are on workers.
    assert spec["excludeHeadPodFromServeSvc"] is True and served["proxy_location"] == "EveryNode"
    cluster = spec["rayClusterConfig"]
    for group in cluster["workerGroupSpecs"]:
        template = group["template"]["spec"]
        (container,) = template["containers"]
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        assert mounts["/etc/ft-ray"] == "keys"
        assert {"name": "keys", "secret": {"secretName": "ft-ray-api-keys"}} in template["volumes"]
        assert {"name": "serve", "containerPort": served["http_options"]["port"]} in container["ports"]
        assert template["terminationGracePeriodSeconds"] > 120, "a replica has two minutes to finish its requests"
        limits = container["resources"]["limits"]
        if args.engine.device == "cpu":
            assert isinstance(args.engine.threads, int) and args.engine.threads < amount(limits["cpu"])
    # `device: gpu` is refused while Ray sees no GPU, and a model asks for one GPU a replica.
    gpus = {
        g["groupName"]: amount(g["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0))
        for g in cluster["workerGroupSpecs"]
    }
    assert args.replicas is not None
    if args.engine.device == "gpu":
        first = sum(gpus[g["groupName"]] * g["minReplicas"] for g in cluster["workerGroupSpecs"])
        most = sum(gpus[g["groupName"]] * g["maxReplicas"] for g in cluster["workerGroupSpecs"])
        assert first >= max(1, args.replicas.min * args.engine.tensor_parallel)
        assert most >= args.replicas.max * args.engine.tensor_parallel
    else:
        assert any(g["minReplicas"] for g in cluster["workerGroupSpecs"])
    # What the jobs train under this name is what is served.
    trained = recipe_of(name, "/recipes/recipe.yaml", (), tmp_path)
    assert args.model == f"{trained.name}@champion" and args.storage == trained.storage


def test_ha_survives_its_heads_and_drains() -> None:
    for document in of_kind("ha", "RayCluster", "RayService"):
        options = ray_spec(document)["gcsFaultToleranceOptions"]
        assert options["backend"] == "redis" and "value" not in options["redisPassword"]
    (service,) = of_kind("ha", "RayService")
    assert service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplicas"] >= 2
    labels = {where: template["metadata"]["labels"] for where, template, _ in pods("ha")}
    (budget,) = of_kind("ha", "PodDisruptionBudget")
    assert selects(budget["spec"]["selector"], labels["RayService/ft-ray-serve/gpu"])
    assert not selects(budget["spec"]["selector"], labels["RayService/ft-ray-serve/head"])
    guide = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (rules,) = of_kind("ha", "PrometheusRule")
    alerts = [r["alert"] for g in rules["spec"]["groups"] for r in g["rules"]]
    assert len(alerts) >= 4 and [a for a in alerts if a not in guide] == [], "an alert without a runbook"
