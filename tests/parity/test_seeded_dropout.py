"""Dropout by a kernel that draws its masks where it uses them, run by Triton's interpreter on a CPU.

The interpreter is asked for when Triton is imported, so each test is a process of its own; tests/gpu runs it compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

BASE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from ft_ray import dropout_masks, seeded_dropout, stacked_linear
from ft_ray.segments import MicroBatch
from ft_ray.shared_base import AdapterConfig, SharedBase

CONFIGS = {
    f"t{i}": AdapterConfig(total_steps=8, r=(4, 16)[i], alpha=16, dropout=(0.3, 0.1)[i], lr=1e-2, seed=i)
    for i in range(2)
}
IDS = ([3, 9, 4, 7], [5, 9, 4])  # the interpreter takes 6 ms a row
DATA = {name: MicroBatch.of([(IDS[i], IDS[i])]) for i, name in enumerate(CONFIGS)}

def losses(names, seeded=True, **options):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=64)
    shared = SharedBase(LlamaForCausalLM(config), exact=False, **options)
    shared._base._context.gpu = True
    shared._base._context.seeded = seeded
    for name in names:
        shared.attach(name, CONFIGS[name])
    for bucket in shared._buckets.values():
        bucket.weights.add_(0.01)  # B is zero in an adapter that was never trained
    found = shared.step({name: DATA[name] for name in names})
    return {name: (result.loss, result.grad_norm) for name, result in found.items()}

def close(one, other):
    return all(abs(a - b) < 1e-5 * max(1, abs(a)) for name in other for a, b in zip(one[name], other[name]))
"""


def interpreted(code: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(BASE) + textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_masks_are_drawn_as_asked_for() -> None:
    interpreted("""
        def drawn(seeds, p, layer=0, shape=(3, 30, 1500)):
            thresholds = torch.tensor([round(one * 65536) for one in p], dtype=torch.int32)
            given = seeded_dropout.Seeds(torch.tensor(seeds, dtype=torch.int64), thresholds, layer)
            return seeded_dropout.masked(torch.ones(shape), given), given

        mask, given = drawn([7, 2**62 + 7, 9], [0.0, 0.25, 0.5])
        shares = mask.mean((1, 2))
        assert shares[0] == 1 and abs(shares[1] - 0.75) < 0.01 and abs(shares[2] - 0.5) < 0.01, shares
        for i in (1, 2):  # no row or column is more often dropped than chance has it
            assert (mask[i].mean(0) - shares[i]).abs().max() < 0.4 and (mask[i].mean(1) - shares[i]).abs().max() < 0.08
        assert torch.equal(drawn([7, 2**62 + 7, 9], [0.0, 0.25, 0.5])[0], mask)
        for other in (drawn([7, 2**62 + 8, 9], [0.0, 0.25, 0.5]), drawn([7, 7, 9], [0.0, 0.25, 0.5]),
                      drawn([7, 2**62 + 7, 9], [0.0, 0.25, 0.5], layer=48)):
            agree = (other[0][1] == mask[1]).float().mean()
            assert abs(agree - (0.75**2 + 0.25**2)) < 0.02, agree  # independent
        rows = mask[2]
        assert abs((rows[1:] == rows[:-1]).float().mean() - 0.5) < 0.02  # so are rows
        # Whoever else is in the forward, and however long the longest of them is.
        alone = drawn([2**62 + 7], [0.25], shape=(1, 20, 1500))[0]
        assert torch.equal(alone[0], mask[1, :20])
        x = torch.full((3, 30, 1500), float("nan"))
        out = seeded_dropout.masked(x, given, x)
        assert out is x and torch.equal(x.isnan(), mask.bool()) and (x[~mask.bool()] == 0).all()
        assert seeded_dropout.works(torch.device("cpu"), torch.float32)
    """)


def test_a_step_is_that_of_the_same_masks_as_tensors_packed_or_alone_kept_or_computed_again() -> None:
    interpreted("""
        packed = losses(list(CONFIGS))
        assert close(packed, losses(["t0"]))
        assert close(packed, losses(list(CONFIGS), gradient_checkpointing=True))

        seeds, drawn = dropout_masks.mask_of, []
        def as_tensor(step, layer, x):
            drawn.append(layer.name)
            return seeded_dropout.masked(torch.ones_like(x), seeds(step, layer, x)).bool()
        stacked_linear.mask_of = as_tensor
        assert close(packed, losses(list(CONFIGS)))
        assert len(set(drawn)) == 14
        stacked_linear.mask_of = seeds
        assert not close(packed, losses(list(CONFIGS), seeded=False))  # torch's generators draw others
    """)
