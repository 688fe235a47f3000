"""What the process of a thin trial imports first: see `Thin`."""

from __future__ import annotations

import ray
from ray._private.worker import global_worker

from ft_ray.lean_imports import load_tune

__all__ = ["Thin"]

if global_worker.mode == ray.WORKER_MODE:  # whoever runs the sweep needs Ray Tune whole
    load_tune()


class Thin:
    """Comes first among the bases of the class that Tune makes of a sweep's function (`__mixins__`, `wrap_function`).

    A trial's process imports them in their order when it is given that class: this module before Ray Tune.
    """
