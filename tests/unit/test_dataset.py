"""Data: every format gives the same rows, splits hold still, tokens are cached once and packed without leaks."""

from __future__ import annotations

import csv
import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ft_ray.chat import IGNORED, Chat, load_tokenizer
from ft_ray.dataset import detect, group_of, prepare, read, split
from ft_ray.errors import DataError, StorageError
from ft_ray.prepared_data import Prepared
from ft_ray.recipe import Columns, Recipe, Source, Split, from_dict
from ft_ray.sources import locate
from tests import tiny

PAIRS = [(f'Question {i}: ünïcode, "quotes"?', f"Answer {i}") for i in range(30)]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return Chat(load_tokenizer(tiny.build(tmp_path_factory.mktemp("tiny"))))


def recipe(train: Any, **keys: Any) -> Recipe:
    data = keys.pop("data", {})
    train = [train] if isinstance(train, dict) else train
    return from_dict({"name": "t", "model": {"id": "x"}, "data": {"train": train, **data}, **keys})


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def pairs_file(path: Path, count: int, prefix: str = "") -> Path:
    return jsonl(path, [{"prompt": f"{prefix}row {i}", "completion": f"a{i}"} for i in range(count)])


def _csv(path: Path, delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows([("prompt", "completion"), *PAIRS])
    return path


def _parquet(path: Path) -> Path:
    pq.write_table(pa.table({"prompt": [p for p, _ in PAIRS], "completion": [a for _, a in PAIRS]}), path)
    return path


def _saved(path: Path) -> Path:
    rows = [{"prompt": p, "completion": a} for p, a in PAIRS]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(path))
    return path


def _text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


_DICTS = [{"prompt": p, "completion": a} for p, a in PAIRS]
FORMATS: dict[str, Callable[[Path], Path]] = {
    "prompt/completion": lambda d: jsonl(d / "a.jsonl", _DICTS),
    "gzip": lambda d: _gzip(d / "a.jsonl.gz"),
    "json array": lambda d: _text(d / "a.json", json.dumps(_DICTS, indent=2)),
    "json object of rows": lambda d: _text(d / "b.json", json.dumps({"version": 1, "data": _DICTS})),
    "json lines named json": lambda d: jsonl(d / "c.json", _DICTS),
    "csv": lambda d: _csv(d / "a.csv"),
    "csv with semicolons": lambda d: _csv(d / "b.csv", ";"),
    "tsv": lambda d: _csv(d / "a.tsv", "\t"),
    "parquet": lambda d: _parquet(d / "a.parquet"),
    "saved": lambda d: _saved(d / "saved"),
    "folder": lambda d: jsonl(_folder(d / "many") / "part-0.jsonl", _DICTS).parent,
    "instruction": lambda d: jsonl(d / "i.jsonl", [{"instruction": p, "input": "", "output": a} for p, a in PAIRS]),
    "question/answer": lambda d: jsonl(d / "q.jsonl", [{"id": i, "question": p, "answer": a}
                                                       for i, (p, a) in enumerate(PAIRS)]),
    "messages": lambda d: jsonl(d / "m.jsonl", [{"messages": _turns(p, a, "role", "content", "user", "assistant")}
                                                for p, a in PAIRS]),
    "conversations": lambda d: jsonl(d / "v.jsonl", [{"conversations": _turns(p, a, "role", "content", "user",
                                                                              "assistant")} for p, a in PAIRS]),
    "sharegpt": lambda d: jsonl(d / "s.jsonl", [{"conversations": _turns(p, a, "from", "value", "human", "gpt")}
                                                for p, a in PAIRS]),
    "content parts": lambda d: jsonl(d / "p.jsonl", [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": p}]}, {"role": "assistant", "content": a}]}
        for p, a in PAIRS]),
    "conversational pairs": lambda d: jsonl(d / "t.jsonl", [
        {"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": a}]}
        for p, a in PAIRS]),
}  # fmt: skip


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _gzip(path: Path) -> Path:
    import gzip

    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(d) + "\n" for d in _DICTS)
    return path


def _turns(prompt: str, answer: str, role: str, content: str, user: str, assistant: str) -> list[dict[str, str]]:
    return [{role: user, content: prompt}, {role: assistant, content: answer}]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = FORMATS[name](tmp_path)
    rows = list(read(Source(path=str(path))))
    assert [(r.messages[0]["content"], r.messages[1]["content"]) for r in rows] == PAIRS
    assert [r.messages[0]["role"] for r in rows] == ["user"] * len(PAIRS)
    assert all(b.line > a.line for a, b in itertools.pairwise(rows))


