"""Where the parts of a run take place on a cluster of several nodes, and whether these nodes see the same things.

Training runs in Ray Train's workers. Merging and evaluating run in the driver where its node has what they need, and
otherwise (a head without work) as a Ray task that asks for it. Every node must see the run's storage; base model and
prepared data are fetched again, and compared by hash, on a node whose cache does not have them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# The training stack is imported inside: a node that says what it sees of the storage starts without it.
from ft_ray import ray_session
from ft_ray.errors import DataError, FtRayError, InputError, ModelError, StorageError, TrainingError
from ft_ray.mlflow_store import tracking_uri
from ft_ray.recipe import Recipe
from ft_ray.storage import Store
from ft_ray.storage_faults import redacted

if TYPE_CHECKING:
    from ft_ray.base_model import ModelFiles
    from ft_ray.chat import Chat
    from ft_ray.prepared_data import Prepared

__all__ = ["cluster", "local_parts", "run_stage"]

Listener = Callable[[dict[str, Any]], None]
_HEARTBEAT = 8.0
_CHECK_SECONDS = 120.0


@contextlib.contextmanager
def cluster(recipe: Recipe, on_event: Listener, *, registry: bool) -> Iterator[None]:
    """For a run on an existing Ray: connected inside, with the nodes checked once. Does nothing on one machine.

    Raises InputError where other nodes would not see the run's storage, or where the registry is a file of this node.
    """
    if not (os.environ.get("RAY_ADDRESS") or ray.is_initialized()):
        yield
        return
    with ray_session.session():
        others = _other_nodes()
        if others:
            on_event({"kind": "status", "message": f"checking that {len(others) + 1} nodes see the same storage"})
            if registry:
                _check_registry(recipe)
            _check_storage(Store(recipe.storage), others, on_event)
        yield


def _other_nodes() -> list[dict[str, Any]]:
    """Live nodes that can work, other than this process's own."""
    own = ray.get_runtime_context().get_node_id()
    return [
        node for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != own and (_has(node, "CPU") or _has(node, "GPU"))
    ]  # fmt: skip


def _has(node: dict[str, Any], kind: str) -> float:
    return float(node["Resources"].get(kind, 0))


def _check_registry(recipe: Recipe) -> None:
    uri = tracking_uri(recipe.storage, recipe.tracking.uri)
    if uri.startswith("sqlite:"):
        raise InputError(
            f"the registry {redacted(uri)} is a file, and this cluster has several nodes: set tracking.uri or "
            "MLFLOW_TRACKING_URI to an MLflow server that all of them reach."
        )


def _check_storage(store: Store, nodes: list[dict[str, Any]], on_event: Listener) -> None:
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
                _same(store, token, answer, asked[answer])
            if time.monotonic() - told > _HEARTBEAT:
                on_event({"kind": "status", "message": f"waiting for {len(silent)} nodes", "heartbeat": True})
                told = time.monotonic()
        for answer in silent:  # too busy to say; its own task will, when it cannot read the run
            message = f"the node {_host(asked[answer])} did not say in time whether it sees {redacted(store.url)}"
            on_event({"kind": "status", "message": message})
    finally:
        store.remove(name)


def _host(node: dict[str, Any]) -> str:
    return str(node.get("NodeManagerHostname") or node["NodeManagerAddress"])


def _same(store: Store, token: str, answer: Any, node: dict[str, Any]) -> None:
    try:
        seen = ray.get(answer)
    except ray.exceptions.RayError:  # the node went away meanwhile; Ray will not use it either
        return
    if seen != token:
        raise InputError(
            f"storage {redacted(store.url)} is not the same on the node {_host(node)} ({seen or 'not there'}): set "
            "storage to an s3:// or gs:// address, or to a folder that all nodes share."
        )


def _read_token(address: str, name: str) -> str:
    """The token as this node reads it, or what went wrong."""
    try:
        return Store(address).read(name).decode()
    except StorageError as error:
        return "" if isinstance(error.__cause__, FileNotFoundError) else str(error).rstrip(".")


# Base model and data on the node that needs them


