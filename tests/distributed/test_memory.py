"""A rank's memory does not grow with the data set: shards are memory-mapped, and only the rows in use are read."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ft_ray import base_model, dataset
from ft_ray.chat import chat_of
from tests.parity.test_training import make

pytestmark = [pytest.mark.faults, pytest.mark.heavy]

# Anonymous memory: mapped pages of a file belong to the kernel's cache and go when somebody needs the room.
_RANK = """
import sys
from pathlib import Path
from ft_ray.prepared_data import Prepared
from tests.distributed.test_memory import recipe_for
from tests.parity.test_training import Recorder, build
from ft_ray import sft

model, folder = Path(sys.argv[1]), Path(sys.argv[2])
prepared = Prepared.open(folder)
trainer = build(recipe_for(model), Recorder(folder.parent), prepared)
sft.run(trainer)
status = Path("/proc/self/status").read_text().splitlines()
print(len(prepared.tokens("train")), next(int(line.split()[1]) for line in status if line.startswith("RssAnon")))
"""


def recipe_for(model: Path, path: str = "x"):  # type: ignore[no-untyped-def]
    return make(model, data={"train": [{"path": path}], "split": {"validation": 0.002, "test": 0.002}},
                sequence={"max_length": 512}, schedule={"max_steps": 4})  # fmt: skip


def rows(path: Path, count: int) -> Path:
    rng = random.Random(count)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            answer = " ".join(str(rng.randrange(10**6)) for _ in range(40))
            file.write(json.dumps({"prompt": f"row {i}", "completion": answer}) + "\n")
    return path


def test_ten_times_the_rows_take_no_more_memory(tiny_model: Path, tmp_path: Path) -> None:
    measured = []
    for count in (3_000, 30_000):
        made = recipe_for(tiny_model, str(rows(tmp_path / f"{count}.jsonl", count)))
        files = base_model.resolve(made.model)
        prepared = dataset.prepare(made, chat_of(made.model, files.folder), model_hash="m", cache=tmp_path / "cache")
        size = sum(p.stat().st_size for p in Path(prepared.folder).rglob("*") if p.is_file())
        done = subprocess.run(
            [sys.executable, "-c", _RANK, str(tiny_model), str(prepared.folder)],
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        kept, anonymous = (int(word) for word in done.stdout.split()[-2:])
        measured.append((kept, size, anonymous * 1024))
    (few, small, before), (many, large, after) = measured
    print(f"rows {few} -> {many}, on disk {small / 1e6:.0f} -> {large / 1e6:.0f} MB, "
          f"a rank's memory {before / 1e6:.0f} -> {after / 1e6:.0f} MB")  # fmt: skip
    assert many > 9 * few
    assert large - small > 60e6, "the data would be seen"
    assert after - before < 0.25 * (large - small)
