"""What went wrong in a run, from its own records: each finding with its evidence, a plain sentence and a patch.

`during` judges losses while training goes on, `after` everything a run left. Both are pure functions of records, so
the warnings of a live run and the verdict afterwards cannot differ. Thresholds are in the code beside their reason;
losses are nats a trained token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from ft_ray.answer_faults import answer_faults
from ft_ray.recipe import Recipe
from ft_ray.remedies import USUAL_RATE
from ft_ray.verdicts import Diagnosis, Record, made, worst_first

__all__ = ["Diagnosis", "Watch", "after", "during", "worst_first"]

_FEW = 8  # steps below which no course of a loss is judged
_UNLEARNT = 3.0  # nats a trained token at the end: a language model that has learnt its answers is far below


def during(history: Sequence[Record], recipe: Recipe, error: str | None = None) -> list[Diagnosis]:
    """From step and eval records alone: what can be said while training goes on. `error`: what ended it."""
    steps = [r for r in history if r["kind"] == "step"]
    evals = [r for r in history if r["kind"] == "eval" and math.isfinite(r["loss"])]
    diverged = list(_divergence(steps, recipe, error)) or list(_collapse(steps, recipe))
    found = diverged or [*_spikes(steps, recipe), *_bump(steps, recipe)]
    found += _overfitting(steps, evals, recipe)
    found += _over_time(evals, recipe)
    return worst_first(found)


def after(
    history: Sequence[Record],
    recipe: Recipe,
    *,
    scores: Mapping[str, Any] | None = None,
    predictions: Sequence[Record] = (),
    adapter: Mapping[str, float] | None = None,
    data_codes: Sequence[str] = (),
    error: str | None = None,
    stopped: bool = False,
) -> list[Diagnosis]:
    """Everything a run left. `scores`: metrics of the evaluate stage; `adapter`: module -> norm of its B matrix.

    `stopped`: training was ended before its time (budget, Ctrl-C). What it would have come to is then not judged; nor
    where an `error` that is not about the numbers ended it, a lost worker or a full disk.
    """
    found = during(history, recipe, error)
    stopped = stopped or (error is not None and not _of_numbers(error))
    names = {d.code for d in found}
    steps = [r for r in history if r["kind"] == "step"]
    evals = [r for r in history if r["kind"] == "eval" and math.isfinite(r["loss"])]
    if 0 < len(steps) < _FEW and not names:
        found.append(
            Diagnosis("too_short", "info", f"Only {len(steps)} optimizer steps ran: too few to learn much from, and to "
                      "judge the losses by.", {"steps": len(steps)})
        )  # fmt: skip
    if stopped and steps:
        found += _unfinished(steps, recipe)
    elif not names & {"divergence", "overfitting"}:
        # A run that is going wrong has no course to judge, and one that was stopped has not had its course.
        found += list(_underfitting(steps, evals, recipe)) or _plateau(steps, evals, recipe)
    found += _forgetting(scores or {}, recipe)
    said = [d for d in answer_faults(predictions, scores or {}, recipe, data_codes) if d.code not in names]
    # Answers of a run that diverged say nothing of its length, and those of an adapter made elsewhere nothing of ours.
    found += [replace(d, patch={}) for d in said] if "divergence" in names or not steps else said
    found += _dead(adapter or {}, recipe)
    return worst_first(found)


@dataclass(frozen=True)
class _Levels:
    """Where a loss went: medians over a tenth of the steps, so that one step decides nothing.

    `along` are (step, level) from start to end, 200 at most: a run may have many thousand steps.
    """

    start: float
    end: float
    along: list[tuple[int, float]]

    @classmethod
    def of(cls, steps: Sequence[Record]) -> _Levels:
        losses = [float(r["loss"]) for r in steps]
        width = min(max(3, len(losses) // 10), 200)
        last = max(0, len(losses) - width)
        places = sorted({*range(0, last + 1, max(1, last // 200)), last})
        along = [(int(steps[i]["step"]), median(losses[i : i + width])) for i in places]
        return cls(median(losses[: min(3, width)]), along[-1][1], along)

    def lowest(self) -> tuple[int, float]:
        return min(self.along, key=lambda at: at[1])

    def highest(self) -> tuple[int, float]:
        return max(self.along, key=lambda at: at[1])

    def after(self, share: float) -> float:
        """The level when this share of the way was done."""
        return self.along[min(len(self.along) - 1, int(share * len(self.along)))][1]


# Too fast


def _of_numbers(error: str) -> bool:
    """Whether this error is the trainer's own on a loss or a gradient that is no number any more."""
    return "the loss became" in error or "the gradient became" in error


