"""A sweep in pictures: parallel coordinates, loss, confirmation, importance, more data; PNG and one HTML page.

The page is one file: pictures inside it, nothing asked of any other machine, readable on a phone and in the dark.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from ft_ray.charts import ACCENT, SECOND, Axis, Bar, Line, bars, curves, parallel, png, svg
from ft_ray.confirmation import Confirmation
from ft_ray.data_curve import DataCurve
from ft_ray.sweep_importance import Importance, comparable, importance
from ft_ray.sweep_results import SweepResult, TrialResult

__all__ = ["figures", "page", "pictures", "ranked"]

_NEXT = 3
_LOG = ("optim.lr", "optim.weight_decay")


def ranked(result: SweepResult) -> list[TrialResult]:
    """Trials with a loss, best first; among equals the earlier one."""
    known = [t for t in result.trials if t.best_loss is not None]
    return sorted(known, key=lambda t: (t.best_loss, t.id))


def figures(
    result: SweepResult,
    *,
    curve: DataCurve | None = None,
    found: Importance | None = None,
    confirmed: Confirmation | None = None,
) -> dict[str, tuple[Figure, str]]:
    """name -> (figure, what it shows in a sentence). Empty where no trial has a loss."""
    order = ranked(result)
    if not order:
        return {}
    colours = {t.id: SECOND for t in order[1 : 1 + _NEXT]} | {order[0].id: ACCENT}
    out = {"parallel": (_parallel(result, order, colours), "A line a trial: orange the best, blue the next three.")}
    out["loss"] = (
        _loss(result, order, colours),
        "Validation loss. A line that ends early was stopped by the scheduler; the best step of a trial counts.",
    )
    if confirmed is not None:
        out["confirmation"] = (_confirmed(confirmed), confirmed.verdict[:1].upper() + confirmed.verdict[1:])
    if found is not None:
        shares = [Bar(key, mean, low, high) for key, (mean, low, high) in found.shares.items()]
        out["importance"] = (
            bars(shares, title="What moved the loss", x="share of the variance of the validation loss"),
            f"Bars are means of eight forests, whiskers their least and most. {found.caveat}",
        )
    if curve is not None:
        out["data"] = (_data(curve), curve.advice[:1].upper() + curve.advice[1:])
    return out


def _parallel(result: SweepResult, order: Sequence[TrialResult], colours: Mapping[str, str]) -> Figure:
    keys = list(dict.fromkeys(k for t in order for k in t.config))
    axes = []
    for key in keys:
        values = [_plain(t.config.get(key)) for t in order]
        if len({str(v) for v in values}) > 1:
            axes.append(Axis(key, values, log=key in _LOG))
    pairs, step = comparable(result)
    at = {trial.id: loss for trial, loss in pairs}
    label = "loss" if step is None else f"loss at step {step}"
    axes.append(Axis(label, [at.get(t.id) for t in order]))
    return parallel(axes, [colours.get(t.id) for t in order], title=f"{len(order)} trials", height=3.8)


def _plain(value: Any) -> float | str | bool | None:
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _loss(result: SweepResult, order: Sequence[TrialResult], colours: Mapping[str, str]) -> Figure:
    lines = []
    for trial in reversed(order):
        points = [(float(p.step), p.validation_loss) for p in trial.history if p.validation_loss is not None]
        label = f"{trial.id} (best)" if trial is order[0] else ""
        lines.append(Line(points, label=label, colour=colours.get(trial.id)))
    return curves(lines, title="Validation loss of every trial", x="optimizer step", y="nats a trained token")


def _confirmed(confirmed: Confirmation) -> Figure:
    found = [
        Bar(c.name, c.difference, c.low, c.high, ACCENT if c.name == confirmed.winner else SECOND)
        for c in confirmed.comparisons
    ]
    label = "validation loss minus the default's; left of 0 is better"
    return bars(found, title="Better than the recipe's own values?", x=label, zero=True)


def _data(curve: DataCurve) -> Figure:
    sizes = [n for n, _ in curve.points]
    ahead = [*sizes, 2 * sizes[-1]]
    between = [sizes[0] * (ahead[-1] / sizes[0]) ** (i / 40) for i in range(41)]
    return curves(
        [
            Line([(float(n), loss) for n, loss in curve.points], "best trial of each size", ACCENT, dots=True),
            Line([(n, curve.at(n)) for n in between], "power law through them", SECOND, dashed=True),
        ],
        title="Would more data help?", x="training rows", y="validation loss, nats a token", log_x=True,
        ticks_x=ahead,
    )  # fmt: skip


def pictures(
    result: SweepResult, *, curve: DataCurve | None = None, confirmed: Confirmation | None = None
) -> tuple[dict[str, bytes], str]:
    """(PNG files by name, the page as HTML text)."""
    drawn = figures(result, curve=curve, found=importance(result), confirmed=confirmed)
    files = {f"{name}.png": png(figure) for name, (figure, _) in drawn.items()}
    return files, page(result, {name: (svg(f, f"{result.name}: {name}"), said) for name, (f, said) in drawn.items()})


_STYLE = """
:root { color-scheme: light dark; --page: #fdfeff; --faint: #a9aaab; --ink: #1a1b1c; --accent: #d9480f }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --faint: #5b6068; --ink: #e4e6ea; --accent: #ff8a4c } }
body { margin: 0 auto; padding: 1rem; max-width: 42rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.3rem; margin: 0 } p { margin: .4rem 0 } figure { margin: 1.6rem 0 }
figcaption { font-size: .9rem; opacity: .85 } svg { width: 100%; height: auto; display: block }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; white-space: nowrap }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--faint) }
th:first-child, td:first-child { text-align: left } tr.best { color: var(--accent); font-weight: 600 }
"""


def page(result: SweepResult, drawn: Mapping[str, tuple[str, str]]) -> str:
    """One self-contained HTML page: a summary, the pictures (SVG text, caption), and the table of all trials."""
    order = ranked(result)
    parts = [
        "<!doctype html>", '<html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Sweep {html.escape(result.name)}</title><style>{_STYLE}</style>",
        f"<h1>Sweep {html.escape(result.name)}</h1>", f"<p>{html.escape(_summary(result, order))}</p>",
    ]  # fmt: skip
    parts += [f"<figure>{text}<figcaption>{html.escape(said)}</figcaption></figure>" for text, said in drawn.values()]
    parts.append(_table(result, order))
    return "\n".join(parts) + "\n"


def _summary(result: SweepResult, order: Sequence[TrialResult]) -> str:
    states = [t.status for t in result.trials]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    where = f"on one shared base, {result.mean_k:.1f} adapters a step on average" if result.shared else "one by one"
    said = f"{len(result.trials)} trials ({counts}) on {result.device}, {where}; {result.seconds / 60:.1f} minutes, "
    said += f"{result.trained_tokens:,} trained tokens."
    if order and order[0].best_loss is not None:
        said += f" Best: {order[0].id} with validation loss {order[0].best_loss:.4f} at step {order[0].best_step}."
    return said


def _table(result: SweepResult, order: Sequence[TrialResult]) -> str:
    keys = list(dict.fromkeys(k for t in result.trials for k in t.config))
    rest = [t for t in result.trials if t.best_loss is None]
    rows = []
    for trial in [*order, *rest]:
        loss = "" if trial.best_loss is None else f"{trial.best_loss:.4f}"
        cells = [trial.id, *(_cell(trial.config.get(k)) for k in keys), loss, str(trial.best_step or ""), trial.status]
        best = ' class="best"' if order and trial is order[0] else ""
        rows.append(f"<tr{best}>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    heads = "".join(f"<th>{html.escape(h)}</th>" for h in ["trial", *keys, "loss", "at step", "status"])
    return f'<div class="scroll"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)