def local_parts(
    recipe: Recipe, files: ModelFiles, prepared: Prepared, chat: Chat | None = None
) -> tuple[ModelFiles, Prepared]:
    """The base model and the prepared data on this node: as they are where its cache has them, else made again.

    Raises ModelError and DataError where this node finds other content than the driver did.
    """
    from ft_ray.base_model import resolve
    from ft_ray.chat import chat_of
    from ft_ray.dataset import prepare
    from ft_ray.prepared_data import Prepared

    if not files.folder.is_dir():
        found = resolve(recipe.model)
        if found.hash != files.hash:
            raise ModelError(
                f"{recipe.model.id} is another model on this node ({found.hash[:12]}, the driver has "
                f"{files.hash[:12]}): pin model.revision, or set FT_RAY_CACHE to a folder that all nodes share."
            )
        files = dataclasses.replace(files, folder=found.folder)
    if isinstance(prepared, Prepared) and not (prepared.folder / "meta.json").is_file():
        again = prepare(recipe, chat or chat_of(recipe.model, files.folder), model_hash=files.hash)
        if again.hashes != prepared.hashes:
            raise DataError(
                "this node reads other data than the driver did: put them at an address that does not change, or set "
                "FT_RAY_CACHE to a folder that all nodes share."
            )
        prepared = again
    return files, prepared


# Stages away from the driver


def _wanted(recipe: Recipe) -> dict[str, float] | None:
    """What a stage away from here asks for; None where this node has it."""
    if not ray.is_initialized() or not _other_nodes():
        return None
    own = ray.get_runtime_context().get_node_id()
    here: dict[str, Any] = next((node for node in ray.nodes() if node["NodeID"] == own), {"Resources": {}})
    gpus, cpus = recipe.resources.gpus, recipe.resources.cpus
    if isinstance(gpus, str):
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    if gpus:
        return None if _has(here, "GPU") else {"num_gpus": min(1.0, gpus), "num_cpus": 1.0}
    if _has(here, "CPU"):
        return None
    most = max(_has(node, "CPU") for node in _other_nodes())
    return {"num_gpus": 0.0, "num_cpus": min(most, 4.0) if isinstance(cpus, str) else float(cpus)}


def run_stage(
    recipe: Recipe,
    stage: str,
    work: Callable[..., Any],
    files: ModelFiles,
    chat: Chat,
    prepared: Prepared,
    *more: Any,
    on_event: Listener,
) -> Any:
    """`work(recipe, files, chat, prepared, *more, on_event=…)`, here or on a node that has what the recipe asks for.

    Returns its result; its events come back to `on_event`. A node that is lost meanwhile is replaced
    `resources.retries` times, so `work` must be safe to begin again. Raises what it raises.
    """
    from ft_ray.train_control import open_board

    wanted = _wanted(recipe)
    if wanted is None:
        return work(recipe, files, chat, prepared, *more, on_event=on_event)
    asked = ", ".join(f"{number:g} {name[4:-1].upper()}" for name, number in wanted.items() if number)
    on_event({"kind": "status", "message": f"{stage} waits for a node with {asked}"})
    board = open_board()
    task: Any = ray.remote(max_retries=recipe.resources.retries)(_away).options(name=f"ft-ray-{stage}", **wanted)
    answer = task.remote(board, work, recipe, files, chat, prepared, more)
    told = time.monotonic()
    try:
        while True:
            done, _ = ray.wait([answer], timeout=0.5)
            for event in ray.get(board.take.remote(), timeout=60):
                on_event(event)
                told = time.monotonic()
            if done:
                return ray.get(answer)
            if time.monotonic() - told > _HEARTBEAT:
                on_event({"kind": "status", "message": f"{stage} goes on", "heartbeat": True})
                told = time.monotonic()
    except ray.exceptions.RayError as error:
        raise _as_ours(error, stage) from error
    finally:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.cancel(answer, force=True)
        ray.kill(board)


def _away(
    board: Any,
    work: Callable[..., Any],
    recipe: Recipe,
    files: ModelFiles,
    chat: Chat,
    prepared: Prepared,
    more: tuple[Any, ...],
) -> Any:
    """Runs in the task."""

    def post(event: dict[str, Any]) -> None:
        ray.get(board.post.remote(event))

    files, prepared = local_parts(recipe, files, prepared, chat)
    return work(recipe, files, chat, prepared, *more, on_event=post)


def _as_ours(error: BaseException, stage: str) -> FtRayError:
    from ft_ray.train_control import classify, root_causes

    for cause in root_causes(error):
        ours = classify(cause)
        if ours is not None:
            return ours
        if not isinstance(cause, ray.exceptions.RayError):
            return TrainingError(f"{stage} failed ({type(cause).__name__}: {str(cause).splitlines()[0][:200]}).")
    return TrainingError(
        f"{stage} was lost with its node ({type(error).__name__}): the same command goes on from there."
    )
