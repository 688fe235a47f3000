"""config.json -> shapes and exact parameter counts, without weights, torch or transformers.

Every decoder here is a list of matrices (what LoRA adapts and NF4 quantizes), plus embeddings, norms and, in
mixtures, expert tensors. The names are those of the modules in transformers, so `lora.targets` means the same
here as in PEFT. Counts are checked in the tests against models built on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ft_ray import strict_yaml
from ft_ray.errors import ModelError
from ft_ray.recipe import Adapter

__all__ = ["FUSED", "Matrix", "ModelShape", "adapted", "lora_parameters", "read"]

# Families (model_type) for whose norms and gated MLPs `kernels` has fused forwards, and `row_attention` an attention.
FUSED = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


@dataclass(frozen=True)
class Matrix:
    """`copies` modules of the same shape: `name` is the path inside a decoder layer.

    `linear` is false for tensors that are no module of their own (experts, routers in transformers 5):
    bitsandbytes passes those by, so they stay in the compute dtype. `rank` is what PEFT 0.21 multiplies r with
    there: 2 for a fused gate and up projection of experts, 0 where 'all-linear' does not reach. `aliases` are
    the unfused names that PEFT takes for such a tensor. `active` is the share of the copies that one token goes
    through (experts: top-k / number).
    """

    name: str
    d_in: int
    d_out: int
    copies: int
    bias: bool = False
    linear: bool = True
    active: float = 1.0
    rank: int = 1
    aliases: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        return self.d_in * self.d_out * self.copies

    @property
    def parameters(self) -> int:
        return self.weights + (self.d_out * self.copies if self.bias else 0)


@dataclass(frozen=True)
class ModelShape:
    """A decoder's shape. `intermediate` is the width of the MLP that one token goes through, experts added up."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int | None
    tied: bool
    gated: bool
    tanh_gelu: bool
    matrices: tuple[Matrix, ...]
    embedding_parameters: int
    norm_parameters: int
    norm_biases: int
    window: int | None
    windowed_layers: int
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """All parameters; a tied output projection counts once."""
        head = 0 if self.tied else self.vocab * self.hidden
        return sum(m.parameters for m in self.matrices) + self.embedding_parameters + head + self.norm_parameters

    @property
    def linear_weights(self) -> int:
        """Weights in linear modules of the decoder layers: what NF4 quantizes."""
        return sum(m.weights for m in self.matrices if m.linear)

    @property
    def multiplied_weights(self) -> float:
        """Weights that one token is multiplied with, the output projection too: N of 2ND (arXiv:2001.08361)."""
        return sum(m.weights * m.active for m in self.matrices) + self.vocab * self.hidden

    @property
    def norms_per_layer(self) -> int:
        """Norms over the whole hidden state in each layer: 2, or 4 around both branches (Gemma 2 and 3)."""
        return max(1, (self.norm_parameters - self.norm_biases - self.hidden) // (self.hidden * self.layers))

    @property
    def largest_matrix(self) -> int:
        """Weights of the largest single linear module: what NF4 unpacks at a time."""
        return max((m.d_in * m.d_out for m in self.matrices if m.linear), default=0)

    def kv_bytes(self, tokens: int, element: int = 2) -> int:
        """Key-value cache of one request of `tokens` tokens, bytes; sliding-window layers stop at the window."""
        row = 2 * self.kv_heads * self.head_dim * element
        held = min(tokens, self.window) if self.window else tokens
        return row * ((self.layers - self.windowed_layers) * tokens + self.windowed_layers * held)


class _Config:
    """config.json with errors that name the key."""

    def __init__(self, values: Mapping[str, Any], model_type: str) -> None:
        self.values, self.model_type = values, model_type

    def whole(self, *keys: str, default: int | None = None) -> int:
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ModelError(f"config.json: {key!r} is {value!r}, not a whole number from 1: repair the file.")
            return value
        if default is None:
            raise ModelError(
                f"config.json of a {self.model_type!r} model has no {keys[0]!r}: "
                "give the complete config.json that lies beside the weights."
            )
        return default

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        return default if value is None else bool(value)


_TIED = {"gemma", "gemma2", "gemma3_text", "gpt2"}
_DENSE = {
    "llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2",
}  # fmt: skip
_MIXTURES = {"mixtral", "qwen2_moe", "qwen3_moe"}
# google/gemma-3's own config.json leaves out what equals the class defaults of transformers.
_GEMMA3 = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}


