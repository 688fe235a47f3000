"""What a step of the shared base keeps and computes on a GPU, seen on a CPU: copies, recomputed products, attention."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from ft_ray.adapter_stack import Bucket
from ft_ray.segments import MicroBatch
from ft_ray.shared_base import AdapterConfig, SharedBase, StepResult
from ft_ray.stacked_linear import StackedLinear

LAYERS = 4
CONFIGS = {
    f"t{i}": AdapterConfig(total_steps=8, r=(4, 16)[i % 2], alpha=16, dropout=(0.0, 0.2)[i % 2], lr=1e-2, seed=i)
    for i in range(3)
}
DATA = {
    name: [MicroBatch.of([([3 + i, 9, 4, 7] * n, [3 + i, 9, 4, 7] * n) for n in (2, 5, 9)]) for _ in range(3)]
    for i, name in enumerate(CONFIGS)
}


def base(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def gpu_like(dtype: torch.dtype, **options: Any) -> SharedBase:
    shared = SharedBase(base(dtype), exact=False, **options)
    shared._base._context.gpu = True
    for name, config in CONFIGS.items():
        shared.attach(name, config)
    return shared


def train(shared: SharedBase) -> list[dict[str, StepResult]]:
    return [shared.step({name: batches[step] for name, batches in DATA.items()}) for step in range(3)]


def test_rounded_matrices_are_not_held_from_forward_to_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are 2 bytes a parameter of all adapters: with checkpointed layers only the last layer's may be there."""
    shared = gpu_like(torch.bfloat16, gradient_checkpointing=True)
    made: list[weakref.ref[Tensor]] = []
    stacked = Bucket.stacked

    def watched(self: Bucket, *args: Any) -> Any:
        views = stacked(self, *args)
        made.append(weakref.ref(views.a))
        return views

    alive: list[int] = []
    losses = shared._base.losses

    def measured(*args: Any) -> Any:
        found = losses(*args)
        gc.collect()
        alive.append(sum(one() is not None for one in made))
        return found

    monkeypatch.setattr(Bucket, "stacked", watched)
    monkeypatch.setattr(shared._base, "losses", measured)
    shared.step({name: batches[0] for name, batches in DATA.items()})
    one_layer = 7 * 2  # projections, rank buckets
    assert alive == [one_layer] and len(made) > LAYERS * one_layer


def test_a_recompute_ends_before_the_last_product(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = gpu_like(torch.float32, gradient_checkpointing=True)
    products: Counter[str] = Counter()
    product = StackedLinear._product

    def counted(self: StackedLinear, *args: Any) -> None:
        products[self.name] += 1
        product(self, *args)

    monkeypatch.setattr(StackedLinear, "_product", counted)
    shared.step({name: batches[0] for name, batches in DATA.items()})
    assert {name.rpartition(".")[2] for name, n in products.items() if n == 1 and ".0." in name} == {"down_proj"}
    assert all(n == 1 for name, n in products.items() if f".{LAYERS - 1}." in name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_masks_as_on_a_gpu_give_the_losses_of_a_cpu(checkpointing: bool) -> None:
    plain = SharedBase(base(torch.float32), exact=True)
    for name, config in CONFIGS.items():
        plain.attach(name, config)
    expected, found = train(plain), train(gpu_like(torch.float32, gradient_checkpointing=checkpointing))
    for one, other in zip(expected, found, strict=True):
        for name in CONFIGS:
            assert other[name].loss == pytest.approx(one[name].loss, abs=1e-5)
            assert other[name].grad_norm == pytest.approx(one[name].grad_norm, rel=1e-4)


def test_attention_over_sequences_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's kernel is stood in for by one product a sequence: what is tested is where sequences begin and end."""
    import torch.nn.attention.varlen as varlen

    from ft_ray import segments

    calls: list[int] = []

    def sequences(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, *_: Any, **options: Any) -> Tensor:
        assert options["window_size"] == (-1, 0) and options["enable_gqa"]
        calls.append(len(bounds) - 1)
        cuts = bounds.diff().tolist()
        heads = [[x.transpose(0, 1)[None] for x in one.split(cuts)] for one in (query, key, value)]
        out = [
            functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=options.get("scale"), enable_gqa=True
            )[0].transpose(0, 1)
            for q, k, v in zip(*heads, strict=True)
        ]  # fmt: skip
        return torch.cat(out)

    monkeypatch.setattr(varlen, "varlen_attn", sequences)
    probe = (torch.device("cpu"), torch.float32, 4, 2, 16)
    assert segments.varlen_equals_padded(*probe)
    monkeypatch.setattr(varlen, "varlen_attn", lambda *a, **o: 1.1 * sequences(*a, **o))
    assert not segments.varlen_equals_padded(*probe)
    monkeypatch.setattr(varlen, "varlen_attn", sequences)
    calls.clear()
    expected = train(gpu_like(torch.float32))
    shared = gpu_like(torch.float32)
    shared._base.varlen = True
    found = train(shared)
    assert calls and set(calls) == {9}
    for one, other in zip(expected, found, strict=True):
        for name in CONFIGS:
            assert other[name].loss == pytest.approx(one[name].loss, abs=1e-5)
            assert other[name].grad_norm == pytest.approx(one[name].grad_norm, rel=1e-4)


def test_a_closed_base_has_no_hook_left() -> None:
    model = base(torch.float32)
    shared = SharedBase(model, gradient_checkpointing=True)
    shared.close()
    assert not model.is_gradient_checkpointing
    assert not model.get_input_embeddings()._forward_hooks
