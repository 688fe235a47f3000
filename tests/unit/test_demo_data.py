"""The demo's data: unseen wording in the test split, and labels that a reader of the message would give."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ft_ray.demo_data import COUNTS, SYSTEM, Example, generate, skeleton, write
from ft_ray.demo_phrases import TEST, TRAIN, Phrases

SEEDS = (0, 7)
WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "a": 1}


def flat(phrases: Phrases) -> list[str]:
    """Every phrase as bare words, the slots kept."""
    groups = [phrases.openings, phrases.named, phrases.things, phrases.orders, phrases.waits]
    groups += [*phrases.requests.values(), *phrases.tones.values()]
    return [" ".join(re.findall(r"[a-z{}']+", phrase.lower())) for group in groups for phrase in group]


def names_in(examples: list[Example]) -> set[str]:
    return {word for e in examples for word in re.findall(r"\w+", e.message)} & {*TRAIN.names, *TEST.names}


def says(phrases: dict[str, tuple[str, ...]], message: str, things: tuple[str, ...]) -> set[str]:
    """The labels of which some phrase stands in the message as a sentence of its own."""
    slot = "|".join([*(re.escape(t).replace(r"\{order\}", r"\w+") for t in things), "my order", "it"])
    found = set()
    for label, group in phrases.items():
        for phrase in group:
            pattern = re.escape(phrase).replace(r"\{it\}", f"(?:{slot})")
            if re.search(rf"(?:^|[.,?!] ){pattern}(?: |$)", message, re.IGNORECASE):
                found.add(label)
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_no_skeleton_name_or_order_number_is_shared_with_the_test_split(seed: int) -> None:
    train, validation, test = (generate(split, seed=seed) for split in ("train", "validation", "test"))
    for seen in (train, validation):
        assert not {skeleton(e.message) for e in seen} & {skeleton(e.message) for e in test}
        assert not names_in(seen) & names_in(test)
        assert not {e.answer.order for e in seen} & {e.answer.order for e in test}
    assert names_in(train) and names_in(validation) and names_in(test)
    assert not names_in(train) & names_in(validation)
    assert not {e.answer.order for e in train} & {e.answer.order for e in validation}


def test_skeletons_mask_names_numbers_and_durations() -> None:
    one = skeleton("Hi, Maria here. Please refund order A1234. I ordered two weeks ago.")
    assert one == skeleton("hi, Peter here. Please refund order K9876. I ordered 12 days  ago.")
    assert one == "hi, <name> here. please refund order <order>. i ordered <wait> ago."
    assert one != skeleton("Hi, Maria here. Please cancel order A1234. I ordered two weeks ago.")


def test_no_test_phrase_is_a_training_phrase() -> None:
    train, test = flat(TRAIN), flat(TEST)
    assert train and test and not set(train) & set(test)
    assert not set(TRAIN.names) & set(TEST.names)
    assert sum(map(len, TRAIN.requests.values())) >= 60
    assert set(TRAIN.requests) == set(TEST.requests) and set(TRAIN.tones) == set(TEST.tones)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_field_can_be_read_from_the_message(split: str, seed: int) -> None:
    phrases = TEST if split == "test" else TRAIN
    for example in generate(split, seed=seed):  # type: ignore[arg-type]
        message, answer = example.message, example.answer
        assert re.findall(r"\b[A-Z]\d{4}\b", message) == [answer.order]
        [(amount, unit)] = re.findall(rf"\b(\d+|{'|'.join(WORDS)}) (day|week)s?\b", message, re.IGNORECASE)
        days = (int(amount) if amount.isdigit() else WORDS[amount.lower()]) * (7 if unit == "week" else 1)
        assert days == answer.days
        assert says(phrases.tones, message, phrases.things) == {answer.sentiment}, message
        assert says(phrases.requests, message, phrases.things) == {answer.intent}, message


@pytest.mark.parametrize("seed", SEEDS)
def test_no_contradictions_and_no_repeats(seed: int) -> None:
    examples = [e for split in COUNTS for e in generate(split, seed=seed)]
    assert len({e.message for e in examples}) == len(examples) == sum(COUNTS.values())
    labels: dict[str, tuple[str, str]] = {}
    for e in examples:
        expected = (e.answer.intent, e.answer.sentiment)
        assert labels.setdefault(skeleton(e.message), expected) == expected, e.message


def test_labels_are_balanced() -> None:
    for split in COUNTS:
        examples = generate(split)
        for field, share in (("intent", 1 / 6), ("sentiment", 1 / 3)):
            values = [getattr(e.answer, field) for e in examples]
            for value in set(values):
                assert abs(values.count(value) / len(values) - share) < 0.03, (split, value)


def test_written_files_are_messages_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    counts = write(tmp_path / "a", seed=3)
    write(tmp_path / "b", seed=3)
    write(tmp_path / "c", seed=4)
    assert counts["train"] >= 1200 and counts["validation"] >= 150 and counts["test"] >= 200
    for split, count in counts.items():
        text = (tmp_path / "a" / f"{split}.jsonl").read_text()
        assert text == (tmp_path / "b" / f"{split}.jsonl").read_text()
        assert text != (tmp_path / "c" / f"{split}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert len(rows) == count
        for row in rows:
            assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
            assert row["messages"][0]["content"] == SYSTEM
            answer = json.loads(row["messages"][2]["content"])
            assert list(answer) == ["intent", "order", "days", "sentiment"] and all(answer.values())
            assert row["messages"][2]["content"] == json.dumps(answer, separators=(",", ":"))


def test_more_rows_keep_the_first_ones() -> None:
    assert generate("train", count=100) == generate("train", count=200)[:100]
