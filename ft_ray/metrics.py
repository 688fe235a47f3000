"""Scores of one answer against its reference, and intervals of their means.

A metric is a function `score(prediction, reference, row) -> float | dict[str, float]`; the user's own comes
from `file.py:function`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ft_ray.errors import InputError
from ft_ray.strict_yaml import nearest

__all__ = [
    "BUILT_IN", "Metric", "Score", "bootstrap", "exact_match", "interval", "json_match", "json_valid", "load_schema",
    "metric", "paired_bootstrap", "parse_json", "wilson",
]  # fmt: skip

Score = Callable[[str, str, Mapping[str, Any]], float | dict[str, float]]

_Z95 = 1.959963984540054  # the 97.5% point of the normal distribution
_RESAMPLES = 2000


def exact_match(prediction: str, reference: str, row: Mapping[str, Any] | None = None) -> float:
    """1 when both are the same text up to white space."""
    return float(" ".join(prediction.split()) == " ".join(reference.split()))


def parse_json(text: str) -> tuple[bool, Any]:
    """(whether `text` is JSON and nothing else, its value). NaN and Infinity are not JSON, nor is a repeated key."""

    def refuse(name: str) -> Any:
        raise ValueError(name)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({k for k, _ in pairs}) != len(pairs):
            raise ValueError("repeated key")
        return dict(pairs)

    try:
        return True, json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return False, None


def json_valid(prediction: str, reference: str = "", row: Mapping[str, Any] | None = None) -> float:
    """1 when the whole answer parses as JSON."""
    return float(parse_json(prediction)[0])


def json_match(prediction: str, reference: str, row: Mapping[str, Any] | None = None) -> dict[str, float]:
    """json_match: 1 when both parse to equal values; field.NAME: the same for each top-level field of the reference.

    1 and 1.0 are equal, true and 1 are not. Raises InputError when the reference is not JSON.
    """
    known, expected = parse_json(reference)
    if not known:
        raise InputError(f"json_match needs references that are JSON, not {reference[:60]!r}: use exact_match.")
    valid, value = parse_json(prediction)
    scores = {"json_match": float(valid and _same(value, expected))}
    if isinstance(expected, dict):
        for name, want in expected.items():
            has = valid and isinstance(value, dict) and name in value
            scores[f"field.{name}"] = float(has and _same(value[name], want))
    return scores


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


BUILT_IN: dict[str, Score] = {"exact_match": exact_match, "json_match": json_match, "json_valid": json_valid}


class Metric:
    """The recipe's metric with what is measured beside it: exact match always, JSON figures where answers are JSON,
    `schema_valid` where a JSON schema is given. `primary` names the figure that decides."""

    def __init__(self, name: str, function: Score, *, schema: Mapping[str, Any] | None = None) -> None:
        self.name, self.function, self.primary = name, function, name
        self._validator: Any = None
        if schema is not None:
            import jsonschema

            self._validator = jsonschema.validators.validator_for(schema)(schema)

    def __call__(self, prediction: str, reference: str, row: Mapping[str, Any]) -> dict[str, float]:
        own = self._own(prediction, reference, row)
        scores = {**own, "exact_match": exact_match(prediction, reference)}
        is_json, expected = parse_json(reference)
        if is_json and isinstance(expected, dict | list):
            scores |= {"json_valid": json_valid(prediction), **json_match(prediction, reference)}
        if self._validator is not None:
            valid, value = parse_json(prediction)
            scores["schema_valid"] = float(valid and self._validator.is_valid(value))
        return scores | own

    def _own(self, prediction: str, reference: str, row: Mapping[str, Any]) -> dict[str, float]:
        try:
            result = self.function(prediction, reference, row)
        except InputError:
            raise
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise InputError(
                f"metric {self.name} failed at {place.filename}:{place.lineno} "
                f"({type(error).__name__}: {error}) on the answer {prediction[:60]!r}."
            ) from error
        scores = {self.name: result} if isinstance(result, bool | int | float) else result
        bad = not isinstance(scores, dict) or not scores or not all(
            isinstance(k, str) and isinstance(v, bool | int | float) and math.isfinite(v) for k, v in scores.items()
        )  # fmt: skip
        if bad:
            raise InputError(f"metric {self.name} returned {result!r}: return a finite number or a dict of them.")
        if self.name not in scores:
            self.primary = next(iter(scores))
        return {k: float(v) for k, v in scores.items()}


def metric(name: str, *, schema: str | Path | None = None) -> Metric:
    """The metric `name`: a built-in, or `file.py:function`. `schema`: a JSON schema file. Raises InputError."""
    loaded = load_schema(schema) if schema is not None else None
    if ".py:" in name or name.endswith(".py"):
        file, _, function = name.rpartition(":") if ".py:" in name else (name, "", "score")
        return Metric(function, _from_file(file, function), schema=loaded)
    if name not in BUILT_IN:
        raise InputError(
            f"evaluation.metric {name!r} is unknown{nearest(name, BUILT_IN)}: "
            f"use {', '.join(BUILT_IN)} or file.py:function."
        )
    return Metric(name, BUILT_IN[name], schema=loaded)


def _from_file(file: str, function: str) -> Score:
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"evaluation.metric: the file {file} does not exist (seen from {Path.cwd()}).")
    # Named by content: a file edited between two runs of one process is loaded anew.
    name = f"ft_ray_metric_{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InputError(f"evaluation.metric: {file}:{error.lineno}: {error.msg}.") from error
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        place = f"{file}:{lines[-1] if lines else 1}"
        raise InputError(f"evaluation.metric: {place}: {type(error).__name__}: {error}.") from error
    found = getattr(module, function, None)
    if not callable(found):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise InputError(f"evaluation.metric: {file} has no function {function!r}{nearest(function, names)}.")
    score: Score = found
    return score


def load_schema(path: str | Path) -> dict[str, Any]:
    """A JSON schema file, itself checked. Raises InputError."""
    import jsonschema

    try:
        schema: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except (OSError, ValueError) as error:
        raise InputError(f"evaluation.schema {path} cannot be read ({error}): give a JSON schema file.") from error
    except jsonschema.SchemaError as error:
        place = error.json_path
        raise InputError(f"evaluation.schema {path} is not a JSON schema: {error.message} at {place}.") from error
    return schema


# Intervals


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # The bounds at 0 and n successes are 0 and 1 exactly; rounding must not say otherwise.
    return 0.0 if successes == 0 else max(0.0, centre - half), 1.0 if successes == n else min(1.0, centre + half)


def bootstrap(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean (2,000 resamples, seeded)."""
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    # A chunk of resamples at a time: 2,000 x n indices of a large test set would not fit.
    step = max(1, 4_000_000 // len(data))
    means = np.concatenate([
        data[rng.integers(0, len(data), (min(step, _RESAMPLES - at), len(data)))].mean(1)
        for at in range(0, _RESAMPLES, step)
    ])  # fmt: skip
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def interval(values: Sequence[float], *, seed: int = 0) -> dict[str, float | int]:
    """{value: the mean, low, high, n}: Wilson for 0/1 values, bootstrap for others."""
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    binary = all(v in (0.0, 1.0) for v in values)
    low, high = wilson(sum(values), n) if binary else bootstrap(values, seed=seed)
    return {"value": mean, "low": low, "high": high, "n": n}


def paired_bootstrap(differences: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the mean of row-wise differences: rows are drawn, so pairs stay together."""
    return bootstrap(differences, seed=seed)
