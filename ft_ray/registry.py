"""Model versions, their lineage, and the alias `champion`, in the MLflow model registry.

A version points at a committed merged tree in storage; the registry holds no weights. Who promoted what, when
and why is written as tags of the registered model, so that a rollback knows where to go back to.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ft_ray import mlflow_store
from ft_ray.errors import InputError, StorageError
from ft_ray.recipe import Recipe
from ft_ray.storage_faults import redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["CHAMPION", "ModelVersion", "Promotion", "Registry"]

CHAMPION = "champion"
_HISTORY = "ft_ray.promotion."
_TAG = "ft_ray."
# A server takes a local path only from below its own runs, so that nobody reads its disk through it. It does not read
# sources at all here: a folder that all machines mount is registered under fsspec's other name for a local file.
_MOUNTED = "local://"


@dataclass(frozen=True)
class ModelVersion:
    """A registered candidate. `source` is the address of its merged tree; hashes are SHA-256 in hex."""

    name: str
    version: int
    source: str
    manifest: str = ""
    merged_hash: str = ""
    template_hash: str = ""
    test_hash: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    created: float = 0.0


@dataclass(frozen=True)
class Promotion:
    """One change of the champion. `previous` is None for the first; `forced`: past a gate that refused."""

    version: int
    previous: int | None
    who: str
    why: str
    forced: bool
    when: float


class Registry:
    """The registry of a project: the MLflow store of `storage`, or the server at `uri` or MLFLOW_TRACKING_URI."""

    def __init__(self, storage: str = "runs", uri: str | None = None) -> None:
        self.uri = mlflow_store.tracking_uri(storage, uri)

    @functools.cached_property
    def _client(self) -> MlflowClient:
        """Creates the store when it is not there: only what writes may come here before `_empty` said no."""
        return mlflow_store.client(self.uri)

    def _empty(self) -> bool:
        return not mlflow_store.exists(self.uri)

    @classmethod
    def of(cls, recipe: Recipe) -> Registry:
        return cls(recipe.storage, recipe.tracking.uri)

    def register(
        self,
        name: str,
        *,
        source: str,
        manifest: str,
        merged_hash: str,
        template_hash: str,
        test_hash: str,
        metrics: Mapping[str, Any],
    ) -> int:
        """Registers a merged tree and returns its version; the same tree again is the same version.

        `metrics` ({name: {value, low, high, n}}) of a tree that is registered already are brought up to date.
        """
        from mlflow.exceptions import MlflowException

        self._known(name)
        figures = json.dumps(dict(metrics), sort_keys=True, default=str)
        with self._errors():
            try:
                self._client.create_registered_model(name, tags={f"{_TAG}kind": "merged"})
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            for known in self.versions(name):
                if known.merged_hash == merged_hash and known.source == source:
                    self._client.set_model_version_tag(name, str(known.version), f"{_TAG}metrics", figures)
                    return known.version
            tags = {
                "manifest": manifest,
                "merged_hash": merged_hash,
                "template_hash": template_hash,
                "test_hash": test_hash,
                "metrics": figures,
            }
            told = _MOUNTED + source if source.startswith("/") and not self.uri.startswith("sqlite:") else source
            made = self._client.create_model_version(
                name, source=told, tags={f"{_TAG}{k}": v for k, v in tags.items()}, await_creation_for=0
            )
        return int(made.version)

    def versions(self, name: str) -> list[ModelVersion]:
        """Every version of a model, oldest first; empty for an unknown name."""
        self._known(name)
        if self._empty():
            return []
        found, token = [], None
        with self._errors():
            while True:
                page = self._client.search_model_versions(f"name = '{name}'", page_token=token)
                found += [_version(v) for v in page]
                token = page.token
                if not token:
                    break
        return sorted(found, key=lambda v: v.version)

    def newest(self, name: str) -> ModelVersion:
        """The version registered last. Raises InputError when there is none."""
        found = self.versions(name)
        if not found:
            where = redacted(self.uri)
            raise InputError(f"no model {name!r} is registered in {where}: run ft-ray run RECIPE first.")
        return found[-1]

    def champion_or_none(self, name: str) -> ModelVersion | None:
        self._known(name)
        if self._empty():
            return None
        from mlflow.exceptions import MlflowException

        with self._errors():
            try:
                return _version(self._client.get_model_version_by_alias(name, CHAMPION))
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise

    def champion(self, name: str) -> ModelVersion:
        """The promoted version. Raises InputError naming the command that promotes one."""
        found = self.champion_or_none(name)
        if found is None:
            newest = self.newest(name)
            raise InputError(
                f"{name} has no champion yet: run ft-ray promote {name}, or ask for {name}@{newest.version}."
            )
        return found

    def resolve(self, ref: str) -> ModelVersion:
        """'NAME' and 'NAME@champion' are the champion, 'NAME@3' is that version. Raises InputError."""
        name, at, wanted = ref.partition("@")
        if not at or wanted == CHAMPION:
            return self.champion(name)
        known = self.versions(name)
        for version in known:
            if wanted == str(version.version):
                return version
        numbers = ", ".join(str(v.version) for v in known) or "none"
        raise InputError(f"{name} has no version {wanted!r}: registered are {numbers}.")

    def set_champion(self, name: str, version: int, *, who: str, why: str, forced: bool = False) -> Promotion:
        """Moves the alias to `version` and records who did it, why, and what was the champion before."""
        self.resolve(f"{name}@{version}")
        before = self.champion_or_none(name)
        previous = before.version if before is not None else None
        record = Promotion(version=version, previous=previous, who=who, why=why, forced=forced, when=time.time())
        # Tag keys sort by time, so that the history has an order; values hold 5,000 characters in MLflow.
        text = json.dumps({**vars(record), "why": why[:4000]}, ensure_ascii=False)
        with self._errors():
            self._client.set_registered_model_tag(name, f"{_HISTORY}{time.time_ns():020d}", text)
            self._client.set_registered_model_alias(name, CHAMPION, str(version))
        return record

    def history(self, name: str) -> list[Promotion]:
        """Every change of the champion, oldest first."""
        self._known(name)
        if self._empty():
            return []
        from mlflow.exceptions import MlflowException

        with self._errors():
            try:
                tags = self._client.get_registered_model(name).tags
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return []
                raise
        return [Promotion(**json.loads(tags[key])) for key in sorted(tags) if key.startswith(_HISTORY)]

    def previous_champion(self, name: str) -> ModelVersion:
        """Where a rollback goes: what the champion was before the last promotion. Raises InputError."""
        history = self.history(name)
        champion = self.champion_or_none(name)
        # A change is recorded before the alias moves: one that failed in between has a record and did not happen.
        made = [h for h in history if champion is not None and h.version == champion.version] or history
        if not made or made[-1].previous is None:
            raise InputError(f"{name} has had one champion at most: there is nothing to roll back to.")
        return self.resolve(f"{name}@{made[-1].previous}")

    def _known(self, name: str) -> None:
        if not name or any(c in name for c in "'\"/:@"):
            raise InputError(f"{name!r} is not a model name: use the recipe's name, without quotes, / : or @.")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What MLflow raises for a registry that cannot be reached becomes one sentence."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            reason = str(error).splitlines()[0]
            message = f"the model registry {self.uri} failed ({reason}): check that it is reachable and writable."
            raise StorageError(redacted(message)) from error


def _version(found: Any) -> ModelVersion:
    tags = {k.removeprefix(_TAG): v for k, v in found.tags.items() if k.startswith(_TAG)}
    return ModelVersion(
        name=found.name,
        version=int(found.version),
        source=(found.source or "").removeprefix(_MOUNTED),
        manifest=tags.get("manifest", ""),
        merged_hash=tags.get("merged_hash", ""),
        template_hash=tags.get("template_hash", ""),
        test_hash=tags.get("test_hash", ""),
        metrics=json.loads(tags.get("metrics", "{}")),
        created=(found.creation_timestamp or 0) / 1000,
    )
