"""Which MLflow store a project uses, and making it ready: created and migrated once, under a file lock.

A new sqlite file that several processes open together fails with migration errors, so whoever comes first
creates it while the others wait. MLflow's file store is not supported by MLflow 3 any more.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ft_ray.errors import InputError, StorageError
from ft_ray.storage import Store, cache_dir
from ft_ray.storage_faults import redacted, storage_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["client", "exists", "ready", "tracking_uri"]

log = logging.getLogger("ft_ray")

DATABASE = "mlflow.db"
_SQLITE = "sqlite:///"


def tracking_uri(storage: str, uri: str | None = None) -> str:
    """The store of a project: `uri` (recipe.tracking.uri), else MLFLOW_TRACKING_URI, else sqlite in `storage`.

    The sqlite file lies beside the run folders. Object storage cannot hold one: it is then kept in the cache
    of this machine, which is said aloud, because other machines do not see it. Raises InputError for a file store.
    """
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if chosen:
        if "://" not in chosen or chosen.startswith("file:"):
            raise InputError(
                f"tracking uri {redacted(chosen)}: MLflow 3 has no file store; use http(s)://SERVER or sqlite:///PATH/mlflow.db."
            )
        return chosen
    store = Store(storage)
    if store.is_local:
        return f"{_SQLITE}{store.path(DATABASE)}"
    path = cache_dir() / "mlflow" / f"{hashlib.sha256(storage.encode()).hexdigest()[:16]}.db"
    log.warning(
        "no MLflow server is set, and %s cannot hold a database: runs and registered models are recorded in %s, "
        "on this machine only; set tracking.uri or MLFLOW_TRACKING_URI to share them",
        redacted(storage),
        path,
    )
    return f"{_SQLITE}{path}"


def ready(uri: str) -> str:
    """Creates the sqlite store behind `uri`, or migrates an older one, exactly once; returns `uri`.

    Servers look after their own. Safe to call from many processes. Raises StorageError.
    """
    if not uri.startswith(_SQLITE):
        return uri
    path = Path(uri.removeprefix(_SQLITE)).absolute()
    with storage_errors("opening the MLflow store", str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{path.name}.lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _migrate(f"{_SQLITE}{path}")
    return uri


def exists(uri: str) -> bool:
    """False for a sqlite store that nobody has made yet: reading must not make one."""
    return not uri.startswith(_SQLITE) or Path(uri.removeprefix(_SQLITE)).exists()


def client(uri: str) -> MlflowClient:
    """A client of the store, made ready first. Tracking and registry are the same store."""
    _quiet()
    from mlflow import MlflowClient

    ready(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _migrate(uri: str) -> None:
    _quiet()
    import sqlalchemy
    from mlflow.store.db import utils

    engine = sqlalchemy.create_engine(uri)
    try:
        if utils._get_schema_version(engine) != utils._get_latest_schema_revision():
            utils._initialize_tables(engine) if utils._is_empty_database(engine) else utils._upgrade_db(engine)
    except (sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        raise StorageError(
            f"the MLflow store {uri} cannot be opened ({str(error).splitlines()[0]}): "
            "check that it is a sqlite file that you may write, or set tracking.uri."
        ) from error
    finally:
        engine.dispose()


def _quiet() -> None:
    """MLflow reports usage to its makers and logs each migration unless told not to."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
