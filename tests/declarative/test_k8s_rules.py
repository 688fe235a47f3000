"""Our own rules for k8s/: confined pods, a closed network, secrets by reference, jobs that resume, the served file."""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from ft_ray import cli, recipe, search_space
from ft_ray.serve_args import parse
from tests.declarative.kuberay import kind_faults
from tests.declarative.manifests import OVERLAYS, RAY, ROOT, Doc, amount, key, of_kind, pods, ray_spec, resolve


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
    assert seen >= 11


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
    assert len(scaled) == (2 if name == "kueue" else 5)
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


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    yield path, value
    if isinstance(value, dict):
        for k, v in value.items():
            yield from walk(v, f"{path}.{k}")
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from walk(v, f"{path}[{i}]")


def open_secrets(document: Doc) -> list[str]:
    """Places where a secret stands in the manifest itself."""
    found = []
    for path, value in walk(document):
        if isinstance(value, dict) and re.search(r"(?i)token|secret|passw|_key", str(value.get("name"))):
            # A variable with such a name holds a path, or takes its value from a Secret.
            found += [] if str(value.get("value", "/")).startswith("/") else [path]
        if isinstance(value, str) and re.search(r"(hf_|sk-)[A-Za-z0-9]{16,}|AKIA[0-9A-Z]{16}|-----BEGIN", value):
            found.append(path)
        if path.endswith("runtimeEnvYAML"):  # the job API shows it to everyone who may list jobs
            found.append(path)
    return found


@pytest.mark.parametrize("name", OVERLAYS)
def test_secrets_come_by_reference_only(name: str) -> None:
    assert {key(d): open_secrets(d) for d in resolve(name)} == {key(d): [] for d in resolve(name)}


