"""Chat: the prompt equals the server's, answers and their EOS are trained and nothing else is."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from ft_ray.chat import IGNORED, Chat, load_tokenizer
from ft_ray.errors import DataError, ModelError
from tests import tiny

TWO = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": 'Hello {"a": 1}'},
    {"role": "user", "content": "Grüße, 東京"},
    {"role": "assistant", "content": "Ok."},
]
# Drops the reasoning of earlier turns, as reasoning models' templates do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def chat(folder: Path) -> Chat:
    return Chat(load_tokenizer(folder))


def test_prompt_equals_what_transformers_renders(chat: Chat) -> None:
    for end in (2, 4):
        ids = chat.tokenizer.apply_chat_template(TWO[:end], add_generation_prompt=True, return_dict=False)
        assert chat.prompt_ids(TWO[:end]) == ids
        assert chat.encode(TWO[: end + 1]).input_ids[: len(ids)] == ids


def test_trains_each_answer_with_its_eos_and_nothing_else(chat: Chat) -> None:
    encoded = chat.encode(TWO)
    segments = chat.segments(encoded)
    assert [text for text, trained in segments if trained] == ['Hello {"a": 1}<|im_end|>', "Ok.<|im_end|>"]
    assert len(encoded.labels) == len(encoded.input_ids)
    assert all(label in (IGNORED, i) for label, i in zip(encoded.labels, encoded.input_ids, strict=True))
    assert encoded.trained == sum(label != IGNORED for label in encoded.labels) > 0
    assert "".join(text for text, _ in segments).startswith("<|im_start|>system\nBe kind.<|im_end|>")
    assert encoded.labels[-1] in chat.eos_ids


def test_batch_equals_single_rows_and_keeps_faults_in_place(chat: Chat) -> None:
    rows = [TWO, [{"role": "user", "content": "no answer"}], TWO[:3]]
    out = chat.encode_many(rows)
    assert out[0] == chat.encode(TWO)
    assert isinstance(out[1], DataError)
    assert "no assistant answer" in str(out[1])
    assert out[2] == chat.encode(TWO[:3])


def test_template_that_rewrites_earlier_turns_trains_the_last_answer(folder: Path, caplog: Any) -> None:
    chat = Chat(load_tokenizer(folder), FORGETFUL)
    row = copy.deepcopy(TWO)
    row[2]["content"] = "<think>hm</think>Hello"
    row[4]["content"] = "<think>well</think>Ok."
    with caplog.at_level("WARNING", logger="ft_ray"):
        trained = [text for text, on in chat.segments(chat.encode(row)) if on]
        chat.encode(row)
    assert trained == ["<think>well</think>Ok.<|im_end|>"]
    assert len([r for r in caplog.records if "only the last one" in r.message]) == 1
    # The prompt is still the server's.
    prompt = chat.prompt_ids(row[:4])
    assert chat.encode(row).input_ids[: len(prompt)] == prompt


def test_template_whose_prompt_is_no_prefix_is_refused(folder: Path) -> None:
    odd = tiny.CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>bot:'")
    with pytest.raises(DataError, match="prefix of the whole row"):
        Chat(load_tokenizer(folder), odd).encode(TWO)


def test_template_without_eos_is_refused_row_by_row(folder: Path) -> None:
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    bare += "{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(DataError, match="never learn to stop"):
        Chat(load_tokenizer(folder), bare).encode(TWO)


def test_answer_that_contains_eos_is_refused(chat: Chat) -> None:
    with pytest.raises(DataError, match="end-of-turn token"):
        chat.encode([{"role": "user", "content": "x"}, {"role": "assistant", "content": "a<|im_end|>b"}])


def test_roles_the_template_refuses(folder: Path) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    with pytest.raises(DataError, match="System role not supported"):
        Chat(load_tokenizer(folder), strict + tiny.CHATML).encode(TWO)


def test_eos_comes_from_tokenizer_generation_config_and_template(folder: Path, tmp_path: Path, caplog: Any) -> None:
    tokenizer = load_tokenizer(folder)
    assert Chat(tokenizer).eos_ids == {2}
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0]}))
    with caplog.at_level("WARNING", logger="ft_ray"):
        chat = Chat(load_tokenizer(tmp_path))
    assert chat.eos_ids == {0, 2}
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    assert Chat(load_tokenizer(tmp_path)).eos_ids == {0, 1, 2}, "where engines look then"
    assert "<|im_end|>" in caplog.text
    assert chat.encode(TWO).labels[-1] == 2


def test_hash_follows_the_template_and_chat_travels(folder: Path, chat: Chat) -> None:
    other = Chat(load_tokenizer(folder), FORGETFUL)
    assert chat.template_hash != other.template_hash
    assert len(chat.template_hash) == 64
    again = pickle.loads(pickle.dumps(chat))
    assert again.template_hash == chat.template_hash
    assert again.encode(TWO) == chat.encode(TWO)


def test_tokenizer_that_marks_the_start_of_text_is_tokenised_whole(tmp_path: Path) -> None:
    """SentencePiece-like: every text begins with a mark, so pieces must not be tokenised alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set('▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789[]/?.,!{}":'))
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *letters])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    chat = Chat(
        tokenizer,
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    )
    row = [{"role": "user", "content": "Hi you"}, {"role": "assistant", "content": "Yes sir"},
           {"role": "user", "content": "Go"}, {"role": "assistant", "content": "No"}]  # fmt: skip
    encoded = chat.encode(row)
    whole = tokenizer(chat._render(row, False), add_special_tokens=False)["input_ids"]
    assert encoded.input_ids == whole
    prompt = chat.prompt_ids(row[:1])
    assert encoded.input_ids[: len(prompt)] == prompt
    trained = tokenizer.convert_ids_to_tokens([i for i in encoded.labels if i != IGNORED])
    assert trained == [*"Yes▁sir", "</s>", *"No", "</s>"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "holds no tokenizer"), ("{broken", "cannot be loaded")],
)
def test_folder_without_a_usable_tokenizer(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("template", "message"), [("", "no chat template"), ("{% for %}", "not valid Jinja")])
def test_template_missing_or_broken(folder: Path, template: str, message: str) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=message):
        Chat(tokenizer, template or None)
