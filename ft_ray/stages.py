"""The stages of a run, one function each, over an opened run folder and the ground that all of them stand on.

A stage whose record is done, and whose inputs have not changed, is skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ft_ray import placement, ray_session, stage_work
from ft_ray.base_model import ModelFiles, resolve
from ft_ray.chat import Chat, chat_of
from ft_ray.dataset import prepare
from ft_ray.diagnosis import Watch
from ft_ray.early_checks import check_made, check_settings, check_targets
from ft_ray.errors import BudgetSpent, FtRayError, GateRefused, Interrupted
from ft_ray.manifest import key_of
from ft_ray.planning import actual_cost, memory_plan
from ft_ray.preflight import DataReport
from ft_ray.preflight import check as preflight_check
from ft_ray.preflight import gate as preflight_gate
from ft_ray.prepared_data import Prepared
from ft_ray.recipe import Recipe
from ft_ray.run_folder import Listener, RunFolder, trained_by
from ft_ray.storage import Store

__all__ = ["Ground", "check_and_finish", "check_data", "evaluate", "finish", "merge", "opened", "train"]


def _quiet(event: dict[str, Any]) -> None:
    return None


@dataclasses.dataclass
class Ground:
    """What every stage stands on: the base's files, its chat format, and the prepared data."""

    files: ModelFiles
    chat: Chat
    prepared: Prepared


def _ground(folder: RunFolder) -> Ground:
    from ft_ray.tracking import check_packages

    recipe = folder.recipe
    check_settings(recipe)
    check_packages(recipe)
    folder.status(f"reading the base model {recipe.model.id}")
    files = resolve(recipe.model)
    check_targets(files, recipe)
    chat = chat_of(recipe.model, _imported(folder) or files.folder)
    folder.status("reading and tokenising the data")
    prepared = prepare(recipe, chat, model_hash=files.hash)
    lineage = folder.manifest.lineage
    lineage.base_hash, lineage.template_hash = files.hash, chat.template_hash
    lineage.base_revision = files.revision or lineage.base_revision
    lineage.data_hash = dict(prepared.hashes)
    return Ground(files, chat, prepared)


def _imported(folder: RunFolder) -> Path | None:
    """The imported adapter's folder: it may bring a tokenizer and chat template of its own. None for own runs."""
    record = folder.manifest.stages.get("train")
    if record is None or "imported_from" not in record.metrics or folder.store.tree("adapter") is None:
        return None
    return folder.store.local("adapter")


def check_data(folder: RunFolder, ground: Ground, strict: bool, review: str | None = None) -> DataReport:
    """The data check, kept as data_check.json. Raises what `preflight.gate` raises."""
    reports: list[DataReport] = []

    def work() -> tuple[dict[str, Any], dict[str, str]]:
        report = preflight_check(folder.recipe, ground.prepared, ground.chat, review=review)
        reports.append(report)
        folder.store.write_json("data_check.json", report.to_dict())
        folder.on_event({"kind": "data", "report": report.to_dict()})
        preflight_gate(report, strict)
        return {"counts": ground.prepared.counts, **report.summary()}, folder.hashes("data_check.json")

    # Marks that were added since are judged anew.
    marks = [] if review is None else [review, Path(review).read_bytes().hex() if Path(review).is_file() else ""]
    folder.stage("data_check", key_of(ground.prepared.hashes, ground.chat.template_hash, strict, *marks), work)
    return reports[0] if reports else DataReport.from_dict(folder.store.read_json("data_check.json"))


