"""KubeRay manifests from a recipe: the RayJob that `ft-ray k8s render` prints, with the resources the recipe asks for.

The recipe travels as a ConfigMap and its name is what a retry resumes. The cluster has a fixed size, one pod a training
worker and one for the driver; merging and evaluating take a training worker's place afterwards, as Ray tasks. Pods are
confined as in `k8s/`: non-root, read-only root, no capabilities, no service-account token, secrets as files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

import ft_ray
from ft_ray.errors import InputError, RecipeError
from ft_ray.job_request import leaks, name_of, secret
from ft_ray.job_upload import kept_here
from ft_ray.recipe import Recipe

__all__ = [
    "Settings", "check", "cluster", "document", "group", "head", "job", "metadata", "name_of", "pod", "recipe_map",
]  # fmt: skip

RAY_VERSION = "2.60.0"
_VERBS = ("run", "train", "sweep")
Document = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a cluster has and a recipe does not say. `queue` is a Kueue LocalQueue; memory is of one pod."""

    image: str = ""
    namespace: str = "ft-ray"
    memory: str | None = None
    driver_memory: str = "16Gi"
    disk: str = "60Gi"
    gpu_key: str = "nvidia.com/gpu"
    pool: str | None = "gpu"
    queue: str | None = None
    tracking_uri: str = "http://mlflow:5000"

    def image_for(self, gpus: int, serve: bool = False) -> str:
        kind = ("serve-" if serve else "") + ("gpu" if gpus else "cpu")
        return self.image or f"registry.example.com/ft-ray:{ft_ray.__version__}-{kind}"


def check(recipe: Recipe) -> tuple[int, int]:
    """(GPUs, CPUs) of one training worker's pod.

    Raises RecipeError with all that no pod could do, or that no manifest may hold: a secret (a ConfigMap is none),
    storage or files of this machine, and `auto`, which would count nodes that are not up.
    """
    faults = [
        f"{key} holds a secret, and a ConfigMap is no place for one: give credentials as the Secrets ft-ray-storage "
        "and ft-ray-hub instead."
        for key in leaks(recipe.to_dict())
    ]
    if "://" not in recipe.storage and not recipe.storage.startswith("/cache/"):
        faults.append(
            f"storage {recipe.storage!r} would end with its pod: set it to an s3:// or gs:// address, or to a folder "
            "below /cache, the volume that all pods share."
        )
    faults += [
        f"{key} {path} is a file of this machine, which no pod has: give an s3:// or gs:// address, or a path below "
        "/cache, the volume that all pods share."
        for key, path in kept_here(recipe, "/cache/")
    ]
    gpus, cpus = recipe.resources.gpus, recipe.resources.cpus
    faults += [
        f"resources.{key} is auto, which counts the nodes that are up, and here none is yet: say a number, for example "
        f"resources.{key}={example}."
        for key, value, example in (("gpus", gpus, 1), ("cpus", cpus, 8))
        if isinstance(value, str)
    ]
    if faults or isinstance(gpus, str) or isinstance(cpus, str):
        raise RecipeError(faults)
    return math.ceil(gpus), cpus


