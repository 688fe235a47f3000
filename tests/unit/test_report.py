"""The report: complete, escaped, self-contained, and rendered by a real browser without an error or a request."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ft_ray import report, reporting
from ft_ray import svg_charts as charts
from ft_ray.errors import InputError
from ft_ray.sweep_results import Point, SweepResult, TrialResult
from tests.run_folders import run_folder

MODEL = Path("/models/base")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    recipe, store = run_folder(tmp_path_factory.mktemp("runs"), MODEL, merged=False)
    _sweep(store)
    text, address = reporting.write_report(recipe.run_path, api=(0.15, 0.6))
    assert store.read("report.html").decode() == text and address.endswith("report.html")
    return text


def _sweep(store: Any) -> None:
    trials = [
        TrialResult(
            id=f"t{k}", config={"optim.lr": 1e-4 * (k + 1), "lora.r": 8 * (1 + k % 3)}, status="done", steps=40,
            tokens=900,
            history=[Point(step=s, validation_loss=2 / (s + k + 1), train_loss=1.0) for s in (10, 20, 40)],
            best_step=40, best_loss=2 / (41 + k),
        )
        for k in range(6)
    ]  # fmt: skip
    result = SweepResult(
        name="support", recipe={}, space={"search": {"optim.lr": {"loguniform": [1e-4, 1e-3]}}}, trials=trials,
        mean_k=2.0, seconds=9.0, trained_tokens=2700, device="cpu", shared=True,
    )  # fmt: skip
    store.write_json("sweep/sweep.json", result.model_dump(mode="json"))


def test_every_part_is_there(page: str) -> None:
    for title in (
        "What went wrong, and what to change", "Result", "Gates", "Training", "Sweep", "Samples", "Data",
        "Memory: plan against measured", "Cost", "What was asked", "Where it comes from", "Do it again",
    ):  # fmt: skip
        assert f"<h2>{title}</h2>" in page, title
    assert page.count("<svg") >= 5 and "forgetting" in page and "20 of 32" in page
    assert "Planned 3.50 GiB, measured 3.30 GiB (-6%)" in page
    assert "json_match 0.950 [0.83, 1.00] on 40 rows" in page
    assert "batch.per_device 8 -&gt; 4" in page, "what ran instead is told"
    assert "<td>arc_easy</td><td>acc</td><td>0.4100</td><td>0.3900</td>" in page, "public benchmarks"
    assert "A line a trial" in page and "What moved the loss" in page, "parallel coordinates and importance"
    assert "t2" in page and "better than few-shot" in page


def test_answers_are_text_and_nothing_is_fetched(page: str) -> None:
    assert "<script" not in page and "<img" not in page and "<b>Where" not in page and "<i>x</i>" not in page
    assert "&lt;script&gt;document.title" in page
    assert re.findall(r'(?:src|href)="(?!data:|#)', page) == []
    assert re.findall(r"url\((?!#)|@import|javascript:|\bon\w+=\"", page) == []
    assert "default-src 'none'" in page


def test_costs_of_1000_correct_answers(tmp_path: Path) -> None:
    _, store = run_folder(tmp_path, MODEL, merged=False)
    rows = {c["model"]: c for c in report.costs(report.gather(store), api=(1.0, 2.0))}
    # 20 s for 40 answers at $1.80 an hour, 95% right.
    assert rows["tuned"]["dollars"] == pytest.approx(1000 * 20 / 40 / 3600 * 1.8 / 0.95)
    assert rows["few_shot"]["dollars"] == pytest.approx(1000 * 50 / 40 / 3600 * 1.8 / 0.4)
    assert rows["API"]["share"] == 0.4 and "if it is right as often" in rows["API"]["basis"]
    asked = sum(len(p["prompt"][0]["content"]) for p in report.gather(store).predictions["few_shot"]) / 4 / 40
    assert rows["API"]["dollars"] == pytest.approx(1000 * (asked * 1e-6 + 1e-6 * 2 * 2.5) / 0.4, rel=0.2)


def test_markdown_says_the_same(tmp_path: Path) -> None:
    _, store = run_folder(tmp_path, MODEL, merged=False)
    text = reporting.report_text(store, "md")
    assert "| json\\_match | 0.050" in text and "**forgetting**" in text and "<script" not in text
    with pytest.raises(InputError, match="html or md"):
        reporting.report_text(store, "pdf")


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    from ft_ray.manifest import Manifest

    recipe, store = run_folder(tmp_path, MODEL, merged=False)
    Manifest.start(recipe).save(store)
    for name in store.list():
        if name.startswith(("predictions", "data_check")):
            store.remove(name)
    text = reporting.report_text(store)
    assert "not started" in text and "<h2>Training</h2>" not in text and "<h2>What was asked</h2>" in text
    with pytest.raises(InputError, match="neither a run folder nor a run"):
        reporting.write_report(str(tmp_path / "gone"))


def test_a_sweep_that_no_run_has_followed(tmp_path: Path) -> None:
    recipe, store = run_folder(tmp_path, MODEL, merged=False)
    _sweep(store)
    sweep = store.read_json("sweep/sweep.json") | {"recipe": recipe.to_dict()}
    for name in store.list():
        store.remove(name)
    store.write_json("sweep/sweep.json", sweep)
    text, _ = reporting.write_report("support", storage=str(tmp_path))
    assert "<h2>Sweep</h2>" in text and "6 trials, the best t5 with validation loss" in text
    assert "<h3>Search space</h3>" in text and "loguniform" in text and "ft-ray sweep RECIPE" in text


def test_charts_hold_odd_numbers() -> None:
    assert charts.lines([], x="x", y="y", title="t") == ""
    one = charts.lines([charts.Series("a<b", [(1.0, 2.0)])], x="x", y="y", title='"t"')
    assert "a&lt;b" in one and "circle" in one and "nan" not in one.lower()
    spiky = [(float(i), 1.0 if i != 50 else 1e9) for i in range(100)] + [(101.0, float("nan"))]
    drawn = charts.lines([charts.Series("a", spiky)], x="x", y="y", title="t")
    assert "nan" not in drawn and "1e9" not in drawn, "one spike does not flatten the rest"
    flat = charts.lines([charts.Series("a", [(0.0, 5.0), (1.0, 5.0)])], x="x", y="y", title="t")
    assert "polyline" in flat and "nan" not in flat
    assert charts.bars([("a", float("nan"), None, None)], title="t") == ""
    assert charts.bars([("<a>", 0.0, 0.0, 0.1)], title="t").count("<rect") == 1


@pytest.fixture
def visited(page: str) -> Iterator[tuple[str, list[str]]]:
    """A server of the page alone: (its address, the paths that were asked for)."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = page.encode()
            self.send_response(200 if self.path == "/report.html" else 404)
            self.send_header("content-type", "text/html; charset=utf-8")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/report.html", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_a_browser_renders_it(visited: tuple[str, list[str]], look: str, tmp_path: Path) -> None:
    url, asked = visited
    shot = Path(os.environ.get("FT_RAY_TEST_SHOTS", tmp_path)) / f"{look}.png"
    width = 390 if look == "phone" else 1100
    extra = ["--blink-settings=preferredColorScheme=0"] if look == "dark" else []
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--disable-background-networking", "--enable-logging=stderr", "--log-level=0",
        f"--user-data-dir={tmp_path}/user",
        f"--window-size={width},{7000 if look != 'phone' else 9000}", f"--screenshot={shot}", *extra, url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert shot.exists() and shot.stat().st_size > 30_000, done.stderr[-2000:]
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
    assert set(asked) == {"/report.html"}, "the page asks for nothing else"
