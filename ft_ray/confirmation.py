"""Is the sweep's best better than the default, or only lucky? Paired differences with intervals, and a rule.

The best of many trials is better on paper than it is: its luck was chosen with it. So the top settings and the default
are trained again with fresh seeds, and compared on the same validation rows and the same seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ft_ray.errors import InputError

__all__ = ["DEFAULT", "Comparison", "Confirmation", "SeedRun", "confirm", "match", "paired_interval"]

DEFAULT = "default"
"""The name of the recipe's own values among what is compared."""

_NUMERIC = 0.01  # packed and alone differ in dropout masks, start weights and rounding: 1% of the loss at the least
_UNKNOWN = 0.10  # where the seeds' own scatter was never measured


@dataclass(frozen=True)
class SeedRun:
    """One training with one seed: (sum of token losses, trained tokens) of every validation row, in order."""

    rows: tuple[tuple[float, int], ...]

    @property
    def loss(self) -> float:
        tokens = sum(n for _, n in self.rows)
        return math.fsum(loss for loss, _ in self.rows) / tokens if tokens else math.nan


@dataclass(frozen=True)
class Comparison:
    """One setting against the default: `difference` of mean losses (below 0 is better) and its interval."""

    name: str
    losses: tuple[float, ...]
    difference: float
    low: float
    high: float

    @property
    def loss(self) -> float:
        return math.fsum(self.losses) / len(self.losses)

    @property
    def better(self) -> bool:
        return self.high < 0