def pod(
    settings: Settings,
    *,
    role: str,
    ray: str,
    image: str,
    cpus: int,
    memory: str,
    gpus: int = 0,
    grace: int = 60,
    requests: int = 0,
    files: Mapping[str, Document] | None = None,
    ports: Sequence[Document] = (),
) -> Document:
    """A pod template of Ray's. `files` are more mounts, read-only: path -> volume source.

    `requests`: seconds that those in progress on it have when it is to end; 0 for a pod that serves nothing.
    """
    sizes: Document = {"cpu": str(cpus), "memory": memory, "ephemeral-storage": settings.disk}
    if gpus:
        sizes[settings.gpu_key] = str(gpus)
    volumes: list[Document] = [
        {"name": "tmp", "emptyDir": {"sizeLimit": settings.disk}},
        {"name": "home", "emptyDir": {"sizeLimit": "10Gi"}},
        {"name": "cache", "persistentVolumeClaim": {"claimName": "ft-ray-cache"}},
        {"name": "hub", "secret": {"secretName": "ft-ray-hub", "optional": True}},
        {"name": "storage", "secret": {"secretName": "ft-ray-storage", "optional": True}},
    ]
    mounts: list[Document] = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "home", "mountPath": "/home/ray"},
        {"name": "cache", "mountPath": "/cache"},
        {"name": "hub", "mountPath": "/var/run/ft-ray/hub", "readOnly": True},
        {"name": "storage", "mountPath": "/var/run/ft-ray/storage", "readOnly": True},
    ]
    for path, source in (files or {}).items():
        name = path.strip("/").replace("/", "-")
        volumes.append({"name": name, **source})
        mounts.append({"name": name, "mountPath": path, "readOnly": True})
    container: Document = {
        "name": f"ray-{role}",
        "image": image,
        "ports": [*ports, {"name": "metrics", "containerPort": 8080}],
        "resources": {"requests": dict(sizes), "limits": dict(sizes)},
        "env": _variables(settings),
        "securityContext": _confined(),
        "volumeMounts": mounts,
    }
    spec: Document = {
        "serviceAccountName": "ft-ray",
        "automountServiceAccountToken": False,
        "priorityClassName": f"ft-ray-{ray}",
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace,
        "securityContext": {**_user(), "fsGroupChangePolicy": "OnRootMismatch"},
        "containers": [container],
        "volumes": volumes,
    }
    if role == "worker":
        # `ray stop` ends the raylet, and all that it started, first.
        leave = f"python -m ft_ray.leave_node {requests}; " if requests else ""
        container["lifecycle"] = {"preStop": {"exec": {"command": ["/bin/sh", "-c", f"{leave}ray stop"]}}}
    if gpus:
        spec["tolerations"] = [{"key": settings.gpu_key, "operator": "Exists", "effect": "NoSchedule"}]
        if settings.pool:
            spec["nodeSelector"] = {"ft-ray.io/pool": settings.pool}
    return {"metadata": {"labels": {"ft-ray.io/ray": ray, "ft-ray.io/role": role}}, "spec": spec}


