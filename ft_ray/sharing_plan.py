"""`plan --space`: what sharing one base is predicted to gain for this recipe and this space, and what the sweep costs.

Memory and gains come from the formulas of `step_memory` and `step_time`, whose launch time and card efficiency were
fitted to measurements of 1 and 8 adapters on one H100 (docs/cost.md sets both side by side). A prediction, and said so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from ft_ray import gpu_table, planning, search_space
from ft_ray.capacity import MOST_ADAPTERS, adapter_slot_bytes
from ft_ray.console import duration, table
from ft_ray.errors import InputError
from ft_ray.estimate import START, TokenStats
from ft_ray.gpu_table import Gpu
from ft_ray.model_shape import ModelShape, read
from ft_ray.recipe import Recipe
from ft_ray.search_space import LoadedSpace, Space
from ft_ray.step_memory import CONTEXT, Setting, memory, weight_bytes
from ft_ray.step_time import step_seconds

__all__ = ["SOURCE", "Gain", "SharingPlan", "plan", "tables"]

SOURCE = (
    "predicted from formulas fitted to 1 and 8 adapters on one H100 (docs/cost.md), against trials one by one without "
    "checkpoints where one fits so; ft-ray's engine measured there with an 8B NF4 base: 4.8x at 512 tokens, 2.5x at "
    "1,024, 1.4x at 2,048, 0.83x at 4,096, 0.77x at 8,192; other cards may differ"
)
_TOKENS = (512, 1024, 2048, 4096, 8192)
_DRAWN = 64
_DEFAULT_GPU = "h100-80gb"


class Gain(BaseModel):
    """`ratio`: how many times faster `adapters` trials are trained together than one by one."""

    model_config = ConfigDict(frozen=True)

    tokens: int
    adapters: int
    ratio: float


class SharingPlan(BaseModel):
    """What `ft-ray plan RECIPE --space FILE` adds to a plan. Bytes, seconds, US dollars; None without token counts."""

    model_config = ConfigDict(frozen=True)

    gpu: str
    trials: int
    shared: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    tokens_a_step: int
    adapters_at_once: int
    slot_bytes: tuple[int, int]
    gain: float
    gains: tuple[Gain, ...]
    share_of_tokens: float
    confirmation_trainings: int
    seconds: float | None
    seconds_one_by_one: float | None
    usd: float | None
    source: str = SOURCE


def plan(recipe: Recipe, loaded: LoadedSpace, *, gpu: str | None = None, price: float | None = None) -> SharingPlan:
    """The plan of a sweep on one card. Raises RecipeError for a space that does not fit the recipe, ModelError.

    `gpu` defaults to the card the formulas were fitted on; `price` is US dollars an hour for one.
    """
    said = search_space.check(loaded, recipe)
    space = loaded.space
    card = gpu_table.find(gpu or _DEFAULT_GPU)
    card = card.priced(price) if price else card
    shape, tokens = read(planning.config_of(recipe.model)), planning.tokens_of(recipe)
    points = search_space.points(space, recipe)
    reasons = search_space.unshared(space, recipe)
    trials = space.budget.trials or len(points)
    settings = [_setting(search_space.apply(recipe, point)) for point in points[:_DRAWN]]
    if not settings:
        raise InputError("this space draws no trial: raise budget.trials.")
    slots = [adapter_slot_bytes(shape, one) for one in settings]
    middle = sorted(settings, key=lambda one: one.adapter.r)[len(settings) // 2]
    length = _length(recipe, tokens)
    own = middle.but(length=length)
    fit = 0 if reasons else min(trials, _fit(shape, own, card, slots))
    gains = [] if reasons else list(_gains(shape, middle, card, trials, slots))
    gain = round(_gain(shape, own, card, fit), 2) if fit > 1 else 1.0
    share = _share(space, trials)
    trainings = (space.confirm.top + 1) * space.confirm.seeds if space.confirm.top else 0
    together = alone = None
    if tokens is not None or recipe.schedule.max_steps:
        alone = _alone(shape, recipe, own, card, tokens, trials * share + trainings)
        together = alone / gain + START + weight_bytes(shape, own) / 1e9
        alone += (trials + trainings) * (START + weight_bytes(shape, own) / 1e9)
    return SharingPlan(
        gpu=card.name,
        trials=trials,
        shared=not reasons,
        reasons=tuple(reasons),
        notes=tuple(said),
        tokens_a_step=own.tokens,
        adapters_at_once=fit,
        slot_bytes=(min(slots), max(slots)),
        gain=gain,
        gains=tuple(gains),
        share_of_tokens=round(share, 3),
        confirmation_trainings=trainings,
        seconds=together,
        seconds_one_by_one=alone,
        usd=None if together is None else together / 3600 * card.usd_per_hour,
    )


def _setting(recipe: Recipe) -> Setting:
    """One trial's share of a forward: a row, unless the recipe sets batch.per_device; see `estimate`."""
    setting = Setting.of(recipe, world=1).but(fused_kernels=False)
    return setting.but(rows=1) if recipe.batch.per_device == "auto" else setting


