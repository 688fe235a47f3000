"""A Llama of any shape with random weights, made where it is to lie: nothing is fetched.

python benchmarks/random_base.py 8B /tmp/8b --device cuda    # as a model folder, bf16
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["SHAPES", "random_base", "random_folder"]

_LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "20M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 49152, "tie_word_embeddings": True},
    "60M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 49152, "tie_word_embeddings": True},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},  # SmolLM2
    "1B": {**_LLAMA3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "tie_word_embeddings": True},  # Llama-3.2
    "3B": {**_LLAMA3, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
           "num_attention_heads": 24, "tie_word_embeddings": True},  # Llama-3.2
    "7B": {**_LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 28,
           "num_attention_heads": 32, "tie_word_embeddings": False},  # the next one with four layers less
    "8B": {**_LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "tie_word_embeddings": False},  # Llama-3.1
}  # fmt: skip


def random_base(config: dict[str, Any], device: str, *, nf4: bool = False, trained: bool = False) -> Any:
    """`config` holds LlamaConfig's keys. bf16 and frozen; with `nf4` its layers are quantized matrix by matrix.

    `trained` is for full fine-tuning: fp32 weights that take gradients, as `ft_ray.model_loading` gives them.
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


def random_folder(shape: str, folder: Path, device: str) -> Path:
    """A model folder of `shape` in bf16; one that is there already is kept.

    The tests' tokenizer with a word for every other number of the vocabulary: without text, what a server has decoded
    of an answer is decoded again at each token, and longer each time.
    """
    from transformers import GenerationConfig

    from tests.tiny import build

    done = folder / ".whole"
    if done.exists():
        return folder
    build(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    size = SHAPES[shape]["vocab_size"]
    written = json.loads((folder / "tokenizer.json").read_text())
    words = itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=4)  # 456,976
    vocabulary = written["model"]["vocab"]
    vocabulary |= {f"Ġ{''.join(next(words))}": number for number in range(len(vocabulary), size)}
    (folder / "tokenizer.json").write_text(json.dumps(written))
    model = random_base({**SHAPES[shape], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, device)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder, max_shard_size="2GB")
    done.touch()
    return folder


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    print(random_folder(given.shape, given.folder, given.device))
