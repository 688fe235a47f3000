"""Where a running process spends its time: CPU seconds, page faults and switches of each thread, and py-spy's samples.

    python benchmarks/watch.py PID [--seconds 10]      # py-spy comes with ray[default]; it needs root, or the same user

Two processes that do the same work at different speed are watched one after the other and compared line by line.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

COLUMNS = ("user s", "system s", "page faults", "waits", "pre-empted")
TICKS = os.sysconf("SC_CLK_TCK")


def threads(pid: int) -> dict[str, tuple[str, list[float]]]:
    """Name and counters of each thread, by its number."""
    found = {}
    for folder in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it may end meanwhile
            stat, status = (folder / "stat").read_text(), (folder / "status").read_text()
            fields = stat.rsplit(")", 1)[1].split()
            switches = [int(n) for n in re.findall(r"voluntary_ctxt_switches:\s+(\d+)", status)]
            counters = [int(fields[11]) / TICKS, int(fields[12]) / TICKS, int(fields[7]), *switches]
            found[folder.name] = stat[stat.index("(") + 1 : stat.rindex(")")], counters
    return found


def samples(file: Path) -> Counter[str]:
    """How often each line was the innermost of a sampled stack, threads that waited left out."""
    found: Counter[str] = Counter()
    for line in file.read_text().splitlines():
        stack, count = line.rsplit(" ", 1)
        found[stack.split(";")[-1]] += int(count)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pid", type=int)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--lines", type=int, default=25)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        raw, spy = Path(scratch) / "samples", None
        if shutil.which("py-spy"):
            command = ["py-spy", "record", "--pid", str(given.pid), "--rate", "100", "--duration", str(given.seconds),
                       "--format", "raw", "--threads", "--nonblocking", "--output", str(raw)]  # fmt: skip
            spy = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, began = threads(given.pid), time.monotonic()
        time.sleep(given.seconds)
        after, seconds = threads(given.pid), time.monotonic() - began
        none = ("", [0.0] * len(COLUMNS))
        rows = [
            (name, number, [b - a for a, b in zip(before.get(number, none)[1], now, strict=True)])
            for number, (name, now) in after.items()
        ]
        rows.sort(key=lambda row: -row[2][0] - row[2][1])
        print(f"{seconds:.1f} s, {len(rows)} threads\n{'thread':24}" + "".join(f"{name:>13}" for name in COLUMNS))
        for name, number, change in rows[:10]:
            print(f"{name[:15]:15} {number:8}" + "".join(f"{value:13.6g}" for value in change))
        if spy is not None and spy.wait(60) == 0 and raw.exists():
            found = samples(raw)
            print(f"\n{sum(found.values())} samples, the innermost line")
            for line, count in found.most_common(given.lines):
                print(f"{count:6}  {line[-110:]}")


if __name__ == "__main__":
    main()
