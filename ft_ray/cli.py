"""The `ft-ray` command: every verb calls the public Python API and nothing else.

Results go to stdout (one JSON object with --json), everything else to stderr. Exit codes: 0 done, 1 failed
while running, 2 bad input, 3 a gate refused, 130 interrupted. Heavy modules are imported inside the verbs.
"""

from __future__ import annotations

import gc
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ft_ray import cli_jobs, cli_sweep
from ft_ray import recipe as recipes
from ft_ray.cli_groups import config_app, data_app, keys_app
from ft_ray.cli_inspect import inspect_app
from ft_ray.cli_machine import machine_app
from ft_ray.cli_output import (
    AsJson,
    DryRun,
    Fresh,
    Out,
    Overrides,
    ReadsOnly,
    RecipeFile,
    Review,
    Storage,
    Verbose,
    ended,
    leave,
    load,
    place,
    reference,
    verb,
)
from ft_ray.cli_serving import serving_app
from ft_ray.errors import InputError, Interrupted

app = typer.Typer(
    name="ft-ray",
    help="Fine-tune language models on Ray: examples in, a measured and served model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")
app.add_typer(keys_app, name="keys")
app.add_typer(serving_app)
app.add_typer(inspect_app)
app.add_typer(machine_app)
cli_sweep.register(app)
cli_jobs.register(app)


def _version(asked: bool) -> None:
    if asked:
        from ft_ray import __version__

        print(__version__)
        raise typer.Exit(0)


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
@verb
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
    out = Out(as_json, verbose)
    if output != "-" and Path(output).exists() and not (force or dry_run):
        raise InputError(f"{output} exists: choose another --output, or overwrite it with --force.")
    with out.progress.running():
        out.progress({"kind": "status", "message": "looking at the data, the model and this machine"})
        from ft_ray.init_recipe import draft

        made = draft(data, model, name)
    if output == "-" or dry_run:
        out.result({"recipe": made.text, "written": None, "sources": made.sources}, made.text)
        return
    try:
        Path(output).write_text(made.text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}): choose another --output.") from error
    first = "fill in its columns (FILL_IN), " if any(s["layout"] == "unknown" for s in made.sources) else ""
    said = f"Wrote {output}. Next: {first}ft-ray data check {output}, then ft-ray run {output}"
    out.result({"written": output, "sources": made.sources}, said)


@app.command()
@verb
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="A GPU of the table, e.g. a100-40gb.")] = None,
    count: Annotated[int | None, typer.Option(help="How many of them.")] = None,
    price: Annotated[float | None, typer.Option(help="US dollars an hour for one.")] = None,
    space: Annotated[str | None, typer.Option(help="A search space: what sharing one base gains, and costs.")] = None,
    as_json: AsJson = False,
    dry_run: ReadsOnly = False,
    verbose: Verbose = False,
) -> None:
    """Memory, time and cost before anything runs, from the recipe and the model's config.json."""
    out, loaded = Out(as_json, verbose), load(recipe, overrides)
    from ft_ray.plan_view import plan_tables
    from ft_ray.planning import plan as work

    value = work(loaded, gpu=gpu, count=count, price=price).model_dump(mode="json")
    if space is None:
        return out.result(value, *plan_tables(value))
    from ft_ray import search_space, sharing_plan

    sharing = sharing_plan.plan(loaded, search_space.load(space), gpu=gpu, price=price)
    shown = [*plan_tables(value), *sharing_plan.tables(sharing)]
    out.result({**value, "sharing": sharing.model_dump(mode="json")}, *shown)


def _stages(out: Out, recipe: recipes.Recipe, stages: list[str], *, fresh: bool = False) -> None:
    """The dry run of a verb: what it would refuse at once is refused here too."""
    from ft_ray.early_checks import check_inputs
    from ft_ray.views import planned

    check_inputs(recipe)
    value = planned(recipe, stages, fresh=fresh)
    out.result(value, *(f"{stage}: {state}" for stage, state in value["stages"].items()))


