"""docs/guide.md: every mapped key exists with the value told, every YAML snippet loads, every verb is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ft_ray import recipe, strict_yaml
from ft_ray.reference import keys, reference

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "guide.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```yaml\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
ROWS = re.findall(r"^\| ([^|]+) \| `([^`|]+)` \| `([^`|]+)` \| `([^`|]+)` \|$", GUIDE, re.MULTILINE)
SETTINGS = {
    "lora.r", "lora.alpha", "lora.targets", "lora.dropout", "lora.bias", "quantization.type", "quantization.double",
    "quantization.compute_dtype", "schedule.epochs", "batch.per_device", "batch.global", "optim.lr",
    "optim.weight_decay", "schedule.warmup", "schedule.type", "evaluation.every", "checkpoint.every", "precision",
    "gradient_checkpointing", "optim.name", "tracking.to", "sequence.max_length", "sequence.packing",
}  # fmt: skip
VERBS = {
    "init", "data", "config", "plan", "train", "merge", "evaluate", "compare", "runs", "promote", "serve", "run",
    "import", "fetch", "demo", "doctor", "sweep", "diagnose", "report", "export", "rollback",
}  # fmt: skip


def at(value: Any, key: str) -> Any:
    for part in key.split("."):
        value = value[part]
    return value


def test_every_setting_of_the_source_guide_is_mapped() -> None:
    mapped = [key for _, _, key, _ in ROWS]
    assert set(mapped) >= SETTINGS
    assert len(mapped) == len(set(mapped))


@pytest.mark.parametrize(("key", "value"), [(key, value) for _, _, key, value in ROWS], ids=[r[2] for r in ROWS])
def test_a_mapped_key_exists_and_the_8b_recipe_has_its_value(key: str, value: str) -> None:
    assert key in keys()
    loaded = recipe.load("qlora_8b")
    said = strict_yaml.parse(value, "guide.md").value
    assert at(loaded.recipe.to_dict(), key) == said
    assert any(k == key or k.startswith(f"{key}[") for k in loaded.origins), "left to the default"


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_every_snippet_loads(snippet: str) -> None:
    whole = {"name": "guide", "model": {"id": "base"}, "data": {"train": [{"path": "rows.jsonl"}]}}
    given = strict_yaml.parse(snippet, "guide.md").value
    assert given and recipe.from_dict({**whole, **given}).to_dict()


def test_keys_named_in_the_text_exist() -> None:
    sections = {key.split(".")[0] for key in keys()}
    named = {
        word.split(":")[0]
        for word in re.findall(r"`([a-z_]+\.[a-z_]+(?:: [a-z_-]+)?)`", GUIDE)
        if word.split(".")[0] in sections and not word.endswith((".yaml", ".py"))
    }
    assert len(named) > 20 and not named - set(keys())


def test_every_verb_is_told_and_no_other() -> None:
    assert set(re.findall(r"\bft-ray ([a-z]+)", GUIDE)) == VERBS


def test_there_are_snippets_and_links_lead_somewhere() -> None:
    assert len(SNIPPETS) >= 8
    for target in re.findall(r"\]\(([^)]+)\)", GUIDE):
        file, _, anchor = target.partition("#")
        page = DOCS / (file or "guide.md")
        assert page.exists(), target
        headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M) if anchor else []
        anchors = {re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, target


def test_the_reference_is_current() -> None:
    written = (DOCS / "reference.md").read_text(encoding="utf-8")
    assert written == reference(), "run: ft-ray config reference > docs/reference.md"
    for key in keys():
        assert f"| `{key.rpartition('.')[2]}` |" in written
