"""A Ray Serve file with one application of ours: a file of `serve/`, or what `ft-ray serve --print-config` wrote.

Read strictly, and without Ray: Ray's own schemas let misspelt keys through.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ft_ray.errors import InputError
from ft_ray.serve_args import ServeArgs, parse

__all__ = ["ServeFile", "local", "read"]

_ANYWHERE = "0.0.0.0"  # where Serve listens for a file that names no host


@dataclass(frozen=True)
class ServeFile:
    """`text` as it was read, `document` what it says, `name`, `args` and `route` those of its application."""

    text: str
    document: dict[str, Any]
    name: str
    args: ServeArgs
    route: str = "/"


def read(file: str | Path) -> ServeFile:
    """Raises InputError for what is no Ray Serve file with one application, for arguments that do not exist, and for an
    address that other machines reach without API keys.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
        document: Any = yaml.safe_load(text)
        (application,) = document["applications"]
        route = str(application.get("route_prefix", "/"))
        given = ServeFile(text, document, str(application["name"]), parse(application["args"]), route)
        host = str((document.get("http_options") or {}).get("host") or _ANYWHERE)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} is no Ray Serve file with one application ({error}).") from error
    if not local(host) and given.args.keys is None:
        raise InputError(
            f"{file} listens on {host}, which can be reached from other machines, and asks for no API key: set keys: "
            "in its args to a file made by `ft-ray keys issue FILE LABEL`, or http_options.host to 127.0.0.1."
        )
    return given


def local(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
