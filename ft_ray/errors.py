"""The exception tree. Every error meant for a user is an `FtRayError` with an exit code.

    FtRayError                  1  something failed while running
    ├── InputError              2  what the user gave cannot work as it is
    │   ├── RecipeError            the recipe or an override; carries every fault at once
    │   ├── DataError              a data file or a row in it
    │   ├── ModelError             a model, tokenizer or adapter that cannot be used
    │   └── MissingPackageError    an optional package that this step needs
    ├── StorageError            1  the run folder cannot be read or written
    │   └── DamagedError           what lies there is not what was recorded
    ├── TrainingError           1  training failed: a worker was lost too often
    │   ├── OutOfMemory            the GPU's or the machine's memory did not hold a step
    │   └── Diverged               the loss or the gradient is no number any more
    ├── ServingError            1  the endpoint did not come up
    ├── GateRefused             3  a gate measured something and said no
    │   └── BudgetSpent            hours or money ran out; there is a checkpoint to go on from
    └── Interrupted           130  stopped by a signal; the run can be resumed

Messages are one sentence: what happened, where, and what to do. Asserts guard invariants only.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "BudgetSpent",
    "DamagedError",
    "DataError",
    "Diverged",
    "FtRayError",
    "GateRefused",
    "InputError",
    "Interrupted",
    "MissingPackageError",
    "ModelError",
    "OutOfMemory",
    "RecipeError",
    "ServingError",
    "StorageError",
    "TrainingError",
]


class FtRayError(Exception):
    """Base of every error meant for a user. `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(FtRayError):
    exit_code = 2


class RecipeError(InputError):
    """All faults of a recipe at once, each already carrying its file and line."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))

    def __reduce__(self) -> tuple[type[RecipeError], tuple[list[str]]]:
        return (RecipeError, (self.faults,))


class DataError(InputError):
    pass


class ModelError(InputError):
    pass


class MissingPackageError(InputError):
    """`package` is not installed; `extra` is the extra of this project that brings it ("": the project itself)."""

    def __init__(self, package: str, needed_for: str, extra: str) -> None:
        self.package, self.needed_for, self.extra = package, needed_for, extra
        what = f"'ft-ray[{extra}]'" if extra else "ft-ray"
        super().__init__(
            f"{needed_for} needs the package {package!r}, which is not installed: run pip install {what}."
        )

    def __reduce__(self) -> tuple[type[MissingPackageError], tuple[str, str, str]]:
        return (MissingPackageError, (self.package, self.needed_for, self.extra))


class StorageError(FtRayError):
    pass


class DamagedError(StorageError):
    """A file is missing or differs from its record: reading it again would not help, an earlier copy may."""


class TrainingError(FtRayError):
    pass


class OutOfMemory(TrainingError):
    """The same step would fail again: what may help is a smaller batch, shorter rows or a smaller model."""


class Diverged(TrainingError):
    """The same step would diverge again: what may help is a lower learning rate, or other rows."""


class ServingError(FtRayError):
    pass


class GateRefused(FtRayError):
    exit_code = 3


class BudgetSpent(GateRefused):
    pass


class Interrupted(FtRayError):
    exit_code = 130
