"""Environment variables that hold for a while, and one that Ray's processes are started with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

__all__ = ["HAPROXY", "SERVE_DOORS", "environment"]

HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
"""Set to 1 where Serve has HAProxy for its proxy (direct mode)."""

SERVE_DOORS = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "ft_ray.serve_doors.middleware"}
"""For the processes of a cluster in which ft_ray can be imported, from `ray start` on."""


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets `values` in this process, and in what it starts meanwhile; puts back what was there before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
