"""`plan`: memory, time and cost of a recipe before anything runs, from config.json and the table of GPUs alone.

The parts: shapes in model_shape, bytes in step_memory, seconds in step_time, sweeps and endpoints in capacity.
A plan never changes the method by itself. What it may change to fit is what computes the same: a smaller device
batch (the global one kept), gradient checkpointing, ZeRO-3, offload; each change is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ft_ray import alternatives, gpu_table
from ft_ray.capacity import ServingPlan, SweepPlan, serving, sweep
from ft_ray.errors import InputError
from ft_ray.gpu_table import Gpu
from ft_ray.model_shape import FUSED, ModelShape, read
from ft_ray.precision import on_device
from ft_ray.recipe import Recipe
from ft_ray.step_memory import (
    Memory,
    Setting,
    auto_rows,
    memory,
    optimizer_bytes,
    trained_parameters,
    weight_bytes,
)
from ft_ray.step_time import step_seconds

__all__ = ["Option", "Plan", "TokenStats", "plan"]

COUNTS = (1, 2, 4, 8)
ENOUGH_TOKENS = 16_384  # a forward pass beyond this gains no speed
PACKED = 0.95  # share of a packed sequence that is filled: best-fit-decreasing on short rows (arXiv:2404.10830)
START = 60.0  # imports, Ray and the first step
HOST = 256 * 2**30  # host memory offered with a card, 2 TiB for eight: assumed; more is taken if nothing else fits
LOADING = 1e9  # bytes/s from storage to the device: assumed


class TokenStats(BaseModel):
    """The training split as tokenised: rows, tokens of all rows, tokens of the longest row.

    `guessed`: from the sizes of the files, without a tokenizer. Time and cost then are guesses too.
    """

    model_config = ConfigDict(frozen=True)

    rows: int = Field(ge=1)
    tokens: int = Field(ge=1)
    longest: int = Field(ge=1)
    guessed: bool = False


class Option(BaseModel):
    """The recipe on `count` cards. `changes` are needed to fit and compute the same; empty: as the recipe says.

    `needed` is the peak of one card in bytes, `host` of one host. Time and cost are None without token counts.
    """

    model_config = ConfigDict(frozen=True)

    gpu: str
    count: int
    fits: bool
    reason: str = ""
    changes: tuple[str, ...] = ()
    rows_per_device: int
    accumulation: int
    needed: int
    available: int
    host: int
    tokens_per_second: float
    usd_per_hour: float
    usd_per_million_tokens: float
    steps: int | None = None
    seconds: float | None = None
    usd: float | None = None


class Plan(BaseModel):
    """What `ft-ray plan` prints. Bytes, seconds and US dollars; `memory` is of `chosen`, or as written if none."""

    model_config = ConfigDict(frozen=True)

    model_type: str
    method: str
    parameters: int
    trained_parameters: int
    memory: Memory
    allocated: int
    total: int
    disk: int
    chosen: Option | None
    cheapest: Option | None
    options: tuple[Option, ...]
    advice: tuple[str, ...]
    sweep: SweepPlan | None
    serving: ServingPlan | None
    notes: tuple[str, ...]


def plan(
    recipe: Recipe,
    config: Mapping[str, Any],
    *,
    gpu: str | None = None,
    count: int | None = None,
    price: float | None = None,
    tokens: TokenStats | None = None,
) -> Plan:
    """Plans `recipe` for the model that `config` (a parsed config.json) describes.

    gpu, count: the cards to plan for (a name of the table); without, the cheapest that fit are looked for.
    price: US dollars an hour for one such card, instead of the table's. tokens: from the data check, for time and
    cost. Raises ModelError for a config without what is needed, InputError for an unknown card or a bad number.
    """
    shape = read(config)
    if price is not None and gpu is None:
        raise InputError("a price is the price of a card: give the card too, for example --gpu a100-40gb --price 1.8.")
    for name, value in (("count", count), ("price", price)):
        if value is not None and value <= 0:
            raise InputError(f"{name} is {value}: give a number above 0.")
    if count and recipe.batch.global_ % count:
        raise InputError(
            f"batch.global {recipe.batch.global_} does not divide among {count} GPUs: set batch.global to a multiple."
        )
    known = tokens if tokens and not tokens.guessed else None  # memory is never planned on a guess
    if known and not recipe.sequence.packing and known.longest < recipe.sequence.max_length:
        shorter = recipe.sequence.model_copy(update={"max_length": known.longest})
        recipe = recipe.model_copy(update={"sequence": shorter})  # no forward pass is longer than the longest row
    wanted = _card(recipe, gpu, count, price) if gpu else None
    cards = {name: wanted if wanted and wanted.name == name else card for name, card in gpu_table.table().items()}
    counts = (count,) if count else tuple(c for c in COUNTS if recipe.batch.global_ % c == 0)
    every = [_option(shape, recipe, card, c, tokens) for card in cards.values() for c in counts]
    fitting = [o for o in every if o.fits]
    cheapest = min([o for o in fitting if o.host <= HOST * o.count] or fitting, key=_price, default=None)
    workers = count or recipe.resources.workers
    chosen = _option(shape, recipe, wanted, workers, tokens) if wanted else cheapest
    listed = tuple(_option(shape, recipe, card, workers, tokens) for card in cards.values())
    setting, peak = _peak(shape, recipe, cards[chosen.gpu] if chosen else None, chosen.count if chosen else workers)
    card = cards[chosen.gpu] if chosen else None
    return Plan(
        model_type=shape.model_type,
        method=recipe.method,
        parameters=shape.parameters,
        trained_parameters=trained_parameters(shape, setting),
        memory=peak,
        allocated=peak.allocated,
        total=peak.total,
        disk=_disk(shape, recipe, setting),
        chosen=chosen,
        cheapest=cheapest,
        options=listed,
        advice=tuple(_advice(shape, recipe, chosen, cards, tokens)),
        sweep=sweep(shape, _trial(recipe, setting), card) if card else None,
        serving=serving(shape, recipe, card) if card else None,
        notes=tuple(_notes(shape, recipe, chosen, tokens)),
    )


def _trial(recipe: Recipe, setting: Setting) -> Setting:
    """One adapter's share of a shared forward: a row, unless the recipe sets batch.per_device.

    Sweeps are planned as they were measured, without what fused kernels save.
    """
    rows = 1 if recipe.batch.per_device == "auto" else setting.rows
    return setting.but(rows=rows, fused_kernels=False, fused_adapters=False)


def _card(recipe: Recipe, gpu: str, count: int | None, price: float | None) -> Gpu:
    card = gpu_table.find(gpu)
    if price is None and recipe.budget.usd_per_hour:
        price = recipe.budget.usd_per_hour / (count or recipe.resources.workers)
    return card.priced(price) if price else card


def _ladder(recipe: Recipe, world: int) -> Iterator[tuple[tuple[str, ...], Setting]]:
    """Settings that compute what the recipe says, from as it is to the most frugal, each with its changes."""
    setting = Setting.of(recipe, world=world)
    changes: list[str] = []
    share = recipe.batch.global_ // world
    if recipe.batch.per_device == "auto":
        sizes = [d for d in range(share, 0, -1) if share % d == 0]
        sizes = [d for d in sizes if d == 1 or d * setting.length <= ENOUGH_TOKENS]
    else:
        sizes = [setting.rows, *(d for d in range(setting.rows - 1, 0, -1) if share % d == 0)]

    def sized() -> Iterator[tuple[tuple[str, ...], Setting]]:
        for rows in sizes:
            smaller = recipe.batch.per_device not in ("auto", rows)
            note = (f"batch.per_device: {rows} (global batch kept)",) if smaller else ()
            yield (*changes, *note), setting.but(rows=rows, accumulation=max(1, share // rows))

    yield from sized()
    if not setting.checkpointing:
        setting = setting.but(checkpointing=True)
        changes.append("gradient_checkpointing: true")
        yield from sized()
    if recipe.method != "full":
        return  # an adapter is small, and its base is not shared out: see Recipe.zero_stage
    if setting.zero < 3 and world > 1:
        setting = setting.but(zero=3)
        changes.append("resources.sharding: zero3")
        yield from sized()
    # One device has nothing to share out: ZeRO is there for its offload alone.
    for key, stage in (("offload_optimizer", 2), ("offload_parameters", 3)):
        if getattr(setting, key):
            continue
        if setting.zero < stage:
            changes = [*(c for c in changes if "sharding" not in c), f"resources.sharding: zero{stage}"]
        setting = setting.but(zero=max(setting.zero, stage), **{key: True})
        changes.append(f"resources.{key}: true")
        yield from sized()


def _fit(shape: ModelShape, recipe: Recipe, gpu: Gpu, world: int) -> tuple[tuple[str, ...], Setting, Memory, bool]:
    """The first rung of the ladder that fits the card, else the one that needs least."""
    tried = []
    for changes, setting in _ladder(recipe, world):
        peak = memory(shape, setting)
        if peak.total <= gpu.memory:
            return changes, setting, peak, True
        tried.append((changes, setting, peak))
    return *min(tried, key=lambda t: t[2].total), False


def _peak(shape: ModelShape, recipe: Recipe, gpu: Gpu | None, world: int) -> tuple[Setting, Memory]:
    if gpu is not None:
        _, setting, peak, _ = _fit(shape, recipe, gpu, world)
        return setting, peak
    setting = Setting.of(recipe, world=world)
    return setting, memory(shape, setting)


def _option(shape: ModelShape, recipe: Recipe, gpu: Gpu, world: int, tokens: TokenStats | None) -> Option:
    changes, setting, peak, fits = _fit(shape, recipe, gpu, world)
    reason = "" if fits else f"needs {_gib(peak.total)} of {_gib(gpu.memory)}"
    if recipe.precision == "bf16" and not gpu.bf16:
        fits, reason = False, "; ".join(filter(None, ["has no bf16: set precision: fp16", reason]))
    if recipe.sequence.packing or tokens is None:
        length, row = setting.length, setting.length * (PACKED if recipe.sequence.packing else 1)
    else:
        length = _padded(tokens, setting.rows, setting.length)
        row = tokens.tokens / tokens.rows
    step = step_seconds(shape, setting.but(length=length), gpu)
    useful = recipe.batch.global_ * row / step
    hourly = gpu.usd_per_hour * world
    steps = seconds = None
    if recipe.schedule.max_steps or tokens:
        steps = _steps(recipe, tokens)
        seconds = START + weight_bytes(shape, setting) / LOADING + steps * step
    return Option(
        gpu=gpu.name,
        count=world,
        fits=fits,
        reason=reason,
        changes=changes,
        rows_per_device=setting.rows,
        accumulation=setting.accumulation,
        needed=peak.total,
        available=gpu.memory,
        host=peak.host,
        tokens_per_second=useful,
        usd_per_hour=hourly,
        usd_per_million_tokens=hourly / 3600 / useful * 1e6,
        steps=steps,
        seconds=seconds,
        usd=None if seconds is None else seconds / 3600 * hourly,
    )


def _padded(tokens: TokenStats, rows: int, limit: int) -> int:
    """Expected length of the longest of `rows` rows, which pads the others: lengths uniform around the mean."""
    mean, longest = tokens.tokens / tokens.rows, min(tokens.longest, limit)
    low = max(0.0, 2 * mean - longest)
    return max(1, min(limit, math.ceil(mean if rows == 1 else low + (longest - low) * rows / (rows + 1))))


def _steps(recipe: Recipe, tokens: TokenStats | None) -> int:
    most = recipe.schedule.max_steps
    if tokens is None:
        return most or 1
    sequences = tokens.rows
    if recipe.sequence.packing:
        sequences = math.ceil(tokens.tokens / (recipe.sequence.max_length * PACKED))
    steps = max(1, math.ceil(sequences / recipe.batch.global_ * recipe.schedule.epochs))
    return min(steps, most) if most else steps


def _disk(shape: ModelShape, recipe: Recipe, setting: Setting) -> int:
    """Bytes: base, checkpoints (two or what is kept, and the one being written), adapter or model, merged model."""
    trained = trained_parameters(shape, setting)
    dense = shape.parameters * setting.element
    checkpoint = int(trained * (4 + optimizer_bytes(setting.optimizer, 4)))
    result = dense + (0 if setting.method == "full" else trained * setting.adapter_bytes)
    return dense + (max(recipe.checkpoint.keep, 2) + 1) * checkpoint + result


def _advice(
    shape: ModelShape,
    recipe: Recipe,
    chosen: Option | None,
    cards: Mapping[str, Gpu],
    tokens: TokenStats | None,
) -> Iterator[str]:
    """What to change, when the cards asked for do not fit or nothing does."""
    if chosen and chosen.fits:
        if chosen.changes:
            yield f"{chosen.count} x {chosen.gpu} fits with: {'; '.join(chosen.changes)}."
        return
    if chosen:
        yield f"{chosen.count} x {chosen.gpu} does not fit: {chosen.reason}."
    else:
        yield "No card of the table fits, in any number up to 8, with everything that computes the same."
    asked, count = ([cards[chosen.gpu]], chosen.count) if chosen else (list(cards.values()), None)
    fitting = list(_changed(alternatives.alone(recipe), asked, count, shape, tokens))
    fitting = fitting or list(_changed(alternatives.together(recipe), asked, count, shape, tokens))[:1]
    if not fitting and chosen:
        yield f"No change named here makes it fit {chosen.count} x {chosen.gpu}; on other cards:"
        fitting = list(_changed([("as the recipe says", recipe)], list(cards.values()), None, shape, tokens))
        fitting += _changed(alternatives.together(recipe), list(cards.values()), None, shape, tokens)
        fitting = fitting[:2]
    yield from fitting or ["Nothing of the table holds this base by any of these changes: take a smaller one."]


def _changed(
    changes: Iterable[tuple[str, Recipe]],
    on: Sequence[Gpu],
    count: int | None,
    shape: ModelShape,
    tokens: TokenStats | None,
) -> Iterator[str]:
    """A sentence for each of `changes` that fits, with the cheapest cards; of shorter rows the longest only."""
    shortened = False
    for label, changed in changes:
        shorter = "sequence." in label
        if shortened and shorter:
            continue
        counts = (count,) if count else tuple(c for c in COUNTS if changed.batch.global_ % c == 0)
        options = [_option(shape, changed, card, c, tokens) for card in on for c in counts]
        best = min((o for o in options if o.fits), key=_price, default=None)
        if best:
            shortened |= shorter
            also = "".join(f"; {change}" for change in best.changes)
            host = f", {_gib(best.host)} of host memory" if "offload" in also else ""
            yield f"{label}{also} would fit {best.count} x {best.gpu} ({_gib(best.needed)} a card{host})."


def _notes(shape: ModelShape, recipe: Recipe, chosen: Option | None, tokens: TokenStats | None) -> Iterator[str]:
    yield from (note for note in shape.notes if recipe.method == "qlora" or "bitsandbytes" not in note)
    if recipe.resources.gpus == 0:
        needed = memory(shape, _on_cpu(recipe)).host
        yield f"resources.gpus is 0: on the CPU the run itself takes about {_gib(needed)} of host memory."
    if recipe.fused_kernels is True and shape.model_type not in FUSED:
        yield f"fused_kernels: there is nothing to fuse in a {shape.model_type}."
    elif recipe.fuses and shape.model_type in FUSED and recipe.resources.gpus != 0:
        yield "On a GPU this counts with fused kernels, so with the extra gpu (fused_kernels: false plans without)."
    if recipe.optim.name.startswith("paged_"):
        yield f"Where there is no GPU, optim.name {recipe.optim.name} runs unpaged: the update is the same."
    if shape.max_positions and recipe.sequence.max_length > shape.max_positions:
        yield f"sequence.max_length {recipe.sequence.max_length} is beyond the model's {shape.max_positions} positions."
    if tokens is None and (chosen is None or chosen.seconds is None):
        yield "No token counts are known, so no time and cost: speed holds for full rows of sequence.max_length tokens."
    elif tokens is not None and tokens.guessed:
        yield (
            f"Time and cost stand on a guess from the files' sizes: {tokens.rows:,} training rows, {tokens.tokens:,} "
            "tokens. After a run's data check the real counts are used."
        )
    if chosen and chosen.host > 64 * 2**30:
        yield f"Host memory of {_gib(chosen.host)} is needed with all {chosen.count} ranks on one host."
    if chosen and chosen.seconds is not None and chosen.usd is not None:
        if recipe.budget.hours and chosen.seconds > recipe.budget.hours * 3600:
            yield f"budget.hours {recipe.budget.hours} ends the run before its {chosen.seconds / 3600:.1f} hours."
        if recipe.budget.usd and chosen.usd > recipe.budget.usd:
            yield f"budget.usd {recipe.budget.usd} ends the run before its {chosen.usd:.2f} dollars."


def _on_cpu(recipe: Recipe) -> Setting:
    setting = Setting.of(on_device(recipe, "cpu")[0]).but(on_gpu=False)
    if recipe.batch.per_device != "auto":
        return setting
    share = setting.rows * setting.accumulation
    rows = auto_rows(share, recipe.sequence.max_length, on_gpu=False)
    return setting.but(rows=rows, accumulation=share // rows)


def _price(option: Option) -> tuple[float, int, int]:
    return (option.usd_per_million_tokens if option.usd is None else option.usd, option.count, option.available)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
