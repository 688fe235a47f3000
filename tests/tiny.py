"""A tiny Llama and its tokenizer, built offline in a second: what parity tests train, merge and compare."""

from __future__ import annotations

import json
from pathlib import Path

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build(
    folder: Path, *, seed: int = 0, dtype: str = "float32", tied: bool = False, layers: int = 2, hidden: int = 64,
    heads: int = 4, attention_dropout: float = 0.0,
) -> Path:  # fmt: skip
    """Writes config, safetensors, byte-level tokenizer, ChatML template and generation config to `folder`.

    Hidden 64, 4 heads unless given, 2 key-value heads, intermediate 128, vocabulary of 256 bytes and 3 special tokens.
    vLLM's attention on a CPU needs heads of 32, so `hidden` 128.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=specials,
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)

    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        attention_dropout=attention_dropout,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


def rows(path: Path, count: int = 40, *, seed: int = 0) -> Path:
    """Writes `count` prompt/completion rows with distinct prompts as JSONL."""
    import random

    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            digits = [rng.randrange(10) for _ in range(3)]
            row = {"prompt": f"{i} add {' '.join(map(str, digits))}", "completion": str(sum(digits))}
            file.write(json.dumps(row) + "\n")
    return path
