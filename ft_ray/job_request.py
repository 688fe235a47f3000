"""What `ft-ray submit` sends to a cluster: a command with a stable id, checked before anything leaves this machine.

What a job carries is shown to whoever may list jobs. So no secret may be in it: values that look like one are
refused, and none is taken from the environment here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ft_ray
from ft_ray import recipe as recipes
from ft_ray import search_space, sensitive
from ft_ray.errors import InputError
from ft_ray.job_upload import Upload, needed, survey
from ft_ray.serve_file import read
from ft_ray.storage_faults import redacted

__all__ = ["Command", "Request", "describe", "leaks", "name_of", "secret"]

# At once, each time they are asked for; promote and rollback take a model's name too, deploy a Ray Serve file.
_ACTIONS = ("promote", "rollback", "deploy")
_STOP_WAIT = 120  # seconds that a driver has to stop in step, with a checkpoint; Ray's own 3 would kill it
# A name that says secret, unless what it holds is the path of a file.
_SECRET_NAME = re.compile(
    r"(?i)(^|_)(token|secret|password|passwd|pwd|api_?key|access_?key|private_?key|credentials?|auth)($|_)"
)
_PATH_NAME = re.compile(r"(?i)_(path|file|folder|dir|mode)$")


@dataclass(frozen=True)
class Command:
    """An ft-ray command line as its own parser reads it: `values` are positional, `options` by parameter's name."""

    arguments: tuple[str, ...]
    verb: str
    values: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """One verb to run on a cluster. `base` is its stable id; attempts after a failure append -2, -3 and so on.

    `retry` is the command of these attempts: a sweep goes on only where it is told to. `repeats`: what has succeeded
    is done again when it is asked for again, as promoting the newest version is.
    """

    base: str
    name: str
    verb: str
    entrypoint: str
    retry: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    upload: Upload
    repeats: bool

    def attempt(self, number: int) -> str:
        return self.base if number == 1 else f"{self.base}-{number}"


def _environment(pairs: Sequence[str]) -> dict[str, str]:
    values = {}
    for pair in pairs:
        name, given, value = pair.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise InputError(f"--env {name!r} is not the name of a variable: give NAME=VALUE.")
        if not given:
            raise InputError(
                f"--env {name}: values are not taken from the environment here, because a job shows them to everyone "
                "who may list jobs; set it on the cluster's nodes (a mounted file, a Secret) instead."
            )
        named = _SECRET_NAME.search(name) and not _PATH_NAME.search(name)
        if named or secret(value):
            raise InputError(
                f"--env {name} looks like a secret, and a job shows its environment to everyone who may list jobs: "
                "put it on the cluster's nodes (a mounted file, a Secret) instead."
            )
        values[name] = value
    return values


def secret(text: str) -> bool:
    """Whether the text holds a password in an address, or a key or token as its issuer writes them."""
    return redacted(text) != text or any(kind.code == "secret" for kind, _, _ in sensitive.find(text))