def train(folder: RunFolder, ground: Ground, stop: threading.Event | None) -> None:
    """Trains by Ray Train, from the newest whole checkpoint. Interrupted and BudgetSpent leave one."""
    recipe = folder.recipe
    # Model and data count by their contents; where they lie does not matter.
    decisive = {k: v for k, v in trained_by(recipe).items() if k not in ("model", "data")}
    key = key_of(folder.manifest.lineage.data_hash, ground.files.hash, ground.chat.template_hash, decisive)

    def work() -> tuple[dict[str, Any], dict[str, str]]:
        _preview(folder, ground)
        watch = Watch(recipe)
        try:
            with _tracked(folder) as listen:
                folder.status("starting Ray")
                # Ray Train's imports, while Ray starts
                with ray_session.session(meanwhile=lambda: importlib.import_module("ft_ray.trainer")):
                    from ft_ray.trainer import train as ray_train

                    outcome = ray_train(
                        recipe, ground.prepared, ground.files, folder.store, on_event=watch.around(listen), stop=stop
                    )
                    cards = ray_session.accelerators()
        except FtRayError:
            # A run that diverged is diagnosed by what it told until then.
            folder.manifest.stages["train"].metrics = {"history": [dict(e) for e in watch.history]}
            raise
        outcome.metrics["cost"] = actual_cost(recipe, outcome.metrics, cards)
        outcome.metrics["plan"] = memory_plan(recipe, ground.files.config, outcome.metrics)
        lineage = folder.manifest.lineage
        lineage.substitutions = sorted({*lineage.substitutions, *outcome.substitutions})
        lineage.hardware |= {k: outcome.metrics.get(k) for k in ("device", "workers", "peak_memory_bytes")}
        folder.manifest.stages["train"].metrics = {**outcome.metrics, "history": outcome.history}
        if outcome.status == "stopped" and outcome.reason == "budget":
            raise BudgetSpent(
                f"the budget of {recipe.name} is spent; training stopped with a checkpoint: "
                "raise budget and run the same command to go on."
            )
        if outcome.status == "stopped":
            raise Interrupted(
                f"training of {recipe.name} stopped with a checkpoint: the same command goes on from there."
            )
        metrics = {**outcome.metrics, "history": outcome.history}
        return metrics, {outcome.tree: key_of(folder.store.tree(outcome.tree))}

    folder.stage("train", key, work)


@contextlib.contextmanager
def _tracked(folder: RunFolder) -> Iterator[Listener]:
    """A listener that also writes to the recipe's trackers; lineage goes in as tags."""
    from ft_ray.tracking import Tracker, flatten

    if not folder.recipe.tracking.to:
        yield folder.on_event
        return
    folder.status("opening the experiment tracker")
    tracker, status = Tracker(folder.recipe, folder.store), "failed"

    def listen(event: dict[str, Any]) -> None:
        folder.on_event(event)
        tracker.on_event(event)

    try:
        tracker.set_tags(flatten(folder.manifest.lineage.model_dump()))
        yield listen
        status = "done"
    except (Interrupted, BudgetSpent):
        status = "stopped"
        raise
    finally:
        tracker.finish(status)


def _log_scores(folder: RunFolder, name: str) -> None:
    """The figures of an evaluation, added to the run that the training opened."""
    from ft_ray.tracking import Tracker, flatten

    if folder.recipe.tracking.to and folder.store.exists("tracking.json"):
        tracker = Tracker(folder.recipe, folder.store)
        tracker.log_metrics(flatten({name: folder.manifest.stages[name].metrics}))
        tracker.finish()


def _preview(folder: RunFolder, ground: Ground) -> None:
    """Emits the first training example as the model will see it: text pieces and whether each is trained."""
    rows = ground.prepared.rows("train")
    if len(rows):
        encoded = ground.chat.encode(rows[0]["messages"])
        pieces = ground.chat.segments(encoded)
        folder.on_event({"kind": "preview", "segments": pieces, "tokens": len(encoded.input_ids)})


def merge(folder: RunFolder, ground: Ground, tree: str) -> None:
    """Merges `tree` (adapter or model) into `merged` and proves it. GateRefused where the two differ."""
    recipe, store = folder.recipe, folder.store
    trained = check_made(recipe, tree, "train")

    def work() -> tuple[dict[str, Any], dict[str, str]]:
        folder.status("writing the model" if recipe.method == "full" else "merging the adapter into the base")
        metrics = placement.run_stage(
            recipe, "merge", stage_work.merge, ground.files, ground.chat, ground.prepared, store.address(), tree,
            on_event=folder.on_event,
        )  # fmt: skip
        folder.manifest.stages["merge"].metrics = metrics  # a refusal keeps its evidence, and nothing else
        kl, limit = metrics["kl"], recipe.evaluation.parity_kl
        if not kl <= limit:
            raise GateRefused(
                f"the merged model of {recipe.name} differs from the trained adapter: mean KL {kl:.4f} nats > "
                f"{limit} on {metrics['tokens']} answer tokens; {_afar(recipe)}."
            )
        return metrics, {"merged": key_of(store.tree("merged"))}

    limits = [recipe.to_dict()["quantization"], recipe.evaluation.parity_kl]
    folder.stage("merge", key_of(trained, ground.files.hash, limits), work)


