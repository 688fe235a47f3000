"""What a person sees while a run goes on: heartbeats, live lines, the coloured preview."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from ft_ray import console as module
from ft_ray.cli_output import Out
from ft_ray.console import Progress, counted, duration, percent, table


def make(terminal: bool = False) -> tuple[io.StringIO, Progress]:
    text = io.StringIO()
    return text, Progress(Console(file=text, force_terminal=terminal, width=100))


def test_durations_and_figures() -> None:
    assert [duration(s) for s in (3.21, 75, 3725)] == ["3.2s", "1m15s", "1h02m"]
    assert percent({"value": 0.91, "low": 0.86, "high": 0.94, "n": 200}) == "0.910 [0.86, 0.94]"
    assert percent(None) == "-"


def test_a_finding_is_told_whole_whatever_its_severity() -> None:
    text, progress = make()
    examples = [f"a.jsonl:{i}" for i in range(5)]
    finding = {"severity": "info", "message": "One thing.", "fix": "Mend it.", "examples": examples}
    with progress.running():
        progress({"kind": "data", "report": {"findings": [finding]}})
    assert "info: One thing. Mend it." in text.getvalue() and text.getvalue().count("a.jsonl:") == 5
    assert [counted(n, "warning") for n in (0, 1, 2)] == ["0 warnings", "1 warning", "2 warnings"]


def test_a_silent_step_gets_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HEARTBEAT_SECONDS", 0.5)
    text, progress = make()
    with progress.running():
        pass
    with progress.running():  # again, as `serve` does: once for what it imports
        progress({"kind": "status", "message": "loading the model"})
        time.sleep(2.5)
    assert text.getvalue().count("… loading the model, ") >= 1


def test_steps_show_loss_speed_and_time_left() -> None:
    text, progress = make()
    with progress.running():
        progress(
            {"kind": "step", "step": 3, "total": 60, "loss": 1.25, "tokens_per_second": 145.4, "lr": 2e-4,
             "seconds_left": 75}
        )  # fmt: skip
    assert text.getvalue().strip() == "step 3/60  loss 1.2500  145 tok/s  lr 2.00e-04  1m15s left"


def test_the_preview_colours_trained_tokens_only() -> None:
    text, progress = make(terminal=True)
    with progress.running():
        progress({"kind": "preview", "tokens": 9, "segments": [("<|user|>hi", False), ("hello<eos>", True)]})
    shown = text.getvalue()
    assert "\x1b[1;4;32mhello<eos>" in shown and "\x1b[2m<|user|>hi" in shown


def test_what_models_and_users_say_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    out = Out(as_json=False)
    out.result({}, table("Asked [/b]", ["answer"], [["Dear [name], see [/order] :smile:"]]), "a [/path] of [bold]")
    out.progress({"kind": "status", "message": "reading [/x] of [name]"})
    shown = capsys.readouterr()
    assert "Asked [/b]" in shown.out and "Dear [name], see [/order] :smile:" in shown.out
    assert "a [/path] of [bold]" in shown.out
    assert "reading [/x] of [name]" in shown.err
