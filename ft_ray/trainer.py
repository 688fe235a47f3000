"""Training on Ray: Ray Train V2 starts one worker a rank, each runs `sft`, the driver listens.

One path for a laptop's CPU, one GPU and many workers. Every worker begins by looking for the newest committed
checkpoint, so a replaced worker, a new driver and the same command run again all resume in the same way. The
driver alone talks to the user: rank 0 posts events on a board (an actor), the driver takes them off it.
"""

from __future__ import annotations

import logging
import math
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ray
from ray.train import FailureConfig, RunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from ft_ray import checkpoint, objective, oom_ladder, ray_session, shared_storage, train_here, train_room
from ft_ray.base_model import ModelFiles
from ft_ray.chat import Chat, load_tokenizer
from ft_ray.errors import DamagedError, FtRayError, Interrupted, TrainingError
from ft_ray.recipe import Recipe
from ft_ray.recipe_sections import duration_seconds
from ft_ray.run_lock import Hold, check_held, hold_of
from ft_ray.storage import Store
from ft_ray.storage_retries import persistently
from ft_ray.train_control import RAY_RECORDS, HearSigterm, classify, open_board, ray_records, root_causes
from ft_ray.train_faults import MOST_PREEMPTIONS, RetryLostWorkers, controller_lost, describe, start_timeout
from ft_ray.train_listener import Listener, OnEvent
from ft_ray.train_rank import work
from ft_ray.train_sizes import FreeRoom
from ft_ray.upload import Committer

__all__ = ["Outcome", "train"]

logger = logging.getLogger("ft_ray")


@dataclass(frozen=True)
class Outcome:
    """How training ended. `tree` is the committed result in the store: 'adapter' or 'model'.

    `metrics` holds validation_loss (nats a token, of the kept weights; None without validation rows),
    best_step, steps, resumed_from (0: from the start), train_loss, trained_tokens, tokens_per_second, seconds,
    quantized_modules, fused_modules, fused_adapters, trainable_parameters, workers, device, retries, faults (what was
    lost, a sentence each), saves and stood_still (checkpoints of this command, and the most seconds for which one of
    them held training up) and peak_memory_bytes (rank 0). `reason` of a stopped run is 'interrupted' or 'budget', of
    a done one '' or 'early_stop'.
    """

    status: Literal["done", "stopped"]
    reason: str
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    tree: str
    substitutions: list[str] = field(default_factory=list)


def train(
    recipe: Recipe,
    prepared: Any,
    files: ModelFiles,
    store: Store,
    *,
    on_event: OnEvent,
    stop: threading.Event | None = None,
) -> Outcome:
    """Fine-tunes as the recipe says and commits the best weights as the tree 'adapter' (full: 'model').

    `prepared` is a `dataset.Prepared`. Resumes from the newest intact checkpoint in `store`. Setting `stop`, or
    Ctrl-C, stops every rank at the same step with a checkpoint; a second Ctrl-C raises Interrupted at once.
    Raises the error that a rank raised (ModelError, TrainingError…), in its own class.
    """
    if not ray.is_initialized():
        on_event({"kind": "status", "message": "starting a private Ray"})
        with ray_session.session():
            return train(recipe, prepared, files, store, on_event=on_event, stop=stop)
    use_gpu = train_room.use_gpu(recipe)
    priced = train_room.priced(recipe, use_gpu)
    store.check_writable()
    template = Path(recipe.model.chat_template).read_text("utf-8") if recipe.model.chat_template else None
    chat = Chat(load_tokenizer(files.folder, trust_remote_code=recipe.model.trust_remote_code), template)
    key = checkpoint.key(recipe, files.hash, [getattr(prepared, "hashes", None), chat.template_hash])
    _, substitution = objective.optimizer_name(recipe.optim.name, "cuda" if use_gpu else "cpu")
    substitutions = [substitution] if substitution else []
    if recipe.fused_kernels is True and not use_gpu:
        substitutions.append("fused_kernels: the plain ones on a CPU")

    def say(message: str) -> None:
        on_event({"kind": "status", "message": message})

    for one in substitutions:
        say(one)
    found = persistently(lambda: checkpoint.find(store, key), say)
    if found is not None and objective.ended(priced, found.progress) is not None:
        # Nothing would read it before it is the result.
        found = persistently(lambda: checkpoint.find(store, key, contents=True), say)
    resumed = found.step if found is not None else 0
    facts: dict[str, Any] = {}
    if found is None or objective.ended(priced, found.progress) is None:
        persistently(lambda: checkpoint.clean(store, key), say)
        if found is not None:
            say(f"going on from the checkpoint of step {found.step}")
        with shared_storage.seen_here(store) as seen:
            listener = Listener(on_event, stop, recipe.resources.retries)
            facts, changed = oom_ladder.climb(
                priced,
                lambda fitting: _run_workers(fitting, prepared, files, store, seen, key, use_gpu, listener),
                device="cuda" if use_gpu else "cpu",
                on_event=on_event,
            )
        substitutions += [*changed, *facts.pop("substitutions", [])]
        resumed = resumed if listener.resumed is None else listener.resumed
        found = persistently(lambda: checkpoint.find(store, key), say)
    progress = found.progress if found is not None else {}
    ended = objective.ended(priced, progress) if found is not None else None
    stopped = str(facts.get("stopped", progress.get("stopped", "") if ended is None else ended))
    tree = "model" if recipe.method == "full" else "adapter"
    metrics, history = _metrics(progress, facts, resumed), progress.get("history", [])
    if stopped == "interrupted":
        return Outcome("stopped", stopped, metrics, history, tree, substitutions)
    if found is None:
        raise TrainingError(f"training ended without a checkpoint in {store.address(checkpoint.FOLDER)}: run it again.")
    if stopped in ("", "early_stop") and ended is None:  # `find` has said what it found damaged
        raise TrainingError(
            f"the last checkpoint in {store.address(checkpoint.FOLDER)} was lost or damaged before it was the result; "
            f"that of step {found.step} is whole: run the same command again, and it goes on from there."
        )
    persistently(lambda: check_held(store.url, look=store), say)  # before what is there is replaced

    # A checkpoint does not know its own name.
    best = found.name if progress.get("best_step") == found.step else progress.get("best_checkpoint") or found.name
    # Full fine-tuning keeps fp32 master weights; what is served has the recipe's precision.
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(recipe.precision) if recipe.method == "full" else None

    def export(name: str) -> None:
        say(f"committing the weights of step {checkpoint.step_of(name)}")
        identity = _identity(recipe, files, chat, name)
        if name == best:
            identity["validation_loss"] = progress.get("best_loss")
        parts = (store, name, tree, identity, files.folder, chat.template)
        persistently(lambda: checkpoint.export_tree(*parts, dtype=dtype), say)

    try:
        export(best)
    except DamagedError as error:
        if best == found.name:
            raise
        message = f"the best checkpoint {best} is damaged ({error}): keeping the last one instead"
        logger.warning(message)
        say(message)
        export(found.name)
    status: Literal["done", "stopped"] = "stopped" if stopped == "budget" else "done"
    return Outcome(status, stopped, metrics, history, tree, substitutions)


