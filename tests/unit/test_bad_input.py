"""Bad input, one case each, through the command line: the sentence, the exit code, and nothing half-made."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ft_ray.cli import app
from tests import tiny
from tests.run_folders import run_folder

GOOD = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(20)]


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FT_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path


def nothing_staged(place: Path) -> None:
    assert not [p for pattern in (".staging-*", "*.tmp", "*.old") for p in place.rglob(pattern)], "half-made, left"


def run(place: Path, model: Path, data: str, verb: str = "train", **changes: Any) -> tuple[int, str]:
    """Exit code and stderr of a verb; asserts that no artifact of a run was left, in the storage or beside it."""
    before = {p.name for p in place.iterdir()}
    recipe = {
        "name": "bad",
        "model": {"id": str(model)},
        "data": {"train": [{"path": data}]},
        "resources": {"workers": 1, "gpus": 0},
        "storage": str(place / "runs"),
        **changes,
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    arguments = ["data", "check", "recipe.yaml"] if verb == "check" else [verb, "recipe.yaml"]
    result = CliRunner().invoke(app, arguments)
    nothing_staged(place)
    if (place / "runs").is_dir():
        assert not (place / "runs" / "bad").exists(), list((place / "runs" / "bad").iterdir())
    assert {p.name for p in place.iterdir()} <= before | {"recipe.yaml", "runs", "cache"}
    assert "Traceback" not in result.stderr
    return result.exit_code, " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion" "b"}\n', ["rows.jsonl:2:30"]),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n', ["rows.jsonl:2", "completion"]),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "  "}\n', ["rows.jsonl:2", "empty"]),
        (
            b'{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]}\n',
            ["rows.jsonl:1", "assistant"],
        ),
        (b'{"promt": "a", "completoin": "b"}\n', ["rows.jsonl:1", "promt"]),
        (b'{"prompt": "a\xff\xfe", "completion": "b"}\n', ["rows.jsonl:1:14", "byte 0xff is not UTF-8: save"]),
        (b"", ["rows.jsonl", "empty"]),
    ],
    ids=["malformed", "missing-answer", "empty-answer", "role-order", "unknown-field", "not-utf8", "empty-file"],
)
def test_a_bad_row_is_named_with_its_place(place: Path, tiny_model: Path, content: bytes, wanted: list[str]) -> None:
    file = place / "rows.jsonl"
    file.write_bytes(content)
    code, said = run(place, tiny_model, str(file))
    assert code == 2, said
    assert all(word in said for word in wanted), said


def test_all_rows_too_long(place: Path, tiny_model: Path) -> None:
    rows = [{"prompt": "x" * 500 + str(i), "completion": "y"} for i in range(20)]
    code, said = run(place, tiny_model, jsonl(place / "rows.jsonl", rows), sequence={"max_length": 64})
    assert code == 2 and "max_length" in said, said


def test_a_data_file_that_is_not_there(place: Path, tiny_model: Path) -> None:
    code, said = run(place, tiny_model, str(place / "nowhere.jsonl"))
    assert code == 2 and "nowhere.jsonl" in said, said


def test_fresh_removes_nothing_for_input_that_cannot_work(place: Path, tiny_model: Path) -> None:
    data = jsonl(place / "rows.jsonl", GOOD)
    recipe, store = run_folder(place / "runs", tiny_model, merged=False, data={"train": [{"path": data}]})
    with store.stage("adapter") as staged:
        (staging := staged / "adapter_model.safetensors").write_bytes(b"weights")
    assert not staging.exists() and store.verify("adapter") == []
    before = {p: p.read_bytes() for p in Path(store.path()).rglob("*") if p.is_file() and p.name != ".lock"}
    with open(data, "a") as file:
        file.write('{"prompt" "x"}\n')
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()), encoding="utf-8")
    result = CliRunner().invoke(app, ["train", "recipe.yaml", "--fresh"])
    assert result.exit_code == 2 and "rows.jsonl:21:11" in result.stderr, result.stderr
    after = {p: p.read_bytes() for p in Path(store.path()).rglob("*") if p.is_file() and p.name != ".lock"}
    assert after == before


def test_a_duplicate_key_in_the_recipe(place: Path) -> None:
    (place / "recipe.yaml").write_text("name: a\nmethod: lora\nmethod: full\n")
    result = CliRunner().invoke(app, ["train", "recipe.yaml"])
    assert result.exit_code == 2 and "recipe.yaml:3: duplicate key 'method'" in result.stderr
    assert [p.name for p in place.iterdir()] == ["recipe.yaml"], "something was made"


def test_an_unknown_recipe_key(place: Path, tiny_model: Path) -> None:
    code, said = run(place, tiny_model, jsonl(place / "rows.jsonl", GOOD), schedul={"epochs": 1})
    assert code == 2 and "unknown key 'schedul' (did you mean 'schedule'?)" in said


def test_files_that_an_evaluation_needs_come_at_once_with_their_lines(place: Path, tiny_model: Path) -> None:
    evaluation = {"metric": "my.py:score", "schema": "s.json", "forgetting": "general.jsonl"}
    code, said = run(place, tiny_model, jsonl(place / "rows.jsonl", GOOD), evaluation=evaluation)
    lines = (place / "recipe.yaml").read_text().splitlines()
    assert code == 2
    for key, file in (("metric", "my.py"), ("schema", "s.json"), ("forgetting", "general.jsonl")):
        (number,) = [n for n, line in enumerate(lines, 1) if line.strip().startswith(f"{key}:")]
        assert f"recipe.yaml:{number}: evaluation.{key}" in said and file in said, said


@pytest.mark.parametrize(("missing", "word"), [("*.safetensors", "weight"), ("tokenizer*", "tokenizer")])
def test_a_model_folder_that_lacks_something(place: Path, tiny_model: Path, missing: str, word: str) -> None:
    model = shutil.copytree(tiny_model, place / "model")
    for path in model.glob(missing):
        path.unlink()
    code, said = run(place, model, jsonl(place / "rows.jsonl", GOOD))
    assert code == 2 and word in said and str(model) in said, said


def test_a_model_that_is_nowhere(place: Path) -> None:
    code, said = run(place, Path("nowhere/at-all"), jsonl(place / "rows.jsonl", GOOD))
    assert code == 2 and "nowhere/at-all" in said and "HF_HUB_OFFLINE" in said, said


def test_weights_with_nan(place: Path, tiny_model: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny_model, place / "model")
    shard = sorted(model.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[3] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    code, said = run(place, model, jsonl(place / "rows.jsonl", GOOD))
    assert code == 2 and name in said and "NaN" in said, said


def test_a_lora_target_that_matches_no_module(place: Path, tiny_model: Path) -> None:
    code, said = run(place, tiny_model, jsonl(place / "d.jsonl", GOOD), lora={"targets": ["q_proj", "qproj"]})
    assert code == 2
    assert "lora.targets 'qproj' matches no linear module (did you mean 'q_proj'" in said and "up_proj" in said


def test_an_adapter_for_another_base(place: Path, tiny_model: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    model.save_pretrained(place / "adapter")
    other = tiny.build(place / "other", layers=1)
    data = jsonl(place / "rows.jsonl", GOOD)
    arguments = ["import", str(place / "adapter"), "--base", str(other), "--data", data]
    arguments += ["--storage", str(place / "runs")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "layers.1" in result.stderr, result.stderr
    assert not (place / "runs" / "adapter" / "adapter").exists()
    nothing_staged(place)


def test_importing_says_what_it_would_do_and_looks_at_the_data_before_it_makes_a_folder(
    place: Path, tiny_model: Path
) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    (place / "mine").mkdir()
    tensors = {f"{key}A.weight": np.ones((2, 64), np.float32), f"{key}B.weight": np.ones((64, 2), np.float32)}
    save_file(tensors, place / "mine" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (place / "mine" / "adapter_config.json").write_text(json.dumps(config))
    data = jsonl(place / "rows.jsonl", GOOD)
    arguments = ["import", "mine", "--base", str(tiny_model), "--storage", "runs", "--data"]
    said = CliRunner().invoke(app, [*arguments, data, "--dry-run"])
    assert said.exit_code == 0, said.stderr
    assert said.stdout.startswith("Would import mine into ") and "manifest" not in said.stdout
    value = json.loads(CliRunner().invoke(app, [*arguments, data, "--dry-run", "--json"]).stdout)
    assert value == {"would_import": "mine", "base": str(tiny_model), "would_write": "runs/mine"}
    for more in (["--dry-run"], []):
        gone = CliRunner().invoke(app, [*arguments, "nope.jsonl", *more])
        assert gone.exit_code == 2 and "nope.jsonl does not exist" in gone.stderr
    assert not (place / "runs").exists()


def test_rows_a_person_marked_bad_are_said(place: Path, tiny_model: Path) -> None:
    data = {"train": [{"path": jsonl(place / "r.jsonl", GOOD)}]}
    recipe = {"name": "r", "model": {"id": str(tiny_model)}, "data": data}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    arguments = ["data", "check", "recipe.yaml", "--json", "--review", "review.csv"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    with open(place / "review.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) > 10
    rows[1][rows[0].index("mark")] = "bad"
    for row in rows[2:]:
        row[rows[0].index("mark")] = "ok"
    with open(place / "review.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(rows)
    report = json.loads(CliRunner().invoke(app, arguments).stdout)
    (said,) = [f for f in report["findings"] if f["code"] == "review"]
    assert said["severity"] == "warning" and said["count"] == 1 and "r.jsonl:" in said["examples"][0]


def test_a_storage_that_cannot_be_written(place: Path, tiny_model: Path) -> None:
    data = jsonl(place / "rows.jsonl", GOOD)
    code, said = run(place, tiny_model, data, storage="/proc/nowhere")
    assert code == 1 and "/proc/nowhere" in said, said
    assert not (place / "runs").exists(), "written to another place than storage"
    (place / "runs").write_text("a file, no folder")
    code, said = run(place, tiny_model, data)
    assert code == 1 and str(place / "runs") in said, said
    assert (place / "runs").read_text() == "a file, no folder"
    assert not (place / "cache").exists() or not list((place / "cache").rglob("meta.json")), "tokenised for nothing"


_ON_FULL_DISKS = """
import json, os, subprocess, sys
from pathlib import Path
from typer.testing import CliRunner
from ft_ray.cli import app

