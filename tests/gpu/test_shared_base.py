"""The shared base on a real GPU: fused kernels, packed against alone in bf16 and NF4, memory that really runs out."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from ft_ray import kernels, pinned
from ft_ray.adapter_config import AdapterConfig
from ft_ray.segments import MicroBatch
from ft_ray.shared_base import SharedBase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

WIDE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 2048,
}  # fmt: skip


def model(nf4: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    built: Any = LlamaForCausalLM(LlamaConfig(**WIDE)).to(torch.bfloat16)
    if nf4:
        from bitsandbytes.nn import Linear4bit

        for name, module in list(built.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                four = Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                four.load_state_dict(module.state_dict())
                parent, _, leaf = name.rpartition(".")
                setattr(built.get_submodule(parent), leaf, four)
    return built.to("cuda")


def batch(seed: int, rows: int = 4, length: int = 64) -> MicroBatch:
    found = torch.randint(3, 2000, (rows, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return MicroBatch.of((row, row) for row in found)


CONFIGS = {
    f"t{i}": AdapterConfig(
        total_steps=20, r=(8, 16, 64)[i % 3], alpha=32, dropout=(0.0, 0.1)[i % 2], lr=(2e-3, 1e-3)[i % 2], seed=i
    )
    for i in range(8)
}


def losses(shared: SharedBase, names: list[str], steps: int = 10) -> dict[str, list[float]]:
    for name in names:
        shared.attach(name, CONFIGS[name])
    found: dict[str, list[float]] = {name: [] for name in names}
    for step in range(steps):
        for name, result in shared.step({name: batch(100 * int(name[1:]) + step) for name in names}).items():
            assert result.stopped is None
            found[name].append(result.loss)
    return found


def test_fused_kernels_compute_the_same() -> None:
    pytest.importorskip("liger_kernel", reason="Liger is not installed")
    plain, fused = model(), model()
    assert kernels.fuse(fused) == 4 * 3 + 1
    ids = torch.randint(3, 2000, (4, 64), device="cuda")
    grads = []
    for one in (plain, fused):
        embedded = one.get_input_embeddings()(ids).detach().requires_grad_()
        out = one(inputs_embeds=embedded).logits.float()
        out.logsumexp(-1).sum().backward()
        grads.append((out.detach(), embedded.grad.float()))
    for one, other in zip(*grads, strict=True):
        assert (one - other).norm() / one.norm() < 0.02


@pytest.mark.parametrize("nf4", [False, True])
def test_packed_equals_alone_within_bf16(nf4: bool) -> None:
    packed = losses(SharedBase(model(nf4)), list(CONFIGS))
    for name in ("t1", "t5"):
        alone = losses(SharedBase(model(nf4)), [name])[name]
        assert packed[name] == pytest.approx(alone, abs=0.02)
        assert packed[name] != [packed[name][0]] * len(packed[name])


def test_a_snapshot_is_of_its_moment_in_pinned_memory_that_is_used_again() -> None:
    shared = SharedBase(model())
    names = ["t0", "t3"]  # of one rank, in one bucket
    losses(shared, names, steps=2)
    before = {name: shared.state_dict(name)["tensors"] for name in names}
    taken = {name: shared.snapshot(name) for name in names}
    shared.step({name: batch(9) for name in taken})
    for name, laid_out in taken.items():
        found = laid_out()["tensors"]
        assert found.keys() == before[name].keys()
        assert all(torch.equal(found[key], before[name][key]) for key in found)
    taken.clear()
    del laid_out
    after = shared.state_dict("t0")["tensors"]
    assert any(not torch.equal(after[key], before["t0"][key]) for key in after)
    (bucket,) = shared._buckets.values()
    assert all(block.is_pinned() for block in bucket._copies._blocks)
    assert len(bucket._copies._blocks) == 6, "weights and two moments of the two that were held at once, and no more"


def test_memory_that_cannot_be_pinned_harms_no_later_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA would report the failure at the next launch of the thread that met it."""
    shared = SharedBase(model())
    losses(shared, ["t0"], steps=1)
    pool = ThreadPoolExecutor(pinned.THREADS)
    held = pinned.block(1 << 20, pool, torch.device("cuda"))
    expected = shared.state_dict("t0")["tensors"]
    for bucket in shared._buckets.values():
        bucket._copies = pinned.Pool(bucket.size, bucket.device)
    monkeypatch.setattr(pinned, "mapped", lambda values: held)  # which is pinned already
    with pytest.raises(RuntimeError):
        pinned.block(1 << 20, pool, torch.device("cuda"))
    found = shared.state_dict("t0")["tensors"]
    assert all(torch.equal(found[key], expected[key]) for key in found)
    results = shared.step({"t0": batch(9)})
    torch.cuda.synchronize()
    assert results["t0"].stopped is None
    pinned.free([held])


def test_out_of_memory_lowers_k_and_the_losses_go_on() -> None:
    shared = SharedBase(model())
    names = list(CONFIGS)
    for name in names:
        shared.attach(name, CONFIGS[name])
    shared.step({name: batch(7, rows=2) for name in names})
    total = torch.cuda.get_device_properties(0).total_memory
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + 600 * 2**20) / total)
    try:
        large = {name: batch(8, rows=64, length=128) for name in names}
        results = shared.step(large)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert shared.stats.out_of_memory >= 1
    assert all(result.stopped is None and result.loss < 9 for result in results.values())


