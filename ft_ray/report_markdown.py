"""A run's report as Markdown, for a pull request or a terminal. No text of models and data acts as markup."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ft_ray import report
from ft_ray.console import percent
from ft_ray.report import Run

__all__ = ["markdown"]


def markdown(run: Run, *, api: tuple[float, float] | None = None, command: str = "") -> str:
    """What `report_page.html` shows, without charts."""
    out = [f"# {run.recipe.name}", "", _md(report.verdict(run)), ""]
    if run.found:
        out += ["## What went wrong, and what to change", ""]
        for d in run.found:
            change = "; ".join(f"`{k}: {v}`" for k, v in d.patch.items()) or "the recipe is not what has to change"
            out += [f"- **{d.code.replace('_', ' ')}** ({d.severity}): {_md(d.sentence)} Change: {change}."]
        out.append("")
    scores = run.scores
    names = [n for n in report.MODELS if isinstance(scores.get(n), dict)]
    if names:
        metrics = list(dict.fromkeys(m for n in names for m in scores[n]))
        cells = [[m, *(percent(scores[n].get(m)) for n in names)] for m in metrics]
        out += ["## Result", "", *_md_table(["metric", *names], cells)]
        if found := report.benchmarks(scores):
            out += _md_table(["public benchmark", "metric", "base", "tuned"], found)
    passed = {True: "passed", False: "refused", None: "not reached"}
    rows = [[g, passed[ok], said] for g, ok, said in report.gates(run)]
    if rows:
        out += ["## Gates", "", *_md_table(["gate", "", "measured"], rows)]
    steps = [r["loss"] for r in run.history if r["kind"] == "step"]
    evals = [r for r in run.history if r["kind"] == "eval"]
    if steps:
        held = f"; validation {min(e['loss'] for e in evals):.4f} at best" if evals else ""
        out += [
            "## Training",
            "",
            f"Loss from {steps[0]:.4f} to {median(steps[-3:]):.4f} in {len(steps)} steps{held}.",
            "",
        ]
    if run.data:
        out += [
            "## Data",
            "",
            *(f"- {f['severity']}: {_md(f['message'])} {_md(f['fix'])}" for f in run.data["findings"]),
            "",
        ]
    costs = report.costs(run, api)
    if costs:
        cells = [
            [c["model"], f"{c['share']:.1%}", "-" if c["dollars"] is None else f"${c['dollars']:,.4g}", c["basis"]]
            for c in costs
        ]
        out += ["## Cost", "", *_md_table(["model", "correct", "1,000 correct answers", "how it is reckoned"], cells)]
    out += ["## Where it comes from", "", *_md_table(["", ""], [[k, v] for k, v in report.lineage(run).items()])]
    out += ["## Do it again", "", f"    {command or f'ft-ray run {run.recipe.run_path}/recipe.yaml --fresh'}"]
    return "\n".join(out) + "\n"


def _md(text: object) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no new cell."""
    shown = " ".join(str(text).split())
    for sign in ("\\", "`", "*", "_", "[", "]", "|", "#"):
        shown = shown.replace(sign, f"\\{sign}")
    return shown.replace("<", "&lt;").replace(">", "&gt;")


def _md_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines_ = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return [*lines_, *("| " + " | ".join(_md(c) for c in row) + " |" for row in rows), ""]
