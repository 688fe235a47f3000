"""A LoRA adapter in PEFT's layout: what is in the folder, what may be merged, and where it goes in a base.

Keys and options follow PEFT 0.21 (`LoraConfig`, `set_peft_model_state_dict`). Whatever would change the
result in a way that `merge` does not compute is refused by name, so that nothing is merged half right.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ft_ray.errors import ModelError
from ft_ray.safetensors_io import Reader

__all__ = ["EMBEDDINGS", "HEADS", "WEIGHTS", "Adapter", "Delta", "locate", "read_adapter_config"]

logger = logging.getLogger("ft_ray")

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
HEADS = ("lm_head.weight", "embed_out.weight")

# Options that merge computes, and options that matter to training or loading only.
_COMPUTED = {
    "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias",
    "modules_to_save", "lora_bias", "ensure_weight_tying", "init_lora_weights", "peft_type",
}  # fmt: skip
_IRRELEVANT = {
    "base_model_name_or_path", "revision", "auto_mapping", "task_type", "inference_mode", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "peft_version", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size",
}  # fmt: skip
# These leave the base's weights as they are; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract from them.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

_MAYBE_NO_MODULE = re.compile(r"\.experts\.|vision|visual|audio")
_LORA = re.compile(
    r"^(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(?:\.default)?(?:\.(?P<leaf>weight|bias))?$"
)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of `folder`. Raises ModelError for anything that cannot be merged."""
    path, weights = folder / CONFIG, folder / WEIGHTS
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{folder} is no adapter: it has no {CONFIG}; give a folder saved by PEFT.") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}): save the adapter again.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ModelError(f"{path}: peft_type {kind!r} cannot be merged: give a LoRA adapter.")
    if not weights.exists():
        if (folder / "adapter_model.bin").exists():
            raise ModelError(
                f"{folder} holds pickled weights (adapter_model.bin), which could run code when loaded: "
                "save it with safe_serialization=True on a machine that trusts it."
            )
        raise ModelError(f"{folder} is no whole adapter: {WEIGHTS} is missing; save the adapter again.")
    for key, value in config.items():
        if value and key not in _COMPUTED | _IRRELEVANT:
            raise ModelError(f"{path}: {key} = {value!r} cannot be merged: train the adapter without it.")
    init = config.get("init_lora_weights", True)
    if init not in _INITS:
        raise ModelError(
            f"{path}: init_lora_weights = {init!r} changed the base's weights: save the adapter with "
            "path_initial_model_for_weight_conversion, which turns it into a plain one."
        )
    for key, kind in (("r", int), ("lora_alpha", (int, float))):
        if not isinstance(config.get(key), kind) or config[key] <= 0:
            raise ModelError(f"{path}: {key} = {config.get(key)!r} is not a positive number: save the adapter again.")
    return config


@dataclass
class Delta:
    """One adapted module: the adapter's keys, and its scaling (alpha / r, rsLoRA: alpha / sqrt(r)).

    `a` is [r, in], `b` [out, r]; for an embedding `a` is [r, vocabulary] and `b` [dimension, r].
    """

    module: str
    embedding: bool = False
    a: str = ""
    b: str = ""
    magnitude: str | None = None
    bias: str | None = None
    scaling: float = 1.0


