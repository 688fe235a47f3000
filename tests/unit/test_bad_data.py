"""Bad data: one clear error with file and line, every bad row at once, and nothing left behind."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ft_ray.chat import Chat, load_tokenizer
from ft_ray.dataset import detect, prepare
from ft_ray.errors import DataError
from ft_ray.recipe import from_dict
from tests import tiny

GOOD = '{"prompt": "p", "completion": "c"}\n'


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return Chat(load_tokenizer(tiny.build(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture
def refused(tmp_path: Path, chat: Chat) -> Callable[..., str]:
    """Prepares a file with this content and returns the error's text."""

    def run(content: str | bytes, name: str = "d.jsonl", **keys: object) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        data = keys.pop("data", {})
        assert isinstance(data, dict)
        recipe = from_dict(
            {"name": "t", "model": {"id": "x"}, "data": {"train": [{"path": str(path)}], **data}, **keys}
        )
        cache = tmp_path / "cache"
        with pytest.raises(DataError) as caught:
            prepare(recipe, chat, model_hash="m", cache=cache)
        assert caught.value.exit_code == 2
        assert not cache.exists() or list(cache.iterdir()) == []  # nothing half-written
        return str(caught.value).replace(str(path), name)

    return run


def _turns(*roles: str) -> str:
    return json.dumps({"messages": [{"role": r, "content": "x"} for r in roles]}) + "\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (GOOD + '{"prompt": "a" "completion": "b"}\n', "d.jsonl:2:16: not valid JSON (Expecting ',' delimiter)"),
        (GOOD + '{"prompt": "a", "completion": "b"\n', "d.jsonl:2:34: not valid JSON"),
        (GOOD + "[1, 2]\n", "d.jsonl:2:1: the line holds a list, not an object"),
        (GOOD + '{"prompt": "a"}\n', "d.jsonl:2: the answer is missing: field 'completion' is not there"),
        (
            GOOD + '{"prompt": "a", "completion": null}\n',
            "d.jsonl:2: the answer is missing: field 'completion' is null",
        ),
        (GOOD + '{"prompt": "a", "completion": NaN}\n', "d.jsonl:2: the answer is missing: field 'completion' is NaN"),
        (
            GOOD + '{"prompt": "a", "completion": "b", "completion": "c"}\n',
            "d.jsonl:2: the key 'completion' appears twice in one object: keep one.",
        ),
        (GOOD + '{"prompt": "a", "completion": "  "}\n', "d.jsonl:2: the answer is empty"),
        (GOOD + '{"prompt": "", "completion": "b"}\n', "d.jsonl:2: the prompt is empty"),
        (GOOD + '{"prompt": "a", "completoin": "b"}\n', "did you mean 'completoin'?"),
        (GOOD + '{"prompt": "a", "completion": "\\ud800"}\n', "d.jsonl:2: turn 2 holds half of a character"),
        (
            GOOD + '{"prompt": "a", "completion": "x<|im_end|>y"}\n',
            "d.jsonl:2: the answer contains the end-of-turn token",
        ),
        (
            _turns("user", "assistant", "assistant"),
            "wrong role order: turn 3 is an assistant turn after an assistant turn",
        ),
        (_turns("assistant", "user"), "wrong role order: turn 1 is an assistant turn without a user turn before it"),
        (_turns("user", "system", "assistant"), "wrong role order: turn 2 is a system turn, which must come first"),
        (_turns("user", "user", "assistant"), "wrong role order: turn 2 is a user turn after a user turn"),
        (_turns("user", "assistant", "user"), "the last turn is a user turn"),
        (_turns("user", "robot"), "turn 2 has the role 'robot': use system, user, assistant or tool"),
        ('{"messages": []}\n', "the conversation has no turns"),
        ('{"messages": [{"speaker": "me"}]}\n', "turn 1 of 'messages' has the fields 'speaker'"),
        ('{"messages": [{"role": "user", "content": {"a": 1}}]}\n', "neither text nor a list of text parts"),
        (
            '{"sentence": "a", "topic": "b", "lang": "c"}\n',
            "the fields 'sentence', 'topic', 'lang' match no known layout",
        ),
        ('{"text": "a", "category": "b"}\n', "set data.columns to {prompt: text, completion: category}"),
        ('{"prompts": "a", "completions": "b", "n": 1}\n', "nearest: prompt/completion"),
        ("", "data file d.jsonl is empty"),
        ("\n \n", "data file d.jsonl is empty"),
    ],
)
def test_bad_row(content: str, said: str, refused: Callable[..., str]) -> None:
    message = refused(content)
    assert said in message
    assert message.rstrip().endswith((".", "?", ")"))


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (
            GOOD.encode() + b'{"prompt": "caf\xe9", "completion": "b"}\n',
            "d.jsonl",
            "d.jsonl:2:16: byte 0xe9 is not UTF-8",
        ),
        (GOOD.encode("utf-16"), "d.jsonl", "the file is UTF-16, not UTF-8"),
        (b"prompt,completion\na,b\ncaf\xe9,b\n", "d.csv", "d.csv:3:4: byte 0xe9 is not UTF-8"),
        (b"prompt,completion\na,b\na,b,c\n", "d.csv", "d.csv:3: 3 fields where the header has 2"),
        (b"prompt,prompt\na,b\n", "d.csv", "the column 'prompt' appears twice"),
        (b"prompt,completion\n", "d.csv", "has a header and no rows"),
        (b'prompt,completion\n"a,b\n', "d.csv", "not valid CSV"),
        (b"[]", "d.json", "holds an empty list"),
        (b'[{"prompt": "a", "completion": "b"}, {"prompt": }]', "d.json", "d.json row 2: not valid JSON"),
        (b'{"prompt": "a", "completion": "b"}', "d.json", "holds one object, not a list of rows"),
        (b"hello", "d.json", "a list of rows begins with '['"),
        (b"PAR1 no", "d.parquet", "not a readable Parquet file"),
        (b'[{"prompt": "a", "prompt": "b", "completion": "c"}]', "d.json", "d.json row 1: the key 'prompt' appears"),
        (b"no gzip at all", "d.jsonl.gz", "data file d.jsonl.gz is not a whole gzip file (Not a gzipped file"),
        (gzip.compress(GOOD.encode() * 500)[:-20], "d.jsonl.gz", "d.jsonl.gz is not a whole gzip file"),
        (gzip.compress(GOOD.encode() * 500)[:20] + b"rubbish" * 9, "d.csv.gz", "d.csv.gz is not a whole gzip file"),
        (b"x", "d.docx", "the format of d.docx cannot be told"),
    ],
)
def test_bad_file(content: bytes, name: str, said: str, refused: Callable[..., str]) -> None:
    assert said in refused(content, name)


