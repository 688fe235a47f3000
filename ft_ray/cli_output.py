"""What the verbs of the command line share: their options, their output, and errors as one sentence."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from ft_ray import recipe as recipes
from ft_ray.errors import FtRayError, InputError

__all__ = [
    "AsJson", "DryRun", "Fresh", "Out", "Overrides", "ReadsOnly", "RecipeFile", "Review", "Storage", "Verbose", "ended",
    "fail", "leave", "load", "place", "reference", "verb",
]  # fmt: skip

log = logging.getLogger("ft_ray")

RAY_THREADS = ("ft-ray-fit", "ft-ray-tune")  # of `trainer` and `tuning`, which this module does not import

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped one.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, dotted keys.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Review = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="CSV of 50 sampled rows for a person to mark; its marks are read back."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
ReadsOnly = Annotated[
    bool, typer.Option("--dry-run", help="The same: this verb only reads, and changes nothing in any case.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")]
Storage = Annotated[
    str, typer.Option(envvar="FT_RAY_STORAGE", help="Where run folders and the default registry are.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Remove what an earlier run of this name left.")]


class Out:
    """One verb's output: progress to stderr, the result to stdout."""

    def __init__(self, as_json: bool, verbose: bool = False) -> None:
        from rich.console import Console

        from ft_ray.console import Progress, setup_logging

        self.json = as_json
        # What models, users and files say is text: '[/order]' in it is no markup, ':smile:' no emoji.
        self.err = Console(stderr=True, markup=False, emoji=False, width=_width(sys.stderr))
        self.out = Console(markup=False, emoji=False, width=_width(sys.stdout))
        setup_logging(self.err, verbose)
        self.progress = Progress(self.err)

    def result(self, value: dict[str, Any], *shown: Any) -> None:
        """Prints `value` as JSON, or `shown` for a person."""
        if self.json:
            print(json.dumps(value, ensure_ascii=False, default=str))
        else:
            for item in shown:
                self.out.print(item, highlight=False, soft_wrap=isinstance(item, str))


def _width(stream: Any) -> int | None:
    """A file or a pipe has no width of its own: lines there are as long as this project's pages are wide."""
    return None if stream.isatty() or "COLUMNS" in os.environ else 120


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Turns errors into one sentence on stderr, a JSON object with --json, and the contract's exit code."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        as_json = bool(kwargs.get("as_json"))
        try:
            function(*args, **kwargs)
        except FtRayError as error:
            fail(str(error), error.exit_code, type(error).__name__, as_json)
        except KeyboardInterrupt:
            fail("interrupted: the same command goes on from there.", 130, "Interrupted", as_json)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has what it wanted
            raise typer.Exit(0) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            kind, hint = type(error).__name__, "this is a bug"
            if kwargs.get("verbose"):
                log.error("the traceback of the error below", exc_info=error)
            else:
                hint += ", run again with --verbose for the traceback"
            message = " ".join(str(error).split()) or "no message"
            fail(f"unexpected {kind}: {message.rstrip('.')}; {hint}.", 1, kind, as_json)

    return wrapped


def fail(message: str, code: int, kind: str, as_json: bool, **found: Any) -> NoReturn:
    """Ends the verb with `message`. `found`: results until then, kept in the JSON object."""
    raise typer.Exit(ended(message, code, kind, as_json, **found))


def leave(code: int | None) -> NoReturn:
    """Ends the process with `code`, once its threads and exit handlers are done, and takes no module apart.

    As multiprocessing ends its processes. The interpreter's own end goes through all objects of all modules: 2 s after
    a sweep. Where a run ended before Ray Train or Ray Tune did (its folder was taken over, Ctrl-C twice), their thread
    is still in native code, and a process was seen to crash as handlers ran (signal 11 in place of `code`).
    """
    if not any(thread.name in RAY_THREADS for thread in threading.enumerate()):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    logging.shutdown()
    try:
        with contextlib.suppress(BrokenPipeError, ValueError):  # nobody reads any more
            sys.stdout.flush()
    except OSError as error:  # a full disk, say, behind a redirection
        code = code or 1
        with contextlib.suppress(OSError, ValueError):
            print(f"ft-ray: the output could not be written ({error.strerror}).", file=sys.stderr)
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code or 0)


def ended(message: str, code: int, kind: str, as_json: bool, **found: Any) -> int:
    """Prints an error as one sentence on stderr, and as an object on stdout with --json. Returns the exit code."""
    if as_json:
        value = {**found, "error": message, "kind": kind, "exit_code": code}
        print(json.dumps(value, ensure_ascii=False, default=str))
    print(f"ft-ray: {message}", file=sys.stderr)
    return code


def load(file: str, overrides: list[str] | None) -> recipes.Recipe:
    return recipes.load(file, overrides or ()).recipe


def reference(ref: str, storage: str, overrides: list[str] | None = None) -> tuple[str, str, str | None]:
    """(model reference, storage, tracking uri) from NAME[@VERSION], or from a recipe file and its overrides."""
    if ref.endswith((".yaml", ".yml")):
        recipe = load(ref, overrides)
        return recipe.name, recipe.storage, recipe.tracking.uri
    if overrides:
        raise InputError(f"{overrides[0]!r} overrides a recipe, and {ref} is a registered model: give its recipe file.")
    return ref, storage, None


def place(refs: list[str], overrides: list[str] | None) -> list[str]:
    """The references to runs with every recipe file among them replaced by its run folder, overrides applied."""
    if overrides and not any(ref.endswith((".yaml", ".yml")) for ref in refs):
        raise InputError(f"{overrides[0]!r} overrides a recipe, and {refs[0]} is a run: give its recipe file.")
    return [load(ref, overrides).run_path if ref.endswith((".yaml", ".yml")) else ref for ref in refs]