@app.command()
@verb
def train(
    recipe: RecipeFile, overrides: Overrides = None, fresh: Fresh = False, as_json: AsJson = False,
    dry_run: DryRun = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Check the data and fine-tune; resumes where an earlier run stopped."""
    out, loaded = Out(as_json, verbose), load(recipe, overrides)
    if dry_run:
        return _stages(out, loaded, ["data_check", "train"], fresh=fresh)
    with out.progress.running():
        from ft_ray.pipeline import train as work

        manifest = work(loaded, fresh=fresh, on_event=out.progress)
    _done(out, loaded, manifest)


@app.command()
@verb
def merge(
    recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False, dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Merge the adapter into the base and prove that the merged model is the trained one."""
    out, loaded = Out(as_json, verbose), load(recipe, overrides)
    if dry_run:
        from ft_ray.early_checks import check_made

        check_made(loaded, "model" if loaded.method == "full" else "adapter", "train")
        return _stages(out, loaded, ["merge"])
    with out.progress.running():
        from ft_ray.pipeline import merge as work

        manifest = work(loaded, on_event=out.progress)
    _done(out, loaded, manifest)


@app.command()
@verb
def evaluate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="validation or test; train shows what is still wrong there.")] = "test",
    url: Annotated[str | None, typer.Option(help="An OpenAI-compatible endpoint (…/v1) to measure beside.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name at --url.")] = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Measure base, few-shot and tuned on a split, with intervals."""
    out, loaded = Out(as_json, verbose), load(recipe, overrides)
    if dry_run:
        from ft_ray.early_checks import check_asked, check_made

        check_asked(split, url, model)
        check_made(loaded, "merged", "merge")
        return _stages(out, loaded, ["evaluate"])
    with out.progress.running():
        from ft_ray.pipeline import evaluate as work

        manifest = work(loaded, split=split, url=url, model=model, on_event=out.progress)
    _done(out, loaded, manifest)


@app.command()
@verb
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop on data warnings too.")] = False,
    review: Review = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Everything from data check to a registered candidate; goes on where it stopped."""
    out, loaded = Out(as_json, verbose), load(recipe, overrides)
    if dry_run:
        return _stages(out, loaded, ["data_check", "train", "merge", "evaluate", "register"], fresh=fresh)
    with out.progress.running():
        from ft_ray.pipeline import run as work

        manifest = work(loaded, strict=strict, review=review, fresh=fresh, on_event=out.progress)
    _done(out, loaded, manifest, whole=True)


def _done(out: Out, recipe: recipes.Recipe, manifest: Any, *, whole: bool = False) -> None:
    """The result of a verb that leaves a manifest; `whole`: one that goes all the way to a candidate."""
    from ft_ray.views import next_step, summary

    value = {"manifest": f"{recipe.run_path}/manifest.json", **manifest.model_dump(mode="json")}
    out.result(value, *summary(recipe, manifest), *(next_step(recipe, manifest) if whole else ()))


@app.command()
@verb
def compare(
    a: Annotated[str, typer.Argument(help="Run folder, run name, NAME@VERSION, or recipe.")],
    b: Annotated[str, typer.Argument(help="The other one.")],
    overrides: Overrides = None,
    storage: Storage = "runs",
    as_json: AsJson = False,
    dry_run: ReadsOnly = False,
    verbose: Verbose = False,
) -> None:
    """Row wins and losses of two runs with paired intervals, and how their recipes differ."""
    out = Out(as_json, verbose)
    from ft_ray.views import comparison

    a, b = place([a, b], overrides)
    with out.progress.running():
        from ft_ray.promotion import compare as work

        value = work(a, b, storage=storage)
    out.result(value, *comparison(value))


