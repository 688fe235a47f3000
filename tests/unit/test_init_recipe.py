"""`ft-ray init` writes a recipe that loads, and whose choices fit the data, the model and the machine."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import pytest
from typer.testing import CliRunner

from ft_ray import demo_data
from ft_ray.cli import app
from ft_ray.dataset import read
from ft_ray.errors import DataError, InputError, ModelError
from ft_ray.init_recipe import Hardware, draft, init
from ft_ray.recipe import Recipe
from tests import tiny

GIB = 2**30
CPU = Hardware(None, 8 * GIB)
CARD = Hardware("NVIDIA GeForce RTX 4090", 24 * GIB)


def loaded(text: str, folder: Path) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return Recipe.load(file)


@pytest.fixture
def support(tmp_path: Path) -> str:
    demo_data.write(tmp_path)
    return str(tmp_path / "train.jsonl")


def test_a_small_model_without_a_gpu(support: str, tmp_path: Path) -> None:
    base = tiny.build(tmp_path / "base")
    text = init([support], str(base), machine=CPU)
    recipe = loaded(text, tmp_path)
    assert recipe.model.id == str(base) and recipe.data.train[0].path == support
    assert recipe.name == "train-base"
    assert (recipe.method, recipe.sequence.packing, recipe.batch.global_) == ("lora", False, 8)
    assert not recipe.gradient_checkpointing
    assert recipe.sequence.max_length == 512  # bytes are this model's tokens, and its context ends at 512
    assert recipe.evaluation.metric == "json_match"
    assert "messages" in text and "counted with the model's tokenizer" in text
    assert all(line.lstrip().startswith("#") or ":" in line or not line for line in text.splitlines())


@pytest.mark.parametrize(
    ("model", "machine", "method"),
    [
        ("org/Model-8B-Instruct", CARD, "qlora"),
        ("org/Model-3B", CARD, "lora"),
        ("org/Model-0.5B", CPU, "lora"),
        ("org/Model-3B", CPU, "qlora"),
        ("org/Model", CARD, "qlora"),
    ],
)
def test_the_method_follows_from_size_and_memory(
    support: str, tmp_path: Path, model: str, machine: Hardware, method: str
) -> None:
    recipe = loaded(init([support], model, machine=machine), tmp_path)
    assert recipe.method == method
    assert recipe.optim.name == ("paged_adamw_8bit" if machine.gpu and method == "qlora" else "adamw_torch")


def test_few_rows_get_more_passes_and_small_models_a_higher_rate(tmp_path: Path) -> None:
    """Else the first run of a beginner ends after 15 steps, with updates that merged bf16 weights cannot hold."""
    cases = ((60, "org/M-135M", 1e-3, 10), (120, "org/M-8B", 2e-4, 5), (2000, "org/M", 2e-4, 3))
    for rows, model, rate, epochs in cases:
        file = tmp_path / f"{rows}.jsonl"
        file.write_text("\n".join(json.dumps({"prompt": f"q {i}", "completion": "a"}) for i in range(rows)))
        recipe = loaded(init([str(file)], model, machine=CPU), tmp_path)
        assert (recipe.optim.lr, recipe.schedule.epochs) == (rate, epochs)


def test_packing_only_where_enough_steps_remain(tmp_path: Path) -> None:
    for rows, expected in ((100, False), (2000, True)):
        file = tmp_path / f"{rows}.jsonl"
        lines = [json.dumps({"prompt": f"{i} " + "word " * 200, "completion": "fine " * 100}) for i in range(rows)]
        file.write_text("\n".join(lines))
        recipe = loaded(init([str(file)], "org/Model-1B", machine=CARD), tmp_path)
        assert recipe.sequence.packing is expected
        assert recipe.sequence.max_length == 1024  # 1,500 bytes a row
        assert recipe.evaluation.metric == "exact_match"


def test_two_sources_odd_names_and_a_guessed_column_map(tmp_path: Path) -> None:
    first, second = tmp_path / "a: #b.csv", tmp_path / "second.jsonl"
    first.write_text("text,category\n" + "".join(f"question {i},label {i % 3}\n" for i in range(30)))
    second.write_text("\n".join(json.dumps({"instruction": f"say {i}", "output": str(i)}) for i in range(30)))
    recipe = loaded(init([str(first), str(second)], "org/Model-1B", "my-run-1", machine=CPU), tmp_path)
    assert [s.path for s in recipe.data.train] == [str(first), str(second)]
    columns = recipe.data.train[0].columns
    assert columns is not None and (columns.prompt, columns.completion) == ("text", "category")
    assert recipe.data.train[1].columns is None
    assert recipe.name == "my-run-1"


def test_unknown_columns_get_a_map_to_fill_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "d.csv"
    file.write_text("a,b,c\n" + "".join(f"text {i},{i},x\n" for i in range(30)))
    text = init([str(file)], str(tiny.build(tmp_path / "base")), machine=CPU)
    assert "columns: {prompt: FILL_IN, completion: FILL_IN}   # of: a, b, c" in text
    assert "d.csv: the fields 'a', 'b', 'c' match no known layout; name them in data.columns" in caplog.text
    made = loaded(text, tmp_path)
    with pytest.raises(DataError) as caught:
        list(read(made.data.train[0]))
    assert str(caught.value) == f"{file}: the recipe has FILL_IN for its columns: fill them in; the file has: a, b, c."
    mended = loaded(text.replace("prompt: FILL_IN, completion: FILL_IN", "prompt: a, completion: c"), tmp_path)
    assert len(list(read(mended.data.train[0]))) == 30


def test_preference_pairs_and_bare_text_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = {
        "pairs": {"prompt": "Who?", "chosen": "Ada", "rejected": "Bob"},
        "turns": {"chosen": [{"role": "user", "content": "Who?"}], "rejected": []},
        "bare": {"text": "Ada wrote it."},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        assert "FILL_IN" in init([str(tmp_path / f"{name}.jsonl")], "org/Model-1B", machine=CPU)
    pairs, turns, bare = [r.getMessage() for r in caplog.records if "fields" in r.getMessage()]
    assert pairs.endswith(
        "the fields 'prompt', 'chosen', 'rejected' are preference pairs, which are not trained on here; to fine-tune "
        "on the chosen answers alone, set data.columns to {prompt: prompt, completion: chosen}."
    )
    assert turns.endswith("set data.columns to {messages: chosen}.")
    assert "'text' match no known layout" in bare


def test_a_saved_data_set_brings_its_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    splits = {
        name: datasets.Dataset.from_list([{"text": f"{name} {i}", "category": "x"} for i in range(5)])
        for name in ("train", "dev", "test", "extra")
    }
    for names, left in ((("train", "test"), "split: {validation: 0.1} "), (tuple(splits), "")):
        folder = tmp_path / "-".join(names)
        datasets.DatasetDict({name: splits[name] for name in names}).save_to_disk(str(folder))
        text = init([str(folder)], "org/Model-1B", machine=CPU)
        data = loaded(text, tmp_path).data
        assert [s.split for s in data.validation] == (["dev"] if "dev" in names else [])
        (test,) = data.test
        assert next(read(test)).messages[0]["content"] == "test 0"
        assert left in text and ("split: {" in text) is bool(left)
    assert "not used: its splits extra" in caplog.text


def test_data_without_a_split_called_train(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = datasets.Dataset.from_list([{"prompt": f"q {i}", "completion": "x"} for i in range(5)])
    folder = str(tmp_path / "sft")
    datasets.DatasetDict(dict.fromkeys(("test_gen", "train_sft", "test_sft"), rows)).save_to_disk(folder)
    data = loaded(init([folder], "org/Model-1B", machine=CPU), tmp_path).data
    assert [s.split for s in (*data.train, *data.test)] == ["train_sft", "test_sft"]
    assert "no split 'train'; the rows of 'train_sft' are for training" in caplog.text
    assert "not used: its splits test_gen" in caplog.text
    for train in ("training", "train_sft"):  # neither has a validation split of its own kind
        datasets.DatasetDict(dict.fromkeys((train, "validation"), rows)).save_to_disk(str(tmp_path / train))
        data = loaded(init([str(tmp_path / train)], "org/Model-1B", machine=CPU), tmp_path).data
        assert [s.split for s in (*data.train, *data.validation)] == [train, "validation"]


def test_rows_of_which_none_can_be_used_say_why(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    file.write_text(json.dumps({"messages": turns}))
    with pytest.raises(DataError, match=r"no row of .* can be used as it is: .*d\.jsonl:1: turn 2 has weight: 0"):
        init([str(file)], "org/Model-1B", machine=CPU)


def test_the_draft_says_what_was_found(tmp_path: Path) -> None:
    known, guessed, bare = (tmp_path / f"{name}.jsonl" for name in ("known", "guessed", "bare"))
    known.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    guessed.write_text(json.dumps({"text": "a", "category": "b"}))
    bare.write_text(json.dumps({"text": "a"}))
    found = draft([str(known), str(guessed), str(bare)], "org/Model-1B", machine=CPU).sources
    keys = ("path", "format", "layout", "columns", "guessed")
    assert [tuple(source[key] for key in keys) for source in found] == [
        (str(known), "jsonl", "prompt/completion", None, False),
        (str(guessed), "jsonl", "column map", {"prompt": "text", "completion": "category"}, True),
        (str(bare), "jsonl", "unknown", {"prompt": "FILL_IN", "completion": "FILL_IN"}, False),
    ]
    said = ["init", "--data", str(bare), "--model", "org/Model-1B", "--output", str(tmp_path / "new.yaml")]
    done = CliRunner().invoke(app, [*said, "--json"])
    assert json.loads(done.stdout) == {"written": str(tmp_path / "new.yaml"), "sources": found[2:]}
    done = CliRunner().invoke(app, [*said, "--force"])
    assert "Next: fill in its columns (FILL_IN), ft-ray data check" in done.stdout


def test_a_model_that_is_not_there_is_said(support: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ft_ray"):
        init([support], "nowhere/at-all", machine=CPU)
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert said.startswith("the model nowhere/at-all was not found") and "HF_HUB_OFFLINE" in said
    assert sum("messages" in r.getMessage() for r in caplog.records) == 1, "the layout is said once"


def test_the_words_fit_the_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "d.jsonl"
    rows = [{"prompt": f"q {i}", "completion": "y", "source": "web", "id": i} for i in range(20)]
    file.write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.INFO, "ft_ray"):
        text = init([str(file)], str(tiny.build(tmp_path / "base")), machine=CPU)
    assert "the longest answer seen has 1 token\n" in text
    assert "0M" not in text and "0.11M parameters" in text
    assert "not used: source, id" in caplog.text


def test_this_machine_is_looked_at(support: str, tmp_path: Path) -> None:
    assert loaded(init([support], "org/Model-135M"), tmp_path).precision == "bf16"


def test_what_cannot_become_a_recipe_is_said(support: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--data"):
        init([], "org/Model-1B")
    with pytest.raises(InputError, match="name"):
        init([support], "org/Model-1B", "no spaces please", machine=CPU)
    with pytest.raises(DataError, match="nowhere"):
        init([str(tmp_path / "nowhere.jsonl")], "org/Model-1B", machine=CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        init([support], str(tmp_path / "empty"), machine=CPU)