def test_lines_are_those_of_an_editor(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"two\nlines",x\nq,y\n')
    assert [r.line for r in read(Source(path=str(path)))] == [2, 4]
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"prompt": "a", "completion": "b"}\n\n{"prompt": "c", "completion": "d"}\n')
    assert [r.line for r in read(Source(path=str(path)))] == [2, 4]


def test_column_map_with_nesting_and_explosion(tmp_path: Path) -> None:
    rows = [
        {"task": {"text": "Add"}, "instances": [{"input": "1 2", "output": 3}, {"input": "", "output": {"n": "é"}}]}
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    columns = Columns(instruction="task.text", input="instances[].input", output="instances[].output")
    found = list(read(Source(path=str(path)), columns, "Be brief."))
    assert [m["content"] for m in found[0].messages] == ["Be brief.", "Add\n\n1 2", "3"]
    assert [m["content"] for m in found[1].messages] == ["Be brief.", "Add", '{"n": "é"}']
    assert {r.line for r in found} == {1}


def test_fsspec_address_is_read_and_kept(tmp_path: Path) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    text = "".join(json.dumps(d) + "\n" for d in _DICTS)
    fs.pipe_file("/bucket/a.jsonl", text.encode())
    source = Source(path="memory://bucket/a.jsonl")
    rows = list(read(source))
    assert len(rows) == len(PAIRS)
    assert rows[0].file == "memory://bucket/a.jsonl" or rows[0].file.endswith("bucket/a.jsonl")
    (kept,) = locate(source)
    assert kept.path.read_text(encoding="utf-8") == text


def test_detection_is_said_aloud(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level("INFO", logger="ft_ray"):
        found = detect(str(FORMATS["sharegpt"](tmp_path)))
    assert (found.format, found.layout, found.columns) == ("jsonl", "sharegpt", None)
    assert found.example[0] == {"role": "user", "content": PAIRS[0][0]}
    assert "layout sharegpt" in caplog.text


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"text": "hi", "category": "greeting"}, {"prompt": "text", "completion": "category"}),
        ({"instruction": "x", "instances": [{"input": "y", "output": "z"}]},
         {"instruction": "instruction", "input": "instances[].input", "output": "instances[].output"}),
    ],
)  # fmt: skip
def test_detection_guesses_a_column_map_and_says_so(row: Any, columns: Any, tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level("INFO", logger="ft_ray"):
        found = detect(str(jsonl(tmp_path / "a.jsonl", [row])))
    assert found.columns == Columns.model_validate(columns)
    assert "guessed" in caplog.text


# Splitting and weights


def test_split_is_a_pure_function_with_the_asked_shares() -> None:
    groups = [group_of([{"role": "user", "content": f"q{i}"}]) for i in range(5000)]
    fractions = Split(validation=0.1, test=0.2)
    parts = [split(g, fractions) for g in groups]
    assert parts.count("test") / 5000 == pytest.approx(0.2, abs=0.02)
    assert parts.count("validation") / 5000 == pytest.approx(0.1, abs=0.02)
    assert [split(g, fractions) for g in groups] == parts


def test_group_ignores_case_spaces_and_what_follows_the_first_question() -> None:
    short = [{"role": "user", "content": "Where is it?"}]
    longer = [{"role": "system", "content": "s"}, {"role": "user", "content": " where  IS it?"},
              {"role": "assistant", "content": "There"}, {"role": "user", "content": "Thanks"}]  # fmt: skip
    assert group_of(short) == group_of(longer) != group_of([{"role": "user", "content": "Where was it?"}])


def test_appended_data_move_no_row_and_duplicates_stay_together(tmp_path: Path, chat: Chat) -> None:
    def members(prepared: Prepared) -> dict[str, str]:
        return {r["group"]: s for s in ("train", "validation", "test") for r in prepared.rows(s)}

    path = pairs_file(tmp_path / "a.jsonl", 200)
    before = members(prepare(recipe({"path": str(path)}), chat, model_hash="m", cache=tmp_path / "c"))
    with path.open("a") as file:
        for i in range(200):
            file.write(json.dumps({"prompt": f"new {i}", "completion": "x"}) + "\n")
            file.write(json.dumps({"prompt": f"ROW {i}", "completion": "again"}) + "\n")
    after = members(prepare(recipe({"path": str(path)}), chat, model_hash="m", cache=tmp_path / "c"))
    assert len(before) == 200
    assert len(after) == 400
    assert {g: after[g] for g in before} == before


def test_weights_count_in_training_only(tmp_path: Path, chat: Chat) -> None:
    one, two = pairs_file(tmp_path / "a.jsonl", 300), pairs_file(tmp_path / "b.jsonl", 600, "general ")

    def made(weight: float, seed: int = 0) -> Prepared:
        sources = [{"path": str(one), "weight": 2}, {"path": str(two), "weight": weight}]
        return prepare(recipe(sources, seed=seed), chat, model_hash="m", cache=tmp_path / "c")

    plain, tenth = made(1.0), made(0.1)
    name = str(two)
    general = sum(r["file"] == name for r in plain.rows("train"))
    drawn = sum(r["file"] == name for r in tenth.rows("train"))
    assert drawn / general == pytest.approx(0.1, abs=0.05)
    assert tenth.dropped["weight"] == general - drawn
    assert tenth.counts["validation"] == plain.counts["validation"]
    assert tenth.hashes["test"] == plain.hashes["test"]
    firsts = tenth.distinct["train"] - drawn
    assert tenth.counts["train"] == len(tenth.tokens("train")) == 2 * firsts + drawn
    assert len(tenth.tokens("train", distinct=True)) == len(tenth.rows("train")) == tenth.distinct["train"]
    numbers = [len(tenth.tokens("train")) - 1, 0, 1]
    lines = [place.rpartition(":") for place in tenth.places("train", numbers)]
    found = {(r["file"], r["line"]): i for i, r in enumerate(tenth.rows("train"))}
    for number, (file, _, line) in zip(numbers, lines, strict=True):
        row = tenth.tokens("train", distinct=True)[found[file, int(line)]]
        assert tenth.tokens("train")[number] == row, "a repeated row is named by its one line"
    again = {r["group"] for r in made(0.1, seed=1).rows("train") if r["file"] == name}
    assert again != {r["group"] for r in tenth.rows("train") if r["file"] == name}


def test_fractions_are_nested_seeded_and_the_same_as_subsets(tmp_path: Path, chat: Chat) -> None:
    path = pairs_file(tmp_path / "a.jsonl", 300)

    def made(fraction: float, seed: int = 0, weight: float = 1) -> Prepared:
        keys = {"data": {"fraction": fraction, "split": {"validation": 0.1, "test": 0.1}}, "seed": seed}
        source = {"path": str(path), "weight": weight}
        return prepare(recipe(source, **keys), chat, model_hash="m", cache=tmp_path / "c")

    whole = made(1.0)
    lines = {f: set(made(f).rows("train")["line"]) for f in (0.125, 0.25, 0.5, 1.0)}
    assert lines[0.125] < lines[0.25] < lines[0.5] < lines[1.0]
    for fraction, found in lines.items():
        assert abs(len(found) / len(lines[1.0]) - fraction) < 0.1
        subset = whole.subset(fraction, 0)
        assert whole.tokens("train").select(subset)["input_ids"][:] == made(fraction).tokens("train")["input_ids"][:]
    half = made(0.5)
    assert half.hashes["validation"] == whole.hashes["validation"] and half.hashes["test"] == whole.hashes["test"]
    assert half.hashes["train"] != whole.hashes["train"]
    assert half.dropped["fraction"] == len(lines[1.0]) - len(lines[0.5]) and "fraction" not in whole.dropped
    assert set(made(0.5, seed=1).rows("train")["line"]) != lines[0.5]
    twice = made(1.0, weight=2)
    assert len(twice.subset(0.5, 0)) == 2 * len(lines[0.5])
    with pytest.raises(DataError, match=r"data\.fraction 1e-09 leaves none"):
        made(1e-9)


def test_own_validation_source_is_used_as_it_is(tmp_path: Path, chat: Chat) -> None:
    train, held = pairs_file(tmp_path / "a.jsonl", 100), pairs_file(tmp_path / "b.jsonl", 7, "held ")
    made = prepare(
        recipe({"path": str(train)}, data={"validation": [{"path": str(held)}], "split": {"test": 0}}),
        chat, model_hash="m", cache=tmp_path / "c",
    )  # fmt: skip
    assert made.counts == {"train": 100, "validation": 7, "test": 0}
    assert len(made.tokens("test")) == len(made.rows("test")) == 0


# Tokens, cache, packing


def test_tokens_belong_to_rows_and_hashes_ignore_order(tmp_path: Path, chat: Chat) -> None:
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(50)]
    made = prepare(recipe({"path": str(jsonl(tmp_path / "a.jsonl", rows))}), chat, model_hash="m", cache=tmp_path / "c")
    for row, tokens in zip(made.rows("train"), made.tokens("train"), strict=True):
        encoded = chat.encode(row["messages"])
        assert (tokens["input_ids"], tokens["labels"]) == (encoded.input_ids, encoded.labels)
        assert tokens["length"] == len(encoded.input_ids)
    random.Random(0).shuffle(rows)
    other = prepare(
        recipe({"path": str(jsonl(tmp_path / "b.jsonl", rows))}), chat, model_hash="m", cache=tmp_path / "c"
    )
    assert other.hashes == made.hashes
    assert other.folder != made.folder