# The driver


class _Trainer(TorchTrainer):
    """TorchTrainer with our rules of what is tried again."""

    policy: Callable[[Any], RetryLostWorkers]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        parts["failure_policy"] = self.policy(parts["failure_policy"])
        # Ray hands out no data here: spares an actor, 200 MB of memory in a process of its own.
        parts["callbacks"] = [one for one in parts["callbacks"] if not isinstance(one, DatasetsCallback)]
        if isinstance(self.scaling_config.num_workers, tuple):
            config: Any = self.scaling_config  # mypy sees Train V1's
            parts["scaling_policy"] = FreeRoom(config)
        if not ray_session.may_grow():
            return train_here.run(**parts)
        return super()._initialize_and_run_controller(**parts)  # type: ignore[misc]  # mypy sees Train V1's class


def _run_workers(
    recipe: Recipe,
    prepared: Any,
    files: ModelFiles,
    store: Store,
    seen: shared_storage.Seen | None,
    key: str,
    use_gpu: bool,
    listener: Listener,
) -> dict[str, Any]:
    """Runs the ranks to their end and returns what rank 0 says of itself. Raises their error."""
    board = open_board(name=f"ft-ray-{recipe.name}-{uuid.uuid4().hex[:8]}")
    config: dict[str, Any] = {"recipe": recipe, "prepared": prepared, "files": files}
    config |= {"store": store.address(), "seen": seen, "key": key, "board": board}
    scaling = train_room.scaling(recipe, use_gpu, listener.say)
    in_words = train_room.in_words(scaling)
    listener.listen_to(board)
    while True:
        trainer = _trainer(recipe, config, scaling, use_gpu, listener.retries_left, in_words, hold_of(store.url))
        failure = _fit(trainer, recipe, store, listener)
        listener.turn(last=True)
        if failure is None or not controller_lost(failure) or not listener.retries_left:
            break
        listener.tell_lost(describe(failure), counts=True)
    result = ray.get(board.result.remote(), timeout=60)
    ray.kill(board)
    if failure is not None:
        raise _as_ours(failure, recipe, store, in_words, listener.retries) from failure
    if not result:
        raise TrainingError("the workers ended without a result: see Ray's logs, then run the same command again.")
    saves = {"saves": len(listener.stood_still), "stood_still": max(listener.stood_still, default=None)}
    return {**result, **saves, "retries": len(listener.faults), "faults": listener.faults}


