"""What a live endpoint runs, and how its parts are changed one by one: the ground that `rollout` stands on.

Ray's own redeploy of an application gives every deployment a new code version, which stops the old replicas
before the new ones start. Here each deployment is handed back to the controller exactly as it is, so that nothing
happens to it, and a new one is added beside it. This uses Serve's internals; Ray is pinned.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve._private.deploy_utils import get_deploy_args
from ray.serve.context import _get_global_client
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.generated import serve_pb2

from ft_ray import ray_session
from ft_ray.endpoint_record import noted
from ft_ray.env_vars import environment
from ft_ray.errors import ServingError
from ft_ray.serve_args import ServeArgs

__all__ = ["Live", "attach", "deployment_name", "routing_to", "with_routing"]

log = logging.getLogger("ft_ray")

_messages: Any = serve_pb2  # generated, without types


def deployment_name(model: str, version: int | None) -> str:
    """Each version has a Serve deployment of its own, so that two can be up side by side; None: one for all of them."""
    clean = model.replace("/", "--").replace(".", "_")
    return f"Server:{clean}" + (f"-v{version}" if version is not None else "")


def routing_to(deployment: str, version: int | None, args: ServeArgs) -> dict[str, Any]:
    """The ingress' user_config: which deployment answers, and with what arguments it was made."""
    return {"active": deployment, "version": version, "args": args.model_dump(mode="json", exclude_none=True)}


def with_routing(ingress: Any, routing: dict[str, Any]) -> Any:
    """The deployment of an ingress as it is, but for its routing."""
    changed = copy.copy(ingress)
    changed.deployment_config = ingress.deployment_config.model_copy(update={"user_config": routing})
    return changed


