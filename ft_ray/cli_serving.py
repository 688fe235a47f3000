"""Verbs about what is served: promote, rollback and deploy."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ft_ray.cli_jobs import Address, reached
from ft_ray.cli_output import AsJson, DryRun, Out, Overrides, Storage, Verbose, reference, verb
from ft_ray.errors import InputError

if TYPE_CHECKING:
    from ft_ray.rollout import WithoutRoom

__all__ = ["serving_app"]

serving_app = typer.Typer()

Why = Annotated[str, typer.Option(help="Recorded with the change.")]
StopFirst = Annotated[
    bool, typer.Option("--stop-first", help="Without room for two versions: stop the old one first; requests wait.")
]
WaitForRoom = Annotated[
    bool, typer.Option("--wait-for-room", help="Without room for two versions: wait for an autoscaler's next node.")
]


def _without_room(stop_first: bool, wait: bool) -> WithoutRoom:
    if stop_first and wait:
        raise InputError("--stop-first makes room, --wait-for-room waits for it: leave one of them out.")
    return "stop first" if stop_first else "wait" if wait else "refuse"


@serving_app.command()
@verb
def promote(
    ref: Annotated[str, typer.Argument(metavar="NAME[@VERSION]|RECIPE", help="Candidate; default: the newest.")],
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[VERSION] [KEY=VALUE]...", help="The same as NAME@VERSION; a recipe's overrides."),
    ] = None,
    why: Why = "",
    force: Annotated[bool, typer.Option("--force", help="Promote past a gate that refuses; recorded.")] = False,
    stop_first: StopFirst = False,
    wait_for_room: WaitForRoom = False,
    storage: Storage = "runs",
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Make a registered version the champion, if the gates let it pass; a live endpoint changes over to it."""
    out = Out(as_json, verbose)
    version, overrides = (more[0], more[1:]) if more and more[0].isdecimal() else (None, more)
    name, storage, uri = reference(ref, storage, overrides)
    if version is not None:
        if "@" in name:
            raise InputError(f"{name} names a version already: leave out {version}.")
        name = f"{name}@{version}"
    with out.progress.running():
        from ft_ray.promotion import promote as work

        value = work(
            name, storage=storage, uri=uri, why=why, force=force, dry_run=dry_run,
            without_room=_without_room(stop_first, wait_for_room), on_event=out.progress,
        )  # fmt: skip
    verdict = "would be promoted" if dry_run else "is the champion"
    out.result(
        value,
        f"{value['name']}@{value['version']} {verdict} ({'; '.join(value['reasons'])})",
        *_live(value.get("rollout")),
    )


@serving_app.command()
@verb
def rollback(
    ref: Annotated[str, typer.Argument(metavar="NAME|RECIPE")],
    overrides: Overrides = None,
    why: Why = "",
    stop_first: StopFirst = False,
    wait_for_room: WaitForRoom = False,
    storage: Storage = "runs",
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Go back to the champion of before the last promotion; a live endpoint goes back with it."""
    out = Out(as_json, verbose)
    name, storage, uri = reference(ref, storage, overrides)
    with out.progress.running():
        from ft_ray.promotion import rollback as work

        value = work(
            name, storage=storage, uri=uri, why=why, dry_run=dry_run,
            without_room=_without_room(stop_first, wait_for_room), on_event=out.progress,
        )  # fmt: skip
    verdict = "would be" if dry_run else "is"
    out.result(
        value,
        f"{value['name']}@{value['version']} {verdict} the champion again, in place of {value['previous']}",
        *_live(value.get("rollout")),
    )


@serving_app.command()
@verb
def deploy(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file of serve/, or what serve --print-config wrote.")],
    address: Address = None,
    timeout: Annotated[float, typer.Option(help="Seconds until it must be up.")] = 1800.0,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Put a Ray Serve file on a running cluster and wait until it is up; in a job too, which it outlives."""
    from ft_ray import serve_file

    out = Out(as_json, verbose)
    served = serve_file.read(file)
    if dry_run:
        out.result({"application": served.name, "config": served.document}, f"Would deploy {served.name} of {file}")
        return
    from ft_ray import ray_session
    from ft_ray.jobs import Client
    from ft_ray.serve_deploy import deploy as work
    from ft_ray.serve_deploy import registered

    def say(message: str) -> None:
        out.progress({"kind": "status", "message": message})

    attached = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ""
    inside = bool(not address and attached and "://" not in attached)  # in a job
    if inside:
        address = ray_session.head_api()
    version = None
    if inside or served.args.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        version = registered(served.args, say)
    elif served.args.model is not None:
        say("no registry is set here: another champion than the one served is taken up only where the file changed")
    found = reached(lambda: work(Client(address), served, timeout=timeout, say=say, version=version))
    where = f"{found['http'].get('host')}:{found['http'].get('port')}"
    value = {"application": served.name, "status": found["status"], "listens": where}
    out.result(value, f"{served.name} is up; Serve listens on {where} of the cluster's nodes")


def _live(rolled: dict[str, Any] | None) -> list[str]:
    if rolled is None:
        return []
    if rolled["version"] == rolled["previous"]:
        return [f"The live endpoint serves version {rolled['version']} already"]
    seconds = ", ".join(f"{part} {took} s" for part, took in rolled["seconds"].items())
    asked = f"; {rolled['agreed']} of {rolled['asked']} answers as evaluated" if rolled["asked"] else ""
    return [f"The live endpoint went from version {rolled['previous']} to {rolled['version']} ({seconds}{asked})"]
