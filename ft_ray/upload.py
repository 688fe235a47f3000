"""A checkpoint's way from the ranks to storage: staged on their disks, sent in the background, committed once.

Ray Train's ASYNC report (2.60) gives every rank one upload thread. It runs our upload function, then reports to
the controller, which counts: when the last rank's report is in, the checkpoint is what Ray calls COMMITTED. Only
then does the controller (one process of a run) write our commit record. An error in the upload function ends the
worker, and what Ray itself retries are AWS's words only, so the function tries again by itself, within bounds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode
from ray.train.v2._internal.execution.callback import ReportCallback

from ft_ray import checkpoint
from ft_ray.errors import StorageError
from ft_ray.local_files import STAGED
from ft_ray.run_lock import Hold, taken_over
from ft_ray.storage import Store
from ft_ray.storage_retries import persistently

__all__ = ["Committer", "Uploads", "staging_area"]

_PATIENCE = 5.0  # seconds between two words about a slow storage


@contextlib.contextmanager
def staging_area() -> Iterator[Path]:
    """A folder of this process for everything temporary, under the machine's temporary folder; removed at the end.

    It is locked while the process lives; those that killed processes left behind are removed first. Inside,
    Python's temporary files go there too, so that a worker killed in the middle of a save leaves nothing for long.
    """
    root = Path(tempfile.gettempdir())
    for old in root.glob(f"{STAGED}*"):
        with contextlib.suppress(OSError), open(old / ".lock") as lock:
            if lock.read():  # empty: its process is about to lock it
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
    before = tempfile.tempdir
    area = Path(tempfile.mkdtemp(prefix=STAGED, dir=root))
    with open(area / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(str(os.getpid()))
        lock.flush()
        tempfile.tempdir = str(area)
        try:
            yield area
        finally:
            tempfile.tempdir = before
            shutil.rmtree(area, ignore_errors=True)


class Uploads:
    """One rank's checkpoints on their way. Training goes on meanwhile; every rank sends equally often.

    One checkpoint is on its way at a time: the next save waits until the last one is committed. With two saves in the
    recipe's interval (`objective.save_due`) no more than the interval is ever lost, and a storage that needs more than
    half of it slows training down rather than fill the disk.
    """

    def __init__(self, store: Store, area: Path, say: Callable[[str], None]) -> None:
        self._store, self._area, self._say = store, area, say
        self._last = ""

    def send(
        self,
        folder: Path,
        name: str,
        facts: dict[str, Any],
        began: float,
        later: Callable[[Path], None] | None = None,
    ) -> None:
        """Takes over this rank's files in `folder` and sends them to the checkpoint `name`.

        `later` writes the rest of them first, in the background. `facts` travel to the `Committer`, with the files'
        hashes, the seconds that writing and uploading took, and those for which training stood still since `began`.
        """
        self.finish()
        staged = self._area / name
        staged.mkdir()
        for path in folder.iterdir():
            os.rename(path, staged / path.name)
        self._last = name
        stood_still: Future[float] = Future()

        def upload(local: Checkpoint, directory: str) -> Checkpoint:
            started = time.monotonic()
            nonlocal later
            if later is not None:
                later(Path(local.path))
                later = None  # Ray calls this again where a message looks like one of AWS's
            facts["sent"] = checkpoint.upload(
                self._store, Path(local.path), directory, lambda put: persistently(put, self._say)
            )
            facts["seconds"] = time.monotonic() - started
            facts["stood_still"] = stood_still.result()
            records = ray.train.get_context().get_storage()  # Ray's own, in memory: a name is all it needs
            return Checkpoint(f"{records.experiment_fs_path}/{directory}", filesystem=records.storage_filesystem)

        try:
            ray.train.report(
                facts,
                checkpoint=Checkpoint.from_directory(str(staged)),
                checkpoint_dir_name=name,
                checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
                checkpoint_upload_fn=upload,
                delete_local_checkpoint_after_upload=True,
            )
        finally:
            stood_still.set_result(time.monotonic() - began)

    def finish(self, timeout: float | None = None) -> bool:
        """Waits until what was sent is committed, or `timeout` seconds are over. Returns whether it is."""
        if not self._last:
            return True
        began = time.monotonic()
        while True:
            known = ray.train.get_all_reported_checkpoints(
                consistency_mode=CheckpointConsistencyMode.COMMITTED, timeout_s=_PATIENCE
            )
            if any(Path(one.checkpoint.path).name == self._last for one in known):
                self._last = ""
                return True
            if timeout is not None and time.monotonic() - began > timeout:
                return False
            self._say(f"waiting for the upload of the checkpoint of step {checkpoint.step_of(self._last)}")


class Committer(ReportCallback):
    """In the controller, after Ray has counted every rank's upload in: the commit record, then what is too old goes.

    `hold` is the driver's on the run folder, None where it has none. A driver cut off from its storage may have lost
    the folder to another run while this process still reaches it; what this run takes for too old may then be all that
    the other one has. So nothing is done there, and the driver, told before this report is over, ends the run.
    """

    def __init__(self, address: str, key: str, keep: int, board: Any, hold: Hold | None = None) -> None:
        self._address, self._key, self._keep, self._board, self._hold = address, key, keep, board, hold
        self._ousted = False

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        facts = metrics[0]
        if len(metrics) != facts["workers"]:
            return  # a rank's shard is missing: its machine went away
        store, name = Store(self._address), facts["name"]
        if self._ousted or not persistently(lambda: self._commit(store, name, metrics), self._say):
            return
        event = {"kind": "checkpoint", "step": facts["step"], "name": name}
        event |= {took: max(part[took] for part in metrics) for took in ("seconds", "stood_still")}
        self._board.post.remote(event)
        try:
            kept = {"best": facts["best"], "proven": facts["proven"]}
            checkpoint.retain(store, self._key, keep=self._keep, newest=name, **kept)
        except StorageError as error:  # nothing is lost by keeping more: the next commit clears up
            self._say(f"an old checkpoint could not be removed: {error}")

    def _commit(self, store: Store, name: str, metrics: list[dict[str, Any]]) -> bool:
        """Commits where the run folder is still ours, and says whether it is. One try: outages are when it is lost."""
        if self._hold is not None and (message := taken_over(store, self._hold)):
            self._ousted = True
            told = self._board.post.remote({"kind": "ousted", "url": self._hold.url, "message": message})
            ray.get(told, timeout=30)
            return False
        checkpoint.commit(store, name, [part["sent"] for part in metrics])
        return True

    def _say(self, message: str) -> None:
        self._board.post.remote({"kind": "status", "message": message})
