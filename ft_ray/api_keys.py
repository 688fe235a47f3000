"""The API keys of an endpoint, of which only hashes are stored, in one file or object."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections.abc import Iterator
from typing import Any

from ft_ray.errors import FtRayError, InputError, StorageError
from ft_ray.run_lock import Taken
from ft_ray.storage import Store

__all__ = ["Keys", "issue_key", "revoke_key"]

log = logging.getLogger("ft_ray.gateway")

_RELOAD_SECONDS = 5.0
_RELOAD_PATIENCE = 2.0  # seconds from its start that requests wait for it; then they go by the keys known last
_PATIENCE_SECONDS = 10.0


class Keys:
    """API keys, of which only hashes are stored: {"keys": [{"id", "sha256", "created", "revoked"}]}.

    The file or object is read again every few seconds while requests come, beside them, so that a new or revoked key
    takes effect on a live endpoint. While it cannot be read the keys known last go on; at the start that is an error.
    """

    def __init__(self, address: str) -> None:
        parent, _, self._name = address.rpartition("/")
        self._store = Store(parent or ".")
        self._known: dict[str, str] = {}
        self._read_at = 0.0
        self._reading: asyncio.Task[None] | None = None
        self._asked_at = 0.0
        self._load()

    def _load(self) -> None:
        entries = _entries(self._store, self._name)
        self._known = {e["sha256"]: e["id"] for e in entries if not e.get("revoked")}
        self._read_at = time.monotonic()

    async def owner(self, key: str) -> str | None:
        """The id of a valid key, else None. Looking a SHA-256 up by hash leaks no timing about the key itself."""
        now = time.monotonic()
        if now - self._read_at > _RELOAD_SECONDS:
            if self._reading is None or self._reading.done():
                self._reading, self._asked_at = asyncio.create_task(self._read_again()), now
            if (left := self._asked_at + _RELOAD_PATIENCE - now) > 0:  # a storage may hang
                await asyncio.wait([self._reading], timeout=left)
        return self._known.get(_hash(key))

    async def _read_again(self) -> None:
        try:
            await asyncio.to_thread(self._load)
        except Exception as error:
            self._read_at = time.monotonic()
            log.warning("API keys not read again: %s", error if isinstance(error, FtRayError) else type(error).__name__)


def issue_key(address: str, label: str) -> str:
    """Makes a key, stores its hash at `address` (file or object), and returns it: it cannot be shown again.

    Raises InputError for a label that has a key, StorageError where the file cannot be read, written or had alone.
    """
    with _alone(address) as (store, name):
        entries = _entries(store, name) if store.exists(name) else []
        if any(e["id"] == label and not e.get("revoked") for e in entries):
            raise InputError(f"{address} has a key {label!r} already: choose another label, or revoke that one.")
        key = f"ft-{secrets.token_urlsafe(32)}"
        entries.append({"id": label, "sha256": _hash(key), "created": int(time.time()), "revoked": None})
        store.write_json(name, {"keys": entries})
    return key


def revoke_key(address: str, label: str) -> None:
    """A live endpoint refuses the key within a few seconds.

    Raises InputError for an unknown label, StorageError where the file cannot be read, written or had alone.
    """
    with _alone(address) as (store, name):
        entries = _entries(store, name)
        found = [e for e in entries if e["id"] == label and not e.get("revoked")]
        if not found:
            raise InputError(f"{address} has no valid key {label!r}.")
        for entry in found:
            entry["revoked"] = int(time.time())
        store.write_json(name, {"keys": entries})


@contextlib.contextmanager
def _alone(address: str) -> Iterator[tuple[Store, str]]:
    """The file of keys for one that changes it: who wrote what it had read before would undo a revocation."""
    parent, _, name = address.rpartition("/")
    store, deadline = Store(parent or "."), time.monotonic() + _PATIENCE_SECONDS
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(store.lock(f".{name}.lock"))
                break
            except Taken as error:
                if time.monotonic() > deadline:
                    raise StorageError(f"{address} is being changed by {error.who}: try again.") from error
                time.sleep(0.05)
        yield store, name


def _hash(key: str) -> str:
    # A key is 256 random bits: nothing to guess, so no slow hash is needed.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _entries(store: Store, name: str) -> list[dict[str, Any]]:
    value = store.read_json(name)
    entries = value.get("keys") if isinstance(value, dict) else None
    if not isinstance(entries, list) or not all(isinstance(e, dict) and {"id", "sha256"} <= e.keys() for e in entries):
        raise StorageError(f"{store.address(name)} is not a file of API keys: run ft-ray keys issue FILE LABEL.")
    return entries
