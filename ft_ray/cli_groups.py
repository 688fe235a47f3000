"""The command groups of `ft-ray`: data, config and keys."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ft_ray import recipe as recipes
from ft_ray.cli_output import AsJson, DryRun, Out, Overrides, ReadsOnly, RecipeFile, Review, Verbose, fail, load, verb
from ft_ray.errors import FtRayError

__all__ = ["config_app", "data_app", "keys_app"]

data_app = typer.Typer(help="Look at the data before anything is trained.", no_args_is_help=True)
config_app = typer.Typer(help="The recipe: its schema, its resolved values.", no_args_is_help=True)
keys_app = typer.Typer(help="API keys of an endpoint: serve --keys FILE asks for them.", no_args_is_help=True)

KeyFile = Annotated[str, typer.Argument(metavar="FILE", help="File or address of the keys; it holds hashes only.")]
Label = Annotated[str, typer.Argument(metavar="LABEL", help="Whose key it is.")]


@data_app.command("check")
@verb
def data_check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on warnings too.")] = False,
    review: Review = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Read, split and judge the data; print findings with file and line."""
    out, loaded = Out(as_json, verbose), load(recipe, overrides)
    if dry_run:
        paths = [s.path for s in (*loaded.data.train, *loaded.data.validation, *loaded.data.test)]
        out.result({"would_check": paths}, f"Would check {', '.join(paths)}")
        return
    from ft_ray.views import data_tables

    found: dict[str, Any] = {}

    def listen(event: dict[str, Any]) -> None:
        if event.get("kind") == "data":
            found.update(event["report"])
        out.progress(event)

    try:
        with out.progress.running():
            from ft_ray.pipeline import check

            report = check(loaded, strict=strict, review=review, on_event=listen)
    except FtRayError as error:  # the gate at the end: what it judged is the result all the same
        fail(str(error), error.exit_code, type(error).__name__, as_json, **found)
    out.result(report.to_dict(), *data_tables(report.to_dict()))


@config_app.command("schema")
@verb
def config_schema(as_json: AsJson = False, dry_run: ReadsOnly = False, verbose: Verbose = False) -> None:
    """Print the recipe's JSON schema, indented; on one line with --json."""
    print(json.dumps(recipes.Recipe.model_json_schema(by_alias=True), indent=None if as_json else 2))


@config_app.command("render")
@verb
def config_render(
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    dry_run: ReadsOnly = False,
    verbose: Verbose = False,
) -> None:
    """Print the resolved recipe, each value with where it came from."""
    from ft_ray.views import rendered

    loaded = recipes.load(recipe, overrides or ())
    value = {"recipe": loaded.recipe.to_dict(), "origins": loaded.origins, "hash": loaded.recipe.hash}
    print(json.dumps(value, ensure_ascii=False) if as_json else rendered(loaded))


@config_app.command("reference")
@verb
def config_reference(as_json: AsJson = False, dry_run: ReadsOnly = False, verbose: Verbose = False) -> None:
    """Print the reference of all recipe keys (docs/reference.md); with --json their schema by dotted key."""
    from ft_ray.reference import keys, reference

    print(json.dumps({"keys": keys()}, ensure_ascii=False) if as_json else reference(), end="\n" if as_json else "")


@keys_app.command("issue")
@verb
def keys_issue(
    file: KeyFile, label: Label, as_json: AsJson = False, dry_run: DryRun = False, verbose: Verbose = False
) -> None:
    """Make a key, store its hash in FILE, and print the key: it cannot be shown again."""
    out = Out(as_json, verbose)
    if dry_run:
        out.result({"would_issue": label, "file": file}, f"Would add a key for {label} to {file}")
        return
    from ft_ray.api_keys import issue_key

    key = issue_key(file, label)
    out.result({"key": key, "label": label, "file": file}, key)
    out.progress({"kind": "status", "message": f"its hash is in {file}; the key itself is shown this once only"})


@keys_app.command("revoke")
@verb
def keys_revoke(
    file: KeyFile, label: Label, as_json: AsJson = False, dry_run: DryRun = False, verbose: Verbose = False
) -> None:
    """Revoke the key of LABEL; a live endpoint refuses it within seconds."""
    out = Out(as_json, verbose)
    if dry_run:
        out.result({"would_revoke": label, "file": file}, f"Would revoke the key of {label} in {file}")
        return
    from ft_ray.api_keys import revoke_key

    revoke_key(file, label)
    out.result({"revoked": label, "file": file}, f"Revoked the key of {label} in {file}")