def read(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a parsed config.json describes. Raises ModelError naming the key that is missing."""
    if not isinstance(config.get("model_type"), str):
        raise ModelError("config.json has no 'model_type': give the complete config.json that lies beside the weights.")
    model_type = str(config["model_type"])
    notes: list[str] = []
    if isinstance(config.get("text_config"), Mapping):
        tied = config.get("tie_word_embeddings")
        config = {**({} if tied is None else {"tie_word_embeddings": tied}), **config["text_config"]}
        model_type = str(config.get("model_type") or f"{model_type}_text")
        notes.append("the text model alone is counted, without the vision tower")
    if model_type == "gemma3_text":
        config = {**_GEMMA3, **config}
    if model_type == "gpt2":
        return _gpt2(_Config(config, model_type))
    if model_type not in _DENSE | _MIXTURES:
        notes.append(f"unknown model_type {model_type!r}: counted as a Llama, so figures may be off")
    return _llama_like(_Config(config, model_type), notes)


def _gpt2(config: _Config) -> ModelShape:
    hidden, layers = config.whole("n_embd", "hidden_size"), config.whole("n_layer", "num_hidden_layers")
    heads, positions = config.whole("n_head"), config.whole("n_positions")
    inner, vocab = config.whole("n_inner", default=4 * hidden), config.whole("vocab_size")
    shapes = [
        ("attn.c_attn", hidden, 3 * hidden), ("attn.c_proj", hidden, hidden),
        ("mlp.c_fc", hidden, inner), ("mlp.c_proj", inner, hidden),
    ]  # fmt: skip
    norms = (2 * layers + 1) * hidden
    return ModelShape(
        model_type="gpt2", layers=layers, hidden=hidden, intermediate=inner, heads=heads, kv_heads=heads,
        head_dim=hidden // heads, vocab=vocab, max_positions=positions, tied=config.flag("tie_word_embeddings", True),
        gated=False, tanh_gelu=config.values.get("activation_function", "gelu_new") == "gelu_new",
        matrices=tuple(Matrix(name, i, o, layers, bias=True) for name, i, o in shapes),
        embedding_parameters=(vocab + positions) * hidden, norm_parameters=2 * norms, norm_biases=norms,
        window=None, windowed_layers=0,
    )  # fmt: skip


def _llama_like(config: _Config, notes: list[str]) -> ModelShape:
    kind = config.model_type
    hidden, layers = config.whole("hidden_size"), config.whole("num_hidden_layers")
    heads = config.whole("num_attention_heads")
    kv = config.whole("num_key_value_heads", default=heads)
    if config.values.get("head_dim") is None and hidden % heads:
        raise ModelError(f"config.json: 'hidden_size' {hidden} does not divide among {heads} heads: add 'head_dim'.")
    dim = config.whole("head_dim", default=256 if kind.startswith("gemma") else hidden // heads)
    vocab = config.whole("vocab_size")
    biased = config.flag("attention_bias", False)
    qkv_bias = config.flag("qkv_bias", True) if kind == "qwen2_moe" else kind == "qwen2" or biased
    out_bias = biased and kind not in ("qwen2", "qwen2_moe", "mixtral", "mistral", "phi3")
    if kind in ("mixtral", "mistral", "phi3"):
        qkv_bias = False
    matrices: list[Matrix] = []
    if kind == "phi3":
        matrices.append(Matrix("self_attn.qkv_proj", hidden, (heads + 2 * kv) * dim, layers))
    else:
        for name, width in (("q_proj", heads * dim), ("k_proj", kv * dim), ("v_proj", kv * dim)):
            matrices.append(Matrix(f"self_attn.{name}", hidden, width, layers, bias=qkv_bias))
    matrices.append(Matrix("self_attn.o_proj", heads * dim, hidden, layers, bias=out_bias))

    mlp, intermediate = _mlp(config, hidden, layers)
    matrices += mlp
    norms = (4 if kind in ("gemma2", "gemma3_text") else 2) * hidden * layers + hidden
    if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
        norms += 2 * dim * layers
    elif kind == "olmo2":
        norms += (heads + kv) * dim * layers
    window = config.values.get("sliding_window")
    windowed = _windowed_layers(config, layers) if isinstance(window, int) else 0
    if kind in _MIXTURES:
        notes.append("expert tensors are not quantized by bitsandbytes: they stay in the compute dtype")
    return ModelShape(
        model_type=kind, layers=layers, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv,
        head_dim=dim, vocab=vocab, max_positions=config.values.get("max_position_embeddings"),
        tied=config.flag("tie_word_embeddings", kind in _TIED), gated=True, tanh_gelu=False,
        matrices=tuple(matrices), embedding_parameters=vocab * hidden, norm_parameters=norms, norm_biases=0,
        window=window if windowed else None, windowed_layers=windowed, notes=tuple(notes),
    )  # fmt: skip


def _mlp(config: _Config, hidden: int, layers: int) -> tuple[list[Matrix], int]:
    """The MLP's matrices, and the width one token goes through."""
    kind = config.model_type
    bias = config.flag("mlp_bias", False) and kind not in _MIXTURES
    if kind == "phi3":
        width = config.whole("intermediate_size")
        return [
            Matrix("mlp.gate_up_proj", hidden, 2 * width, layers), Matrix("mlp.down_proj", width, hidden, layers)
        ], width  # fmt: skip
    if kind not in _MIXTURES:
        width = config.whole("intermediate_size")
        return _gated("mlp", hidden, width, layers, bias), width

    experts, top = config.whole("num_local_experts", "num_experts"), config.whole("num_experts_per_tok")
    width = config.whole("intermediate_size") if kind == "mixtral" else config.whole("moe_intermediate_size")
    sparse = layers if kind == "mixtral" else _sparse_layers(config, layers)
    share = top / experts
    # PEFT's conversion of expert targets knows mixtral and qwen3_moe, not qwen2_moe.
    known = kind != "qwen2_moe"
    pair, down = (("w1", "w3"), ("w2",)) if kind == "mixtral" else (("gate_proj", "up_proj"), ("down_proj",))
    out = [
        Matrix("mlp.experts.gate_up_proj", hidden, 2 * width, sparse * experts, linear=False, active=share,
               rank=2 * known, aliases=pair * known),
        Matrix("mlp.experts.down_proj", width, hidden, sparse * experts, linear=False, active=share,
               rank=1 * known, aliases=down * known),
        Matrix("mlp.gate", hidden, experts, sparse, linear=False, rank=1 * known),
    ]  # fmt: skip
    through = top * width
    if kind == "qwen2_moe":
        shared = config.whole("shared_expert_intermediate_size")
        out += _gated("mlp.shared_expert", hidden, shared, sparse, False)
        out.append(Matrix("mlp.shared_expert_gate", hidden, 1, sparse))
        through += shared
    if sparse < layers:
        dense = config.whole("intermediate_size")
        out += _gated("mlp", hidden, dense, layers - sparse, False)
        through = max(through, dense)
    return out, through


def _gated(where: str, hidden: int, width: int, copies: int, bias: bool) -> list[Matrix]:
    return [
        Matrix(f"{where}.gate_proj", hidden, width, copies, bias),
        Matrix(f"{where}.up_proj", hidden, width, copies, bias),
        Matrix(f"{where}.down_proj", width, hidden, copies, bias),
    ]


def _sparse_layers(config: _Config, layers: int) -> int:
    dense = set(config.values.get("mlp_only_layers") or ())
    step = config.whole("decoder_sparse_step", default=1)
    return sum(1 for i in range(layers) if i not in dense and (i + 1) % step == 0)


def _windowed_layers(config: _Config, layers: int) -> int:
    """Layers whose attention, and so whose cache, stops at the sliding window."""
    if isinstance(config.values.get("layer_types"), list):
        return sum(1 for kind in config.values["layer_types"] if kind == "sliding_attention")
    if config.model_type.startswith("qwen") or config.model_type == "smollm3":
        if not config.flag("use_sliding_window", False):
            return 0
        return max(0, layers - config.whole("max_window_layers", default=layers))
    if config.model_type == "gemma2":
        return (layers + 1) // 2
    if config.model_type == "gemma3_text":
        step = config.whole("sliding_window_pattern", default=6)
        return layers - layers // step
    return layers


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn", "attn.c_proj")


def adapted(shape: ModelShape, adapter: Adapter) -> tuple[Matrix, ...]:
    """The matrices that `lora.targets` names, by PEFT's rules. Raises ModelError when it names none.

    'all-linear' is every linear module of the layers (not the output projection), 'attention' those of the
    attention; other names match the end of a module's path, as PEFT's target_modules do.
    """
    reached = [m for m in shape.matrices if m.rank]
    targets = adapter.targets
    if targets == "all-linear":
        return tuple(reached)
    names = _ATTENTION if targets == "attention" else (targets,) if isinstance(targets, str) else targets
    found = tuple(m for m in reached if _named(m, names))
    if not found and isinstance(targets, str):
        try:  # PEFT reads a lone string as a regular expression over the full path
            found = tuple(m for m in reached if m.linear and re.fullmatch(targets, f"model.layers.0.{m.name}"))
        except re.error:
            found = ()
    if not found:
        valid = {m.name.rsplit(".", 1)[-1] for m in reached if m.linear}
        raise ModelError(
            f"lora.targets {targets!r} matches no linear module of this {shape.model_type} model"
            f"{strict_yaml.nearest(str(names[0]) if names else '', valid)}."
        )
    return found


def _named(matrix: Matrix, names: Sequence[str]) -> bool:
    if matrix.aliases:
        return all(alias in names for alias in matrix.aliases)
    return matrix.linear and any(matrix.name == n or matrix.name.endswith(f".{n}") for n in names)


def lora_parameters(shape: ModelShape, adapter: Adapter) -> int:
    """Trained parameters: r*(d_in + d_out) a module (arXiv:2106.09685), DoRA's magnitudes, and the biases asked for."""
    modules = adapted(shape, adapter)
    count = sum(adapter.r * m.rank * (m.d_in + m.d_out) * m.copies for m in modules)
    if adapter.dora:
        count += sum(m.d_out * m.copies for m in modules)
    if adapter.bias == "lora_only":
        count += sum(m.d_out * m.copies for m in modules if m.bias)
    elif adapter.bias == "all":
        count += sum(m.d_out * m.copies for m in shape.matrices if m.bias) + shape.norm_biases
    return count
