"""A replica's first question, put to its engine before it takes traffic: what it answers must come from numbers.

Weights or kernels that compute NaN answer without an error: greedy decoding takes the first NaN for the largest. So
what was answered is forbidden and the question put again. A large number taken off a number makes another token win;
off NaN or infinity it changes nothing, and the same token comes once more. Probabilities would tell the same, but the
first request for them has vLLM compile a kernel: seconds, and a C++ compiler that an image for CPUs need not have.

vLLM is pinned; what it is asked here is read in its `AsyncLLM.generate` and its logits processors.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from ft_ray.errors import ServingError

__all__ = ["first_answer"]

_TEXT = "Hello"
# Tokens, where the context has room. On a CPU with AMX vLLM 0.29 died of an illegal instruction in its attention where
# the first prompt had 4 tokens (hidden size 128); with one of 40 first, 4 were answered too. Presumably a longer one
# makes oneDNN ask the kernel for AMX, which the attention takes for granted.
_PROMPT = 64
_TOKENS = 2  # the first comes from reading the prompt, the second from what was kept of it
_FORBIDDEN = -1e6  # added to a logit; no logits of a model are that far apart
_PATIENCE_SECONDS = 300.0  # a cold GPU may compile a kernel at its first request


async def first_answer(client: Any, name: str, seconds: float = _PATIENCE_SECONDS) -> None:
    """Raises ServingError when vLLM's engine `client` gives no token, none in time, or one that is of no number.

    The base answers, without an adapter, and the end token does not end it.
    """
    try:
        async with asyncio.timeout(seconds):
            answer = await _ask(client, f"first-answer-{name}", ())
            other = await _ask(client, f"second-answer-{name}", answer) if answer else []
    except TimeoutError as error:
        raise ServingError(
            f"{name}: the engine did not answer its first question within {seconds:g} seconds; the replica is not "
            "used, see its log."
        ) from error
    except Exception as error:
        kind = type(error).__name__
        raise ServingError(
            f"{name}: the engine failed at its first question ({kind}); the replica is not used, see its log."
        ) from error
    if not answer or not other:
        raise ServingError(f"{name}: the engine answered its first question with no token; the replica is not used.")
    if set(answer) & set(other):
        raise ServingError(
            f"{name}: the engine computes no numbers (NaN or infinity): it answers a token that was forbidden; look at "
            "the model's weights and at engine.dtype, the replica is not used."
        )


async def _ask(client: Any, request: str, forbidden: Sequence[int]) -> list[int]:
    """The tokens of one greedy answer."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    wanted = SamplingParams(
        temperature=0.0, max_tokens=_TOKENS, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY,
        logit_bias=dict.fromkeys(forbidden, _FORBIDDEN) or None,
    )  # fmt: skip
    # As tokens: vLLM renders texts elsewhere, and warns of one that comes here. A model reads any first one.
    text = list(client.get_tokenizer().encode(_TEXT)) or [0]
    prompt = (text * _PROMPT)[: min(_PROMPT, client.model_config.max_model_len - _TOKENS)]
    found: list[int] = []
    async with contextlib.aclosing(client.generate(tokens_input(prompt), wanted, request)) as answers:
        async for answer in answers:
            found = [int(token) for output in answer.outputs for token in output.token_ids]
    return found
