"""An exported GGUF in llama.cpp itself: the same tokens in, the same greedy answers out."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ft_ray import reporting
from ft_ray.chat import Chat, load_tokenizer
from tests.run_folders import run_folder

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(
        importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp's binding xllamacpp is not installed"
    ),
]

QUESTIONS = ("order J5224 cost 1234.50, isn't it?  Two  spaces", "word of a", "7")


def test_llama_cpp_answers_like_the_model(tiny_model: Path, tmp_path: Path) -> None:
    recipe, store = run_folder(tmp_path, tiny_model)
    path = tmp_path / "m.gguf"
    reporting.export(recipe.run_path, "gguf", out=str(path), dtype="f32")
    chat = Chat(load_tokenizer(tiny_model))
    model = AutoModelForCausalLM.from_pretrained(store.local("merged"), dtype=torch.float32)

    binding: Any = importlib.import_module("xllamacpp")
    settings = binding.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(path), 512, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = binding.Server(settings)
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        ids: Any = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        prompt = ids["input_ids"]
        said = server.handle_chat_completions({"messages": messages, "temperature": 0, "max_tokens": 12})
        said = json.loads(said) if isinstance(said, str) else said
        assert said["usage"]["prompt_tokens"] == prompt.shape[1], "template and tokenizer travel in the file"
        out = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
        expected = chat.tokenizer.decode(out, skip_special_tokens=True)
        answer = said["choices"][0]["message"]["content"]
        # Random weights write broken UTF-8, which the two show differently; letters are compared.
        assert _letters(answer) == _letters(expected) != ""


def _letters(text: str) -> str:
    return "".join(c for c in text if c.isascii() and c.isprintable() and not c.isspace())
