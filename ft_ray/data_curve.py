"""Would more data help? The loss against the number of training rows, from a sweep that searched `data.fraction`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ft_ray.sweep_results import SweepResult

__all__ = ["FRACTION", "DataCurve", "data_curve", "fit"]

FRACTION = "data.fraction"
_EXPONENTS = [0.05 * i for i in range(1, 41)]
_WORTHWHILE = 0.02  # a doubling that is predicted to gain less than 2% of the loss is not worth collecting for


@dataclass(frozen=True)
class DataCurve:
    """`points` are (rows, validation loss of the best trial there); `predicted` the loss at twice the most rows.

    The fit is loss = floor + scale * rows^-exponent; with three sizes or fewer it has no floor of its own (0).
    """

    points: tuple[tuple[int, float], ...]
    floor: float
    scale: float
    exponent: float
    spread: float
    predicted: float
    advice: str

    def at(self, rows: float) -> float:
        return float(self.floor + self.scale * rows**-self.exponent)


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """(floor, scale, exponent) of a power law through (rows, loss), by least squares.

    Losses of neural models fall as a power of the number of examples (arXiv:1712.00409), towards a floor that data
    do not lower. The floor needs a fourth size to be told from the exponent; it is not fitted with fewer.
    """
    best = (math.inf, 0.0, 0.0, 0.0)
    if len(points) < 4:
        xs, ys = [math.log(n) for n, _ in points], [math.log(max(loss, 1e-9)) for _, loss in points]
        slope, intercept, _ = _line(xs, ys)
        return 0.0, math.exp(intercept), -slope
    for exponent in _EXPONENTS:
        scale, floor, error = _line([n**-exponent for n, _ in points], [loss for _, loss in points])
        if floor < 0:  # no loss is below 0: the same law without a floor
            powers = [n**-exponent for n, _ in points]
            scale = sum(p * loss for p, (_, loss) in zip(powers, points, strict=True)) / sum(p * p for p in powers)
            floor, error = 0.0, sum((scale * p - loss) ** 2 for p, (_, loss) in zip(powers, points, strict=True))
        best = min(best, (error, floor, scale, exponent))
    return best[1], best[2], best[3]


def _line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """(slope, intercept, squared error) of a least-squares line."""
    mean_x, mean_y = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    across = math.fsum((x - mean_x) ** 2 for x in xs)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / across if across else 0.0
    intercept = mean_y - slope * mean_x
    return slope, intercept, math.fsum((slope * x + intercept - y) ** 2 for x, y in zip(xs, ys, strict=True))


def data_curve(result: SweepResult, rows: int) -> DataCurve | None:
    """The curve of a sweep whose trials differ in data.fraction; None with fewer than two whole sizes.

    `rows`: training rows at fraction 1. At each size the best trial stands for it, so that settings tuned for little
    data do not speak for much. Only trials that took all their steps count.
    """
    best: dict[float, float] = {}
    every: dict[float, list[float]] = {}
    for trial in result.trials:
        fraction = trial.config.get(FRACTION)
        if fraction is None or trial.status != "done" or trial.best_loss is None:
            continue
        share = float(fraction)
        every.setdefault(share, []).append(trial.best_loss)
        best[share] = min(best.get(share, math.inf), trial.best_loss)
    if len(best) < 2:
        return None
    points = tuple((max(1, round(rows * share)), best[share]) for share in sorted(best))
    floor, scale, exponent = fit(points)
    residual = [abs(floor + scale * n**-exponent - loss) for n, loss in points]
    spread = max(residual)
    most, last = points[-1]
    predicted = floor + scale * (2 * most) ** -exponent
    counts = min(len(found) for found in every.values())
    curve = DataCurve(points, floor, scale, exponent, spread, predicted, "")
    return DataCurve(points, floor, scale, exponent, spread, predicted, _advice(curve, most, last, counts))


def _advice(curve: DataCurve, most: int, last: float, trials: int) -> str:
    """One sentence: what was seen, what is predicted, what to do, and how far to believe it."""
    first_rows, first = curve.points[0]
    seen = f"validation loss {first:.3f} at {first_rows:,} rows, {last:.3f} at {most:,}"
    gain = last - curve.predicted
    how = f"{len(curve.points)} sizes, {trials} trial{'s' if trials > 1 else ''} at the fewest"
    if first <= last:
        return f"{seen}: more rows did not lower the loss here ({how}), so look at their quality before adding more."
    if gain < _WORTHWHILE * last or gain < curve.spread:
        return (
            f"{seen}; twice the rows are predicted to give {curve.predicted:.3f}, a gain within "
            f"{'the scatter of the fit' if gain < curve.spread else 'two per cent'}: more data of this kind will "
            f"help little ({how})."
        )
    return (
        f"{seen}; twice the rows ({2 * most:,}) are predicted to give about {curve.predicted:.3f}: more data of this "
        f"kind should help ({how})."
    )
