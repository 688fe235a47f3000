"""Models that cannot be used are refused with the reason, before any training starts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ft_ray import base_model, finite_weights, lora, merging, model_loading, recipe
from ft_ray.base_model import ModelFiles
from ft_ray.errors import ModelError
from ft_ray.recipe import Model


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def resolve(folder: Path) -> ModelFiles:
    return base_model.resolve(Model(id=str(folder)))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def test_a_good_model_is_hashed_by_content(model: Path, tmp_path: Path) -> None:
    files = resolve(model)
    assert files.config["model_type"] == "llama"
    assert resolve(model).hash == files.hash
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    assert resolve(copy).hash == files.hash, "the same content elsewhere is the same model"
    state = load_file(first_shard(copy))
    name = next(iter(state))
    state[name] = state[name] + 1
    save_file(state, first_shard(copy), metadata={"format": "pt"})
    assert resolve(copy).hash != files.hash


def test_another_model_of_the_same_size_and_time_is_not_taken_for_the_one_before(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    weights, stamp = next(copy.glob("*.safetensors")), 1_000_000_000
    os.utime(weights, ns=(stamp, stamp))  # as an image gives it to every file
    before = resolve(copy).hash
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stamp, stamp))
    assert resolve(copy).hash != before


def test_no_weights(model: Path) -> None:
    for path in [*model.glob("*.safetensors"), model / "model.safetensors.index.json"]:
        path.unlink()
    with pytest.raises(ModelError, match=r"has no weights in .*: fetch the model again"):
        resolve(model)
    (model / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"pickled weights only"):
        resolve(model)


def test_missing_shard_is_named(model: Path) -> None:
    gone = first_shard(model)
    gone.unlink()
    with pytest.raises(ModelError, match=rf"1 of \d+ weight files are missing .*{gone.name}"):
        resolve(model)


def test_no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer"):
        resolve(model)


def test_no_config(model: Path) -> None:
    (model / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"is not valid JSON"):
        resolve(model)
    (model / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config.json"):
        resolve(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_with_nan_name_the_tensor(model: Path, dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) for k, v in load_file(first_shard(model)).items()}
    name = sorted(state)[0]
    state[name].view(-1)[5] = float("nan")
    save_file(state, first_shard(model), metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"tensor '{name}' .* holds NaN or infinite values"):
        resolve(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_found_wherever_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    file, many = tmp_path / "one.safetensors", 2 * finite_weights._PIECE // dtype.itemsize + 3
    largest, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 2
    fine = torch.tensor([largest, -largest, least, -least, 0.0, -0.0], dtype=dtype).repeat(many // 6 + 1)[:many]
    others = {"int": torch.full((4,), -1), "empty": torch.empty(0, dtype=dtype), "odd": torch.ones(5).to(torch.uint8)}
    save_file({"fine": fine, **others}, file)
    assert finite_weights.not_finite(file) is None
    for at in (0, finite_weights._PIECE // dtype.itemsize, many - 1):
        for value in (float("nan"), float("inf"), -float("inf")):
            broken = fine.clone()
            broken[at] = value
            save_file({"fine": fine, "broken": broken, **others}, file)
            assert finite_weights.not_finite(file) == "broken"


def test_a_truncated_file_is_refused(model: Path) -> None:
    data = first_shard(model).read_bytes()
    first_shard(model).write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=r"is not a whole safetensors file"):
        resolve(model)


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a folder"):
        base_model.resolve(Model(id=str(tmp_path / "absent")))


def test_a_hub_id_that_cannot_be_one() -> None:
    with pytest.raises(ModelError, match=r"neither an existing folder nor a hub id"):
        base_model.resolve(Model(id="a/b/c"))


# Adapters


def recipe_for(folder: Path, **values: object) -> recipe.Recipe:
    base = {"name": "t", "model": {"id": str(folder)}, "data": {"train": [{"path": "x"}]}, "precision": "fp32"}
    return recipe.from_dict({**base, **values})


def test_targets_name_what_exists(tiny_model: Path) -> None:
    made = recipe_for(tiny_model)
    loaded = model_loading.load_model(resolve(tiny_model), made, device="cpu", quantized=False)
    every = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert lora.targets(loaded, "all-linear") == every
    assert lora.targets(loaded, "attention") == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert lora.targets(loaded, ("q_proj", "v_proj")) == ["q_proj", "v_proj"]
    with pytest.raises(ModelError, match=r"'qproj' matches no linear module \(did you mean 'q_proj'\?\).*down_proj"):
        lora.targets(loaded, ("v_proj", "qproj"))
    with pytest.raises(ModelError, match=r"output head"):
        lora.targets(loaded, ("lm_head",))


def test_an_adapter_for_another_base_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    made = recipe_for(tiny_model, lora={"r": 4})
    files = resolve(tiny_model)
    adapted = lora.attach(model_loading.load_model(files, made, device="cpu", quantized=False), made)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero before training, and an adapter that changes nothing is refused too
            torch.nn.init.constant_(parameter, 0.01)
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter)
    merging.check_fits(adapter, files)

    record = {"base": {"source": "another/model", "hash": "0" * 64}}
    (adapter / "ft_ray.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ModelError, match=r"was trained on another/model"):
        merging.check_fits(adapter, files)
    (adapter / "ft_ray.json").unlink()

    state = load_file(adapter / "adapter_model.safetensors")
    wide = {k: torch.zeros(4, 96) if "q_proj.lora_A" in k else v for k, v in state.items()}
    save_file(wide, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"is \[64, 64\] there and \[64, 96\] in the adapter"):
        merging.check_fits(adapter, files)
    renamed = {k.replace("q_proj", "query"): v for k, v in state.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"query.weight'.* does not have"):
        merging.check_fits(adapter, files)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapter_model.safetensors is missing"):
        merging.check_fits(adapter, files)


def test_a_model_in_object_storage_is_fetched_once_and_again_when_it_changes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setenv("FT_RAY_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(str(model), "/base-models/tiny", recursive=True)
    fetched: list[str] = []
    get_file = type(memory).get_file

    def counted(self: object, path: str, *args: object, **options: object) -> None:
        fetched.append(path)
        get_file(self, path, *args, **options)

    monkeypatch.setattr(type(memory), "get_file", counted)
    first = base_model.resolve(Model(id="memory://base-models/tiny"))
    assert first.hash == resolve(model).hash and fetched
    count = len(fetched)
    assert base_model.resolve(Model(id="memory://base-models/tiny")).folder == first.folder
    assert len(fetched) == count, "downloaded a second time"
    shard = first_shard(model)
    save_file({k: v + 1 for k, v in load_file(shard).items()}, shard, metadata={"format": "pt"})
    memory.put_file(str(shard), f"/base-models/tiny/{shard.name}")
    again = base_model.resolve(Model(id="memory://base-models/tiny"))
    assert again.folder != first.folder and again.hash == resolve(model).hash != first.hash
    memory.rm("/base-models", recursive=True)
    with pytest.raises(ModelError, match=r"memory://base-models/tiny has no config.json"):
        base_model.resolve(Model(id="memory://base-models/tiny"))


def test_a_quantized_base_on_a_cpu_leaves_its_file(tiny_model: Path, tmp_path: Path) -> None:
    """A single view of the mapped 16-bit weights would keep all of them in the resident set."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")  # models of other tests map the original
    made = recipe.from_dict({"name": "t", "model": {"id": str(folder)}, "data": {"train": [{"path": "x"}]}})
    loaded = model_loading.load_model(base_model.resolve(made.model), made, device="cpu", quantized=True)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    assert mapped == [] and model_loading.count_quantized(loaded) > 0
