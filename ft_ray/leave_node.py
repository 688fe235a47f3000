"""Leaves a node of an endpoint when its requests are answered: what a pod runs before it ends (`preStop`).

    python -m ft_ray.leave_node SECONDS; ray stop

`ray stop` alone ends the raylet first, and with it every replica in the middle of its answers. Told that the node is
being drained, Serve starts what it has to elsewhere, sends the node nothing more and stops its replicas and proxy as in
a redeploy: when they have answered. Then they are gone, or the SECONDS that they may take are up, and this ends.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
import time
from typing import Any

import psutil

__all__ = ["leave", "serving", "where"]

_TITLES = ("ray::ServeReplica:", "ray::ProxyActor", "ray::HAProxyManager")
_LOOK_SECONDS = 1.0
# A proxy counts as drained after 30 seconds at the earliest, and Serve looks every five.
_PROXY_SECONDS = 10.0
_ASK_SECONDS = 10.0
_HEAD_SECONDS = 30.0  # the head of a cluster that is deleted as a whole is gone: nobody would stop what serves here


def leave(raylet: psutil.Process, seconds: int) -> bool:
    """Drains the node of `raylet`, whose requests have `seconds`; whether all that serves there has ended."""
    node, gcs = where(raylet.cmdline())
    began = time.monotonic()
    while not _answers(gcs):  # it may be starting again
        if time.monotonic() > began + _ASK_SECONDS:
            raise SystemExit(f"node {node}: no head answers at {gcs}; what it serves ends now.")
        time.sleep(_LOOK_SECONDS)
    # With so long and no longer, Serve stops a replica at once and does not wait for another one to come up elsewhere,
    # for which there may be no room: whoever is to stop the machine waits for this.
    heard = time.time()
    until = heard + seconds
    _drain(node, gcs, int(1000 * until))
    while left := serving(raylet):
        now = time.time()
        if _answers(gcs):
            heard = now
        if now > until + _PROXY_SECONDS or now > heard + _HEAD_SECONDS:
            why = f"did not end within {seconds} seconds" if now > until else f"have no head any more at {gcs}"
            print(f"node {node}: {', '.join(left)} {why} and will now be ended", file=sys.stderr)
            return False
        time.sleep(_LOOK_SECONDS)
    return True


def where(command: list[str]) -> tuple[str, str]:
    """A raylet's node and the address of its cluster, from its command line."""
    known = dict(part.split("=", 1) for part in command if "=" in part)
    return known["--node_id"], known["--gcs-address"]


def serving(raylet: psutil.Process) -> list[str]:
    """Titles of the processes below `raylet` that serve; none when it has ended itself, as a drained one may."""
    found = []
    try:
        children = raylet.children()
    except psutil.NoSuchProcess:
        return []
    for child in children:
        try:
            found += [title for title in child.cmdline()[:1] if title.startswith(_TITLES)]
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


def _answers(gcs: str) -> bool:
    host, _, port = gcs.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=5):
        return True
    return False


def _drain(node: str, gcs: str, deadline_ms: int) -> None:
    """What `ray drain-node` does; that command starts a worker of its own first. Ray is pinned."""
    from ray import _raylet
    from ray.core.generated import autoscaler_pb2

    inner: Any = (_raylet, autoscaler_pb2)
    client, reasons = inner[0].GcsClient(address=gcs), inner[1].DrainNodeReason
    # The other reason there is, that a node is idle, Ray refuses where it is not.
    reason = reasons.Value("DRAIN_NODE_REASON_PREEMPTION")
    try:
        accepted, why = client.drain_node(node, reason, "the machine is being stopped", deadline_ms)
    except Exception as error:  # many kinds, of gRPC and of Ray's token
        accepted, why = False, f"{type(error).__name__}: {error}"
    if not accepted:
        raise SystemExit(f"node {node}: Ray does not drain it ({why}); what it serves ends now.")


def _raylets() -> list[psutil.Process]:
    """Of this machine, which in a pod means its own."""
    found = psutil.process_iter(["name", "status"])
    return [p for p in found if p.info["name"] == "raylet" and p.info["status"] != psutil.STATUS_ZOMBIE]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ft_ray.leave_node", description=__doc__.splitlines()[0])
    parser.add_argument("seconds", type=int, help="limits.timeout and ten: what requests in progress may take")
    parser.add_argument("--raylet", type=int, help="process id, where a machine has several nodes")
    given = parser.parse_args()
    raylets = _raylets() if given.raylet is None else [psutil.Process(given.raylet)]
    if len(raylets) != 1:
        raise SystemExit(f"{len(raylets)} raylets run here and one was expected: name one with --raylet.")
    sys.exit(0 if leave(raylets[0], given.seconds) else 1)


if __name__ == "__main__":
    main()
