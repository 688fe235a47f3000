"""What the data check says: findings with their severity, and the gate that stops a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ft_ray.errors import DataError, GateRefused

__all__ = ["DataReport", "Finding", "Severity", "gate", "share"]

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """One judgement. `examples` are 'file:line excerpt', at most five; `count` the rows (or labels) concerned."""

    severity: Severity
    code: str
    message: str
    fix: str
    examples: list[str] = field(default_factory=list)
    count: int = 0


@dataclass(frozen=True)
class DataReport:
    """All findings, worst first, and the figures behind them. JSON-able through `to_dict`."""

    findings: list[Finding]
    stats: dict[str, Any]

    def of(self, severity: Severity) -> list[Finding]:
        return [f for f in self.findings if f.severity == severity]

    def codes(self) -> list[str]:
        return [f.code for f in self.findings]

    def summary(self) -> dict[str, Any]:
        """Counts by severity and the codes found: what a manifest keeps."""
        names: dict[Severity, str] = {"error": "errors", "warning": "warnings", "info": "notes"}
        return {**{name: len(self.of(severity)) for severity, name in names.items()}, "codes": self.codes()}

    def to_dict(self) -> dict[str, Any]:
        return {"findings": [asdict(f) for f in self.findings], "stats": self.stats}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> DataReport:
        return cls([Finding(**f) for f in value["findings"]], dict(value["stats"]))


def gate(report: DataReport, strict: bool = False) -> None:
    """Raises DataError for errors in the report; with `strict`, GateRefused for warnings."""
    errors, warnings = report.of("error"), report.of("warning")
    if errors:
        raise DataError(f"the data check found {_listed(errors)}")
    if strict and warnings:
        raise GateRefused(f"the data check (strict) found {_listed(warnings)}")


def _listed(findings: Sequence[Finding]) -> str:
    lines = [f"{f.code}: {f.message} {f.fix}" + (f" First: {f.examples[0]}" if f.examples else "") for f in findings]
    return lines[0] if len(lines) == 1 else f"{len(lines)} faults:\n  " + "\n  ".join(lines)


def share(part: int, whole: int, split: str = "") -> str:
    """'3 of 120 rows (2.5%)', or '… test rows …'."""
    return f"{part} of {whole} {split + ' ' if split else ''}rows ({100 * part / max(whole, 1):.1f}%)"
