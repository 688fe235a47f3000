"""Optimizer states on NVMe: the numbers and the checkpoints of states in host memory, and resumed bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from ft_ray import nvme
from tests import tiny
from tests.distributed.ranks import Job, run
from tests.distributed.test_zero3 import full

LACKING = nvme.missing()
GROUP = 400_000  # elements of a rank's share, after which a sub-group ends
PIPELINED = {"pipeline_read": True, "pipeline_write": True, "buffer_count": 12}


def model(folder: Path, vocabulary: int = 320) -> Path:
    """3.3 million parameters: a rank's share is several sub-groups above the 1 MiB from which DeepSpeed swaps."""
    tiny.build(folder)
    for path in folder.glob("model*"):
        path.unlink()
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def offload(**values: Any) -> dict[str, Any]:
    return {"zero_optimization": {"sub_group_size": GROUP, **({"offload_optimizer": values} if values else {})}}


@contextmanager
def watched(folder: Path) -> Iterator[dict[str, int]]:
    """The largest size that each file below `folder` had meanwhile."""
    sizes: dict[str, int] = {}
    end = threading.Event()

    def watch() -> None:
        while not end.wait(0.02):
            for path in folder.rglob("*.swp"):
                try:
                    size = path.stat().st_size
                except FileNotFoundError:
                    continue
                sizes[str(path)] = max(size, sizes.get(str(path), 0))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        end.set()
        thread.join()


@pytest.mark.faults
@pytest.mark.skipif(bool(LACKING), reason=LACKING)
@pytest.mark.timeout(1200)  # DeepSpeed compiles async_io once for a machine: minutes
def test_states_on_nvme_train_save_and_resume_as_those_in_memory(tmp_path: Path) -> None:
    base, disk, folder = model(tmp_path / "model"), tmp_path / "disk", tmp_path / "two"
    host = full(base, resources={"offload_optimizer": True}, deepspeed=offload())
    swapped = full(base, deepspeed=offload(device="nvme", nvme_path=str(disk)))
    pipelined = full(base, deepspeed=offload(device="nvme", nvme_path=str(disk), **PIPELINED))
    middle = str(folder / "swapped" / "step-4")
    jobs = [
        Job("host", host),
        Job("swapped", swapped),
        Job("resumed", swapped, resume=middle),
        Job("pipelined", pipelined, resume=middle),
        Job("to_host", host, resume=middle),
        Job("from_host", swapped, resume=str(folder / "host" / "step-4")),
    ]
    with watched(disk) as sizes:
        done = run(folder, 2, jobs)
    assert not list(disk.iterdir()), "a run that has ended leaves nothing there"
    states = {path: size for path, size in sizes.items() if "gradient" not in path}
    for rank in (0, 1):
        mine = [path for path in states if f"/rank-{rank}/" in path]
        assert sum("exp_avg-" in path for path in mine) >= 3 * 2, "sub-groups of each of two runs' folders"
        assert sum(states[path] for path in mine) > 0.9 * 3 * 4 * 3_300_000 / 2, "weights and both moments of its share"
    assert all("error" not in result for result in done.values()), done
    assert len(done["host"]["losses"]) == 8
    for name, result in done.items():
        assert result["losses"] == done["host"]["losses"][-len(result["losses"]) :], name
        assert result["norms"] == pytest.approx(done["host"]["norms"][-len(result["norms"]) :], abs=1e-6), name
        for rank in (0, 1):
            _same(folder / name / "step-8", folder / "host" / "step-8", f"state-0000{rank}-of-00002.safetensors")


def _same(one: Path, other: Path, file: str) -> None:
    values, wanted = load_file(one / file), load_file(other / file)
    assert set(values) == set(wanted) and any(name.startswith("exp_avg_sq/") for name in values)
    for name, value in values.items():
        assert value.equal(wanted[name]), f"{one / file}: {name}"


@pytest.mark.faults
@pytest.mark.skipif(bool(LACKING), reason=LACKING)
@pytest.mark.timeout(1200)
def test_what_deepspeed_would_read_to_the_wrong_place_ends_the_run(tmp_path: Path) -> None:
    base = model(tmp_path / "model", 259)  # what lies behind this embedding is at no multiple of 512 bytes
    settings = full(base, deepspeed=offload(device="nvme", nvme_path=str(tmp_path / "disk")))
    done = run(tmp_path / "two", 2, [Job("odd", settings)])["odd"]
    assert "no multiple of 512 bytes" in done["error"] and "resources.offload_optimizer: true" in done["error"]
    assert not list(done["folder"].glob("step-*")), "and nothing of it is kept"