def _afar(recipe: Recipe) -> str:
    """What to do about a merged model that is not the trained one."""
    accept = "raise evaluation.parity_kl if that is acceptable"
    if recipe.method == "full":
        return accept
    # Measured: after 10 steps at 2e-4, three of four updates were under half a bf16 step of the weight they go to.
    return f"a short training's updates are so small that 16-bit weights round them away: train longer, or {accept}"


def evaluate(folder: RunFolder, ground: Ground, split: str, remote: tuple[str, str] | None = None) -> None:
    """Measures `merged`, and the baselines, on `split`; `remote` is (url, model) of an endpoint beside them."""
    recipe, store = folder.recipe, folder.store
    merged = check_made(recipe, "merged", "merge")
    from ft_ray.scorecard import settings  # with it come the model classes, which a resumed run may never need

    key = key_of(merged, ground.prepared.hashes[split], settings(recipe), recipe.seed, remote)

    def work() -> tuple[dict[str, Any], dict[str, str]]:
        scored: tuple[dict[str, Any], dict[str, str]] = placement.run_stage(
            recipe, "evaluate", stage_work.score, ground.files, ground.chat, ground.prepared, store.address(), split,
            remote, on_event=folder.on_event,
        )  # fmt: skip
        return scored

    name = "evaluate" if split == "test" else f"evaluate_{split}"
    if remote is not None:
        name += "_remote"  # a stage of its own: the test set's own measurement stays as it is
    folder.stage(name, key, work)
    _log_scores(folder, name)


def _register(folder: RunFolder) -> int:
    from ft_ray.registry import Registry

    recipe, store, manifest = folder.recipe, folder.store, folder.manifest
    evaluated = manifest.stages.get("evaluate")
    metrics = evaluated.metrics if evaluated is not None and evaluated.status == "done" else {}

    merged_hash = key_of(store.tree("merged"))

    def work() -> tuple[dict[str, Any], dict[str, str]]:
        # A version outlives its run folder: the weights are linked and the evidence copied beside the runs.
        root, place = Store(recipe.storage), f"_models/{recipe.name}/{merged_hash[:16]}"
        root.clone(f"{recipe.name}/merged", f"{place}/merged")
        manifest.save(store)
        for name in store.list():
            if name in ("manifest.json", "recipe.yaml") or name.startswith("predictions"):
                root.write(f"{place}/{name}", store.read(name))
        version = Registry.of(recipe).register(
            recipe.name,
            source=root.address(f"{place}/merged"),
            manifest=root.address(f"{place}/manifest.json"),
            merged_hash=merged_hash,
            template_hash=manifest.lineage.template_hash or "",
            test_hash=manifest.lineage.data_hash.get("test", ""),
            metrics=metrics.get("tuned", {}),
        )
        return {"version": version}, {}

    key = key_of(merged_hash, json.dumps(metrics, sort_keys=True, default=str))
    return int(folder.stage("register", key, work).metrics["version"])


def check_and_finish(folder: RunFolder) -> int:
    """`finish` for a run folder whose adapter came from elsewhere, with the data check before it."""
    ground = _ground(folder)
    check_data(folder, ground, strict=False)
    return finish(folder, ground)


def finish(folder: RunFolder, ground: Ground) -> int:
    """From a trained run folder to a registered candidate: merge, prove, evaluate, register. Returns its version."""
    merge(folder, ground, "model" if folder.recipe.method == "full" else "adapter")
    if ground.prepared.counts.get("test", 0):
        evaluate(folder, ground, "test")
    return _register(folder)


@contextlib.contextmanager
def opened(
    recipe: Recipe, on_event: Listener | None, fresh: bool = False, registers: bool = False
) -> Iterator[tuple[RunFolder, Ground]]:
    """The locked run folder of `recipe` and its ground; `registers` says that a version will be registered."""
    listen = on_event or _quiet
    registry = registers or "mlflow" in recipe.tracking.to
    with (
        placement.cluster(recipe, listen, registry=registry),
        RunFolder.locked(recipe, listen, fresh=fresh) as folder,
    ):
        ground = _ground(folder)  # what cannot work is refused before the folder is made, or an earlier run removed
        folder.begin()
        yield folder, ground
