"""Running a verb of `ft-ray` on a cluster, through Ray's job API: submit, attach, follow, stop.

A submission's id comes from what is run: verb, recipe (its name and hash) and flags. The same command finds the job
that it started before, attaches to it while it lives or has succeeded, and starts the next attempt after a failure;
the recipe's name makes that attempt go on from the last checkpoint.

What a job carries is shown to whoever may list jobs. So no secret may be in it: values that look like one are
refused, and none is taken from the environment here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import ray
import requests
from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import ft_ray
from ft_ray import recipe as recipes
from ft_ray import sensitive
from ft_ray.errors import InputError, TrainingError
from ft_ray.job_logs import LostConnection, follow
from ft_ray.job_upload import Upload, needed, survey
from ft_ray.storage_faults import redacted

__all__ = ["Client", "Request", "describe", "exit_code", "follow", "jobs", "stop", "submit"]

_DEFAULT = "http://127.0.0.1:8265"
_TIMEOUT = (10, 120)  # seconds to connect and to wait for an answer; the SDK alone would wait for ever
_STOP_WAIT = 120  # seconds that a driver has to stop in step, with a checkpoint; Ray's own 3 would kill it
# A name that says secret, unless what it holds is the path of a file.
_SECRET_NAME = re.compile(
    r"(?i)(^|_)(token|secret|password|passwd|pwd|api_?key|access_?key|private_?key|credentials?|auth)($|_)"
)
_PATH_NAME = re.compile(r"(?i)_(path|file|folder|dir|mode)$")


class Client(JobSubmissionClient):
    """Ray's client with time limits, with the address that was asked for, and with errors for people."""

    def __init__(self, address: str | None = None) -> None:
        # The SDK's own constructor lets RAY_ADDRESS override an address that was given.
        found = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or _DEFAULT
        if not found.startswith(("http://", "https://")):
            raise InputError(
                f"{redacted(found)} is not the address of a job API: give --address http://HEAD:8265, or the near end "
                "of a tunnel to it."
            )
        logging.getLogger("ray.dashboard").setLevel(logging.WARNING)  # the SDK tells of each package it makes
        SubmissionClient.__init__(self, address=found)
        self._client_ray_version = ray.__version__

    @property
    def address(self) -> str:
        return str(self._address)

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        try:
            response = super()._do_request(method, endpoint, **{"timeout": _TIMEOUT, **options})
        except AuthenticationError as error:
            raise self._refused() from error
        except requests.RequestException as error:
            raise LostConnection(f"no job API answers at {redacted(self.address)}") from error
        if response.status_code in (502, 503, 504):  # a proxy whose head is away
            raise LostConnection(f"{redacted(self.address)} answers {response.status_code}")
        return response

    def _refused(self) -> InputError:
        return InputError(
            f"{redacted(self.address)} asks for the cluster's token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH "
            "to the file that holds it."
        )

    def info(self, job: str) -> JobDetails:
        """The job's details. Raises InputError where the cluster has no such job."""
        response = self._do_request("GET", f"/api/jobs/{job}")
        if response.status_code == 404:
            raise InputError(f"{redacted(self.address)} knows no job {job}: `ft-ray jobs list` shows the ones it has.")
        if response.status_code != 200:
            raise LostConnection(f"the head answers {response.status_code}")
        return JobDetails(**response.json())

    async def tail(self, job: str) -> AsyncIterator[str]:
        """The job's log from its beginning, as it grows; ends with the job, or with the connection."""
        self.info(job)
        url = f"{self.address}/api/jobs/{job}/logs/tail"
        async with aiohttp.ClientSession(cookies=self._cookies, headers=self._headers) as session:
            try:
                # Pings: a connection that a router has forgotten would never end by itself.
                socket = await session.ws_connect(url, ssl=self._ssl_context or True, heartbeat=20.0)
            except aiohttp.WSServerHandshakeError as error:
                if error.status in (401, 403):
                    raise self._refused() from error
                raise
            async with socket:
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.TEXT:
                        yield message.data
                    elif message.type == aiohttp.WSMsgType.ERROR:
                        raise LostConnection(str(socket.exception()))
                if socket.close_code == aiohttp.WSCloseCode.ABNORMAL_CLOSURE:
                    raise LostConnection("the connection was cut")


