"""Manifests made from a recipe or a serve file, held to the same rules as the ones in k8s/; and the CRDs' CEL rules."""

from __future__ import annotations

import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ft_ray import kube, recipe
from ft_ray.cli import app
from ft_ray.errors import InputError
from ft_ray.kube_serve import service
from tests.declarative.kuberay import cel_faults, cel_rules, crd_faults, kind_faults, openapi, operator_faults
from tests.declarative.manifests import OVERLAYS, RAY, ROOT, Doc, amount, of_kind, pods_of, ray_spec, resolve
from tests.declarative.test_k8s_rules import confined, selects

RECIPE = {
    "name": "Support_8b",
    "model": {"id": "acme/base", "revision": "0e9e39f"},
    "data": {"train": [{"path": "s3://acme/support.jsonl", "weight": 0.5}]},
    "method": "qlora",
    "resources": {"workers": 2, "gpus": 1, "cpus": 8},
    "storage": "s3://acme/ft",
}
TOKEN = "hf_" + "aB3dE6gH9jK2" * 3
SIZES = {
    "gpu": {"workers": 2, "gpus": 1, "cpus": 8},
    "part of a gpu": {"workers": 1, "gpus": 0.5, "cpus": 4},
    "cpu": {"workers": 4, "gpus": 0, "cpus": 2},
}


def made(**changes: Any) -> recipe.Recipe:
    return recipe.from_dict({**RECIPE, **changes})


