"""The recipe: strict, all faults at once with their lines, overrides, hashes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ft_ray import recipe as recipes
from ft_ray.errors import RecipeError

GOOD = """\
name: support-8b
model: {id: meta-llama/Llama-3.1-8B-Instruct, revision: 0e9e39f}
data:
  train: [{path: s3://acme/support.jsonl}, {path: general.jsonl, weight: 0.1}]
  split: {validation: 0.1, test: 0.1}
method: qlora
lora: {r: 16, alpha: 32, dropout: 0.05, targets: all-linear}
quantization: {type: nf4, double: true}
sequence: {max_length: 2048, packing: true}
batch: {global: 16, per_device: auto}
optim: {name: paged_adamw_8bit, lr: 2e-4}
schedule: {type: cosine, warmup: 0.03, epochs: 3}
precision: bf16
evaluation: {every: 0.1, metric: metrics.py:score, mode: max, early_stop: 3, forgetting: general_eval.jsonl}
checkpoint: {every: 10m, keep: 2}
resources: {workers: 1, gpus: 1}
budget: {hours: 6, usd: 25}
storage: s3://acme/ft
promote: manual
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def faults(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipes.load(write(folder, text), overrides)
    assert caught.value.exit_code == 2
    return caught.value.faults


def test_the_recipe_a_user_wants_to_write_loads(tmp_path: Path) -> None:
    recipe = recipes.load(write(tmp_path, GOOD)).recipe
    assert recipe.optim.lr == pytest.approx(2e-4) and isinstance(recipe.optim.lr, float)
    assert recipe.batch.global_ == 16
    assert recipe.data.train[1].weight == 0.1
    assert recipe.run_path == "s3://acme/ft/support-8b"


def test_all_faults_come_at_once_with_lines_and_nearest_names(tmp_path: Path) -> None:
    text = (
        GOOD.replace("dropout: 0.05", "dropot: 0.05")
        .replace("type: cosine", "type: cosinus")
        .replace("epochs", "epoch")
    )
    found = faults(tmp_path, text)
    assert len(found) == 3
    assert any(":7: unknown key 'lora.dropot' (did you mean 'dropout'?)" in f for f in found)
    assert any(":12: 'schedule.type'" in f and "'cosinus'" in f for f in found)
    assert any(":12: unknown key 'schedule.epoch' (did you mean 'epochs'?)" in f for f in found)


def test_unknown_key_inside_a_list_names_its_line(tmp_path: Path) -> None:
    (found,) = faults(tmp_path, GOOD.replace("weight: 0.1", "wieght: 0.1"))
    assert ":4: unknown key 'data.train[1].wieght' (did you mean 'weight'?)" in found


def test_cross_key_and_duplicate_faults_come_with_the_others(tmp_path: Path) -> None:
    text = GOOD.replace("global: 16", "global: 15").replace("workers: 1", "workers: 2").replace("cosine", "cosinus")
    text = text.replace("name: paged_adamw_8bit", "name: paged_adamw_8bits")
    text = text.replace("gpus: 1", "gpus: 1, sharding: zero3")
    found = faults(tmp_path, text + "optin: {}\nmethod: full\n")
    lines = [fault.split("recipe.yaml:")[1].split(":")[0] for fault in found]
    assert lines == ["10", "11", "12", "16", "20", "21"], found
    assert "batch.global 15 does not divide among 2 workers" in found[0]
    assert "transformers has no such optimizer (did you mean 'paged_adamw_8bit'?)" in found[1]
    assert "'cosinus'" in found[2] and "shards the weights of method full" in found[3]
    assert "unknown key 'optin'" in found[4] and "duplicate key 'method'" in found[5]


def test_a_value_that_is_wrong_itself_makes_no_second_fault(tmp_path: Path) -> None:
    text = GOOD.replace("global: 16", "global: x").replace("workers: 1", "workers: 3")
    (found,) = faults(tmp_path, text)
    assert "'batch.global'" in found


def test_the_place_of_a_value_is_known_after_loading(tmp_path: Path) -> None:
    recipe = recipes.load(write(tmp_path, GOOD), ["evaluation.max_rows=9"]).recipe
    assert recipes.place_of(recipe, "evaluation.metric").endswith("recipe.yaml:14")
    assert recipes.place_of(recipe, "evaluation.max_rows") == "override"
    assert recipes.place_of(recipes.from_dict({**recipe.to_dict(), "seed": 5}), "evaluation.metric") == ""


def test_the_optimizers_are_those_of_transformers() -> None:
    from transformers.training_args import OptimizerNames

    from ft_ray.recipe_sections import OPTIMIZERS

    assert set(OPTIMIZERS) == {str(o.value) for o in OptimizerNames}


@pytest.mark.parametrize(
    ("given", "meant"),
    [("adamw", "adamw_torch"), ("Adam", "adamw_torch"), ("AdamW-8bit", "adamw_8bit"),
     ("paged_adamw", "paged_adamw_32bit"), ("adamw_tourch", "adamw_torch"), ("adam_w", "adamw_torch"),
     ("PagedAdamW8bit", "paged_adamw_8bit"), ("adamw_hf", "adamw_torch")],
)  # fmt: skip
def test_an_optimizer_is_suggested_by_what_people_call_it(tmp_path: Path, given: str, meant: str) -> None:
    (found,) = faults(tmp_path, GOOD.replace("paged_adamw_8bit", given))
    assert f"transformers has no such optimizer (did you mean {meant!r}?), not {given!r}" in found


def test_duplicate_key_is_an_error_with_both_lines(tmp_path: Path) -> None:
    (found,) = faults(tmp_path, GOOD + "method: lora\n")
    assert ":20: duplicate key 'method', first set on line 6" in found


def test_broken_yaml_names_line_and_column(tmp_path: Path) -> None:
    (found,) = faults(tmp_path, "name: a\nmodel: {id: [}\n")
    assert "recipe.yaml:2:" in found and "not valid YAML" in found


def test_not_utf8_and_missing_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        recipes.load(file)
    with pytest.raises(RecipeError, match="cannot be read"):
        recipes.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E3", 1000.0),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("010", 10),
        ("~", None),
        ("1_000", 1000),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    from ft_ray.strict_yaml import parse

    assert parse(text, "x").value == value


def test_overrides_replace_values_and_are_recorded(tmp_path: Path) -> None:
    overrides = ["optim.lr=1e-3", "lora.targets=[q_proj, v_proj]", "data.train[0].path=x"]
    loaded = recipes.load(write(tmp_path, GOOD), overrides)
    assert loaded.recipe.optim.lr == 1e-3
    assert loaded.recipe.lora.targets == ("q_proj", "v_proj")
    assert loaded.recipe.data.train[0].path == "x"
    assert loaded.origins["optim.lr"] == "override"
    assert loaded.origins["lora.r"].endswith(":7")


def test_lists_are_rendered_item_by_item_with_their_own_origins(tmp_path: Path) -> None:
    import yaml

    from ft_ray.views import rendered

    loaded = recipes.load(write(tmp_path, GOOD), ["data.train[0].path=foo", "lora.targets=[q_proj, v_proj]"])
    text = rendered(loaded)
    assert recipes.from_dict(yaml.safe_load(text)) == loaded.recipe
    (path,) = [line for line in text.splitlines() if "path: " in line and "foo" in line]
    assert path.endswith("# override") and path.lstrip().startswith("- path:")
    (weight,) = [line for line in text.splitlines() if "weight: 0.1 " in line]
    assert weight.endswith("recipe.yaml:4")
    (split,) = [line for line in text.splitlines() if line.lstrip().startswith("split: ")][:1]
    assert split.endswith("# default")
    (target,) = [line for line in text.splitlines() if "q_proj" in line]
    assert target.endswith("# override")


def test_a_malformed_override_hides_no_other_fault(tmp_path: Path) -> None:
    found = faults(tmp_path, GOOD, "lora.rr=8", "optm.lr=3", "foo")
    assert len(found) == 3
    assert "'foo'" in found[0] and "write key=value" in found[0]
    assert {"'lora.rr'", "'optm'"} <= {fault.split("key ")[1].split("; ")[0].split(" ")[0] for fault in found[1:]}


def test_bad_overrides_are_named(tmp_path: Path) -> None:
    found = faults(tmp_path, GOOD, "optim.lr", "data.train[9].path=x")
    assert "write key=value" in found[0] and "data.train[9].path" in found[1]
    (found_value,) = faults(tmp_path, GOOD, "lora.dropout=1.5")
    assert found_value.startswith("override: 'lora.dropout'")
    (found_section,) = faults(tmp_path, GOOD, "deepspeed.nope=1")
    assert found_section.startswith("override: 'deepspeed': DeepSpeed has no key 'nope'")


def test_equal_meaning_gives_equal_hash(tmp_path: Path) -> None:
    a = recipes.load(write(tmp_path, GOOD)).recipe
    b = recipes.load(write(tmp_path, GOOD.replace("lr: 2e-4", "lr: 0.0002"))).recipe
    c = recipes.load(write(tmp_path, GOOD.replace("lr: 2e-4", "lr: 0.0003"))).recipe
    assert a.hash == b.hash != c.hash
    assert recipes.from_dict(a.to_dict()).hash == a.hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("global: 16, per_device: auto", "global: 16, per_device: 3"), "is not workers 1 x per_device 3"),
        (("workers: 1", "workers: 3"), "does not divide among 3 workers"),
        (("workers: 1", "workers: 4, min_workers: 2"), "does not divide among 3 workers"),
        (("workers: 1", "workers: 2, min_workers: 3"), "min_workers 3 is more than workers 2"),
        (("workers: 1", "workers: 2, min_workers: 1"), "set budget.hours instead"),
        (("validation: 0.1, test: 0.1", "validation: 0.5, test: 0.5"), "leave no training rows"),
        (("every: 10m", "every: 10 minutes"), "not a duration"),
        (("revision: 0e9e39f", "trust_remote_code: true"), "needs a pinned revision"),
        (("name: support-8b", "name: a b"), "'name': use letters, digits, '.', '_' and '-', a letter or digit first"),
        (("early_stop: 3", "lm_eval: {tasks: []}"), "'evaluation.lm_eval.tasks': give at least 1 item."),
        (("promote: manual", "deepspeed: {nope: 1}"), "'deepspeed': DeepSpeed has no key 'nope'"),
        (("promote: manual", "serving: {replicas: 2}"), "replicas 2 is more than max_replicas 1"),
        (("metrics.py:score", "exact_mach"), "unknown metric (did you mean 'exact_match'?)"),
        (("dropout: 0.05", "LoraR: 4"), ":7: unknown key 'lora.LoraR'"),
        (("dropout: 0.05", "r2: 4"), ":7: unknown key 'lora.r2' (did you mean 'r'?)"),
        (("{global: 16", "{global_: 16"), "unknown key 'batch.global_' (did you mean 'global'?)"),
        (("early_stop: 3", "schema_: a.json"), "unknown key 'evaluation.schema_' (did you mean 'schema'?)"),
    ],
)
def test_values_that_do_not_fit_together(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in GOOD
    assert any(message in f for f in faults(tmp_path, GOOD.replace(*change, 1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("targets: all-linear", "targets: 5"), "'lora.targets': input should be a valid string or a list, not 5."),
        (("targets: all-linear", "targets: [q_proj, 5]"), "'lora.targets[1]': input should be a valid string, not 5."),
        (("per_device: auto", "per_device: x"), "input should be a valid integer or 'auto', not 'x'."),
        (("{path: general.jsonl, weight: 0.1}", "{weight: 1}"), "'data.train[1].path' is missing: add it."),
        (("method: qlora", "method: 4"), "'method': input should be 'full', 'lora' or 'qlora', not 4."),
        (("optim: {name: paged_adamw_8bit, lr: 2e-4}", "optim: 3"), "'optim': input should be a mapping, not 3."),
    ],
)
def test_one_fault_is_said_once(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in GOOD
    (found,) = faults(tmp_path, GOOD.replace(*change, 1))
    assert found.endswith(message)


def test_the_built_in_metrics_are_the_ones_that_exist() -> None:
    from ft_ray.metrics import BUILT_IN
    from ft_ray.recipe_sections import METRICS

    assert set(METRICS) == set(BUILT_IN)