@dataclass(frozen=True)
class Request:
    """One verb to run on a cluster. `base` is its stable id; attempts after a failure append -2, -3 and so on."""

    base: str
    name: str
    verb: str
    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    upload: Upload

    def attempt(self, number: int) -> str:
        return self.base if number == 1 else f"{self.base}-{number}"


def _environment(pairs: Sequence[str]) -> dict[str, str]:
    values = {}
    for pair in pairs:
        name, given, value = pair.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise InputError(f"--env {name!r} is not the name of a variable: give NAME=VALUE.")
        if not given:
            raise InputError(
                f"--env {name}: values are not taken from the environment here, because a job shows them to everyone "
                "who may list jobs; set it on the cluster's nodes (a mounted file, a Secret) instead."
            )
        named = _SECRET_NAME.search(name) and not _PATH_NAME.search(name)
        if named or _secret(value):
            raise InputError(
                f"--env {name} looks like a secret, and a job shows its environment to everyone who may list jobs: "
                "put it on the cluster's nodes (a mounted file, a Secret) instead."
            )
        values[name] = value
    return values


def _secret(text: str) -> bool:
    return redacted(text) != text or any(kind.code == "secret" for kind, _, _ in sensitive.find(text))


def describe(
    arguments: Sequence[str],
    *,
    working_dir: str = ".",
    env: Sequence[str] = (),
    excludes: Sequence[str] = (),
) -> Request:
    """What `ft-ray ARGUMENTS` on a cluster is, checked here: nothing is sent yet.

    Raises InputError for a verb without a recipe, a recipe or data that would not travel along, a folder over 500 MiB,
    storage that only one node would see, and anything that looks like a secret.
    """
    if not arguments:
        raise InputError("nothing to run: give a verb and its recipe after --, for example -- run recipe.yaml.")
    verb, *rest = arguments
    values = [a for a in rest if not a.startswith("-")]
    files = [v for v in values if "=" not in v]
    if not files:
        raise InputError(f"{verb} has no recipe: give one after the verb, for example -- {verb} recipe.yaml.")
    for argument in arguments:
        if _secret(argument):
            raise InputError(
                f"the argument {redacted(argument)[:20]}… holds a secret, and a job shows its command to everyone who "
                "may list jobs: give credentials to the cluster's nodes instead."
            )
    recipe = recipes.load(files[0], [v for v in values if "=" in v]).recipe
    if leaks := _leaks(recipe.to_dict()):
        raise InputError(
            f"{', '.join(leaks)} of {files[0]} holds a password, and a recipe is kept in the run's manifest: give "
            "credentials to the cluster's nodes instead."
        )
    upload = survey(working_dir, tuple(excludes))
    upload.check()
    _travels(recipe, files, upload)
    if "://" not in recipe.storage and not os.path.isabs(recipe.storage):
        raise InputError(
            f"storage {recipe.storage!r} would be a folder inside the job's own copy of the working directory, which "
            "goes with the job: set it to an s3:// or gs:// address, or to a folder that all nodes share."
        )
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT), **_environment(env)}
    contents = [hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in files[1:] if Path(f).is_file()]
    digest = hashlib.sha256(json.dumps([verb, recipe.hash, sorted(rest), contents]).encode()).hexdigest()
    return Request(
        base=f"ft-ray-{verb}-{recipe.name}-{digest[:10]}".lower(),
        name=recipe.name,
        verb=verb,
        entrypoint=shlex.join(["ft-ray", *arguments]),
        runtime_env={"working_dir": str(upload.folder), "excludes": list(upload.excludes), "env_vars": variables},
        metadata={"ft-ray": ft_ray.__version__, "run": recipe.name, "verb": verb, "recipe": recipe.hash[:16]},
        upload=upload,
    )


def _leaks(value: Any, key: str = "") -> list[str]:
    """Dotted keys of a recipe whose text holds a secret."""
    if isinstance(value, dict):
        return [found for name, inner in value.items() for found in _leaks(inner, f"{key}.{name}".lstrip("."))]
    if isinstance(value, list | tuple):
        return [found for inner in value for found in _leaks(inner, key)]
    return [key] if isinstance(value, str) and _secret(value) else []


