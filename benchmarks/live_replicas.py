"""Changes the replicas of a live endpoint while their engines stay up: how many there are, how requests are routed."""

from __future__ import annotations

import time
from typing import Any

__all__ = ["change"]

PATIENCE = 120.0


def change(args: dict[str, Any], routing_changes: bool) -> dict[str, Any]:
    """Deploys the application `args` (of `ft_ray.serve_args`) again, over the one of the same model that runs.

    The replicas keep their code version, which Serve takes for "the same, with other settings": none starts again.
    Whoever picks a replica for a request learns of another routing only when it starts, so it is started again then (in
    direct mode HAProxy picks by load, and Ray's router by prefix comes and goes).
    Returns seconds, the replicas before and after, and the actors of Ray's routing by prefix, which exist only with it.
    Raises RuntimeError where that took too long.
    """
    import ray
    from ray import serve
    from ray.serve._private.build_app import build_app
    from ray.serve.context import _get_global_client

    from ft_ray import serving
    from ft_ray.rollout_state import Live
    from ft_ray.serve_args import parse

    began = time.monotonic()
    parsed = parse(args)
    assert parsed.replicas is not None
    model = serving.find(parsed)
    live = Live.read(model.name)
    before = _replicas(model.name)
    built = build_app(
        serving.application(model), name=model.name, route_prefix="/", logging_config={"enable_access_log": False}
    )
    pickers, made = [], [*built.deployments, built.ingress_request_router_deployment]
    made = [deployment for deployment in made if deployment is not None]
    for deployment in made:
        if deployment.name in live.deployments:
            if deployment.name.startswith("Server:") or not routing_changes:
                deployment._version = live.deployments[deployment.name].version
            else:
                pickers.append(deployment.name)
    client: Any = _get_global_client()
    client.deploy_applications(
        [built], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
    )

    def done() -> bool:
        application = serve.status().applications[model.name]
        counts = {name: d.replica_states for name, d in application.deployments.items()}
        right = all(
            states.get("RUNNING", 0) == parsed.replicas.max and sum(states.values()) == parsed.replicas.max
            for name, states in counts.items()
            if name.startswith("Server:")
        )
        after = _replicas(model.name)
        there = {name for name, ids in after.items() if ids} == {deployment.name for deployment in made}
        new = all(after[p] and not set(after[p]) & set(before[p]) for p in pickers)
        return application.status == "RUNNING" and right and there and new

    while not done():
        if time.monotonic() - began > PATIENCE:
            raise RuntimeError(f"not changed within {PATIENCE:.0f} s: {serve.status().applications[model.name]}")
        time.sleep(0.3)
    actors = [str(a["name"]) for a in ray.util.list_named_actors(all_namespaces=True)]
    return {
        "seconds": round(time.monotonic() - began, 1), "before": before, "after": _replicas(model.name),
        "prefix_actors": [name for name in actors if "prefix" in name.lower()],
    }  # fmt: skip


def _replicas(name: str) -> dict[str, list[str]]:
    """Ids of the running replicas of each deployment."""
    import ray
    from ray.serve.context import _get_global_client

    client: Any = _get_global_client()
    details = ray.get(client._controller.get_serve_instance_details.remote())
    deployments = details["applications"][name]["deployments"]
    return {
        one: [r["replica_id"] for r in found["replicas"] if r["state"] == "RUNNING"]
        for one, found in deployments.items()
    }