def _length(recipe: Recipe, tokens: TokenStats | None) -> int:
    """Tokens of a row as trained: packed ones are full, others as long as the data's mean where it is known."""
    if tokens is None or recipe.sequence.packing:
        return recipe.sequence.max_length
    return min(recipe.sequence.max_length, max(1, math.ceil(tokens.tokens / tokens.rows)))


def _fit(shape: ModelShape, setting: Setting, gpu: Gpu, slots: Sequence[int]) -> int:
    """Adapters that the card holds at once when the largest of the space come first."""
    free = gpu.memory - weight_bytes(shape, setting) - memory(shape, setting).working - CONTEXT
    count = 0
    order = sorted(slots, reverse=True)
    while count < MOST_ADAPTERS:
        free -= order[count % len(order)]
        if free < 0:
            break
        count += 1
    return count


def _gains(shape: ModelShape, setting: Setting, gpu: Gpu, trials: int, slots: Sequence[int]) -> Iterator[Gain]:
    for tokens in _TOKENS:
        one = setting.but(rows=1, length=tokens)
        grown = adapter_slot_bytes(shape, one) - adapter_slot_bytes(shape, setting)
        fit = max(1, min(trials, _fit(shape, one, gpu, [slot + grown for slot in slots])))
        yield Gain(tokens=tokens, adapters=fit, ratio=round(_gain(shape, one, gpu, fit), 2))


def _gain(shape: ModelShape, setting: Setting, gpu: Gpu, adapters: int) -> float:
    """How many times faster `adapters` trials go together than one by one, each at its fastest on this card."""
    return adapters * _fastest(shape, setting, gpu) / step_seconds(shape, setting.but(adapters=adapters), gpu)


def _fastest(shape: ModelShape, setting: Setting, gpu: Gpu) -> float:
    """Seconds of a step of one trial alone, which does without checkpoints where it fits so.

    That is why sharing loses where a step fills the card: many adapters need checkpoints, and one does not.
    """
    alone = setting.but(adapters=1)
    plain = alone.but(checkpointing=False, fused_kernels=True)
    seconds = step_seconds(shape, alone, gpu)
    return min(seconds, step_seconds(shape, plain, gpu)) if memory(shape, plain).total <= gpu.memory else seconds


def _share(space: Space, trials: int) -> float:
    """Part of the tokens of all full trials that is trained. ASHA at its best: one in `reduction` passes each rung."""
    if space.scheduler.type != "asha":
        return 1.0
    grace = space.scheduler.grace
    rung, kept, used = (grace if grace < 1 else 0.1), float(trials), 0.0
    before = 0.0
    while rung < 1:
        used += kept * (rung - before)
        kept, before, rung = max(1.0, kept / space.scheduler.reduction), rung, rung * space.scheduler.reduction
    return (used + kept * (1 - before)) / trials


def _alone(
    shape: ModelShape, recipe: Recipe, setting: Setting, gpu: Gpu, tokens: TokenStats | None, trainings: float
) -> float:
    """Seconds of `trainings` whole trainings one after the other, start-up left out."""
    most = recipe.schedule.max_steps
    steps = most or 1
    if tokens is not None:
        full = max(1, math.ceil(tokens.rows / recipe.batch.global_ * recipe.schedule.epochs))
        steps = min(full, most) if most else full
    passes = max(1, recipe.batch.global_ // setting.rows)
    return trainings * steps * _fastest(shape, setting.but(accumulation=passes), gpu)


def tables(made: SharingPlan) -> Iterator[Table | str]:
    """The plan for a person."""
    if not made.shared:
        yield f"Trials cannot share a base: {'; '.join(made.reasons)}. They run one by one."
    else:
        rows = [[f"{g.tokens:,}", str(g.adapters), f"{g.ratio:.1f}x"] for g in made.gains]
        yield table(
            f"Sharing one base on {made.gpu}: predicted", ["tokens a step and trial", "trials at once", "gain"], rows
        )
        low, high = (size / 2**20 for size in made.slot_bytes)
        yield (
            f"This recipe takes {made.tokens_a_step:,} tokens a forward and trial: {made.adapters_at_once} of "
            f"{made.trials} trials at once (an adapter takes {low:,.0f} to {high:,.0f} MiB), {made.gain:.1f}x."
        )
    extra = f" and {made.confirmation_trainings} trainings to confirm" if made.confirmation_trainings else ""
    text = f"{made.trials} trials{extra}; the scheduler leaves {made.share_of_tokens:.0%} of their tokens at best"
    if made.seconds is not None and made.seconds_one_by_one is not None and made.usd is not None:
        text += (
            f"; about {duration(made.seconds)} and US$ {made.usd:.2f}, one by one {duration(made.seconds_one_by_one)}"
        )
    yield f"{text}."
    yield from made.notes
    yield f"Source: {made.source}."