@dataclass
class Live:
    """A running application `name`: its deployments as the controller holds them, and what its ingress does."""

    name: str
    deployments: dict[str, Any]
    ingress: str
    # The code version of what is added here: the same at every `apply`, or the new replicas would start again.
    _mark: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    _handle: Any = None

    @classmethod
    def read(cls, name: str) -> Live:
        """Raises ServingError when no such application of this project runs."""
        client = _get_global_client(raise_if_no_controller_running=False)
        found = ray.get(client._controller.list_deployments_internal.remote()) if client is not None else {}
        mine = {key.name: info for key, (info, _) in found.items() if key.app_name == name}
        ingress = [n for n, info in mine.items() if info.ingress]
        if not ingress:
            raise ServingError(f"{name} is not served in this Ray cluster: start it with ft-ray serve {name}.")
        return cls(name, mine, ingress[0])

    @property
    def routing(self) -> dict[str, Any] | None:
        """{active, version, args} of the ingress; None when requests go straight to the replicas."""
        routing = self.deployments[self.ingress].deployment_config.user_config
        return dict(routing) if isinstance(routing, Mapping) and "active" in routing else None

    def free_name(self, wanted: str) -> str:
        """`wanted`, or with a number behind it when a deployment of that name is still there."""
        name, number = wanted, 2
        while name in self.deployments:
            name, number = f"{wanted}-{number}", number + 1
        return name

    def apply(self, deployments: Mapping[str, Any]) -> None:
        """Makes `deployments` (name -> DeploymentInfo or Deployment) all that the application consists of."""
        arguments = [self._arguments(name, item) for name, item in deployments.items()]
        client = _get_global_client()
        assert client is not None
        application = _messages.ApplicationArgs(external_scaler_enabled=False).SerializeToString()
        ray.get(client._controller.deploy_applications.remote({self.name: arguments}, {self.name: application}))
        self.deployments = dict(deployments)

    def _arguments(self, name: str, item: Any) -> bytes:
        """One deployment as the controller takes it. An info goes back with its own version: unchanged."""
        known = hasattr(item, "deployment_config")
        is_ingress = name == self.ingress
        made = get_deploy_args(
            name,
            ingress=is_ingress,
            replica_config=item.replica_config if known else item._replica_config,
            deployment_config=item.deployment_config if known else item._deployment_config,
            version=item.version if known else f"{name}-{self._mark}",
            route_prefix=item.route_prefix if known else None,
        )
        proto = _messages.DeploymentArgs(
            deployment_name=name,
            deployment_config=made["deployment_config_proto_bytes"],
            replica_config=made["replica_config_proto_bytes"],
            deployer_job_id=made["deployer_job_id"],
            ingress=is_ingress,
        )
        if made["route_prefix"]:
            proto.route_prefix = made["route_prefix"]
        return bytes(proto.SerializeToString())

    def status(self, deployment: str) -> tuple[str, str, int]:
        """(status, message, running replicas) of a deployment; ('GONE', '', 0) when there is none."""
        application = ray_serve.status().applications.get(self.name)
        found = application.deployments.get(deployment) if application is not None else None
        if found is None:
            return "GONE", "", 0
        states: Any = found.replica_states
        return str(found.status.value), found.message, int(states.get("RUNNING", 0))

    def ask_ingress(self, method: str, *arguments: Any) -> list[Any]:
        """What every replica of the ingress answers; asked again when one dies meanwhile, for a minute."""
        if self._handle is None:
            self._handle = ray_serve.get_deployment_handle(self.ingress, self.name)
        deadline = time.monotonic() + 60
        while True:
            try:
                return list(self._handle.broadcast(method, *arguments).results(timeout_s=30))
            # A new handle has not heard of any replica yet; one that died or hangs is not listed for long.
            except (DeploymentUnavailableError, RayActorError, TimeoutError) as error:
                if time.monotonic() > deadline:
                    what = f"{self.name}: its ingress does not answer ({type(error).__name__})"
                    raise ServingError(f"{what}: see serve status.") from error
                time.sleep(0.2)

    def wait(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        """Raises ServingError when `done` is not true within `seconds`."""
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                raise ServingError(f"{self.name}: {what} took more than {seconds:.0f} seconds: see serve status.")
            time.sleep(0.2)


@contextlib.contextmanager
def attach(name: str) -> Iterator[Live | None]:
    """The live endpoint of the model `name`, whatever its application is called, or None where none hosts it.

    Looked for in the connected Ray, the one of RAY_ADDRESS, or the one noted on this machine.
    """
    if ray.is_initialized():
        yield _live(name)
        return
    wanted = {} if os.environ.get("RAY_ADDRESS") else noted(name)
    if wanted is None:
        yield None
        return
    with environment(wanted), ray_session.session():
        yield _live(name)


def _live(name: str) -> Live | None:
    client = _get_global_client(raise_if_no_controller_running=False)
    found = ray.get(client._controller.list_deployments_internal.remote()) if client is not None else {}
    ingresses = {key.app_name: (key, info) for key, (info, _) in found.items() if info.ingress}
    hosts = [
        application
        for application, (key, info) in ingresses.items()
        if _hosts(name, application, key.name, info.deployment_config.user_config)
    ]
    if not hosts:
        if ingresses:
            log.warning("no application here hosts %s (there are: %s): none is changed", name, ", ".join(ingresses))
        return None
    application = name if name in hosts else hosts[0]
    if len(hosts) > 1:
        log.warning("%s is hosted by %s: only %s is changed", name, ", ".join(hosts), application)
    return Live.read(application)


def _hosts(name: str, application: str, deployment: str, routing: Any) -> bool:
    """Whether an application hosts the registered model `name`: by what its ingress was made with, and in direct mode
    by what its replicas are called. One made from a folder is its own name's.
    """
    args = routing.get("args") if isinstance(routing, Mapping) else None
    if not isinstance(args, Mapping):
        return deployment == deployment_name(name, None)
    model = args.get("model")
    return model.partition("@")[0] == name if isinstance(model, str) else application == name
