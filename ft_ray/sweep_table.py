"""The sweep's live table: every trial, what it tries, how far it is. On a terminal it lives; a log gets lines.

Fed by the events of `sweep`: {"kind": "sweep", "rows": [{id, point, state, step, validation_loss}], "total": trials in
all, "forwards": made so far, "mean_k": adapters in each, "seconds"}. `state` is Tune's. What is missing shows as '-'.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ft_ray.console import duration

__all__ = ["SweepTable", "line", "table"]

_LINE_SECONDS = 10.0
_SHORT = {"lora.r": "r", "lora.alpha": "alpha", "lora.dropout": "dropout", "optim.lr": "lr"}
_ORDER = {"running": 0, "paused": 1, "pending": 2, "terminated": 3, "error": 4}
_STYLE = {"running": "bold", "paused": "yellow", "pending": "dim", "terminated": "green", "error": "red"}
_NAMES = {"terminated": "ended", "error": "failed"}


def _settings(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings to show: the four everyone asks for, then the others that trials differ in."""
    keys = list(dict.fromkeys(k for t in trials for k in t.get("point", {})))
    return [k for k in _SHORT if k in keys] + [k for k in keys if k not in _SHORT]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.4g}"
    return "-" if value is None else str(value)


def _rank(trial: Mapping[str, Any]) -> tuple[int, float]:
    loss = trial.get("validation_loss")
    return _ORDER.get(str(trial.get("state")), 2), float("inf") if loss is None else float(loss)


def _best(event: Mapping[str, Any]) -> str | None:
    known = [t for t in event["rows"] if t.get("validation_loss") is not None and t.get("state") != "error"]
    return str(min(known, key=lambda t: float(t["validation_loss"]))["id"]) if known else None


def table(event: Mapping[str, Any], *, rows: int = 40) -> Table:
    """The trials as a table: running ones first, better ones first; at most `rows`, and how many more there are."""
    trials = sorted(event["rows"], key=_rank)
    keys, best = _settings(trials), _best(event)
    out = Table(title=_head(event), title_justify="left", title_style="bold", header_style="bold")
    for column in ["trial", *(_SHORT.get(k, k) for k in keys), "step", "loss", "status"]:
        out.add_column(column, justify="left" if column in ("trial", "status") else "right", no_wrap=True)
    for trial in trials[:rows]:
        loss = "-" if trial.get("validation_loss") is None else f"{trial['validation_loss']:.4f}"
        is_best = str(trial["id"]) == best
        state, step = str(trial.get("state", "-")), str(trial.get("step") or "-")
        cells = [str(trial["id"]), *(_text(trial.get("point", {}).get(k)) for k in keys),
                 step, loss + (" *" if is_best else "  "), _NAMES.get(state, state)]  # fmt: skip
        out.add_row(*cells, style="bold magenta" if is_best else _STYLE.get(state, ""))
    if len(trials) > rows:
        out.caption = f"and {len(trials) - rows} more"
    return out


def _head(event: Mapping[str, Any]) -> str:
    states = [str(t.get("state", "-")) for t in event["rows"]]
    order = sorted(set(states), key=lambda s: _ORDER.get(s, 2))
    counts = ", ".join(f"{states.count(s)} {_NAMES.get(s, s)}" for s in order)
    # Forwards are counted too: until a trial's first measurement they are the only sign that something goes on.
    k = f", {event['forwards']} forwards of {event['mean_k']:.1f}" if event.get("mean_k") else ""
    return f"{max(len(states), event.get('total', 0))} trials: {counts or 'none yet'}{k}, {duration(event['seconds'])}"


def line(event: Mapping[str, Any]) -> str:
    """The same in one line, for a log."""
    best = next((t for t in event["rows"] if str(t["id"]) == _best(event)), None)
    said = f"  {_head(event)}"
    if best is not None:
        settings = ", ".join(f"{_SHORT.get(k, k)} {_text(v)}" for k, v in best.get("point", {}).items())
        said += f"; best {best['id']} loss {best['validation_loss']:.4f} at step {best.get('step', 0)} ({settings})"
    return said


class SweepTable:
    """An event listener in front of another: shows 'sweep' events, hands the rest on. Use within `running()`."""

    def __init__(
        self, console: Console, rest: Callable[[dict[str, Any]], None], *, every: float = _LINE_SECONDS
    ) -> None:
        self._console, self._rest, self._every = console, rest, every
        self._said = float("-inf")
        self._lock = threading.Lock()
        self._live: Live | None = None
        self._last: dict[str, Any] | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[SweepTable]:
        try:
            yield self
        finally:
            with self._lock:
                self._stop()

    def __call__(self, event: dict[str, Any]) -> None:
        if event["kind"] != "sweep":
            with self._lock:
                if event["kind"] == "stage":
                    self._stop()  # what follows prints lines of its own
            self._rest(event)
            return
        with self._lock:
            self._last = event
            if self._console.is_terminal:
                if self._live is None:
                    self._live = Live(console=self._console, refresh_per_second=2, transient=False)
                    self._live.start()
                room = max(5, self._console.height - 6)
                self._live.update(table(event, rows=room))
            elif time.monotonic() - self._said >= self._every:
                self._said = time.monotonic()
                self._console.print(line(event), highlight=False, soft_wrap=True)
        self._rest({"kind": "shown"})

    def _stop(self) -> None:
        """The sweep is over, for now: its last state stays on the screen, or is one last line of the log."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._last is not None:
            self._console.print(line(self._last), highlight=False, soft_wrap=True)
        self._last = None
