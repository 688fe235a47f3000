"""`ft-ray submit`, `ft-ray jobs` and `ft-ray k8s`: the same verbs on a cluster, and manifests for Kubernetes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ft_ray.cli_output import AsJson, DryRun, Out, Overrides, ReadsOnly, RecipeFile, Verbose, fail, load, verb
from ft_ray.errors import InputError, TrainingError

if TYPE_CHECKING:
    from ft_ray.job_request import Command

__all__ = ["Address", "reached", "register"]

jobs_app = typer.Typer(help="Jobs on a cluster: list, follow and stop them.", no_args_is_help=True)
k8s_app = typer.Typer(help="Manifests for KubeRay, from a recipe or a file in serve/.", no_args_is_help=True)

Address = Annotated[
    str | None,
    typer.Option(help="The head's job API; default RAY_API_SERVER_ADDRESS, RAY_ADDRESS or http://127.0.0.1:8265."),
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="The submission id that submit prints.")]
_NOT_IN_JOBS = {"submit", "jobs", "k8s", "demo", "serve", "init", "keys"}


def register(app: typer.Typer) -> None:
    """Adds the verbs of this module to the command."""
    app.command(context_settings={"ignore_unknown_options": True})(submit)
    app.add_typer(jobs_app, name="jobs")
    app.add_typer(k8s_app, name="k8s")


def _client(address: str | None) -> Any:
    from ft_ray.jobs import Client

    return Client(address)


def reached(work: Any) -> Any:
    """Runs `work` and says in one sentence that nothing answers."""
    from ft_ray.job_logs import LostConnection

    try:
        return work()
    except LostConnection as error:
        raise TrainingError(f"{error}: check --address, and that the head or the tunnel is up.") from error


def _ended(out: Out, info: Any, **more: Any) -> None:
    """Prints how the job ended; ends with the code of the command that ran in it."""
    from ft_ray.jobs import exit_code

    code = exit_code(info)
    value = {"job": info.submission_id, "status": str(info.status), "exit_code": code, **more}
    if code:
        why = (info.message or "no message").strip().splitlines()[0].partition(", last available")[0].rstrip(".,:")
        fail(f"job {info.submission_id}: {str(info.status).lower()} ({why}).", code, "JobEnded", out.json, **value)
    out.result(value, f"{info.submission_id}: {str(info.status).lower()}")


def _followed(out: Out, client: Any, job: str, patience: float, *, stream: Any = None, **more: Any) -> None:
    from ft_ray.jobs import follow

    # The job's own output, progress and all, is this command's log; its result is how the job ended.
    target = stream or sys.stderr

    def write(text: str) -> None:
        target.write(text)
        target.flush()

    try:
        info = follow(
            client, job, write=write, patience=patience,
            say=lambda message: out.progress({"kind": "status", "message": message}),
        )  # fmt: skip
    except KeyboardInterrupt:
        fail(
            f"the job goes on: `ft-ray jobs logs {job}` follows it again, `ft-ray jobs stop {job}` ends it.",
            130, "Interrupted", out.json, job=job,
        )  # fmt: skip
    _ended(out, info, **more)


Patience = Annotated[float, typer.Option(help="Seconds that the cluster may be out of reach.")]


@verb
def submit(
    context: typer.Context,
    arguments: Annotated[list[str], typer.Argument(metavar="-- VERB RECIPE...", help="What ft-ray shall run there.")],
    address: Address = None,
    working_dir: Annotated[str, typer.Option(help="Folder that travels along; .gitignore counts.")] = ".",
    env: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Variable of the job; no secret.")] = None,
    num_cpus: Annotated[float, typer.Option(help="CPUs kept for the driver, on a worker node.")] = 0.0,
    num_gpus: Annotated[float, typer.Option(help="GPUs kept for the driver, on a worker node.")] = 0.0,
    wait: Annotated[bool, typer.Option(help="Follow the job to its end.")] = True,
    again: Annotated[bool, typer.Option("--again", help="Run it once more after it has succeeded.")] = False,
    patience: Patience = 600.0,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Run a verb on a cluster, follow it, and end with its exit code; the same command attaches again."""
    from ft_ray.jobs import describe
    from ft_ray.jobs import submit as work

    out = Out(as_json, verbose)
    assert context.parent is not None
    known = set(context.parent.command.list_commands(context.parent)) - _NOT_IN_JOBS  # type: ignore[attr-defined]
    arguments = arguments[1:] if arguments[:1] == ["ft-ray"] else arguments
    if not arguments or arguments[0] not in known:
        asked = f"{arguments[0]!r} does not run in a job" if arguments else "nothing to run"
        raise InputError(f"{asked}: give one of {', '.join(sorted(known))} after --.")
    request = describe(_parsed(context.parent, arguments), working_dir=working_dir, env=env or ())
    size = request.upload.total / 2**20
    if dry_run:
        value = {
            "job": request.base, "entrypoint": request.entrypoint, "working_dir": str(request.upload.folder),
            "files": len(request.upload.sizes), "mib": round(size, 1), "env": request.runtime_env["env_vars"],
        }  # fmt: skip
        out.result(value, f"Would submit {request.base}: {request.entrypoint}", f"with {size:.1f} MiB of files")
        return
    client = _client(address)

    def say(message: str) -> None:
        out.progress({"kind": "status", "message": message})

    job, new = work(client, request, num_cpus=num_cpus, num_gpus=num_gpus, again=again, patience=patience, say=say)
    say(f"submitted {job} with {size:.1f} MiB of files" if new else f"attached to {job}, started earlier")
    if not wait:
        out.result({"job": job, "new": new}, job)
        return
    _followed(out, client, job, patience, new=new)


