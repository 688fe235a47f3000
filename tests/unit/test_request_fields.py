"""Every field of vLLM's requests was looked at: what a new version adds has to be, before clients get at it."""

from __future__ import annotations

import inspect

from transformers import PreTrainedTokenizerBase
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from ft_ray import request_rules

# OpenAI's own, and vLLM's that cost one request no more than its tokens do: its sampling, and what its answer shows.
HARMLESS = {
    "add_generation_prompt", "add_special_tokens", "allowed_token_ids", "continue_final_message", "echo",
    "frequency_penalty", "ignore_eos", "include_reasoning", "include_stop_str_in_output", "length_penalty",
    "logit_bias", "min_p", "parallel_tool_calls", "presence_penalty", "reasoning_effort", "repetition_detection",
    "repetition_penalty", "return_prompt_text", "return_token_ids", "return_token_offsets",
    "return_tokens_as_token_ids", "seed", "session_id", "skip_special_tokens", "spaces_between_special_tokens",
    "stop_token_ids", "stream", "stream_interval", "stream_options", "suffix", "temperature", "thinking_token_budget",
    "tool_choice", "top_k", "top_p", "truncate_prompt_tokens", "truncation_side", "use_beam_search", "user",
}  # fmt: skip
# Looked at by `check`: capped, or counted with the prompt.
BOUNDED = {
    "bad_words", "chat_template_kwargs", "documents", "logprob_token_ids", "logprobs", "max_completion_tokens",
    "max_tokens", "messages", "min_tokens", "model", "n", "prompt", "prompt_logprobs", "response_format", "stop",
    "structured_outputs", "tools", "top_logprobs",
}  # fmt: skip


def test_every_field_of_a_request_is_refused_bounded_or_harmless() -> None:
    fields = set(ChatCompletionRequest.model_fields) | set(CompletionRequest.model_fields)
    refused = set(request_rules._REFUSED)
    assert fields - refused - BOUNDED - HARMLESS == set()
    assert (BOUNDED | HARMLESS) & refused == set() == BOUNDED & HARMLESS
    assert fields >= BOUNDED | HARMLESS, "what vLLM no longer has"


def test_no_parameter_of_transformers_passes_for_a_variable_of_a_template() -> None:
    known = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    # The request's own fields say the same, and count with the prompt.
    variables = {"tools", "documents", "add_generation_prompt", "continue_final_message"}
    assert known - {"self", "kwargs"} - variables <= set(request_rules._REFUSED_IN_TEMPLATE)
