"""What an API server and KubeRay's operator would refuse: schemas closed to unknown keys, and the operator's own rules.

KubeRay's CRDs are not part of this repository: FT_RAY_KUBERAY_CRDS names a folder with a release's own files
(rayclusters.yaml or rayclusters.yaml.gz, and so on). Of other kinds, the part that k8s/ uses is written down here.
"""

from __future__ import annotations

import copy
import functools
import gzip
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.declarative.manifests import LOADER, ROOT, Doc, ray_spec


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
    return jsonschema.Draft202012Validator(closed(openapi(kind)))


@functools.cache
def openapi(kind: str) -> Any:
    """The schema as released, with its CEL rules."""
    folder = crd_folder()
    if folder is None:
        pytest.skip("KubeRay's CRDs are not here: set FT_RAY_KUBERAY_CRDS to a folder with rayclusters.yaml and others")
    (file,) = folder.glob(f"*{kind.lower()}s.yaml*")
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    (version,) = [v for v in yaml.load(text, Loader=LOADER)["spec"]["versions"] if v["name"] == "v1"]
    return version["schema"]["openAPIV3Schema"]


def crd_faults(document: Doc) -> list[str]:
    errors = crd(document["kind"]).iter_errors(document)
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in errors]


# CEL, as the API server evaluates it (x-kubernetes-validations)


def cel() -> Any:
    return pytest.importorskip("celpy", reason="cel-python is not installed: the CRDs' CEL rules are not evaluated")


@functools.cache
def program(rule: str) -> Any:
    environment = cel().Environment()
    return environment.program(environment.compile(rule))


def cel_rules(schema: Any, path: str = "") -> list[tuple[str, str]]:
    """(path, rule) of every rule in a schema."""
    found = [(path, v["rule"]) for v in schema.get("x-kubernetes-validations", [])]
    for name, inner in schema.get("properties", {}).items():
        found += cel_rules(inner, f"{path}.{name}")
    if "items" in schema:
        found += cel_rules(schema["items"], f"{path}[]")
    return found


def cel_faults(document: Doc, old: Doc | None = None) -> list[str]:
    """'path: message' of every rule that the object breaks; `old` is what it replaces, for rules on changes."""
    return _cel(openapi(document["kind"]), document, old, "")


def _cel(schema: Any, value: Any, old: Any, path: str) -> list[str]:
    found = []
    for rule in schema.get("x-kubernetes-validations", []):
        changes = "oldSelf" in rule["rule"]
        if changes and old is None:
            continue
        translate = cel().json_to_cel
        given = {"self": translate(value)} | ({"oldSelf": translate(old)} if changes else {})
        if not program(rule["rule"]).evaluate(given):
            found.append(f"{path}: {rule['message']}")
    if isinstance(value, dict):
        for name, inner in schema.get("properties", {}).items():
            if value.get(name) is not None:
                before = old.get(name) if isinstance(old, dict) else None
                found += _cel(inner, value[name], before, f"{path}.{name}".lstrip("."))
    if isinstance(value, list) and "items" in schema:
        for i, item in enumerate(value):
            found += _cel(schema["items"], item, None, f"{path}[{i}]")
    return found


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
            policy = group["template"]["spec"].get("restartPolicy", "Never")
            must(policy == "Never", "restartPolicy under autoscaler v2")
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
    named = head["rayStartParams"].get("redis-username") or "REDIS_USERNAME" in variables
    must(not named, "redis-username outside gcsFaultToleranceOptions")
    must("RAY_enable_autoscaler_v2" not in variables, "autoscaler version given twice")
    if cluster.get("authOptions", {}).get("mode") == "token":
        must(version >= (2, 52), "token authentication before Ray 2.52")
        must("enableK8sTokenAuth" not in cluster["authOptions"], "Kubernetes tokens beside a secret")
    for alpha in ("networkPolicy", "tlsOptions", "historyServerOptions"):
        must(alpha not in cluster, f"{alpha} is behind a feature gate")
    if kind == "RayJob":
        found += job_faults(spec, scaling)
    if kind == "RayCluster":
        must(spec.get("upgradeStrategy", {}).get("type", "None") in ("Recreate", "None"), "upgradeStrategy")
    if kind == "RayService":
        timeout = document["metadata"].get("annotations", {}).get("ray.io/initializing-timeout", "")
        must(not timeout or seconds_of(timeout) > 0, "initializing-timeout")
        must("name" not in head.get("headService", {}).get("metadata", {}), "headService has a name")
        must(spec.get("upgradeStrategy", {}).get("type") in ("NewCluster", "None"), "upgradeStrategy")
    if kind != "RayCluster":
        must("upgradeStrategy" not in cluster, "upgradeStrategy of a cluster that another object owns")
    return found


def seconds_of(text: str) -> float:
    """A Go duration (1h30m, 1.5s) or whole seconds, as the operator parses them; 0 for anything else."""
    units = {"h": 3600, "m": 60, "s": 1, "ms": 1e-3, "us": 1e-6, "\u00b5s": 1e-6, "ns": 1e-9}
    part = r"(\d+\.?\d*|\.\d+)(h|ms|m|us|\u00b5s|ns|s)"
    if re.fullmatch(rf"\+?({part})+", text):
        return sum(float(number) * units[unit] for number, unit in re.findall(part, text))
    return float(text) if re.fullmatch(r"\+?\d+", text) else 0.0


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