def _parsed(context: Any, arguments: list[str]) -> Command:
    """The job's command line; what it would refuse there is refused here, before anything is sent."""
    from ft_ray.job_request import Command

    command, rest, names = context.command, arguments, []
    try:
        while rest and hasattr(command, "commands"):
            name, command, rest = command.resolve_command(context, rest)
            names.append(name)
        made = command.make_context(names[-1], list(rest), parent=context)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for a command line that it cannot read
            raise
        raise InputError(f"the command for the job does not parse: {error.format_message()}") from error
    values: list[str] = []
    for parameter in command.params:
        value = made.params.get(parameter.name)
        if parameter.param_type_name == "argument" and value is not None:
            values += [value] if isinstance(value, str) else value
    options = {p.name: made.params[p.name] for p in command.params if p.param_type_name == "option" and p.expose_value}
    return Command(tuple(arguments), "-".join(names), tuple(values), options)


@jobs_app.command("list")
@verb
def jobs_list(
    address: Address = None, as_json: AsJson = False, dry_run: ReadsOnly = False, verbose: Verbose = False
) -> None:
    """List the cluster's jobs, the newest last."""
    from rich.table import Table

    from ft_ray.jobs import exit_code, jobs

    out, client = Out(as_json, verbose), _client(address)
    found, table = [], Table("job", "status", "run", "verb", "exit", box=None)
    for job in reached(lambda: jobs(client)):
        metadata = job.metadata or {}
        code = exit_code(job) if job.status.is_terminal() else None
        row = {
            "job": job.submission_id, "status": str(job.status), "run": metadata.get("run"),
            "verb": metadata.get("verb"), "exit_code": code, "started_ms": job.start_time, "ended_ms": job.end_time,
        }  # fmt: skip
        found.append(row)
        table.add_row(*("" if row[k] is None else str(row[k]) for k in ("job", "status", "run", "verb", "exit_code")))
    out.result({"jobs": found}, table)


