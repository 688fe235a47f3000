"""Run folders on a local disk, NFS or object storage: atomic commits, content hashes, one writer.

A *tree* is a folder of artifacts. It is visible only once committed: on a file system the staged folder
is renamed into place; on object storage, where nothing can be renamed, `.committed.json` with the SHA-256
of every file is written last, and a folder without it does not exist for any reader here.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import fsspec

from ft_ray.downloads import fetch_files
from ft_ray.errors import DamagedError, StorageError
from ft_ray.local_files import (
    cache_dir,
    files_below,
    hash_file,
    is_kept_open,
    look_again,
    move_for_good,
    remove_local,
    write_once,
    written_beside,
)
from ft_ray.run_lock import flock_is_shared, flocked, leased
from ft_ray.storage_faults import file_system, redacted, storage_errors, temporary_folder

__all__ = ["COMMIT", "Store", "cache_dir", "hash_tree"]

COMMIT = ".committed.json"
_CHUNK = 1 << 22


def hash_tree(folder: str | Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file below `folder`, the commit record left out."""
    return {p.relative_to(folder).as_posix(): hash_file(p) for p in files_below(folder) if p.name != COMMIT}


class Store:
    """A folder at any fsspec address. Paths given to its methods are relative to it."""

    def __init__(self, url: str | Path) -> None:
        self.url = str(url).rstrip("/") or "/"
        try:
            self._fs, root = file_system(self.url)
        except (ValueError, ImportError) as error:
            message = f"storage {self.url}: {error}; use a folder, s3:// or gs:// address."
            raise StorageError(redacted(message)) from error
        self.is_local = isinstance(self._fs, fsspec.implementations.local.LocalFileSystem)
        self.root: str = os.path.abspath(root) if self.is_local else root.rstrip("/")

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def path(self, relative: str = "") -> str:
        """Absolute path (local) or address (remote) of `relative`; refuses to leave the root."""
        if ".." in relative.split("/") or relative.startswith("/"):
            raise StorageError(f"path {relative!r} leaves the run folder {self.url}: use a relative path inside it.")
        return f"{self.root}/{relative}" if relative else self.root

    def address(self, relative: str = "") -> str:
        """Like `path`, with the scheme of a remote store."""
        return self.path(relative) if self.is_local else self._fs.unstrip_protocol(self.path(relative))

    def sub(self, relative: str) -> Store:
        return Store(self.address(relative))

    def check_writable(self) -> None:
        """Writes and removes a probe. Raises StorageError."""
        probe = f".probe-{uuid.uuid4().hex}"
        self.write(probe, b"ft-ray")
        self.remove(probe)

    def exists(self, relative: str = "") -> bool:
        path = self.path(relative)
        with storage_errors("looking up", self.address(relative)):
            self._others_write(os.path.dirname(path))
            return bool(self._fs.exists(path))

    def read(self, relative: str) -> bytes:
        path = self.path(relative)
        with storage_errors("reading", self.address(relative)):
            try:
                return bytes(self._fs.cat_file(path))
            except FileNotFoundError:
                if not self.is_local:
                    raise
                look_again(os.path.dirname(path))
                return bytes(self._fs.cat_file(path))

    def _others_write(self, path: str) -> None:
        """Forgets what was known of the folders on the way to `path`, and of earlier listings."""
        if self.is_local:
            look_again(path)
        else:
            self._fs.invalidate_cache()

    def read_json(self, relative: str) -> Any:
        try:
            return json.loads(self.read(relative))
        except ValueError as error:
            raise StorageError(
                f"{self.address(relative)} is not valid JSON ({error}): it was cut short or edited; remove it."
            ) from error

    def write(self, relative: str, content: bytes) -> None:
        """Writes one file so that a reader sees the old or the new content, never a part."""
        path = self.path(relative)
        with storage_errors("writing", self.address(relative)):
            if not self.is_local:
                self._fs.pipe_file(path, content)
                return
            with written_beside(path, content) as temporary:
                os.replace(temporary, path)

    def create(self, relative: str, content: bytes) -> None:
        """Writes one file where there is none, whole, for one of several that try. Raises FileExistsError."""
        path = self.path(relative)
        try:
            with storage_errors("writing", self.address(relative)):
                if not self.is_local:
                    self._fs.pipe_file(path, content, mode="create")
                    return
                write_once(path, content)
        except StorageError as error:
            if isinstance(error.__cause__, FileExistsError):
                raise error.__cause__ from None
            raise

    def put(self, file: str | Path, relative: str, *, lasting: bool = False) -> None:
        """Moves one local file into the store (renamed, else copied or uploaded). `lasting`: it survives power loss."""
        path = self.path(relative)
        with storage_errors("writing", self.address(relative)):
            if self.is_local:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                (move_for_good if lasting else shutil.move)(str(file), path)
            else:
                self._fs.put_file(str(file), path)

    def write_json(self, relative: str, value: Any) -> None:
        self.write(relative, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def list(self, relative: str = "") -> list[str]:
        """Names directly below `relative`, sorted; empty where there is nothing."""
        path = self.path(relative)
        with storage_errors("listing", self.address(relative)):
            try:
                self._others_write(path)
                names = [p.rstrip("/").rsplit("/", 1)[-1] for p in self._fs.ls(path, detail=False) if p != path]
                return sorted(name for name in names if not is_kept_open(name))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def versions(self, relative: str = "") -> dict[str, str]:
        """Files directly below `relative`, each with what changes when it does: size and ETag, or else a time."""
        path = self.path(relative)
        found = {}
        with storage_errors("listing", self.address(relative)):
            self._others_write(path)
            for entry in self._fs.ls(path, detail=True):
                if entry["type"] == "file":
                    marks = [entry.get(k) for k in ("ETag", "etag", "generation", "LastModified", "mtime", "created")]
                    mark = next((m for m in marks if m is not None), "")
                    found[entry["name"].rsplit("/", 1)[-1]] = f"{entry['size']} {mark}"
        return dict(sorted(found.items()))

    def get(self, relative: str, file: str | Path) -> None:
        """Copies one file to local `file`, in pieces: its size is no matter."""
        with storage_errors("downloading", self.address(relative), Path(file).parent):
            self._fs.get_file(self.path(relative), str(file))

    def remove(self, relative: str) -> None:
        with storage_errors("removing", self.address(relative)), contextlib.suppress(FileNotFoundError):
            if self.is_local:
                look_again(os.path.dirname(self.path(relative)))
                remove_local(self.path(relative))
                return
            self._others_write(self.path(relative))  # an old listing would leave what they have put there since
            self._fs.rm(self.path(relative), recursive=True)

    # Trees

    @contextlib.contextmanager
    def stage(self, relative: str) -> Iterator[Path]:
        """A local folder to fill; committed as the tree `relative` on success, removed on failure.

        An earlier tree of that name stays until the new one is complete; in object storage, until sending begins.
        """
        own_disk = None if self.is_local else temporary_folder()
        with storage_errors("staging", self.address(relative), own_disk):
            if self.is_local:
                os.makedirs(self.root, exist_ok=True)
                staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=self.root))
            else:
                staging = Path(tempfile.mkdtemp(prefix="ft-ray-staging-"))
        try:
            with storage_errors("writing", self.address(relative), own_disk):
                yield staging
                self.commit(staging, relative)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def commit(self, folder: str | Path, relative: str) -> dict[str, str]:
        """Makes local `folder` the tree `relative` (moving it, on a local store). Returns its hashes."""
        hashes = hash_tree(folder)
        record = json.dumps({"committed": time.time(), "files": hashes}, indent=1).encode()
        destination = self.path(relative)
        with storage_errors("committing", self.address(relative)):
            if self.is_local:
                look_again(os.path.dirname(destination))
                (Path(folder) / COMMIT).write_bytes(record)
                os.chmod(folder, 0o755)
                os.makedirs(os.path.dirname(destination), exist_ok=True)
                old = f"{destination}.{uuid.uuid4().hex}.old"
                if os.path.lexists(destination):
                    os.rename(destination, old)
                shutil.move(str(folder), destination)
                shutil.rmtree(old, ignore_errors=True)
            else:
                self.remove(f"{relative}/{COMMIT}")
                for name in hashes:
                    self._fs.put_file(str(Path(folder) / name), f"{destination}/{name}")
                for name in set(self._sizes(relative)) - set(hashes):  # an earlier tree had it
                    # One object: below a placeholder of a folder, as mounts and consoles make them, lies what was sent.
                    if name and not name.endswith("/"):
                        with contextlib.suppress(FileNotFoundError):
                            self._fs.rm_file(f"{destination}/{name}")
                self._fs.pipe_file(f"{destination}/{COMMIT}", record)
        return hashes

    def clone(self, relative: str, destination: str) -> None:
        """Commits the tree `relative` again as `destination`: hard links on one file system, else copies.

        Both then live on their own: removing one keeps the other.
        """
        recorded = self.tree(relative)
        if recorded is None:
            raise StorageError(f"{self.address(relative)} is not committed: run the step that makes it again.")
        if self.is_local:
            with self.stage(destination) as folder:
                for name in recorded:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    try:
                        os.link(f"{self.path(relative)}/{name}", folder / name)
                    except OSError:  # a file system without hard links
                        shutil.copy2(f"{self.path(relative)}/{name}", folder / name)
            return
        if self.tree(destination) == recorded and not self.survey(destination):
            return
        self.remove(f"{destination}/{COMMIT}")
        with storage_errors("copying", self.address(relative)):
            for name in recorded:
                self._fs.copy(f"{self.path(relative)}/{name}", f"{self.path(destination)}/{name}")
        self.mark_committed(destination, recorded)

    def mark_committed(self, relative: str, hashes: dict[str, str], sizes: dict[str, int] | None = None) -> None:
        """Commits a tree whose files others put in place (each rank its own shard). `sizes` (bytes): for `survey`."""
        record: dict[str, Any] = {"committed": time.time(), "files": hashes}
        self.write_json(f"{relative}/{COMMIT}", record if sizes is None else {**record, "sizes": sizes})

    def tree(self, relative: str) -> dict[str, str] | None:
        """Hashes of a committed tree, or None where there is none.

        Raises StorageError where the storage fails, or where the record names files outside the tree: whoever
        may write a run folder must not write elsewhere on the machine that reads it.
        """
        record = f"{relative}/{COMMIT}" if relative else COMMIT
        try:
            files = self.read_json(record)["files"]
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError | ValueError):
                return None
            raise
        except (KeyError, TypeError):
            return None
        if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
            return None
        for name in files:
            if not name or name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name:
                raise DamagedError(
                    f"{redacted(self.address(record))} names the file {name!r}, outside its folder: "
                    "do not use this tree, somebody tampered with it."
                )
        return files

    def survey(self, relative: str) -> builtins.list[str]:
        """What one listing shows to be wrong with the tree `relative`: files that are gone or have another size.

        It reads no file: `verify` and `local` compare contents. Raises StorageError where the storage fails.
        """
        recorded = self.tree(relative)
        if recorded is None:
            return [f"{self.address(relative)}: not committed"]
        sizes = self.read_json(f"{relative}/{COMMIT}").get("sizes", {})
        with storage_errors("listing", self.address(relative)):
            there = self._sizes(relative)
        gone = [f"{self.address(relative)}/{name}: missing" for name in recorded if name not in there]
        return gone + [
            f"{self.address(relative)}/{name}: has {there[name]} bytes and not the {sizes[name]} recorded"
            for name in recorded
            if name in there and there[name] != sizes.get(name, there[name])
        ]

    def _sizes(self, relative: str) -> dict[str, int]:
        """Every file below `relative`, with its size in bytes, by one listing."""
        self._others_write(self.path(relative))
        listed = self._fs.find(self.path(relative), detail=True)
        return {path.removeprefix(f"{self.path(relative)}/"): entry["size"] for path, entry in listed.items()}

    def verify(self, relative: str) -> builtins.list[str]:
        """What is wrong with the tree `relative`, file by file; empty when every hash matches."""
        try:
            recorded = self.tree(relative)
        except StorageError as error:
            return [str(error)]
        if recorded is None:
            return [f"{self.address(relative)}: not committed"]
        faults = []
        for name, expected in recorded.items():
            try:
                self._compare(f"{relative}/{name}" if relative else name, expected)
            except StorageError as error:
                faults.append(str(error))
        return faults

    def _compare(self, file: str, expected: str) -> None:
        """Raises DamagedError where `file` is missing or has another hash, StorageError where that cannot be said."""
        digest = hashlib.sha256()
        try:
            with storage_errors("reading", self.address(file)), self._fs.open(self.path(file), "rb") as opened:
                while block := opened.read(_CHUNK):
                    digest.update(block)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise DamagedError(f"{self.address(file)}: missing") from error
            raise
        if digest.hexdigest() != expected:
            raise DamagedError(f"{self.address(file)}: content differs from its recorded hash")

    def local(self, relative: str, without: Collection[str] = (), *, place: Path | None = None) -> Path:
        """The tree as a local folder: itself on a local store, else a verified download, kept by content.

        `without`: files that need not be fetched, and may be missing. With `place`, a folder in which the download is
        made, files of a local store are compared with their hashes too. Processes of one machine share a download,
        and each of its files is fetched once. Raises DamagedError where a file is missing or has another hash.
        """
        if self.is_local and place is None:
            return Path(self.path(relative))
        recorded = self.tree(relative)
        if recorded is None:
            raise DamagedError(f"{self.address(relative)} is not committed: run the step that makes it again.")
        wanted = {name: digest for name, digest in recorded.items() if name not in without}
        if self.is_local:
            for name, expected in wanted.items():
                self._compare(f"{relative}/{name}", expected)
            return Path(self.path(relative))
        # By all that is recorded: whatever they leave out, processes share every file that two of them want.
        key = hashlib.sha256(json.dumps(recorded, sort_keys=True).encode()).hexdigest()[:24]
        target, root = (place or cache_dir() / "trees") / key, self.path(relative)

        def get(name: str, file: Path) -> None:
            self._fs.get_file(f"{root}/{name}", str(file))

        with storage_errors("downloading", self.address(relative), target.parent):
            fetch_files(wanted, target, get, self.address(relative))
        return target

    # One writer

    @contextlib.contextmanager
    def lock(self, relative: str = ".lock") -> Iterator[None]:
        """Holds the run folder for one writer. Raises StorageError naming the holder when it is taken."""
        path = self.path(relative)
        by_kernel = self.is_local and flock_is_shared(path)
        with flocked(path, self.url) if by_kernel else leased(self, relative, self.url):
            yield