def test_cache_is_used_again_and_follows_what_it_depends_on(tmp_path: Path, chat: Chat) -> None:
    path, cache = pairs_file(tmp_path / "a.jsonl", 40), tmp_path / "c"
    first = prepare(recipe({"path": str(path)}), chat, model_hash="m", cache=cache)
    stamp = (first.folder / "train.tokens.arrow").stat().st_mtime_ns
    assert prepare(recipe({"path": str(path)}, optim={"lr": 1e-5}), chat, model_hash="m", cache=cache) == first
    assert (first.folder / "train.tokens.arrow").stat().st_mtime_ns == stamp
    folders = {first.folder}
    other = Chat(chat.tokenizer, "{# other #}" + tiny.CHATML)
    folders.add(prepare(recipe({"path": str(path)}), other, model_hash="m", cache=cache).folder)
    folders.add(prepare(recipe({"path": str(path)}), chat, model_hash="n", cache=cache).folder)
    folders.add(
        prepare(recipe({"path": str(path)}, sequence={"max_length": 64}), chat, model_hash="m", cache=cache).folder
    )
    pairs_file(path, 41)
    folders.add(prepare(recipe({"path": str(path)}), chat, model_hash="m", cache=cache).folder)
    assert len(folders) == 5
    assert sorted(p.name for p in cache.iterdir()) == sorted(f.name for f in folders)
    assert Prepared.open(first.folder) == first


