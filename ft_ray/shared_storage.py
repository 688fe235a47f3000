"""Whether all nodes of a cluster see the same storage and registry: asked of those that are up, and of those that join.

The driver writes a token into storage; every node that takes part reads it back before it works. Nodes that an
autoscaler starts later are asked then, and what surely is of one machine alone is refused before they are waited for.
"""

from __future__ import annotations

import contextlib
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ft_ray import ray_session
from ft_ray.errors import InputError, StorageError
from ft_ray.mlflow_store import tracking_uri
from ft_ray.recipe import Recipe
from ft_ray.run_lock import mount_of
from ft_ray.storage import Store
from ft_ray.storage_faults import redacted
from ft_ray.storage_retries import persistently

__all__ = ["Seen", "check", "gets_nodes", "other_nodes", "seen_here"]

Listener = Callable[[dict[str, Any]], None]
_HEARTBEAT = 8.0
_CHECK_SECONDS = 120.0
_SETTLE_SECONDS = 10.0  # a shared folder may show a new file to another node a moment later
_GROUP = "ray.io/node-group"  # the label of nodes that Ray's launcher, its autoscaler or KubeRay started
_BOOTSTRAP = "~/ray_bootstrap_config.yaml"  # what the launcher leaves on the head for the autoscaler there
# A container's own layer and memory: no other machine sees these, while a disk may be exported to all of them.
_OF_ONE_MACHINE = ("overlay", "tmpfs", "ramfs")
_registry_file = ""  # the registry of the run in this process, where it is a file and the run needs it


@contextlib.contextmanager
def check(recipe: Recipe, on_event: Listener, *, registry: bool) -> Iterator[None]:
    """For a run on an attached Ray: the nodes that are up are asked at once; inside, `seen_here` is for the others.

    Raises InputError where other nodes would not see the run's storage, or where the registry is a file of this node
    while there are others, or while something may start them.
    """
    global _registry_file
    uri = tracking_uri(recipe.storage, recipe.tracking.uri) if registry else ""
    file = uri if uri.startswith("sqlite:") else ""
    others, grows = other_nodes(), gets_nodes()
    if file and (others or grows):
        raise _one_file(file)
    asked = others
    if grows and not others and "://" not in recipe.storage:
        _refuse_own_folder(recipe.storage)
        # The driver may share the only worker's node, where any folder is the same: then the head is the other one.
        asked = other_nodes(workless=True)
    if asked:
        on_event({"kind": "status", "message": f"checking that {len(asked) + 1} nodes see the same storage"})
        _ask(Store(recipe.storage), asked, on_event)
    _registry_file = file
    try:
        yield
    finally:
        _registry_file = ""