def _travels(recipe: recipes.Recipe, files: Sequence[str], upload: Upload) -> None:
    """Raises InputError for a file that the job would look for and not find in its working directory."""
    here = Path.cwd()
    named = [("the recipe", f) for f in files if Path(f).is_file()]
    for key, path in [*named, *needed(recipe)]:
        full = Path(os.path.abspath(path))
        inside = full.is_relative_to(upload.folder) and here == upload.folder
        relative = full.relative_to(upload.folder).as_posix() if full.is_relative_to(upload.folder) else ""
        held = relative in upload.sizes or any(name.startswith(f"{relative}/") for name in upload.sizes)
        if os.path.isabs(path) or not inside or not held:
            why = "is left out by .gitignore, .rayignore or as a credential" if inside else "is not in it as named"
            raise InputError(
                f"{key} {path} would not travel along: it {why} (working directory {upload.folder}); move it, name it "
                "relative to that folder and run there, or give an address that the cluster reads."
            )


def submit(
    client: Client,
    request: Request,
    *,
    num_cpus: float = 0.0,
    num_gpus: float = 0.0,
    again: bool = False,
    patience: float = 120.0,
    say: Callable[[str], None] = lambda message: None,
) -> tuple[str, bool]:
    """Starts the request, or finds the job that runs or ran it. Returns (submission id, whether it is a new job).

    A job that is alive or has succeeded is attached to; after one that failed or was stopped the next attempt starts,
    and with `again` also after success. A lost connection is tried again for `patience` seconds: the fixed id makes
    that safe. `num_cpus` and `num_gpus` are kept for the driver, which then runs on a worker node.
    """
    deadline, pause = time.monotonic() + patience, 1.0
    while True:
        try:
            number, status = _newest(client, request)
            if status is not None and (not status.is_terminal() or (status == JobStatus.SUCCEEDED and not again)):
                return request.attempt(number), False
            job = request.attempt(number + 1)
            try:
                return str(
                    client.submit_job(
                        entrypoint=request.entrypoint, submission_id=job, runtime_env=request.runtime_env,
                        metadata=dict(request.metadata), entrypoint_num_cpus=num_cpus or None,
                        entrypoint_num_gpus=num_gpus or None,
                    )
                ), True  # fmt: skip
            except RuntimeError as error:
                if "already exists" not in str(error):  # else: sent twice, or by somebody else at once
                    raise TrainingError(redacted(f"the cluster refused the job ({_first(error)}).")) from error
        except (LostConnection, requests.RequestException) as error:
            reason = redacted(_first(error))
            if time.monotonic() > deadline:
                raise TrainingError(f"{reason}: check --address, and that the head or the tunnel is up.") from error
            say(f"{reason}: trying again")
            time.sleep(pause)
            pause = min(2 * pause, 15.0)


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")


def _newest(client: Client, request: Request) -> tuple[int, JobStatus | None]:
    """Number and status of the last attempt; (0, None) before the first."""
    known = {job.submission_id: job.status for job in jobs(client)}
    number = 0
    while request.attempt(number + 1) in known:
        number += 1
    return number, known[request.attempt(number)] if number else None


def jobs(client: Client) -> list[JobDetails]:
    """The cluster's submitted jobs, the newest last. Raises LostConnection."""
    response = client._do_request("GET", "/api/jobs/")
    if response.status_code != 200:
        raise LostConnection(f"the head answers {response.status_code}")
    found = [JobDetails(**item) for item in response.json() if item.get("submission_id")]
    return sorted(found, key=lambda job: job.start_time or 0)


def stop(client: Client, job: str, *, say: Callable[[str], None] = lambda message: None) -> JobDetails:
    """Asks the job to stop with a checkpoint, and waits until it has. Raises InputError, LostConnection."""
    info, told = client.info(job), time.monotonic()
    if not info.status.is_terminal():
        client.stop_job(job)
    while not info.status.is_terminal():
        time.sleep(0.5)
        if time.monotonic() - told > 5:
            say(f"waiting for {job} to stop")
            told = time.monotonic()
        info = client.info(job)
    return info


def exit_code(info: JobDetails) -> int:
    """What `ft-ray` itself would have returned: 0, 1, 2, 3 or 130."""
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return 130
    return info.driver_exit_code if info.driver_exit_code in (1, 2, 3, 130) else 1
