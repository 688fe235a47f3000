"""What a job takes along: the working directory, measured before it is sent, and the files that its recipe names.

Ray packs the folder itself; this module walks it by Ray's own rules (.gitignore, .rayignore, excludes), so that a
folder which is too large is refused at once with what is large, and not after minutes of zipping.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ft_ray.errors import InputError
from ft_ray.recipe import Recipe, Source
from ft_ray.sources import matching, of_hub

__all__ = ["LIMIT", "NEVER", "Upload", "kept_here", "needed", "survey"]

LIMIT = 500 * 2**20  # bytes; Ray keeps packages in the head's memory and takes no larger one

# Credentials by the names that their tools give them: they belong on the nodes, not in a job's package.
NEVER = (
    ".env", ".env.*", "*.pem", "*.key", "id_rsa*", "id_ecdsa*", "id_ed25519*", ".netrc", ".aws", ".ssh",
    ".git-credentials", "auth_token", "hub_token", "credentials", "credentials.json", ".kube", "kubeconfig", ".docker",
    ".pypirc", ".npmrc", "application_default_credentials.json", "*.p12", "*.pfx",
)  # fmt: skip


@dataclass(frozen=True)
class Upload:
    """A working directory as it will be sent: sizes in bytes by path relative to `folder`."""

    folder: Path
    excludes: tuple[str, ...]
    sizes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.sizes.values())

    def largest(self, count: int = 5) -> list[tuple[str, int]]:
        """The entries that weigh most: files directly in the folder, and its subfolders as wholes."""
        weights: Counter[str] = Counter()
        for name, size in self.sizes.items():
            top, inside, _ = name.partition("/")
            weights[top + inside] += size
        return weights.most_common(count)

    def check(self, limit: int = LIMIT) -> None:
        """Raises InputError with what is large when the folder has `limit` bytes or more."""
        if self.total < limit:
            return
        named = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in self.largest())
        raise InputError(
            f"the working directory {self.folder} has {self.total / 2**20:,.0f} MiB and a job takes less than "
            f"{limit / 2**20:,.0f} along ({named}): list what the job does not need in .gitignore or .rayignore, or "
            "choose another --working-dir."
        )


def survey(folder: str | Path, excludes: tuple[str, ...] = ()) -> Upload:
    """Measures the folder by the rules that Ray packs it by. Raises InputError for one that is not there."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    root = Path(folder).absolute()
    if not root.is_dir():
        raise InputError(f"--working-dir {folder} is not a folder: give the one that holds the recipe.")
    patterns = (*NEVER, *excludes)
    sizes: dict[str, int] = {}

    def measure(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(root).as_posix()] = path.stat().st_size

    # Ray adds its own defaults (.git, .venv, …) when it packs; the walk is told here.
    rules = [packaging._get_excludes(root, [*get_runtime_env_default_excludes(), *patterns])]
    packaging._dir_travel(root, rules, measure, include_gitignore=True, logger=packaging.default_logger)
    return Upload(root, patterns, sizes)


def _named(recipe: Recipe) -> list[tuple[str, str]]:
    """(key, path) of every file and folder of this machine that the recipe names, there or not."""
    data, model, evaluation = recipe.data, recipe.model, recipe.evaluation
    sources = [(f"data.{use}", source) for use in ("train", "validation", "test") for source in getattr(data, use)]
    general = [("data.general", data.general and data.general.path), ("evaluation.forgetting", evaluation.forgetting)]
    sources += [(key, Source(path=path)) for key, path in general if path]
    named: list[tuple[str, str | None]] = [("model.id", model.id if _is_folder(model.id) else None)]
    named += [("model.chat_template", model.chat_template)]
    named += [(key, path) for key, source in sources if not of_hub(source) for path in _files(source.path)]
    named += [("evaluation.metric", evaluation.metric.partition(":")[0] if ".py" in evaluation.metric else None)]
    named += [("evaluation.schema", evaluation.schema_)]
    return [(key, path) for key, path in named if path and "://" not in path and not path.startswith("package:")]


def _files(path: str) -> list[str]:
    return [path] if "://" in path else matching(path)


def _is_folder(model: str) -> bool:
    """Whether a base model is a folder of this machine, there or not: a hub's has one slash at most, and none last."""
    return model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1 or Path(model).exists()


def needed(recipe: Recipe) -> list[tuple[str, str]]:
    """(key, relative path) of every file of this machine that the recipe names: they must travel along."""
    return [(key, path) for key, path in _named(recipe) if not path.startswith(("/", "~"))]


def kept_here(recipe: Recipe, shared: str) -> list[tuple[str, str]]:
    """(key, path) of what only this machine has: no address, nothing of a hub, and not below the folder `shared`."""
    return [(key, path) for key, path in _named(recipe) if not path.startswith(shared)]
