"""A corpus of broken data sets, one or more for every code of the data check: each planted fault is found.

Where the fault is in single rows, exactly those rows are named; what was not planted is not reported.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ft_ray.chat import IGNORED, Chat, load_tokenizer
from ft_ray.dataset import prepare
from ft_ray.preflight import check
from ft_ray.prepared_data import Prepared
from ft_ray.recipe import from_dict
from tests import tiny
from tests.unit.test_preflight import SECRET, WORDS

Rows = list[dict[str, Any]]
MODULES = ("preflight", "content_checks", "repeats")
ROWS = 400
FOUR = WORDS[:4]
# What may be said of any of these small sets besides the fault: their size, and that rows could be longer.
ALWAYS = {"few_rows", "size", "room", "small_validation", "small_test"}


def plain(count: int = ROWS, seed: int = 0) -> Rows:
    rng = random.Random(seed)
    return [
        {
            "prompt": f"Tell of {' '.join(rng.choices(WORDS, k=8))} in {seed}{i}",
            "completion": " ".join(rng.choices(WORDS, k=7)),
        }
        for i in range(count)
    ]  # fmt: skip


def changed(at: list[int], **change: Any) -> Rows:
    rows = plain()
    for i in at:
        rows[i] = {k: change[k](rows[i][k]) if k in change else v for k, v in rows[i].items()}
    return rows


def labelled(*counts: tuple[str, int]) -> Rows:
    names = [name for name, n in counts for _ in range(n)]
    random.Random(0).shuffle(names)
    return [{**r, "completion": name} for r, name in zip(plain(len(names)), names, strict=True)]


def answers(make: Callable[[int], Any]) -> Rows:
    return [{**r, "completion": make(i)} for i, r in enumerate(plain())]


@dataclass
class Case:
    """`rows` are training rows; `lines` those that must be named (1-based); `count` the finding's own, if known.

    `also`: codes that the same fault brings along. `tokens` changes the tokenised rows instead, as a faulty
    preparation would leave them.
    """

    rows: Rows
    lines: set[int] = field(default_factory=set)
    count: int | None = None
    also: set[str] = field(default_factory=set)
    keys: dict[str, Any] = field(default_factory=dict)
    held: dict[str, Rows] = field(default_factory=dict)
    tokens: Callable[[list[list[int]], list[list[int]]], None] | None = None
    review: str | None = None


def _unsure_eos(ids: list[list[int]], labels: list[list[int]]) -> None:
    labels[3][-1] = IGNORED


def _bare(ids: list[list[int]], labels: list[list[int]]) -> None:
    labels[3] = [IGNORED] * (len(labels[3]) - 1) + [labels[3][-1]]


def _other_prompt(ids: list[list[int]], labels: list[list[int]]) -> None:
    for row in range(len(ids)):
        ids[row][0] = 40


CORPUS: dict[str, list[Case]] = {
    "secret": [
        Case(changed([4], completion=lambda c: f"{c} {SECRET}"), {5}, 1),
        Case(changed([4], completion=lambda c: f"{c} password: hunter2!Q"), {5}, 1),
        Case(changed([4], completion=lambda c: "aws_secret_access_key=wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzTOPKEY"), {5}, 1),
        Case(changed([4], completion=lambda c: f"{c} api_key=9f86d081884c7d659a2feaa0c55ad015"), {5}, 1),
        Case(changed([4], completion=lambda c: f"{c} glpat-{'x9Kd2mPq7RtVw4Yz8Bn3'}"), {5}, 1),
        Case(changed([4], completion=lambda c: f"{c} postgres://admin:h8Gk2pQz71x@db.corp.net/main"), {5}, 1),
    ],
    "pii": [
        Case(changed([4, 9], prompt=lambda p: f"{p} jane.miller@mail.com or bob@company.com"), {5, 10}, 2),
        Case(changed([4], prompt=lambda p: f"{p}, call 415-867-5309 or (415) 867-5310"), {5}, 1),
        Case(changed([4, 9], prompt=lambda p: f"{p}, write to jane.miller@gmx.de"), {5, 10}, 2),
        Case(changed([7], prompt=lambda p: f"{p} for DE89 3704 0044 0532 0130 00"), {8}, 1),
    ],
    "special_token": [Case(changed([2], prompt=lambda p: f"{p} <|im_start|>system"), {3}, 1)],
    "broken_text": [
        Case(changed([2], completion=lambda c: f"{c} caf\ufffd"), {3}, 1),
        Case(changed([2, 3], prompt=lambda p: f"{p} cafÃ©"), {3, 4}, 2),
    ],
    "placeholder": [Case(changed([6], completion=lambda c: "Dear {{ customer_name }}, " + c), {7}, 1)],
    "boilerplate": [Case(changed([6], completion=lambda c: "As an AI language model I cannot say"), {7}, 1)],
    "contradictions": [Case([*plain(), {**plain()[5], "completion": "something else"}], {ROWS + 1}, 1)],
    "near_contradictions": [
        Case([*plain(), *({"prompt": f"{r['prompt']} please", "completion": "something else"} for r in plain()[:40])],
             set(range(ROWS + 1, ROWS + 41)), held={"validation": plain(60, 5), "test": plain(60, 6)})
    ],
    "mixed_fields": [
        Case([*plain(300), *({"instruction": r["prompt"], "output": r["completion"]} for r in plain(100, 3))],
             set(range(301, 401)), 100)
    ],
    "answer_types": [Case(answers(lambda i: {"n": i} if i != 7 else {"n": "seven"}), {8}, 1)],
    "duplicates": [Case([*plain(), *plain()[:30]], set(range(ROWS + 1, ROWS + 31)), 30)],
    "near_duplicates": [
        Case([*plain(), *({**r, "prompt": f"And {r['prompt']}"} for r in plain()[:60])],
             set(range(ROWS + 1, ROWS + 61)), held={"validation": plain(60, 5), "test": plain(60, 6)})
    ],
    "leakage": [
        Case(plain(), count=20, also={"duplicates"},
             held={"test": [*plain(60, 5), *plain()[:20]], "validation": plain(60, 6)})
    ],
    "near_leakage": [
        Case(plain(), held={"test": [*plain(60, 5), *({**r, "prompt": f"And {r['prompt']}"} for r in plain()[:20])],
                            "validation": plain(60, 6)})
    ],
    "imbalance": [Case(labelled(("a", 300), ("b", 20), ("c", 18), ("d", 20)))],
    "rare_labels": [Case(labelled(("a", 200), ("b", 200), ("c", 3)), also={"imbalance", "unseen_labels"})],
    "label_spelling": [Case(labelled(("billing", 200), ("card", 160), ("Card ", 40)), count=1)],
    "unseen_labels": [
        Case(labelled(("a", 200), ("b", 200)), held={"validation": [{**r, "completion": "new"} for r in plain(60, 5)],
                                                     "test": [{**r, "completion": "a"} for r in plain(60, 6)]})
    ],
    "canned_answer": [Case(changed(list(range(120)), completion=lambda c: "I cannot help with that."))],
    "answer_format": [Case(answers(lambda i: {"n": i} if i != 7 else "n is 7"), {8}, 1)],
    "answer_fields": [Case(answers(lambda i: {"n": i, "m": 1} if i != 7 else {"n": i}), {8}, 1)],
    "system_messages": [
        Case([{"messages": [*([{"role": "system", "content": "be kind"}] if i % 4 == 0 else []),
                            {"role": "user", "content": r["prompt"]},
                            {"role": "assistant", "content": r["completion"]}]} for i, r in enumerate(plain())])
    ],
    "few_prompts": [
        Case([{**plain()[i % 40], "completion": f"{r['completion']} {i}"} for i, r in enumerate(plain())],
             also={"contradictions"})
    ],
    "narrow_vocabulary": [
        Case([{"prompt": " ".join(FOUR * 12 + [FOUR[(i >> 2 * k) & 3] for k in range(8)]), "completion": f"{i}"}
              for i in range(4500)],
             also={"near_duplicates", "near_leakage", "contradictions", "duplicates", "near_contradictions"},
             keys={"sequence": {"max_length": 4096}})
    ],
    "too_long": [
        Case(changed([6], completion=lambda c: "long " * 200), {7}, 1, keys={"sequence": {"max_length": 512}})
    ],
    "room": [Case(plain(), keys={"sequence": {"max_length": 2048}})],
    "few_rows": [Case(plain())],
    "size": [Case(plain(1500))],
    "no_validation": [Case(plain(), keys={"data": {"split": {"validation": 0, "test": 0.2}}})],
    "no_test": [Case(plain(), keys={"data": {"split": {"validation": 0.2, "test": 0}}})],
    "small_validation": [Case(plain(), held={"validation": plain(20, 5), "test": plain(60, 6)})],
    "small_test": [Case(plain(), held={"test": plain(20, 5), "validation": plain(60, 6)})],
    "eos_not_trained": [Case(plain(), count=1, tokens=_unsure_eos)],
    "nothing_trained": [Case(plain(), count=1, tokens=_bare, also={"prompt_differs"})],
    "prompt_differs": [Case(plain(), tokens=_other_prompt)],
    "lossy_tokens": [],  # needs another tokenizer: test_preflight.test_tokenizer_that_loses_text
    "review_written": [Case(plain(), review="")],
    "review": [Case(plain(), review="mark,note,place\nbad,wrong,train.jsonl:1\nok,,train.jsonl:2\n", count=1)],
    "review_stale": [
        Case(plain(), count=1, also={"review"},
             review="mark,note,place\nbad,gone,train.jsonl:999\nok,,train.jsonl:2\n"),
        Case(plain(), count=1, also={"review"},
             review="mark,note,place,prompt,answer\nbad,other text,train.jsonl:1,[user] What was there?,before\n"),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return Chat(load_tokenizer(tiny.build(tmp_path_factory.mktemp("tiny"))))


def _codes() -> set[str]:
    found: set[str] = set()
    for module in MODULES:
        text = (Path(__file__).parents[2] / "ft_ray" / f"{module}.py").read_text(encoding="utf-8")
        for code in re.findall(r'Finding\(\s*(?:"\w+"(?: if [^\n]*? else "\w+")?|severity),\s*f?"([\w{}]+)"', text):
            found |= {code.format(name=n) for n in ("validation", "test")} if "{" in code else {code}
    text = (Path(__file__).parents[2] / "ft_ray" / "content_checks.py").read_text(encoding="utf-8")
    return found | set(re.findall(r'^    "(\w+)": \("', text, re.MULTILINE))


def test_the_corpus_has_every_code() -> None:
    assert len(_codes()) >= 33
    assert set(CORPUS) == _codes()


def _write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def _rewritten(prepared: Prepared, out: Path, change: Callable[..., None]) -> Prepared:
    out.mkdir()
    for file in prepared.folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    name = "train.tokens.arrow"
    with pa.memory_map(str(prepared.folder / name)) as source, pa.ipc.open_stream(source) as reader:
        table = reader.read_all()
    ids, labels = (table.column(k).to_pylist() for k in ("input_ids", "labels"))
    change(ids, labels)
    for k, (key, values) in enumerate((("input_ids", ids), ("labels", labels))):
        table = table.set_column(k, key, pa.array(values, table.schema.field(key).type))
    with pa.OSFile(str(out / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return Prepared.open(out)


@pytest.mark.parametrize(("code", "k"), [(code, k) for code, cases in CORPUS.items() for k in range(len(cases))])
def test_a_planted_fault_is_found(code: str, k: int, chat: Chat, tmp_path: Path) -> None:
    case = CORPUS[code][k]
    keys = dict(case.keys)
    data = {"train": [{"path": _write(tmp_path / "train.jsonl", case.rows)}], **keys.pop("data", {})}
    for name, rows in case.held.items():
        data[name] = [{"path": _write(tmp_path / f"{name}.jsonl", rows)}]
    recipe = from_dict({"name": "t", "model": {"id": "x"}, "data": data, **keys})
    prepared = prepare(recipe, chat, model_hash="m", cache=tmp_path / "cache")
    if case.tokens is not None:
        prepared = _rewritten(prepared, tmp_path / "changed", case.tokens)
    review = tmp_path / "review.csv" if case.review is not None else None
    if case.review:
        assert review is not None
        review.write_text(case.review.replace("train.jsonl", str(tmp_path / "train.jsonl")))
    report = check(recipe, prepared, chat, review=review)
    found = [f for f in report.findings if f.code == code]
    assert found, report.codes()
    others = set(report.codes()) - {code} - ALWAYS - case.also
    assert others == set(), f"not planted: {others}"
    if case.count is not None:
        assert found[0].count == case.count
    named = {int(n) for e in found[0].examples for n in re.findall(r"train\.jsonl:(\d+)", e)[:1]}
    if case.lines:
        assert named and named <= case.lines
        assert len(named) == min(len(case.lines), 5)
