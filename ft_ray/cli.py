"""The `ft-ray` command: every verb calls the public Python API and nothing else.

Results go to stdout (one JSON object with --json), everything else to stderr. Exit codes: 0 done, 1 failed
while running, 2 bad input, 3 a gate refused, 130 interrupted. Heavy modules are imported inside the verbs.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ft_ray import recipe as recipes
from ft_ray.errors import FtRayError, InputError

app = typer.Typer(
    name="ft-ray",
    help="Fine-tune language models on Ray: examples in, a measured and served model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at the data before anything is trained.", no_args_is_help=True)
config_app = typer.Typer(help="The recipe: its schema, its resolved values.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped one.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, dotted keys.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")]
Storage = Annotated[
    str, typer.Option(envvar="FT_RAY_STORAGE", help="Where run folders and the default registry are.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Remove what an earlier run of this name left.")]


class _Out:
    """One verb's output: progress to stderr, the result to stdout."""

    def __init__(self, as_json: bool, verbose: bool = False) -> None:
        from rich.console import Console

        from ft_ray.console import Progress, setup_logging

        self.json = as_json
        self.err = Console(stderr=True)
        self.out = Console()
        setup_logging(self.err, verbose)
        self.progress = Progress(self.err)

    def result(self, value: dict[str, Any], *shown: Any) -> None:
        """Prints `value` as JSON, or `shown` for a person."""
        if self.json:
            print(json.dumps(value, ensure_ascii=False, default=str))
        else:
            for item in shown:
                self.out.print(item, highlight=False, soft_wrap=isinstance(item, str))


def _verb(function: Callable[..., None]) -> Callable[..., None]:
    """Turns errors into one sentence on stderr, a JSON object with --json, and the contract's exit code."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except FtRayError as error:
            _fail(str(error), error.exit_code, type(error).__name__, bool(kwargs.get("as_json")))
        except KeyboardInterrupt:
            _fail("interrupted: the same command goes on from there.", 130, "Interrupted", bool(kwargs.get("as_json")))
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has what it wanted
            raise typer.Exit(0) from None

    return wrapped


def _fail(message: str, code: int, kind: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": message, "kind": kind, "exit_code": code}, ensure_ascii=False))
    print(f"ft-ray: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _load(file: str, overrides: list[str] | None) -> recipes.Recipe:
    return recipes.load(file, overrides or ()).recipe


def _reference(ref: str, storage: str) -> tuple[str, str, str | None]:
    """(model reference, storage, tracking uri) from NAME[@VERSION] or from a recipe file."""
    if ref.endswith((".yaml", ".yml")):
        recipe = _load(ref, None)
        return recipe.name, recipe.storage, recipe.tracking.uri
    return ref, storage, None


@app.command()
@_verb
def init(
    data: Annotated[list[str], typer.Option("--data", help="Data file or address; repeat for several.")],
    model: Annotated[str, typer.Option("--model", help="Folder or hub id of the base model.")],
    name: Annotated[str | None, typer.Option(help="Name of the run; default: from the data file.")] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="File to write; - for stdout.")] = "recipe.yaml",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Write a commented recipe for your data and this machine."""
    from ft_ray.init_recipe import init as write

    out = _Out(as_json, verbose)
    if output != "-" and Path(output).exists() and not (force or dry_run):
        raise InputError(f"{output} exists: choose another --output, or overwrite it with --force.")
    text = write(data, model, name)
    if output == "-" or dry_run:
        out.result({"recipe": text, "written": None}, text)
        return
    try:
        Path(output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}): choose another --output.") from error
    out.result({"written": output}, f"Wrote {output}. Next: ft-ray data check {output}, then ft-ray run {output}")


@data_app.command("check")
@_verb
def data_check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on warnings too.")] = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Read, split and judge the data; print findings with file and line."""
    out, loaded = _Out(as_json, verbose), _load(recipe, overrides)
    if dry_run:
        paths = [s.path for s in (*loaded.data.train, *loaded.data.validation, *loaded.data.test)]
        out.result({"would_check": paths}, f"Would check {', '.join(paths)}")
        return
    from ft_ray.pipeline import check

    with out.progress.running():
        report = check(loaded, strict=strict, on_event=out.progress)
    from ft_ray.views import data_tables

    out.result(report.to_dict(), *data_tables(report.to_dict()))


@config_app.command("schema")
@_verb
def config_schema() -> None:
    """Print the recipe's JSON schema."""
    print(json.dumps(recipes.Recipe.model_json_schema(by_alias=True), indent=2))