@dataclass(frozen=True)
class Confirmation:
    """What the confirmation found. `winner` is the name of the setting to promote: `DEFAULT` when none is better."""

    comparisons: tuple[Comparison, ...]
    default_losses: tuple[float, ...]
    winner: str
    verdict: str
    confidence: float

    def losses_of(self, name: str) -> tuple[float, ...]:
        return self.default_losses if name == DEFAULT else next(c.losses for c in self.comparisons if c.name == name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Confirmation:
        """What `to_dict` wrote."""
        found = [
            Comparison(c["name"], tuple(c["losses"]), c["difference"], c["low"], c["high"])
            for c in values["comparisons"]
        ]
        losses = tuple(values["default_losses"])
        return cls(tuple(found), losses, values["winner"], values["verdict"], values["confidence"])

    def to_dict(self) -> dict[str, Any]:
        return {
            "winner": self.winner,
            "verdict": self.verdict,
            "confidence": self.confidence,
            "default_losses": list(self.default_losses),
            "comparisons": [
                {"name": c.name, "losses": list(c.losses), "difference": c.difference, "low": c.low, "high": c.high,
                 "better": c.better} for c in self.comparisons
            ],
        }  # fmt: skip


def paired_interval(
    one: Sequence[SeedRun], other: Sequence[SeedRun], groups: Sequence[str] | None = None, confidence: float = 0.95
) -> tuple[float, float, float]:
    """(difference, low, high) of the mean token loss of `one` minus `other`, paired by seed and by validation row.

    Two things vary: the seed and which rows happened to be in the validation set. Their variances are estimated apart
    and added; the number of degrees of freedom of the sum is Satterthwaite's (Biometrics Bulletin 2, 1946, 110-114).
    Both estimates hold the noise of a single row under a single seed, so the interval is too wide rather than too
    narrow. With three seeds a Student interval stays honest where a bootstrap over three values does not. Rows of one
    prompt group (`groups`, one name a row) count as one observation. That seeds and data both count when methods are
    compared: Bouthillier et al., arXiv:2103.03098. Raises InputError when the runs are not of the same rows.
    """
    if len(one) != len(other) or not one:
        raise InputError(f"{len(one)} seeds cannot be paired with {len(other)}: train both with the same seeds.")
    shapes = {tuple(n for _, n in run.rows) for run in (*one, *other)}
    if len(shapes) != 1:
        raise InputError("the runs were not measured on the same validation rows: measure all of them again.")
    tokens = shapes.pop()
    total = sum(tokens)
    if not total:
        raise InputError("the validation rows hold no trained token: raise data.split.validation.")
    seeds = len(one)
    apart = [
        [a - b for (a, _), (b, _) in zip(run.rows, against.rows, strict=True)]
        for run, against in zip(one, other, strict=True)
    ]
    each = [math.fsum(found) / total for found in apart]
    mean = math.fsum(each) / seeds
    # A ratio of sums: each cluster's share in the error of the mean (Cochran, Sampling Techniques, 1977, chapter 6).
    clusters: dict[str, float] = {}
    for row, count in enumerate(tokens):
        error = math.fsum(found[row] for found in apart) / seeds - mean * count
        name = groups[row] if groups is not None else str(row)
        clusters[name] = clusters.get(name, 0.0) + error / total
    n = len(clusters)
    of_rows = n / (n - 1) * math.fsum(error**2 for error in clusters.values()) if n > 1 else math.inf
    of_seeds = math.fsum((d - mean) ** 2 for d in each) / (seeds - 1) / seeds if seeds > 1 else 0.0
    variance = of_rows + of_seeds
    if not math.isfinite(variance):
        return mean, -math.inf, math.inf
    if variance == 0:
        return mean, mean, mean
    freedom = variance**2 / ((of_rows**2 / (n - 1)) + (of_seeds**2 / (seeds - 1) if seeds > 1 else 0.0))
    half = _student(confidence, freedom) * math.sqrt(variance)
    return mean, mean - half, mean + half


def confirm(
    runs: Mapping[str, Sequence[SeedRun]], *, groups: Sequence[str] | None = None, confidence: float = 0.95
) -> Confirmation:
    """Compares every setting in `runs` with the one named `DEFAULT`.

    Rule: a setting is better than the default when its whole interval lies below 0. The intervals hold together with
    `confidence` (Bonferroni over the settings). Among the better ones the lowest mean loss wins; with none, the default
    stays, whatever the means say.
    """
    if DEFAULT not in runs or len(runs) < 2:
        raise InputError("a confirmation needs the default and at least one other setting.")
    default = runs[DEFAULT]
    each = 1 - (1 - confidence) / (len(runs) - 1)
    comparisons = []
    for name, found in runs.items():
        if name != DEFAULT:
            difference, low, high = paired_interval(found, default, groups, each)
            comparisons.append(Comparison(name, tuple(run.loss for run in found), difference, low, high))
    comparisons.sort(key=lambda c: (c.difference, c.name))
    better = [c for c in comparisons if c.better]
    best = better[0] if better else comparisons[0]
    seeds = f"{len(default)} seed{'s' if len(default) > 1 else ''} and {len(default[0].rows)} validation rows"
    interval = (
        f"difference of the loss {best.difference:+.4f}, {confidence:.0%} interval [{best.low:+.4f}, {best.high:+.4f}]"
    )
    if better:
        verdict = f"{best.name} is better than the default ({interval}, paired over {seeds})."
    else:
        verdict = f"no better than the default: {best.name} came closest ({interval}, paired over {seeds})."
    losses = tuple(run.loss for run in default)
    return Confirmation(tuple(comparisons), losses, best.name if better else DEFAULT, verdict, confidence)


def match(loss: float, seeds: Sequence[float], confidence: float = 0.95) -> tuple[bool, float, float]:
    """(whether, low, high): does one more training with loss `loss` belong to those of `seeds`?

    The interval is Student's prediction interval for one more value, mean ± t·s·sqrt(1 + 1/n) (Hahn and Meeker,
    Statistical Intervals, 1991, section 4.7), and at least 1% of the loss wide on either side; with a single value the
    scatter is not known and 10% is allowed. No more than that with several either, as far as they themselves lie
    inside: with two, Student's factor is 12.7, and hardly any training would be refused.
    """
    if not seeds:
        raise InputError("there is no loss to compare the retrained winner with: run the sweep again.")
    n, mean = len(seeds), math.fsum(seeds) / len(seeds)
    half = _UNKNOWN * abs(mean)
    if n > 1:
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in seeds) / (n - 1))
        widest = max(_UNKNOWN * abs(mean), *(abs(x - mean) for x in seeds))
        half = max(_NUMERIC * abs(mean), _student(confidence, n - 1) * deviation * math.sqrt(1 + 1 / n))
        half = min(half, widest)
    return mean - half <= loss <= mean + half, mean - half, mean + half


def _student(confidence: float, freedom: float) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, freedom))