def _confined() -> Document:
    return {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip


def _user() -> Document:
    return {
        "runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000,
        "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip


def _variables(settings: Settings) -> list[Document]:
    values = {
        "HOME": "/home/ray",
        "FT_RAY_CACHE": "/cache/ft-ray",
        "HF_HOME": "/cache/huggingface",
        "HF_TOKEN_PATH": "/var/run/ft-ray/hub/token",
        "AWS_SHARED_CREDENTIALS_FILE": "/var/run/ft-ray/storage/credentials",
        "AWS_CONFIG_FILE": "/var/run/ft-ray/storage/config",
        "MLFLOW_TRACKING_URI": settings.tracking_uri,
        "RAY_JOB_START_TIMEOUT_SECONDS": "3600",  # a driver that waits for a cold GPU node
    }
    return [{"name": name, "value": value} for name, value in values.items()]


def head(settings: Settings, ray: str, image: str, **more: Any) -> Document:
    """The head group: Ray's own services and no work."""
    ports = [{"name": "gcs-server", "containerPort": 6379}, {"name": "dashboard", "containerPort": 8265}]
    ports += more.pop("ports", [])
    return {
        "serviceType": "ClusterIP",
        "rayStartParams": {
            "num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0", "disable-usage-stats": "true",
        },
        "template": pod(settings, role="head", ray=ray, image=image, cpus=2, memory="8Gi", ports=ports, **more),
    }  # fmt: skip


def group(name: str, replicas: int, template: Document, most: int | None = None) -> Document:
    return {
        "groupName": name, "replicas": replicas, "minReplicas": replicas, "maxReplicas": most or replicas,
        "rayStartParams": {"disable-usage-stats": "true"}, "template": template,
    }  # fmt: skip


def cluster(head_group: Document, groups: list[Document]) -> Document:
    """A cluster of fixed size: no autoscaler, so that no pod needs a service-account token."""
    return {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token", "secretName": "ft-ray-token"},
        "enableInTreeAutoscaling": False,
        "headGroupSpec": head_group,
        "workerGroupSpecs": groups,
    }


def recipe_map(recipe: Recipe, settings: Settings, space: str | None = None) -> Document:
    """The ConfigMap that the job mounts at /recipes; `space` is the text of a sweep's search space.

    Raises RecipeError as `check` does, and InputError for a space that holds a secret.
    """
    check(recipe)
    if space is not None and secret(space):
        raise InputError("the search space holds a secret, and a ConfigMap is no place for one: take it out.")
    values = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(_map_name(recipe, space is not None), settings, "platform"),
        "data": {"recipe.yaml": text, **({} if space is None else {"space.yaml": space})},
    }


def _map_name(recipe: Recipe, sweeps: bool) -> str:
    return name_of(f"ft-ray-{recipe.name}-{'sweep' if sweeps else 'recipe'}")


def metadata(name: str, settings: Settings, part: str) -> Document:
    return {"name": name, "namespace": settings.namespace, "labels": {"ft-ray.io/part": part}}


def job(recipe: Recipe, verb: str = "run", settings: Settings | None = None, flags: Sequence[str] = ()) -> Document:
    """The RayJob. Raises InputError for another verb, RecipeError for what `check` refuses."""
    settings = settings or Settings()
    if verb not in _VERBS:
        raise InputError(f"verb {verb!r} has no RayJob: use {', '.join(_VERBS)}.")
    gpus, cpus = check(recipe)
    image = settings.image_for(gpus)
    configuration = {"configMap": {"name": _map_name(recipe, verb == "sweep")}}
    command = ["ft-ray", verb, "/recipes/recipe.yaml"]
    if verb == "sweep":  # which starts anew unless it is told to go on
        command += ["--space", "/recipes/space.yaml", "--resume"]
    shared: Document = {"ray": "train", "image": image, "files": {"/recipes": configuration}}
    memory = settings.memory or (f"{48 * gpus}Gi" if gpus else f"{max(4 * cpus, 8)}Gi")
    # Ray's own agents take a core of a pod beside the one that feeds a GPU; without one, all cores are the worker's.
    workers = pod(settings, role="worker", cpus=cpus, memory=memory, gpus=gpus, **shared)
    driver = pod(settings, role="worker", cpus=2, memory=settings.driver_memory, **shared)
    about = metadata(name_of(f"ft-ray-{verb}-{recipe.name}"), settings, verb)
    if settings.queue:
        about["labels"]["kueue.x-k8s.io/queue-name"] = settings.queue
    spec: Document = {
        "entrypoint": " ".join([*command, *flags]),
        "entrypointNumCpus": 1,
        "entrypointResources": json.dumps({"driver": 1}),
        "submissionMode": "K8sJobMode",
        "backoffLimit": 3,  # a new cluster each time; the recipe's name makes it go on from the last checkpoint
        "activeDeadlineSeconds": 86400 if recipe.budget.hours is None else int(3600 * (recipe.budget.hours + 4)),
        "preRunningDeadlineSeconds": 3600,
        "submitterConfig": {"backoffLimit": 3},
        "submitterPodTemplate": _submitter(image),
        "rayClusterSpec": cluster(
            head(settings, **shared),
            [group("driver", 1, driver), group("gpu" if gpus else "cpu", recipe.resources.workers, workers)],
        ),
    }
    # The driver's pod offers one CPU and the driver takes it: no training worker lands there.
    spec["rayClusterSpec"]["workerGroupSpecs"][0]["rayStartParams"] |= {
        "num-cpus": "1", "resources": json.dumps(json.dumps({"driver": 1})),
    }  # fmt: skip
    if settings.queue:
        # Kueue suspends and resumes a whole job, and its cluster goes with it.
        spec |= {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": 120}
    else:
        spec["deletionStrategy"] = {
            "deletionRules": [
                {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 120}},
                {"policy": "DeleteSelf", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 604800}},
                {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 3600}},
                {"policy": "DeleteCluster", "condition": {"jobDeploymentStatus": "Failed", "ttlSeconds": 3600}},
            ]
        }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": about, "spec": spec}


def _submitter(image: str) -> Document:
    sizes = {"cpu": "1", "memory": "1Gi", "ephemeral-storage": "1Gi"}
    return {
        "metadata": {"labels": {"ft-ray.io/role": "submitter"}},
        "spec": {
            "serviceAccountName": "ft-ray",
            "automountServiceAccountToken": False,
            "priorityClassName": "ft-ray-train",
            "restartPolicy": "Never",
            "securityContext": _user(),
            "containers": [
                {
                    "name": "ray-job-submitter",
                    "image": image,
                    "resources": {"requests": {**sizes, "cpu": "500m"}, "limits": sizes},
                    "env": [{"name": "HOME", "value": "/tmp"}],
                    "securityContext": _confined(),
                    "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
                }
            ],
            "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}],
        },
    }


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, as a person writes them."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def document(*objects: Document, head: str = "") -> str:
    """The objects as one YAML stream, with `head` as a comment on top."""
    comment = "".join(f"# {line}".rstrip() + "\n" for line in head.splitlines())
    parts = [yaml.dump(o, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110) for o in objects]
    return comment + "---\n".join(parts)
