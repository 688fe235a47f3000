"""Fine-tune language models on Ray: from a file of examples to a served model, with gates that measure.

    import ft_ray
    recipe = ft_ray.Recipe.load("recipe.yaml", ["optim.lr=1e-4"])
    manifest = ft_ray.run(recipe)

Names are loaded at first use, so that importing the package costs neither torch nor ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft_ray.errors import FtRayError
    from ft_ray.fetching import fetch
    from ft_ray.importing import import_adapter
    from ft_ray.init_recipe import init
    from ft_ray.manifest import Manifest
    from ft_ray.pipeline import check, evaluate, merge, run, train
    from ft_ray.planning import plan
    from ft_ray.promotion import compare, promote, rollback
    from ft_ray.recipe import Recipe
    from ft_ray.reporting import diagnose, export, write_report
    from ft_ray.serving import serve
    from ft_ray.sweeping import sweep

__version__ = "0.1.0"

__all__ = [
    "FtRayError",
    "Manifest",
    "Recipe",
    "__version__",
    "check",
    "compare",
    "diagnose",
    "evaluate",
    "export",
    "fetch",
    "import_adapter",
    "init",
    "merge",
    "plan",
    "promote",
    "rollback",
    "run",
    "serve",
    "sweep",
    "train",
    "write_report",
]

_HOMES = {
    "check": "pipeline", "train": "pipeline", "merge": "pipeline", "evaluate": "pipeline", "run": "pipeline",
    "plan": "planning", "compare": "promotion", "promote": "promotion", "rollback": "promotion", "serve": "serving",
    "sweep": "sweeping",
    "fetch": "fetching", "init": "init_recipe", "import_adapter": "importing",
    "diagnose": "reporting", "export": "reporting", "write_report": "reporting",
    "FtRayError": "errors", "Manifest": "manifest", "Recipe": "recipe",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ft_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ft_ray.{_HOMES[name]}"), name)
