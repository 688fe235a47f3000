"""A merged model as one GGUF file, for llama.cpp, Ollama and what is built on them.

Llama-shaped models with byte-level BPE: Llama, Mistral, SmolLM2 (architecture `llama`) and Qwen2 (`qwen2`). Queries and
keys of `llama` are permuted from halves to pairs, the order in which llama.cpp turns them (Hugging Face's conversion
of the original weights did the opposite). The tokenizer, its pre-tokenizer by name, the chat template and the end
tokens are those trained with; no BOS is added on its own, because the trained template renders it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ft_ray.chat import Chat
from ft_ray.errors import MissingPackageError, ModelError
from ft_ray.model_folder import read_json

__all__ = ["write"]

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
_TYPES = {"f32": (torch.float32, 0), "f16": (torch.float16, 1), "bf16": (torch.bfloat16, 32)}
# How llama.cpp calls a pre-tokenizer, by what tokenizer.json says of it. The pattern decides, not the model's name.
_WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_PRE = {f"{_WORDS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe", f"{_WORDS}\\p{{N}}{_REST}": "qwen2"}


def write(folder: Path, out: Path, chat: Chat, *, name: str, dtype: str = "f16") -> dict[str, Any]:
    """Writes the model in `folder` to `out`; returns {tensors, bytes, architecture, pre_tokenizer}.

    `dtype` is f32, f16 or bf16, of matrices; norms stay f32. Raises ModelError for a model this cannot write.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingPackageError("gguf", "export to GGUF", "demo") from error
    config = read_json(folder / "config.json")
    kind = str(config.get("model_type"))
    if kind not in _ARCHITECTURES:
        raise ModelError(
            f"{folder} is a {kind} model, and GGUF is written for {', '.join(_ARCHITECTURES)} only: "
            "use llama.cpp's own convert_hf_to_gguf.py on the merged folder."
        )
    if dtype not in _TYPES:
        raise ModelError(f"GGUF type {dtype!r} is not one of {', '.join(_TYPES)}.")
    writer = gguf.GGUFWriter(str(out), _ARCHITECTURES[kind])
    writer.add_name(name)
    factors = _hyperparameters(writer, config, _TYPES[dtype][1])
    pre = _vocabulary(writer, folder, chat, int(config["vocab_size"]))
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.LLAMA if _ARCHITECTURES[kind] == "llama" else gguf.MODEL_ARCH.QWEN2,
        int(config["num_hidden_layers"]),
    )
    # Sizes first, then one tensor at a time: a model need not fit in memory.
    count = 0
    for source, shape in _shapes(folder, config):
        target = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ModelError(f"{folder} holds the tensor {source}, which GGUF's {kind} does not have.")
        wanted = _TYPES[dtype][0] if len(shape) > 1 else torch.float32
        sized = _array(torch.empty(0, dtype=wanted))
        bytes_ = [*shape[:-1], shape[-1] * wanted.itemsize] if sized.dtype.name == "uint8" else list(shape)
        raw = gguf.GGMLQuantizationType.BF16 if wanted == torch.bfloat16 else None
        size = math.prod(shape) * wanted.itemsize
        writer.add_tensor_info(target, bytes_, sized.dtype, size, raw_dtype=raw)
        count += 1
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", list(factors.shape), factors.numpy().dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in _tensors(folder, config):
        writer.write_tensor_data(_array(tensor.to(_TYPES[dtype][0] if tensor.ndim > 1 else torch.float32)))
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    writer.close()
    return {"tensors": count, "bytes": out.stat().st_size, "architecture": _ARCHITECTURES[kind], "pre_tokenizer": pre}


def _hyperparameters(writer: Any, config: Mapping[str, Any], file_type: int) -> torch.Tensor | None:
    """Writes them; returns the factors of the rotary frequencies where the model has such."""
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_file_type(file_type)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    if scaling == "linear":
        writer.add_rope_scaling_type(_scaling("LINEAR"))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif scaling == "llama3":
        return _llama3_factors(rope, config, head_dim)
    elif scaling != "default":
        raise ModelError(f"rope scaling {scaling} is not written to GGUF here: use llama.cpp's convert_hf_to_gguf.py.")
    return None


def _scaling(name: str) -> Any:
    import gguf

    return gguf.RopeScalingType[name]