def test_an_entry_that_cannot_take_its_place_is_an_error_of_storage(tmp_path: Path, chat: Chat) -> None:
    settings = recipe({"path": str(pairs_file(tmp_path / "a.jsonl", 40))})
    entry = prepare(settings, chat, model_hash="m", cache=tmp_path / "c").folder
    shutil.rmtree(entry)
    entry.write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="preparing the data: "):
        prepare(settings, chat, model_hash="m", cache=tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == [entry]


def test_packing_keeps_every_row_whole_with_its_own_positions(tmp_path: Path, chat: Chat) -> None:
    rng = random.Random(0)
    rows = [{"prompt": f"{i} " + "x" * rng.randrange(60), "completion": "y" * rng.randrange(1, 40)} for i in range(120)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    made = prepare(
        recipe({"path": str(path)}, sequence={"max_length": 256, "packing": True}),
        chat, model_hash="m", cache=tmp_path / "c",
    )  # fmt: skip
    packed = made.packed()
    seen = []
    for pack in packed:
        assert sum(pack["seq_lengths"]) == len(pack["input_ids"]) == len(pack["labels"]) <= 256
        at = 0
        for length in pack["seq_lengths"]:
            seen.append((tuple(pack["input_ids"][at : at + length]), tuple(pack["labels"][at : at + length])))
            at += length
    plain = [(tuple(t["input_ids"]), tuple(t["labels"])) for t in made.tokens("train")]
    assert sorted(seen) == sorted(plain)
    assert len(packed) < len(plain) / 2

    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([packed[0], packed[1]])
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    lengths = [*packed[0]["seq_lengths"], *packed[1]["seq_lengths"]]
    assert starts == np.concatenate([[0], np.cumsum(lengths)[:-1]]).tolist()
    assert (batch["labels"] != IGNORED).sum() == sum(label != IGNORED for k in (0, 1) for label in packed[k]["labels"])


def test_too_long_rows_are_left_out_and_named(tmp_path: Path, chat: Chat, caplog: Any) -> None:
    rows = [{"prompt": f"p{i}", "completion": "short" if i % 10 else "long " * 100} for i in range(60)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    with caplog.at_level("WARNING", logger="ft_ray"):
        made = prepare(
            recipe({"path": str(path)}, sequence={"max_length": 128}), chat, model_hash="m", cache=tmp_path / "c"
        )
    assert made.dropped["too_long"] == 6
    assert sum(made.counts.values()) == 54
    assert made.too_long[0].startswith(f"{path}:1 ")
    assert "6 rows over sequence.max_length 128" in caplog.text
