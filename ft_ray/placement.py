"""Where the parts of a run take place on a cluster of several nodes.

Training runs in Ray Train's workers. Merging and evaluating run in the driver where its node has what they need, and
otherwise (a head without work) as a Ray task that asks for it. Every node must see the run's storage, which it checks
before it works (`shared_storage`); base model and prepared data are fetched again, and compared by hash, on a node
whose cache does not have them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import ray

# The training stack is imported inside: a node that only says what it sees starts without it.
from ft_ray import ray_session, shared_storage
from ft_ray.errors import DataError, FtRayError, ModelError, TrainingError
from ft_ray.recipe import Recipe
from ft_ray.shared_storage import Seen
from ft_ray.storage import Store

if TYPE_CHECKING:
    from ft_ray.base_model import ModelFiles
    from ft_ray.chat import Chat
    from ft_ray.prepared_data import Prepared

__all__ = ["cluster", "local_parts", "run_stage"]

Listener = Callable[[dict[str, Any]], None]
_HEARTBEAT = 8.0
_MOST_CPUS = 4.0  # of a stage away from the driver where resources.cpus is auto


@contextlib.contextmanager
def cluster(recipe: Recipe, on_event: Listener, *, registry: bool) -> Iterator[None]:
    """For a run on an existing Ray: connected inside, with its nodes checked. Does nothing on a private one.

    Raises InputError where other nodes would not see the run's storage, or where the registry is a file of this node.
    """
    if not (os.environ.get("RAY_ADDRESS") or ray.is_initialized()):
        yield
        return
    with ray_session.session(), shared_storage.check(recipe, on_event, registry=registry):
        yield


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
    if not ray.is_initialized():
        return None
    others = shared_storage.other_nodes()
    if not others and not shared_storage.gets_nodes():
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
    most = max((_has(node, "CPU") for node in others), default=1.0)
    return {"num_gpus": 0.0, "num_cpus": min(most, _MOST_CPUS) if isinstance(cpus, str) else float(cpus)}


def _has(node: dict[str, Any], kind: str) -> float:
    return float(node["Resources"].get(kind, 0))


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
    with shared_storage.seen_here(Store(recipe.run_path)) as seen:
        answer = task.remote(board, seen, work, recipe, files, chat, prepared, more)
        try:
            return _followed(stage, answer, board, on_event)
        finally:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.cancel(answer, force=True)
            ray.kill(board)


def _followed(stage: str, answer: Any, board: Any, on_event: Listener) -> Any:
    """The task's result; meanwhile its events come to `on_event`."""
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


def _away(
    board: Any,
    seen: Seen | None,
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

    if seen is not None:
        seen.check()
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
