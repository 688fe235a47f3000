"""The report: complete, escaped, self-contained, and rendered by a real browser without an error or a request."""

from __future__ import annotations

import contextlib
import json
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
from ft_ray.confirmation import Comparison, Confirmation
from ft_ray.errors import BudgetSpent, InputError
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
    verdict = "no better than the default: t0 came closest (difference of the loss -0.0050)."
    confirmed = Confirmation((Comparison("t0", (0.1, 0.2), -0.005, -0.1, 0.09),), (0.11, 0.2), "default", verdict, 0.95)
    store.write_json("sweep/analysis.json", {
        "best_trial": "t0", "chosen": "default", "config": {}, "confirmation": confirmed.to_dict(), "data_curve": None,
        "hard_rows": 3, "relabel": "sweep/relabel.csv",
    })  # fmt: skip


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
    assert re.search(r">arc_easy</td><td[^>]*>acc</td><td[^>]*>0.4100</td><td[^>]*>0.3900</td>", page), "benchmarks"
    assert "A line a trial" in page and "What moved the loss" in page, "parallel coordinates and importance"
    assert "The recipe&#x27;s own values went on. 3 training rows stayed hard" in page, "what the sweep ended in"
    assert "No better than the default: t0 came closest" in page, "its confirmation"
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


def test_markdown_says_the_same(page: str, tmp_path: Path) -> None:
    _, store = run_folder(tmp_path, MODEL, merged=False)
    _sweep(store)
    text = reporting.report_text(store, "md", api=(0.15, 0.6))
    assert "| json\\_match | 0.050" in text and "**forgetting**" in text and "<script" not in text
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert len(titles) == 12 and re.findall(r"^## (.*)$", text, re.MULTILINE) == titles
    for said in ("held-out loss | 2.1000 | 0.1100", "loss on general data | 2.0000 | 2.4000", "20 of 32 answers",
                 "Planned 3.50 GiB, measured 3.30 GiB (-6%)", "loguniform", "trained tokens: 30,720",
                 "160 training rows, under the floor", "own values went on", "No better than the default: t0",
                 "Share of the loss's variance: ", "| t5 |", "arc\\_easy", "I do not know",
                 "The training loop took", "all stages of the run together",
                 "batch.per\\_device 8 -&gt; 4"):  # fmt: skip
        assert said in text, said
    assert "A line a trial" not in text, "no key to a picture that is not there"
    assert "| who | text | score |" in text and "&lt;script&gt;document.title" in text
    with pytest.raises(InputError, match="html or md"):
        reporting.report_text(store, "pdf")


def test_early_stopping_is_told_from_a_budget(tmp_path: Path) -> None:
    _, store = run_folder(tmp_path, MODEL, merged=False, evaluation={"metric": "json_match", "early_stop": 2})
    manifest = store.read_json("manifest.json")
    train = manifest["stages"]["train"]
    train["metrics"]["best_step"] = 20
    for record in train["metrics"]["history"]:
        record["total"] = 90
    store.write_json("manifest.json", manifest)
    said = "Early stopping ended it at step 60 of 90; the best step, 20, is kept."
    assert said in reporting.report_text(store, "md")
    train["status"] = "stopped"
    store.write_json("manifest.json", manifest)
    assert "Early stopping" not in reporting.report_text(store, "md")


def test_shares_are_drawn_on_a_scale_to_1() -> None:
    """Three models that got nothing right: their intervals may not fill the chart."""
    drawn = charts.bars([("base", 0.0, 0.0, 0.14)], title="t")
    whole = charts.bars([("base", 1.0, 0.0, 1.0)], title="t")
    ends = [float(re.search(r"H([\d.]+)M", one)[1]) for one in (drawn, whole)]  # type: ignore[index]
    assert (ends[0] - 150) / (ends[1] - 150) == pytest.approx(0.14, abs=0.01)


def test_a_run_that_stops_leaves_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of `run` from a spent budget on; that a budget stops a training is `test_path`'s."""
    from ft_ray import pipeline, stages
    from ft_ray.manifest import Manifest
    from ft_ray.run_folder import RunFolder

    recipe, store = run_folder(tmp_path, MODEL, merged=False)
    manifest = Manifest.load(store)
    assert manifest is not None
    manifest.stages["train"].status = "stopped"
    manifest.save(store)
    said: list[dict[str, Any]] = []
    folder = RunFolder(recipe, store, manifest, said.append)

    def spent(*_: Any) -> None:
        raise BudgetSpent("the budget is spent")

    monkeypatch.setattr(stages, "opened", lambda *_, **__: contextlib.nullcontext((folder, None)))
    monkeypatch.setattr(stages, "check_data", lambda *_: None)
    monkeypatch.setattr(stages, "train", spent)
    with pytest.raises(BudgetSpent):
        pipeline.run(recipe)
    assert "<h2>Training</h2>" in store.read("report.html").decode()
    assert any("report.html" in str(e.get("message")) for e in said)


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


