"""A Llama of any shape with random weights, made where it is to lie: nothing is fetched."""

from __future__ import annotations

from typing import Any

__all__ = ["random_base"]


def random_base(config: dict[str, Any], device: str, *, nf4: bool = False, trained: bool = False) -> Any:
    """`config` holds LlamaConfig's keys. bf16 and frozen; with `nf4` its layers are quantized matrix by matrix.

    `trained` is for full fine-tuning: fp32 weights that take gradients, as `ft_ray.base_model.load_model` gives them.
    """
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    made = LlamaConfig(**{"max_position_embeddings": 16384, **config}, attn_implementation="sdpa")
    dtype = torch.float32 if trained else torch.bfloat16
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(made)
    torch.set_default_dtype(torch.float32)
    if nf4:
        from transformers.integrations import replace_with_bnb_linear

        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        model = replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quantization)
        model.is_loaded_in_4bit = True
    generator = torch.Generator(device=device).manual_seed(0)
    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 1:
                value = torch.ones(parameter.shape, dtype=dtype, device=device)
            else:
                size = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else parameter.shape
                value = torch.empty(size, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
            if nf4 and isinstance(module, nn.Linear) and name != "lm_head":
                from bitsandbytes.nn import Params4bit

                fresh: Any = Params4bit(value, requires_grad=False, quant_type="nf4", compress_statistics=True)
                module.weight = fresh.to(device)
            else:
                setattr(module, key, nn.Parameter(value, requires_grad=trained))
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(made).to(device)
    return model
