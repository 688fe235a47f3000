"""What goes wrong in the middle of a promotion: endpoint and registry name the same version whatever happens.

The controller and its replicas are stood in for, so that each failure comes at its moment; with real ones, and a
client that asks without pause, tests/e2e/test_rollout.py does the same changes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentID

from ft_ray import promotion, rollout, rollout_state
from ft_ray.errors import GateRefused, InputError, Interrupted, ServingError, StorageError
from ft_ray.registry import ModelVersion, Registry
from ft_ray.rollout import Shift, _Run
from ft_ray.rollout_state import Live
from ft_ray.serve_args import Limits
from ft_ray.storage import Store

OLD, NEW = "Server:tiny-v1", "Server:tiny-v2"


class Controller(Live):
    """Does at once what it is told; `fails` names what raises: a method, or what is waited for."""

    def __init__(self) -> None:
        routing = {"active": OLD, "version": 1, "args": {}}
        super().__init__("tiny", {"ingress": self.ingress_of(routing), OLD: object()}, "ingress")
        self.fails: dict[str, BaseException] = {}
        self.busy = [0]
        self.applied: list[tuple[tuple[str, set[str]], bool]] = []

    @staticmethod
    def ingress_of(routing: dict[str, Any]) -> Any:
        class Config(SimpleNamespace):
            def model_copy(self, update: dict[str, Any]) -> Any:
                return Config(**update)

        return SimpleNamespace(deployment_config=Config(user_config=routing))

    def apply(self, deployments: Any) -> None:
        if error := self.fails.get("apply"):
            raise error
        self.deployments = dict(deployments)
        self.applied.append((serves(self), bool((self.routing or {}).get("held"))))

    def status(self, deployment: str) -> tuple[str, str, int]:
        return ("HEALTHY", "", 1) if deployment in self.deployments else ("GONE", "", 0)

    def ask_ingress(self, method: str, *arguments: Any) -> list[Any]:
        routing = self.routing
        assert routing is not None
        return [""] if routing.get("held") else [routing["active"]] if method == "active" else self.busy

    def wait(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        for part, error in self.fails.items():
            if part in what:
                raise error
        assert done()


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    monkeypatch.setattr(rollout, "missing_room", lambda *_: "")
    monkeypatch.setattr(_Run, "_gate", lambda self: None)
    return Controller()


def run(controller: Controller, on_switched: Callable[[], None]) -> _Run:
    made = object.__new__(_Run)  # its application is not built: that needs vLLM and a cluster
    made.live, made.routing, made.old, made.new = controller, dict(controller.routing or {}), OLD, NEW
    made.model, made.draining, made.result = SimpleNamespace(version=2, name="tiny"), 5.0, Shift(2, 1)  # type: ignore[assignment]
    made.routing_after, made.deployment, made.copies = {"active": NEW, "version": 2, "args": {}}, object(), 1  # type: ignore[assignment]
    made.parity, made.on_switched, made.on_event = True, on_switched, lambda event: None
    return made


def serves(controller: Controller) -> tuple[str, set[str]]:
    return str((controller.routing or {})["active"]), set(controller.deployments) - {"ingress"}


def test_the_champion_is_set_after_the_switch_and_before_the_drain(controller: Controller) -> None:
    seen: list[tuple[str, set[str]]] = []
    done = run(controller, lambda: seen.append(serves(controller))).side_by_side()
    assert seen == [(NEW, {OLD, NEW})]
    assert serves(controller) == (NEW, {NEW}) and done.left == []


@pytest.mark.parametrize("error", [StorageError("the registry is away."), KeyboardInterrupt()])
@pytest.mark.parametrize("way", ["side_by_side", "stop_first"])
def test_what_the_registry_did_not_take_is_not_served(controller: Controller, way: str, error: BaseException) -> None:
    def fails() -> None:
        assert serves(controller)[0] == NEW
        raise error

    with pytest.raises(type(error)):
        getattr(run(controller, fails), way)()
    assert serves(controller) == (OLD, {OLD})


def test_the_champion_is_set_only_for_a_version_that_came_up(controller: Controller) -> None:
    called: list[int] = []
    for way in ("side_by_side", "stop_first"):
        made = run(controller, lambda: called.append(1))
        made._until_healthy = lambda name: (_ for _ in ()).throw(ServingError("it does not start."))  # type: ignore[assignment,method-assign]
        with pytest.raises(ServingError):
            getattr(made, way)()
        assert serves(controller) == (OLD, {OLD})
    assert called == []


def test_without_room_a_promotion_waits_only_when_asked(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "missing_room", lambda *_: "it needs 1 GPU more on one node than is free")
    with pytest.raises(InputError, match=r"1 GPU more.*--wait-for-room"):
        run(controller, lambda: None).side_by_side()
    assert serves(controller) == (OLD, {OLD})
    run(controller, lambda: None).side_by_side(wait=True)
    assert serves(controller) == (NEW, {NEW})


@pytest.mark.parametrize("refused", [False, True])
def test_stop_first_lets_no_request_in_before_the_gate(
    controller: Controller, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that the gate refuses must not have answered anybody by then."""
    at_the_gate: list[Any] = []

    def gate(self: _Run) -> None:
        at_the_gate.append((serves(controller), controller.ask_ingress("active")))
        if refused:
            raise GateRefused("otherwise than when it was evaluated")

    monkeypatch.setattr(_Run, "_gate", gate)
    made = run(controller, lambda: None)
    with pytest.raises(GateRefused) if refused else contextlib.nullcontext():
        made.stop_first()
    assert at_the_gate == [((NEW, {NEW}), [""])]
    end = ((OLD, {OLD}), False) if refused else ((NEW, {NEW}), False)
    assert controller.applied == [((OLD, {OLD}), True), ((NEW, {NEW}), True), end]
    assert (controller.routing or {})["version"] == (1 if refused else 2)


