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


@pytest.mark.parametrize("fails_at", range(1, 9))
def test_memory_that_runs_out_in_an_attach_leaves_nothing_behind(
    fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it does: each of the four buffers grows by itself, and the adapter's own values are made after them."""
    shared = SharedBase(base(torch.float32))
    for name in ("t0", "t2"):
        shared.attach(name, CONFIGS[name])
    first = shared.step({name: DATA[name][0] for name in ("t0", "t2")})
    again = SharedBase(base(torch.float32))
    for name in ("t0", "t2"):
        again.attach(name, CONFIGS[name])
    calls = 0
    empty, initialise = Bucket._empty, Bucket.initialise

    def counted(real: Any) -> Any:
        def call(*given: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(*given)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "_empty", counted(empty))
        patched.setattr(Bucket, "initialise", counted(initialise))
        attached = []
        for name in ("x", "y"):  # of a rank that is not there yet, and the second grows what the first brought
            try:
                again.attach(name, CONFIGS["t1"])
                attached.append(name)
            except torch.OutOfMemoryError:
                pass
        assert again.adapters == ("t0", "t2", *attached) and calls >= fails_at and len(attached) == 1
    for name in {"x", "y"} - set(attached):
        again.attach(name, CONFIGS["t1"])
    results = again.step({"t0": DATA["t0"][0], "t2": DATA["t2"][0], "x": DATA["t1"][0], "y": DATA["t1"][0]})
    assert {name: results[name] for name in first} == first
    assert results["x"] == results["y"]
    assert all(len(bucket.ids) <= bucket.weights.shape[0] for bucket in again._buckets.values())


def test_what_a_forward_made_for_its_adapters_is_let_go_when_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = SharedBase(base(torch.bfloat16))
    shared._base.grouped = True
    shared.attach("t1", CONFIGS["t1"])
    losses, failed = shared._base.losses, []

    def once(*given: Any) -> Any:
        answer = losses(*given)
        if not failed:
            failed.append(weakref.ref(shared._base._context.units[0]))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        gc.collect()
        assert failed[0]() is None
        return answer

    monkeypatch.setattr(shared._base, "losses", once)
    assert shared.step({"t1": DATA["t1"][0]})["t1"].stopped is None and failed
