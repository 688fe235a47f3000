"""The sections of a run's report, as blocks: what `report_page` and `report_markdown` both show."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from statistics import median
from typing import Any

import yaml

from ft_ray import report
from ft_ray.console import duration, percent
from ft_ray.report import Run
from ft_ray.report_blocks import Block, Chart, Charts, Code, Items, Note, Sample, Section, Sub, Table, Text
from ft_ray.svg_charts import Series, bars, lines

__all__ = ["facts", "sections"]

_GIB = 2**30


def sections(run: Run, *, api: tuple[float, float] | None = None, command: str = "") -> list[Section]:
    """All sections that have something to say. `api`: prices of an endpoint; `command`: how the run was started."""
    found = {
        "What went wrong, and what to change": _findings(run),
        "Result": _scores(run),
        "Gates": _gates(run),
        "Training": _training(run),
        "Sweep": _sweep(run),
        "Samples": _samples(run),
        "Data": _data(run),
        "Memory: plan against measured": _memory(run),
        "Cost": _cost(run, api),
        "What was asked": _asked(run),
        "Where it comes from": _lineage(run),
        "Do it again": _again(run, command),
    }
    made = [Section(title, [b for b in blocks if not _empty(b)]) for title, blocks in found.items()]
    return [section for section in made if section.blocks]


def _empty(block: Block) -> bool:
    if isinstance(block, Table):
        return not block.rows
    if isinstance(block, Chart):
        return not block.svg
    return isinstance(block, Charts) and not any(chart.svg for chart in block.charts)


def facts(run: Run) -> list[tuple[str, str]]:
    """The run in a handful of figures."""
    train, cost = run.stage("train"), run.stage("train").get("cost") or {}
    known = [
        ("trained tokens", f"{train['trained_tokens']:,}" if train.get("trained_tokens") else None),
        ("steps", train.get("steps")),
        ("tokens/s", f"{train['tokens_per_second']:,.0f}" if train.get("tokens_per_second") else None),
        ("training time", duration(train["seconds"]) if train.get("seconds") else None),
        ("cost of the training loop", f"${cost['usd']:,.2f}" if cost.get("usd") is not None else None),
        ("parameters trained", f"{train['trainable_parameters']:,}" if train.get("trainable_parameters") else None),
    ]
    return [(name, str(value)) for name, value in known if value is not None]


def _findings(run: Run) -> Iterator[Block]:
    if run.history and not run.found:
        yield Text(report.sound(run), good=True)
    changes = any(d.patch for d in run.found)
    for d in run.found:
        patch = [f"{key}: {value}" for key, value in d.patch.items()]
        # What follows from another finding mends with it: here nothing may be said of the recipe.
        lead = "Change:" if patch else "No change of its own." if changes else "The recipe is not what has to change."
        yield Note(d.severity, d.code.replace("_", " "), d.sentence, lead, patch)


def _scores(run: Run) -> Iterator[Block]:
    scores = run.scores
    names = [n for n in report.MODELS if isinstance(scores.get(n), dict)]
    if not names:
        return
    shown = [n.replace("_", "-") for n in names]
    primary = scores.get("primary", "")
    drawn = [
        (label, f["value"], f.get("low"), f.get("high"))
        for n, label in zip(names, shown, strict=True) if (f := scores[n].get(primary))
    ]  # fmt: skip
    on = f"{primary} on {scores.get('rows')} {scores.get('split', 'test')} rows, 95% intervals"
    yield Chart(bars(drawn, title=on), on)
    metrics = dict.fromkeys(m for n in names for m in scores[n])
    yield Table(["metric", *shown], [[m, *(percent(scores[n].get(m)) for n in names)] for m in metrics], stacked=True)
    more = [[what, *(f"{v:.4f}" for v in (values.get("base"), values.get("tuned")) if v is not None)]
            for key, what in (("heldout_loss", "held-out loss"), ("general_loss", "loss on general data"))
            if (values := scores.get(key))]  # fmt: skip
    yield Table(["nats a token", "base", "tuned"], [r for r in more if len(r) == 3])
    yield Table(["public benchmark", "metric", "base", "tuned"], report.benchmarks(scores), stacked=True)
    if drift := scores.get("general_drift"):
        yield Text(
            f"{drift['changed']} of {drift['rows']} answers to general prompts changed; their words agree to "
            f"{drift['similarity']:.0%} with the base's."
        )


def _gates(run: Run) -> Iterator[Block]:
    found = report.gates(run)
    yield Table(["gate", "state", "measured"], [[gate, "", said] for gate, _, said in found], stacked=True,
                states=[ok for _, ok, _ in found])  # fmt: skip


def _early(run: Run) -> str:
    """That early stopping ended the training, and which step was kept."""
    stage = run.manifest.stages.get("train")
    step, total = next(((r["step"], r.get("total")) for r in reversed(run.history) if r["kind"] == "step"), (0, None))
    best = run.stage("train").get("best_step")
    if not (total and step < total and stage and stage.status == "done" and run.recipe.evaluation.early_stop):
        return ""
    return f" Early stopping ended it at step {step} of {total}; the best step, {best}, is kept."


def _training(run: Run) -> Iterator[Block]:
    steps = [r for r in run.history if r["kind"] == "step"]
    evals = [r for r in run.history if r["kind"] == "eval"]
    if not steps:
        return
    losses = [float(r["loss"]) for r in steps]
    held = f"; validation {min(e['loss'] for e in evals):.4f} at best" if evals else ""
    yield Text(f"Loss from {losses[0]:.4f} to {median(losses[-3:]):.4f} in {len(steps)} steps{held}.{_early(run)}")
    smooth = report.smoothed(losses, max(3, len(losses) // 25))
    places = [float(r["step"]) for r in steps]
    train = Series(
        "training (mean ± one standard deviation of neighbouring steps)",
        [(x, s[0]) for x, s in zip(places, smooth, strict=True)],
        1,
        band=[(x, s[1], s[2]) for x, s in zip(places, smooth, strict=True)],
    )
    raw = Series("each step", list(zip(places, losses, strict=True)), 1, faint=True)
    validation = Series("validation", [(float(r["step"]), float(r["loss"])) for r in evals], 2, dots=True)
    yield Chart(lines([raw, train, validation], x="step", y="nats a token", title="Loss"))
    valid = [(float(r["step"]), float(r["valid"])) for r in evals if r.get("valid") is not None]
    if valid:
        yield Chart(lines([Series("well-formed answers", valid, 3, dots=True)], x="step", y="share",
                          title="Answer format"), f"Well-formed answers: {valid[-1][1]:.0%} at the end.")  # fmt: skip
    rates = [(float(r["step"]), float(r["lr"])) for r in steps if r.get("lr") is not None]
    norms = [(float(r["step"]), float(r["grad_norm"])) for r in steps if r.get("grad_norm") is not None]
    yield Charts([
        Chart(lines([Series("learning rate", rates, 3)], x="step", y="rate", title="Learning rate")),
        Chart(lines([Series("gradient norm", norms, 4)], x="step", y="norm", title="Gradient norm before clipping")),
    ])  # fmt: skip


def _sweep(run: Run) -> Iterator[Block]:
    if not run.sweep:
        return
    trials = sorted(run.sweep["trials"], key=lambda t: (t.get("best_loss") is None, t.get("best_loss") or 0.0))
    if run.analysis:
        yield Text(_went_on(run.analysis))
    drawn = _sweep_charts(run.sweep, run.analysis or {})
    if drawn:
        yield from drawn
    else:
        shown = [
            Series(t["id"],
                   [(p["step"], p["validation_loss"]) for p in t["history"] if p["validation_loss"] is not None],
                   1 + k % 4, dots=True)
            for k, t in enumerate(trials[:8])
        ]  # fmt: skip
        yield Chart(lines(shown, x="step", y="validation loss", title="Validation loss of the best trials"))
    keys = list(dict.fromkeys(k for t in trials for k in t["config"]))
    rows = [
        [t["id"], t["status"], t["steps"], "-" if t.get("best_loss") is None else f"{t['best_loss']:.4f}",
         *(f"{v:g}" if isinstance(v := t["config"].get(k, "-"), float) else v for k in keys)]
        for t in trials
    ]  # fmt: skip
    yield Table(["trial", "status", "steps", "validation loss", *keys], rows)


def _went_on(analysis: dict[str, Any]) -> str:
    """What a sweep ended in: which values the model was trained with, and which rows it pointed out."""
    values = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in analysis["config"].items())
    said = [
        "The recipe's own values went on." if analysis["chosen"] == "default"
        else f"Trial {analysis['chosen']} went on: {values}.",
        "" if analysis["confirmation"] else "It was not confirmed with other seeds.",
    ]  # fmt: skip
    if rows := analysis.get("hard_rows"):
        noun = "row" if rows == 1 else "rows"
        said.append(f"{rows:,} training {noun} stayed hard in every good trial: read {analysis['relabel']}.")
    return " ".join(filter(None, said))


def _sweep_charts(sweep: dict[str, Any], analysis: dict[str, Any]) -> list[Block]:
    """What the sweep itself draws: parallel coordinates, losses, confirmation, importance; [] where it cannot be.

    Imported by name: a report of a run without a sweep needs neither them nor matplotlib.
    """
    try:
        drawing, charts, importance, results = (
            importlib.import_module(f"ft_ray.{name}")
            for name in ("sweep_charts", "charts", "sweep_importance", "sweep_results")
        )
        result, told = results.SweepResult.model_validate(sweep), analysis.get("confirmation")
        confirmed = importlib.import_module("ft_ray.confirmation").Confirmation.from_dict(told) if told else None
        found = importance.importance(result)
        drawn = drawing.figures(result, found=found, confirmed=confirmed)
        shown: list[Block] = [
            Chart(charts.svg(figure, f"{result.name}: {name}"), said.removesuffix(found.caveat if found else ""),
                  wide=True, key=name != "confirmation")
            for name, (figure, said) in drawn.items()
        ]  # fmt: skip
        if found is not None:
            shares = ", ".join(f"{key} {mean:.0%}" for key, (mean, _, _) in found.shares.items())
            shown.append(Text(f"Share of the loss's variance: {shares}. {found.caveat}"))
        curve = analysis.get("data_curve")
        return [*shown, Text(curve["advice"][:1].upper() + curve["advice"][1:])] if curve else shown
    except (ImportError, ValueError):
        return []


def _samples(run: Run) -> Iterator[Block]:
    for sample in report.samples(run):
        answers = [(name.replace("_", "-"), text, score) for name, (text, score) in sample["answers"].items()]
        yield Sample(sample["prompt"], [("reference", sample["reference"], None), *answers])


def _data(run: Run) -> Iterator[Block]:
    if run.data is None:
        return
    stats = run.data["stats"]
    counts = stats.get("counts", {})
    yield Table(list(counts), [[f"{v:,}" for v in counts.values()]] if counts else [])
    rows = [[k.replace("_", " "), *(f"{v[p]:g}" for p in ("p50", "p95", "max"))]
            for k, v in stats.items() if isinstance(v, dict) and {"p50", "p95", "max"} <= set(v)]  # fmt: skip
    yield Table(["tokens a row", "median", "95%", "most"], rows)
    for f in run.data["findings"]:
        yield Note(f["severity"], f["code"].replace("_", " "), f"{f['message']} {f['fix']}", items=f["examples"])


def _memory(run: Run) -> Iterator[Block]:
    train = run.stage("train")
    measured, plan = train.get("peak_memory_bytes"), train.get("plan") or {}
    if not measured:
        return
    parts = (plan.get("memory") or {}).items()
    sizes = [[p.replace("_", " "), f"{s / _GIB:.2f} GiB" if s > _GIB // 20 else f"{s / 2**20:.1f} MiB"]
             for p, s in parts if s]  # fmt: skip
    yield Table(["planned, of one rank", "size"], sizes)
    if not plan.get("total"):
        yield Text(f"Measured {measured / _GIB:.2f} GiB.")
        return
    off = measured / plan["total"] - 1
    said = f"Planned {plan['total'] / _GIB:.2f} GiB, measured {measured / _GIB:.2f} GiB ({off:+.0%})."
    if not str(train.get("device", "")).startswith("cuda"):
        said += " On a CPU the figure is the resident set of the whole worker, libraries included."
    yield Text(said)


def _cost(run: Run, api: tuple[float, float] | None) -> Iterator[Block]:
    cost, rows = run.stage("train").get("cost") or {}, report.costs(run, api)
    if cost.get("hours") is not None:
        known = "" if cost.get("usd") is None else f"${cost['usd']:,.4g}, "
        yield Text(
            f"The training loop took {cost['hours']:.3g} hours ({known}{cost['price_source']}). Loading, merging "
            f"and evaluating are not in it: {_whole(run)}"
        )
    cells = [
        [c["model"].replace("_", "-"), f"{c['share']:.1%}",
         "-" if c["dollars"] is None else f"${c['dollars']:,.4g}", c["basis"]]
        for c in rows
    ]  # fmt: skip
    yield Table(["model", "correct", "1,000 correct answers", "how it is reckoned"], cells, stacked=True)
    if cells:
        yield Text("A batch of a local evaluation is close to the worst case; an endpoint under load answers more.")
    if cells or cost.get("usd") is not None:
        yield Text(f"{report.price_basis().capitalize()}.")


def _whole(run: Run) -> str:
    """All stages' own time, at the price of training where it is known."""
    seconds = sum(record.seconds for record in run.manifest.stages.values())
    price = (run.stage("train").get("cost") or {}).get("usd_per_hour")
    dollars = f", ${seconds / 3600 * price:,.4g} at that price" if price is not None else ""
    return f"all stages of the run together took {duration(seconds)}{dollars}."


