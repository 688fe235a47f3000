"""Every shipped search space loads, fits the shipped recipes, and says what it is for and how it is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from ft_ray import recipe, search_space

FOLDER = Path(__file__).resolve().parents[2] / "tune_spaces"
FILES = sorted(FOLDER.rglob("*.yaml"))


def test_all_are_seen() -> None:
    assert {"lora", "lora_small", "lora_lr"} <= {file.stem for file in FILES}
    assert not [f for f in FOLDER.rglob("*") if f.is_file() and f.suffix != ".yaml"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
@pytest.mark.parametrize("on", ["lora", "qlora_8b"])
def test_fits_the_recipes_shares_one_base_and_says_its_command(file: Path, on: str) -> None:
    base = recipe.load(on).recipe
    loaded = search_space.load(file)
    search_space.check(loaded, base)
    packed = base.sequence.packing and "data.fraction" in loaded.space.search  # each share is packed anew
    assert bool(search_space.unshared(loaded.space, base)) == packed
    points = search_space.points(loaded.space, base)
    assert loaded.space.budget.trials in (None, len(points))
    for point in points:
        search_space.apply(base, point)
    head = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(f"ft-ray sweep RECIPE --space tune_spaces/{file.name}" in line for line in head)


def test_the_main_space_is_what_it_promises() -> None:
    search = search_space.load("lora").space.search
    assert (min(search["lora.r"].ends()), max(search["lora.r"].ends())) == (8, 128)
    assert (min(search["lora.alpha"].ends()), max(search["lora.alpha"].ends())) == (16, 256)
    assert search["lora.dropout"].ends() == [0, 0.1]
    for name in ("lora", "lora_small", "lora_lr"):
        first = search_space.points(search_space.load(name).space, recipe.load("lora").recipe)[0]
        assert first["lora.alpha"] == 2 * first["lora.r"], "the rule of thumb comes first"