@app.command()
@verb
def serve(
    ref: Annotated[str, typer.Argument(metavar="NAME[@VERSION]|RECIPE", help="Default: the champion.")],
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on; an open one needs --keys.")] = "127.0.0.1",
    keys: Annotated[str | None, typer.Option(metavar="FILE", help="API keys, made by ft-ray keys issue.")] = None,
    storage: Storage = "runs",
    direct: Annotated[bool, typer.Option("--direct", help="Highest throughput; see docs/operations.md.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the Ray Serve file instead.")] = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Host a registered model behind an OpenAI-compatible endpoint, until Ctrl-C."""
    out = Out(as_json, verbose)
    name, storage, uri = reference(ref, storage, overrides)
    import contextlib

    import yaml

    from ft_ray import serve_direct

    modes = contextlib.ExitStack()
    if direct and not (print_config or dry_run):  # before anything imports Ray
        modes.enter_context(serve_direct.prepare())
    with out.progress.running():
        from ft_ray import serving

    mode = "direct" if direct else "ingress"
    if print_config or dry_run:
        text = serving.config_file(name, storage=storage, uri=uri, host=host, port=port, keys=keys, mode=mode)
        if as_json:
            out.result({"config": yaml.safe_load(text)})
        else:
            print(text, end="")
        return
    with (
        modes,
        out.progress.running(),
        serving.serve(
            name, storage=storage, uri=uri, host=host, port=port, keys=keys, mode=mode, on_event=out.progress
        ) as endpoint,
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
@verb
def import_(
    adapter: Annotated[str, typer.Argument(help="Folder with adapter_config.json and adapter_model.safetensors.")],
    base: Annotated[str, typer.Option("--base", help="The base model it was trained on: folder or hub id.")],
    data: Annotated[list[str], typer.Option("--data", help="Examples to measure it on; repeat for several.")],
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; default: the folder's.")] = None,
    quantized: Annotated[bool, typer.Option("--quantized", help="It was trained on a 4-bit base (QLoRA).")] = False,
    storage: Storage = "runs",
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Bring an adapter made elsewhere to every gate: merge, parity, evaluation, registry."""
    out = Out(as_json, verbose)
    with out.progress.running():
        from ft_ray.importing import import_adapter as work

        recipe, manifest = work(
            adapter, base, data=data, name=name, storage=storage, quantized=quantized, overrides=overrides or (),
            dry_run=dry_run, on_event=out.progress,
        )  # fmt: skip
    if dry_run:
        value = {"would_import": adapter, "base": base, "would_write": recipe.run_path}
        return out.result(value, f"Would import {adapter} into {recipe.run_path}, merged with {base}")
    _done(out, recipe, manifest, whole=True)


@app.command()
@verb
def demo(
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="Draws other data.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the endpoint up and print a curl line.")] = False,
    folder: Annotated[str, typer.Option(help="Where the recipe, data and run folder go.")] = "demo",
    sweep: Annotated[bool, typer.Option("--sweep", help="Sweep settings first; the winner is served.")] = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Everything once, on real parts: data, QLoRA on Ray, merge, proof, evaluation, endpoint."""
    out = Out(as_json, verbose)
    from ft_ray.demo import demo as work
    from ft_ray.demo import prepare_folder

    if dry_run:
        load("qlora_demo", overrides)  # what the demo's recipe cannot be given is refused
        out.result({"would_write": folder, "seed": seed}, f"Would write {folder}/ and run its recipe.yaml")
        return
    from ft_ray.demo_sweep import prepare as prepare_sweep
    from ft_ray.sweep_table import SweepTable

    shown = SweepTable(out.err, out.progress)
    with out.progress.running(), shown.running():
        recipe_file = prepare_folder(Path(folder), seed)
        space = prepare_sweep(recipe_file, seed) if sweep else None
        try:
            work(
                recipe_file, overrides or (), keep=keep, out=out.result, on_event=shown, pause=out.progress.pause,
                space=space,
            )  # fmt: skip
        except (Interrupted, KeyboardInterrupt) as error:  # another demo measures everything anew
            goes_on = f"ft-ray sweep {recipe_file} --space {space} --resume" if sweep else f"ft-ray run {recipe_file}"
            message = f"the demo stopped: {goes_on} with the same overrides goes on, ft-ray demo starts anew."
            raise Interrupted(message) from error


def main() -> None:
    leave(answered())


def answered() -> int | None:
    """Does what the command line says, and returns the exit code."""
    # Modules leave hundreds of thousands of objects that stay: to go through them at every 700 new ones is a sixth of
    # the seconds of a command's imports.
    gc.set_threshold(100_000, 50, 100)
    # `ray job stop`, Kubernetes and shells that run this in the background say SIGTERM: it means Ctrl-C here.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code: int | None = app(standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for a command line that it cannot read
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "ft-ray").replace("python -m ft_ray", "ft-ray")
        message = error.format_message().strip().rstrip(".")
        # Without a word, the help was asked for by no argument at all, and has been printed.
        code = ended(f"{message}: see {command} --help.", 2, "UsageError", "--json" in sys.argv) if message else 2
    return code
