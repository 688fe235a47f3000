"""The verbs that look back at a run: diagnose, report, export."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ft_ray.cli_output import AsJson, DryRun, Out, Overrides, Storage, Verbose, place, verb
from ft_ray.errors import InputError

__all__ = ["inspect_app"]

inspect_app = typer.Typer()

Run = Annotated[str, typer.Argument(metavar="RUN", help="Run or sweep folder, run name, NAME@VERSION, or recipe.")]


@inspect_app.command()
@verb
def diagnose(
    run: Run,
    overrides: Overrides = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Write the recipe, or a sweep's space, with every proposed change.")
    ] = False,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="File for --apply; default: NAME-2.yaml.")
    ] = None,
    corrections: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the wrong answers there, for a person to review.")
    ] = None,
    accept: Annotated[
        str | None, typer.Option(metavar="FILE", help="Turn a reviewed file's rows marked ok into training rows.")
    ] = None,
    split: Annotated[str, typer.Option(help="Whose answers --corrections takes: train, validation, test.")] = "train",
    storage: Storage = "runs",
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Say what went wrong in a run or a sweep, from its own records, and what to change in the recipe or the space."""
    out, [run] = Out(as_json, verbose), place([run], overrides)
    from ft_ray.views import diagnosis_lines

    with out.progress.running():
        from ft_ray import reporting

        found = reporting.diagnose(run, storage=storage)
    value: dict[str, Any] = {"run": run, "found": [d.to_dict() for d in found]}
    shown = [*diagnosis_lines(value["found"])] or [reporting.sound(run, storage=storage)]
    if apply:
        new = reporting.patched(run, storage=storage, out=output, dry_run=dry_run)
        value |= {"name": new.recipe.name}
        wrote = "Would write" if dry_run else "Wrote"
        if new.target is not None:
            value["recipe"] = str(new.target)
            shown.append(f"{wrote} {new.target}. Next: ft-ray run {new.target}")
        if new.space is not None:
            value["space"] = str(new.space)
            shown.append(f"{wrote} {new.space}. Next: ft-ray sweep {new.target or 'RECIPE'} --space {new.space}")
    if corrections is not None and not dry_run:
        value["corrections"] = reporting.write_corrections(run, corrections, storage=storage, split=split)
        shown.append(
            f"Wrote {value['corrections']} rows to {corrections}: set each mark to ok, bad or unsure, then "
            f"ft-ray diagnose {run} --accept {corrections}"
        )
    if accept is not None and not dry_run:
        target_rows = accept.removesuffix(".jsonl") + ".train.jsonl"
        value["accepted"] = reporting.accept_corrections(accept, target_rows)
        shown.append(
            f"Wrote {value['accepted']} training rows to {target_rows}: add it to data.train. Rows that came "
            "from there stand in it already, so the model then sees them twice an epoch; one whose reference you "
            "mended contradicts the old row until you mend or remove that."
        )
    out.result(value, *shown)


@inspect_app.command()
@verb
def report(
    run: Run,
    overrides: Overrides = None,
    form: Annotated[str, typer.Option("--format", help="html or md.")] = "html",
    api_price: Annotated[
        str | None, typer.Option(metavar="IN,OUT", help="US dollars a million tokens of a priced API, e.g. 0.15,0.6.")
    ] = None,
    storage: Storage = "runs",
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Write a run's report: one HTML file that needs nothing else, or Markdown."""
    out, [run] = Out(as_json, verbose), place([run], overrides)
    api = _prices(api_price)
    with out.progress.running():
        from ft_ray import reporting

        text, written = reporting.write_report(run, storage=storage, form=form, api=api, dry_run=dry_run)
    key, said = ("would_write", "Would write") if dry_run else ("report", "Wrote")
    out.result({key: written, "bytes": len(text.encode())}, f"{said} {written}")


def _prices(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        asked, said = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--api-price {text!r}: give two numbers, for example 0.15,0.6.") from None
    if min(asked, said) < 0:
        raise InputError(f"--api-price {text!r}: prices are not negative.")
    return asked, said


@inspect_app.command()
@verb
def export(
    run: Run,
    to: Annotated[str, typer.Option("--to", help="hub, gguf, ollama or vllm.")],
    overrides: Overrides = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="File (gguf) or folder (ollama).")] = None,
    repo: Annotated[str | None, typer.Option(help="OWNER/NAME on the hub.")] = None,
    dtype: Annotated[str, typer.Option(help="Of a GGUF's matrices: f32, f16 or bf16.")] = "f16",
    public: Annotated[bool, typer.Option("--public", help="Make the hub's repository public.")] = False,
    storage: Storage = "runs",
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Take the merged model elsewhere: a hub, a GGUF file, Ollama, or a vLLM command line."""
    out, [run] = Out(as_json, verbose), place([run], overrides)
    with out.progress.running():
        from ft_ray import reporting

        value = reporting.export(
            run, to, storage=storage, out=output, repo=repo, dtype=dtype, private=not public, dry_run=dry_run,
            on_event=out.progress,
        )  # fmt: skip
    lines = [f"{k.replace('_', ' ')}: {v}" for k, v in value.items() if isinstance(v, str | int | float)]
    out.result(value, *([value["command"]] if to == "vllm" else lines))
