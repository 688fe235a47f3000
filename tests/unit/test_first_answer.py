"""What a replica's engine must answer before it is used; the engine is stood in for, its greedy choice is torch's."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor

from ft_ray.errors import ServingError
from ft_ray.first_answer import first_answer

NAN, INF = float("nan"), float("inf")


class Engine:
    """Has `logits` for each step; an error or a wait before them where told to. Keeps what it was asked."""

    def __init__(self, *logits: list[float], error: Exception | None = None, wait: float = 0) -> None:
        self.logits, self.error, self.wait = [torch.tensor(row) for row in logits], error, wait
        self.asked: list[tuple[Any, SamplingParams, str]] = []
        self.closed = 0

    model_config = SimpleNamespace(max_model_len=8)

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(encode=lambda text: list(text.encode()))

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str
    ) -> AsyncIterator[RequestOutput]:
        self.asked.append((prompt, sampling_params, request_id))
        try:
            await asyncio.sleep(self.wait)
            if self.error is not None:
                raise self.error
            tokens = []
            for row in self.logits:
                biased = row.clone()
                for token, bias in (sampling_params.logit_bias or {}).items():
                    biased[token] += bias
                tokens.append(int(biased.argmax()))
            output = CompletionOutput(index=0, text="", token_ids=tokens, cumulative_logprob=None, logprobs=None)
            yield RequestOutput(request_id, None, [1], None, [output], True)
        finally:
            self.closed += 1


def ask(engine: Engine, seconds: float = 10) -> None:
    asyncio.run(first_answer(engine, "tiny", seconds))


def test_a_sound_engine_is_asked_twice_in_short() -> None:
    engine = Engine([0.5, -3.0, 40.0, 1.0], [0.0, 9.0, 1.0, 2.0])
    ask(engine)
    (one, two) = engine.asked
    assert one[0] == two[0] == {"type": "token", "prompt_token_ids": [*b"HelloH"]}, "what the context has room for"
    for _, wanted, _ in engine.asked:
        assert (wanted.temperature, wanted.max_tokens, wanted.ignore_eos) == (0.0, 2, True)
        assert wanted.logprobs is None, "the first request for them compiles"
    assert one[1].logit_bias is None and set(two[1].logit_bias or {}) == {1, 2}
    assert one[2] != two[2] and engine.closed == 2


@pytest.mark.parametrize(
    "logits",
    [
        ([NAN] * 4, [NAN] * 4),
        ([1.0, NAN, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]),  # one NaN is the largest
        ([INF, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]),
        ([-INF] * 4, [-INF] * 4),
        ([0.0, 1.0, 2.0, 3.0], [NAN] * 4),  # what was kept of the prompt is broken
    ],
)
def test_an_engine_that_computes_no_numbers_is_refused(logits: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ServingError, match=r"tiny: the engine computes no numbers \(NaN or infinity\)"):
        ask(Engine(*logits))


def test_no_token_is_refused() -> None:
    with pytest.raises(ServingError, match="tiny: the engine answered its first question with no token"):
        ask(Engine())


def test_an_engine_that_hangs_or_fails_is_refused_and_let_go() -> None:
    engine = Engine(wait=60)
    with pytest.raises(ServingError, match=r"did not answer its first question within 0\.1 seconds"):
        ask(engine, 0.1)
    assert engine.closed == 1
    with pytest.raises(ServingError, match=r"failed at its first question \(RuntimeError\)") as caught:
        ask(Engine(error=RuntimeError("of the prompt")))
    assert "prompt" not in str(caught.value)


def test_vllm_does_with_it_what_is_meant_here() -> None:
    parameters = list(inspect.signature(AsyncLLM.generate).parameters)
    assert parameters[:4] == ["self", "prompt", "sampling_params", "request_id"]
    assert hasattr(AsyncLLM, "get_tokenizer")
    assert SamplingParams(logit_bias={3: -1e6}).logit_bias == {3: -1e6}, "not clamped"
    assert "+= self.bias_tensor" in inspect.getsource(LogitBiasLogitsProcessor.apply), "added, before the greedy choice"
