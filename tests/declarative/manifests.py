"""What kustomize makes of k8s/, without kustomize: the objects of an overlay, and the pods in them.

The overlays use little of it: resources, namespace, images and JSON patches. test_k8s.py compares this with the real
thing where kubectl is there.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "k8s"
OVERLAYS = ["cpu", "gpu", "kueue", "ha"]
CLUSTER_SCOPED = {"Namespace", "PriorityClass", "ResourceFlavor", "ClusterQueue"}
RAY = {"RayCluster": ("spec",), "RayJob": ("spec", "rayClusterSpec"), "RayService": ("spec", "rayClusterConfig")}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Doc = dict[str, Any]


def load_all(path: Path) -> list[Any]:
    return [d for d in yaml.load_all(path.read_text(encoding="utf-8"), Loader=LOADER) if d is not None]


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
    """The objects of an overlay, of `base`, or of another folder of k8s/ by its path."""
    folder = FOLDER / (name if name == "base" or "/" in name else f"overlays/{name}")
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
    return pods_of(resolve(name))


def pods_of(documents: list[Doc]) -> Iterator[tuple[str, Doc, Doc]]:
    for document in documents:
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