def test_all_bad_rows_at_once_bounded(refused: Callable[..., str]) -> None:
    message = refused("".join(GOOD if i % 2 else "{oops\n" for i in range(50)))
    lines = message.splitlines()
    assert lines[0] == "25 rows cannot be used:"
    assert len(lines) == 12
    assert lines[1].strip().startswith("d.jsonl:1:2:")
    assert lines[-1].strip() == "… and 15 more"


def test_an_unknown_layout_is_said_once_with_its_rows(refused: Callable[..., str]) -> None:
    row = '{"sentence": "a", "topic": "b", "lang": "c"}\n'
    message = refused(row * 250)
    assert message.startswith("d.jsonl:1: the fields 'sentence', 'topic', 'lang' match no known layout; name them in")
    assert message.endswith("(250 rows)") and "\n" not in message
    other = '{"a": 1, "b": 2, "c": 3}\n'
    lines = refused(row * 30 + "{oops\n" * 12 + other * 3).splitlines()
    assert lines[0] == "45 rows cannot be used:" and lines[1].endswith("(30 rows)")
    assert sum("match no known layout" in line for line in lines) == 1 and lines[-1] == "  … and 6 more"


def test_a_field_missing_from_many_rows_is_one_fault(refused: Callable[..., str]) -> None:
    missing = '{"prompt": "a"}\n'
    said = "d.jsonl:2: the answer is missing: field 'completion' is not there (the row has 'prompt'). "
    assert refused(GOOD + missing * 60) == f"{said}(60 rows)"
    few = refused(GOOD + missing + GOOD + missing * 2)
    assert few.splitlines() == [f"{said}(also d.jsonl:4, d.jsonl:5)"]


