"""Whether one more replica of a model fits beside what runs: what a change of versions asks before it starts one."""

from __future__ import annotations

from typing import Any

import psutil
import ray

from ft_ray.precision import serving_dtype
from ft_ray.served_model import Served, split

__all__ = ["missing_room"]


def missing_room(deployment: Any, copies: int, model: Served) -> str:
    """What the cluster lacks for `copies` of a deployment now, '' when it has room."""
    free = [dict(node) for node in ray._private.state.available_resources_per_node().values()]
    bundles = list(deployment._replica_config.placement_group_bundles or [deployment._replica_config.resource_dict])
    for bundle in bundles * copies:
        wanted = {k: v for k, v in bundle.items() if v}
        node = next((n for n in free if all(n.get(k, 0) >= v for k, v in wanted.items())), None)
        if node is None:
            return "it needs " + ", ".join(f"{v:g} {k}" for k, v in wanted.items()) + " more on one node than is free"
        for key, value in wanted.items():
            node[key] -= value
    engine = model.args.engine
    if len(free) == 1 and not any("GPU" in bundle for bundle in bundles):
        store, tree = split(model.source)
        weights = sum(file.stat().st_size for file in store.local(tree).glob("*.safetensors"))
        weights *= 2 if engine.dtype == "auto" and serving_dtype("auto", "cpu") == "float32" else 1
        needed = copies * (weights + (engine.kv_cache_gib or 1) * 2**30 + 1.5 * 2**30)
        if needed > psutil.virtual_memory().available:
            return f"it needs {needed / 2**30:.1f} GiB of memory more than is free"
    return ""