def _trainer(
    recipe: Recipe, config: dict[str, Any], scaling: Any, use_gpu: bool, retries: int, in_words: str, hold: Hold | None
) -> _Trainer:
    """Ray Train's trainer for one controller, which may start the workers again `retries` times."""
    board, store, key = config["board"], config["store"], config["key"]
    # mypy sees Train V1's callbacks
    callbacks: Any = [Committer(store, key, recipe.checkpoint.keep, board, hold), HearSigterm()]
    kind: Any = FailureConfig  # nor this key
    timeout, wait = duration_seconds(recipe.resources.timeout), duration_seconds(recipe.resources.wait)
    in_vain = ray_session.collective_timeout(timeout)
    trainer = _Trainer(
        work,
        train_loop_config=config,
        scaling_config=scaling,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=int(in_vain)),
        run_config=RunConfig(
            name=f"ft-ray-{recipe.name}-{uuid.uuid4().hex[:8]}",
            storage_path=RAY_RECORDS,
            storage_filesystem=ray_records(),
            failure_config=kind(max_failures=retries, max_preemption_failures=MOST_PREEMPTIONS),
            callbacks=callbacks,
        ),
    )
    trainer.policy = lambda usual: RetryLostWorkers(usual, board, wait=wait, what=in_words)
    return trainer


def _fit(trainer: _Trainer, recipe: Recipe, store: Store, listener: Listener) -> BaseException | None:
    """Runs one controller to its end, with Ctrl-C as a request to stop; returns what it failed with."""
    failure: list[BaseException] = []
    # An event, not join(): Ctrl-C inside Thread.join(timeout) marks a running thread as stopped (Python 3.11).
    ended = threading.Event()

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)
        finally:
            ended.set()

    # Outside the main thread fit() leaves SIGINT alone; Ctrl-C then reaches us, and we stop with a checkpoint.
    thread = threading.Thread(target=fit, name="ft-ray-fit", daemon=True)
    timeout, wait = duration_seconds(recipe.resources.timeout), duration_seconds(recipe.resources.wait)
    with ray_session.train_settings(timeout, start_timeout(wait)):
        thread.start()
        while not ended.is_set():
            try:
                listener.turn()
                check_held(store.url)
                ended.wait(0.2)
            except KeyboardInterrupt:
                if listener.stopping:
                    message = "stopped at once on the second Ctrl-C: the last checkpoint can be resumed."
                    raise Interrupted(message) from None
                listener.ask_to_stop()
    return failure[0] if failure else None


def _as_ours(error: BaseException, recipe: Recipe, store: Store, asked: str, retries: int) -> FtRayError:
    causes = root_causes(error)
    for cause in causes:
        ours = classify(cause, store.address())
        if ours is not None:
            return ours
    if any(isinstance(cause, WorkerGroupStartupTimeoutError) for cause in causes):
        return TrainingError(
            f"no room came up for {asked} within {recipe.resources.wait}: make the cluster larger or its "
            "autoscaler's limit higher, lower resources.workers, or raise resources.wait."
        )
    what = describe(error)
    return TrainingError(
        f"training failed after {retries} retries ({what}); checkpoints in "
        f"{store.address(checkpoint.FOLDER)} are kept: mend the cause and run the same command again."
    )


def _metrics(progress: dict[str, Any], facts: dict[str, Any], resumed: int) -> dict[str, Any]:
    steps = [r for r in progress.get("history", []) if r["kind"] == "step"]
    last = steps[-10:]
    paced = steps[1:] or steps  # the first step warms up
    time_spent = sum(s["tokens"] / s["tokens_per_second"] for s in paced if s["tokens_per_second"])
    return {
        "validation_loss": progress.get("best_loss"),
        "best_step": progress.get("best_step"),
        "steps": progress.get("step", 0),
        "resumed_from": resumed,
        "train_loss": math.fsum(s["loss"] for s in last) / len(last) if last else None,
        "trained_tokens": progress.get("trained_tokens", 0),
        "tokens_per_second": sum(s["tokens"] for s in paced) / time_spent if time_spent else None,
        "seconds": progress.get("seconds", 0.0),
        "workers": progress.get("workers"),
        **progress.get("facts", {}),
        **{k: v for k, v in facts.items() if k not in ("kind", "stopped")},
    }


def _identity(recipe: Recipe, files: ModelFiles, chat: Chat, best: str) -> dict[str, Any]:
    """ft_ray.json of the result: what it was trained on, for the gates before merging and serving."""
    return {
        "name": recipe.name,
        "method": recipe.method,
        "checkpoint": best,
        "recipe_hash": recipe.hash,
        "template_hash": chat.template_hash,
        "eos_ids": sorted(chat.eos_ids),
        "base": {"source": files.source, "revision": files.revision, "hash": files.hash},
        "quantization": recipe.quantization.model_dump() if recipe.method == "qlora" else None,
    }
