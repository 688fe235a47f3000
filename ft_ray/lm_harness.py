"""Public benchmarks through EleutherAI's lm-eval (an optional extra): the tasks of `evaluation.lm_eval`.

The harness loads the model by itself through transformers. Its data sets come from a hub or its cache; tasks of your
own (`include`) may name local files, and need neither.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from ft_ray.errors import InputError, MissingPackageError
from ft_ray.recipe import Harness

__all__ = ["check", "run"]


def check(settings: Harness) -> None:
    """Before hours of training: whether package and task files are there. Raises MissingPackageError, InputError."""
    folder = settings.include
    if folder is not None and not any(Path(folder).glob("**/*.yaml")):
        raise InputError(f"evaluation.lm_eval.include {folder} holds no task file (*.yaml): check the folder.")
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingPackageError("lm-eval", f"evaluation.lm_eval ({', '.join(settings.tasks)})", "lm-eval")


def run(settings: Harness, folder: Path, device: str | None = None) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of the model in `folder`. Raises MissingPackageError, InputError."""
    check(settings)
    evaluate: Any = importlib.import_module("lm_eval").simple_evaluate
    manager: Any = importlib.import_module("lm_eval.tasks").TaskManager
    try:
        found = evaluate(
            model="hf",
            model_args={"pretrained": str(folder)},
            tasks=list(settings.tasks),
            num_fewshot=settings.few_shot,
            limit=settings.limit,
            device=device,
            task_manager=manager(include_path=settings.include),
        )
    except (KeyError, ValueError, OSError, ConnectionError) as error:  # an unknown task, or data that cannot be had
        raise InputError(
            f"evaluation.lm_eval: {', '.join(settings.tasks)} cannot be measured ({str(error).splitlines()[0]}): "
            "check the names, and that lm-eval's cache holds the data sets."
        ) from error
    return {task: figures(values) for task, values in found["results"].items()}


def figures(values: dict[str, Any]) -> dict[str, float]:
    """'acc,none' -> 'acc'; what is no number (an alias) is left out."""
    kept = {k.removesuffix(",none"): v for k, v in values.items() if isinstance(v, int | float)}
    return {k: float(v) for k, v in kept.items()}
