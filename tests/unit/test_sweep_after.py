"""What a finished sweep says: confirmation, more-data curve, importance, hard rows, pictures; and the live table."""

from __future__ import annotations

import csv
import io
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from rich.console import Console

from ft_ray import charts, confirmation, sweep_charts
from ft_ray.confirmation import DEFAULT, SeedRun
from ft_ray.data_curve import data_curve, fit
from ft_ray.errors import InputError
from ft_ray.hard_rows import hard_rows, to_csv
from ft_ray.sweep_importance import comparable, importance
from ft_ray.sweep_results import Point, SweepResult, TrialResult
from ft_ray.sweep_table import SweepTable, line, table


def sweep(trials: list[TrialResult]) -> SweepResult:
    return SweepResult(
        name="s<1>", recipe={}, space={}, trials=trials, mean_k=4.0, seconds=60, trained_tokens=10, device="cpu",
        shared=True,
    )  # fmt: skip


def trial(number: int, config: dict[str, Any], loss: float, *, last: int = 40, status: str = "done") -> TrialResult:
    history = [Point(step=s, validation_loss=loss + (40 - s) / 100) for s in range(10, last + 1, 10)]
    return TrialResult.model_validate({
        "id": f"t{number}", "config": config, "status": status, "steps": last, "tokens": last, "history": history,
        "best_step": last, "best_loss": history[-1].validation_loss, "checkpoint": f"sweep/trials/t{number}",
    })  # fmt: skip


def drawn(count: int = 16) -> SweepResult:
    """The learning rate decides, the dropout hardly matters."""
    rng, trials = random.Random(0), []
    for i in range(count):
        lr, dropout = 10 ** rng.uniform(-5, -3), rng.choice((0.0, 0.05, 0.1))
        loss = 0.5 + abs(math.log10(lr) + 4) + 0.01 * dropout
        early = loss > 0.9
        config = {"optim.lr": lr, "lora.dropout": dropout, "lora.targets": ("all-linear", "attention")[i % 2]}
        trials.append(trial(i, config, loss, last=20 if early else 40, status="pruned" if early else "done"))
    return sweep(trials)


# The confirmation


def seed_runs(seeds: int, rows: int, shift: float, *, noise: float, between: float, seed: int = 0) -> list[SeedRun]:
    """Losses with a row effect shared by all, a seed effect shared by a run's rows, and noise of their own."""
    rng = random.Random(seed)
    effects = [random.Random(1000 + i).gauss(1, 0.5) for i in range(rows)]
    found = []
    for _ in range(seeds):
        run = rng.gauss(0, between)
        found.append(SeedRun(tuple((4 * (e + shift + run + rng.gauss(0, noise)), 4) for e in effects)))
    return found