def test_checkpointed_layers_give_the_same_loss() -> None:
    runs = [losses(SharedBase(model(), gradient_checkpointing=on), ["t1", "t2"], 4) for on in (False, True)]
    for name in ("t1", "t2"):
        assert runs[0][name] == pytest.approx(runs[1][name], abs=1e-3)


def test_sequences_attended_where_they_lie_give_the_losses_of_groups() -> None:
    """Flash attention over sequences of unlike lengths against one padded call for each length."""
    found = []
    for varlen in (True, False):
        shared = SharedBase(model())
        assert shared._base.varlen
        shared._base.varlen = varlen
        shared.attach("t1", CONFIGS["t1"])
        steps = []
        for step in range(4):
            rows = [batch(10 * step + n, rows=1, length=n).sequences[0] for n in (5, 33, 64, 100)]
            steps.append(shared.step({"t1": MicroBatch(tuple(rows))})["t1"])
        found.append(steps)
    for one, other in zip(*found, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=0.01)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=0.05)


def test_checkpointed_layers_hold_no_rounded_adapters() -> None:
    """What is there when the backward begins, beside the adapters themselves: not 2 bytes a parameter more."""
    shared = SharedBase(model(), gradient_checkpointing=True)
    config = AdapterConfig(total_steps=20, r=256, alpha=32, lr=1e-3)
    for name in ("a", "b", "c", "d"):
        shared.attach(name, config)
    batches = {name: batch(1, rows=1, length=16) for name in shared.adapters}
    shared.step(batches)
    copies = sum(bucket.weights.numel() for bucket in shared._buckets.values()) * 2
    before, peaks = torch.cuda.memory_allocated(), []
    losses = shared._base.losses

    def measured(*args: Any) -> Any:
        answer = losses(*args)
        peaks.append(torch.cuda.memory_allocated() - before)
        return answer

    shared._base.losses = measured  # type: ignore[method-assign]
    shared.step(batches)
    assert peaks[0] < 0.6 * copies  # one layer of four, and the activations of 64 tokens


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] not in (9, 10),
    reason="torch has the grouped product for Hopper and Blackwell",
)
def test_adapters_of_all_ranks_by_one_product_give_the_gradients_of_a_product_each() -> None:
    found: list[dict[str, torch.Tensor]] = []
    for grouped in (True, False):
        shared = SharedBase(model(), gradient_checkpointing=True)
        assert shared._base.grouped
        shared._base.grouped = grouped
        losses(shared, list(CONFIGS), 4)  # the first step of a warm-up leaves B at 0, and A without a gradient
        found.append({f"{name} {n}": g for name in CONFIGS for n, g in shared.gradients(name).items()})
    off = [float((found[1][name] - g).norm() / found[1][name].norm()) for name, g in found[0].items()]
    assert max(off) < 0.2 and sum(off) / len(off) < 0.05, (max(off), sum(off) / len(off))


def test_dropout_drawn_where_it_is_used_drops_what_it_should() -> None:
    from ft_ray.seeded_dropout import Seeds, masked

    assert SharedBase(model())._base._context.seeded
    given = Seeds(
        torch.tensor([5, 6, 7], dtype=torch.int64, device="cuda"),
        torch.tensor([0, 6554, 32768], dtype=torch.int32, device="cuda"), 512,
    )  # fmt: skip
    mask = masked(torch.ones((3, 200, 14336), dtype=torch.bfloat16, device="cuda"), given).float()
    assert (mask[0] == 1).all()
    assert mask[1].mean().item() == pytest.approx(0.9, abs=0.001)
    assert mask[2].mean().item() == pytest.approx(0.5, abs=0.001)
    half = mask[2]
    for one, other in ((half[1:], half[:-1]), (half[:, 1:], half[:, :-1]), (half[:, 512:], half[:, :-512])):
        agreeing = one == other
        assert agreeing.float().mean().item() == pytest.approx(0.5, abs=0.002)


def test_queries_and_keys_rotated_by_one_kernel_give_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = losses(SharedBase(model()), ["t1", "t2"], 4)
    built = model()
    assert kernels.fuse_rotary(built) == 4
    assert model().model.layers[0].self_attn.forward.__func__ is not built.model.layers[0].self_attn.forward.__func__
    monkeypatch.setattr(kernels, "fuse_rotary", lambda model: 0)
    plain = losses(SharedBase(model()), ["t1", "t2"], 4)
    for name in ("t1", "t2"):
        assert fused[name] == pytest.approx(plain[name], abs=0.01)


def test_no_product_goes_through_python() -> None:
    """torch 2.13 routes `bmm` on CUDA through a function in Python, thousands of times a step."""
    shared = SharedBase(model())
    for name, config in CONFIGS.items():
        shared.attach(name, config)
    routed: list[str] = []

    def watch(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and "torch/_native" in frame.f_code.co_filename:
            routed.append(frame.f_code.co_name)

    with torch.autograd.set_multithreading_enabled(False):  # a backward in a thread of its own is not seen
        sys.setprofile(watch)
        try:
            shared.step({name: batch(i) for i, name in enumerate(CONFIGS)})
        finally:
            sys.setprofile(None)
    assert not routed
