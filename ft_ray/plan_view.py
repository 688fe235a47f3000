"""A plan as tables and sentences for a person; the same values go out as JSON elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from ft_ray.console import duration, table

__all__ = ["plan_tables"]

_GIB = 2**30


def plan_tables(value: dict[str, Any]) -> Iterator[Table | str]:
    """`estimate.Plan` as JSON: memory by part, the cards it was tried on, what is cheapest, and what else it serves."""
    yield f"{value['method']} of {value['parameters']:,} parameters, {value['trained_parameters']:,} trained"
    yield _memory(value)
    yield from _cards(value["options"])
    yield f"Host memory {_gib(value['memory']['host'])}, disk {_gib(value['disk'])} (base, checkpoints and result)."
    yield _cheapest(value["cheapest"])
    if value["sweep"] is not None:
        yield _sweep(value["sweep"])
    if value["serving"] is not None:
        yield _serving(value["serving"])
    yield from (*value["advice"], *value["notes"])


def _gib(size: int) -> str:
    return f"{size / _GIB:,.1f} GiB"


def _memory(value: dict[str, Any]) -> Table:
    parts = {k: v for k, v in value["memory"].items() if isinstance(v, int | float) and k != "host"}
    rows = [[part.replace("_", " "), f"{size / _GIB:.2f}"] for part, size in parts.items() if size]
    rows.append(["in all", f"{value['total'] / _GIB:.2f}"])
    return table("Memory of one device", ["part", "GiB"], rows)


def _cards(options: list[dict[str, Any]]) -> Iterator[Table | str]:
    """The table, and what its last column stands for: changes in full would not fit a terminal."""
    rows, notes = [], dict[str, str]()
    for option in options:
        time, usd = _time_and_cost(option)
        rows.append([
            f"{option['count']} x {option['gpu']}", "yes" if option["fits"] else "no",
            f"{option['needed'] / _GIB:.1f} of {option['available'] / _GIB:.1f}",
            f"{option['tokens_per_second']:,.0f}", time, usd,
            notes.setdefault(how, chr(ord("a") + len(notes))) if (how := _how(option)) else "",
        ])  # fmt: skip
    yield table("Cards", ["card", "fits", "GiB", "tokens/s", "time", "US$", "note"], rows)
    yield from (f"{letter}: {how}" for how, letter in notes.items())


def _how(option: dict[str, Any]) -> str:
    """Why it does not fit, or what it takes to fit: a reason is never hidden behind changes that do not help."""
    if not option["fits"]:
        return str(option["reason"])
    host = f"{_gib(option['host'])} host memory" if any("offload" in c for c in option["changes"]) else ""
    return ", ".join(filter(None, [*option["changes"], host]))


def _time_and_cost(option: dict[str, Any]) -> tuple[str, str]:
    time = "-" if option["seconds"] is None else duration(option["seconds"])
    return time, "-" if option["usd"] is None else f"{option['usd']:.2f}"


def _cheapest(option: dict[str, Any] | None) -> str:
    if option is None:
        return "Cheapest that fits: none of the table, in any number up to 8."
    time, usd = _time_and_cost(option)
    each = f"${option['usd_per_million_tokens']:.2f} a million tokens"
    price = f"{time}, ${usd}" if option["usd"] is not None else each
    how = _how(option) or "as the recipe says"
    return f"Cheapest that fits: {option['count']} x {option['gpu']}, {_gib(option['needed'])} a card, {price}; {how}."


def _sweep(plan: dict[str, Any]) -> str:
    gains = ", ".join(f"{k} at once {gain:g}" for k, gain in plan["gains"].items())
    if not plan["adapters_at_once"]:
        return f"A sweep on one {plan['gpu']} does not fit: not one adapter has room beside the base."
    said = f"A sweep on one {plan['gpu']} holds {plan['adapters_at_once']} adapters at once beside the base"
    if not plan["worthwhile"]:
        return f"{said}, which gains no time here: a step of one keeps the card busy."
    return f"{said}; times as fast as one after another: {gains}."


def _serving(plan: dict[str, Any]) -> str:
    if not plan["concurrent_requests"]:
        return f"Served on one {plan['gpu']}: no room, the weights are {_gib(plan['weights'])}."
    token = f"{plan['kv_bytes_per_token'] / 1024:,.0f} KiB a token"
    return (
        f"Served on one {plan['gpu']}: weights {_gib(plan['weights'])}, KV cache {token}, "
        f"{plan['request_bytes'] / _GIB:.2f} GiB a request of {plan['length']:,} tokens; "
        f"{plan['concurrent_requests']:,} such requests at once."
    )
