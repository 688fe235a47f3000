"""What a person sees while work goes on: stages, one coloured example, a live training line, tables.

Everything here goes to stderr; results go to stdout. Nothing is silent for more than ten seconds: where no
event comes, a heartbeat says what is still going on and for how long.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

__all__ = ["Progress", "counted", "duration", "percent", "setup_logging", "table"]

_HEARTBEAT_SECONDS = 8.0
_LINE_SECONDS = 5.0


def counted(number: int, what: str) -> str:
    """'1 warning', '3 warnings'."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def setup_logging(console: Console, verbose: bool) -> None:
    """Sends this project's log to stderr; other libraries only speak from warnings on."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False, show_time=False, markup=False)],
        force=True,
    )
    logging.getLogger("ft_ray").setLevel(logging.DEBUG if verbose else logging.INFO)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in ray_session; libgomp reads it when torch is imported
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own bars; what goes on is said by `Progress`
    # stdout is for results; vLLM logs there from its import on.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # It looks for optional CPU kernels on a hub, and warns that it did not.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # DeepSpeed sets its logger's level when it is imported; a filter stays. That this is a CPU is no warning here.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def duration(seconds: float) -> str:
    """75 -> '1m15s'."""
    whole = int(seconds)
    if whole < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def percent(figure: dict[str, Any] | None) -> str:
    """{'value': .91, 'low': .86, 'high': .94} -> '0.910 [0.86, 0.94]'."""
    if not figure:
        return "-"
    if figure.get("low") is None:
        return f"{figure['value']:.3f}"
    return f"{figure['value']:.3f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    out = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        out.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        out.add_row(*row)
    return out


class Progress:
    """An event listener that prints. Use as a context manager, so that the heartbeat ends."""

    def __init__(self, console: Console, *, enabled: bool = True) -> None:
        self._console, self._enabled = console, enabled
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._doing, self._since = "starting", time.monotonic()
        self._line_at = 0.0
        self._live = False
        self._done = threading.Event()

    @contextlib.contextmanager
    def running(self) -> Iterator[Progress]:
        self._done.clear()
        thread = threading.Thread(target=self._heartbeat, name="ft-ray-heartbeat", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._done.set()
            thread.join(timeout=2)
            with self._lock:
                self._end_line()

    def pause(self) -> None:
        """No more heartbeats: what goes on from here waits for the user."""
        self._done.set()

    def __call__(self, event: dict[str, Any]) -> None:
        with self._lock:
            kind = event["kind"]
            handler = getattr(self, f"_on_{kind}", None)
            if handler is not None and self._enabled:
                handler(event)

    def _print(self, *parts: Any) -> None:
        self._end_line()
        self._console.print(*parts, highlight=False)
        self._last = time.monotonic()

    def _end_line(self) -> None:
        if self._live:
            self._console.file.write("\n")
            self._live = False

    def _now(self, doing: str) -> None:
        self._doing, self._since = doing, time.monotonic()

    def _heartbeat(self) -> None:
        while not self._done.wait(1.0):
            with self._lock:
                if self._enabled and time.monotonic() - self._last > _HEARTBEAT_SECONDS:
                    self._print(f"  … {self._doing}, {duration(time.monotonic() - self._since)}")

    def _on_stage(self, event: dict[str, Any]) -> None:
        name, state = event["stage"].replace("_", " "), event["state"]
        if state == "start":
            self._now(name)
            self._print(Text(f"▸ {name}", style="bold cyan"))
        elif state == "done":
            self._print(Text(f"✓ {name} in {duration(event['seconds'])}", style="green"))
        elif state == "skipped":
            self._print(Text(f"✓ {name}: already done ({duration(event['seconds'])} then)", style="green"))
        else:
            self._print(Text(f"✗ {name}: {state} after {duration(event['seconds'])}", style="red"))

    def _on_status(self, event: dict[str, Any]) -> None:
        if event.get("heartbeat"):
            return  # said here with the time it has taken
        self._now(event["message"])
        self._print(f"  {event['message']}")

    def _on_shown(self, event: dict[str, Any]) -> None:
        """Another view has just said something: no heartbeat is due."""
        self._last = time.monotonic()

    def _on_preview(self, event: dict[str, Any]) -> None:
        text = Text(f"  one example as the model sees it ({event['tokens']} tokens; trained tokens in green):\n")
        for piece, trained in event["segments"]:
            text.append(piece, style="bold green underline" if trained else "dim")
        self._print(text)

    def _on_data(self, event: dict[str, Any]) -> None:
        for finding in event["report"]["findings"]:
            style = {"error": "bold red", "warning": "yellow"}.get(finding["severity"], "dim")
            line = Text(f"  {finding['severity']}: {finding['message']}", style=style)
            line.append(f" {finding['fix']}", style="default")
            for example in finding["examples"]:
                line.append(f"\n      {example}", style="dim")
            self._print(line)

    def _on_step(self, event: dict[str, Any]) -> None:
        self._now("training")
        left = event.get("seconds_left")
        line = (
            f"  step {event['step']}/{event['total']}  loss {event['loss']:.4f}  "
            f"{event['tokens_per_second']:.0f} tok/s  lr {event['lr']:.2e}"
            + (f"  {duration(left)} left" if left is not None else "")
        )
        if self._console.is_terminal:
            self._console.file.write("\r\x1b[2K" + line)
            self._console.file.flush()
            self._live, self._last = True, time.monotonic()
        elif time.monotonic() - self._line_at > _LINE_SECONDS or event["step"] >= event["total"]:
            self._line_at = time.monotonic()
            self._print(line)

    def _on_eval(self, event: dict[str, Any]) -> None:
        best = "  (best so far)" if event.get("best") else ""
        self._print(f"  step {event['step']}: validation loss {event['loss']:.4f}{best}")

    def _on_diagnosis(self, event: dict[str, Any]) -> None:
        line = Text(f"  {event['code'].replace('_', ' ')}: {event['sentence']}", style="yellow")
        if event["patch"]:
            line.append(" Change: " + ", ".join(f"{k}: {v}" for k, v in event["patch"].items()), style="default")
        self._print(line)

    def _on_checkpoint(self, event: dict[str, Any]) -> None:
        took = "" if "stood_still" not in event else f" (training stood still for {event['stood_still']:.1f} s)"
        self._print(f"  step {event['step']}: checkpoint committed{took}")

    def _on_sweep(self, event: dict[str, Any]) -> None:
        rows = event["rows"]
        over = [r for r in rows if r["state"] in ("terminated", "error")]
        running = sum(r["state"] == "running" for r in rows)
        self._now("sweeping")
        measured = [r for r in rows if r["validation_loss"] is not None]
        best = min(measured, key=lambda r: r["validation_loss"]) if measured else None
        line = f"  sweep: {len(over)} of {event['total']} trials over, {running} running"
        if best is not None:
            settings = " ".join(f"{k.rsplit('.', 1)[-1]}={v:.4g}" if isinstance(v, float) else
                                f"{k.rsplit('.', 1)[-1]}={v}" for k, v in best["point"].items())  # fmt: skip
            line += f"; lowest validation loss {best['validation_loss']:.4f} ({settings})"
        if event.get("mean_k"):
            line += f"; {event['mean_k']:.1f} trials in a forward"
        if self._console.is_terminal:
            self._console.file.write("\r\x1b[2K" + line[: self._console.width - 1])
            self._console.file.flush()
            self._live, self._last = True, time.monotonic()
        elif time.monotonic() - self._line_at > _LINE_SECONDS:
            self._line_at = time.monotonic()
            self._print(line)
