"""Memory of this machine, within the limit of its container."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["total_and_free"]


def total_and_free() -> tuple[int, int]:
    """Bytes in all, and bytes that programs can still take: what the system can give back of its file cache counts."""
    values = dict(re.findall(r"(\w+):\s+(\d+) kB", _read("/proc/meminfo")))
    total, free = (int(values.get(key, 0)) * 1024 for key in ("MemTotal", "MemAvailable"))
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit() and int(limit) < total:
        used = int(_read("/sys/fs/cgroup/memory.current").strip() or 0)
        cached = re.search(r"^inactive_file (\d+)", _read("/sys/fs/cgroup/memory.stat"), re.M)
        total = int(limit)
        free = min(free, total - used + (int(cached[1]) if cached else 0))
    return total, free


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