def test_ticks_are_told_apart() -> None:
    rates = [(float(i), 2.3e-4 * i / 40) for i in range(41)]
    drawn = charts.lines([charts.Series("lr", rates)], x="step", y="rate", title="Learning rate")
    labels = re.findall(r'text-anchor="end">([^<]+)</text>', drawn)
    assert len(labels) == len(set(labels)) and "1.5e-4" in labels and "2e-4" in labels, labels
    axis = re.search(r'<text x="2" y="(\d+)">rate</text>', drawn)
    top = min(float(y) for y in re.findall(r'<text x="[\d.]+" y="([\d.]+)" text-anchor="end">[\d.]', drawn))
    assert axis and float(axis[1]) < top - 10, "the axis's name stands above its ticks"


def test_the_report_of_a_run_without_evaluation_says_what_it_did_not_see(tmp_path: Path) -> None:
    _, store = run_folder(tmp_path, MODEL, merged=False)
    manifest = store.read_json("manifest.json")
    manifest["stages"] = {"train": manifest["stages"]["train"]}
    store.write_json("manifest.json", manifest)
    for name in store.list():
        if name.startswith("predictions"):
            store.remove(name)
    assert "No known fault in losses. No score was measured." in reporting.report_text(store)


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


# The page has no script of its own, so what is around it measures. Scripts of the frame stay off.
FRAME = """<!doctype html><link rel="icon" href="data:,"><body style="margin:0">
<iframe src="/report.html" style="border:0;width:390px;height:844px">
</iframe><script>const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const cells = [...page.querySelectorAll("section:nth-of-type(2) td")].map(c => c.getBoundingClientRect());
  const seen = cells.every(c => c.left >= 0 && c.right <= 390.5);
  const small = [...page.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height).filter(h => h);
  document.body.dataset.found = JSON.stringify({width: root.scrollWidth, seen, cells: cells.length,
    smallest: Math.min(...small)});
};</script>"""


@pytest.fixture
def visited(page: str) -> Iterator[tuple[str, list[str]]]:
    """A server of the page, and of a frame as wide as a phone around it: (its address, the paths asked for)."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = {"/report.html": page, "/phone.html": FRAME}.get(self.path, "").encode()
            self.send_response(200 if body else 404)
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


def _browse(url: str, folder: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--hide-scrollbars", "--disable-background-networking", "--enable-logging=stderr", "--log-level=0",
        f"--user-data-dir={folder}/user", *extra, url,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(("look", "background"), [("light", (255, 255, 255)), ("dark", (18, 22, 29))])
def test_a_browser_renders_it(
    visited: tuple[str, list[str]], look: str, background: tuple[int, int, int], tmp_path: Path
) -> None:
    from PIL import Image

    url, asked = visited
    shot = Path(os.environ.get("FT_RAY_TEST_SHOTS", tmp_path)) / f"{look}.png"
    extra = ["--blink-settings=preferredColorScheme=0"] if look == "dark" else []
    done = _browse(url, tmp_path, "--window-size=1100,7000", f"--screenshot={shot}", *extra)
    assert shot.exists(), done.stderr[-2000:]
    with Image.open(shot) as image:
        seen = image.convert("RGB")
        assert seen.getpixel((2, 2)) == background and seen.getpixel((2, 3000)) == background
        column = {seen.getpixel((300, y)) for y in range(0, 3000, 3)}
    assert len(column) > 20, "something is drawn on it"
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
    assert set(asked) == {"/report.html"}, "the page asks for nothing else"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_nothing_is_out_of_sight_on_a_phone(visited: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = visited
    frame = url.replace("report.html", "phone.html")
    done = _browse(frame, tmp_path, "--window-size=800,900", "--virtual-time-budget=5000", "--dump-dom")
    found = re.search(r'data-found="(.*?)"', done.stdout)
    assert found, done.stderr[-2000:]
    measured = json.loads(found[1].replace("&quot;", '"'))
    assert measured["width"] <= 390, "the page is no wider than the screen"
    assert measured["cells"] > 10 and measured["seen"], "every score is in sight"
    assert measured["smallest"] >= 10, "the smallest letter of a chart, in pixels"
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
    assert set(asked) == {"/phone.html", "/report.html"}
