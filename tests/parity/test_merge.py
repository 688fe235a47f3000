"""The streaming merge against PEFT's own, on tiny models: bit for bit, tied or not, and what must be refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ft_ray import merging
from ft_ray.base_model import ModelFiles, resolve
from ft_ray.chat import Chat, load_tokenizer
from ft_ray.errors import ModelError
from ft_ray.merging import merge
from ft_ray.model_loading import cure_cpu_faults
from ft_ray.parity import heldout_loss
from ft_ray.recipe import Model, Quantization
from tests import tiny
from tests.parity.test_training import make
from tests.token_rows import TokenRows

LINEAR = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(3, 99).view(4, 24)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    made: dict[tuple[str, bool], Path] = {}

    def get(dtype: str = "float32", tied: bool = False) -> Path:
        if (dtype, tied) not in made:
            folder = tmp_path_factory.mktemp("base") / "model"
            made[dtype, tied] = tiny.build(folder, dtype=dtype, tied=tied)
        return made[dtype, tied]

    return get


def load(folder: Path, dtype: str = "auto", **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def make_adapter(base: Path, out: Path, *, seed: int = 1, size: float = 0.02, **options: Any) -> Path:
    """An adapter with random weights in every trainable tensor, saved by PEFT."""
    options = {"target_modules": LINEAR, "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(load(base), LoraConfig(**options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * size
    model.save_pretrained(out)
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def assert_equal_to_peft(base: Path, adapter: Path, out: Path, *, but: tuple[str, ...] = ()) -> None:
    adapted = PeftModel.from_pretrained(load(base), adapter).eval()
    expected = adapted.merge_and_unload(safe_merge=False).state_dict()
    merged = load(out).state_dict()
    assert merged.keys() == expected.keys()
    assert [n for n in expected if n not in but and not torch.equal(merged[n], expected[n])] == []


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all-linear rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.self_attn.v_proj": 32}},
    "embedding": {"target_modules": [*LINEAR, "embed_tokens"]},
    "embedding dora": {"target_modules": [*LINEAR, "embed_tokens"], "use_dora": True},
    "head saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_equals_peft_bit_for_bit_and_the_adapter_by_logits(
    bases: Callable[..., Path], tmp_path: Path, case: str, tied: bool, dtype: str
) -> None:
    base = bases(dtype, tied)
    adapter = make_adapter(base, tmp_path / "adapter", **CASES[case])
    counts = merge(base, adapter, tmp_path / "out", max_shard_bytes=100_000)
    assert counts["shards"] > 1
    # Tied embeddings with an adapter on one end: PEFT changes the other end too, which the adapter does not.
    but = ("lm_head.weight",) if tied and case.startswith("embedding") else ()
    assert_equal_to_peft(base, adapter, tmp_path / "out", but=but)
    adapted = logits(PeftModel.from_pretrained(load(base), adapter).eval())
    merged = logits(load(tmp_path / "out"))
    close = 1e-5 if dtype == "float32" else 0.02
    torch.testing.assert_close(merged, adapted, rtol=0, atol=close)
    assert (logits(load(base)) - adapted).abs().max() > 3 * close


def test_chain_adapter_merged_saved_again_reloaded_differs_from_base(
    bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases("float32", False)
    adapter = make_adapter(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "out")
    merged = load(tmp_path / "out")
    merged.save_pretrained(tmp_path / "again")
    again, adapted = load(tmp_path / "again"), PeftModel.from_pretrained(load(base), adapter).eval()
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=0, atol=1e-5)
    assert torch.equal(logits(again), logits(merged))
    assert (logits(again) - logits(load(base))).abs().max() > 1e-3
    # Without its adapter the wrapped model is the base again.
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(load(base)))


@pytest.mark.parametrize("targets", [["c_attn", "c_fc"], ["attn.c_proj"]], ids=["wide", "square"])
def test_conv1d_weights_are_stored_transposed(tmp_path: Path, tiny_model: Path, targets: list[str]) -> None:
    torch.manual_seed(0)
    base = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=259, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(base)
    borrow_tokenizer(tiny_model, base)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=targets, fan_in_fan_out=True)
    merge(base, adapter, tmp_path / "out")
    assert_equal_to_peft(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True, "target_modules": ["q_proj"]}],
    ids=["bias all", "bias lora_only", "lora_bias"],
)
def test_trained_biases(tmp_path: Path, tiny_model: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    base = tmp_path / "qwen"
    config = Qwen2Config(vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, eos_token_id=2)  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    borrow_tokenizer(tiny_model, base)
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    merge(base, adapter, tmp_path / "out")
    assert_equal_to_peft(base, adapter, tmp_path / "out")


def borrow_tokenizer(source: Path, target: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, target / name)


def test_added_tokens_grow_the_vocabulary(bases: Callable[..., Path], tmp_path: Path) -> None:
    base = bases("float32", False)
    model = load(base)
    model.resize_token_embeddings(263)
    wrapped = get_peft_model(model, LoraConfig(target_modules=LINEAR, modules_to_save=["embed_tokens", "lm_head"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    wrapped.save_pretrained(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out")
    merged = load(tmp_path / "out")
    assert merged.config.vocab_size == 263
    torch.testing.assert_close(logits(merged), logits(wrapped.eval()), rtol=0, atol=1e-5)


# QLoRA: two bases


def four_bit(folder: Path, adapter: Path | None, quantized: bool) -> Any:
    if not quantized:
        return load(folder, "float32")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = load(folder, "float32", quantization_config=config, device_map={"": "cpu"})
    cure_cpu_faults(model)
    return PeftModel.from_pretrained(model, adapter).eval()


def test_dequantized_base_is_what_the_training_forward_computed_with(
    bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases("float32", True)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])  # the others are 4-bit as well
    counts = merge(base, adapter, tmp_path / "out", base_mode="dequantized", quantization=Quantization())
    assert counts["dequantized"] == 14  # 7 linear layers in 2 blocks; the head is tied and stays as it is
    torch.testing.assert_close(
        logits(load(tmp_path / "out")), logits(four_bit(base, adapter, True)), rtol=0, atol=1e-5
    )


def test_the_closer_base_is_kept_and_both_are_recorded(bases: Callable[..., Path], tmp_path: Path) -> None:
    base = bases("float32", False)
    adapter = make_adapter(base, tmp_path / "adapter")
    rows = list(TokenRows().tokens("validation"))
    out = tmp_path / "out"
    found = merging.choose_base(base, adapter, out, rows, four_bit, quantization=Quantization())
    assert found["base_mode"] == "dequantized"
    assert found["candidates"].keys() == {"full", "dequantized"}
    assert found["kl"] == found["candidates"]["dequantized"]["kl"] < 1e-6
    assert found["candidates"]["full"]["kl"] > 10 * found["kl"]
    assert found["top1"] == 1.0
    assert found["tokens"] == sum(label != -100 for row in rows for label in row["labels"])
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    torch.testing.assert_close(logits(load(out)), logits(four_bit(base, adapter, True)), rtol=0, atol=1e-5)


def test_a_gpu_without_room_leaves_the_merge_to_the_cpu(
    bases: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases("float32", False)
    adapter = make_adapter(base, tmp_path / "adapter")
    tried: list[str] = []

    def full(*args: Any, device: str, **options: Any) -> dict[str, Any]:
        tried.append(device)
        if device == "cpu":
            return merge(*args, device=device, **options)
        (args[2] / "half").mkdir(parents=True)  # what it had written by then
        raise torch.OutOfMemoryError("CUDA out of memory")

    def adapted(folder: Path, with_adapter: Path | None, quantized: bool) -> Any:
        model = load(folder)
        return model if with_adapter is None else PeftModel.from_pretrained(model, with_adapter).eval()

    monkeypatch.setattr(merging, "merge", full)
    said: list[str] = []
    out, rows = tmp_path / "out", list(TokenRows().tokens("validation"))
    merging.choose_base(base, adapter, out, rows, adapted, quantization=None, device="cuda", say=said.append)
    assert tried == ["cuda", "cpu"] and any("merging on the CPU" in one for one in said)
    assert not (out / "half").exists()
    assert_equal_to_peft(base, adapter, out)


# What travels


def test_tokenizer_template_and_every_end_token_travel(bases: Callable[..., Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases("float32", False), base)
    (base / "LICENSE").write_text("terms")
    adapter = make_adapter(base, tmp_path / "adapter")
    borrow_tokenizer(base, adapter)
    (adapter / "chat_template.jinja").write_text(tiny.CHATML + "{# trained #}")
    (adapter / "ft_ray.json").write_text(json.dumps({"eos_ids": [0, 2]}))
    out = tmp_path / "out"
    merge(base, adapter, out)
    assert load_tokenizer(out).chat_template.endswith("{# trained #}")
    assert sorted(json.loads((out / "generation_config.json").read_text())["eos_token_id"]) == [0, 2]
    assert Chat(load_tokenizer(out)).eos_ids == {0, 2}
    assert (out / "LICENSE").read_text() == "terms"
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_template_without_a_tokenizer_beside_the_adapter_wins_too(bases: Callable[..., Path], tmp_path: Path) -> None:
    base = bases("float32", False)
    adapter = make_adapter(base, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text(tiny.CHATML + "{# trained #}")
    merge(base, adapter, tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").chat_template.endswith("{# trained #}")


def test_memory_is_a_few_tensors_not_the_model(tmp_path: Path, tiny_model: Path) -> None:
    base, layers = tmp_path / "base", 24
    config = json.loads((tiny_model / "config.json").read_text()) | {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": layers, "head_dim": 128,
    }  # fmt: skip
    shutil.copytree(tiny_model, base, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    (base / "config.json").write_text(json.dumps(config))
    shapes = {"self_attn.q_proj": (512, 512), "mlp.gate_proj": (1408, 512), "mlp.up_proj": (1408, 512),
              "mlp.down_proj": (512, 1408)}  # fmt: skip
    adapter, index = {}, {}
    for layer in range(layers):
        names = {f"model.layers.{layer}.{n}.weight": torch.randn(s) for n, s in shapes.items()}
        save_file(names, base / f"model-{layer:05d}.safetensors")
        index |= dict.fromkeys(names, f"model-{layer:05d}.safetensors")
        for name, shape in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            adapter[f"{key}.lora_A.weight"] = torch.randn(8, shape[1])
            adapter[f"{key}.lora_B.weight"] = torch.randn(shape[0], 8)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    write_adapter(tmp_path / "adapter", adapter)
    del names, adapter
    size = sum(p.stat().st_size for p in base.glob("*.safetensors"))
    merge(base, tmp_path / "adapter", tmp_path / "warm", max_shard_bytes=20_000_000)  # imports and allocator
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak that VmHWM reports
    counts = merge(base, tmp_path / "adapter", tmp_path / "out", max_shard_bytes=20_000_000)
    assert counts["bytes"] > 200_000_000
    assert counts["shards"] >= 10
    # Measured 30 to 60 MB: tensors in flight, and what the allocator keeps of them.
    assert status("VmHWM") - before < 0.35 * size
    assert max(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")) < 21_000_000


def status(field: str) -> int:
    """A field of this process in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": LINEAR, **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


