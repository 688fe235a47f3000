"""Benchmarks that drive the project's inside still fit it: a few trials of what is measured by the thousand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_tune_overhead_runs_a_sweep_of_stub_trials(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    command = [sys.executable, "benchmarks/tune_overhead.py", "--trials", "4", "--only", "none", "--json", str(found)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    run = json.loads(found.read_text(encoding="utf-8"))["runs"][0]
    assert run["trials"] == run["whole"]["trials"] == 4 and run["failed"] == 0
    assert run["pointers"] == 16, "each trial reports at four marks"