@jobs_app.command("logs")
@verb
def jobs_logs(
    job: Job, address: Address = None, patience: Patience = 600.0, as_json: AsJson = False,
    dry_run: ReadsOnly = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Follow a job's log to its end; ends with the job's exit code."""
    out, client = Out(as_json, verbose), _client(address)
    reached(lambda: client.info(job))
    _followed(out, client, job, patience, stream=sys.stderr if as_json else sys.stdout)


@jobs_app.command("stop")
@verb
def jobs_stop(
    job: Job, address: Address = None, as_json: AsJson = False, dry_run: DryRun = False, verbose: Verbose = False
) -> None:
    """Stop a job with a checkpoint, and wait until it has stopped."""
    from ft_ray.jobs import stop

    out, client = Out(as_json, verbose), _client(address)
    if dry_run:
        info = reached(lambda: client.info(job))
        out.result({"would_stop": job, "status": str(info.status)}, f"Would stop {job}, now {info.status}")
        return
    info = reached(lambda: stop(client, job, say=lambda m: out.progress({"kind": "status", "message": m})))
    out.result({"job": job, "status": str(info.status)}, f"{job}: {str(info.status).lower()}")


Image = Annotated[str | None, typer.Option(help="Image of all pods; default registry.example.com/ft-ray.")]
Namespace = Annotated[str, typer.Option(help="Namespace of the objects.")]
Memory = Annotated[str | None, typer.Option(help="Memory of a working pod, for example 48Gi.")]


@k8s_app.command("render")
@verb
def k8s_render(
    recipe: RecipeFile,
    overrides: Overrides = None,
    runs: Annotated[str, typer.Option("--verb", help="run, train or sweep.")] = "run",
    space: Annotated[str, typer.Option("--space", help="The search space of a sweep.")] = "lora_small",
    image: Image = None,
    namespace: Namespace = "ft-ray",
    memory: Memory = None,
    pool: Annotated[str, typer.Option(help="Label ft-ray.io/pool of the GPU nodes.")] = "gpu",
    queue: Annotated[str | None, typer.Option(help="Kueue's LocalQueue to wait in.")] = None,
    as_json: AsJson = False,
    dry_run: ReadsOnly = False,
    verbose: Verbose = False,
) -> None:
    """Print the RayJob of a recipe, with the resources it asks for: pipe it to kubectl apply -f -."""
    from ft_ray import kube

    out, loaded = Out(as_json, verbose), load(recipe, overrides)
    settings = kube.Settings(image=image or "", namespace=namespace, memory=memory, pool=pool, queue=queue)
    searched = None
    if runs == "sweep":
        from ft_ray import search_space

        search_space.check(search_space.load(space), loaded)
        searched = search_space.find(space).read_text(encoding="utf-8")
    objects = [kube.recipe_map(loaded, settings, searched), kube.job(loaded, runs, settings)]
    _print(out, objects, f"ft-ray {runs} of {loaded.name} on KubeRay. Needs the platform objects of k8s/ in place.")


@k8s_app.command("serve")
@verb
def k8s_serve(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file of serve/, or what serve --print-config wrote.")],
    image: Image = None,
    namespace: Namespace = "ft-ray",
    memory: Memory = None,
    cpus: Annotated[int, typer.Option(help="CPUs of a working pod.")] = 8,
    pool: Annotated[str, typer.Option(help="Label ft-ray.io/pool of the GPU nodes.")] = "gpu",
    as_json: AsJson = False,
    dry_run: ReadsOnly = False,
    verbose: Verbose = False,
) -> None:
    """Print the RayService that hosts a Ray Serve file, taken over word for word."""
    from ft_ray import kube
    from ft_ray.kube_serve import service, standing

    out = Out(as_json, verbose)
    settings = kube.Settings(image=image or "", namespace=namespace, memory=memory, pool=pool)
    made = service(file, settings, cpus=cpus)
    note = standing(made)
    _print(out, [made], f"{file} on KubeRay. Needs the platform objects of k8s/ in place.\n{note}", note)


def _print(out: Out, objects: list[dict[str, Any]], head: str, note: str = "") -> None:
    """The objects on stdout; `note` goes to the person who pipes them on."""
    from ft_ray.kube import document

    if out.json:
        out.result({"objects": objects, **({"note": note} if note else {})})
    else:
        if note:
            out.progress({"kind": "status", "message": note})
        print(document(*objects, head=head), end="")
