"""A Ray Serve file with one application of ours: a file of `serve/`, or what `ft-ray serve --print-config` wrote.

Read strictly, and without Ray: Ray's own schemas let misspelt keys through.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ft_ray.errors import InputError
from ft_ray.serve_args import ServeArgs, parse

__all__ = ["ServeFile", "read"]


@dataclass(frozen=True)
class ServeFile:
    """`text` as it was read, `document` what it says, `name`, `args` and `route` those of its application."""

    text: str
    document: dict[str, Any]
    name: str
    args: ServeArgs
    route: str = "/"


def read(file: str | Path) -> ServeFile:
    """Raises InputError for what is no Ray Serve file with one application, and for arguments that do not exist."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        document: Any = yaml.safe_load(text)
        (application,) = document["applications"]
        route = str(application.get("route_prefix", "/"))
        return ServeFile(text, document, str(application["name"]), parse(application["args"]), route)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} is no Ray Serve file with one application ({error}).") from error
