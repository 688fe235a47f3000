"""transformers and TRL without the packages that they import only because these are installed.

transformers imports scikit-learn for a kind of assisted generation and SciPy for losses of object detection, TRL
imports Weights & Biases for a link in its model cards. Nothing here uses any through them, and a training process
spent a third of its imports on scikit-learn and W&B: 8.9 against 5.8 core-seconds, which every worker of every start
pays. A metric that imports scikit-learn itself and `tracking.to: [wandb]` get them as ever.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator

__all__ = ["collector_paused", "load_transformers", "load_trl"]

_CANDIDATES = "transformers.generation.candidate_generator"


@contextlib.contextmanager
def collector_paused(*, keep: bool = False) -> Iterator[None]:
    """For large imports: inside, no garbage is looked for.

    Modules make half a million objects that stay. Going through them again and again took 1.0 of the 4.7 core-seconds
    of the imports of a sweep's engine; the garbage that they leave is 9 MB. With `keep`, in a process of our own, what
    is there then is never looked through (docs.python.org, gc.freeze): whatever it is, a user's model too.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if keep:
            gc.freeze()
        if was:
            gc.enable()


@contextlib.contextmanager
def _without(*packages: str) -> Iterator[None]:
    """Python finds none of these packages inside, as far as they are not imported yet.

    None in sys.modules is Python's own way to say so (docs.python.org, sys.modules). Another thread's import of one of
    them fails meanwhile: none of ours does that while models are being loaded.
    """
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, name) is None:
                del sys.modules[name]


def load_transformers() -> None:
    """Imports the part of transformers that every tokenizer and model comes with, once."""
    if _CANDIDATES in sys.modules:
        return
    try:
        with _without("sklearn", "scipy"):  # transformers remembers the answers: its other modules do without them too
            importlib.import_module(_CANDIDATES)
            importlib.import_module("transformers.utils.import_utils").is_scipy_available()
    except ImportError:  # somebody asked transformers before whether scikit-learn is there, and it remembers that
        importlib.import_module(_CANDIDATES)


def load_trl() -> None:
    """Imports the base of TRL's trainers, once."""
    load_transformers()
    if "trl.trainer.base_trainer" not in sys.modules:
        with _without("wandb"):
            module = importlib.import_module("trl.trainer.base_trainer")
        if not hasattr(module, "wandb"):  # its model card asks once more whether W&B is there, and then uses the name
            module.is_wandb_available = lambda: False  # type: ignore[attr-defined]
