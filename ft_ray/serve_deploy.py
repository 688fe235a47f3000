"""A Ray Serve file on a running cluster: handed to its head by Serve's REST API, and followed until it answers.

Ray's `serve deploy` says success once the file was taken, and takes away every application that is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from ft_ray.errors import InputError, ServingError
from ft_ray.job_logs import LostConnection
from ft_ray.serve_file import ServeFile

__all__ = ["Head", "cause", "deploy"]

_PAUSE = 1.0
_HEARTBEAT = 8.0
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


class Head(Protocol):
    """What deploying needs of a client; `jobs.Client` is one."""

    def serving(self) -> dict[str, Any]: ...
    def serve(self, document: dict[str, Any]) -> None: ...


def deploy(head: Head, file: ServeFile, *, timeout: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Returns Serve's own account of the application and of its address once it runs.

    What the same name served before is stopped first. Raises InputError where the cluster serves something else too,
    which the file would take away; ServingError when the application does not come up within `timeout` seconds.
    """
    running = head.serving().get("applications", {})
    others = sorted(n for n, a in running.items() if n != file.name and a.get("source") == "declarative")
    if others:
        raise InputError(
            f"the cluster serves {', '.join(others)}, which would end with this file: end it first (serve shutdown), "
            "or write both into one file and give that to serve deploy."
        )
    say(f"deploying {file.name}")
    head.serve(file.document)
    deadline, told, doing = time.monotonic() + timeout, time.monotonic(), "not started"
    while time.monotonic() < deadline:
        try:
            found = head.serving()
            state = found.get("applications", {}).get(file.name, {})
            doing = str(state.get("status", "not started"))
        except LostConnection as error:  # a head that restarts; what runs does not need it
            found, state, doing = {}, {}, str(error)
        if doing == "RUNNING":
            return {**state, "http": found.get("http_options") or {}}
        if doing in _FAILED:
            deployments = (state.get("deployments") or {}).values()
            texts = [str(d["message"]) for d in deployments if d.get("message")]
            raise ServingError(f"{file.name} did not start: {cause([*texts, str(state.get('message') or '')])}")
        if time.monotonic() - told > _HEARTBEAT:
            say(f"{file.name}: {doing.lower()}")
            told = time.monotonic()
        time.sleep(_PAUSE)
    raise ServingError(f"{file.name} was not up after {timeout / 60:.0f} minutes ({doing.lower()}): see serve status.")


def cause(messages: Iterable[str]) -> str:
    """The last line that names an error, else the last line: Ray's messages end with the cause."""
    lines = [line.strip() for text in messages for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["no reason was given"])[-1]