def _llama3_factors(rope: Mapping[str, Any], config: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """Llama 3.1's factor of each frequency (transformers' `_compute_llama3_parameters`), as llama.cpp divides by it."""
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    waves = 2 * torch.pi * base ** (torch.arange(0, head_dim, 2).float() / head_dim)
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(rope["original_max_position_embeddings"])
    smooth = (context / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    out = torch.where(waves < context / high, torch.ones_like(waves), between)
    return torch.where(waves > context / low, torch.full_like(waves, factor), out)


def _vocabulary(writer: Any, folder: Path, chat: Chat, size: int) -> str:
    import gguf

    tokenizer = chat.tokenizer
    spec = read_json(folder / "tokenizer.json")
    model = spec.get("model", {})
    if model.get("type") != "BPE" or not _byte_level(spec):
        raise ModelError(
            f"the tokenizer in {folder} is no byte-level BPE, and only that is written to GGUF here: "
            "use llama.cpp's own convert_hf_to_gguf.py on the merged folder."
        )
    pre = _pre_tokenizer(spec, folder)
    added = {int(t["id"]): t for t in spec.get("added_tokens", [])}
    by_id = {int(i): text for text, i in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    tokens, types = [], []
    for i in range(size):
        known = by_id.get(i)
        tokens.append(known if known is not None else f"[PAD{i}]")
        if known is None:
            types.append(gguf.TokenType.UNUSED)
        elif i in added:
            types.append(gguf.TokenType.CONTROL if added[i].get("special") else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    # llama.cpp refuses an empty list. Two end tokens never meet as symbols: control tokens are cut out before merging.
    writer.add_token_merges(merges or [" ".join([by_id[min(chat.eos_ids)]] * 2)])
    ends = sorted(chat.eos_ids)
    writer.add_eos_token_id(int(tokenizer.eos_token_id) if tokenizer.eos_token_id in chat.eos_ids else ends[0])
    # llama.cpp ends an answer at EOS and at the end-of-turn token; the one that closes the template is the latter.
    closing = chat._closing_token()
    if closing is not None:
        writer.add_eot_token_id(closing)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(int(tokenizer.bos_token_id))
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(int(tokenizer.pad_token_id))
    writer.add_add_bos_token(False)
    writer.add_chat_template(chat.template)
    return pre


def _parts(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    pre = spec.get("pre_tokenizer") or {}
    return list(pre.get("pretokenizers", [])) if pre.get("type") == "Sequence" else [pre]


def _byte_level(spec: Mapping[str, Any]) -> bool:
    return any(p.get("type") == "ByteLevel" for p in _parts(spec))


def _pre_tokenizer(spec: Mapping[str, Any], folder: Path) -> str:
    """llama.cpp's name of the pre-tokenizer. Raises ModelError where it has none that is known to be the same."""
    parts = _parts(spec)
    kinds = [p.get("type") for p in parts]
    if kinds == ["ByteLevel"]:
        if parts[0].get("add_prefix_space"):
            raise ModelError(f"the tokenizer in {folder} puts a space before the text, which GGUF cannot say here.")
        if parts[0].get("use_regex", True):
            return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return "smollm"
    for part in parts:
        pattern = (part.get("pattern") or {}).get("Regex") if part.get("type") == "Split" else None
        if pattern in _PRE:
            return _PRE[pattern]
    raise ModelError(
        f"the pre-tokenizer in {folder} ({json.dumps(spec.get('pre_tokenizer'))[:120]}) has no name that llama.cpp "
        "is known to treat the same: use its own convert_hf_to_gguf.py."
    )


def _names(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """(open file, tensor name) of every tensor that is written, in one order."""
    from safetensors import safe_open

    for shard in sorted(folder.glob("model*.safetensors")):
        with safe_open(str(shard), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                # llama.cpp takes the embedding where there is no output.
                if not (name == "lm_head.weight" and config.get("tie_word_embeddings")):
                    yield file, name


def _shapes(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, list[int]]]:
    for file, name in _names(folder, config):
        yield name, list(file.get_slice(name).get_shape())


def _tensors(folder: Path, config: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    pairs = _ARCHITECTURES[str(config["model_type"])] == "llama"
    for file, name in _names(folder, config):
        tensor: torch.Tensor = file.get_tensor(name)
        if pairs and ".q_proj." in name:
            tensor = _paired(tensor, heads)
        elif pairs and ".k_proj." in name:
            tensor = _paired(tensor, groups)
        yield tensor


def _paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from [first halves, second halves] to pairs: (x0, x_d/2, x1, …)."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _array(tensor: torch.Tensor) -> Any:
    """As numpy; bf16, which numpy lacks, as its bytes."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