def _divergence(steps: Sequence[Record], recipe: Recipe, error: str | None) -> Iterator[Diagnosis]:
    if error and _of_numbers(error):
        yield made("divergence", "error", f"Training diverged: {error.split(':')[0]}.", recipe,
                    lr=recipe.optim.lr, steps=len(steps))  # fmt: skip
        return
    if len(steps) < _FEW:
        return
    levels = _Levels.of(steps)
    start, end, (at, low) = levels.start, levels.end, levels.lowest()
    # Above the start, or far above what had been reached: 0.3 nats is more than batches of one data set differ by.
    if end > 1.05 * start + 0.05 or (end > 1.5 * low and end - low > max(0.3, 0.2 * start)):
        yield made(
            "divergence", "error",
            f"Training diverged: the loss was {low:.3g} around step {at} and is {end:.3g} at the end "
            f"(start {start:.3g}); the learning rate {recipe.optim.lr:g} is too high.",
            recipe, start=start, lowest=low, lowest_step=at, end=end, lr=recipe.optim.lr,
        )  # fmt: skip


def _collapse(steps: Sequence[Record], recipe: Recipe) -> Iterator[Diagnosis]:
    """A gradient that vanished with the loss still high: the weights were thrown off to where nothing is learnt.

    The step that threw them may show as a gradient ten times the first, or as nothing at all: the gradient before a
    first huge update is an ordinary one.
    """
    norms = [float(r.get("grad_norm") or 0.0) for r in steps]
    if len(steps) < 16 or not all(map(math.isfinite, norms)):
        return
    levels = _Levels.of(steps)
    start, end = levels.start, levels.end
    first = median(norms[:2])
    if first <= 0:  # not recorded
        return
    peak = max(norms)
    at = norms.index(peak)
    later = median(norms[-max(5, len(norms) // 5) :])
    spiked = peak > 10 * first and at < len(steps) // 2
    # A twentieth of the first gradient: a model that learns shrinks its gradient with its loss. Without a spike the
    # gradient must be next to nothing and the loss not have fallen to speak of: large first gradients settle, and a
    # loss may stay at what the data leave open.
    if later < 0.05 * first and (spiked or later < 0.01) and end > (0.3 if spiked else 0.75) * start:
        how = f"the gradient jumped to {peak:.3g} at step {steps[at]['step']}" if spiked else "the gradient vanished"
        yield made(
            "divergence", "error",
            f"Training collapsed: {how} (first {first:.3g}), and in the end it is {later:.2g} while the loss stays at "
            f"{end:.3g}; the learning rate {recipe.optim.lr:g} is too high.",
            recipe, start=start, end=end, peak=peak, peak_step=steps[at]["step"], first=first, later=later,
            lr=recipe.optim.lr,
        )  # fmt: skip


def _spike_steps(steps: Sequence[Record]) -> list[int]:
    losses, found = [float(r["loss"]) for r in steps], []
    for i in range(6, len(losses)):
        before = losses[max(0, i - 12) : i]
        level = median(before)
        spread = median(abs(x - level) for x in before)
        # Half as high again, and eight times what steps differ by here: noise of small batches is neither.
        if losses[i] > 1.5 * level + 0.1 and losses[i] > level + 8 * spread:
            found.append(int(steps[i]["step"]))
    return found


def _spikes(steps: Sequence[Record], recipe: Recipe) -> Iterator[Diagnosis]:
    found = _spike_steps(steps)
    if len(found) >= 2:
        shown = ", ".join(map(str, found[:5])) + ("…" if len(found) > 5 else "")
        yield made("loss_spikes", "warning",
                    f"The loss jumped at {len(found)} steps ({shown}): the learning rate is near its limit, or those "
                    "batches hold odd rows.", recipe, steps=found[:20], count=len(found))  # fmt: skip


def _bump(steps: Sequence[Record], recipe: Recipe) -> Iterator[Diagnosis]:
    """The rate at the edge: after the warm-up the loss first rises above its start, then recovers as the rate falls."""
    if len(steps) < 20:
        return
    levels = _Levels.of(steps)
    start, end, (at, top) = levels.start, levels.end, levels.highest()
    if top > 1.1 * start + 0.1 and end < 0.95 * start:
        yield made("learning_rate_edge", "warning",
                    f"The learning rate {recipe.optim.lr:g} is at the edge: the loss rose from {start:.3g} to "
                    f"{top:.3g} around step {at} before it fell to {end:.3g}.", recipe,
                    start=start, highest=top, highest_step=at, end=end, lr=recipe.optim.lr)  # fmt: skip


# Too long, too little


def _overfitting(steps: Sequence[Record], evals: Sequence[Record], recipe: Recipe) -> Iterator[Diagnosis]:
    if len(evals) < 3 or not steps:
        return
    best = min(evals, key=lambda r: r["loss"])
    last = evals[-1]
    later = evals[evals.index(best) + 1 :]
    rise = last["loss"] - best["loss"]
    # Two evaluations in a row above the best, by more than 2%: one alone is noise of the schedule.
    if len(later) < 2 or rise < max(0.02, 0.02 * best["loss"]):
        return
    around = [s for s in steps if abs(s["step"] - best["step"]) <= max(2, best["step"] // 10)] or list(steps[:1])
    then = median(s["loss"] for s in around)
    now = median(s["loss"] for s in steps[-max(3, len(steps) // 10) :])
    if now > 0.95 * then:
        return
    epoch = next((s.get("epoch") for s in reversed(steps) if s["step"] <= best["step"]), None)
    yield made(
        "overfitting", "warning",
        f"Overfitting since step {best['step']}: the training loss fell from {then:.3g} to {now:.3g} while the "
        f"validation loss rose from {best['loss']:.3g} to {last['loss']:.3g}.",
        recipe, best_step=best["step"], best_epoch=epoch, best_validation=best["loss"], last_validation=last["loss"],
        train_then=then, train_now=now,
    )  # fmt: skip


def _underfitting(steps: Sequence[Record], evals: Sequence[Record], recipe: Recipe) -> Iterator[Diagnosis]:
    if len(steps) < _FEW:
        return
    levels = _Levels.of(steps)
    start, end, quarter = levels.start, levels.end, levels.after(0.75)
    drop = 1 - end / start if start > 0 else 0.0
    falling = quarter - end > 0.03 * start and end > 0.05
    gained = len(evals) < 2 or evals[-1]["loss"] < 0.98 * evals[-2]["loss"]
    slow = recipe.optim.lr < USUAL_RATE[recipe.method][0] / 5  # more steps at such a rate are a waste of them
    if falling and gained:
        why = f", slowly, with the learning rate {recipe.optim.lr:g}, far below the usual one" if slow else ""
        yield made("underfitting", "warning",
                    f"Training ended too early: the loss still fell from {quarter:.3g} to {end:.3g} in the last "
                    f"quarter{why}.", recipe, still_falling=not slow, start=start, end=end,
                    lr=recipe.optim.lr)  # fmt: skip
    elif drop < 0.1 and end > 0.1 and recipe.optim.lr > 10 * USUAL_RATE[recipe.method][1]:
        yield made("learning_rate_edge", "warning",
                    f"The loss stuck at {end:.3g} (start {start:.3g}) with the learning rate {recipe.optim.lr:g}, over "
                    "ten times the usual one: it is too high to learn at.", recipe,
                    start=start, end=end, lr=recipe.optim.lr)  # fmt: skip
    elif drop < 0.1 and end > 0.1:
        yield made("underfitting", "warning",
                    f"Underfitting: the training loss fell by only {100 * max(drop, 0):.1f}%, from {start:.3g} to "
                    f"{end:.3g}; the learning rate {recipe.optim.lr:g} is too low or the adapter too small.", recipe,
                    still_falling=False, start=start, end=end, lr=recipe.optim.lr)  # fmt: skip
    elif end > _UNLEARNT:
        yield made("underfitting", "warning",
                    f"A token of the answers still costs {end:.3g} nats (start {start:.3g}), as much as a guess "
                    f"among {math.exp(min(end, 700)):,.0f} equally likely tokens.", recipe,
                    still_falling=True, start=start, end=end, lr=recipe.optim.lr)  # fmt: skip


def _unfinished(steps: Sequence[Record], recipe: Recipe) -> Iterator[Diagnosis]:
    at, total = int(steps[-1]["step"]), steps[-1].get("total")
    if total and at < total:
        yield made("unfinished", "info",
                   f"Training was stopped at step {at} of {total}: how far it would have come is not judged; the same "
                   "command goes on from there.", recipe, step=at, total=total)  # fmt: skip


def _warmup_steps(steps: Sequence[Record], recipe: Recipe) -> int:
    warmup = recipe.schedule.warmup
    return int(warmup if warmup >= 1 else warmup * int(steps[-1].get("total") or len(steps)))


def _plateau(steps: Sequence[Record], evals: Sequence[Record], recipe: Recipe) -> Iterator[Diagnosis]:
    if not steps:
        return
    steps = steps[_warmup_steps(steps, recipe) :]  # while the rate is still rising, a flat loss says nothing
    if len(steps) < 30:
        return
    levels = _Levels.of(steps)
    start, end, middle = levels.start, levels.end, levels.after(0.5)
    flat = middle - end < 0.01 * middle and end > 0.05
    held = [e["loss"] for e in evals if e["step"] >= steps[len(steps) // 2]["step"]]
    if flat and start - middle > 0.1 * start and (len(held) < 2 or held[0] - min(held) < 0.01 * held[0]):
        yield made("plateau", "info",
                   f"The loss has been flat at {end:.3g} since step {steps[len(steps) // 2]['step']}: the second half "
                   "of the training brought nothing; more or better rows would, more steps will not.", recipe,
                   level=end, since=steps[len(steps) // 2]["step"])  # fmt: skip


# What else was lost


def _forgetting(scores: Mapping[str, Any], recipe: Recipe) -> Iterator[Diagnosis]:
    loss, drift = scores.get("general_loss") or {}, scores.get("general_drift") or {}
    if "base" not in loss or "tuned" not in loss:
        return
    before, now = loss["base"], loss["tuned"]
    if now > 1.05 * before + 0.02:
        shift = ""
        if drift:
            shift = f", and {drift['changed']} of {drift['rows']} general answers changed"
        yield made("forgetting", "warning",
                    f"Forgetting: the loss on general data rose from {before:.3g} to {now:.3g}{shift}.", recipe,
                    before=before, after=now, drift=dict(drift))  # fmt: skip


def _over_time(evals: Sequence[Record], recipe: Recipe) -> Iterator[Diagnosis]:
    """Validity of generated validation answers, where evaluations measured it (evaluation.format_rows)."""
    known = [(e["step"], float(e["valid"])) for e in evals if e.get("valid") is not None]
    if len(known) < 2:
        return
    (best_at, best), (at, last) = max(known, key=lambda k: k[1]), known[-1]
    if best - last >= 0.1:
        yield made("broken_format", "warning",
                    f"The share of well-formed answers fell from {best:.0%} at step {best_at} to {last:.0%} at step "
                    f"{at}.", recipe, over_time=known)  # fmt: skip


def _dead(adapter: Mapping[str, float], recipe: Recipe) -> Iterator[Diagnosis]:
    """B starts at zero: what is still (next to) zero there was not trained."""
    if not adapter:
        return
    usual = median(adapter.values())
    dead = [name for name, norm in adapter.items() if not norm > max(1e-8, 1e-3 * usual)]
    if dead:
        shown = ", ".join(dead[:3]) + ("…" if len(dead) > 3 else "")
        yield made("dead_adapter", "error" if len(dead) == len(adapter) else "warning",
                    f"{len(dead)} of {len(adapter)} adapter modules were not trained ({shown}).", recipe,
                    dead=len(dead), modules=len(adapter), names=dead[:20], median_norm=usual)  # fmt: skip


class Watch:
    """Listens to a run's events, keeps its history, and says each new diagnosis once, as an event of its own."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.history = recipe, list[Record]()
        self._said: set[str] = set()
        self._next = 10

    def around(self, listen: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
        """A listener that hands every event on, each followed by a `diagnosis` event for what it showed."""

        def told(event: dict[str, Any]) -> None:
            listen(event)
            for found in self(event):
                listen({"kind": "diagnosis", **found.to_dict()})

        return told

    def __call__(self, event: Mapping[str, Any]) -> list[Diagnosis]:
        """The diagnoses that are new with this event. Judged at evaluations and at every tenth step, later rarer."""
        if event.get("kind") not in ("step", "eval"):
            return []
        self.history.append(event)
        if event["kind"] == "step" and len(self.history) < self._next:
            return []
        self._next = len(self.history) + max(10, len(self.history) // 20)
        new = [d for d in during(self.history, self.recipe) if d.code not in self._said]
        self._said |= {d.code for d in new}
        return new
