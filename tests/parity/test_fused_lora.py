"""LoRA's update in one product: what PEFT's own forward gives, in numbers, gradients and everything it can be asked."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ft_ray import fused_lora


def adapted(folder: Path, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A base with a LoRA adapter in fp32 whose B is not 0."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False, **settings)
    model = get_peft_model(base, config)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    return model


def step(model: Any, *, narrow: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of one batch and the gradients of all adapters; the same random numbers each time."""
    ids = torch.arange(3, 67).view(2, 32)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", [{"lora_alpha": 8}, {"lora_dropout": 0.3}, {"use_rslora": True, "lora_alpha": 3}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_peft_s(tiny_model: Path, settings: dict[str, Any], checkpointing: bool) -> None:
    found = []
    for fused in (False, True):
        model = adapted(tiny_model, **settings).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        layers = len(model.get_base_model().model.layers)
        assert not fused or fused_lora.use(model) == fused_lora.count(model) == 7 * layers
        found.append(step(model))
    (loss, gradients), (ours, our_gradients) = found
    assert ours == pytest.approx(loss, abs=1e-6)
    assert gradients and all(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (our_gradients[name] - gradient).norm() < 1e-4 * gradient.norm(), name


def test_in_16_bits_it_is_no_further_from_fp32_than_peft_is(tiny_model: Path) -> None:
    """A 16-bit base under autocast, as a run has it: gradients against those of the same weights in fp32."""
    rounded = adapted(tiny_model, dtype=torch.bfloat16, lora_alpha=8)
    exact = adapted(tiny_model, lora_alpha=8)
    exact.load_state_dict({name: value.float() for name, value in rounded.state_dict().items()})
    _, truth = step(exact)
    off = []
    for fused in (False, True):
        model = adapted(tiny_model, dtype=torch.bfloat16, lora_alpha=8)
        model.load_state_dict(rounded.state_dict())
        if fused:
            fused_lora.use(model)
        _, gradients = step(model, narrow=True)
        off.append(statistics.fmean(float((gradients[n] - g).norm() / g.norm()) for n, g in truth.items()))
    assert 0 < off[1] < 1.2 * off[0] < 0.1


def test_outside_autocast_a_16_bit_base_takes_an_fp32_adapter(tiny_model: Path) -> None:
    """Answers between steps are generated without autocast; the adapter's part is computed in the base's precision."""
    model = adapted(tiny_model, dtype=torch.bfloat16).eval()
    ids = torch.arange(3, 19)[None]
    with torch.inference_mode():
        theirs = model(ids).logits
        fused_lora.use(model)
        ours = model(ids).logits
        generated = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert ours.dtype == theirs.dtype and generated.shape[1] > ids.shape[1]
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


def test_what_peft_can_be_asked_is_left_to_it(tiny_model: Path) -> None:
    model = adapted(tiny_model).eval()
    ids = torch.arange(3, 19)[None]
    with torch.inference_mode():
        tuned = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
        fused_lora.use(model)
        assert torch.allclose(model(ids).logits, tuned, atol=1e-5)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, base)
        assert not torch.allclose(base, tuned, atol=1e-3)
        mixed = model(ids.expand(2, -1), adapter_names=["__base__", "default"]).logits
        assert torch.allclose(mixed, torch.cat([base, tuned]), atol=1e-5)
        model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
        both = model(ids).logits
        assert not torch.allclose(both, tuned, atol=1e-3)
        model.set_adapter("default")
        model.merge_adapter()
        assert torch.allclose(model(ids).logits, tuned, atol=1e-4)
        model.unmerge_adapter()
        plain = adapted(tiny_model)
        plain.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        plain.load_state_dict(model.state_dict())
        plain.base_model.set_adapter(["default", "second"])
        assert torch.allclose(plain.eval()(ids).logits, both, atol=1e-4)


def test_dora_and_whole_models_are_left_alone(tiny_model: Path) -> None:
    assert fused_lora.use(adapted(tiny_model, use_dora=True)) == 0
    whole = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert fused_lora.use(whole) == fused_lora.count(whole) == 0
