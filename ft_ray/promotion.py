"""Gates between a registered candidate and the alias `champion`, the way back, and the comparison of two runs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_ray.endpoint_record import noted
from ft_ray.errors import FtRayError, GateRefused, InputError, StorageError
from ft_ray.evaluation import compare as compare_predictions
from ft_ray.manifest import Manifest, key_of
from ft_ray.recipe import Recipe
from ft_ray.registry import ModelVersion, Registry
from ft_ray.run_folder import Listener, differences, read_recipe, whoami
from ft_ray.run_lock import Taken
from ft_ray.storage import Store

if TYPE_CHECKING:
    from ft_ray.rollout import WithoutRoom

__all__ = ["compare", "promote", "rollback", "run_store"]

log = logging.getLogger("ft_ray")


def promote(
    ref: str,
    *,
    storage: str = "runs",
    uri: str | None = None,
    why: str = "",
    force: bool = False,
    dry_run: bool = False,
    without_room: WithoutRoom = "refuse",
    on_event: Listener | None = None,
) -> dict[str, Any]:
    """Makes the candidate `NAME[@VERSION]` (default: the newest) the champion when every gate lets it pass.

    An endpoint that serves the model takes the new champion over without losing a request: see `rollout`. It is
    the one in the cluster of RAY_ADDRESS, else one that ft-ray serve started on this machine; there may be none.
    `without_room` for two versions: 'refuse', 'wait' for a node, or 'stop first', the old one: see `rollout.shift`.

    Gates: the weights are whole and are those that were measured; the merge's KL is within the recipe's limit;
    the recipe's metric on the test set is better than the champion's on the same rows, or than the base's when
    there is no champion. Raises GateRefused with every reason; `force` promotes all the same and records it.

    Endpoint and registry change together: the champion is set when the endpoint's new requests go to it, and where
    the registry fails then, the endpoint goes back. One promotion or rollback of a name at a time: InputError else.
    """
    registry = Registry(storage, uri)
    name, _, wanted = ref.partition("@")
    candidate = registry.resolve(ref) if wanted else registry.newest(name)
    with contextlib.nullcontext() if dry_run else _alone(registry, storage, candidate):
        return _promote(registry, candidate, storage, uri, why, force, dry_run, without_room, on_event)


def _promote(
    registry: Registry, candidate: ModelVersion, storage: str, uri: str | None, why: str, force: bool, dry_run: bool,
    without_room: WithoutRoom, on_event: Listener | None,
) -> dict[str, Any]:  # fmt: skip
    name, champion = candidate.name, registry.champion_or_none(candidate.name)
    if champion is not None and champion.version == candidate.version:
        rolled = None if dry_run else _roll_out(candidate, storage, uri, without_room, on_event)
        return {
            "name": name, "version": candidate.version, "previous": candidate.version,
            "reasons": ["it was the champion already"], "forced": False, "rollout": rolled,
        }  # fmt: skip
    folder = Store(candidate.source.rsplit("/", 1)[0])
    manifest = _manifest(folder)
    recipe = read_recipe(folder)
    refusals, reasons = _integrity(folder, candidate), []
    merge = manifest.stages["merge"].metrics if "merge" in manifest.stages else {}
    kl, limit = merge.get("kl"), recipe.evaluation.parity_kl
    if kl is None or kl > limit:
        refusals.append(f"the merge was not proved (KL {kl} nats, limit {limit})")
    else:
        reasons.append(f"merge KL {kl:.4f} <= {limit} nats")
    for passed, text in _better(recipe, folder, manifest, champion, on_event):
        (reasons if passed else refusals).append(text)
    if refusals and not force:
        raise GateRefused(
            f"{name}@{candidate.version} is not promoted: {'; '.join(refusals)}. "
            "Train a better candidate, or use --force, which is recorded."
        )
    reasons += [f"forced past: {r}" for r in refusals]
    rolled = None
    if not dry_run:
        said = "; ".join([*([why] if why else []), *reasons])
        crown = _Crown(registry, candidate, said, bool(refusals))
        rolled = _roll_out(candidate, storage, uri, without_room, on_event, crown=crown)
    previous = champion.version if champion else None
    return {
        "name": name,
        "version": candidate.version,
        "previous": previous,
        "reasons": reasons,
        "forced": bool(refusals),
        "rollout": rolled,
    }


def rollback(
    name: str,
    *,
    storage: str = "runs",
    uri: str | None = None,
    why: str = "",
    dry_run: bool = False,
    without_room: WithoutRoom = "refuse",
    on_event: Listener | None = None,
) -> dict[str, Any]:
    """Makes the champion of before the last promotion the champion again, on a live endpoint too.

    Raises InputError when there was none before, and what `promote` raises for an endpoint.
    """
    registry = Registry(storage, uri)
    champion = registry.champion(name)
    with contextlib.nullcontext() if dry_run else _alone(registry, storage, champion):
        champion, target = registry.champion(name), registry.previous_champion(name)
        rolled = None
        if not dry_run:
            crown = _Crown(registry, target, "; ".join(["rollback", *([why] if why else [])]))
            rolled = _roll_out(target, storage, uri, without_room, on_event, crown=crown, parity=False)
    return {"name": name, "version": target.version, "previous": champion.version, "rollout": rolled}


@contextlib.contextmanager
def _alone(registry: Registry, storage: str, version: ModelVersion) -> Iterator[None]:
    """Holds the name for one promotion: a second one would take the first one's new deployment for a stray.

    The lock is beside the registry, or with a server beside the run folder of `version`: promotions of versions that
    lie in different storages do not see each other. Raises InputError when another process has it.
    """
    beside = registry.uri.startswith("sqlite:")
    place = Store(storage if beside else version.source.rsplit("/", 2)[0])
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(place.lock(f".promotion-{version.name}.lock"))
        except Taken as error:
            raise InputError(
                f"{version.name} is being promoted or rolled back by {error.who}: wait until that has ended, then try "
                "again."
            ) from error
        except StorageError as error:  # whoever promotes need not be able to write where the runs are
            log.warning("another promotion of %s at the same time would not be noticed: %s", version.name, error)
        yield


class _Crown:
    """Makes `version` the champion when it is called; raises only where it is not the champion then."""

    def __init__(self, registry: Registry, version: ModelVersion, why: str, forced: bool = False) -> None:
        self._registry, self._version, self._why, self._forced = registry, version, why, forced

    def __call__(self) -> None:
        name, number = self._version.name, self._version.version
        try:
            self._registry.set_champion(name, number, who=whoami(), why=self._why, forced=self._forced)
        except BaseException:  # Ctrl-C too: what counts is what the registry took, its answer may have been lost
            if not self._taken():
                raise
            log.warning("the registry was slow to say that %s@%s is the champion, but it is", name, number)

    def _taken(self) -> bool:
        with contextlib.suppress(FtRayError):
            champion = self._registry.champion_or_none(self._version.name)
            return champion is not None and champion.version == self._version.version
        return False


def _roll_out(
    candidate: ModelVersion, storage: str, uri: str | None, without_room: WithoutRoom, on_event: Listener | None,
    *, crown: Callable[[], None] = lambda: None, parity: bool = True,
) -> dict[str, Any] | None:  # fmt: skip
    """What the rollout on a live endpoint did; None when there is no endpoint. Calls `crown` when its time has come."""
    ray = sys.modules.get("ray")
    connected = ray is not None and ray.is_initialized()
    if not connected and not os.environ.get("RAY_ADDRESS") and noted(candidate.name) is None:
        crown()
        return None  # nowhere to look: spares the import of Ray Serve
    from ft_ray.rollout_state import attach

    with attach(candidate.name) as live:
        if live is None or live.routing is None:
            crown()
        if live is None:
            return None
        if live.routing is None:
            log.warning(
                "the endpoint of %s runs in direct mode and goes on with the version that it serves: deploy its file "
                "again (ft-ray deploy), or start it again, for the champion",
                candidate.name,
            )
            return None
        from ft_ray.rollout import shift

        done = shift(
            live,
            f"{candidate.name}@{candidate.version}",
            storage=storage,
            uri=uri,
            without_room=without_room,
            parity=parity,
            on_switched=crown,
            on_event=on_event or (lambda event: None),
        )
    return vars(done)


def _manifest(folder: Store) -> Manifest:
    manifest = Manifest.load(folder)
    if manifest is None:
        raise InputError(f"{folder.url} has no manifest.json: it is not a run folder.")
    return manifest


def _integrity(folder: Store, candidate: ModelVersion) -> list[str]:
    if candidate.merged_hash and key_of(folder.tree("merged")) != candidate.merged_hash:
        return ["its weights are not the registered ones"]
    faults = folder.verify("merged")
    return [f"the weights are not whole: {faults[0]}"] if faults else []


def _better(
    recipe: Recipe, folder: Store, manifest: Manifest, champion: ModelVersion | None, on_event: Listener | None
) -> list[tuple[bool, str]]:
    record = manifest.stages.get("evaluate")
    if record is None or record.status != "done":
        return [(False, "it was not evaluated on a test split")]
    metrics, sign = record.metrics, 1 if recipe.evaluation.mode == "max" else -1
    primary = metrics["primary"]
    ours = metrics["tuned"][primary]["value"]
    if champion is None:
        base = metrics.get("base", {}).get(primary)
        if base is None:
            return [(True, f"{primary} {ours:.3f}, no champion yet")]
        verb = "better" if sign * (ours - base["value"]) > 0 else "not better"
        return [(verb == "better", f"{primary} {ours:.3f} is {verb} than the base's {base['value']:.3f}")]
    theirs, rows = _champion_predictions(recipe, champion, manifest, on_event)
    result = compare_predictions(rows, _predictions(folder))["metrics"][primary]
    verb = "better" if sign * result["difference"] > 0 else "not better"
    text = (
        f"{primary} {ours:.3f} is {verb} than the champion's {theirs[primary]['value']:.3f} on the same test rows "
        f"(difference {result['difference']:+.3f} [{result['low']:+.3f}, {result['high']:+.3f}])"
    )
    return [(verb == "better", text)]


def _champion_predictions(
    recipe: Recipe, champion: ModelVersion, candidate: Manifest, on_event: Listener | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The champion's figures on the candidate's test rows: recorded ones when the test set is the same."""
    folder = Store(champion.source.rsplit("/", 1)[0])
    manifest = _manifest(folder)
    record = manifest.stages.get("evaluate")
    same = manifest.lineage.data_hash.get("test") == candidate.lineage.data_hash.get("test")
    wanted = candidate.stages["evaluate"].metrics["settings"]
    if record is not None and same and record.metrics.get("settings") == wanted:
        return record.metrics["tuned"], _predictions(folder)
    from ft_ray.scorecard import score_folder

    return score_folder(recipe, folder.local("merged"), "test", on_event=on_event)


