"""A live endpoint: its port, its start with nothing silent, its smoke question, and its end without leftovers."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import psutil
import ray
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions

from ft_ray import endpoint_record, engine_progress, ray_session
from ft_ray.errors import InputError, ServingError
from ft_ray.serve_deploy import cause

__all__ = ["Endpoint", "start"]

log = logging.getLogger("ft_ray")

_HEARTBEAT_SECONDS = 5.0
_PATIENCE_SECONDS = 1800.0
_PROXY_SECONDS = 30.0
_ENGINE_NAMES = ("VLLM", "vllm")

Listener = Callable[[dict[str, Any]], None]


class _Model(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int | None: ...


class Endpoint:
    """An OpenAI-compatible endpoint at `url` that answers to `model`. Ends with `close()` or its `with` block."""

    def __init__(self, url: str, model: str, version: int | None, stack: contextlib.ExitStack) -> None:
        self.url, self.model, self.version = url, model, version
        self.api_key: str | None = None
        """None: no key is asked for. Keys are never stored readable, so an endpoint cannot know them."""
        self.seconds: dict[str, float] = {}
        """How long the parts of the start took."""
        self._stack = stack

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def curl(self) -> str:
        """A shell line that asks it."""
        messages = [{"role": "user", "content": "Hello"}]
        body = json.dumps({"model": self.model, "messages": messages, "max_tokens": 64})
        return f"curl {self.url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"

    def healthy(self) -> bool:
        """Whether the application runs and its ingress answers."""
        status = ray_serve.status().applications.get(self.model)
        if status is None or status.status not in ("RUNNING", "DEPLOYING"):  # a new version may be on its way
            return False
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
            return bool(reply.status == 200)
        return False

    def wait(self) -> None:
        """Blocks until Ctrl-C. Raises ServingError when the application fails for good."""
        unhealthy_since: float | None = None
        try:
            while True:
                time.sleep(5)
                status = ray_serve.status().applications.get(self.model)
                if status is None:
                    return  # someone deleted it
                if status.status in ("UNHEALTHY", "DEPLOY_FAILED"):
                    unhealthy_since = unhealthy_since or time.monotonic()
                    if time.monotonic() - unhealthy_since > 120:
                        raise ServingError(f"{self.model} is unhealthy and did not recover: {_reason(status)}")
                else:
                    unhealthy_since = None
        except KeyboardInterrupt:
            log.info("stopping %s", self.model)

    def close(self) -> None:
        """Stops the application and everything that was started for it. Safe to call twice."""
        self._stack.close()


def start(
    *,
    prepare: Callable[[], Any],
    load: Callable[[], None],
    application: Callable[[Any], Any],
    host: str,
    port: int,
    keyed: bool,
    door: Mapping[str, float],
    on_event: Listener,
) -> Endpoint:
    """Checks the port, prepares the model, connects Ray, deploys, waits, asks. See `ft_ray.serving.serve`.

    `load` imports what `application` needs, in a thread; its failure is `application`'s to raise. `door`: more of
    Serve's HTTP options, where it does not run yet.
    """
    port = _free_port(host, port)
    seconds: dict[str, float] = {}
    with contextlib.ExitStack() as stack, _Heartbeat(on_event) as beat:
        with _timed(seconds, "check", beat, "checking the model to serve"):
            model = prepare()
        libraries = threading.Thread(target=load, name="ft-ray-serve-import", daemon=True)
        libraries.start()  # five seconds of imports, while Ray's processes come up
        stack.callback(libraries.join)  # an interpreter that ends during an import may crash
        with _timed(seconds, "ray", beat, "connecting Ray"):
            stack.enter_context(ray_session.session())
        with _timed(seconds, "serve", beat, f"starting Ray Serve on {host}:{port}"):
            port, ours = _start_serve(stack, host, port, door)
        with _timed(seconds, "build", beat, "loading the serving libraries"):
            libraries.join()
            _deploy(stack, application(model), model.name, ours)
        with _timed(seconds, "engine", beat, f"starting vLLM for {model.name}", lambda: _engine(model.name)):
            _until_running(model.name)
        endpoint = Endpoint(f"http://{_shown(host)}:{port}", model.name, model.version, contextlib.ExitStack())
        with _timed(seconds, "smoke", beat, "asking it a first question"):
            _ask(endpoint, keyed)
        endpoint_record.note(model.name, endpoint.url, ray.get_runtime_context().gcs_address)
        stack.callback(endpoint_record.forget, model.name)
        endpoint.seconds = {k: round(v, 1) for k, v in seconds.items()}
        endpoint._stack = stack.pop_all()
    log.debug("endpoint up: %s", endpoint.seconds)
    return endpoint


class _Heartbeat:
    """Says what is going on at least every five seconds; `more` tells what is known of it by then."""

    def __init__(self, on_event: Listener) -> None:
        self._on_event, self._done = on_event, threading.Event()
        self._doing, self._since, self._said = "", time.monotonic(), 0.0
        self._more: Callable[[], str] = str
        self._thread = threading.Thread(target=self._run, name="ft-ray-serve-heartbeat", daemon=True)

    def __enter__(self) -> _Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join(timeout=2)

    def say(self, doing: str, more: Callable[[], str] = str) -> None:
        self._doing, self._since, self._said, self._more = doing, time.monotonic(), time.monotonic(), more
        self._on_event({"kind": "status", "message": doing})

    def _run(self) -> None:
        while not self._done.wait(0.5):
            now = time.monotonic()
            if self._doing and now - self._said > _HEARTBEAT_SECONDS:
                self._said = now
                message = f"{self._doing}, {now - self._since:.0f} s{self._more()}"
                self._on_event({"kind": "status", "message": message})


@contextlib.contextmanager
def _timed(
    seconds: dict[str, float], part: str, beat: _Heartbeat, doing: str, more: Callable[[], str] = str
) -> Iterator[None]:
    beat.say(doing, more)
    started = time.monotonic()
    yield
    seconds[part] = time.monotonic() - started


def _free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises InputError when it is taken or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"port {port} on {host} cannot be used ({error.strerror}): stop what listens there, "
                "or choose another with --port (0 takes a free one)."
            ) from error
        return int(probe.getsockname()[1])


def _shown(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)


def _start_serve(
    stack: contextlib.ExitStack, host: str, port: int, door: Mapping[str, float]
) -> tuple[int, bool]:
    """Starts Serve in the connected Ray, to be shut down by `stack`. Returns the proxy's port, and whether it is ours.

    A cluster that runs Serve already keeps its HTTP options; then its port is used and Serve stays up.
    """
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        options = client.http_config
        if options.host != host:
            raise InputError(
                f"Ray Serve runs in this cluster already and listens on {options.host}:{options.port}, not {host}: "
                "use that address, or ft-ray deploy."
            )
        log.info("Ray Serve runs already: using its port %d", options.port)
        return int(options.port), False
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")  # replicas log to files
    stack.callback(_stop, ray_serve.shutdown)
    ray_serve.start(
        proxy_location="HeadOnly",
        http_options=HTTPOptions.model_validate({"host": host, "port": port, **door}),
        logging_config={"enable_access_log": False},
    )
    return port, True


def _deploy(stack: contextlib.ExitStack, app: Any, name: str, ours: bool) -> None:
    from ray.serve.api import RunTarget, _run_many

    if name in ray_serve.status().applications:
        raise InputError(f"{name} is served in this cluster already: see serve status, or ft-ray promote it there.")

    if not ours:
        stack.callback(_stop, lambda: ray_serve.delete(name))
    try:
        _run_many(
            [RunTarget(target=app, name=name, route_prefix="/", logging_config={"enable_access_log": False})],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
    except ray.exceptions.RayError as error:
        raise ServingError(f"{name} could not be deployed ({str(error).splitlines()[-1]}).") from error


def _engine(name: str) -> str:
    node = ray._private.worker._global_node
    return engine_progress.doing(name, Path(node.get_logs_dir_path()) if node is not None else None)


def _until_running(name: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        status = ray_serve.status().applications.get(name)
        if status is not None:
            if status.status == "RUNNING":
                return
            if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise ServingError(f"{name} did not start: {_reason(status)}")
        time.sleep(0.5)
    raise ServingError(f"{name} was not up after {_PATIENCE_SECONDS / 60:.0f} minutes: see serve status.")


def _reason(status: Any) -> str:
    return cause([str(d.message) for d in status.deployments.values() if d.message] + [str(status.message)])


def _ask(endpoint: Endpoint, keyed: bool) -> None:
    """One question over HTTP. With API keys, whose text is not known here, that it asks for one.

    A proxy may hear of a replica a moment after Serve says that it runs; until then it answers itself, in plain text.
    """
    body = {"model": endpoint.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    request = urllib.request.Request(
        f"{endpoint.url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    deadline = time.monotonic() + _PROXY_SECONDS
    while True:
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:
                answer = json.load(reply)
            if not answer["choices"] or answer["usage"]["completion_tokens"] < 1:
                raise ServingError(f"{endpoint.model} answered the first question with nothing.")
            return
        except urllib.error.HTTPError as error:
            if keyed and error.code == 401:
                return
            text = error.read(2000).decode("utf-8", "replace")
            if text.startswith("{") or time.monotonic() > deadline:
                said = f"{endpoint.model} answered its first question with {error.code}: {text}"
                raise ServingError(said) from error
        except (OSError, ValueError, KeyError) as error:
            raise ServingError(f"{endpoint.model} came up but did not answer the first question: {error}.") from error
        time.sleep(0.5)


def _stop(how: Callable[[], None]) -> None:
    """Ends Serve or one application, and the engine processes that it leaves behind."""
    started, engines = time.monotonic(), _engines()
    with contextlib.suppress(Exception):  # Serve may have gone with its cluster
        how()
    log.debug("Serve stopped in %.1f s", time.monotonic() - started)
    _end(engines)


def _engines() -> list[psutil.Process]:
    """vLLM's processes below this one (a private local Ray is)."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name().startswith(_ENGINE_NAMES) or "VLLM::" in " ".join(process.cmdline()[:1]):
                found.append(process)
    return found


def _end(processes: list[psutil.Process]) -> None:
    """Waits for processes that should be ending, and ends those that do not."""
    _, alive = psutil.wait_procs(processes, timeout=5)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(alive, timeout=3)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=3)
