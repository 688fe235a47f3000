"""From the sources of a recipe to files: on disk, at any fsspec address, of a hub, or a saved data set."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import tempfile
from pathlib import Path

from ft_ray import hub
from ft_ray.errors import DataError, FtRayError
from ft_ray.local_files import hash_file
from ft_ray.recipe import Source
from ft_ray.records import DataFile
from ft_ray.storage import cache_dir
from ft_ray.storage_faults import client_errors, file_system, redacted, storage_errors

__all__ = ["locate", "matching", "of_hub", "splits_of"]

_log = logging.getLogger("ft_ray")
_SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
}  # fmt: skip
_HUB_ID = re.compile(r"^\w[\w.-]*/[\w.-]+$")


# Finding


def locate(source: Source) -> list[DataFile]:
    """The local files of a source, downloaded into the cache where they are remote. Raises DataError."""
    path, wanted = source.path, source.format
    if of_hub(source):
        return [_hub(source)]
    for key in ("subset", "revision"):
        if getattr(source, key) is not None:
            raise DataError(f"{key} of the data source {path} is for hub data sets, and this is none: take it out.")
    if "://" in path:
        _no_split(source)
        return _remote(source)
    local = Path(path).expanduser()
    if not local.exists() and glob.has_magic(path):
        _no_split(source)
        return [_file(name, Path(name).expanduser(), wanted) for name in matching(path)]
    if not local.exists():
        hint = "; for a Hugging Face data set use the form owner/name or set format: hub" if "/" not in path else ""
        raise DataError(f"data file {path} does not exist: check the path{hint}.")
    if local.is_dir():
        if wanted == "saved" or (local / "dataset_info.json").exists() or (local / "dataset_dict.json").exists():
            return [_saved(source, local)]
        _no_split(source)
        found = sorted(p for p in local.rglob("*") if p.is_file() and _format_of(p.name))
        if not found:
            raise DataError(f"folder {path} holds no .jsonl, .json, .csv or .parquet file and no saved data set.")
        return [_file(str(p), p, wanted) for p in found]
    _no_split(source)
    return [_file(path, local, wanted)]


def matching(path: str) -> list[str]:
    """The files that a pattern such as dir/*.jsonl names, sorted; the path itself where it is no pattern.

    Raises DataError where a pattern names none.
    """
    plain = Path(path).expanduser()
    if plain.exists() or not glob.has_magic(path):
        return [path]
    found = sorted(name for name in glob.glob(str(plain), recursive=True) if Path(name).is_file())
    if not found:
        raise DataError(f"no file matches {path}: check the pattern, or give the folder.")
    return found


def splits_of(source: Source) -> list[str]:
    """The splits of a hub data set or a saved DatasetDict; none for anything else, or where they cannot be told.

    A hub data set is fetched if needed. Raises DataError where that fails.
    """
    if of_hub(source):
        import datasets

        folder = hub.fetch_dataset(source.path, source.subset, source.revision)
        try:
            return [str(name) for name in datasets.get_dataset_split_names(str(folder), source.subset)]
        except Exception:  # each reader raises kinds of its own; `locate` says what is wrong
            return []
    try:
        index = json.loads((Path(source.path).expanduser() / "dataset_dict.json").read_text(encoding="utf-8"))
        return [str(name) for name in index["splits"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _no_split(source: Source) -> None:
    if source.split != "train":
        raise DataError(
            f"split {source.split!r} of the data source {source.path}: this is neither a hub data set nor a saved one "
            "with several splits, so take it out."
        )


def _file(name: str, path: Path, wanted: str) -> DataFile:
    kind = _format_of(name) if wanted == "auto" else wanted
    if kind is None:
        raise DataError(
            f"the format of {name} cannot be told from its name: let it end in .jsonl, .json, .csv or .parquet, or set "
            "the source's format in the recipe."
        )
    try:
        if path.stat().st_size == 0:
            raise DataError(f"data file {name} is empty: give a file with at least one row.")
        return DataFile(name, path, kind, hash_file(path))
    except OSError as error:
        raise DataError(f"data file {name} cannot be read ({error.strerror}): check its permissions.") from error


def _format_of(name: str) -> str | None:
    stem = name.lower().removesuffix(".gz")
    return next((kind for suffix, kind in _SUFFIXES.items() if stem.endswith(suffix)), None)


def of_hub(source: Source) -> bool:
    """Whether a source is a data set of the hub: said to be one, or named as one where no such file or folder is."""
    path = source.path
    named = bool(_HUB_ID.match(path)) and _format_of(path) is None and not Path(path).exists()
    return source.format == "hub" or (source.format == "auto" and named)


def _remote(source: Source) -> list[DataFile]:
    try:
        fs, root = file_system(source.path)
        # isfile() takes any failure for a no; find() then says what it was.
        if not fs.isfile(root) and glob.has_magic(root):
            names = sorted(n for n in fs.glob(root) if fs.isfile(n))
        else:
            names = [root] if fs.isfile(root) else [n for n in sorted(fs.find(root)) if _format_of(n)]
    except FtRayError:
        raise
    except Exception as error:
        if not isinstance(error, (OSError, ValueError, ImportError, *client_errors())):
            raise
        message = f"data at {source.path} cannot be reached ({error}): check the address and the login."
        raise DataError(redacted(message)) from error
    if not names:
        raise DataError(f"data file {redacted(source.path)} does not exist: check the address.")
    out = []
    for name in names:
        address = fs.unstrip_protocol(name)
        with storage_errors("looking up", address):
            try:
                version = fs.ukey(name)
            except (OSError, NotImplementedError):
                version = str(fs.size(name))
        key = hashlib.sha256(f"{address}\n{version}".encode()).hexdigest()[:24]
        target = cache_dir() / "sources" / key / name.rsplit("/", 1)[-1]
        if not target.exists():
            _log.info("downloading %s", address)
            with storage_errors("downloading", address, target.parent):
                target.parent.mkdir(parents=True, exist_ok=True)
                handle, temporary = tempfile.mkstemp(dir=target.parent)
                os.close(handle)
                try:
                    fs.get_file(name, temporary)
                    os.replace(temporary, target)
                finally:
                    Path(temporary).unlink(missing_ok=True)
        out.append(_file(address, target, source.format))
    return out


def _hub(source: Source) -> DataFile:
    import datasets

    folder = hub.fetch_dataset(source.path, source.subset, source.revision)
    try:
        loaded = datasets.load_dataset(str(folder), source.subset, split=source.split)
    except Exception as error:  # each reader raises kinds of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        page = f"{hub.endpoint()}/datasets/{source.path}"
        message = f"data set {source.path} cannot be loaded ({reason}): check subset and split against {page}."
        raise DataError(redacted(message)) from error
    # The commit says what is in it; a fingerprint would name this machine's folder too.
    content = json.dumps([source.path, folder.name, source.subset, source.split])
    return DataFile(source.path, Path(), "dataset", hashlib.sha256(content.encode()).hexdigest(), loaded)


def _saved(source: Source, folder: Path) -> DataFile:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
        if isinstance(loaded, datasets.DatasetDict):
            if source.split not in loaded:
                have = ", ".join(loaded)
                raise DataError(f"{source.path} has no split {source.split!r}: set split to one of {have}.")
            loaded = loaded[source.split]
        else:
            _no_split(source)
    except (OSError, ValueError) as error:
        raise DataError(f"saved data set {source.path} cannot be read ({error}): save it again.") from error
    digest = hashlib.sha256(source.split.encode())
    for file in loaded.cache_files:
        digest.update(hash_file(file["filename"]).encode())
    return DataFile(source.path, folder, "dataset", digest.hexdigest(), loaded)
