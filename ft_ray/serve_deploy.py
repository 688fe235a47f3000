"""A Ray Serve file on a running cluster: handed to its head by Serve's REST API, and followed until it answers.

Ray's `serve deploy` says success once the file was taken, and takes away every application that is not in it. It
starts nothing when the file is the one that runs, even where NAME@champion means another version by now.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from ft_ray.env_vars import environment
from ft_ray.errors import FtRayError, InputError, ServingError
from ft_ray.job_logs import LostConnection
from ft_ray.serve_args import ServeArgs
from ft_ray.serve_file import ServeFile, local

__all__ = ["Head", "cause", "deploy", "registered"]

_PAUSE = 1.0
_HEARTBEAT = 8.0
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


class Head(Protocol):
    """What deploying needs of a client; `jobs.Client` is one."""

    def serving(self) -> dict[str, Any]: ...
    def serve(self, document: dict[str, Any]) -> None: ...


def registered(args: ServeArgs, say: Callable[[str], None]) -> int | None:
    """The version that the registry, as this process sees it, has for the model of a file; None, said, without one."""
    from ft_ray.registry import Registry

    if args.model is None:
        return None
    say(f"asking the registry for {args.model}")
    try:
        with environment({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}):
            return Registry(args.storage, args.uri).resolve(args.model).version
    except FtRayError as error:  # the cluster may have another view of it
        say(f"no version from here, so another champion is taken up only where the file changed: {error}")
        return None


def deploy(
    head: Head, file: ServeFile, *, timeout: float, say: Callable[[str], None], version: int | None = None
) -> dict[str, Any]:
    """Returns Serve's own account of the application and of its address once it runs.

    In ingress mode Serve ends another version that the name served before while this one starts, in direct mode it
    replaces replica after replica; nothing is touched when file and `version`, the one that the model's name stands for
    now, are those that run. Raises InputError where the cluster serves something else too, which the
    file would take away, or its address, and for no API keys where its Serve, which keeps the address that it has,
    listens for other machines; ServingError when the application is not up within `timeout` seconds.
    """
    now = head.serving()
    running = now.get("applications", {})
    listens = (now.get("http_options") or {}).get("host")
    if file.args.keys is None and listens and not local(listens):
        raise InputError(
            f"the cluster's Serve listens on {listens} already, which other machines reach, whatever the file says, "
            "and the file asks for no API key: set keys: in its args, or end what runs first (serve shutdown)."
        )
    # A promotion hands its application back to Serve as one without a file, which keeps running without its address.
    others = sorted(
        name for name, other in running.items()
        if name != file.name and (other.get("source") == "declarative" or other.get("route_prefix") == file.route)
    )  # fmt: skip
    if others:
        raise InputError(
            f"the cluster serves {', '.join(others)}, which this file would end or leave without its address: end it "
            "first (serve shutdown), or write both into one file, at addresses of their own, and give that to serve "
            "deploy."
        )
    if _ends_first(file, running.get(file.name) or {}, version):
        model = (file.args.model or "").partition("@")[0]
        say(
            f"{file.name} serves another version, which Serve ends before version {version} is up, and nothing answers "
            f"meanwhile: without a change of the file, ft-ray promote {model} {version} where the cluster is seen "
            "(ft-ray submit) loses no request"
        )
    say(f"deploying {file.name}")
    head.serve(_document(file, version))
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


def _ends_first(file: ServeFile, app: dict[str, Any], version: int | None) -> bool:
    """Whether another version runs under a name of its own, as in ingress mode each does."""
    serving = [name for name in app.get("deployments") or {} if name.startswith("Server:")]
    if file.args.mode != "ingress" or version is None:
        return False
    return bool(serving) and not any(name.endswith(f"-v{version}") for name in serving)


def _document(file: ServeFile, version: int | None) -> dict[str, Any]:
    """With the version where Ray looks for a change; the name stays, so that Serve, restarted, finds a later one."""
    document = copy.deepcopy(file.document)
    if version is not None:
        (application,) = document["applications"]
        environment = dict(application.get("runtime_env") or {})
        variables = {**(environment.get("env_vars") or {}), "FT_RAY_DEPLOYED_VERSION": str(version)}
        application["runtime_env"] = {**environment, "env_vars": variables}
    return document


def cause(messages: Iterable[str]) -> str:
    """The last line that names an error, else the last line: Ray's messages end with the cause."""
    lines = [line.strip() for text in messages for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["no reason was given"])[-1]
