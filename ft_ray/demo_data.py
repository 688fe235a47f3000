"""The demo's data set: customer-support messages and the JSON that a shop's system wants from them.

Deterministic from a seed. Training and test messages are made of different phrases, names and order numbers
(`ft_ray.demo_phrases`), so the test asks for wording never seen in training. Validation draws from the
training phrases with names and order numbers of its own: it watches the fit, the test measures what is new.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ft_ray.demo_phrases import TEST, TRAIN, Phrases

__all__ = ["COUNTS", "SYSTEM", "Answer", "Example", "SplitName", "generate", "skeleton", "write"]

SplitName = Literal["train", "validation", "test"]

COUNTS: dict[SplitName, int] = {"train": 1600, "validation": 160, "test": 200}
SYSTEM = "Return JSON: intent, order, days, sentiment."

_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_LETTERS = "ABCDEFGHJKLMNPRSTVWXYZ"
_VALIDATION_NAMES = 10  # the last names of the training list are kept for validation
_WAIT = re.compile(rf"\b(a|\d+|one|{'|'.join(_NUMBERS)}) (days?|weeks?)\b", re.IGNORECASE)
_ORDER = re.compile(r"\b[A-Z]\d{4}\b")
_NAME = re.compile(rf"\b({'|'.join((*TRAIN.names, *TEST.names))})\b")


@dataclass(frozen=True)
class Answer:
    """What the message says; `json()` is the reference answer, compact and in this key order."""

    intent: str
    order: str
    days: int
    sentiment: str

    def json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


@dataclass(frozen=True)
class Example:
    message: str
    answer: Answer

    def row(self) -> dict[str, list[dict[str, str]]]:
        """The example as one line of a messages file."""
        return {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": self.message},
                {"role": "assistant", "content": self.answer.json()},
            ]
        }


def skeleton(text: str) -> str:
    """The message's template: order number, duration and name masked, case and spaces levelled."""
    masked = _ORDER.sub("<order>", text)
    masked = _WAIT.sub("<wait>", masked)
    masked = _NAME.sub("<name>", masked)
    return " ".join(re.sub(r"\d+", "<number>", masked).lower().split())


def generate(split: SplitName, *, seed: int = 0, count: int | None = None) -> list[Example]:
    """`count` examples of a split (default: COUNTS), no message twice, every order number in one message only."""
    wanted = COUNTS[split] if count is None else count
    rng = random.Random(f"ft-ray demo {split} {seed}")
    phrases = TEST if split == "test" else TRAIN
    held_out = TRAIN.names[-_VALIDATION_NAMES:]
    names = {"train": TRAIN.names[:-_VALIDATION_NAMES], "validation": held_out, "test": TEST.names}[split]
    labels = [(intent, tone) for intent in phrases.requests for tone in phrases.tones]
    orders = _order_numbers(split, seed, wanted)
    examples: list[Example] = []
    while len(examples) < wanted:
        if len(examples) % len(labels) == 0:
            rng.shuffle(labels)
        intent, sentiment = labels[len(examples) % len(labels)]
        wait, days = _wait(rng)
        answer = Answer(intent, orders[len(examples)], days, sentiment)
        examples.append(Example(_message(rng, phrases, names, answer, wait), answer))
    return examples


def write(folder: str | Path, *, seed: int = 0) -> dict[str, int]:
    """Writes train.jsonl, validation.jsonl and test.jsonl to `folder`; returns the rows of each."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for split in COUNTS:
        lines = [json.dumps(example.row()) + "\n" for example in generate(split, seed=seed)]
        (target / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {str(split): count for split, count in COUNTS.items()}


def _order_numbers(split: SplitName, seed: int, count: int) -> list[str]:
    """Distinct numbers. One shuffled pool serves all splits, each from its own stretch, so none is shared."""
    rng = random.Random(f"ft-ray demo orders {seed}")
    pool = rng.sample(range(len(_LETTERS) * 9000), 60_000)
    start = {"train": 0, "validation": 20_000, "test": 40_000}[split]
    if count > 20_000:
        raise ValueError("a split of the demo data holds at most 20,000 examples")
    return [f"{_LETTERS[n // 9000]}{1000 + n % 9000}" for n in pool[start : start + count]]


def _wait(rng: random.Random) -> tuple[str, int]:
    """A duration in words and its days: '5 days', 'nine days', 'a week', 'two weeks'."""
    kind = rng.random()
    if kind < 0.5:
        days = rng.randint(2, 30)
        return f"{days} days", days
    if kind < 0.8:
        index = rng.randrange(len(_NUMBERS))
        return f"{_NUMBERS[index]} days", index + 2
    return rng.choice((("a week", 7), ("two weeks", 14)))


def _message(rng: random.Random, phrases: Phrases, names: tuple[str, ...], answer: Answer, wait: str) -> str:
    fill = {"order": answer.order, "wait": wait, "name": rng.choice(names)}
    request = rng.choice(phrases.requests[answer.intent])
    duration = rng.choice(phrases.waits).format(**fill)
    tone = rng.choice(phrases.tones[answer.sentiment])
    if rng.random() < 0.6:
        parts = [request.format(it=rng.choice(phrases.things).format(**fill)), duration]
    else:
        parts = [request.format(it=rng.choice(("my order", "it"))), rng.choice(phrases.orders).format(**fill), duration]
    rng.shuffle(parts)
    parts.insert(0 if rng.random() < 0.25 else len(parts), tone)
    opening = rng.choice((*phrases.openings, *phrases.named)) if rng.random() < 0.7 else ""
    text = [opening.format(**fill)] if opening else []
    for part in parts:
        text.append(part[0].lower() + part[1:] if text and text[-1].endswith(",") and _lowers(part) else _upper(part))
    return " ".join(text)


def _lowers(sentence: str) -> bool:
    """After 'Hello,' a sentence goes on in lower case, unless it starts with I or an order number."""
    first = sentence.split()[0]
    return first not in ("I", "I'm", "I'd", "I've") and not _ORDER.match(first)


def _upper(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
