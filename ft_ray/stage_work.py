"""What merging and evaluating do wherever they run: in the driver, or in a Ray task on a node that has the GPU.

Plain functions of values that can be sent. They write into the run folder by its address, in committed steps, so that
a task which is begun again on another node leaves nothing half done.
"""

from __future__ import annotations

import contextlib
from typing import Any

from ft_ray.base_model import ModelFiles
from ft_ray.chat import Chat
from ft_ray.prepared_data import Prepared
from ft_ray.recipe import Recipe
from ft_ray.run_folder import Listener
from ft_ray.storage import Store

__all__ = ["merge", "score"]


class _TooFar(Exception):
    """Raised inside a staged merge: what was staged goes."""


def merge(
    recipe: Recipe, files: ModelFiles, chat: Chat, prepared: Prepared, address: str, tree: str, *, on_event: Listener
) -> dict[str, Any]:
    """Merges `tree` of the run folder at `address`; commits `merged` unless it is further off than the gate allows.

    Returns the figures of `merging.merge_stage`; `kl` over `evaluation.parity_kl` says that nothing was committed.
    """
    from ft_ray import merging

    store = Store(address)
    metrics: dict[str, Any] = {}
    with contextlib.suppress(_TooFar), store.stage("merged") as out:
        metrics = merging.merge_stage(recipe, files, chat, prepared, store.local(tree), out, on_event=on_event)
        if not metrics["kl"] <= recipe.evaluation.parity_kl:
            raise _TooFar
    return metrics


def score(
    recipe: Recipe,
    files: ModelFiles,
    chat: Chat,
    prepared: Prepared,
    address: str,
    split: str,
    remote: tuple[str, str] | None,
    *,
    on_event: Listener,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Evaluates on `split` and writes the predictions into the run folder at `address`; see `scorecard.score_run`.

    `remote` is (url, model) of an endpoint to measure beside; its key comes from the environment of the node.
    """
    from ft_ray.scorecard import score_run

    endpoint = None
    if remote is not None:
        from ft_ray.remote_model import OpenAIModel

        endpoint = OpenAIModel(*remote)
    store = Store(address)
    return score_run(recipe, files, chat, prepared, store, split=split, on_event=on_event, endpoint=endpoint)
