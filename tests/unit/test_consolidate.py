"""From the ranks' pieces to a model: one parameter is in memory at a time, however many there are."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ft_ray.consolidate import consolidate
from ft_ray.state_files import Index, write_index

LAYERS, SIZE = 40, 1 << 20  # 4 MB each, 160 MB in all


def own_memory() -> int:
    """Bytes of this process that are not pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def test_no_process_holds_the_whole_model(tmp_path: Path) -> None:
    checkpoint, base, out = (tmp_path / name for name in ("checkpoint", "base", "out"))
    for folder in (checkpoint, base, out):
        folder.mkdir()
    half = SIZE // 2
    for rank in (0, 1):
        held = {f"weight/{i}@{rank * half}": torch.full((half,), 2.0 * i + rank) for i in range(LAYERS)}
        save_file(held, checkpoint / f"state-0000{rank}-of-00002.safetensors")
        del held
    index = Index({str(i): [1024, 1024] for i in range(LAYERS)}, [], {}, "AdamW", "zero3", 2, {}, [])
    write_index(checkpoint, index)
    (base / "config.json").write_text('{"model_type": "llama"}')
    consolidate_once = base / "warm"  # whatever a first call allocates for good
    consolidate_once.mkdir()
    consolidate(checkpoint, base, consolidate_once)

    before, seen, over = own_memory(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            seen.append(own_memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    counts = consolidate(checkpoint, base, out, max_shard_bytes=50_000_000)
    over.set()
    watcher.join()
    assert len(seen) > 20 and max(seen) < 6 * 4 * SIZE, "a few parameters, of forty"
    assert counts == {"tensors": LAYERS, "bytes": 4 * SIZE * LAYERS, "shards": 4}
    places = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for i in (0, 17, LAYERS - 1):
        with safe_open(out / places[str(i)], "pt") as file:
            tensor = file.get_tensor(str(i))
        assert tensor.shape == (1024, 1024)
        assert tensor[0, 0] == 2.0 * i and tensor[-1, -1] == 2.0 * i + 1
