"""A run's report as one HTML file without any outside request. All text is escaped.

Answers of a model are untrusted: nothing of them reaches the page but as text. The page has no script at all, and
says so to the browser with a content security policy.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ft_ray import report
from ft_ray.console import duration, percent
from ft_ray.report import Run
from ft_ray.svg_charts import Series, bars, lines

__all__ = ["html"]

_GIB = 2**30
_STYLE = Path(__file__).with_name("report.css")
Cells = Sequence[Sequence[object]]


def html(run: Run, *, api: tuple[float, float] | None = None, command: str = "") -> str:
    """The whole page. `api`: prices of an endpoint to compare with; `command`: how the run was started."""
    name = escape(run.recipe.name)
    parts = [f"<h1>{name}</h1>", f'<p class="lead">{escape(report.verdict(run))}</p>', _facts(run)]
    for title, body in _sections(run, api, command):
        if body:
            parts.append(f"<section><h2>{escape(title)}</h2>{body}</section>")
    style = _STYLE.read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{name} · ft-ray report</title><link rel="icon" href="data:,"><style>{style}</style></head>'
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _sections(run: Run, api: tuple[float, float] | None, command: str) -> Iterator[tuple[str, str]]:
    yield "What went wrong, and what to change", _findings(run)
    yield "Result", _scores(run)
    yield "Gates", _gates(run)
    yield "Training", _losses(run)
    yield "Sweep", _sweep(run)
    yield "Samples", _samples(run)
    yield "Data", _data(run)
    yield "Memory: plan against measured", _memory(run)
    yield "Cost", _cost(run, api)
    yield "What was asked", _asked(run)
    yield "Where it comes from", _lineage(run)
    yield "Do it again", _again(run, command)


# Pieces


def _table(head: Sequence[str], rows: Cells, classes: str = "") -> str:
    if not rows:
        return ""
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{_cell(c)}</td>" for c in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table class="{classes}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


class _Raw(str):
    """Markup made here, from escaped parts."""


def _cell(value: object) -> str:
    return str(value) if isinstance(value, _Raw) else escape(str(value))


def _facts(run: Run) -> str:
    train, cost = run.stage("train"), run.stage("train").get("cost") or {}
    facts = [
        ("trained tokens", f"{train['trained_tokens']:,}" if train.get("trained_tokens") else None),
        ("steps", train.get("steps")),
        ("tokens/s", f"{train['tokens_per_second']:,.0f}" if train.get("tokens_per_second") else None),
        ("training time", duration(train["seconds"]) if train.get("seconds") else None),
        ("training cost", f"${cost['usd']:,.2f}" if cost.get("usd") is not None else None),
        ("parameters trained", f"{train['trainable_parameters']:,}" if train.get("trainable_parameters") else None),
    ]
    shown = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts if v is not None)
    return f'<dl class="facts">{shown}</dl>'


def _findings(run: Run) -> str:
    if not run.history and not run.found:
        return ""
    if not run.found:
        return '<p class="good">No known fault in losses, answers and adapter.</p>'
    out = []
    for d in run.found:
        patch = "".join(f"<li><code>{escape(f'{k}: {v}')}</code></li>" for k, v in d.patch.items())
        change = f"<p>Change:</p><ul>{patch}</ul>" if patch else "<p>The recipe is not what has to change.</p>"
        title = escape(d.code.replace("_", " "))
        out.append(f'<article class="{d.severity}"><h3>{title}</h3><p>{escape(d.sentence)}</p>{change}</article>')
    return "".join(out)


def _scores(run: Run) -> str:
    scores = run.scores
    names = [n for n in report.MODELS if isinstance(scores.get(n), dict)]
    if not names:
        return ""
    metrics = list(dict.fromkeys(m for n in names for m in scores[n]))
    rows = [[m, *(percent(scores[n].get(m)).replace(", ", ",\u00a0") for n in names)] for m in metrics]
    primary = scores.get("primary", "")
    drawn = [
        (n.replace("_", "-"), f["value"], f.get("low"), f.get("high"))
        for n in names if (f := scores[n].get(primary))
    ]  # fmt: skip
    out = bars(drawn, title=f"{primary} on {scores.get('rows')} {scores.get('split', 'test')} rows, 95% intervals")
    out += _table(["metric", *(n.replace("_", "-") for n in names)], rows)
    more = [[what, *(f"{v:.4f}" for v in (values.get("base"), values.get("tuned")) if v is not None)]
            for key, what in (("heldout_loss", "held-out loss"), ("general_loss", "loss on general data"))
            if (values := scores.get(key))]  # fmt: skip
    out += _table(["nats a token", "base", "tuned"], [r for r in more if len(r) == 3])
    out += _table(["public benchmark", "metric", "base", "tuned"], report.benchmarks(scores))
    drift = scores.get("general_drift")
    if drift:
        out += (
            f"<p>{drift['changed']} of {drift['rows']} answers to general prompts changed; their words agree to "
            f"{drift['similarity']:.0%} with the base's.</p>"
        )
    return out


def _gates(run: Run) -> str:
    marks = {True: "passed", False: "refused", None: "not reached"}
    rows = [[gate, _Raw(f'<span class="{marks[ok].split()[0]}">{marks[ok]}</span>'), said]
            for gate, ok, said in report.gates(run)]  # fmt: skip
    return _table(["gate", "", "measured"], rows)


def _losses(run: Run) -> str:
    steps = [r for r in run.history if r["kind"] == "step"]
    evals = [r for r in run.history if r["kind"] == "eval"]
    if not steps:
        return ""
    losses = [float(r["loss"]) for r in steps]
    smooth = report.smoothed(losses, max(3, len(losses) // 25))
    places = [float(r["step"]) for r in steps]
    train = Series(
        "training (mean ± one standard deviation of neighbouring steps)",
        [(x, s[0]) for x, s in zip(places, smooth, strict=True)],
        1,
        band=[(x, s[1], s[2]) for x, s in zip(places, smooth, strict=True)],
    )
    raw = Series("each step", list(zip(places, losses, strict=True)), 1, faint=True)
    held = Series("validation", [(float(r["step"]), float(r["loss"])) for r in evals], 2, dots=True)
    out = lines([raw, train, held], x="step", y="nats a token", title="Loss")
    valid = [(float(r["step"]), float(r["valid"])) for r in evals if r.get("valid") is not None]
    out += lines([Series("well-formed answers", valid, 3, dots=True)], x="step", y="share", title="Answer format")
    rates = [(float(r["step"]), float(r["lr"])) for r in steps if r.get("lr") is not None]
    norms = [(float(r["step"]), float(r["grad_norm"])) for r in steps if r.get("grad_norm") is not None]
    out += '<div class="pair">'
    out += lines([Series("learning rate", rates, 3)], x="step", y="rate", title="Learning rate")
    out += lines([Series("gradient norm", norms, 4)], x="step", y="norm", title="Gradient norm before clipping")
    return out + "</div>"


def _sweep(run: Run) -> str:
    if not run.sweep:
        return ""
    trials = sorted(run.sweep["trials"], key=lambda t: (t.get("best_loss") is None, t.get("best_loss") or 0.0))
    keys = list(dict.fromkeys(k for t in trials for k in t["config"]))
    rows = [
        [t["id"], t["status"], t["steps"], "-" if t.get("best_loss") is None else f"{t['best_loss']:.4f}",
         *(f"{v:g}" if isinstance(v := t["config"].get(k, "-"), float) else v for k in keys)]
        for t in trials
    ]  # fmt: skip
    drawn = _sweep_charts(run.sweep)
    shown = [
        Series(t["id"], [(p["step"], p["validation_loss"]) for p in t["history"] if p["validation_loss"] is not None],
               1 + k % 4, dots=True)
        for k, t in enumerate(trials[:8])
    ]  # fmt: skip
    out = drawn or lines(shown, x="step", y="validation loss", title="Validation loss of the best trials")
    return out + _table(["trial", "status", "steps", "validation loss", *keys], rows)


def _sweep_charts(sweep: dict[str, Any]) -> str:
    """Parallel coordinates, losses and importance as the sweep itself draws them; '' where it cannot be drawn.

    Imported by name: a report of a run without a sweep needs neither them nor matplotlib.
    """
    try:
        drawing, charts, importance, results = (
            importlib.import_module(f"ft_ray.{name}")
            for name in ("sweep_charts", "charts", "sweep_importance", "sweep_results")
        )
        result = results.SweepResult.model_validate(sweep)
        drawn = drawing.figures(result, found=importance.importance(result))
        return "".join(
            f'<figure>{charts.svg(figure, f"{result.name}: {name}")}'
            f'<figcaption class="said">{escape(said)}</figcaption></figure>'
            for name, (figure, said) in drawn.items()
        )
    except (ImportError, ValueError):
        return ""


def _samples(run: Run) -> str:
    out = []
    for sample in report.samples(run):
        answers = "".join(
            f'<div><h4>{escape(name.replace("_", "-"))} <span class="{"passed" if score > 0 else "refused"}">'
            f"{score:g}</span></h4><pre>{escape(text[:1500])}</pre></div>"
            for name, (text, score) in sample["answers"].items()
        )
        reference = f"<div><h4>reference</h4><pre>{escape(sample['reference'][:1500])}</pre></div>"
        out.append(
            f"<details open><summary>{escape(sample['prompt'][:300])}</summary>"
            f'<div class="side">{reference}{answers}</div></details>'
        )
    return "".join(out)


def _data(run: Run) -> str:
    if run.data is None:
        return ""
    stats = run.data["stats"]
    counts = stats.get("counts", {})
    out = _table(list(counts), [[f"{v:,}" for v in counts.values()]]) if counts else ""
    rows = [[k.replace("_", " "), *(f"{v[p]:g}" for p in ("p50", "p95", "max"))]
            for k, v in stats.items() if isinstance(v, dict) and {"p50", "p95", "max"} <= set(v)]  # fmt: skip
    out += _table(["tokens a row", "median", "95%", "most"], rows)
    for f in run.data["findings"]:
        examples = "".join(f"<li><code>{escape(e)}</code></li>" for e in f["examples"])
        listed = f"<ul>{examples}</ul>" if examples else ""
        out += (
            f'<article class="{escape(f["severity"])}"><h3>{escape(f["code"].replace("_", " "))}</h3>'
            f"<p>{escape(f['message'])} {escape(f['fix'])}</p>{listed}</article>"
        )
    return out


def _memory(run: Run) -> str:
    train = run.stage("train")
    measured, plan = train.get("peak_memory_bytes"), train.get("plan") or {}
    if not measured:
        return ""
    rows: list[Sequence[object]] = [
        [part.replace("_", " "), f"{size / _GIB:.2f}"] for part, size in (plan.get("memory") or {}).items() if size
    ]
    out = _table(["planned, of one rank", "GiB"], rows)
    on_gpu = str(train.get("device", "")).startswith("cuda")
    if plan.get("total"):
        off = measured / plan["total"] - 1
        out += (
            f"<p>Planned {plan['total'] / _GIB:.2f} GiB, measured {measured / _GIB:.2f} GiB ({off:+.0%}). "
            + ("" if on_gpu else "On a CPU the figure is the resident set of the whole worker, libraries included.")
            + "</p>"
        )
    else:
        out += f"<p>Measured {measured / _GIB:.2f} GiB.</p>"
    return out


def _cost(run: Run, api: tuple[float, float] | None) -> str:
    cost = run.stage("train").get("cost") or {}
    out = ""
    if cost.get("hours") is not None:
        dollars = f"${cost['usd']:,.4g}" if cost.get("usd") is not None else "no price is known for this machine"
        out += f"<p>Training took {cost['hours']:.3g} hours: {escape(dollars)} ({escape(cost['price_source'])}).</p>"
    rows = [
        [c["model"].replace("_", "-"), f"{c['share']:.1%}",
         "-" if c["dollars"] is None else f"${c['dollars']:,.4g}", c["basis"]]
        for c in report.costs(run, api)
    ]  # fmt: skip
    out += _table(["model", "correct", "1,000 correct answers", "how it is reckoned"], rows)
    if out:
        out += (
            "<p>A batch of a local evaluation is close to the worst case; an endpoint under load answers more. "
            f"{report.price_basis().capitalize()}.</p>"
        )
    return out


def _asked(run: Run) -> str:
    import yaml

    def shown(values: dict[str, Any]) -> str:
        return f"<pre>{escape(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))}</pre>"

    out = shown(run.recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True))
    return out + (f"<h3>Search space</h3>{shown(report.space_of(run.sweep))}" if run.sweep else "")


def _lineage(run: Run) -> str:
    out = _table(["", ""], [[k, v] for k, v in report.lineage(run).items()], "plain")
    known = run.manifest.lineage
    if known.substitutions:
        listed = "".join(f"<li>{escape(s)}</li>" for s in known.substitutions)
        out += f"<p>What ran instead of what the recipe says, computing the same:</p><ul>{listed}</ul>"
    return out + _table(["package", "version"], list(known.packages.items()), "plain")


def _again(run: Run, command: str) -> str:
    commit = run.manifest.lineage.git_commit
    steps = [f"git checkout {commit}"] if commit else []
    if run.sweep and not run.manifest.stages:
        command = command or "ft-ray sweep RECIPE --space SPACE --fresh"  # both stand above
    steps.append(command or f"ft-ray run {run.recipe.run_path}/recipe.yaml --fresh")
    out = "".join(f"<pre>{escape(s)}</pre>" for s in steps)
    return (
        out
        + "<p>The same recipe, data, base and versions give the same rows in the same order; the hashes above tell.</p>"
    )
