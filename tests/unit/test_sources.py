"""Sources and their layouts: nothing that a file holds is lost without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from ft_ray import records
from ft_ray.errors import DataError, RecipeError
from ft_ray.job_upload import needed
from ft_ray.recipe import Columns, Source, from_dict
from ft_ray.rows import read
from ft_ray.sources import locate


def written(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(path: str, columns: Columns | None = None) -> list[str]:
    return [row.messages[0]["content"] for row in read(Source(path=path), columns)]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada", "category": "qa"}, "Ada wrote it."),
        ({"instruction": "Who?", "context": "Ada wrote it.", "output": "Ada"}, "Ada wrote it."),
        ({"id": 1, "question": "Who?", "context": "Ada wrote it.", "answer": "Ada"}, "Ada wrote it."),
        ({"prompt": "Who?", "input": "Ada wrote it.", "completion": "Ada"}, "Ada wrote it."),
    ],
)
def test_what_a_prompt_is_about_goes_below_it(row: Any, prompt: str, tmp_path: Path) -> None:
    bare = {k: v for k, v in row.items() if k not in ("context", "input")}
    path = written(tmp_path / "d.jsonl", bare, row)  # the first row does not have the field
    assert prompts(path) == ["Who?", f"Who?\n\n{prompt}"]
    assert prompts(written(tmp_path / "e.jsonl", row)) == [f"Who?\n\n{prompt}"]


def test_a_column_map_of_a_pair_may_have_an_input(tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", {"q": "Who?", "passage": "Ada wrote it.", "a": "Ada"})
    assert prompts(path, Columns(prompt="q", input="passage", completion="a")) == ["Who?\n\nAda wrote it."]


@pytest.mark.parametrize(("key", "value"), [("weight", 0), ("train", False), ("weight", 0.5)])
def test_an_answer_that_is_not_to_be_trained_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    def row(value: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", key: value}]}

    assert prompts(written(tmp_path / "good.jsonl", row(1), row(None))) == ["a", "a"]
    with pytest.raises(DataError, match=rf"d\.jsonl:1: turn 2 has {key}: {json.dumps(value)}, but every answer"):
        prompts(written(tmp_path / "d.jsonl", row(value)))


def test_unused_keys_of_turns_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"role": "user", "content": "a", "name": "Ada"}, {"role": "assistant", "content": "b", "thinking": "hm"}]
    with caplog.at_level("INFO", "ft_ray"):
        prompts(written(tmp_path / "d.jsonl", {"id": 1, "messages": turns}))
    assert "not used: id, messages[].name, messages[].thinking" in caplog.text


def test_what_only_later_rows_have_is_used_or_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    late = [turns[0], {**turns[1], "thinking": "hm"}]
    rows = [{"messages": turns}, {"messages": late, "topic": "x"}, {"messages": turns, "topic": "y", "system": "s"}]
    with caplog.at_level("INFO", "ft_ray"):
        found = list(read(Source(path=written(tmp_path / "t.jsonl", *rows))))
        read_pairs = list(read(Source(path=written(tmp_path / "p.jsonl", PAIR, PAIR | {"system": "s", "n": 1}))))
    assert [row.messages[0]["content"] for row in (found[-1], read_pairs[-1])] == ["s", "s"]
    assert "t.jsonl: later rows have what is not used: topic, messages[].thinking" in caplog.text
    assert "p.jsonl: later rows have what is not used: n" in caplog.text


PAIR = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_of_the_lists_in_a_json_object_one_is_read_and_the_others_named(
    chunk: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_CHUNK", chunk)
    path = tmp_path / "d.json"
    parts = {"meta": {"train": [1, 2]}, "version": 1234567890, "test": [PAIR] * 3, "train": [PAIR] * 2, "tags": ["x"]}
    path.write_text(json.dumps(parts, indent=1))
    assert prompts(str(path)) == ["p", "p"]
    assert "the list 'train' is read; left out: 'test', 'tags'" in caplog.text
    path.write_text(json.dumps(parts)[:-8])
    with pytest.raises(DataError, match=r"d\.json: not valid JSON \(.*\): mend the file\."):
        prompts(str(path))
    path.write_text(json.dumps({"meta": {"data": [PAIR]}}))
    with pytest.raises(DataError, match="holds one object, not a list of rows"):
        prompts(str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [("[" * 100_000, "d.json row 1: the JSON is nested too deeply: flatten or remove the row."),
     ('{"a": ' * 100_000, "d.json: the JSON is nested too deeply: flatten or remove what is."),
     ('{"meta": ' + "[" * 100_000, "d.json: the JSON is nested too deeply")],
)  # fmt: skip
def test_deep_json_is_bad_data(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        prompts(str(path))
    assert said in str(caught.value)


def test_split_is_refused_where_it_means_nothing(tmp_path: Path) -> None:
    datasets.Dataset.from_list([PAIR]).save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": datasets.Dataset.from_list([PAIR])}).save_to_disk(str(tmp_path / "several"))
    file = written(tmp_path / "d.jsonl", PAIR)
    for path in (file, str(tmp_path / "*.jsonl"), str(tmp_path / "one"), "memory://nowhere/d.jsonl"):
        with pytest.raises(DataError, match=r"split 'test' of the data source .* neither a hub data set nor a saved"):
            locate(Source(path=path, split="test"))
    assert len(locate(Source(path=str(tmp_path / "several"), split="test"))) == 1


def test_patterns_name_files_in_order(tmp_path: Path) -> None:
    import fsspec

    for name in ("b", "a"):
        written(tmp_path / f"{name}.jsonl", {"prompt": name, "completion": "c"})
        fsspec.filesystem("memory").pipe_file(f"/patterns/{name}.jsonl", (tmp_path / f"{name}.jsonl").read_bytes())
    assert prompts(f"{tmp_path}/*.jsonl") == prompts("memory://patterns/*.jsonl") == ["a", "b"]
    written(tmp_path / "[1].jsonl", {"prompt": "brackets", "completion": "c"})
    assert prompts(f"{tmp_path}/[1].jsonl") == ["brackets"], "a file of that name comes first"
    with pytest.raises(DataError, match=r"no file matches .*\*\.csv: check the pattern, or give the folder"):
        prompts(f"{tmp_path}/*.csv")


def test_a_job_takes_the_files_of_a_pattern_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a.jsonl", PAIR)
    written(tmp_path / "b.jsonl", PAIR)
    recipe = from_dict({"name": "t", "model": {"id": "x/y"}, "data": {"train": [{"path": "*.jsonl"}]}})
    assert needed(recipe) == [("data.train", "a.jsonl"), ("data.train", "b.jsonl")]


@pytest.mark.parametrize(
    ("key", "value"), [("weight", float("inf")), ("weight", 1e12), ("lr", float("inf")), ("lr", float("nan"))]
)
def test_numbers_without_end_are_refused(key: str, value: float) -> None:
    source = {"path": "d.jsonl", **({"weight": value} if key == "weight" else {})}
    optim = {"lr": value} if key == "lr" else {}
    with pytest.raises(RecipeError, match=key):
        from_dict({"name": "t", "model": {"id": "x"}, "data": {"train": [source]}, "optim": optim})
