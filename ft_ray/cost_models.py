"""What the sections of docs/cost.md share: the shapes of models, names of methods, rows of a Markdown table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["GIB", "METHODS", "MODELS", "OTHERS", "header", "row"]

GIB = 2**30
METHODS = {"qlora": "QLoRA", "lora": "LoRA", "full": "Full"}

_LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "1B": {**_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "tie_word_embeddings": True},
    "8B": {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "tie_word_embeddings": False},
    "70B": {**_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "tie_word_embeddings": False},
}  # fmt: skip

_SMALL: dict[str, Any] = {**_LLAMA, "vocab_size": 49152, "tie_word_embeddings": True}
OTHERS: dict[str, dict[str, Any]] = {
    "20M": {**_SMALL, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 4},
    "60M": {**_SMALL, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12,
            "num_attention_heads": 8, "num_key_value_heads": 4},
    "135M": {**_SMALL, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3},
    "3B": {**_LLAMA, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
           "num_attention_heads": 24, "tie_word_embeddings": True},
}  # fmt: skip


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def header(*names: str) -> Iterator[str]:
    yield row(*names)
    yield row(*["---"] * len(names))
