"""Changes to a recipe that need less memory and alter the run: the user's to take, so `plan` only names them."""

from __future__ import annotations

from collections.abc import Iterator

from ft_ray.recipe import Recipe

__all__ = ["alone", "together"]

_SHORTEST, _SMALL_RANK = 256, 16


def alone(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """(what is changed, the changed recipe), one change each, mildest first."""
    yield from _eight_bit(recipe)
    yield from _shorter(recipe)
    if recipe.precision == "bf16":
        yield "precision: fp16", recipe.model_copy(update={"precision": "fp16"})
    if recipe.method == "full":
        yield "method: lora", recipe.model_copy(update={"method": "lora"})
    yield from _qlora(recipe)


def together(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """The same changes one on top of another, for what none of them alone makes fit."""
    said: list[str] = []
    for change in (_qlora, _eight_bit, _smaller_rank):
        for label, changed in change(recipe):
            recipe = changed
            said.append(label)
            yield "; ".join(said), recipe
    for label, shorter in _shorter(recipe):
        yield "; ".join([*said, label]), shorter


def _eight_bit(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    if "8bit" not in recipe.optim.name:
        optim = recipe.optim.model_copy(update={"name": "paged_adamw_8bit"})
        yield "optim.name: paged_adamw_8bit", recipe.model_copy(update={"optim": optim})


def _shorter(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    length = recipe.sequence.max_length // 2
    while length >= _SHORTEST:
        shorter = recipe.sequence.model_copy(update={"max_length": length})
        yield f"sequence.max_length: {length}", recipe.model_copy(update={"sequence": shorter})
        length //= 2


def _qlora(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    if recipe.method != "qlora":
        yield "method: qlora", recipe.model_copy(update={"method": "qlora"})


def _smaller_rank(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    if recipe.lora.r > _SMALL_RANK:
        lora = recipe.lora.model_copy(update={"r": _SMALL_RANK})
        yield f"lora.r: {_SMALL_RANK}", recipe.model_copy(update={"lora": lora})
