"""The frozen base under a shared sweep: how a transformers model is taken over, and its forward with token losses."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ft_ray import exact_products, grouped_products, kernels, token_loss
from ft_ray.dropout_masks import Dropout
from ft_ray.errors import ModelError
from ft_ray.segments import ATTENTION, MicroBatch, build_layout, register_attention, takes_varlen
from ft_ray.stacked_linear import Block, Part, StackedLinear, StepContext, Unit

__all__ = ["FrozenBase"]


class FrozenBase:
    """Takes over the Linear layers and attention of `model` until `close`; its tree and its weights stay as they are.

    ModelError for a model that cannot be shared: attention or dropout of its own, logits that are scaled.
    """

    def __init__(
        self, model: PreTrainedModel, exact: bool | None, gradient_checkpointing: bool, logits_budget: int
    ) -> None:
        self.model, self.logits_budget = model, logits_budget
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or not isinstance(embeddings, nn.Embedding):
            raise ModelError("The shared base needs a causal language model with an output head: this one has none.")
        self._head, self._decoder = head, model.get_decoder()
        self.device, self.dtype = embeddings.weight.device, embeddings.weight.dtype
        self.exact = exact if exact is not None else self.device.type == "cpu" and self.dtype == torch.float32
        _refuse_what_differs(model)
        model.requires_grad_(False)
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        self._context = StepContext(self.exact, self.device.type == "cuda", anchor)
        self.layers: dict[str, StackedLinear] = {}
        blocks: dict[str, Block] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module is not head:
                block = blocks.setdefault(_block_of(name), Block(len(blocks)))
                self.layers[name] = StackedLinear(module, name, block, self._context)
            module._ft_ray_step = self._context  # where attention finds the layout
        self._blocks = len(blocks)
        self._attention = model.config._attn_implementation
        register_attention()
        text = model.config.get_text_config()
        heads = text.num_attention_heads
        head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
        key_heads = getattr(text, "num_key_value_heads", None) or heads
        alike = not hasattr(text, "kv_lora_rank")  # latent attention: values are narrower than keys
        self.varlen = not self.exact and alike and takes_varlen(self.device, self.dtype, heads, key_heads, head_size)
        model.set_attn_implementation(ATTENTION)
        if kernels.fuse(model):
            kernels.fuse_rotary(model)
        self._context.seeded = not self.exact and _seeded(self.device, self.dtype)
        layers = self.layers.values()
        self.grouped = not self.exact and grouped_products.supported(self.device, self.dtype, layers)
        self.checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            self.checkpoint()
        else:
            model.eval()
        self._check_isolation()

    def checkpoint(self) -> None:
        """From now on each decoder layer's activations are computed again in the backward instead of kept."""
        self.checkpointing = self._context.checkpointing = True
        self.model.train()  # transformers checkpoints in training mode only; dropout was refused
        # Nothing in the base draws from torch's own generator, so that its state need not be restored either.
        self.model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        self.model.disable_input_require_grads()  # the first layer's input needs no gradient
        # The backward begins with the last layer: to keep what it computed costs no memory at the peak.
        last = [m for m in self._decoder.modules() if isinstance(m, GradientCheckpointingLayer)][-1:]
        for layer in last:
            layer.gradient_checkpointing = False

    def close(self) -> None:
        """Gives the model back with its own forward; on a GPU its norms, MLPs and rotation stay fused."""
        for layer in self.layers.values():
            layer.release()
        for module in self.model.modules():
            del module._ft_ray_step
        if self.checkpointing:
            self.model.gradient_checkpointing_disable()
        self.model.set_attn_implementation(self._attention)

    def losses(
        self,
        batches: Sequence[MicroBatch],
        parts: Sequence[Part],
        tokens: Sequence[int] | None,
        dropouts: Sequence[Dropout] | None = None,
    ) -> tuple[list[Tensor], Callable[[], None]]:
        """Token losses of each of K micro-batches, and what runs the backward of their objective.

        The objective is the sum over micro-batches of token losses divided by `tokens`; None is for an evaluation.
        The backward has to be called, if it is, before the next call of `losses`: both read one context.
        """
        layout = build_layout(batches, self.device, varlen=self.varlen)
        self._context.layout = layout
        self._context.units = self._units(parts)
        self._context.dropouts, self._context.drawn = None, None
        self._context.rounded.clear()  # weights may have moved
        if dropouts is not None and any(dropout.p for dropout in dropouts):
            thresholds = torch.tensor([dropout.threshold for dropout in dropouts], dtype=torch.int32)
            self._context.dropouts = dropouts
            self._context.thresholds = thresholds.to(self.device, non_blocking=True)
            if self._context.seeded:
                seeds = [[dropout.block_seed(block) for dropout in dropouts] for block in range(self._blocks)]
                self._context.seeds = torch.tensor(seeds, dtype=torch.int64).to(self.device, non_blocking=True)
        hidden: Tensor = self._decoder(
            input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False
        ).last_hidden_state
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        picked = flat.index_select(0, layout.trained)
        scale = None
        if tokens is not None:
            each = [1 / t for t in tokens]
            scale = torch.tensor(
                [e for e, n in zip(each, layout.trained_counts, strict=True) for _ in range(n)],
                dtype=torch.float32,
            ).to(self.device, non_blocking=True)
        weight, bias = self._head.weight, self._head.bias
        counts = list(layout.trained_counts)
        if self.exact:
            scales = scale.split(counts) if scale is not None else [None] * len(counts)
            results = [
                token_loss.token_losses(h, labels, weight, bias, s, budget=self.logits_budget)
                for h, labels, s in zip(picked.split(counts), layout.labels.split(counts), scales, strict=True)
            ]
            losses = [own for own, _ in results]
            grads = [g for _, g in results if g is not None]
            grad_picked = torch.cat(grads) if grads else None
        else:
            together, grad_picked = token_loss.token_losses(
                picked, layout.labels, weight, bias, scale, budget=self.logits_budget
            )
            losses = list(together.split(counts))

        def backward() -> None:
            assert grad_picked is not None
            grad = torch.zeros_like(flat).index_copy_(0, layout.trained, grad_picked)
            torch.autograd.backward(hidden, grad.view_as(hidden))
            for unit in self._context.units:
                unit.finish()

        return losses, backward

    def _units(self, parts: Sequence[Part]) -> Sequence[Unit]:
        if self.exact:
            return exact_products.one_by_one(parts)
        return grouped_products.grouped(parts) if self.grouped else parts

    def forget(self) -> None:
        """Lets go of what the last forward made for its adapters, which would stay until the next one."""
        context = self._context
        context.units, context.dropouts, context.drawn = (), None, None
        context.rounded.clear()

    def _check_isolation(self) -> None:
        """Two sequences in one row must give what each gives alone; a model with attention of its own would leak."""
        one, other = [3, 4, 5, 6, 7], [7, 6, 5]
        vocabulary = self._head.out_features
        sequences = [[token % vocabulary for token in ids] for ids in (one, other)]
        batches = [MicroBatch.of((ids, ids) for ids in chosen) for chosen in (sequences, sequences[1:])]
        with torch.no_grad():
            packed, alone = (
                self.losses([batch], [], None)[0][0][-len(other) + 1 :].float() for batch in batches
            )
        tolerance = 1e-4 if self.dtype == torch.float32 else 0.1
        difference = float((packed - alone).abs().max())
        if not difference <= tolerance:
            raise ModelError(
                f"{type(self.model).__name__} lets sequences in one row see each other (loss off by {difference:.2g}): "
                "it does not use transformers' attention interface, so sweep it with one process a trial."
            )


def _seeded(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether masks can be drawn where they are used; Triton may be missing, or what it compiles with."""
    if device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    from ft_ray import seeded_dropout

    return seeded_dropout.works(device, dtype)


def _block_of(name: str) -> str:
    """The decoder layer a Linear is in: its dotted name up to the first number, or the whole name."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), name)


def _refuse_what_differs(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ModelError(f"The shared base does not apply this model's {name}: sweep it with one process a trial.")
    dropped = [n for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
    if getattr(config, "attention_dropout", 0.0) or dropped:
        raise ModelError(
            "The base has dropout of its own (in config.json), which a shared forward cannot keep apart: set it to 0."
        )