def name_of(text: str, longest: int = 47) -> str:
    """A Kubernetes name: the recipe's, in small letters and dashes, with a digest where something was lost."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"run-{plain}"
    if plain == text and len(plain) <= longest:
        return plain
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    return f"{plain[: longest - 7].rstrip('-')}-{digest}"


def describe(
    command: Command,
    *,
    working_dir: str = ".",
    env: Sequence[str] = (),
    excludes: Sequence[str] = (),
) -> Request:
    """What a command on a cluster is, checked here: nothing is sent yet.

    Raises InputError for a verb without a recipe, a recipe or data that would not travel along, a folder of 500 MiB,
    storage that only one node would see, and anything that looks like a secret.
    """
    verb, options, arguments = command.verb, command.options, command.arguments
    files = [v for v in command.values if "=" not in v]
    overrides = [v for v in command.values if "=" in v]
    if not files:
        raise InputError(f"{verb} has no recipe: give one after the verb, for example -- {verb} recipe.yaml.")
    for argument in arguments:
        if secret(argument):
            raise InputError(
                f"the argument {redacted(argument)[:20]}… holds a secret, and a job shows its command to everyone who "
                "may list jobs: give credentials to the cluster's nodes instead."
            )
    upload = survey(working_dir, tuple(excludes))
    upload.check()
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT), **_environment(env)}
    if verb == "deploy":
        name, recipe_hash = _served(files[0]), ""
        contents = _travelling([("the file", files[0])], upload)
    elif verb in _ACTIONS and not files[0].endswith((".yaml", ".yml")):
        name, recipe_hash, contents = files[0].partition("@")[0], "", {}
        _lasting(options["storage"], "--storage")
    else:
        recipe = recipes.load(files[0], overrides).recipe
        name, recipe_hash = recipe.name, recipe.hash
        if leaking := leaks(recipe.to_dict()):
            raise InputError(
                f"{', '.join(leaking)} of {files[0]} holds a password, and a recipe is kept in the run's manifest: "
                "give credentials to the cluster's nodes instead."
            )
        _lasting(recipe.storage, "storage")
        others = [*files[1:], *(v for name, v in options.items() if isinstance(v, str) and name != "space")]
        named = [("the recipe", files[0])] if Path(files[0]).is_file() else []
        named += [("the file", f) for f in others if Path(f).is_file()]
        if verb == "sweep":
            named.append(("the space", _space(options["space"])))
        contents = _travelling([*named, *needed(recipe)], upload)
    resumed = [] if verb != "sweep" or options["resume"] or options["fresh"] else ["--resume"]
    asked = [verb, recipe_hash, files, sorted(overrides), sorted(options.items()), contents]
    digest = hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()
    return Request(
        base=f"ft-ray-{verb}-{name_of(name.lower())}-{digest[:10]}",
        name=name,
        verb=verb,
        entrypoint=shlex.join(["ft-ray", *arguments]),
        retry=shlex.join(["ft-ray", *arguments, *resumed]),
        runtime_env={"working_dir": str(upload.folder), "excludes": list(upload.excludes), "env_vars": variables},
        metadata={"ft-ray": ft_ray.__version__, "run": name, "verb": verb, "recipe": recipe_hash[:16]},
        upload=upload,
        repeats=verb in _ACTIONS,
    )


def _lasting(storage: str, key: str) -> None:
    if "://" not in storage and not os.path.isabs(storage):
        raise InputError(
            f"{key} {storage!r} would be a folder inside the job's own copy of the working directory, which goes with "
            "the job: set it to an s3:// or gs:// address, or to a folder that all nodes share."
        )


def _served(file: str) -> str:
    """The name that a Ray Serve file serves. Raises InputError for what the cluster's replicas could not read."""
    served = read(file)
    if leaking := leaks(served.document):
        raise InputError(
            f"{', '.join(leaking)} of {file} holds a secret, and Serve shows its files to whoever has the cluster's "
            "token: name a file on the nodes or an address instead."
        )
    args = served.args
    places = {"keys": args.keys, "folder": args.folder, "storage": args.storage if args.model else None}
    for key, place in {**places, **{f"adapters.{name}": where for name, where in args.adapters.items()}}.items():
        if place is not None and "://" not in place and not os.path.isabs(place):
            raise InputError(
                f"{key} {place!r} of {file} is a path in this folder, which no replica has: set it to an s3:// or "
                "gs:// address, or to a path that all nodes share."
            )
    return served.name


def _space(named: str) -> str:
    """The file of a sweep's space. Raises RecipeError for one that is not there."""
    search_space.load(named)
    return str(search_space.find(named))


def leaks(value: Any, key: str = "") -> list[str]:
    """Dotted keys of a recipe whose text holds a secret."""
    if isinstance(value, dict):
        return [found for name, inner in value.items() for found in leaks(inner, f"{key}.{name}".lstrip("."))]
    if isinstance(value, list | tuple):
        return [found for inner in value for found in leaks(inner, key)]
    return [key] if isinstance(value, str) and secret(value) else []


def _travelling(named: Sequence[tuple[str, str]], upload: Upload) -> dict[str, str]:
    """SHA-256 of each file that the job needs, by path: other content is another job.

    Raises InputError for a file that the job would look for and not find in its working directory.
    """
    here, hashes = Path.cwd(), {}
    for key, path in named:
        full = Path(os.path.abspath(path))
        inside = full.is_relative_to(upload.folder) and here == upload.folder
        relative = full.relative_to(upload.folder).as_posix() if full.is_relative_to(upload.folder) else ""
        held = [name for name in upload.sizes if name == relative or name.startswith(f"{relative}/")]
        if os.path.isabs(path) or not inside or not held:
            if not full.exists():
                raise InputError(
                    f"{key} {path} does not exist here: mend the path, or give an address that the cluster reads."
                )
            why = "is left out by .gitignore, .rayignore or as a credential" if inside else "is not in it as named"
            raise InputError(
                f"{key} {path} would not travel along: it {why} (working directory {upload.folder}); move it, name it "
                "relative to that folder and run there, or give an address that the cluster reads."
            )
        for name in held:
            with (upload.folder / name).open("rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
