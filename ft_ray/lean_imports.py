"""transformers, TRL and Ray Tune without the packages that they import only because these are installed.

transformers imports scikit-learn for a kind of assisted generation and SciPy for losses of object detection, TRL
imports Weights & Biases for a link in its model cards. Nothing here uses any through them, and a training process
spent a third of its imports on scikit-learn and W&B: 8.9 against 5.8 core-seconds, which every worker of every start
pays. A metric that imports scikit-learn itself and `tracking.to: [wandb]` get them as ever. Ray Tune imports Ray Data
and pandas, for results as tables and for data sets that are given to trials: in the process of a thin trial half of its
imports and of its memory.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator, MutableSequence, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["collector_paused", "load_transformers", "load_trl", "load_tune"]

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


def load_tune() -> None:
    """Imports Ray Tune for a process that runs a trial and nothing else, once: without Ray Data and pandas.

    0.36 instead of 0.73 s of a core, and 57 instead of 112 MB (Ray 2.60).
    """
    if "ray.tune" in sys.modules:
        return
    before = set(sys.modules)
    try:
        with _placeholders("pandas", "ray.data"):
            importlib.import_module("ray.tune")
    except Exception:  # a version of Ray that makes more of them: whole, then
        for name in [name for name in set(sys.modules) - before if name.startswith("ray.")]:
            del sys.modules[name]  # others found them whole, and NumPy cannot be imported twice
        importlib.import_module("ray.tune")


class _Name(type):
    """The type of what stands for a name of a package that was not imported: a class, for annotations and bases."""

    def __getattr__(cls, name: str) -> Any:
        return _named(name)


def _named(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Name(name, (), {})


class _Placeholder(ModuleType):
    """A package that has every name while others are imported. Afterwards it is the real one, imported when used."""

    real = False
    __path__: MutableSequence[str] = []  # noqa: RUF012 - as of every package

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name) if self.real else _named(name)


class _Finder(MetaPathFinder, Loader):
    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages
        self.made: dict[str, _Placeholder] = {}

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        ours = any(fullname == name or fullname.startswith(f"{name}.") for name in self.packages)
        return ModuleSpec(fullname, self, is_package=True) if ours else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self.made[spec.name] = _Placeholder(spec.name)
        return self.made[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextlib.contextmanager
def _placeholders(*packages: str) -> Iterator[None]:
    """Inside, these packages are placeholders, as far as they are not imported yet; an import afterwards is real."""
    finder = _Finder(packages)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name, module in finder.made.items():
            module.real = True
            if sys.modules.get(name) is module:
                del sys.modules[name]
            parent, _, child = name.rpartition(".")
            if parent in sys.modules and getattr(sys.modules[parent], child, None) is module:
                delattr(sys.modules[parent], child)