# What is refused


@pytest.fixture
def adapter(bases: Callable[..., Path], tmp_path: Path) -> Path:
    return make_adapter(bases("float32", False), tmp_path / "adapter")


def edit(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def poison(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def zero(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


def overflow(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.fill_(3e38)


def rename(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("q_proj", "q_prox")] = tensors.pop(name)


def halve(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(next(name for name in tensors if "lora_B" in name))


def flatten(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name].flatten()[:0]


def widen(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    tensors[name] = torch.ones(8, 96)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (poison, "NaN or infinite values: training diverged"),
        (zero, "changes nothing"),
        (overflow, "the merged tensor .* holds NaN or infinite"),
        (rename, r"q_prox.weight' \(did you mean .*q_proj.weight.*does not have"),
        (halve, "has no lora_B"),
        (flatten, "without gathering"),
        (widen, r"does not fit .*q_proj.weight' is \[64, 64\] there and \[64, 96\]"),
    ],
)
def test_damaged_adapters_are_refused(
    bases: Callable[..., Path], adapter: Path, tmp_path: Path, change: Any, words: str
) -> None:
    edit(adapter, change)
    with pytest.raises(ModelError, match=words):
        merge(bases("float32", False), adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("peft_type", "IA3", "peft_type 'IA3'"),
        ("target_parameters", ["mlp.experts"], "target_parameters"),
        ("trainable_token_indices", [3], "trainable_token_indices"),
        ("alora_invocation_tokens", [3], "alora_invocation_tokens"),
        ("layer_replication", [[0, 2]], "layer_replication"),
        ("some_new_method", {"x": 1}, "some_new_method"),
        ("init_lora_weights", "pissa", "changed the base's weights"),
        ("r", 4, "rank 8"),
        ("use_dora", True, "DoRA magnitude"),
        ("target_modules", ["q_proj", "lm_head"], "target_modules 'lm_head', which .* holds no tensor of it"),
        ("modules_to_save", ["lm_head"], "modules_to_save 'lm_head', which .* holds no tensor of it"),
    ],
)
def test_what_merge_does_not_compute_is_refused_by_name(
    bases: Callable[..., Path], adapter: Path, tmp_path: Path, key: str, value: Any, words: str
) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ModelError, match=words):
        merge(bases("float32", False), adapter, tmp_path / "out")


def test_a_listed_name_that_the_base_does_not_have_was_never_trained(
    bases: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    """PEFT takes one list of names for several families of models."""
    path = adapter / "adapter_config.json"
    names = {"target_modules": [*LINEAR, "c_attn"], "modules_to_save": ["score"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    assert merge(bases("float32", False), adapter, tmp_path / "out")["updated"] > 0


def test_an_empty_adapter_is_taken_when_asked_for(bases: Callable[..., Path], adapter: Path, tmp_path: Path) -> None:
    base = bases("float32", False)
    edit(adapter, zero)
    merge(base, adapter, tmp_path / "out", allow_empty=True)
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(base)))


def test_pickled_weights_and_quantized_bases_are_refused(
    bases: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases("float32", False), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="gptq weights, into which nothing can be merged"):
        merge(base, adapter, tmp_path / "out")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="could run code when loaded"):
        merge(base, adapter, tmp_path / "out")


def test_a_weight_file_cut_short_is_refused(bases: Callable[..., Path], adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases("float32", False), base)
    victim = sorted(base.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        merge(base, adapter, tmp_path / "out")


# Adapters made elsewhere


def files_of(folder: Path) -> ModelFiles:
    return resolve(Model(id=str(folder)))


def test_an_adapter_made_elsewhere_is_normalised(
    bases: Callable[..., Path], adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = bases("float32", False)

    def elsewhere(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("model.model.", "model._orig_mod.model.").replace(".weight", ".default.weight")] = (
                tensors.pop(name)
            )

    before = load_file(adapter / "adapter_model.safetensors")
    edit(adapter, elsewhere)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "acme/other-1b-bnb-4bit"}))
    out = tmp_path / "imported"
    found = merging.import_adapter(adapter, files_of(base), out)
    assert found["modules"] == 6
    assert "names the base acme/other-1b-bnb-4bit" in caplog.text
    after = load_file(out / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    record = json.loads((out / "ft_ray.json").read_text())
    assert record["template_hash"] == Chat(load_tokenizer(base)).template_hash
    assert record["base"]["hash"] == files_of(base).hash
    merge(base, out, tmp_path / "out")
    assert_equal_to_peft(base, out, tmp_path / "out")


def test_an_adapter_of_another_base_is_refused(bases: Callable[..., Path], adapter: Path, tmp_path: Path) -> None:
    base = files_of(bases("float32", False))
    (adapter / "ft_ray.json").write_text(json.dumps({"base": {"source": "acme/1b", "hash": "f" * 64}}))
    with pytest.raises(ModelError, match="was trained on acme/1b"):
        merging.check_fits(adapter, base)
    (adapter / "ft_ray.json").unlink()
    edit(adapter, widen)
    with pytest.raises(ModelError, match="give that base"):
        merging.check_fits(adapter, base)


def test_a_tokenizer_larger_than_the_model_is_refused(
    bases: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    base = bases("float32", False)
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(ModelError, match="260 tokens, the model 259"):
        merging.import_adapter(adapter, files_of(base), tmp_path / "imported")


@pytest.mark.parametrize("mixed_up", [False, True])
def test_a_full_model_has_the_validation_loss_that_training_measured(
    bases: Callable[..., Path], tmp_path: Path, mixed_up: bool
) -> None:
    """A copy always equals what it copies: that the ranks' shares were put together rightly only a loss can tell."""
    base, trained, out = bases(), tmp_path / "model", tmp_path / "out"
    model = load(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.0 if "norm" in name else 30.0)  # so that its answers depend on every weight
    shutil.copytree(base, trained, ignore=shutil.ignore_patterns("model*"))
    model.save_pretrained(trained)
    rows = TokenRows()
    measured = heldout_loss(model, rows.tokens("validation"), 4)
    if mixed_up:
        weights = load_file(trained / "model.safetensors")
        one, other = (f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1))
        weights[one], weights[other] = weights[other], weights[one]
        save_file(weights, trained / "model.safetensors", metadata={"format": "pt"})
    (trained / "ft_ray.json").write_text(json.dumps({"validation_loss": measured}))
    made = make(base, method="full")
    files, chat, said = resolve(made.model), Chat(load_tokenizer(base), None), list[str]()
    out.mkdir()

    def stage() -> dict[str, Any]:
        return merging.merge_stage(
            made, files, chat, rows, trained, out, on_event=lambda e: said.append(e["message"]), device="cpu"
        )

    if mixed_up:
        with pytest.raises(ModelError, match=rf"validation loss is [\d.]+, where training measured {measured:.4f}"):
            stage()
        return
    found = stage()
    assert found["kl"] == 0
    assert found["validation_loss"] == pytest.approx(found["validation_loss_trained"], abs=1e-3) == measured
    assert said[-1] == "measuring the written model's validation loss"
