"""Diagnoses on histories written by hand, the patches they propose, corrections, and the verbs of the command line."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from ft_ray import corrections, recipe, remedies, report
from ft_ray.chat import Chat, load_tokenizer
from ft_ray.cli import app
from ft_ray.dataset import prepare
from ft_ray.diagnosis import Watch, after, during
from ft_ray.errors import DataError, StorageError
from ft_ray.forgetting import drift
from ft_ray.recipe import Recipe, from_dict
from ft_ray.rows import group_of, kept_aside
from tests.run_folders import history, predictions, run_folder

Records = list[dict[str, Any]]


def make(**values: Any) -> Recipe:
    return from_dict({"name": "r", "model": {"id": "m"}, "data": {"train": [{"path": "x"}]}, **values})


def steps(losses: list[float], norms: list[float] | None = None) -> Records:
    return [
        {"kind": "step", "step": i + 1, "loss": loss, "epoch": (i + 1) / 10, "lr": 1e-4,
         "grad_norm": norms[i] if norms else 1.0}
        for i, loss in enumerate(losses)
    ]  # fmt: skip


def evals(pairs: list[tuple[int, float]], **more: list[float]) -> Records:
    return [
        {"kind": "eval", "step": s, "loss": loss, **{k: v[i] for k, v in more.items()}}
        for i, (s, loss) in enumerate(pairs)
    ]


def noisy(level: list[float], seed: int = 0, spread: float = 0.03) -> list[float]:
    rng = random.Random(seed)
    return [x * (1 + rng.gauss(0, spread)) for x in level]


def curve(n: int, start: float, end: float, pace: float) -> list[float]:
    return [end + (start - end) * math.exp(-i / pace) for i in range(n)]


@pytest.mark.parametrize("seed", range(20))
def test_a_sound_history_has_no_finding(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randrange(30, 200)
    made = noisy(curve(n, rng.uniform(1, 4), rng.uniform(0.01, 0.04), n / rng.uniform(5, 9)), seed, 0.08)
    held = [(i, 1.1 * made[i] + 0.05) for i in range(n // 5 - 1, n, n // 5)]
    assert during(steps(made) + evals(held), make()) == []
    assert [d.code for d in after(steps(made) + evals(held), make()) if d.severity != "info"] == []


CASES: dict[str, tuple[Records, dict[str, Any], str]] = {
    "rises for good": (steps([2.0 * 0.9**i for i in range(20)] + [3.0 + i / 10 for i in range(20)]), {}, "divergence"),
    "not a number": ([], {"error": "the loss became nan at step 4: lower optim.lr"}, "divergence"),
    "thrown off": (
        steps([4.0, 4.2, 3.0, 5.0] + [2.3] * 36, [3.0, 3.5, 8.0, 129.0] + [0.01] * 36), {}, "divergence"
    ),
    # As measured: the tiny model at 0.5 instead of 5e-3. No step's own gradient is large; the one after is nothing.
    "thrown off without a spike": (
        steps([5.9, 5.4, *noisy([5.19] * 38, spread=0.01)], [0.95, 0.6] + [0.001] * 38), {"lr": 0.5}, "divergence"
    ),
    "jumps": (
        steps([x * (3 if i in (30, 44) else 1) for i, x in enumerate(noisy(curve(60, 2, 0.9, 8)))]), {}, "loss_spikes"
    ),
    "up, then down": (
        steps([2.0, 2.0, 2.0] + [3.5] * 9 + curve(60, 3.0, 0.02, 9)), {}, "learning_rate_edge"
    ),
    "stuck at a huge rate": (steps([3.0] * 40), {"lr": 0.1}, "learning_rate_edge"),
    "learnt by heart": (
        steps(curve(100, 2, 0.05, 20)) + evals([(20, 1.0), (40, 0.8), (60, 0.95), (80, 1.1), (100, 1.3)]),
        {}, "overfitting"
    ),
    "learns nothing": (steps(noisy([2.0] * 60)), {"lr": 1e-6}, "underfitting"),
    "ended too early": (steps([3.0 - i / 50 for i in range(100)]) + evals([(50, 2.0), (100, 1.1)]), {}, "underfitting"),
    "a loss that stays high": (
        steps(noisy(curve(60, 5.55, 4.61, 12), spread=0.005)) + evals([(45, 4.63), (60, 4.61)]), {}, "underfitting"
    ),
    "a handful of steps": (steps([2.0, 1.5, 1.2]), {}, "too_short"),
    "flat": (
        steps(noisy(curve(100, 2, 0.5, 6), spread=0.002)) + evals([(50, 0.6), (100, 0.6)]), {}, "plateau"
    ),
    "format lost on the way": (
        steps(curve(40, 2, 0.01, 5)) + evals([(20, 1.0), (40, 0.9)], valid=[0.97, 0.7]), {}, "broken_format"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_fault_by_name(name: str) -> None:
    records, more, code = CASES[name]
    made = make(optim={"lr": more.get("lr", 2e-4)})
    found = after(records, made, error=more.get("error"))
    assert [d.code for d in found if d.severity != "info" or d.code == code] == [code], found
    assert found[0].sentence.endswith(".") and found[0].evidence
    for diagnosis in found:
        if diagnosis.patch:
            changed = remedies.apply(made, [diagnosis.patch], "r-2")
            assert changed.hash != made.hash


def test_the_live_watch_says_each_once() -> None:
    watch = Watch(make())
    said = []
    records, _, _ = CASES["learnt by heart"]
    for record in sorted(records, key=lambda r: (r["step"], r["kind"] == "eval")):
        said += watch(record)
    assert [d.code for d in said] == ["overfitting"]
    assert said[0].evidence["best_step"] == 40
    events: Records = []
    listen = Watch(make()).around(events.append)
    for record in CASES["rises for good"][0]:
        listen(dict(record))
    assert [e["code"] for e in events if e["kind"] == "diagnosis"] == ["divergence"]


def test_patches() -> None:
    divergence = remedies.remedy("divergence", make(optim={"lr": 2e-2}), {})
    assert divergence == {"optim.lr": 5e-4, "schedule.warmup": 0.1}, "back into the usual range"
    assert remedies.remedy("divergence", make(optim={"lr": 3e-4}), {})["optim.lr"] == 1e-4
    fitted = remedies.remedy("overfitting", make(schedule={"epochs": 20}), {"best_epoch": 3.2, "best_step": 40})
    assert fitted == {"evaluation.early_stop": 2, "schedule.epochs": 4, "lora.dropout": 0.1}
    forgot = make(evaluation={"forgetting": "g.jsonl"})
    assert remedies.remedy("forgetting", forgot, {}) == {"data.general": {"path": "g.jsonl", "share": 0.15}}
    mixed = remedies.apply(forgot, [remedies.remedy("forgetting", forgot, {})], "r-2")
    assert mixed.data.general is not None and mixed.data.general.share == 0.15
    assert remedies.remedy("forgetting", mixed, {}) == {"data.general.share": 0.2}, "at most a fifth"
    both = remedies.apply(make(), [{"optim.lr": 1e-4}, {"optim.lr": 5e-5, "schedule.epochs": 2}])
    assert (both.optim.lr, both.schedule.epochs) == (5e-5, 2)
    text = remedies.recipe_text(forgot, mixed, ["It forgot."])
    again = recipe.from_dict(__import__("yaml").safe_load(text))
    assert again == mixed and "# Changed:" in text and "data.general" in text


def test_a_rate_100_times_too_high_goes_back_into_the_range() -> None:
    """Half of it would still be 100 times too high: measured, it collapsed again."""
    records, more, _ = CASES["thrown off without a spike"]
    for code in ("divergence", "learning_rate_edge", "loss_spikes", "constant_answers"):
        assert remedies.remedy(code, make(optim={"lr": more["lr"]}), {})["optim.lr"] == 5e-4, code
    assert remedies.remedy("learning_rate_edge", make(optim={"lr": 1e-3}), {})["optim.lr"] == 5e-4
    (found,) = after(records, make(optim={"lr": more["lr"]}))
    assert found.patch["optim.lr"] == 5e-4 and "vanished" in found.sentence
    learnt = steps(curve(40, 5, 1.0, 6), [1.0] * 10 + [0.04] * 30)
    assert "divergence" not in [d.code for d in after(learnt, make())], "a small gradient after a fall is sound"
    settled = steps(curve(60, 1.8, 1.45, 20), [30.0, 30.0, 10.0] + [1.0] * 57)
    assert "divergence" not in [d.code for d in after(settled, make())], "a large first gradient that settles is sound"
    unknown = steps(curve(60, 1.8, 1.45, 20), [0.0] * 60)
    assert "divergence" not in [d.code for d in after(unknown, make())], "without norms nothing is said of them"


def test_what_was_stopped_or_warms_up_has_no_plateau() -> None:
    flat = [{**r, "total": 100} for r in CASES["flat"][0] if r["kind"] == "step"]
    assert [d.code for d in after(flat, make())] == ["plateau"]
    cut = [{**r, "total": 400} for r in flat]
    (unfinished,) = after(cut, make(), stopped=True)
    assert unfinished.code == "unfinished" and "step 100 of 400" in unfinished.sentence and unfinished.patch == {}
    falling = [{**r, "total": 400} for r in CASES["ended too early"][0] if r["kind"] == "step"]
    assert [d.code for d in after(falling, make(), stopped=True)] == ["unfinished"], "no more epochs for a spent budget"
    lost = after(falling, make(), error="a worker was lost 4 times: see the log.")
    assert [d.code for d in lost] == ["unfinished"], "no more epochs for a lost worker"
    warming = [{**r, "total": 100} for r in steps([3.0] * 5 + [2.2] * 95)]
    assert "plateau" in [d.code for d in after(warming, make(schedule={"warmup": 0}))]
    assert "plateau" not in [d.code for d in after(warming, make(schedule={"warmup": 0.8}))]


def test_a_slow_rate_is_raised_rather_than_given_more_epochs() -> None:
    falling = CASES["ended too early"][0]
    (slow,) = after(falling, make(optim={"lr": 1e-6}))
    assert slow.patch == {"optim.lr": 1e-4} and "far below" in slow.sentence
    (usual,) = after(falling, make(optim={"lr": 2e-4}))
    assert usual.patch == {"schedule.epochs": 6}


def answers(said: list[str], meant: list[str]) -> Records:
    return [{"id": str(i), "reference": r, "prediction": p, "scores": {}, "prompt": []}
            for i, (p, r) in enumerate(zip(said, meant, strict=True))]  # fmt: skip


def scored(value: float, base: float = 0.1) -> dict[str, Any]:
    return {"primary": "json_match", "tuned": {"json_match": {"value": value}}, "base": {"json_match": {"value": base}}}


def test_the_same_answer_to_everything_is_a_fault() -> None:
    letters = [f'{{"letter": "{"abcdef"[i % 6]}"}}' for i in range(24)]
    one = answers(['{"letter": "e"}'] * 24, letters)
    found = {d.code: d for d in after(history(), make(), predictions=one, scores=scored(0.25))}
    assert set(found) == {"constant_answers", "low_score"}
    assert found["constant_answers"].severity == "error" and found["constant_answers"].patch == {"schedule.epochs": 6}
    assert after(history(), make(), predictions=answers(letters, letters), scores=scored(1.0)) == []
    assert after(history(), make(), predictions=answers(["no"] * 40, ["no"] * 38 + ["yes"] * 2)) == [], "imbalance"
    majority = answers(["no"] * 40, ["no"] * 30 + ["yes"] * 10)
    assert [d.code for d in after(history(), make(), predictions=majority)] == ["constant_answers"]


def test_empty_answers_and_low_scores() -> None:
    letters = ["abcdef"[i % 6] for i in range(60)]
    (empty,) = after(history(), make(), predictions=answers([""] * 60, letters))
    assert empty.code == "empty_answers" and empty.severity == "error"
    (low,) = after(history(), make(), predictions=answers([*letters[1:], "a"], letters), scores=scored(0.3))
    assert low.code == "low_score" and "0.3" in low.sentence
    (gain,) = after(history(), make(), predictions=answers(letters, letters), scores=scored(0.7, base=0.8))
    assert gain.code == "no_gain"
    assert after(history(), make(), predictions=answers(letters, letters), scores=scored(1.0, base=1.0)) == []
    text = [f"text {i}" for i in range(60)]
    assert after(history(), make(), predictions=answers([*text[1:], "x"], text), scores=scored(0.3)) == [], "free text"


def test_a_run_without_finding_is_not_praised_for_what_was_not_measured(tmp_path: Path) -> None:
    _, store = run_folder(tmp_path, Path("/m"), merged=False)
    said = report.sound(report.gather(store))
    assert said == "No known fault in losses and answers. json_match is 0.950 [0.83, 1.00]."
    for name in store.list():
        if name.startswith("predictions"):
            store.remove(name)
    assert report.sound(report.gather(store)).startswith("No known fault in losses.")


def test_dead_adapters_are_found_in_the_weights(tmp_path: Path, tiny_model: Path) -> None:
    _, store = run_folder(tmp_path, tiny_model, merged=False)
    with store.stage("adapter") as out:
        modules = [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in range(4)]
        state = {f"{m}.lora_B.weight": torch.full((4, 2), 0.0 if i == 2 else 0.1) for i, m in enumerate(modules)}
        save_file(
            {**state, **{f"{m}.lora_A.weight": torch.ones(2, 4) for m in modules}}, out / "adapter_model.safetensors"
        )
    norms = report.adapter_norms(store)
    assert len(norms) == 4 and min(norms.values()) == 0
    (found,) = [d for d in report.gather(store).found if d.code == "dead_adapter"]
    assert found.evidence["names"] == ["model.layers.2.self_attn.q_proj"] and "1 of 4" in found.sentence
    (all_dead,) = after(history(), make(optim={"lr": 1e-6}), adapter=dict.fromkeys(norms, 0.0))
    assert all_dead.severity == "error" and all_dead.patch == {"optim.lr": 1e-4}


def test_labels_that_do_not_exist_are_a_broken_format() -> None:
    rows = [{"id": str(i), "reference": "abc"[i % 3], "prediction": "abc"[i % 3], "scores": {}} for i in range(60)]
    assert after(history(), make(), predictions=rows) == []
    for row in rows[:20]:
        row["prediction"] = "The label is a"
    (found,) = after(history(), make(), predictions=rows)
    assert found.code == "broken_format" and "none of the labels" in found.sentence
    free = [{**row, "reference": f"text {i}"} for i, row in enumerate(rows)]
    assert after(history(), make(), predictions=free) == [], "free text has no format"


def test_corrections_are_reviewed_before_they_train(tmp_path: Path) -> None:
    rows = corrections.wrong_answers([*predictions('{"order":"7"}', 30), *predictions("oops", 8, n=10)], "json_match")
    assert [r["why"] for r in rows] == ["not the format"] * 2 + ["json_match 0"] * 10
    assert rows[0]["said"] == "oops" and rows[0]["messages"][-1] == {"role": "assistant", "content": '{"order":"8"}'}
    path, out = tmp_path / "wrong.jsonl", tmp_path / "train.jsonl"
    assert corrections.write(path, rows) == 12
    with pytest.raises(StorageError, match="may hold marks"):
        corrections.write(path, rows)
    with pytest.raises(DataError, match="no row marked ok"):
        corrections.accepted(path, out)
    marked = [json.loads(line) for line in path.read_text().splitlines()]
    marked[0]["mark"], marked[1]["mark"] = "ok", "bad"
    path.write_text("".join(json.dumps(r) + "\n" for r in marked))
    assert corrections.accepted(path, out) == 1
    assert [json.loads(line)["messages"][-1]["content"] for line in out.read_text().splitlines()] == ['{"order":"8"}']
    path.write_text('{"mark": "maybe", "messages": []}\n')
    with pytest.raises(DataError, match=r"wrong.jsonl:1: the mark 'maybe'"):
        corrections.accepted(path, out)


@pytest.mark.parametrize(("share", "general"), [(0.1, 300), (0.5, 60)])
def test_a_share_of_the_rows_takes_its_share_of_general_rows(
    tmp_path: Path, tiny_model: Path, share: float, general: int
) -> None:
    """What a sweep's trial trains on is what a run prepared at that fraction does, even where general rows repeat."""
    task = [{"prompt": f"task {i}", "completion": "done"} for i in range(200)]
    other = [{"prompt": f"general {i}", "completion": "word"} for i in range(general)]
    for name, rows in (("task", task), ("general", other)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    chat = Chat(load_tokenizer(tiny_model))

    def prepared(fraction: float) -> Any:
        data = {
            "train": [{"path": str(tmp_path / "task.jsonl"), "weight": 1.5}],
            "general": {"path": str(tmp_path / "general.jsonl"), "share": share}, "fraction": fraction,
        }  # fmt: skip
        made = from_dict({"name": "r", "model": {"id": "m"}, "data": data, "seed": 3})
        return prepare(made, chat, model_hash="m", cache=tmp_path / "cache")

    whole = prepared(1.0)
    assert whole.subset(1.0, 3) == list(range(len(whole.tokens("train"))))
    for fraction in (0.1, 0.5):
        alone = prepared(fraction)
        assert alone.counts["general"] < whole.counts["general"]
        assert whole.tokens("train").select(whole.subset(fraction, 3))["input_ids"][:] == alone.tokens("train")[
            "input_ids"
        ][:]


def test_drift() -> None:
    assert drift([], []) == {"rows": 0, "changed": 0, "similarity": 1.0, "length": None}
    same = drift(["a b c d", "x"], ["a b c d", "y z"])
    assert (same["rows"], same["changed"], same["similarity"], same["length"]) == (2, 1, 0.5, 6 / 5)


@pytest.mark.parametrize("packing", [False, True])
def test_general_rows_are_in_training_only(tmp_path: Path, tiny_model: Path, packing: bool) -> None:
    task = [{"prompt": f"task {i}", "completion": '{"a":1}' if i % 10 else "{oops"} for i in range(200)]
    other = [{"prompt": f"general {i}", "completion": "word"} for i in range(300)]
    for name, rows in (("task", task), ("general", other)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {
        "train": [{"path": str(tmp_path / "task.jsonl")}],
        "general": {"path": str(tmp_path / "general.jsonl"), "share": 0.2},
        "answers": "json",
    }
    sequence = {"max_length": 128, "packing": packing}
    made = from_dict({"name": "r", "model": {"id": "m"}, "data": data, "sequence": sequence})
    chat = Chat(load_tokenizer(tiny_model))
    prepared = prepare(made, chat, model_hash="m", cache=tmp_path / "cache")
    assert 5 <= prepared.dropped["answers"] <= 20
    assert all(not r["messages"][0]["content"].startswith("general") for s in ("validation", "test", "train")
               for r in prepared.rows(s))  # fmt: skip
    assert prepared.counts["general"] / (prepared.counts["general"] + prepared.counts["train"]) == pytest.approx(
        0.2, abs=0.05
    )
    everything = [chat.tokenizer.decode(ids) for ids in prepared.tokens("train")["input_ids"]]
    assert len(everything) == prepared.counts["train"] + prepared.counts["general"]
    seen = {t.split("general ")[1].split("<")[0] for t in everything if "general " in t}
    aside = {str(i) for i in range(300) if kept_aside(group_of([{"role": "user", "content": f"general {i}"}]))}
    assert seen and not seen & aside and 30 <= len(aside) <= 90
    lines = {str(tmp_path / "task.jsonl"): task, str(tmp_path / "general.jsonl"): other}
    for text, place in zip(everything, prepared.places("train", range(len(everything))), strict=True):
        file, _, line = place.rpartition(":")
        assert f"{lines[file][int(line) - 1]['prompt']}<" in text, "a NaN's rows are named, general ones too"
    if packing:
        packed = sum(len(n) for n in prepared.packed()["seq_lengths"])
        assert packed == len(everything)
    assert not any("{oops" in t for t in everything)
    assert any("{oops" in r["messages"][-1]["content"] for s in ("validation", "test") for r in prepared.rows(s)), (
        "what is measured is not filtered"
    )


def test_the_verbs(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, store = run_folder(tmp_path / "runs", tiny_model, merged=False, evaluation={"forgetting": "general.jsonl"})
    monkeypatch.chdir(tmp_path)
    invoke = lambda *words: CliRunner().invoke(app, [*words, "--storage", str(tmp_path / "runs")])  # noqa: E731
    found = json.loads(invoke("diagnose", "support", "--json").stdout)["found"]
    assert [d["code"] for d in found] == ["forgetting", "broken_format"]
    assert "change data.general" in invoke("diagnose", "support").stdout
    said = json.loads(invoke("diagnose", "support", "--apply", "--json").stdout)
    assert said["recipe"] == "support-2.yaml"
    loaded = recipe.load("support-2.yaml").recipe
    assert loaded.name == "support-2" and loaded.data.general is not None
    assert invoke("diagnose", "support", "--apply").exit_code == 2, "the file is there already"
    store.write("predictions_train.jsonl", store.read("predictions_base.jsonl"))
    wrote = json.loads(invoke("diagnose", "support", "--corrections", "wrong.jsonl", "--json").stdout)
    assert wrote["corrections"] == 38 == len(Path("wrong.jsonl").read_text().splitlines())
    assert json.loads(invoke("report", "support", "--json").stdout)["report"].endswith("support/report.html")
    assert invoke("report", "support", "--format", "md").exit_code == 0 and store.exists("report.md")
    assert invoke("report", "support", "--api-price", "1").exit_code == 2
    assert invoke("export", "support", "--to", "gguf").exit_code == 2
    assert invoke("diagnose", "gone").exit_code == 2
