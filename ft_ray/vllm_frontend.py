"""What vLLM's front end does for every token, done less often where that changes no answer.

One process turns the engine's tokens into answers, and with a small model on a fast GPU it is what limits throughput:
of its time on an H200 (1B shape, 32 to 256 requests at once) a third went into decoding token by token, 10% into Ray's
metrics and 5% into reading environment variables (benchmarks/README.md, "The endpoint"). vLLM is pinned; every class
taken over here is compared with vLLM's own by tests/parity/test_vllm_frontend.py.
"""

from __future__ import annotations

from typing import Any

import tokenizers.decoders
import vllm.v1.metrics.ray_wrappers as ray_wrappers
from vllm import envs
from vllm.sampling_params import RequestOutputKind
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer, IncrementalDetokenizer

__all__ = ["DecodedOnce", "StatLogger", "fit", "settle"]

# A character has at most four bytes, each a token of its own at worst.
_UNFINISHED = 4
_REPLACEMENT = "\ufffd"
_ONE_IN = 8
_INTER_TOKEN = "vllm:inter_token_latency_seconds"


class DecodedOnce(FastIncrementalDetokenizer):
    """The text of an answer that is sent whole and has no stop strings: decoded at its end, in one go.

    vLLM decodes each token as it comes, with those around it, to have the text of a stream. The result is the same.
    """

    def __init__(self, tokenizer: Any, request: Any) -> None:
        super().__init__(tokenizer, request)
        self._prompt = request.prompt_token_ids
        self._ids: list[int] = []
        self._decoded = 0

    @staticmethod
    def can(detokenizer: IncrementalDetokenizer, request: Any) -> bool:
        """Whether it stands for `detokenizer`, which vLLM made for `request`."""
        return (
            type(detokenizer) is FastIncrementalDetokenizer
            and request.sampling_params.output_kind == RequestOutputKind.FINAL_ONLY
            and not detokenizer.stop
            and detokenizer.spaces_between_special_tokens
        )

    def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
        """Keeps the tokens; there is no stop string to find in them."""
        silent = stop_terminated and not self.include_stop_str_in_output
        self._ids.extend(new_token_ids[:-1] if silent else new_token_ids)
        self.token_ids.extend(new_token_ids)
        return None

    def get_next_output_text(self, finished: bool, delta: bool) -> str:
        if self._decoded < len(self._ids):
            self.output_text, self._decoded = self._text(), len(self._ids)
        text: str = super().get_next_output_text(finished, delta)
        return text

    def _text(self) -> str:
        # A character that is cut off at the end is left out, as it is where tokens are decoded one by one.
        for end in range(len(self._ids), max(0, len(self._ids) - _UNFINISHED), -1):
            stream = self._new_stream()
            try:
                text: str | None = stream.step(self.tokenizer, self._ids[:end])
            except Exception:  # what vLLM knows how to go on from, one by one
                break
            if text is None:
                continue
            # Bytes that are no text: as many signs as there are in any order, or, by the rules of other decoders, as
            # many as there were when vLLM had to begin anew in the middle of them.
            if _REPLACEMENT in text and not isinstance(self.tokenizer.decoder, tokenizers.decoders.ByteLevel):
                break
            return text
        self.stream = self._new_stream()
        return "".join(self.decode_next(token) for token in self._ids)

    def _new_stream(self) -> Any:
        return tokenizers.decoders.DecodeStream(ids=self._prompt, skip_special_tokens=self.skip_special_tokens)


class _Histogram(ray_wrappers.RayHistogramWrapper):
    """Takes one in eight of the times between tokens: all shares and the mean stay as they are, the count does not."""

    def __init__(self, name: str, *rest: Any, **options: Any) -> None:
        super().__init__(name, *rest, **options)
        self._one_in = _ONE_IN if name == _INTER_TOKEN else 1
        self._seen = 0

    def observe(self, value: float) -> None:
        if self._seen % self._one_in == 0:
            super().observe(value)
        self._seen += 1


class StatLogger(ray_wrappers.RayPrometheusStatLogger):
    """vLLM's metrics on Ray's port, without a call into Ray for each token."""

    _histogram_cls = _Histogram


def _from_new_request(cls: type[IncrementalDetokenizer], tokenizer: Any, request: Any) -> IncrementalDetokenizer:
    found: IncrementalDetokenizer = _vllms(tokenizer, request)
    return DecodedOnce(tokenizer, request) if DecodedOnce.can(found, request) else found


_vllms = IncrementalDetokenizer.from_new_request


def fit() -> None:
    """For engines that this process starts from now on."""
    made: Any = IncrementalDetokenizer
    made.from_new_request = classmethod(_from_new_request)
    wrappers: Any = ray_wrappers
    wrappers.RayPrometheusStatLogger = StatLogger


def settle() -> None:
    """Once the engine runs, as in vLLM's own processes: what stays is not collected, the environment not read again."""
    envs.enable_envs_cache()
    freeze_gc_heap()
