"""One finding about a run, as `diagnosis` and its parts make it: what, how bad, why, and what to change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ft_ray.recipe import Recipe
from ft_ray.remedies import remedy

__all__ = ["Diagnosis", "Record", "Severity", "made", "worst_first"]

Record = Mapping[str, Any]
Severity = Literal["error", "warning", "info"]
_WORST = {"error": 0, "warning": 1, "info": 2}


@dataclass(frozen=True)
class Diagnosis:
    """One finding. `patch` maps dotted recipe keys to new values; {} where the recipe is not what has to change."""

    code: str
    severity: Severity
    sentence: str
    evidence: dict[str, Any] = field(default_factory=dict)
    patch: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def made(code: str, severity: Severity, sentence: str, recipe: Recipe, **evidence: Any) -> Diagnosis:
    """A finding with the remedy for it."""
    return Diagnosis(code, severity, sentence, evidence, remedy(code, recipe, evidence))


def worst_first(found: Iterable[Diagnosis]) -> list[Diagnosis]:
    return sorted(found, key=lambda d: _WORST[d.severity])
