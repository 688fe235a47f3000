"""KubeRay's RayService from a Ray Serve file: one of `serve/`, or what `ft-ray serve --print-config` wrote."""

from __future__ import annotations

import math
from pathlib import Path

from ft_ray.errors import InputError
from ft_ray.job_request import secret
from ft_ray.kube import Document, Settings, cluster, group, head, metadata, name_of, pod
from ft_ray.serve_file import read

__all__ = ["service", "standing"]

_KEYS = "/etc/ft-ray/keys.json"
# Seconds more than requests may take: for a pod to end after them, and for the old cluster to hear that it is to end.
_POD, _CLUSTER = 30, 60


def service(file: str | Path, settings: Settings | None = None, *, cpus: int = 8) -> Document:
    """The RayService that hosts the applications of `file`, its `serveConfigV2` that file's own text.

    Its cluster has no autoscaler, so that no pod needs a service-account token: as many pods as `replicas.max` are up
    all the time (`standing` says so). Raises InputError for a file that pods could not serve: one that listens on
    loopback, has no API keys at /etc/ft-ray/keys.json (the Secret ft-ray-api-keys), holds a secret, leaves its device
    open, keeps its models or adapters on one machine, or is of mode direct.
    """
    settings = settings or Settings()
    given = read(file)
    text, served, arguments = given.text, given.document, given.args
    http = served.get("http_options", {})
    if http.get("host") != "0.0.0.0":
        raise InputError(
            f"{file} listens on {http.get('host')}, which no other pod reaches: set http_options.host to 0.0.0.0."
        )
    if served.get("proxy_location") != "EveryNode":
        raise InputError(f"{file} has no proxy on worker pods, where the service sends: set proxy_location: EveryNode.")
    if secret(text):
        raise InputError(f"{file} holds a secret, and a manifest is no place for one: name a file of a Secret instead.")
    if arguments.keys != _KEYS:
        raise InputError(f"{file} reads API keys from {arguments.keys}: set keys: {_KEYS}, the Secret ft-ray-api-keys.")
    if arguments.engine.device == "auto":
        raise InputError(
            f"{file} leaves engine.device to the machine that serves, and pods have to be asked for: set it to gpu or "
            "cpu."
        )
    for place in (arguments.folder or arguments.storage, *arguments.adapters.values()):
        if "://" not in place and not place.startswith("/cache/"):
            raise InputError(
                f"{file} reads models from {place}, a folder of one machine: use an s3:// or gs:// address, or a "
                "folder below /cache, the volume that all pods share."
            )
    if arguments.mode == "direct":
        raise InputError(
            f"{file} is of mode direct, for which every pod needs variables and HAProxy's ports that a RayService made "
            "here does not have: set mode: ingress, or start Ray by hand (docs/operations.md, 12)."
        )
    gpu = arguments.engine.device == "gpu"
    gpus = arguments.engine.tensor_parallel if gpu else 0
    replicas = arguments.replicas
    least = max(1, replicas.min if replicas is not None else 1)
    most = max(least, replicas.max if replicas is not None else 1)
    image, drained = settings.image_for(gpus, serve=True), math.ceil(arguments.limits.draining)
    port = {"name": "serve", "containerPort": int(http.get("port", 8000))}
    shared: Document = {
        "ray": "serve", "image": image, "grace": drained + _POD,
        "files": {"/etc/ft-ray": {"secret": {"secretName": "ft-ray-api-keys"}}},
    }  # fmt: skip
    memory = settings.memory or (f"{48 * gpus}Gi" if gpu else f"{3 * cpus}Gi")
    worker = pod(settings, role="worker", cpus=cpus, memory=memory, gpus=math.ceil(gpus), ports=[port],
                 requests=drained, **shared)  # fmt: skip
    about = metadata(name_of(f"ft-ray-{given.name}"), settings, "serve")
    about["annotations"] = {"ray.io/initializing-timeout": "30m"}  # a cold node, a pull of the image, the weights
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": about,
        "spec": {
            "upgradeStrategy": {"type": "NewCluster"},
            "rayClusterDeletionDelaySeconds": drained + _CLUSTER,  # requests in progress end first
            "excludeHeadPodFromServeSvc": True,
            "serveConfigV2": text,
            "rayClusterConfig": cluster(
                head(settings, ports=[port], **shared), [group("gpu" if gpu else "cpu", most, worker)]
            ),
        },
    }


def standing(document: Document) -> str:
    """What a RayService made here keeps up whatever the load, for a person."""
    (workers,) = document["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = next((int(count) for name, count in limits.items() if name.endswith("/gpu")), 0)
    count = workers["replicas"]
    each = f"{gpus} GPU{'s' if gpus != 1 else ''}" if gpus else f"{limits['cpu']} CPUs"
    return (
        f"{count} pod{'s' if count != 1 else ''} of {each} up all the time (replicas.max), whatever the load: this "
        "cluster has no autoscaler. Lower replicas.max for fewer, or use the RayService of k8s/, which grows from "
        "replicas.min."
    )