def check_ray(document: Doc, tmp_path: Path) -> None:
    """What every manifest in k8s/ is held to."""
    assert crd_faults(document) == []
    assert operator_faults(document) == []
    assert ray_spec(document)["authOptions"] == {"mode": "token", "secretName": "ft-ray-token"}
    head = ray_spec(document)["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0" and head["serviceType"] == "ClusterIP"
    platform = {(d["kind"], d["metadata"]["name"]) for d in resolve("gpu")}
    policies = [d for d in resolve("gpu") if d["kind"] == "NetworkPolicy"]
    seen = 0
    for where, template, _ in pods_of([document]):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False and spec["serviceAccountName"] == "ft-ray", where
        assert spec["securityContext"]["runAsNonRoot"] is True, where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert ("PriorityClass", spec["priorityClassName"]) in platform, where
        volumes = {v["name"]: v for v in spec["volumes"]}
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in platform
        (container,) = spec["containers"]
        confined(container, where)
        mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
        assert "emptyDir" in volumes[mounts["/tmp"]["name"]], where
        for mount in mounts.values():
            if {"secret", "configMap"} & set(volumes[mount["name"]]):
                assert mount["readOnly"] is True
        opened = [p for p in policies if selects(p["spec"]["podSelector"], template["metadata"]["labels"])]
        assert len(opened) >= 3, f"{where}: only {[p['metadata']['name'] for p in opened]} reach it"
        seen += 1
    assert seen >= 2


@pytest.mark.parametrize("resources", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("verb", ["run", "train", "sweep"])
def test_a_recipe_s_job_is_valid_and_asks_for_what_it_says(verb: str, resources: Doc, tmp_path: Path) -> None:
    wanted = made(resources=resources)
    document = kube.job(wanted, verb)
    check_ray(document, tmp_path)
    driver, workers = ray_spec(document)["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (resources["workers"],) * 3
    (container,) = workers["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert amount(limits["cpu"]) == resources["cpus"]
    assert amount(limits.get("nvidia.com/gpu", 0)) == (1 if resources["gpus"] else 0)
    assert container["image"].endswith("-gpu" if resources["gpus"] else "-cpu")
    assert ("nodeSelector" in workers["template"]["spec"]) == bool(resources["gpus"])
    # The driver has a pod to itself: Ray offers one CPU there, and the driver takes it.
    assert driver["replicas"] == 1 and driver["rayStartParams"]["num-cpus"] == "1"
    assert json.loads(json.loads(driver["rayStartParams"]["resources"])) == {"driver": 1}
    assert json.loads(document["spec"]["entrypointResources"]) == {"driver": 1}
    assert document["spec"]["entrypointNumCpus"] == 1
    command, ran, file, *more = shlex.split(document["spec"]["entrypoint"])
    assert (command, ran, file) == ("ft-ray", verb, "/recipes/recipe.yaml")
    assert more == (["--space", "/recipes/space.yaml", "--resume"] if verb == "sweep" else [])
    config = kube.recipe_map(wanted, kube.Settings(), "search: {}" if verb == "sweep" else None)
    assert set(config["data"]) == ({"recipe.yaml", "space.yaml"} if verb == "sweep" else {"recipe.yaml"})
    assert kind_faults(config) == []
    mounted = {v["name"]: v for v in driver["template"]["spec"]["volumes"]}["recipes"]
    assert mounted["configMap"]["name"] == config["metadata"]["name"]
    (tmp_path / "recipe.yaml").write_text(config["data"]["recipe.yaml"])
    assert recipe.load(tmp_path / "recipe.yaml").recipe.hash == wanted.hash, "what runs is what was asked for"


def test_render_prints_what_kubectl_takes(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    options = ["resources.workers=4", "--verb", "train", "--queue", "team", "--image", "r/i:1"]
    done = CliRunner().invoke(app, ["k8s", "render", str(file), *options])
    assert done.exit_code == 0, done.output
    config, job = yaml.safe_load_all(done.stdout)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert job["spec"]["shutdownAfterJobFinishes"] is True and "deletionStrategy" not in job["spec"]
    check_ray(job, tmp_path)
    assert {c["image"] for _, t, _ in pods_of([job]) for c in t["spec"]["containers"]} == {"r/i:1"}
    assert ray_spec(job)["workerGroupSpecs"][1]["replicas"] == 4
    assert "workers: 4" in config["data"]["recipe.yaml"]
    again = CliRunner().invoke(app, ["k8s", "render", str(file), "--json"])
    objects = json.loads(again.stdout)["objects"]
    assert [o["kind"] for o in objects] == ["ConfigMap", "RayJob"]
    assert re.fullmatch(r"ft-ray-run-support-8b-[0-9a-f]{6}", objects[1]["metadata"]["name"])


def test_a_sweep_s_space_goes_with_its_recipe(tmp_path: Path) -> None:
    file, space = tmp_path / "recipe.yaml", ROOT / "tune_spaces" / "lora.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    done = CliRunner().invoke(app, ["k8s", "render", str(file), "--verb", "sweep", "--space", str(space)])
    assert done.exit_code == 0, done.output
    config, job = yaml.safe_load_all(done.stdout)
    assert config["data"]["space.yaml"] == space.read_text(encoding="utf-8")
    check_ray(job, tmp_path)
    mounted = {v["name"]: v for v in ray_spec(job)["headGroupSpec"]["template"]["spec"]["volumes"]}["recipes"]
    assert mounted["configMap"]["name"] == config["metadata"]["name"] != kube.name_of("ft-ray-Support_8b-recipe")
    missing = CliRunner().invoke(app, ["k8s", "render", str(file), "--verb", "sweep", "--space", "nowhere.yaml"])
    assert missing.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resources": {"gpus": "auto", "cpus": 4}}, r"resources.gpus is auto, .*: say a number"),
        ({"storage": "runs"}, r"storage 'runs' would end with its pod: set it to an s3://"),
        ({"data": {"train": [{"path": "rows.jsonl"}]}}, r"data.train rows.jsonl is a file of this machine"),
        ({"data": {"train": [{"path": "data/rows.jsonl.gz"}]}}, r"data.train data/rows.jsonl.gz is a file of this"),
        ({"data": {"train": [{"path": "data/"}]}}, r"data.train data/ is a file of this machine"),
        ({"model": {"id": "/models/base"}}, r"model.id /models/base is a file of this machine"),
        ({"evaluation": {"metric": "metrics.py:score"}}, r"evaluation.metric metrics.py is a file of this machine"),
        ({"storage": "s3://me:hunter22@host/ft"}, r"storage holds a secret, and a ConfigMap is no place for one"),
        ({"data": {**RECIPE["data"], "system": f"use {TOKEN}"}}, r"data.system holds a secret"),
    ],
)
def test_what_no_pod_could_do_is_refused(changes: Doc, message: str) -> None:
    def render() -> None:
        kube.recipe_map(made(**changes), kube.Settings())
        kube.job(made(**changes))

    with pytest.raises(InputError, match=message) as refused:
        render()
    assert TOKEN not in str(refused.value) and "hunter22" not in str(refused.value)
    with pytest.raises(InputError, match=message):
        kube.job(made(**changes))


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    changes = ["storage=runs", "resources.gpus=auto", "resources.cpus=auto", f"data.system={TOKEN}", "model.id=./base"]
    done = CliRunner().invoke(app, ["k8s", "render", str(file), *changes, "--json"])
    assert done.exit_code == 2 and TOKEN not in done.output
    for fault in ("storage 'runs'", "resources.gpus is", "resources.cpus is", "data.system holds", "model.id ./base"):
        assert fault in done.output, fault


def test_a_secret_in_a_space_or_a_serve_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the search space holds a secret"):
        kube.recipe_map(made(), kube.Settings(), f"# {TOKEN}\nsearch: {{}}")
    file = tmp_path / "serve.yaml"
    file.write_text((ROOT / "serve" / "merged.yaml").read_text(encoding="utf-8") + f"# {TOKEN}\n")
    with pytest.raises(InputError, match="holds a secret") as refused:
        service(file)
    assert TOKEN not in str(refused.value)


def test_names_stay_apart_and_within_bounds() -> None:
    names = [kube.name_of(f"ft-ray-run-{n}") for n in ("a", "A", "a.b", "a-b", "9" * 60, "9" * 61)]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z][a-z0-9-]{0,45}[a-z0-9]", n) for n in names), names


def test_pods_name_the_ray_that_is_installed() -> None:
    """KubeRay acts by `rayVersion`, and the image brings what these files pin."""
    pins = {*re.findall(r"^ray==(.+)$", (ROOT / "constraints" / "gpu.txt").read_text(encoding="utf-8"), re.M)}
    pins |= {*re.findall(r'"ray\[.+\]==(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))}
    assert pins == {kube.RAY_VERSION}


# Serving

SERVE_FILES = sorted((ROOT / "serve").glob("*.yaml"))
NOT_FOR_PODS = {
    "cpu.yaml": r"listens on 127.0.0.1, which no other pod reaches",
    "multi_lora.yaml": r"reads models from /models/llama-8b, a folder of one machine",
}


@pytest.mark.parametrize("path", SERVE_FILES, ids=lambda p: p.name)
def test_a_serve_file_becomes_a_service_word_for_word(path: Path, tmp_path: Path) -> None:
    if path.name in NOT_FOR_PODS:
        with pytest.raises(InputError, match=NOT_FOR_PODS[path.name]):
            service(path)
        return
    document = service(path)
    assert document["spec"]["serveConfigV2"] == path.read_text(encoding="utf-8")
    check_ray(document, tmp_path)
    # Through the printed YAML, and the same as the manifest that k8s/ keeps by hand.
    printed = CliRunner().invoke(app, ["k8s", "serve", str(path)])
    (again,) = yaml.safe_load_all(printed.stdout)
    assert again == document
    (kept,) = of_kind("gpu", "RayService")
    assert yaml.safe_load(kept["spec"]["serveConfigV2"]) == yaml.safe_load(again["spec"]["serveConfigV2"])
    served = yaml.safe_load(path.read_text(encoding="utf-8"))["applications"][0]["args"]
    (workers,) = ray_spec(document)["workerGroupSpecs"]
    assert workers["replicas"] == served["replicas"]["max"]
    # All of them stand all the time: it is said on top of the manifest, and to the person who pipes it on.
    said = f"{served['replicas']['max']} pods of 1 GPU up all the time (replicas.max), whatever the load"
    assert said in printed.stdout.replace("\n# ", " ") and said in " ".join(printed.stderr.split())
    # The same times to end as in the manifest that is kept.
    assert document["spec"]["rayClusterDeletionDelaySeconds"] == kept["spec"]["rayClusterDeletionDelaySeconds"]
    graces = {
        g["template"]["spec"]["terminationGracePeriodSeconds"]
        for made in (document, kept)
        for g in [ray_spec(made)["headGroupSpec"], *ray_spec(made)["workerGroupSpecs"]]
    }
    assert graces == {served["limits"]["timeout"] + 40}
    stops = {
        str(g["template"]["spec"]["containers"][0]["lifecycle"]["preStop"])
        for made in (document, kept)
        for g in ray_spec(made)["workerGroupSpecs"]
    }
    assert len(stops) == 1 and f"ft_ray.leave_node {served['limits']['timeout'] + 10}; ray stop" in stops.pop()
    assert {"name": "serve", "containerPort": 8000} in workers["template"]["spec"]["containers"][0]["ports"]


def test_a_serve_file_that_leaves_its_device_open_is_refused(tmp_path: Path) -> None:
    """As `serve --print-config` writes it: on pods without a GPU a model meant for one would come up on CPUs."""
    (path,) = [p for p in SERVE_FILES if p.name == "merged.yaml"]
    served = yaml.safe_load(path.read_text(encoding="utf-8"))
    served["applications"][0]["args"]["engine"]["device"] = "auto"
    file = tmp_path / "service.yaml"
    file.write_text(yaml.safe_dump(served))
    with pytest.raises(InputError, match=r"leaves engine\.device to the machine that serves.*: set it to gpu or cpu"):
        service(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "direct"}, r"mode direct, for which every pod needs variables .*: set mode: ingress"),
        ({"adapters": {"billing": "/models/billing"}, "folder": "s3://models/base", "model": None},
         r"reads models from /models/billing, a folder of one machine"),
    ],
)  # fmt: skip
def test_a_serve_file_that_pods_cannot_serve_is_refused(change: Doc, message: str, tmp_path: Path) -> None:
    (path,) = [p for p in SERVE_FILES if p.name == "merged.yaml"]
    served = yaml.safe_load(path.read_text(encoding="utf-8"))
    arguments = served["applications"][0]["args"]
    arguments |= change
    served["applications"][0]["args"] = {key: value for key, value in arguments.items() if value is not None}
    file = tmp_path / "service.yaml"
    file.write_text(yaml.safe_dump(served))
    with pytest.raises(InputError, match=message):
        service(file)


def test_the_serve_files_are_all_seen() -> None:
    assert len(SERVE_FILES) >= 3 and set(NOT_FOR_PODS) < {p.name for p in SERVE_FILES}


# CEL


def test_every_cel_rule_of_the_crds_is_evaluated_and_met() -> None:
    rules = {kind: cel_rules(openapi(kind)) for kind in RAY}
    assert {k: len(v) for k, v in rules.items()} == {"RayCluster": 3, "RayJob": 9, "RayService": 5}
    checked = 0
    for name in OVERLAYS:
        for document in of_kind(name, *RAY):
            assert cel_faults(document, copy.deepcopy(document)) == [], (name, document["metadata"]["name"])
            checked += 1
    assert checked == 20
    rendered = [kube.job(made(), verb) for verb in ("run", "train", "sweep")]
    rendered.append(service(ROOT / "serve" / "merged.yaml"))
    assert [cel_faults(document) for document in rendered] == [[], [], [], []]


def test_the_cel_rules_catch_their_faults() -> None:
    (job, *_) = of_kind("gpu", "RayJob")
    both = copy.deepcopy(job)
    condition = both["spec"]["deletionStrategy"]["deletionRules"][0]["condition"]
    condition["jobDeploymentStatus"] = "Failed"
    assert cel_faults(both) == [
        "spec.deletionStrategy.deletionRules[0].condition: JobStatus and JobDeploymentStatus cannot be used together "
        "within the same deletion condition."
    ]
    neither = copy.deepcopy(job)
    neither["spec"]["deletionStrategy"] = {}
    assert len(cel_faults(neither)) == 1 and "requires either BOTH" in cel_faults(neither)[0]
    (cluster, *_) = of_kind("ha", "RayCluster")
    changed = copy.deepcopy(cluster)
    changed["spec"]["gcsFaultToleranceOptions"]["backend"] = "rocksdb"
    assert cel_faults(changed) == []
    assert cel_faults(changed, cluster) == [
        "spec.gcsFaultToleranceOptions.backend: gcsFaultToleranceOptions.backend is immutable"
    ]
    managed = copy.deepcopy(cluster)
    managed["spec"]["managedBy"] = "somebody"
    assert len(cel_faults(managed)) == 1