def test_a_secret_in_a_manifest_is_seen() -> None:
    (job, *_) = of_kind("gpu", "RayJob")
    container = ".spec.rayClusterSpec.headGroupSpec.template.spec.containers[0]"
    head = ray_spec(job)["headGroupSpec"]["template"]["spec"]["containers"][0]
    count = len(head["env"])
    head["env"] = [
        *head["env"],
        {"name": "HF_TOKEN", "value": "abc"},
        {"name": "HF_TOKEN_PATH", "value": "/var/run/token"},
        {"name": "MY_PASSWORD", "valueFrom": {"secretKeyRef": {"name": "x", "key": "password"}}},
        {"name": "OTHER", "value": "hf_" + "a" * 20},
    ]
    job["spec"]["runtimeEnvYAML"] = "env_vars: {}"
    assert sorted(open_secrets(job)) == sorted(
        [f"{container}.env[{count}]", f"{container}.env[{count + 3}].value", ".spec.runtimeEnvYAML"]
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
    head = (here, labels["RayJob/ft-ray-run/head"])
    worker = (here, labels["RayJob/ft-ray-run/cpu" if name == "cpu" else "RayJob/ft-ray-run/gpu"])
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
    for end in (dns, "169.254.20.10"):
        assert passes(worker, end, 53, "UDP") and passes(mlflow, end, 53, "UDP") and passes(worker, end, 53)
    for source, target, port in [
        (worker, model, 8000), (model, head, 6379), (worker, service, 8265), (stranger, head, 8265),
        (stranger, worker, 10001), (stranger, mlflow, 5000), (submitter, head, 6379), (submitter, head, 10001),
        (submitter, mlflow, 5000), (client, head, 8265), (client, service, 8265), (client, model, 8080),
        (other, model, 8000), (other, head, 8265), (other, mlflow, 5000), (operator, head, 10001),
        (prometheus, head, 8265), (worker, "169.254.169.254", 80), (worker, "169.254.169.254", 443),
        (head, "169.254.169.254", 443), (worker, "10.96.0.1", 443), (worker, "52.216.0.1", 80),
        (worker, "169.254.20.10", 80), (stranger, "169.254.20.10", 443),
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
    jobs, swept = of_kind(name, "RayJob"), set[str]()
    jobs.sort(key=lambda j: j["metadata"]["name"] == "ft-ray-sweep")
    assert {parsed(j["spec"]["entrypoint"])[0] for j in jobs} == {"train", "run", "sweep"}
    for job in jobs:
        spec = job["spec"]
        verb, parameters = parsed(spec["entrypoint"])
        assert not parameters["fresh"] and parameters.get("resume", True), "a retry would start over"
        wanted = recipe_of(name, parameters["recipe"], parameters["overrides"], tmp_path)
        assert "://" in wanted.storage, "a retry on new nodes finds nothing in a local folder"
        assert not parameters["recipe"].startswith("s3:") and parameters["recipe"].startswith("/recipes/")
        if verb == "sweep":
            (config,) = of_kind(name, "ConfigMap")
            file = ROOT / "tune_spaces" / ("lora_small.yaml" if name == "cpu" else "lora.yaml")
            assert config["data"][Path(parameters["space"]).name] == file.read_text(encoding="utf-8")
            search_space.check(search_space.load(file), wanted)
            assert wanted.name not in swept, "a sweep's winner would replace the run of that name"
            assert {wanted.name.removesuffix("-swept")} == swept, "and would be taken for another model's"
        swept.add(wanted.name)
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
    here, there = flat(served), flat(own)
    different = {k.removeprefix("applications[0].") for k in here.keys() | there.keys() if here.get(k) != there.get(k)}
    if file == "cpu.yaml":
        assert different and different <= MAY_DIFFER
    else:
        assert different == ({"args.replicas.min"} if name == "ha" else set())
    (application,) = served["applications"]
    args = parse(application["args"])
    assert application["import_path"] == "ft_ray.serving:build"
    assert served["http_options"]["host"] == "0.0.0.0" and args.keys == "/etc/ft-ray/keys.json"
    assert args.storage.startswith("s3://")
    # The proxies that the service sends requests to are on workers.
    assert spec["excludeHeadPodFromServeSvc"] is True and served["proxy_location"] == "EveryNode"
    cluster = spec["rayClusterConfig"]
    # What is to stop answers its requests first, as long as each may take: replicas, their pods, the cluster.
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:  # an ingress runs on any pod
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] == args.limits.draining + 30
    assert spec["rayClusterDeletionDelaySeconds"] == args.limits.draining + 60
    for group in cluster["workerGroupSpecs"]:
        template = group["template"]["spec"]
        (container,) = template["containers"]
        # `ray stop` alone would end them in the middle of their answers, whatever the pod's own time to end.
        leave = f"python -m ft_ray.leave_node {args.limits.draining:.0f}; ray stop"
        assert container["lifecycle"]["preStop"]["exec"]["command"] == ["/bin/sh", "-c", leave]
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        assert mounts["/etc/ft-ray"] == "keys"
        # A replica that starts again finds its kernels compiled: on the volume, not in the pod.
        if args.engine.device == "gpu":
            assert args.engine.cache is not None and args.engine.cache.startswith("/cache/")
            assert mounts["/cache"] == "cache"
        assert {"name": "keys", "secret": {"secretName": "ft-ray-api-keys"}} in template["volumes"]
        assert {"name": "serve", "containerPort": served["http_options"]["port"]} in container["ports"]
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
    # Two replicas of the model from the start, which no one node can hold: a drain leaves one.
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    args = parse(application["args"])
    assert args.replicas is not None and args.replicas.min >= 2 and group["minReplicas"] >= args.replicas.min
    assert amount(container["resources"]["limits"]["nvidia.com/gpu"]) == args.engine.tensor_parallel
    labels = {where: template["metadata"]["labels"] for where, template, _ in pods("ha")}
    (budget,) = of_kind("ha", "PodDisruptionBudget")
    assert selects(budget["spec"]["selector"], labels["RayService/ft-ray-serve/gpu"])
    assert not selects(budget["spec"]["selector"], labels["RayService/ft-ray-serve/head"])
    # Its pods' owner has no scale subresource: with anything but a whole number to keep, no pod is ever evicted.
    keep = budget["spec"].get("minAvailable")
    assert "maxUnavailable" not in budget["spec"] and type(keep) is int and 1 <= keep < group["minReplicas"]
    guide = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (rules,) = of_kind("ha", "PrometheusRule")
    alerts = [r["alert"] for g in rules["spec"]["groups"] for r in g["rules"]]
    assert len(alerts) >= 4 and [a for a in alerts if a not in guide] == [], "an alert without a runbook"


@pytest.mark.parametrize(
    ("cloud", "opened"),
    [("gke", {("169.254.169.254", 80), ("169.254.169.252", 988)}), ("eks", {("169.254.170.23", 80)})],
)
def test_a_cloud_s_identity_is_opt_in_and_opens_no_more(cloud: str, opened: set[tuple[str, int]]) -> None:
    (policy,) = resolve(f"identity/{cloud}")
    assert kind_faults(policy) == [] and policy["metadata"]["namespace"] == "ft-ray"
    policies = of_kind("gpu", "NetworkPolicy")
    here = {"kubernetes.io/metadata.name": "ft-ray"}
    labels = {where: template["metadata"]["labels"] for where, template, _ in pods("gpu")}
    worker = (here, labels["RayJob/ft-ray-run/gpu"])
    node = [(f"169.254.{a}", p) for a in ("169.254", "169.252", "170.23", "170.2") for p in (80, 443, 988)]
    assert [end for end in node if open_between(policies, worker, *end)] == []
    assert {end for end in node if open_between([*policies, policy], worker, *end)} == opened
    for other in (labels["RayJob/ft-ray-run/submitter"], labels["Deployment/mlflow"], {"app": "other"}):
        assert not any(open_between([*policies, policy], (here, other), *end) for end in opened)


def test_a_pod_that_finds_no_node_gives_way_to_the_other_group() -> None:
    """Ray's autoscaler waits an hour by default, as long as a job waits for its driver in all."""
    name = "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"
    source = Path(find_spec("ray").submodule_search_locations[0]) / "autoscaler/v2/instance_manager/config.py"  # type: ignore
    assert f'"{name}"' in source.read_text(encoding="utf-8"), "Ray reads another variable now"
    for document in of_kind("gpu", "RayCluster", "RayJob"):
        variables = {e["name"]: e["value"] for e in ray_spec(document)["autoscalerOptions"]["env"]}
        assert 600 <= int(variables[name]) < document["spec"].get("preRunningDeadlineSeconds", 3600) / 2


def test_the_steps_of_the_operations_page_are_in_order() -> None:
    guide = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    steps = guide[guide.index("## 6. Kubernetes") : guide.index("## 7. Secrets")]
    order = ["helm repo add kuberay ", "helm install kuberay-operator kuberay/", "-l ft-ray.io/part=platform",
             "make the secrets of section 7", "-l ft-ray.io/part=run", "-l ft-ray.io/part=serve"]  # fmt: skip
    assert [steps.index(step) for step in order] == sorted(steps.index(step) for step in order)
    assert "Recreate" in guide[guide.index("## 9. Upgrades") : guide.index("## 10. Alerts")]


def test_the_operations_page_leads_somewhere() -> None:
    def anchors(text: str) -> set[str]:
        titles = re.findall(r"^#+ (.+)$", text, re.M)
        return {re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-") for title in titles}

    guide = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", guide)
    assert len(links) >= 15
    for link in links:
        page, _, anchor = link.partition("#")
        target = ROOT / "docs" / (page or "operations.md")
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link
    assert "has been applied to a live cloud or a live Kubernetes cluster" in guide
    named = re.findall(r"(?<![\w./-])((?:cluster|k8s|serve)/[\w/.-]*\w)", guide)
    assert len(named) >= 10 and [n for n in named if not (ROOT / n).exists()] == []
    verbs = set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    commands = re.findall(r"(?:^|-- |\s{4}|`)ft-ray ([a-z]+) ", guide, re.M)
    assert len(commands) >= 4 and set(commands) <= verbs
