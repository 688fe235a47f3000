"""Held-out loss, and how far two models' predictions lie apart, over the trained tokens of token rows.

Logits are computed at those positions only, a bounded number of rows at a time, and reduced in fp32 in
chunks, so that memory does not grow with the vocabulary times the sequence.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ft_ray.errors import DataError, ModelError

__all__ = ["Parity", "heldout_loss", "loss_sum", "parity"]

_IGNORED = -100
_BUDGET = 1 << 28  # bytes of logits held at once, a single row's apart
_CHUNK = 1 << 24  # values reduced in fp32 at once


@dataclass(frozen=True)
class Parity:
    """KL(reference || candidate) in nats a token, and how often both have the same most likely token."""

    kl_mean: float
    kl_max: float
    top1_agreement: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def heldout_loss(model: Any, rows: Iterable[Mapping[str, Any]], batch: int = 8) -> float:
    """Mean loss over all trained tokens of `rows` (columns input_ids, labels), in nats; the same for any `batch`.

    `model` is a transformers model or anything with `score(rows)`. Raises DataError when no token is trained.
    """
    total, tokens = loss_sum(model, rows, batch) if isinstance(model, torch.nn.Module) else model.score(rows)
    if not tokens:
        raise DataError("the held-out rows have no trained token: check the split and sequence.max_length.")
    return float(total) / tokens


def loss_sum(model: torch.nn.Module, rows: Iterable[Mapping[str, Any]], batch: int) -> tuple[float, int]:
    """(sum over trained tokens of the loss in nats, their number)."""
    total, tokens = 0.0, 0
    with _evaluating(model), torch.inference_mode():
        for inputs, where, targets in _batches(model, rows, batch):
            for logits, labels in _chunks(_logits(model, inputs, where), targets):
                losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
                total += losses.double().sum().item()  # fp64: the order of batches must not show
                tokens += len(labels)
    return total, tokens


def parity(
    reference: torch.nn.Module, candidate: torch.nn.Module, rows: Iterable[Mapping[str, Any]], batch: int = 8
) -> Parity:
    """Compares the two models' next-token distributions at every trained token of `rows`."""
    total, worst, agree, tokens = 0.0, 0.0, 0, 0
    with _evaluating(reference), _evaluating(candidate), torch.inference_mode():
        for inputs, where, targets in _batches(reference, rows, batch):
            one = _logits(reference, inputs, where)
            two = _logits(candidate, {k: v.to(_device(candidate)) for k, v in inputs.items()}, where)
            if one.shape[-1] != two.shape[-1]:
                width = min(one.shape[-1], two.shape[-1])  # a vocabulary may be padded at its end
                one, two = one[..., :width], two[..., :width]
            step = max(1, _CHUNK // one.shape[-1])
            for at in range(0, len(targets), step):
                p = one[at : at + step].float().log_softmax(-1)
                q = two[at : at + step].to(p.device).float().log_softmax(-1)
                divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0)
                if not bool(torch.isfinite(divergence).all()):
                    raise ModelError("a model gives NaN or infinite logits on the held-out rows: it is damaged.")
                total += divergence.double().sum().item()
                worst = max(worst, divergence.max().item())
                agree += int((p.argmax(-1) == q.argmax(-1)).sum())
                tokens += len(divergence)
    if not tokens:
        raise DataError("no trained token to compare the models on: check the validation split.")
    return Parity(total / tokens, worst, agree / tokens, tokens)


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode while inside, the mode before afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _batches(
    model: torch.nn.Module, rows: Iterable[Mapping[str, Any]], batch: int
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]]:
    """(inputs padded on the right [b, t], flat places of the predicting positions [n], their targets [n])."""
    device, vocabulary = _device(model), _config(model).vocab_size
    examples = [(list(row["input_ids"]), list(row["labels"])) for row in rows]
    examples.sort(key=lambda e: len(e[0]))  # rows of one length share a batch; sums do not depend on the order
    group: list[tuple[list[int], list[int]]] = []
    columns: set[int] = set()
    for ids, labels in examples:
        own = {i for i, label in enumerate(labels) if label != _IGNORED}
        size = (len(group) + 1) * len(columns | own) * vocabulary * 4
        if group and (len(group) == batch or size > _BUDGET):
            yield _collate(group, device)
            group, columns = [], set()
        group.append((ids, labels))
        columns |= own
    if group:
        yield _collate(group, device)


def _collate(
    group: list[tuple[list[int], list[int]]], device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    width = max(len(ids) for ids, _ in group)
    ids = torch.tensor([i + [0] * (width - len(i)) for i, _ in group], device=device)
    mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i, _ in group], device=device)
    labels = torch.tensor([x + [_IGNORED] * (width - len(x)) for _, x in group], device=device)
    targets = labels[:, 1:].reshape(-1)  # position t predicts the label of t + 1
    trained = (targets != _IGNORED).nonzero().squeeze(1)
    places = trained // (width - 1) * width + trained % (width - 1)
    return {"input_ids": ids, "attention_mask": mask}, places, targets[trained]


def _logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor], places: torch.Tensor) -> torch.Tensor:
    """Logits [n, vocabulary] at flat `places` of the batch, the head being run on as few columns as hold them."""
    width = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {"use_cache": False}
    rows, columns = places // width, places % width
    needed = columns.unique()
    inner = getattr(model, "get_base_model", lambda: model)()
    if "logits_to_keep" in inspect.signature(inner.forward).parameters and len(needed):
        options["logits_to_keep"] = needed.to(inputs["input_ids"].device)
        columns = torch.searchsorted(needed, columns)
    logits: torch.Tensor = model(**inputs, **options).logits
    return logits[rows.to(logits.device), columns.to(logits.device)]


def _chunks(logits: torch.Tensor, targets: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    step = max(1, _CHUNK // logits.shape[-1])
    for at in range(0, len(targets), step):
        yield logits[at : at + step], targets[at : at + step]


def _config(model: torch.nn.Module) -> Any:
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    return inner.config.get_text_config()