def _predictions(folder: Store) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.read("predictions.jsonl").splitlines()]


def compare(a: str, b: str, *, storage: str = "runs", uri: str | None = None) -> dict[str, Any]:
    """Paired comparison of two runs: run folders, names of runs, NAME@VERSION, or recipe files.

    Returns {a, b, rows, metrics: {name: {a, b, difference, low, high, wins, losses, ties}}, recipe: [(key, a, b)],
    data: [splits that differ]}. Raises InputError when they were not measured, or not on the same rows.
    """
    one, two = run_store(a, storage, uri), run_store(b, storage, uri)
    for ref, store in ((a, one), (b, two)):
        if not store.exists("predictions.jsonl"):
            raise InputError(f"{ref} has not been measured on its test split: run ft-ray evaluate first.")
    first, second = _manifest(one), _manifest(two)
    hashes = first.lineage.data_hash, second.lineage.data_hash
    data = [s for s in ("train", "validation", "test") if hashes[0].get(s) != hashes[1].get(s)]
    if "test" in data:
        raise InputError(
            f"{a} and {b} were measured on different test sets: give both recipes the same data.test "
            "and evaluate again."
        )
    made, evaluated = read_recipe(two), second.stages.get("evaluate")
    lower = [evaluated.metrics["primary"]] if evaluated and made.evaluation.mode == "min" else []
    result = compare_predictions(_predictions(one), _predictions(two), lower_is_better=lower)
    return {
        "a": a,
        "b": b,
        **result,
        "recipe": differences(read_recipe(one).to_dict(), made.to_dict()),
        "data": data,
    }


def run_store(ref: str, storage: str, uri: str | None) -> Store:
    if ref.endswith((".yaml", ".yml")) and Path(ref).exists():
        return Store(Recipe.load(ref).run_path)
    if "@" in ref:
        return Store(Registry(storage, uri).resolve(ref).source.rsplit("/", 1)[0])
    for place in (ref, f"{storage.rstrip('/')}/{ref}"):
        if Store(place).exists("manifest.json"):
            return Store(place)
    raise InputError(f"{ref} is neither a run folder nor a run in {storage}: see ft-ray runs.")
