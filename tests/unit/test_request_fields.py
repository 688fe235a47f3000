"""Every field of vLLM's requests was looked at: what a new version adds has to be, before clients get at it."""

from __future__ import annotations

import inspect
import unicodedata
from typing import Literal

import pytest
from transformers import PreTrainedTokenizerBase
from vllm import envs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.v1.worker.gpu.sample import logit_bias

from ft_ray import request_rules
from ft_ray.request_rules import check
from ft_ray.serve_args import Limits

# OpenAI's own, and vLLM's that cost one request no more than its tokens do: its sampling, and what its answer shows.
HARMLESS = {
    "add_generation_prompt", "add_special_tokens", "continue_final_message", "echo",
    "frequency_penalty", "ignore_eos", "include_reasoning", "include_stop_str_in_output", "length_penalty",
    "min_p", "parallel_tool_calls", "presence_penalty", "reasoning_effort",
    "repetition_penalty", "return_prompt_text", "return_token_ids", "return_token_offsets",
    "return_tokens_as_token_ids", "seed", "session_id", "skip_special_tokens", "spaces_between_special_tokens",
    "stream", "stream_options", "suffix", "temperature", "thinking_token_budget",
    "tool_choice", "top_p", "truncate_prompt_tokens", "truncation_side", "user",
}  # fmt: skip
# Looked at by `check`: capped, counted with the prompt, or refused unless false.
BOUNDED = {
    "allowed_token_ids", "bad_words", "chat_template_kwargs", "documents", "logit_bias", "logprob_token_ids",
    "logprobs", "max_completion_tokens", "max_tokens", "messages", "min_tokens", "model", "n", "prompt",
    "prompt_logprobs", "repetition_detection", "response_format", "stop", "stop_token_ids", "stream_interval",
    "structured_outputs", "tools", "top_k", "top_logprobs", "use_beam_search",
}  # fmt: skip


def test_every_field_of_a_request_is_refused_bounded_or_harmless() -> None:
    fields = set(ChatCompletionRequest.model_fields) | set(CompletionRequest.model_fields)
    refused = set(request_rules._REFUSED)
    assert fields - refused - BOUNDED - HARMLESS == set()
    assert (BOUNDED | HARMLESS) & refused == set() == BOUNDED & HARMLESS
    assert fields >= BOUNDED | HARMLESS, "what vLLM no longer has"


def test_what_passes_fits_the_rows_of_vllms_runner_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request with more ends the engine, where this runner is used: on GPUs, with Triton."""
    assert request_rules._MOST_ENTRIES["allowed_token_ids"] <= logit_bias.MAX_NUM_ALLOWED_TOKEN_IDS
    assert request_rules._MOST_ENTRIES["logit_bias"] <= logit_bias.MAX_NUM_LOGIT_BIAS_TOKENS
    assert request_rules._MOST_ENTRIES["stop_token_ids"] + 28 <= logit_bias.MAX_NUM_STOP_TOKEN_IDS  # and the model's
    assert request_rules._MOST_ENTRIES["bad_words"] <= envs.VLLM_MAX_NUM_BAD_WORDS
    assert envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS < request_rules.BAD_WORD_TOKENS, "it could be left alone"
    monkeypatch.setenv("VLLM_MAX_BAD_WORDS_TOTAL_TOKENS", str(request_rules.BAD_WORD_TOKENS))
    assert envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS == request_rules.BAD_WORD_TOKENS


@pytest.mark.parametrize("character", ["\ufdfa", "\u0958", "\U00013000", "x"])
@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_no_bad_words_have_more_tokens_than_there_is_room_for(character: str, form: Literal["NFC", "NFKC"]) -> None:
    """A tokenizer that knows no word has a token for each byte of what its normalizer makes of a text."""
    word = character * (2_000 // 128 // len(character.encode()))
    most = 2 * 128 * (len(unicodedata.normalize(form, word).encode()) + 3)
    assert most <= request_rules.BAD_WORD_TOKENS
    check({"bad_words": [word] * 128}, Limits(), [])


def test_no_parameter_of_transformers_passes_for_a_variable_of_a_template() -> None:
    known = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    # The request's own fields say the same, and count with the prompt.
    variables = {"tools", "documents", "add_generation_prompt", "continue_final_message"}
    assert known - {"self", "kwargs"} - variables <= set(request_rules._REFUSED_IN_TEMPLATE)
