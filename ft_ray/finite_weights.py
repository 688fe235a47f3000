"""Whether all weights in a safetensors file are finite numbers, told from their bits: what asks needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

__all__ = ["not_finite"]

# By IEEE 754 a number is NaN or infinite where all bits of its exponent are set. Its bits shifted left by one, which
# drops the sign, are then at least these. Types of one byte say it in other ways, and are not looked at.
_BOUNDS: dict[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000 << 1),
    "F32": ("<u4", 0x7F80_0000 << 1),
    "F16": ("<u2", 0x7C00 << 1),
    "BF16": ("<u2", 0x7F80 << 1),
}
_PIECE = 1 << 20
"""Bytes looked at together: they stay in a core's cache between the shift and the search for the largest."""


def not_finite(path: Path) -> str | None:
    """The name of a tensor that holds NaN or infinite values; None where there is none.

    Raises safetensors.SafetensorError for a file that is damaged or cut short.
    """
    with safe_open(path, framework="numpy"):  # the library's own check of header and length
        pass
    data = np.memmap(path, dtype=np.uint8, mode="r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header: dict[str, Any] = json.loads(data[8:start].tobytes())
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in _BOUNDS:
            begin, end = (start + offset for offset in entry["data_offsets"])
            if not _all_finite(data[begin:end], *_BOUNDS[entry["dtype"]]):
                return name
    return None


def _all_finite(data: np.ndarray[Any, np.dtype[np.uint8]], kind: str, bound: int) -> bool:
    bits = data.view(kind)
    step = _PIECE // bits.itemsize
    shifted = np.empty(step, dtype=kind)
    for at in range(0, len(bits), step):
        piece = bits[at : at + step]
        if np.left_shift(piece, 1, out=shifted[: len(piece)]).max() >= bound:
            return False
    return True
