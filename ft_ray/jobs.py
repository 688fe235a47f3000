"""Running a verb of `ft-ray` on a cluster, through Ray's job API: submit, attach, follow, stop.

A submission's id comes from what is run: verb, recipe, flags and the files that travel along (`job_request`). The same
command finds the job that it started before, attaches to it while it lives or has succeeded, and starts the next
attempt after a failure; the recipe's name makes that attempt go on from the last checkpoint.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import ray
import requests
from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ft_ray.errors import InputError, TrainingError
from ft_ray.job_logs import LostConnection, follow
from ft_ray.job_request import Request, describe
from ft_ray.storage_faults import redacted

__all__ = ["Client", "Request", "describe", "exit_code", "follow", "jobs", "stop", "submit"]

_DEFAULT = "http://127.0.0.1:8265"
_TIMEOUT = (10, 120)  # seconds to connect and to wait for an answer; the SDK alone would wait for ever


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
        for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they tell of each package that they make
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

    def serving(self) -> dict[str, Any]:
        """What the cluster serves, as Serve itself tells it: applications, HTTP options, proxies."""
        return dict(self._answer("GET").json())

    def serve(self, document: dict[str, Any]) -> None:
        """Hands the cluster a Ray Serve file. Returns before anything of it runs. Raises InputError for a bad one."""
        self._answer("PUT", json_data=document)

    def _answer(self, method: str, **options: Any) -> requests.Response:
        response = self._do_request(method, "/api/serve/applications/", **options)
        if response.status_code == 400:
            raise InputError(f"Ray Serve refuses the file ({_first_line(response.text)}).")
        if response.status_code != 200:
            raise LostConnection(f"the head answers {response.status_code} ({_first_line(response.text)})")
        return response

    async def tail(self, job: str) -> AsyncIterator[str]:
        """The job's log from its beginning, as it grows; ends with the job, or with the connection."""
        self.info(job)
        url = f"{self.address}/api/jobs/{job}/logs/tail"
        async with aiohttp.ClientSession(cookies=self._cookies, headers=self._headers) as session:
            try:
                socket = await session.ws_connect(url, ssl=self._ssl_context or True)
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
    deadline, pause, sent = time.monotonic() + patience, 1.0, ""
    again = again or request.repeats
    while True:
        try:
            number, status = _newest(client, request)
            if status is not None and sent == request.attempt(number):  # its answer was lost, however it ended since
                return sent, True
            if status is not None and (not status.is_terminal() or (status == JobStatus.SUCCEEDED and not again)):
                return request.attempt(number), False
            job = sent = request.attempt(number + 1)
            failed = status is not None and status != JobStatus.SUCCEEDED
            try:
                return str(
                    client.submit_job(
                        entrypoint=request.retry if failed else request.entrypoint, submission_id=job,
                        runtime_env=request.runtime_env, metadata=dict(request.metadata),
                        entrypoint_num_cpus=num_cpus or None, entrypoint_num_gpus=num_gpus or None,
                    )
                ), True  # fmt: skip
            except RuntimeError as error:
                if "already exists" not in str(error):  # else: by somebody else at once
                    raise TrainingError(redacted(f"the cluster refused the job ({_first(error)}).")) from error
        except (LostConnection, requests.RequestException) as error:
            reason = redacted(_first(error))
            if time.monotonic() > deadline:
                raise TrainingError(f"{reason}: check --address, and that the head or the tunnel is up.") from error
            say(f"{reason}: trying again")
            time.sleep(pause)
            pause = min(2 * pause, 15.0)


def _first_line(text: str) -> str:
    return redacted((text.strip().splitlines() or ["no reason was given"])[0][:300]).rstrip(".")


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
