"""Batched greedy generation and scoring with a transformers model on this machine."""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from ft_ray import recipe as recipes
from ft_ray.base_model import ModelFiles
from ft_ray.chat import Chat
from ft_ray.errors import DataError
from ft_ray.kv_cache import ATTENTION, new_cache
from ft_ray.model_loading import load_model
from ft_ray.parity import loss_sum
from ft_ray.precision import on_device

__all__ = ["HFModel", "Model", "best_device"]

logger = logging.getLogger("ft_ray")

_SHARED_PREFIX = 16  # tokens; below this the second forward pass costs more than it saves
_QUIET = 8.0  # seconds between progress lines


class Model(Protocol):
    """What `evaluate` needs: answers to prompts, and the loss of token rows where the model can tell it."""

    def generate(self, prompts: Sequence[Sequence[Mapping[str, str]]], max_new_tokens: int) -> list[str]: ...

    def score(self, rows: Iterable[Mapping[str, Any]]) -> tuple[float, int]: ...


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class HFModel:
    """A causal language model of transformers (or PEFT's wrapper of one) with its chat format.

    `batch` prompts are decoded together.
    """

    def __init__(self, model: PreTrainedModel, chat: Chat, batch: int = 16) -> None:
        self.model, self.chat, self.batch = model, chat, batch
        unwrap = getattr(model, "get_base_model", None)
        self._inner: PreTrainedModel = unwrap() if unwrap is not None else model
        self._accepts = frozenset(inspect.signature(self._inner.forward).parameters)

    @classmethod
    def load(
        cls,
        folder: Path,
        chat: Chat,
        recipe: recipes.Recipe,
        *,
        adapter: Path | None = None,
        quantized: bool = False,
        device: str | None = None,
    ) -> HFModel:
        """The model in `folder` in the recipe's precision (`quantized`: in 4 bits), with `adapter` on top if given."""
        files = ModelFiles(folder, str(folder), None, "", {})
        # Full fine-tuning trains fp32 weights, but what it makes is used in the recipe's precision.
        plain = recipe if quantized else recipe.model_copy(update={"method": "lora"})
        device = device or best_device()
        plain, _ = on_device(plain, device)
        model = load_model(files, plain, device=device, quantized=quantized)
        if adapter is not None:
            from peft import PeftModel

            wrapped: Any = PeftModel.from_pretrained(model, str(adapter))
            model = wrapped
        model.eval()
        return cls(model, chat, recipe.evaluation.batch)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generate(self, prompts: Sequence[Sequence[Mapping[str, str]]], max_new_tokens: int) -> list[str]:
        """The greedy answer to each prompt, in order, without special tokens.

        An answer ends at any of the chat's EOS tokens or after `max_new_tokens`. Prompts are sorted by length
        and padded on the left. Raises DataError when a prompt leaves no room in the model's context.
        """
        ids = [self.chat.prompt_ids(list(prompt)) for prompt in prompts]
        self._check_room(ids)
        answers = self.generate_ids(ids, max_new_tokens)
        return [str(self.chat.tokenizer.decode(a, skip_special_tokens=True)) for a in answers]

    def _check_room(self, ids: list[list[int]]) -> None:
        longest = max(range(len(ids)), key=lambda i: len(ids[i]), default=None)
        limit = getattr(self._inner.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and limit and len(ids[longest]) >= limit:
            raise DataError(
                f"prompt {longest + 1} has {len(ids[longest])} tokens and the model's context {limit}: "
                "shorten it, or use fewer few-shot examples (evaluation.few_shot)."
            )

    def generate_ids(self, ids: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Like `generate`, on token ids; answers come without their EOS."""
        answers: list[list[int]] = [[] for _ in ids]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        prefix = _common_prefix(ids)
        started = said = time.monotonic()
        with self._decoding(), self._without_grad():
            for at in range(0, len(order), self.batch):
                chosen = order[at : at + self.batch]
                found = self._decode([ids[i] for i in chosen], prefix, max_new_tokens)
                for i, answer in zip(chosen, found, strict=True):
                    answers[i] = answer
                if time.monotonic() - said > _QUIET:
                    said = time.monotonic()
                    done = at + len(chosen)
                    rate = sum(map(len, answers)) / (said - started)
                    logger.info("answered %d of %d prompts (%.0f tokens/s)", done, len(ids), rate)
        return answers

    def _decode(self, prompts: list[list[int]], prefix: int, max_new_tokens: int) -> list[list[int]]:
        device, stop = self.device, torch.tensor(sorted(self.chat.eos_ids), device=self.device)
        limit = getattr(self._inner.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        width, rows = max(map(len, prompts)), len(prompts)
        prefix = prefix if rows > 1 else 0
        cache = new_cache(self._inner)
        if prefix:
            shared = torch.tensor([prompts[0][:prefix]], device=device)
            self._forward(shared, torch.ones_like(shared), torch.arange(prefix, device=device)[None], cache)
            cache.batch_repeat_interleave(rows)
        tokens = torch.tensor([[0] * (width - len(p)) + p[prefix:] for p in prompts], device=device)
        pads = torch.tensor([width - len(p) for p in prompts], device=device)
        places = torch.arange(width, device=device)[None]
        # With a shared prefix, the padding lies between it and the rest of the prompt.
        mask = ((places < prefix) | (places >= prefix + pads[:, None])).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, prefix:]
        answers: list[list[int]] = [[] for _ in prompts]
        alive = list(range(rows))
        for _ in range(min(max_new_tokens, limit - width)):
            logits = self._forward(tokens, mask, positions, cache)
            chosen = logits[:, -1].argmax(-1)
            ended = torch.isin(chosen, stop).tolist()
            for row, token, end in zip(alive, chosen.tolist(), ended, strict=True):
                if row >= 0 and not end:
                    answers[row].append(token)
            alive = [-1 if end else row for row, end in zip(alive, ended, strict=True)]
            left = sum(row >= 0 for row in alive)
            if not left:
                break
            tokens, positions = chosen[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
            if left <= len(alive) // 2:  # copying the cache pays when half the rows have ended
                keep = torch.tensor([i for i, row in enumerate(alive) if row >= 0], device=device)
                cache.batch_select_indices(keep)
                tokens, positions, mask = tokens[keep], positions[keep], mask[keep]
                alive = [row for row in alive if row >= 0]
        return answers

    def _forward(
        self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        options: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        options = {k: v for k, v in options.items() if k in self._accepts}
        out = self.model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
        logits: torch.Tensor = out.logits
        return logits

    @contextlib.contextmanager
    def _decoding(self) -> Iterator[None]:
        """Eval mode and the attention for decoding; both as before afterwards."""
        training, config = self.model.training, self._inner.config
        before = config._attn_implementation
        self.model.eval()
        if before == "sdpa" and self.device.type == "cpu":
            self._inner.set_attn_implementation(ATTENTION)
        try:
            yield
        finally:
            if config._attn_implementation != before:
                self._inner.set_attn_implementation(before)
            self.model.train(training)

    def _without_grad(self) -> Any:
        """Inference mode; not for a model that ZeRO-3 shares out: training could not go on with what is gathered."""
        sharded = any(hasattr(parameter, "ds_id") for parameter in self.model.parameters())
        return torch.no_grad() if sharded else torch.inference_mode()

    def score(self, rows: Iterable[Mapping[str, Any]]) -> tuple[float, int]:
        """(sum of the loss in nats, number of trained tokens) over rows of input_ids and labels."""
        return loss_sum(self.model, rows, self.batch)


def _common_prefix(ids: Sequence[list[int]]) -> int:
    """How many leading tokens all prompts share (system message, few-shot examples); 0 when not worth it."""
    if len(ids) < 2:
        return 0
    first, last = min(ids), max(ids)  # whatever these two share in dictionary order, all between them share
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    shared = min(shared, min(map(len, ids)) - 1)  # each prompt keeps a token of its own to go on from
    return shared if shared >= _SHARED_PREFIX else 0
