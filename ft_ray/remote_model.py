"""Any OpenAI-compatible endpoint as a model to evaluate: a baseline elsewhere, or this project's own endpoint."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

from ft_ray.errors import InputError, ServingError

__all__ = ["OpenAIModel"]

logger = logging.getLogger("ft_ray")

_QUIET = 8.0  # seconds between progress lines


class OpenAIModel:
    """Generates through POST {url}/chat/completions, greedily, `concurrency` requests at a time.

    `url` ends in /v1 as OpenAI clients expect it. The key is `api_key`, else the variable OPENAI_API_KEY, else
    none. Connection errors, 408, 409, 429 and 5xx are tried `retries` times again with growing pauses.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        retries: int = 4,
        timeout: float = 120.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"endpoint {url!r} is not an address: give http(s)://host/v1.")
        self.url, self.model, self.concurrency = url.rstrip("/"), model, concurrency
        self._client = openai.OpenAI(
            base_url=self.url,
            api_key=api_key or os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=retries,
            timeout=timeout,
        )

    def generate(self, prompts: Sequence[Sequence[Mapping[str, str]]], max_new_tokens: int) -> list[str]:
        """The answers, in order. Raises ServingError when the endpoint stays away, InputError when it refuses."""
        started = said = time.monotonic()
        answers: list[str] = []
        pool = ThreadPoolExecutor(self.concurrency, "ft-ray-remote")
        try:
            waiting = [pool.submit(self._answer, prompt, max_new_tokens) for prompt in prompts]
            for future in waiting:
                answers.append(future.result())
                if time.monotonic() - said > _QUIET:
                    said = time.monotonic()
                    logger.info("%s answered %d of %d prompts in %.0f s", self.url, len(answers), len(prompts),
                                said - started)  # fmt: skip
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return answers

    def _answer(self, prompt: Sequence[Mapping[str, str]], max_new_tokens: int) -> str:
        messages: Any = [dict(message) for message in prompt]
        try:
            reply = self._client.chat.completions.create(
                model=self.model, messages=messages, max_tokens=max_new_tokens, temperature=0.0, seed=0
            )
        except openai.AuthenticationError as error:
            raise InputError(f"{self.url} refuses the key (401): set OPENAI_API_KEY.") from error
        except openai.APIConnectionError as error:
            raise ServingError(f"{self.url} cannot be reached ({error}): check that it is up.") from error
        except openai.APIStatusError as error:
            text = f"{self.url} answers {error.status_code} for the model {self.model!r} ({error.message})"
            if error.status_code in (400, 403, 404, 422):
                raise InputError(f"{text}: check the model's name and the length of the prompts.") from error
            raise ServingError(f"{text}: try again later.") from error
        if not reply.choices:
            raise ServingError(f"{self.url} answered without a choice: it is not OpenAI-compatible.")
        return reply.choices[0].message.content or ""

    def score(self, rows: Iterable[Mapping[str, Any]]) -> tuple[float, int]:
        """Not possible over this protocol: prompt log probabilities are not part of it."""
        raise InputError("held-out loss needs the weights: an endpoint only generates.")