def test_a_clear_gain_wins_and_a_small_one_does_not() -> None:
    default = seed_runs(3, 80, 0, noise=0.05, between=0.01, seed=1)
    clear = seed_runs(3, 80, -0.2, noise=0.05, between=0.01, seed=2)
    shifts = (-0.03, 0.02, -0.005)  # better on average, worse under one of three seeds
    small = [SeedRun(tuple((s + 4 * d, n) for s, n in run.rows)) for run, d in zip(default, shifts, strict=True)]
    found = confirmation.confirm({DEFAULT: default, "t1": clear, "t2": small})
    assert found.winner == "t1" and found.comparisons[0].name == "t1" and found.comparisons[0].high < 0
    assert re.search(r"t1 is better than the default \(difference of the loss -0\.\d+, 95% interval \[", found.verdict)
    none = confirmation.confirm({DEFAULT: default, "t2": small})
    assert none.winner == DEFAULT and none.verdict.startswith("no better than the default: t2 came closest")
    assert none.losses_of(DEFAULT) == none.default_losses and len(none.losses_of("t2")) == 3
    assert none.to_dict()["comparisons"][0]["better"] is False


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Coverage of the true difference over 200 repeats, with scatter between seeds and between rows."""
    inside = 0
    for repeat in range(200):
        rng = random.Random(repeat)
        rows = [rng.gauss(-0.1, 0.3) for _ in range(40)]  # the row's own difference: what a validation set draws

        def runs(effect: list[float], rng: random.Random = rng) -> list[SeedRun]:
            made = []
            for _ in range(3):
                seed = rng.gauss(0, 0.05)
                made.append(SeedRun(tuple((10 * (2 + e + seed + rng.gauss(0, 0.05)), 10) for e in effect)))
            return made

        _, low, high = confirmation.paired_interval(runs(rows), runs([0.0] * 40))
        inside += low <= -0.1 <= high
    assert inside >= 184  # of 200: 95% would be 190; a bound that right code fails once in thousands of draws


def test_rows_of_one_prompt_group_count_once() -> None:
    one = seed_runs(3, 20, -0.1, noise=0.1, between=0.0, seed=5)
    other = seed_runs(3, 20, 0, noise=0.1, between=0.0, seed=6)
    twice = [SeedRun(r.rows * 2) for r in one], [SeedRun(r.rows * 2) for r in other]
    names = [str(i) for i in range(20)]
    plain = confirmation.paired_interval(one, other, names)
    assert confirmation.paired_interval(*twice, names * 2) == pytest.approx(plain)
    _, low, high = confirmation.paired_interval(*twice)
    assert high - low < plain[2] - plain[1]


def test_what_cannot_be_compared_is_said() -> None:
    runs = seed_runs(2, 5, 0, noise=0.1, between=0)
    with pytest.raises(InputError, match="same validation rows"):
        confirmation.paired_interval(runs, [SeedRun(r.rows[:4]) for r in runs])
    with pytest.raises(InputError, match="same seeds"):
        confirmation.paired_interval(runs, runs[:1])
    with pytest.raises(InputError, match="needs the default"):
        confirmation.confirm({"t1": runs})
    assert confirmation.paired_interval(runs, runs) == (0, 0, 0)


def test_a_retrained_winner_has_to_match_its_seeds() -> None:
    assert confirmation.match(0.50, [0.49, 0.51, 0.505])[0]
    assert not confirmation.match(0.70, [0.49, 0.51, 0.505])[0]
    assert confirmation.match(0.504, [0.5, 0.5, 0.5])[0]  # equal seeds: 1% is allowed
    assert confirmation.match(0.54, [0.5])[0] and not confirmation.match(0.56, [0.5])[0]  # one: 10%
    # Two tell little of the scatter (15.6 deviations a side): no more than one alone allows.
    assert confirmation.match(0.54, [0.49, 0.51])[0] and not confirmation.match(0.56, [0.49, 0.51])[0]
    wide = [0.4, 0.6]  # seeds that lie further apart are not refused themselves
    assert all(confirmation.match(loss, wide)[0] for loss in wide) and not confirmation.match(0.61, wide)[0]


# More data


def test_a_power_law_is_found_again() -> None:
    floor, scale, exponent = fit([(n, 0.4 + 8 * n**-0.5) for n in (100, 200, 400, 800, 1600)])
    assert (floor, scale, exponent) == pytest.approx((0.4, 8, 0.5), rel=1e-6)
    floor, scale, exponent = fit([(n, 8 * n**-0.25) for n in (100, 400)])
    assert (floor, scale, exponent) == pytest.approx((0, 8, 0.25))


@pytest.mark.parametrize(
    ("losses", "advice"),
    [
        ((1.6, 1.1, 0.8, 0.6), "should help"),
        ((0.52, 0.504, 0.5, 0.4995), "help little"),
        ((0.5, 0.52, 0.5, 0.55), "did not lower"),
    ],
)
def test_the_curve_advises_in_one_sentence(losses: tuple[float, ...], advice: str) -> None:
    shares = (0.125, 0.25, 0.5, 1)
    trials = [trial(i, {"data.fraction": shares[i]}, loss) for i, loss in enumerate(losses)]
    trials.append(trial(9, {"data.fraction": 1}, losses[-1] + 1))  # a worse trial of a size does not speak for it
    trials.append(trial(10, {"data.fraction": 0.5}, 0.0, last=20, status="pruned"))
    curve = data_curve(sweep(trials), 1600)
    assert curve is not None and [n for n, _ in curve.points] == [200, 400, 800, 1600]
    assert [loss for _, loss in curve.points] == pytest.approx(losses)
    assert advice in curve.advice and "4 sizes, 1 trial at the fewest" in curve.advice and curve.advice[-1] == "."
    assert data_curve(sweep(trials[:1]), 1600) is None


# Importance and pictures


def test_importance_names_what_decided_and_how_far_to_trust_it() -> None:
    result = drawn()
    pairs, step = comparable(result)
    assert step == 20 and len(pairs) == 16  # the last step that stopped trials reached
    found = importance(result)
    assert found is not None and next(iter(found.shares)) == "optim.lr"
    assert found.shares["optim.lr"][0] > 0.6 and sum(mean for mean, _, _ in found.shares.values()) == pytest.approx(1)
    assert "From 16 trials at step 20" in found.caveat and "few for 3 settings (about 30 would do)" in found.caveat
    assert importance(drawn(3)) is None


def test_the_page_is_one_file_and_the_pictures_are_real() -> None:
    result = drawn()
    runs = {
        DEFAULT: seed_runs(3, 20, 0, noise=0.05, between=0.01, seed=1),
        "t1": seed_runs(3, 20, -0.2, noise=0.05, between=0.01, seed=2),
    }
    files, page = sweep_charts.pictures(result, confirmed=confirmation.confirm(runs))
    assert set(files) == {"parallel.png", "loss.png", "importance.png", "confirmation.png"}
    assert "T1 is better than the default" in page
    assert all(content.startswith(b"\x89PNG") and len(content) > 5000 for content in files.values())
    assert "s&lt;1&gt;" in page and "<script" not in page and "@import" not in page and "url(#" in page
    assert not re.search(r'(?:href|src)="(?!#)', page.replace('href="#', ""))
    assert re.sub(r"http://www\.w3\.org/[\w/]+", "", page).count("://") == 0
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    ids = [i for text in pictures for i in set(re.findall(r'id="([^"]+)"', text))]
    assert len(pictures) == 4 and len(ids) == len(set(ids))
    for text in pictures:
        root = ElementTree.fromstring(text)
        assert root.get("aria-label") and root.get("width") is None
        assert "currentColor" in text and charts.INK not in text


def test_a_sweep_without_a_loss_has_a_page_without_pictures() -> None:
    failed = TrialResult(id="t0", config={"lora.r": 8}, status="failed", steps=0, tokens=0, history=[], error="no")
    files, page = sweep_charts.pictures(sweep([failed]))
    assert files == {} and "failed" in page


def test_parallel_axes_take_names_numbers_and_gaps() -> None:
    axes = [
        charts.Axis("a.name", ["x", "y", None]), charts.Axis("same", [1, 1, 1]),
        charts.Axis("log", [1e-5, 1e-3, 1e-4], log=True),
        charts.Axis("many", [1.0, 2.0, 7.0]),
    ]  # fmt: skip
    assert charts.png(charts.parallel(axes, [None, charts.ACCENT, None], title="t")).startswith(b"\x89PNG")


# Hard rows


def test_a_row_is_hard_when_every_trial_says_so() -> None:
    rng = random.Random(0)
    losses = {name: [rng.uniform(0.1, 0.5) for _ in range(200)] for name in ("a", "b", "c")}
    for found in losses.values():
        found[17], found[42], found[50] = 6.0, 4.0, math.nan
    losses["b"][99] = 9.0  # one trial's alone
    hard = hard_rows(losses)
    assert [one.row for one in hard] == [17, 42] and hard[0].least == 6.0 and set(hard[0].losses) == {"a", "b", "c"}
    assert hard_rows({"a": [0.5, 0.6, 0.55], "b": [0.5, 0.6, 0.55]}) == []  # an even spread is no wrong label
    assert hard_rows({}) == []
    with pytest.raises(InputError, match="same rows"):
        hard_rows({"a": [1.0], "b": [1.0, 2.0]})
    turns = (("system", "s"), ("user", "a,\nb"), ("assistant", "=SUM(A1)"))
    messages = [{"role": role, "content": content} for role, content in turns]
    rows = [{"messages": messages, "file": "x.jsonl", "line": i} for i in range(200)]
    read = list(csv.reader(io.StringIO(to_csv(hard, rows))))
    assert read[0] == ["file", "line", "prompt", "answer", "least_loss", "loss_a", "loss_b", "loss_c"]
    assert read[1] == ["x.jsonl", "17", "a,\nb", "'=SUM(A1)", "6.0000", "6.0000", "6.0000", "6.0000"]


# The live table


def event() -> dict[str, Any]:
    rows = [
        {"id": "t0", "point": {"lora.r": 8, "lora.alpha": 16, "lora.dropout": 0.05, "optim.lr": 2e-4}, "step": 30,
         "validation_loss": 0.9, "state": "running"},
        {"id": "t1", "point": {"lora.r": 16, "lora.alpha": 32, "lora.dropout": 0.0, "optim.lr": 1e-3}, "step": 60,
         "validation_loss": 0.5, "state": "terminated"},
        {"id": "t2", "point": {"lora.r": 4}, "state": "pending"},
    ]  # fmt: skip
    return {"kind": "sweep", "rows": rows, "total": 4, "mean_k": 2.5, "forwards": 31, "seconds": 75}


def test_the_table_shows_trials_and_the_line_the_best() -> None:
    text = io.StringIO()
    Console(file=text, width=100).print(table(event(), rows=2))
    shown = text.getvalue()
    assert "4 trials: 1 running, 1 pending, 1 ended, 31 forwards of 2.5, 1m15s" in " ".join(shown.split())
    assert "2.00e-04" in shown and "30" in shown and "and 1 more" in shown
    said = line(event())
    assert said.endswith("best t1 loss 0.5000 at step 60 (r 16, alpha 32, dropout 0, lr 0.001)") and "\n" not in said


def test_a_log_gets_a_line_at_times_and_the_rest_goes_on() -> None:
    text, others = io.StringIO(), []
    shown = SweepTable(Console(file=text, width=200), others.append, every=3600)
    with shown.running():
        for _ in range(5):
            shown(event())
        shown({"kind": "status", "message": "hello"})
    assert [e for e in others if e["kind"] != "shown"] == [{"kind": "status", "message": "hello"}]
    assert len(text.getvalue().splitlines()) == 2  # the first, and the last when it ends


def test_a_terminal_gets_the_live_table() -> None:
    text = io.StringIO()
    shown = SweepTable(Console(file=text, force_terminal=True, width=100, height=30), lambda _: None)
    with shown.running():
        shown(event())
        shown({"kind": "stage", "stage": "merge", "state": "start"})
    assert "t1" in text.getvalue() and "0.5000" in text.getvalue()


@pytest.mark.parametrize("private", [True, False])
def test_no_key_of_the_driver_goes_into_the_trials(monkeypatch: pytest.MonkeyPatch, private: bool) -> None:
    from ray.tune.execution import class_cache

    from ft_ray import sweep_search

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    monkeypatch.setattr(sweep_search, "may_grow", lambda: not private)
    before = set(class_cache.ENV_VARS_TO_PROPAGATE), dict(class_cache.DEFAULT_ENV_VARS)

    class Trial:
        pass

    with sweep_search.trial_variables():
        made = class_cache._ActorClassCache().get(Trial)._default_options["runtime_env"]  # Tune makes its actors' here
    assert "planted" not in str(made)
    assert ("PL_DISABLE_FORK" in str(made)) != private
    if private:
        assert made.serialize() == "{}", "as good as none: such a trial may take a process that is there"
    assert before == (class_cache.ENV_VARS_TO_PROPAGATE, class_cache.DEFAULT_ENV_VARS)