@config_app.command("render")
@_verb
def config_render(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the resolved recipe, each value with where it came from."""
    from ft_ray.views import rendered

    loaded = recipes.load(recipe, overrides or ())
    value = {"recipe": loaded.recipe.to_dict(), "origins": loaded.origins, "hash": loaded.recipe.hash}
    print(json.dumps(value) if as_json else rendered(loaded))


@config_app.command("reference")
@_verb
def config_reference() -> None:
    """Print the reference of all recipe keys (docs/reference.md)."""
    from ft_ray.reference import reference

    print(reference(), end="")


@app.command()
@_verb
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="A GPU of the table, e.g. a100-40gb.")] = None,
    count: Annotated[int | None, typer.Option(help="How many of them.")] = None,
    price: Annotated[float | None, typer.Option(help="US dollars an hour for one.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Memory, time and cost before anything runs, from the recipe and the model's config.json."""
    out, loaded = _Out(as_json, verbose), _load(recipe, overrides)
    from ft_ray.planning import plan as work
    from ft_ray.views import plan_tables

    value = work(loaded, gpu=gpu, count=count, price=price).model_dump(mode="json")
    out.result(value, *plan_tables(value))


def _stages(out: _Out, recipe: recipes.Recipe, stages: list[str]) -> None:
    from ft_ray.views import planned

    value = planned(recipe, stages)
    out.result(value, *(f"{stage}: {state}" for stage, state in value["stages"].items()))


@app.command()
@_verb
def train(
    recipe: RecipeFile, overrides: Overrides = None, fresh: Fresh = False, as_json: AsJson = False,
    dry_run: DryRun = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Check the data and fine-tune; resumes where an earlier run stopped."""
    out, loaded = _Out(as_json, verbose), _load(recipe, overrides)
    if dry_run:
        return _stages(out, loaded, ["data_check", "train"])
    from ft_ray.pipeline import train as work

    with out.progress.running():
        manifest = work(loaded, fresh=fresh, on_event=out.progress)
    _done(out, loaded, manifest)


@app.command()
@_verb
def merge(
    recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False, dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Merge the adapter into the base and prove that the merged model is the trained one."""
    out, loaded = _Out(as_json, verbose), _load(recipe, overrides)
    if dry_run:
        return _stages(out, loaded, ["merge"])
    from ft_ray.pipeline import merge as work

    with out.progress.running():
        manifest = work(loaded, on_event=out.progress)
    _done(out, loaded, manifest)


@app.command()
@_verb
def evaluate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="validation or test.")] = "test",
    url: Annotated[str | None, typer.Option(help="An OpenAI-compatible endpoint (…/v1) to measure beside.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name at --url.")] = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Measure base, few-shot and tuned on a split, with intervals."""
    out, loaded = _Out(as_json, verbose), _load(recipe, overrides)
    if dry_run:
        return _stages(out, loaded, ["evaluate"])
    from ft_ray.pipeline import evaluate as work

    with out.progress.running():
        manifest = work(loaded, split=split, url=url, model=model, on_event=out.progress)
    _done(out, loaded, manifest)


@app.command()
@_verb
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop on data warnings too.")] = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Everything from data check to a registered candidate; goes on where it stopped."""
    out, loaded = _Out(as_json, verbose), _load(recipe, overrides)
    if dry_run:
        return _stages(out, loaded, ["data_check", "train", "merge", "evaluate", "register"])
    from ft_ray.pipeline import run as work

    with out.progress.running():
        manifest = work(loaded, strict=strict, fresh=fresh, on_event=out.progress)
    _done(out, loaded, manifest)


def _done(out: _Out, recipe: recipes.Recipe, manifest: Any) -> None:
    from ft_ray.views import summary

    value = {"manifest": f"{recipe.run_path}/manifest.json", **manifest.model_dump(mode="json")}
    out.result(value, *summary(recipe, manifest))


