"""A new version of a model on a live endpoint without a lost request: beside the old one, gated, then alone.

1. The new version comes up as a deployment of its own in the same application; the old one answers meanwhile.
2. It is asked directly, past the ingress: a smoke question, and prompts whose answers the offline evaluation kept.
3. The ingress is told to send new requests to it: one step, confirmed by every replica of the ingress. Requests in
   flight end where they began.
4. The registry's champion becomes the new one: `on_switched`. From here on the promotion stands.
5. When the old one has no request left, it goes. What goes wrong meanwhile is a warning.

Anything that fails before step 5 sends requests to the old one again and takes the new one away, so that endpoint and
registry name the same version; the old one never stopped answering.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import ray
from ray import serve as ray_serve
from ray.serve._private.build_app import build_app

from ft_ray.errors import FtRayError, GateRefused, InputError, Interrupted, ServingError
from ft_ray.rollout_state import Live, deployment_name, routing_to, with_routing
from ft_ray.serve_args import parse
from ft_ray.serve_room import missing_room
from ft_ray.served_model import Served, find, split

__all__ = ["Shift", "WithoutRoom", "agreement", "shift"]

log = logging.getLogger("ft_ray")

WithoutRoom = Literal["refuse", "wait", "stop first"]
_PATIENCE_SECONDS = 1800.0
_PARITY_PROMPTS = 8
_PARITY_TOKENS = 64
_ALIKE = 0.8  # two greedy answers of one model on two engines differ by bf16 noise late in a long text
_MOST_UNLIKE = 0.25
_SHORTEST_CUT = 16  # characters; below that an answer that is part of the other is another answer

Listener = Callable[[dict[str, Any]], None]


@dataclass
class Shift:
    """What a rollout did: `seconds` of its parts, and how many of `asked` answers agreed with the offline ones.

    `left`: sentences about what was still there of the old version when the rollout ended.
    """

    version: int | None
    previous: int | None
    asked: int = 0
    agreed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def shift(
    live: Live,
    ref: str,
    *,
    storage: str,
    uri: str | None,
    without_room: WithoutRoom = "refuse",
    parity: bool = True,
    on_switched: Callable[[], None] = lambda: None,
    on_event: Listener = lambda event: None,
) -> Shift:
    """Puts `ref` (NAME@VERSION) in place of what the endpoint serves; its other settings stay as they are.

    `without_room` for two versions: 'refuse'; 'wait' until an autoscaler has brought a node for the new one, half an
    hour at most; 'stop first', which stops the old version before the new one starts, room or not: requests wait in the
    ingress until the new one has passed its gate, up to their timeout.
    `parity` False: answers unlike the evaluation's are a warning, for the way back to what served before.
    `on_switched` makes the new version the champion. It is called once: after every ingress replica sends new requests
    to the new version and before the old one is drained; at once where the endpoint serves that version already. What
    it raises ends the rollout, and the old version gets the requests again: what the registry did not take, the
    endpoint does not serve.

    Raises GateRefused when the new one answers unlike its evaluation, InputError when there is no room for two,
    ServingError when it does not come up. The old version serves on in every one of these cases. Once `on_switched`
    returned nothing is undone: what fails in draining is a warning and a sentence in `left`, and Ctrl-C raises
    Interrupted, which says that the new version serves.
    """
    routing = live.routing
    if routing is None:
        raise InputError(
            f"{live.name} runs in direct mode, where two versions cannot share the address: use "
            "mode: ingress, or ft-ray promote it offline and ft-ray deploy again, which replaces replica after replica."
        )
    args = parse({**routing["args"], "model": ref, "folder": None, "storage": storage, "uri": uri})
    run = _Run(live, find(args), routing, parity, on_switched, on_event)
    if run.model.version == routing["version"] and not routing.get("held"):
        on_switched()
        run.clear()
        return Shift(run.model.version, routing["version"])
    run.clear()
    return run.stop_first() if without_room == "stop first" else run.side_by_side(without_room == "wait")


class _Run:
    def __init__(
        self, live: Live, model: Served, routing: dict[str, Any], parity: bool, on_switched: Callable[[], None],
        on_event: Listener,
    ) -> None:  # fmt: skip
        from ft_ray import serving

        self.live, self.model, self.routing, self.parity = live, model, routing, parity
        self.on_switched, self.on_event = on_switched, on_event
        self.old = str(routing["active"])
        self.draining = model.args.limits.draining
        self.result = Shift(model.version, routing["version"])
        self.new = live.free_name(deployment_name(model.name, model.version))
        # Only the replicas are taken from what is built here: the file of keys may be on the cluster alone.
        unkeyed = replace(model, args=model.args.model_copy(update={"keys": None}))
        built = build_app(serving.application(unkeyed, self.new), name=live.name)
        self.deployment = next(d for d in built.deployments if d.name == self.new)
        self.routing_after = routing_to(self.new, model.version, model.args)
        self._as_the_old_one()

    def _as_the_old_one(self) -> None:
        """The new deployment takes over the old one's runtime_env (working_dir and the like), size and logging."""
        old = self.live.deployments[self.old]
        options = dict(self.deployment.ray_actor_options or {})
        theirs = dict((old.replica_config.ray_actor_options or {}).get("runtime_env") or {})
        ours = dict(options.get("runtime_env") or {})
        variables = {**theirs.get("env_vars", {}), **ours.get("env_vars", {})}
        options["runtime_env"] = {**theirs, **ours, "env_vars": variables}
        running = max(1, self.live.status(self.old)[2])
        scaling: Any = self.deployment._deployment_config.autoscaling_config
        self.copies = min(running, scaling.max_replicas)
        scaling = scaling.model_copy(update={"initial_replicas": max(self.copies, scaling.min_replicas)})
        self.deployment = self.deployment.options(ray_actor_options=options, autoscaling_config=scaling)
        if old.deployment_config.logging_config is not None:  # the old one's, which keeps no access log
            self.deployment = self.deployment.options(logging_config=old.deployment_config.logging_config)

    def clear(self) -> None:
        """Takes away what an interrupted rollout left: deployments that no request goes to."""
        strays = [name for name in self.live.deployments if name not in (self.live.ingress, self.old)]
        if strays:
            log.warning("%s was left by a promotion that did not end, and is removed", ", ".join(strays))
            self.live.apply({k: v for k, v in self.live.deployments.items() if k not in strays})
            self.live.wait(lambda: all(self.live.status(s)[0] == "GONE" for s in strays), 180, "clearing up")

    def side_by_side(self, wait: bool = False) -> Shift:
        missing = missing_room(self.deployment, self.copies, self.model)
        if missing and wait:
            log.warning("version %s waits for room: %s", self.model.version, missing)
        elif missing:
            raise InputError(
                f"there is no room for version {self.model.version} of {self.live.name} beside version "
                f"{self.routing['version']} ({missing}): add a node, use --wait-for-room where an autoscaler brings "
                "one, or --stop-first, with which requests wait until the new version is up."
            )
        parts = dict(self.live.deployments)
        try:
            with self._timed("start", f"starting version {self.model.version} beside {self.routing['version']}"):
                self.live.apply({**parts, self.new: self.deployment})
                self._until_healthy(self.new)
            with self._timed("gate", f"asking version {self.model.version} what its evaluation was asked"):
                self._gate()
            with self._timed("switch", f"sending new requests to version {self.model.version}"):
                self._switch()
            self.on_switched()
        except BaseException:
            kept = {k: v for k, v in self.live.deployments.items() if k != self.new}
            kept[self.live.ingress] = with_routing(kept[self.live.ingress], self.routing)
            self.live.apply(kept)
            raise
        try:
            with self._timed("drain", f"waiting for the last requests of version {self.routing['version']}"):
                self._drain()
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"interrupted while version {self.routing['version']} of {self.live.name} was ending: version "
                f"{self.model.version} is the champion and gets all requests, and {self.old} may still be there for "
                "the last ones it has; promote the same version again to have it taken away."
            ) from error
        return self.result

    def stop_first(self) -> Shift:
        parts = dict(self.live.deployments)
        kept = {k: v for k, v in parts.items() if k != self.old}
        held = {**self.routing, "held": True}
        with self._timed("start", f"stopping version {self.routing['version']}, then starting {self.model.version}"):
            try:
                self._route(held, "", "holding requests")
                # Should this process be killed, the next promotion finds a deployment that is there, and no version.
                held |= {"active": self.new, "version": None}
                kept[self.live.ingress] = with_routing(parts[self.live.ingress], held)
                self.live.apply({**kept, self.new: self.deployment})
                self._until_healthy(self.new)
                self._gate()
                self._switch()
                self.on_switched()
            except BaseException:
                log.warning("version %s is put back", self.routing["version"])
                self.live.apply(parts)
                raise
        return self.result

    def _switch(self) -> None:
        """The ingress routes to the new one; requests in flight end on the old one."""
        self._route(self.routing_after, self.new, "the switch")

    def _route(self, routing: dict[str, Any], to: str, what: str) -> None:
        """Gives the ingress `routing` and waits until each of its replicas says that requests go `to`, '' for none."""
        parts = dict(self.live.deployments)
        parts[self.live.ingress] = with_routing(parts[self.live.ingress], routing)
        self.live.apply(parts)

        def followed() -> bool:
            status, _, running = self.live.status(self.live.ingress)
            return status == "HEALTHY" and self.live.ask_ingress("active") == [to] * running

        self.live.wait(followed, 120, what)

    def _drain(self) -> None:
        """Waits for the old one's last requests and takes it away, as far as that goes: nothing asks it any more."""

        def idle() -> bool:
            return not any(self.live.ask_ingress("in_flight", self.old))

        previous = self.routing["version"]
        try:
            with self._noting(f"version {previous} was not seen to end its last requests and is stopped"):
                self.live.wait(idle, self.draining, "draining")
        finally:  # after Ctrl-C too: Serve gives a replica that stops the time that its requests may take
            with self._noting(f"{self.old} is not taken away; the next promotion removes it"):
                self.live.apply({k: v for k, v in self.live.deployments.items() if k != self.old})
        with self._noting(f"{self.old} was still ending"):
            gone, longest = (lambda: self.live.status(self.old)[0] == "GONE"), self.draining + 180
            self.live.wait(gone, longest, f"the end of {self.old}")

    @contextlib.contextmanager
    def _noting(self, left: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            why = str(error) if isinstance(error, FtRayError) else type(error).__name__
            self.result.left.append(f"{left} ({why.rstrip('.')})")
            log.warning("version %s serves, but %s", self.model.version, self.result.left[-1])

    def _until_healthy(self, name: str) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        said, seen = time.monotonic(), False
        while time.monotonic() < deadline:
            status, message, running = self.live.status(name)
            seen = seen or status != "GONE"
            if seen and status == "GONE":
                raise ServingError(f"version {self.model.version} of {self.live.name} was taken away meanwhile.")
            if status == "HEALTHY" and running >= 1:
                return
            if status in ("DEPLOY_FAILED", "UNHEALTHY"):
                lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no reason was given"]
                reason = next((line for line in reversed(lines) if "Error" in line), lines[-1])
                raise ServingError(f"version {self.model.version} of {self.live.name} does not start: {reason}")
            if time.monotonic() - said > 5:
                said = time.monotonic()
                self.on_event({"kind": "status", "message": f"version {self.model.version}: {status.lower()}"})
            time.sleep(0.3)
        raise ServingError(f"version {self.model.version} of {self.live.name} was not up after 30 minutes.")

    def _gate(self) -> None:
        kept = list(_predictions(self.model))
        questions = [list(p["prompt"]) for p in kept] or [[{"role": "user", "content": "Hello"}]]
        handle = ray_serve.get_deployment_handle(self.new, self.live.name).options(stream=True)
        answers = [_answer(handle, self.model, messages) for messages in questions]
        if not kept:
            log.info("no offline predictions lie beside version %s: smoke question only", self.model.version)
            if answers[0].tokens < 1:
                raise GateRefused(
                    f"version {self.model.version} of {self.live.name} answers the smoke question with nothing: it is "
                    "not promoted; look at its weights and its chat template."
                )
            return
        alike = agreement([str(p["prediction"]) for p in kept], [a.text for a in answers])
        self.result.asked, self.result.agreed = len(kept), sum(alike)
        if len(kept) - sum(alike) > _MOST_UNLIKE * len(kept):
            found = (
                f"version {self.model.version} of {self.live.name} answers {len(kept) - sum(alike)} of {len(kept)} "
                "prompts otherwise than when it was evaluated"
            )
            if self.parity:
                raise GateRefused(f"{found}: it is not promoted; look at its chat template and serving settings.")
            log.warning("%s", found)

    def _timed(self, part: str, doing: str) -> Any:
        return _timed(self.result.seconds, part, doing, self.on_event)


class _timed:  # noqa: N801 - a context manager, used like a function
    def __init__(self, seconds: dict[str, float], part: str, doing: str, on_event: Listener) -> None:
        self._seconds, self._part, self._doing, self._on_event = seconds, part, doing, on_event

    def __enter__(self) -> None:
        self._on_event({"kind": "status", "message": self._doing})
        self._started = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._seconds[self._part] = round(time.monotonic() - self._started, 1)


def agreement(expected: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Per answer, whether it says what was recorded; where one of the two was cut, as far as both go."""
    found = []
    for wanted, got in zip(expected, answers, strict=True):
        one, two = " ".join(wanted.split()), " ".join(got.split())
        shorter = min(len(one), len(two))
        length = shorter if shorter >= _SHORTEST_CUT else None
        found.append(difflib.SequenceMatcher(None, one[:length], two[:length], autojunk=False).ratio() >= _ALIKE)
    return found


def _predictions(model: Served) -> Iterator[Mapping[str, Any]]:
    """Rows of predictions.jsonl beside the model, spread over the file."""
    store, _ = split(model.source)
    if not store.exists("predictions.jsonl"):
        return
    lines = [line for line in store.read("predictions.jsonl").splitlines() if line.strip()]
    step = max(1, len(lines) // _PARITY_PROMPTS)
    for line in lines[::step][:_PARITY_PROMPTS]:
        yield json.loads(line)


class _Answer(NamedTuple):
    text: str
    tokens: int


def _answer(handle: Any, model: Served, messages: list[dict[str, str]]) -> _Answer:
    """One greedy answer of the new deployment, past the ingress. Raises ServingError, after limits.timeout at most."""
    from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionRequest

    most = min(_PARITY_TOKENS, model.args.limits.max_tokens)
    request = ChatCompletionRequest(model=model.name, messages=messages, max_tokens=most, temperature=0.0)
    whose, longest = f"version {model.version} of {model.name}", model.args.limits.timeout
    try:
        reply = _first(handle.chat.remote(request, None), longest)
    except TimeoutError as error:  # before RayError, of which some are one
        raise ServingError(
            f"{whose} did not answer within {longest:g} seconds (limits.timeout): it is not promoted; see its log."
        ) from error
    except ray.exceptions.RayError as error:
        raise ServingError(f"{whose} fails to answer ({type(error).__name__}).") from error
    if reply is None:
        raise ServingError(f"{whose} answers nothing.")
    if not hasattr(reply, "choices"):
        text = getattr(getattr(reply, "error", None), "message", type(reply).__name__)
        raise ServingError(f"{whose} answers with an error: {text}")
    return _Answer(str(reply.choices[0].message.content or ""), int(reply.usage.completion_tokens or 0))


def _first(replies: Any, seconds: float) -> Any:
    """The first of a deployment's streamed replies, None where there is none. Raises TimeoutError and what it raises.

    In a thread that may be left behind: Serve's iterator takes no time limit, and waits for an engine that hangs.
    """
    found: Future[Any] = Future()

    def read() -> None:
        try:
            found.set_result(next(iter(replies), None))
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=read, name="ft-ray-gate", daemon=True).start()
    try:
        return found.result(timeout=seconds)
    except TimeoutError:
        with contextlib.suppress(Exception):
            replies.cancel()
        raise
