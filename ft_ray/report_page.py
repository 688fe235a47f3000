"""A run's report as one HTML file without any outside request. All text is escaped.

Answers of a model are untrusted: nothing of them reaches the page but as text. The page has no script at all, and
says so to the browser with a content security policy.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from ft_ray import report
from ft_ray.report import Run
from ft_ray.report_blocks import Block, Chart, Charts, Code, Items, Marks, Note, Sample, Sub, Table, Text
from ft_ray.report_sections import facts, sections

__all__ = ["html"]

_STYLE = Path(__file__).with_name("report.css")
_MOST = 1500  # characters of an answer


def html(run: Run, *, api: tuple[float, float] | None = None, command: str = "") -> str:
    """The whole page. `api`: prices of an endpoint to compare with; `command`: how the run was started."""
    name = escape(run.recipe.name)
    shown = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts(run))
    lead = escape(report.verdict(run))
    parts = [f"<h1>{name}</h1>", f'<p class="lead">{lead}</p>', f'<dl class="facts">{shown}</dl>']
    for section in sections(run, api=api, command=command):
        body = "".join(_SHOWN[type(block)](block) for block in section.blocks)
        parts.append(f"<section><h2>{escape(section.title)}</h2>{body}</section>")
    style = _STYLE.read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{name} · ft-ray report</title><link rel="icon" href="data:,"><style>{style}</style></head>'
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _text(block: Text) -> str:
    return f'<p class="good">{escape(block.text)}</p>' if block.good else f"<p>{escape(block.text)}</p>"


def _table(block: Table) -> str:
    top = "".join(f"<th>{escape(h)}</th>" for h in block.head)
    body = []
    for k, row in enumerate(block.rows):
        cells = [escape(str(cell)).replace(", ", ",\u00a0") if "[" in str(cell) else escape(str(cell)) for cell in row]
        if block.states:
            mark = Marks[block.states[k]]
            cells[1] = f'<span class="{mark.split()[0]}">{mark}</span>'
        if block.stacked:  # the label stands beside its value where the head is out of sight
            labels = (f' data-label="{escape(h)}"' for h in block.head)
            body.append("".join(f"<td{label}>{cell}</td>" for label, cell in zip(labels, cells, strict=True)))
        else:
            body.append("".join(f"<td>{cell}</td>" for cell in cells))
    rows = "".join(f"<tr>{cells}</tr>" for cells in body)
    kind = " ".join(["stacked"] * block.stacked + ["plain"] * block.plain)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table></div>'


def _items(block: Items) -> str:
    shown = (f"<code>{escape(i)}</code>" if block.code else escape(i) for i in block.items)
    return f"<ul>{''.join(f'<li>{i}</li>' for i in shown)}</ul>" if block.items else ""


def _code(block: Code) -> str:
    return f"<pre>{escape(block.text)}</pre>"


def _sub(block: Sub) -> str:
    return f"<h3>{escape(block.title)}</h3>"


def _note(block: Note) -> str:
    lead = f"<p>{escape(block.lead)}</p>" if block.lead else ""
    return (
        f'<article class="{escape(block.severity)}"><h3>{escape(block.title)}</h3><p>{escape(block.text)}</p>{lead}'
        f"{_items(Items(block.items, code=True))}</article>"
    )


def _sample(block: Sample) -> str:
    out = []
    for name, text, score in block.answers:
        mark = "" if score is None else f' <span class="{"passed" if score > 0 else "refused"}">{score:g}</span>'
        out.append(f"<div><h4>{escape(name)}{mark}</h4><pre>{escape(text[:_MOST])}</pre></div>")
    summary = f"<summary>{escape(block.prompt[:300])}</summary>"
    return f'<details open>{summary}<div class="side">{"".join(out)}</div></details>'


def _chart(block: Chart) -> str:
    if not block.wide:  # drawn with a title of its own
        return block.svg
    said = f'<figcaption class="said">{escape(block.said)}</figcaption>'
    return f'<figure class="drawn"><div class="wide">{block.svg}</div>{said}</figure>'


def _charts(block: Charts) -> str:
    return f'<div class="pair">{"".join(map(_chart, block.charts))}</div>'


_SHOWN: dict[type[Block], Callable[[Any], str]] = {
    Text: _text, Table: _table, Items: _items, Code: _code, Sub: _sub, Note: _note, Sample: _sample, Chart: _chart,
    Charts: _charts,
}  # fmt: skip