def test_all_rows_too_long(refused: Callable[..., str]) -> None:
    rows = "".join(json.dumps({"prompt": f"p{i}", "completion": "long " * 40}) + "\n" for i in range(5))
    message = refused(rows, sequence={"max_length": 64})
    assert "all 5 rows are longer than sequence.max_length 64 tokens (the shortest has " in message


def test_too_long_as_an_error(refused: Callable[..., str]) -> None:
    message = refused(GOOD + json.dumps({"prompt": "p", "completion": "long " * 40}) + "\n",
                      sequence={"max_length": 64}, data={"too_long": "error"})  # fmt: skip
    assert message.startswith("d.jsonl:2: ")
    assert "over sequence.max_length 64" in message


def test_no_training_row_left(refused: Callable[..., str]) -> None:
    message = refused(GOOD, data={"split": {"validation": 0.49, "test": 0.5}})
    assert "the train split is empty" in message


def test_column_maps_that_make_no_row(refused: Callable[..., str]) -> None:
    assert "makes no row" in refused(GOOD, data={"columns": {"prompt": "prompt"}})
    columns = {"instruction": "a[].x", "output": "b[].y"}
    assert "explodes a and b" in refused(GOOD, data={"columns": columns})
    assert "field 'c' is not there" in refused(GOOD, data={"columns": {"prompt": "prompt", "completion": "c"}})


@pytest.mark.parametrize(
    ("path", "said"),
    [("nowhere/d.jsonl", "does not exist: check the path"), ("memory://nowhere/d.jsonl", "does not exist"),
     ("owner/nothing-here", "owner/nothing-here is not in the local hub cache, and no folder here .seen from /"),
     ("nothing", "set format: hub")],
)  # fmt: skip
def test_missing_data(path: str, said: str, chat: Chat, tmp_path: Path) -> None:
    recipe = from_dict({"name": "t", "model": {"id": "x"}, "data": {"train": [{"path": path}]}})
    with pytest.raises(DataError, match=said):
        prepare(recipe, chat, model_hash="m", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("key", ["subset", "revision"])
def test_keys_of_hub_data_on_a_file_are_refused(refused: Callable[..., str], key: str) -> None:
    """Silently ignored, a revision would look pinned in the run's records."""
    message = refused(GOOD, data={"train": [{"path": "d.jsonl", key: "main"}]})
    assert f"{key} of the data source d.jsonl is for hub data sets" in message


def test_detection_of_nothing_known(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"a": 1, "b": 2, "c": 3}\n')
    with pytest.raises(DataError, match=r"name them in data\.columns"):
        detect(str(path))


def test_full_disk_leaves_nothing(tmp_path: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache lies on a device that is full from the first byte: Linux's /dev/full through the writer's file."""
    import pyarrow as pa

    from ft_ray import dataset
    from ft_ray.errors import StorageError

    path = tmp_path / "d.jsonl"
    path.write_text(GOOD * 3 + "".join(json.dumps({"prompt": f"p{i}", "completion": "c"}) + "\n" for i in range(50)))

    class Full:
        OSFile = staticmethod(lambda name, mode: pa.OSFile("/dev/full", mode))

        def __getattr__(self, name: str) -> object:
            return getattr(pa, name)

    monkeypatch.setattr(dataset, "pa", Full())
    recipe = from_dict({"name": "t", "model": {"id": "x"}, "data": {"train": [{"path": str(path)}]}})
    with pytest.raises(StorageError, match=r"no space left at .*/cache on .*: free space there") as caught:
        prepare(recipe, chat, model_hash="m", cache=tmp_path / "cache")
    assert caught.value.exit_code == 1
    assert list((tmp_path / "cache").iterdir()) == []


def test_template_to_blame_is_one_error(tmp_path: Path, chat: Chat) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(GOOD * 30)
    bare = Chat(chat.tokenizer, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    recipe = from_dict({"name": "t", "model": {"id": "x"}, "data": {"train": [{"path": str(path)}]}})
    with pytest.raises(DataError, match="the chat template ends the answer with none of the tokens") as caught:
        prepare(recipe, bare, model_hash="m", cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