@app.command()
@_verb
def compare(
    a: Annotated[str, typer.Argument(help="Run folder, run name, NAME@VERSION, or recipe.")],
    b: Annotated[str, typer.Argument(help="The other one.")],
    storage: Storage = "runs",
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Row wins and losses of two runs with paired intervals, and how their recipes differ."""
    out = _Out(as_json, verbose)
    from ft_ray.promotion import compare as work
    from ft_ray.views import comparison

    value = work(a, b, storage=storage)
    out.result(value, *comparison(value))


@app.command()
@_verb
def runs(storage: Storage = "runs", as_json: AsJson = False) -> None:
    """List the runs in a storage folder."""
    from ft_ray.views import list_runs, runs_table

    out, value = _Out(as_json), list_runs(storage)
    out.result({"runs": value}, runs_table(value))


@app.command()
@_verb
def promote(
    ref: Annotated[str, typer.Argument(metavar="NAME[@VERSION]|RECIPE", help="Candidate; default: the newest.")],
    why: Annotated[str, typer.Option(help="Recorded with the promotion.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Promote past a gate that refuses; recorded.")] = False,
    storage: Storage = "runs",
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Make a registered version the champion, if the gates let it pass."""
    out = _Out(as_json, verbose)
    name, storage, uri = _reference(ref, storage)
    from ft_ray.promotion import promote as work

    with out.progress.running():
        value = work(name, storage=storage, uri=uri, why=why, force=force, dry_run=dry_run, on_event=out.progress)
    verdict = "would be promoted" if dry_run else "is the champion"
    out.result(value, f"{value['name']}@{value['version']} {verdict} ({'; '.join(value['reasons'])})")


@app.command()
@_verb
def serve(
    ref: Annotated[str, typer.Argument(metavar="NAME[@VERSION]|RECIPE", help="Default: the champion.")],
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    storage: Storage = "runs",
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the Ray Serve file instead.")] = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Host a registered model behind an OpenAI-compatible endpoint, until Ctrl-C."""
    out = _Out(as_json, verbose)
    name, storage, uri = _reference(ref, storage)
    from ft_ray import serving

    if print_config or dry_run:
        print(serving.config_file(name, storage=storage, uri=uri, host=host, port=port), end="")
        return
    with (
        out.progress.running(),
        serving.serve(name, storage=storage, uri=uri, host=host, port=port, on_event=out.progress) as endpoint,
    ):
        out.result(
            {"url": endpoint.url, "model": endpoint.model},
            f"{endpoint.model} answers at {endpoint.url}; Ctrl-C ends it. Ask it:",
            endpoint.curl(),
        )
        sys.stdout.flush()
        out.progress.pause()
        endpoint.wait()


@app.command("import")
@_verb
def import_(
    adapter: Annotated[str, typer.Argument(help="Folder with adapter_config.json and adapter_model.safetensors.")],
    base: Annotated[str, typer.Option("--base", help="The base model it was trained on: folder or hub id.")],
    data: Annotated[list[str] | None, typer.Option("--data", help="Examples to measure it on.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; default: the folder's.")] = None,
    storage: Storage = "runs",
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Bring an adapter made elsewhere to every gate: merge, parity, evaluation, registry."""
    out = _Out(as_json, verbose)
    from ft_ray.importing import import_adapter as work

    with out.progress.running():
        recipe, manifest = work(
            adapter, base, data=data or [], name=name, storage=storage, dry_run=dry_run, on_event=out.progress
        )
    _done(out, recipe, manifest)


@app.command()
@_verb
def fetch(
    recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False, dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Download the model and data of a recipe into the cache, for machines without internet."""
    out, loaded = _Out(as_json, verbose), _load(recipe, overrides)
    wanted = [loaded.model.id, *(s.path for s in loaded.data.train)]
    if dry_run:
        out.result({"would_fetch": wanted}, f"Would fetch {', '.join(wanted)}")
        return
    from ft_ray.base_model import resolve
    from ft_ray.dataset import fetch_sources

    with out.progress.running():
        out.progress({"kind": "status", "message": f"fetching {loaded.model.id}"})
        files = resolve(loaded.model)
        out.progress({"kind": "status", "message": "fetching the data"})
        sources = fetch_sources(loaded.data)
    value = {"model": str(files.folder), "hash": files.hash, "data": sources}
    out.result(value, f"Model in {files.folder}", *(f"Data in {s}" for s in sources))


@app.command()
@_verb
def doctor(storage: Storage = "runs", as_json: AsJson = False) -> None:
    """Say what this machine can do, what is missing, and the command that mends it."""
    from ft_ray.doctor import diagnose, rendered

    out = _Out(as_json)
    checks = diagnose(storage)
    out.result({"checks": [c.to_dict() for c in checks]}, rendered(checks))


@app.command()
@_verb
def demo(
    seed: Annotated[int, typer.Option(help="Draws other data.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the endpoint up and print a curl line.")] = False,
    folder: Annotated[str, typer.Option(help="Where the recipe, data and run folder go.")] = "demo",
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Everything once, on real parts: data, QLoRA on Ray, merge, proof, evaluation, endpoint."""
    out = _Out(as_json, verbose)
    from ft_ray.demo import demo as work
    from ft_ray.demo import prepare_folder

    if dry_run:
        out.result({"would_write": folder, "seed": seed}, f"Would write {folder}/ and run its recipe.yaml")
        return
    with out.progress.running():
        recipe_file = prepare_folder(Path(folder), seed)
        work(recipe_file, keep=keep, out=out.result, on_event=out.progress, pause=out.progress.pause)


def main() -> None:
    # `ray job stop`, Kubernetes and shells that run this in the background say SIGTERM: it means Ctrl-C here.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
