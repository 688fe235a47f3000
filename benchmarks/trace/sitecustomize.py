"""Python runs this first in every process of `startup.py --trace`: when it started, and what its imports took."""

from __future__ import annotations

import builtins
import os
import sys
import time
from typing import Any

_WATCHED = {
    "accelerate", "bitsandbytes", "datasets", "deepspeed", "ft_ray.chat", "ft_ray.sft", "ft_ray.train_control",
    "ft_ray.train_rank", "ft_ray.trainer", "ft_ray.upload", "mlflow", "pandas", "peft", "pyarrow", "ray", "ray.data",
    "ray.train", "ray.train.torch", "sklearn", "torch", "torch._dynamo", "transformers", "trl",
}  # fmt: skip
_import, _out = builtins.__import__, os.environ.get("FT_RAY_TRACE", "")


def _say(what: str) -> None:
    with open(_out, "a", encoding="utf-8") as file:
        file.write(f"{time.time():.2f} {os.getpid()} {what}\n")


def _timed(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    if level or name not in _WATCHED or name in sys.modules:
        return _import(name, globals, locals, fromlist, level)
    began, cpu = time.time(), time.process_time()
    try:
        return _import(name, globals, locals, fromlist, level)
    finally:
        if time.time() - began > 0.05:
            _say(f"{name}: {time.time() - began:.2f} s, {time.process_time() - cpu:.2f} s of a core")


if _out:
    with open("/proc/self/cmdline", "rb") as _file:
        _command = _file.read().replace(b"\0", b" ").decode(errors="replace")
    _say(f"starts, child of {os.getppid()}: ...{_command[-160:]}")
    builtins.__import__ = _timed