@dataclass
class Adapter:
    """An adapter read from `folder`: `deltas` by module name, `replaced` tensor name -> key (modules_to_save,
    trained biases, resized embeddings). Names are the base model's, without PEFT's prefix."""

    folder: Path
    config: dict[str, Any]
    tensors: Reader
    deltas: dict[str, Delta] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, *, allow_empty: bool = False) -> Adapter:
        """Reads and checks the whole adapter (finite, complete, ranks as configured). Raises ModelError.

        `allow_empty`: accept an adapter that changes nothing.
        """
        config = read_adapter_config(folder)
        adapter = cls(folder, config, Reader([folder / WEIGHTS]))
        for key in adapter.tensors.entries:
            adapter._sort_in(key)
        for delta in adapter.deltas.values():
            adapter._complete(delta)
        changing = adapter._scan()
        if not adapter.replaced and not changing and not allow_empty:
            raise ModelError(
                f"{folder} changes nothing: every update B x A in it is zero ({len(adapter.deltas)} modules); "
                "it was saved before training or from a shard without its weights."
            )
        if 0 < changing < len(adapter.deltas):
            logger.warning("%s: %d of %d modules hold a zero update", folder, len(adapter.deltas) - changing,
                           len(adapter.deltas))  # fmt: skip
        return adapter

    def _sort_in(self, key: str) -> None:
        name = key.removeprefix("base_model.model.").replace("_orig_mod.", "")
        if ".original_module." in name:
            return  # PEFT saves the base's own copy beside a replaced module when the vocabulary has grown
        match = _LORA.match(name)
        if not match:
            if ".lora_" in name or name.startswith("prompt_"):
                raise ModelError(f"{self.folder}: tensor {key!r} is of a kind that cannot be merged.")
            name = re.sub(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)", "", name)
            self.replaced[name] = key
            return
        delta = self.deltas.setdefault(match["module"], Delta(match["module"]))
        part = match["part"]
        delta.embedding |= part.startswith("embedding")
        if part == "magnitude_vector":
            delta.magnitude = key
        elif match["leaf"] == "bias":
            delta.bias = key
        elif part.endswith("A"):
            delta.a = key
        else:
            delta.b = key

    def _complete(self, delta: Delta) -> None:
        from peft.utils.other import get_pattern_key

        where = f"{self.folder}: {delta.module!r}"
        if not delta.a or not delta.b:
            missing = "lora_A" if not delta.a else "lora_B"
            raise ModelError(f"{where} has no {missing}: the adapter was not saved whole.")
        shape_a, shape_b = self.shape(delta.a), self.shape(delta.b)
        if len(shape_a) != 2 or len(shape_b) != 2 or 0 in (*shape_a, *shape_b):
            raise ModelError(
                f"{where} has the shapes {list(shape_a)} and {list(shape_b)} where matrices belong: the weights were "
                "saved from shards (ZeRO-3, FSDP) without gathering, or they adapt a convolution."
            )
        ranks, alphas = self.config.get("rank_pattern") or {}, self.config.get("alpha_pattern") or {}
        rank = int(ranks.get(get_pattern_key(list(ranks), delta.module), self.config["r"]))
        alpha = float(alphas.get(get_pattern_key(list(alphas), delta.module), self.config["lora_alpha"]))
        if shape_a[0] != rank or shape_b[1] != rank:
            raise ModelError(
                f"{where} has rank {shape_a[0]} (A) and {shape_b[1]} (B), {CONFIG} says {rank}: "
                "the config belongs to another adapter."
            )
        delta.scaling = alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank
        if bool(self.config.get("use_dora")) != (delta.magnitude is not None):
            state = "without" if self.config.get("use_dora") else "with"
            raise ModelError(f"{where} is {state} a DoRA magnitude, {CONFIG} says otherwise: save the adapter again.")

    def _scan(self) -> int:
        """Refuses NaN and infinite values; returns how many modules have an update other than zero."""
        nonzero: dict[str, bool] = {}
        for key, entry in self.tensors.entries.items():
            tensor = self.tensors.read(key)
            if entry.dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
                raise ModelError(
                    f"{self.folder}: tensor {key!r} holds NaN or infinite values: "
                    "training diverged; use an earlier checkpoint or a lower optim.lr."
                )
            nonzero[key] = bool(tensor.count_nonzero())
        return sum(nonzero[d.a] and nonzero[d.b] for d in self.deltas.values())

    def shape(self, key: str) -> tuple[int, ...]:
        return self.tensors.entries[key].shape

    def close(self) -> None:
        self.tensors.close()


def locate(name: str, names: dict[str, Any]) -> str | None:
    """The base tensor that the adapter's `name` means, or None.

    A checkpoint may have been saved with or without the model's outermost prefixes ('model.', 'transformer.',
    'language_model.'), so up to two leading parts may be missing on either side, if that is unambiguous.
    """
    if name in names:
        return name
    parts = name.split(".")
    for cut in (1, 2):
        shorter = ".".join(parts[cut:])
        if len(parts) - cut >= 2 and shorter in names:
            return shorter
    longer = [n for n in names if n.endswith(f".{name}") and n.removesuffix(f".{name}").count(".") < 2]
    return longer[0] if len(longer) == 1 else None


def unsaved(adapter: Adapter, names: Iterable[str], source: str) -> ModelError | None:
    """The error for modules that the config lists, the base (`names`) has, and the weights hold nothing of.

    PEFT ignores listed names that the model has not. Experts, which transformers fuses, and towers beside the text
    model may have been no module to adapt. A pattern, or a choice of layers, says nothing of a single name.
    """
    config = adapter.config
    bases = [f".{name.removesuffix('.weight')}" for name in names if not _MAYBE_NO_MODULE.search(name)]
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("exclude_modules") or config.get("layers_to_transform") is not None:
        targets = []
    saved = config.get("modules_to_save") or []
    # A tied head is in no file of the base, and still a module of the model.
    heads = [] if config.get("ensure_weight_tying") else [f".{head.removesuffix('.weight')}" for head in HEADS]
    lacking = [
        f"target_modules {name!r}" for name in targets
        if name not in saved and any(base.endswith(f".{name}") for base in bases)
        and not any(f".{module}".endswith(f".{name}") for module in adapter.deltas)
    ] + [
        f"modules_to_save {name!r}" for name in saved
        if any(f".{name}." in f"{base}." for base in [*bases, *heads])
        and not any(f".{name}." in f".{tensor}" for tensor in adapter.replaced)
    ]  # fmt: skip
    if not lacking:
        return None
    return ModelError(
        f"{adapter.folder} is no whole adapter: {CONFIG} lists {', '.join(lacking)}, which {source} has, and {WEIGHTS} "
        "holds no tensor of it; save the adapter again, or take the name out of the config if it was never trained."
    )


def unknown(folder: Path, missing: list[str], names: dict[str, Any], source: str) -> ModelError:
    """The error for adapter tensors that no base tensor matches."""

    def guess(name: str) -> str:
        close = difflib.get_close_matches(name, names, n=1)
        return f"{name!r} (did you mean {close[0]!r}?)" if close else repr(name)

    shown = "; ".join(guess(name) for name in missing[:3])
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return ModelError(
        f"the adapter {folder} adapts {shown}{more}, which {source} does not have: give the base it was trained on."
    )