@pytest.mark.parametrize("killed_after", [1, 2])
def test_a_promotion_that_was_killed_while_requests_were_held_is_made_up_by_the_next(
    controller: Controller, killed_after: int
) -> None:
    before = dict(controller.deployments)
    run(controller, lambda: None).stop_first()
    assert controller.applied[killed_after - 1][1], "held"
    held = {"active": OLD if killed_after == 1 else NEW, "version": 1 if killed_after == 1 else None, "args": {}}
    controller.deployments = {"ingress": controller.ingress_of({**held, "held": True}), held["active"]: before[OLD]}
    made = run(controller, lambda: None)
    made.old, made.new = held["active"], "Server:tiny-v2-2"
    made.routing_after = {"active": made.new, "version": 2, "args": {}}
    made.side_by_side()
    assert serves(controller) == ("Server:tiny-v2-2", {"Server:tiny-v2-2"}) and "held" not in (controller.routing or {})


@pytest.mark.parametrize("error", [ServingError("draining took more than 15 seconds."), ActorDiedError(), OSError("x")])
def test_a_drain_that_fails_is_a_warning_and_the_promotion_stands(
    controller: Controller, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    controller.fails = {"draining": error}
    done = run(controller, lambda: None).side_by_side()
    assert serves(controller) == (NEW, {NEW}), "the old one is taken away all the same"
    (left,) = done.left
    assert "version 1 was not seen to end its last requests" in left and left in caplog.text
    assert "(draining took more than 15 seconds)" in left or f"({type(error).__name__})" in left


def test_what_is_still_there_after_the_drain_is_named(controller: Controller) -> None:
    controller.fails = {"the end of": ServingError("the end of it took more than 180 seconds.")}
    assert f"{OLD} was still ending" in run(controller, lambda: None).side_by_side().left[0]
    other = Controller()
    made = run(other, lambda: other.fails.update(apply=ConnectionError("gone")))
    other.wait = lambda done, seconds, what: None  # type: ignore[method-assign]
    assert f"{OLD} is not taken away; the next promotion removes it (ConnectionError)" in made.side_by_side().left[0]
    assert serves(other) == (NEW, {OLD, NEW})


@pytest.mark.parametrize("when", ["draining", "the end of"])
def test_ctrl_c_in_the_drain_says_that_the_promotion_stands(controller: Controller, when: str) -> None:
    called: list[int] = []
    controller.fails = {when: KeyboardInterrupt()}
    with pytest.raises(Interrupted, match=f"version 2 is the champion and gets all requests, and {OLD} may still"):
        run(controller, lambda: called.append(1)).side_by_side()
    assert called == [1] and serves(controller) == (NEW, {NEW})


def test_an_ingress_replica_that_dies_while_it_is_asked_is_asked_again() -> None:
    answers: list[Any] = [ActorDiedError(), TimeoutError("slow"), [NEW, NEW]]

    def results(timeout_s: float) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    live = Live("tiny", {}, "ingress", _handle=SimpleNamespace(broadcast=lambda *_: SimpleNamespace(results=results)))
    assert live.ask_ingress("active") == [NEW, NEW] and answers == []


def test_an_ingress_that_never_answers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def results(timeout_s: float) -> Any:
        raise ActorDiedError

    clock = iter([0.0, 61.0])
    monkeypatch.setattr("ft_ray.rollout_state.time.monotonic", lambda: next(clock))
    live = Live("tiny", {}, "ingress", _handle=SimpleNamespace(broadcast=lambda *_: SimpleNamespace(results=results)))
    with pytest.raises(ServingError, match=r"tiny: its ingress does not answer \(ActorDiedError\): see serve status"):
        live.ask_ingress("active")


# The gate


class Replica:
    """A deployment's handle: `chat` answers what it is given, or waits until it is cancelled."""

    def __init__(self, *replies: Any) -> None:
        self.chat, self.replies, self.over = self, replies, threading.Event()

    def options(self, **_: Any) -> Replica:
        return self

    def remote(self, request: Any, raw: Any) -> Replica:
        return self

    def __iter__(self) -> Iterator[Any]:
        if not self.replies:
            self.over.wait(60)
        yield from self.replies

    def cancel(self) -> None:
        self.over.set()


def said(text: str | None, tokens: int) -> Any:
    usage, message = SimpleNamespace(completion_tokens=tokens), SimpleNamespace(content=text)
    return SimpleNamespace(choices=[SimpleNamespace(message=message)], usage=usage)


def gated(
    controller: Controller, replica: Replica, patch: pytest.MonkeyPatch, folder: Path, timeout: float = 60
) -> None:
    patch.undo()
    patch.setattr(rollout.ray_serve, "get_deployment_handle", lambda *_: replica)
    made = run(controller, lambda: None)
    limits = Limits(timeout=timeout)
    made.model = SimpleNamespace(  # type: ignore[assignment]
        version=2, name="tiny", source=f"{folder}/merged", args=SimpleNamespace(limits=limits)
    )
    made._gate()


def test_an_engine_that_hangs_does_not_hold_the_gate(
    controller: Controller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replica = Replica()
    with pytest.raises(ServingError, match=r"version 2 of tiny did not answer within 0\.2 seconds \(limits\.timeout\)"):
        gated(controller, replica, monkeypatch, tmp_path, timeout=0.2)
    assert replica.over.is_set(), "the request was left in the engine"


def test_without_predictions_an_answer_of_no_token_is_refused(
    controller: Controller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(GateRefused, match="version 2 of tiny answers the smoke question with nothing"):
        gated(controller, Replica(said(None, 0)), monkeypatch, tmp_path)
    gated(controller, Replica(said("Hello", 2)), monkeypatch, tmp_path)
    gated(controller, Replica(said("", 1)), monkeypatch, tmp_path)  # it ended at once, as some are trained to


@pytest.mark.parametrize(
    ("replica", "message"),
    [
        (Replica(SimpleNamespace(error=SimpleNamespace(message="too long"))), "answers with an error: too long"),
        (Replica("x"), "answers with an error: str"),
    ],
)
def test_an_error_for_an_answer_is_told(
    controller: Controller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, replica: Replica, message: str
) -> None:
    with pytest.raises(ServingError, match=message):
        gated(controller, replica, monkeypatch, tmp_path)


# The registry's side


@pytest.fixture(scope="module")
def made_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with three versions of `tiny`; 2 is the champion after 1."""
    storage = str(tmp_path_factory.mktemp("made") / "runs")
    registry = Registry(storage, f"sqlite:///{storage}/mlflow.db")
    for number in (1, 2, 3):
        source = f"{storage}/run-{number}/merged"
        registry.register(
            "tiny", source=source, manifest="", merged_hash=str(number), template_hash="", test_hash="", metrics={}
        )
    for number in (1, 2):
        registry.set_champion("tiny", number, who="test", why="test")
    return Path(storage)


@pytest.fixture
def runs(made_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return str(shutil.copytree(made_runs, tmp_path / "runs"))


def crown(registry: Registry, version: int) -> promotion._Crown:
    return promotion._Crown(registry, ModelVersion("tiny", version, ""), "test")


@pytest.mark.parametrize("error", [StorageError("no answer."), KeyboardInterrupt()])
def test_a_champion_that_the_registry_took_without_saying_so_stands(runs: str, error: BaseException) -> None:
    class Mute(Registry):
        def set_champion(self, *arguments: Any, **more: Any) -> Any:
            super().set_champion(*arguments, **more)
            raise error

    crown(Mute(runs), 3)()
    assert Registry(runs).champion("tiny").version == 3


def test_a_champion_that_the_registry_refused_is_an_error_and_no_place_to_go_back_from(
    runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(runs)

    def refuse(*_: Any) -> None:
        raise StorageError("read only.")

    with monkeypatch.context() as patch:
        patch.setattr(registry._client, "set_registered_model_alias", refuse)
        with pytest.raises(StorageError, match="read only"):
            crown(registry, 3)()
    assert registry.champion("tiny").version == 2 and registry.history("tiny")[-1].version == 3
    assert registry.previous_champion("tiny").version == 1, "the change that did not happen counts for nothing"


def hold(storage: str, ready: Any, done: Any) -> None:
    with Store(storage).lock(".promotion-tiny.lock"):
        ready.set()
        done.wait(60)


def test_a_second_promotion_of_a_name_is_refused(runs: str) -> None:
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(runs, ready, done))
    other.start()
    try:
        assert ready.wait(60)
        said = rf"tiny is being promoted or rolled back by process {other.pid} on .*: wait until that has ended"
        with pytest.raises(InputError, match=said):
            promotion.promote("tiny@3", storage=runs)
        with pytest.raises(InputError, match=said):
            promotion.rollback("tiny", storage=runs)
        assert promotion.rollback("tiny", storage=runs, dry_run=True)["version"] == 1  # changes nothing
        assert Registry(runs).champion("tiny").version == 2
    finally:
        done.set()
        other.join()
    assert promotion.rollback("tiny", storage=runs)["version"] == 1
    assert Registry(runs).champion("tiny").version == 1


def test_where_nothing_can_be_locked_the_promotion_goes_on_and_says_so(
    runs: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @contextlib.contextmanager
    def refuse(self: Store, relative: str) -> Any:
        raise StorageError("locking: it cannot be written.")
        yield

    monkeypatch.setattr(Store, "lock", refuse)
    assert promotion.rollback("tiny", storage=runs)["version"] == 1
    assert "another promotion of tiny at the same time would not be noticed" in caplog.text


def running(monkeypatch: pytest.MonkeyPatch, applications: dict[str, Any]) -> None:
    """Serve's controller, which runs applications: what an ingress was made with, or what replicas are called."""
    found = {}
    for application, made in applications.items():
        direct = isinstance(made, str)
        for name in [made] if direct else ["ingress", "model"]:
            config = SimpleNamespace(user_config=None if direct else made)
            info = SimpleNamespace(ingress=direct or name == "ingress", deployment_config=config)
            found[DeploymentID(name=name, app_name=application)] = (info, None)
    listed = SimpleNamespace(list_deployments_internal=SimpleNamespace(remote=lambda: found))
    client = SimpleNamespace(_controller=listed)
    monkeypatch.setattr(rollout_state, "_get_global_client", lambda **_: client)
    monkeypatch.setattr(rollout_state.ray, "get", lambda value: value)


def made_for(model: str) -> dict[str, Any]:
    return {"active": OLD, "version": 1, "args": {"model": model}}


def test_an_endpoint_is_found_by_the_model_it_hosts_and_not_by_its_application(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    running(monkeypatch, {"prod": made_for("tiny@champion"), "tiny": made_for("other"), "direct": "Server:small"})
    found = rollout_state._live("tiny")
    assert found is not None and (found.name, found.ingress) == ("prod", "ingress")
    other = rollout_state._live("other")
    assert other is not None and other.name == "tiny"
    direct = rollout_state._live("small")
    assert direct is not None and direct.name == "direct" and direct.routing is None
    assert not caplog.records
    assert rollout_state._live("third") is None
    assert "no application here hosts third (there are: prod, tiny, direct): none is changed" in caplog.text


def test_of_two_endpoints_of_a_model_one_changes_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    running(monkeypatch, {"a": made_for("tiny"), "tiny": made_for("tiny@2")})
    found = rollout_state._live("tiny")
    assert found is not None and found.name == "tiny"
    assert "tiny is hosted by a, tiny: only tiny is changed" in caplog.text