def other_nodes(*, workless: bool = False) -> list[dict[str, Any]]:
    """Live nodes other than this process's own: those that can work, or all of them, a head without work too."""
    own = ray.get_runtime_context().get_node_id()
    return [
        node for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != own
        and (workless or any(float(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU")))
    ]  # fmt: skip


def gets_nodes() -> bool:
    """Whether something may start more nodes: Ray's launcher and KubeRay mark the nodes of such a cluster.

    A cluster of the launcher that may have no worker (`max_workers: 0`) stays as it is.
    """
    if not ray_session.may_grow():  # a private Ray inside such a node takes the node's mark over
        return False
    if not any(_GROUP in (node.get("Labels") or {}) for node in ray.nodes() if node["Alive"]):
        return False
    with contextlib.suppress(OSError, yaml.YAMLError, AttributeError):
        return bool(yaml.safe_load(Path(_BOOTSTRAP).expanduser().read_text(encoding="utf-8")).get("max_workers", 1))
    return True


# What a node that joins later is asked


@dataclass(frozen=True)
class Seen:
    """What the driver wrote for nodes that join later; sent to them, and checked where they begin to work."""

    store: str
    name: str
    token: str
    node: str
    registry: str

    def check(self) -> None:
        """On the node that works. Raises InputError where it reads something else than the driver wrote."""
        if ray.get_runtime_context().get_node_id() == self.node:
            return
        if self.registry:
            raise _one_file(self.registry)
        deadline = time.monotonic() + _SETTLE_SECONDS
        while self._read() != self.token:
            if time.monotonic() > deadline:
                raise _not_the_same(self.store, platform.node(), "")
            time.sleep(0.5)

    def _read(self) -> str:
        """Storage that fails for a while is waited for as everywhere; raises StorageError where it goes on."""
        try:
            return persistently(lambda: Store(self.store).read(self.name).decode())
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return ""
            raise


@contextlib.contextmanager
def seen_here(store: Store) -> Iterator[Seen | None]:
    """A token in `store` while work goes on elsewhere; None on a private Ray, which is one machine."""
    if not ray_session.may_grow():
        yield None
        return
    name, token = f".seen-{uuid.uuid4().hex}", uuid.uuid4().hex
    store.write(name, token.encode())
    try:
        yield Seen(store.address(), name, token, ray.get_runtime_context().get_node_id(), _registry_file)
    finally:
        with contextlib.suppress(StorageError):  # storage that fails now says so where it matters
            store.remove(name)


# The nodes that are up


def _ask(store: Store, nodes: list[dict[str, Any]], on_event: Listener) -> None:
    """Writes a token here and reads it on every other node."""
    name, token = f".seen-{uuid.uuid4().hex}", uuid.uuid4().hex
    store.write(name, token.encode())
    try:
        # No resources: a node that is busy can still say what it sees.
        task: Any = ray.remote(num_cpus=0, max_retries=0)(_read_token)
        asked = {
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                store.address(), name
            ): node
            for node in nodes
        }
        silent = list(asked)
        deadline, told = time.monotonic() + _CHECK_SECONDS, time.monotonic()
        while silent and time.monotonic() < deadline:
            done, silent = ray.wait(silent, num_returns=len(silent), timeout=1.0)
            for answer in done:
                _same(store, token, answer, asked[answer], on_event)
            if time.monotonic() - told > _HEARTBEAT:
                on_event({"kind": "status", "message": f"waiting for {len(silent)} nodes", "heartbeat": True})
                told = time.monotonic()
        for answer in silent:  # too busy to say; it is asked again where it begins to work
            message = f"the node {_host(asked[answer])} did not say in time whether it sees {redacted(store.url)}"
            on_event({"kind": "status", "message": message})
    finally:
        store.remove(name)


def _host(node: dict[str, Any]) -> str:
    return str(node.get("NodeManagerHostname") or node["NodeManagerAddress"])


def _same(store: Store, token: str, answer: Any, node: dict[str, Any], on_event: Listener) -> None:
    try:
        seen = ray.get(answer)
    except ray.exceptions.RayError as error:  # mostly a node that went away meanwhile: Ray will not use it either
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        message = f"the node {_host(node)} could not say whether it sees {redacted(store.url)} ({redacted(reason)})"
        on_event({"kind": "status", "message": message})
        return
    if seen != token:
        raise _not_the_same(store.url, _host(node), seen)


def _read_token(address: str, name: str) -> str:
    """The token as this node reads it, or what went wrong."""
    try:
        return Store(address).read(name).decode()
    except StorageError as error:
        return "" if isinstance(error.__cause__, FileNotFoundError) else str(error).rstrip(".")


def _not_the_same(address: str, host: str, seen: str) -> InputError:
    return InputError(
        f"storage {redacted(address)} is not the same on the node {host} ({seen or 'not there'}): set storage to an "
        "s3:// or gs:// address, or to a folder that all nodes share."
    )


def _one_file(uri: str) -> InputError:
    return InputError(
        f"the registry {redacted(uri)} is a file, and this cluster has several nodes or may get them: set tracking.uri "
        "or MLFLOW_TRACKING_URI to an MLflow server that all of them reach."
    )


# What cannot be shared


def _refuse_own_folder(storage: str) -> None:
    kind, _ = mount_of(Path(storage).absolute())
    if kind in _OF_ONE_MACHINE:
        raise InputError(
            f"storage {storage} is on this machine alone ({kind}), and this cluster's workers are still to come: set "
            "storage to an s3:// or gs:// address, or to a folder that all nodes share."
        )