told = {}
for disk in ("cache", "runs"):
    os.makedirs(disk, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    if disk == "runs":
        subprocess.run(["umount", "cache"], check=True)  # a large one from here on
        Path("runs/ballast").touch()
        with open("runs/ballast", "wb", buffering=0) as file:
            try:
                while file.write(b"x" * 4096):
                    pass
            except OSError:
                pass
    result = CliRunner().invoke(app, ["train", "recipe.yaml"])
    made = [p for p in Path(disk).rglob("*") if p.is_file() and p.name not in ("ballast", ".lock")]
    left = [str(p) for p in made if p.parent.name != "inspected"]  # a whole record, of the model and not of the data
    told[disk] = [result.exit_code, " ".join(result.stderr.split()), left]
print(json.dumps(told))
"""


@pytest.mark.faults
def test_a_full_disk(place: Path, tiny_model: Path) -> None:
    """File systems of 64 KiB, mounted in a namespace of our own: needs no root, and breaks nothing of the machine."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody make a mount namespace")
    rows = [{"prompt": f"question {i} " + "x" * 50, "completion": "answer"} for i in range(2000)]
    recipe = {
        "name": "bad", "model": {"id": str(tiny_model)}, "data": {"train": [{"path": jsonl(place / "r.jsonl", rows)}]},
        "storage": str(place / "runs"),
    }  # fmt: skip
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = subprocess.run(
        [*alone, sys.executable, "-c", _ON_FULL_DISKS], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    for disk, (code, said, left) in json.loads(done.stdout.splitlines()[-1]).items():
        assert code == 1 and "no space left at" in said and f"{place}/{disk}" in said, said
        assert left == [], f"half-made on the full {disk} disk"


def test_a_missing_optional_package(place: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, said = run(place, tiny_model, jsonl(place / "rows.jsonl", GOOD), tracking={"to": ["wandb"]})
    assert code == 2 and "pip install 'ft-ray[" in said and "wandb" in said, said


def test_comparing_a_run_that_was_not_measured(place: Path, tiny_model: Path) -> None:
    _, store = run_folder(place / "runs", tiny_model, merged=False)
    Path(store.path("predictions.jsonl")).unlink()
    done = CliRunner().invoke(app, ["compare", "support", "support"])
    assert done.exit_code == 2 and "support has not been measured on its test split" in done.stderr, done.stderr