def _asked(run: Run) -> Iterator[Block]:
    def shown(values: dict[str, Any]) -> Code:
        return Code(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    yield shown(run.recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True))
    if run.sweep:
        yield Sub("Search space")
        yield shown(report.space_of(run.sweep))


def _lineage(run: Run) -> Iterator[Block]:
    known = run.manifest.lineage
    yield Table(["what", "which"], [[k, v] for k, v in report.lineage(run).items()], plain=True)
    if known.substitutions:
        yield Text("What ran instead of what the recipe says, computing the same:")
        yield Items(known.substitutions)
    yield Table(["package", "version"], list(known.packages.items()), plain=True)


def _again(run: Run, command: str) -> Iterator[Block]:
    commit = run.manifest.lineage.git_commit
    if commit:
        yield Code(f"git checkout {commit}")
    if run.sweep:  # recipe and space stand above; with other values than the recipe's, `run` trains the winner alone
        command = command or "ft-ray sweep RECIPE --space SPACE --fresh"
    yield Code(command or f"ft-ray run {run.recipe.run_path}/recipe.yaml --fresh")
    if run.sweep and run.manifest.stages:
        yield Text("The model alone, without the search:")
        yield Code(f"ft-ray run {run.recipe.run_path}/recipe.yaml --fresh")
    yield Text("The same recipe, data, base and versions give the same rows in the same order; the hashes above tell.")
