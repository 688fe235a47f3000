"""The shared base against what it promises: packed equals alone, alone equals PEFT, faults stay with their owner."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, PreTrainedModel, get_scheduler

from ft_ray import frozen_base, objective, stacked_linear, token_loss
from ft_ray.dropout_masks import Dropout
from ft_ray.errors import InputError, ModelError
from ft_ray.segments import MicroBatch, build_layout
from ft_ray.shared_base import AdapterConfig, DataOrder, SharedBase, StepResult
from tests import tiny

K, STEPS = 8, 10

CONFIGS = {
    f"t{i}": AdapterConfig(
        total_steps=STEPS,
        r=(4, 8, 16, 32)[i % 4],
        alpha=(8, 16, 64)[i % 3],
        dropout=(0.0, 0.1, 0.05)[i % 3],
        lr=(1e-3, 3e-3, 5e-4, 1e-2)[i % 4],
        schedule=("cosine", "linear", "constant")[i % 3],  # type: ignore[arg-type]
        warmup=(0.0, 2.0)[i % 2],
        rslora=i == 3,
        targets="attention" if i == 5 else "all-linear",
        seed=i,
    )
    for i in range(K)
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("tiny"))


def load(folder: Path, dtype: str = "float32", **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options)
    return model


def load_nf4(folder: Path) -> PreTrainedModel:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return load(folder, quantization_config=quantization)


def batch(seed: int, rows: int | None = None) -> MicroBatch:
    """Random sequences of 5 to 24 tokens, the first part of each untrained; rows vary with the seed."""
    rng = random.Random(seed)
    sequences = []
    for _ in range(rows or rng.randint(1, 4)):
        ids = [rng.randrange(3, 250) for _ in range(rng.randint(5, 24))]
        cut = rng.randrange(1, len(ids) - 1)
        sequences.append((ids, [-100] * cut + ids[cut:]))
    return MicroBatch.of(sequences)


DATA = {name: [batch(100 * i + step) for step in range(STEPS)] for i, name in enumerate(CONFIGS)}

Run = tuple[list[StepResult], list[dict[str, torch.Tensor]], dict[str, Any]]


def alone(model: PreTrainedModel, name: str, exact: bool | None = None) -> Run:
    """The trial's results, gradients and final state with nobody else on the base."""
    shared = SharedBase(model, exact=exact)
    shared.attach(name, CONFIGS[name])
    results, gradients = [], []
    for data in DATA[name]:
        results.append(shared.step({name: data})[name])
        gradients.append(shared.gradients(name))
    state = shared.state_dict(name)
    shared.close()
    return results, gradients, state


def packed(model: PreTrainedModel, exact: bool | None = None) -> tuple[dict[str, Run], SharedBase]:
    """All trials on one base: they join one after another, pause at different times and leave when done."""
    shared = SharedBase(model, exact=exact)
    results: dict[str, list[StepResult]] = {name: [] for name in CONFIGS}
    gradients: dict[str, list[dict[str, torch.Tensor]]] = {name: [] for name in CONFIGS}
    done: dict[str, Run] = {}
    for turn in range(100):
        for i, name in enumerate(CONFIGS):
            if name not in done and name not in shared.adapters and turn >= i // 3:
                shared.attach(name, CONFIGS[name])
        active = [name for name in shared.adapters if (turn + int(name[1:])) % 9]
        for name, result in shared.step({name: DATA[name][len(results[name])] for name in active}).items():
            results[name].append(result)
            gradients[name].append(shared.gradients(name))
            if len(results[name]) == STEPS:
                done[name] = (results[name], gradients[name], shared.state_dict(name))
                shared.detach(name)
        if len(done) == K:
            return done, shared
    raise AssertionError("the trials never finished")


def assert_identical(one: Run, other: Run) -> None:
    assert one[0] == other[0]
    for left, right in [*zip(one[1], other[1], strict=True), (one[2]["tensors"], other[2]["tensors"])]:
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), name
    assert one[2]["meta"] == other[2]["meta"]


def test_packed_equals_alone_bit_for_bit_in_fp32(folder: Path) -> None:
    together, shared = packed(load(folder))
    assert shared.exact
    assert shared.stats.mean_k > 5
    for name in CONFIGS:
        assert_identical(together[name], alone(load(folder), name))
    assert len({tuple(r.loss for r in run[0]) for run in together.values()}) == K


def test_packed_equals_alone_bit_for_bit_on_an_nf4_base(folder: Path) -> None:
    together, _ = packed(load_nf4(folder))
    for name in CONFIGS:
        assert_identical(together[name], alone(load_nf4(folder), name))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_fast_mode_gives_losses_and_gradients_of_alone_within_tolerance(
    folder: Path, dtype: str, tolerance: float
) -> None:
    """One product for all adapters rounds differently. From one state, loss and relative gradient error are bounded:
    0.02 for bf16, whose unit roundoff is 0.004."""
    model = load(folder, dtype)
    states = {name: alone(load(folder, dtype), name)[2] for name in CONFIGS}
    shared = SharedBase(model, exact=False)
    for name, config in CONFIGS.items():
        shared.attach(name, config, state=states[name])
    data = {name: batch(7000 + i) for i, name in enumerate(CONFIGS)}
    together = shared.step(data)
    gradients = {name: shared.gradients(name) for name in CONFIGS}
    shared.close()
    for name, config in CONFIGS.items():
        single = SharedBase(model, exact=False)
        single.attach(name, config, state=states[name])
        assert single.step({name: data[name]})[name].loss == pytest.approx(together[name].loss, abs=tolerance)
        for key, gradient in single.gradients(name).items():
            error = torch.linalg.vector_norm(gradients[name][key] - gradient)
            assert error <= tolerance * torch.linalg.vector_norm(gradient) + 1e-8, key
        single.close()


@pytest.mark.parametrize("grouped", [False, True])
def test_curves_in_bf16_are_those_of_alone_within_tolerance(folder: Path, grouped: bool) -> None:
    """Whole trainings, by rank and by grouped products, with trials that join, pause and leave: nats a token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen_base.grouped_products, "supported", lambda *_: grouped)
        together, _ = packed(load(folder, "bfloat16"), exact=False)
        singles = {name: alone(load(folder, "bfloat16"), name, exact=False) for name in CONFIGS}
    off = [
        abs(one.loss - other.loss)
        for name in CONFIGS
        for one, other in zip(together[name][0], singles[name][0], strict=True)
    ]
    print(grouped, max(off), sum(off) / len(off))
    assert max(off) < 0.01 and sum(off) / len(off) < 0.001


@pytest.mark.parametrize("exact", [True, False])
def test_alone_equals_peft_and_torch_adamw_over_50_steps(folder: Path, tmp_path: Path, exact: bool) -> None:
    from peft import PeftModel

    config = AdapterConfig(total_steps=50, r=6, alpha=12, dropout=0.0, lr=3e-3, warmup=0.1, weight_decay=0.02, seed=3)
    data = [batch(500 + step, rows=3) for step in range(50)]
    shared = SharedBase(load(folder), exact=exact)
    shared.attach("a", config)
    start = shared.export("a", tmp_path / "start")
    ours = [shared.step({"a": one})["a"] for one in data]
    end = shared.export("a", tmp_path / "end")

    model = PeftModel.from_pretrained(load(folder), start, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=5, num_training_steps=50)
    for step, one in enumerate(data):
        longest = max(len(ids) for ids, _ in one.sequences)
        ids = torch.tensor([[*i, *[0] * (longest - len(i))] for i, _ in one.sequences])
        labels = torch.tensor([[*t, *[-100] * (longest - len(t))] for _, t in one.sequences])
        mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in one.sequences])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        assert ours[step].lr == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert abs(ours[step].loss - loss.item()) <= 1e-5
        assert ours[step].grad_norm == pytest.approx(norm.item(), rel=1e-3)

    exported = PeftModel.from_pretrained(load(folder), end)
    ids = torch.tensor([list(range(5, 25))])
    assert torch.allclose(exported(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4)
    assert not torch.allclose(exported(input_ids=ids).logits, load(folder)(input_ids=ids).logits, atol=1e-3)


@pytest.mark.parametrize("exact", [True, False])
def test_alone_equals_trls_own_trainer_over_50_steps(folder: Path, tmp_path: Path, exact: bool) -> None:
    """TRL's SFTTrainer as it comes: its collator, loss, optimizer, clipping and schedule, on the same rows in order."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    config = AdapterConfig(total_steps=50, r=6, alpha=12, dropout=0.0, lr=3e-3, warmup=0.1, weight_decay=0.02, seed=3)
    data = [batch(900 + step, rows=3) for step in range(50)]
    shared = SharedBase(load(folder), exact=exact)
    shared.attach("a", config)
    start = shared.export("a", tmp_path / "start")
    ours = [shared.step({"a": one})["a"] for one in data]
    end = shared.export("a", tmp_path / "end")

    rows = [sequence for one in data for sequence in one.sequences]
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trl"), max_steps=50, per_device_train_batch_size=3, learning_rate=config.lr,
        lr_scheduler_type="cosine", warmup_steps=5, weight_decay=config.weight_decay, use_cpu=True, bf16=False,
        max_grad_norm=config.max_grad_norm, gradient_checkpointing=False, optim="adamw_torch", max_length=None,
        train_sampling_strategy="sequential", dataset_kwargs={"skip_prepare_dataset": True}, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        PeftModel.from_pretrained(load(folder), start, is_trainable=True), args=arguments,
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=Dataset.from_dict({"input_ids": [i for i, _ in rows], "labels": [t for _, t in rows]}),
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == list(range(1, 51))
    assert max(abs(mine.loss - its["loss"]) for mine, its in zip(ours, logged, strict=True)) <= 1e-5
    for mine, its in zip(ours, logged, strict=True):
        assert mine.lr == pytest.approx(its["learning_rate"], rel=1e-12, abs=1e-15)
        assert mine.grad_norm == pytest.approx(its["grad_norm"], rel=1e-3)

    exported = PeftModel.from_pretrained(load(folder), end)
    probe = torch.tensor([list(range(5, 25))])
    with torch.no_grad():
        assert torch.allclose(exported(input_ids=probe).logits, trainer.model(input_ids=probe).logits, atol=1e-4)
        assert not torch.allclose(exported(input_ids=probe).logits, load(folder)(input_ids=probe).logits, atol=1e-3)


def test_export_loads_in_peft_with_the_losses_of_the_shared_base(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    shared = SharedBase(load(folder))
    for name, config in CONFIGS.items():
        shared.attach(name, config)
    for step in range(3):
        shared.step({name: DATA[name][step] for name in CONFIGS})
    data = batch(42, rows=1)
    held_out = shared.evaluate(dict.fromkeys(CONFIGS, data))
    folders = {name: shared.export(name, tmp_path / name) for name in CONFIGS}
    shared.close()
    (ids, labels) = data.sequences[0]
    for name in CONFIGS:
        saved = json.loads((folders[name] / "adapter_config.json").read_text())
        assert (saved["r"], saved["use_rslora"]) == (CONFIGS[name].r, CONFIGS[name].rslora)
        model = PeftModel.from_pretrained(load(folder), folders[name])
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        assert held_out[name].loss == pytest.approx(loss.item(), abs=1e-5)
    assert len({round(h.loss, 5) for h in held_out.values()}) == K


def test_held_out_loss_is_the_sum_over_tokens_whatever_the_batching(folder: Path) -> None:
    shared = SharedBase(load(folder))
    shared.attach("a", CONFIGS["t1"])
    data = batch(9, rows=6)
    whole = shared.evaluate({"a": data})["a"]
    single = shared.evaluate({"a": [MicroBatch((one,)) for one in data.sequences]})["a"]
    assert whole.tokens == single.tokens == data.trained
    assert whole.loss_sum == pytest.approx(single.loss_sum, rel=1e-6)
    assert [n for _, n in whole.sequences] == [MicroBatch((one,)).trained for one in data.sequences]


def test_resumed_equals_uninterrupted_bit_for_bit(folder: Path) -> None:
    straight = alone(load(folder), "t1")
    shared = SharedBase(load(folder))
    shared.attach("t1", CONFIGS["t1"], DataOrder(rows=40, batch=4, seed=1))
    first = [shared.step({"t1": data})["t1"] for data in DATA["t1"][:4]]
    state = shared.state_dict("t1")
    following = shared.next_rows("t1")
    state["meta"] = json.loads(json.dumps(state["meta"]))
    other = SharedBase(load(folder), rank_buckets=(8, 64))
    other.attach("t1", CONFIGS["t1"], state=state)
    assert other.next_rows("t1") == following
    rest = [other.step({"t1": data})["t1"] for data in DATA["t1"][4:]]
    assert first + rest == straight[0]


def test_checkpointed_layers_recompute_the_same_dropout(folder: Path) -> None:
    config = CONFIGS["t1"]
    assert config.dropout > 0
    runs = []
    for checkpointing in (False, True):
        shared = SharedBase(load(folder), gradient_checkpointing=checkpointing)
        shared.attach("t1", config)
        shared.attach("t0", CONFIGS["t0"])
        result = [shared.step({"t1": DATA["t1"][s], "t0": DATA["t0"][s]}) for s in range(4)]
        runs.append((result, shared.gradients("t1")))
        assert shared.model.is_gradient_checkpointing == checkpointing
    assert runs[0][0] == runs[1][0]
    for name, gradient in runs[0][1].items():
        assert torch.equal(gradient, runs[1][1][name])


def test_dropout_drops_what_it_says_and_differs_by_step_and_layer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = {Dropout.of(0.1, seed, step, micro).block_seed(layer)
             for seed in range(5) for step in range(5) for micro in range(3) for layer in range(5)}  # fmt: skip
    assert len(seeds) == 5 * 5 * 3 * 5
    shared = SharedBase(load(folder), rank_buckets=(8,))
    for i, p in enumerate((0.0, 0.05, 0.5)):
        shared.attach(f"{i}", AdapterConfig(total_steps=5, r=8, dropout=p, seed=i))
    data = batch(3, rows=4)
    seen: list[torch.Tensor] = []
    original = stacked_linear.mask_of

    def watched(*args: Any) -> torch.Tensor:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(stacked_linear, "mask_of", watched)
    shared.step(dict.fromkeys(("0", "1", "2"), data))
    assert len(seen) == 14
    masks = torch.cat([mask.reshape(3, -1) for mask in seen], dim=1)
    for mask, p in zip(masks, (0.0, 0.05, 0.5), strict=True):
        spread = 4 * math.sqrt(p * (1 - p) / mask.numel())
        assert (mask == 0).float().mean().item() == pytest.approx(p, abs=spread + 1e-5)
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert not torch.equal(seen[0], seen[1])  # q_proj and k_proj have the same input
    losses = {}
    for p in (0.0, 0.5):
        shared = SharedBase(load(folder))
        config = AdapterConfig(total_steps=5, r=8, alpha=64, dropout=p, lr=1e-2, schedule="constant", warmup=0)
        shared.attach("a", config)
        losses[p] = [shared.step({"a": DATA["t0"][0]})["a"].loss for _ in range(4)]
    assert losses[0.0][0] == losses[0.5][0]  # B is zero at first
    assert losses[0.0][1:] != losses[0.5][1:]


def test_accumulated_micro_batches_equal_one_batch(folder: Path) -> None:
    whole = batch(77, rows=4)
    pieces = [MicroBatch(whole.sequences[:1]), MicroBatch(whole.sequences[1:])]
    results, gradients = [], []
    for data in (whole, pieces):
        shared = SharedBase(load(folder))
        shared.attach("a", CONFIGS["t0"])
        shared.attach("b", CONFIGS["t4"])
        shared.attach("c", CONFIGS["t0"])
        results.append(shared.step({"a": data, "b": DATA["t4"][0], "c": data})["a"])
        gradients.append(shared.gradients("a"))
    assert results[0].tokens == results[1].tokens
    assert results[0].loss == pytest.approx(results[1].loss, abs=1e-6)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-7)


@pytest.mark.parametrize("exact", [True, False])
def test_a_nan_stops_its_adapter_alone(folder: Path, exact: bool) -> None:
    names = ("t0", "t1", "t4")
    runs = []
    for poisoned in (True, False):
        shared = SharedBase(load(folder), exact=exact, rank_buckets=(32,))
        for name in names:
            shared.attach(name, CONFIGS[name])
        shared.step({name: DATA[name][0] for name in names})
        if poisoned:
            state = shared.state_dict("t1")
            state["tensors"]["weights.model.layers.0.self_attn.q_proj.A"][0, 0] = math.nan
            shared.load_state("t1", state)
        runs.append([shared.step({name: DATA[name][step] for name in names}) for step in (1, 2)])
    sick, healthy = runs
    assert "not finite at step 2" in (sick[0]["t1"].stopped or "")
    assert math.isnan(sick[0]["t1"].loss)
    assert sick[1]["t1"].stopped == sick[0]["t1"].stopped
    assert healthy[1]["t1"].stopped is None
    for step in (0, 1):
        for name in ("t0", "t4"):
            assert sick[step][name].stopped is None
            # exact: equal whoever goes on; fast: the second forward has one adapter less and may round differently
            tolerance = 0 if exact or step == 0 else 1e-6
            assert sick[step][name].loss == pytest.approx(healthy[step][name].loss, abs=tolerance)


def test_an_adapter_without_trained_tokens_stops_alone(folder: Path) -> None:
    shared = SharedBase(load(folder))
    shared.attach("a", CONFIGS["t0"])
    shared.attach("b", CONFIGS["t1"])
    untrained = MicroBatch.of([([5, 6, 7], [5, -100, -100])])
    results = shared.step({"a": untrained, "b": DATA["t1"][0]})
    assert results["a"].stopped == "its batch holds no trained token"
    assert results["b"].stopped is None
    assert results["b"].step == 1


def test_out_of_memory_lowers_k_and_goes_on_with_the_same_numbers(folder: Path) -> None:
    """No CPU test can run out of memory safely, so a hook raises torch's error for forwards that are too large."""
    shared = SharedBase(load(folder))
    for name, config in CONFIGS.items():
        shared.attach(name, config)

    def full(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[0] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = shared.model.get_decoder().register_forward_pre_hook(full, with_kwargs=True)
    results = [shared.step({name: DATA[name][step] for name in CONFIGS}) for step in range(2)]
    assert shared.stats.k_limit == 2
    assert shared.stats.out_of_memory == 3  # 8, again with checkpointed layers, then 4, then 2
    assert shared.model.is_gradient_checkpointing
    assert shared.stats.mean_k == 2
    handle.remove()
    for name in CONFIGS:
        assert [r[name] for r in results] == alone(load(folder), name)[0][:2]

    def never(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if 250 in kwargs["input_ids"]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    shared.model.get_decoder().register_forward_pre_hook(never, with_kwargs=True)
    too_large = MicroBatch.of([([250, 5, 6], [250, 5, 6])])
    last = shared.step({name: too_large if name == "t2" else DATA[name][2] for name in CONFIGS})
    assert [name for name, result in last.items() if result.stopped] == ["t2"]


def test_a_measurement_that_runs_out_of_memory_takes_fewer_adapters_a_forward(folder: Path) -> None:
    shared = SharedBase(load(folder))
    for name, config in CONFIGS.items():
        shared.attach(name, config)
    data = {name: DATA[name][:2] for name in CONFIGS}
    whole, sizes = shared.evaluate(data), []

    def full(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(kwargs["input_ids"].shape[0])
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = shared.model.get_decoder().register_forward_pre_hook(full, with_kwargs=True)
    assert shared.evaluate(data) == whole
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]  # two micro-batches each
    assert shared.stats.k_limit is None  # training keeps more than a measurement, and fits
    sizes.clear()
    assert shared.evaluate(data) == whole and sizes == [2] * 8  # remembered
    handle.remove()

    longest = max(len(ids) for batches in data.values() for batch in batches for ids, _ in batch.sequences)

    def narrow(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].numel() > 2 * longest:
            raise RuntimeError("Triton Error [CUDA]: out of memory")

    handle = shared.model.get_decoder().register_forward_pre_hook(narrow, with_kwargs=True)
    found = shared.evaluate(data)  # by single adapters, whose batches are halved
    for name, one in whole.items():
        assert found[name].loss == pytest.approx(one.loss, rel=1e-6) and found[name].tokens == one.tokens
        assert [n for _, n in found[name].sequences] == [n for _, n in one.sequences]
    handle.remove()

    def never(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    shared.model.get_decoder().register_forward_pre_hook(never, with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError):
        shared.evaluate(data)
    with pytest.raises(InputError, match="no adapter 'nobody'"):
        shared.evaluate({"nobody": data["t0"]})


def test_an_nf4_base_trains_as_its_dequantized_copy_also_after_an_evaluation(folder: Path) -> None:
    """The two silent faults of bitsandbytes on a CPU: no gradient through the base once an evaluation packed it."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    quantized, plain = load_nf4(folder), load(folder)
    assert sum(isinstance(m, Linear4bit) for m in quantized.modules()) == 14
    for name, module in quantized.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight)
    results = []
    for model in (quantized, plain):
        shared = SharedBase(model)
        shared.attach("a", CONFIGS["t2"])
        shared.step({"a": DATA["t2"][0]})
        held_out = shared.evaluate({"a": DATA["t2"][1]})["a"]
        results.append((held_out, shared.step({"a": DATA["t2"][2]})["a"], shared.gradients("a")))
    assert results[0][:2] == results[1][:2]
    for name, gradient in results[0][2].items():
        assert torch.equal(gradient, results[1][2][name])
    assert results[0][2]["model.layers.0.self_attn.q_proj.A"].abs().max() > 0


def test_a_model_whose_sequences_leak_is_refused(folder: Path) -> None:
    class Leaking(LlamaForCausalLM):
        def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
            pass  # as a model with attention of its own

    def whole_row(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": torch.ones_like(kwargs["input_ids"])}

    model = Leaking.from_pretrained(folder, attn_implementation="sdpa")
    model.get_decoder().register_forward_pre_hook(whole_row, with_kwargs=True)
    with pytest.raises(ModelError, match="see each other"):
        SharedBase(model)


def test_closed_base_computes_as_before(folder: Path) -> None:
    model = load(folder)
    ids = torch.tensor([list(range(5, 25))])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        shared = SharedBase(model)
        shared.attach("a", CONFIGS["t0"])
        shared.step({"a": DATA["t0"][0]})
        shared.close()
        assert torch.equal(model(input_ids=ids).logits, before)


def test_misuse_is_named(folder: Path) -> None:
    shared = SharedBase(load(folder))
    shared.attach("a", CONFIGS["t0"])
    with pytest.raises(InputError, match="attached already"):
        shared.attach("a", CONFIGS["t0"])
    with pytest.raises(InputError, match="no adapter 'b'"):
        shared.step({"b": DATA["t0"][0]})
    with pytest.raises(InputError, match="largest rank bucket"):
        shared.attach("c", AdapterConfig(total_steps=1, r=512))
    with pytest.raises(ModelError, match="q_pro"):
        shared.attach("c", AdapterConfig(total_steps=1, targets=("q_pro",)))
    with pytest.raises(InputError, match="another rank"):
        shared.attach("c", AdapterConfig(total_steps=1, r=5), state=shared.state_dict("a"))
    assert shared.adapters == ("a",)
    assert shared.bytes_per_adapter(CONFIGS["t0"]) >= 16 * 4 * 14 * 128


def test_data_order_is_a_permutation_an_epoch() -> None:
    order = DataOrder(rows=11, batch=3, seed=5)
    first = [row for position in range(3) for row in order.at(position)]
    second = [row for position in range(3, 6) for row in order.at(position)]
    assert len(set(first)) == len(set(second)) == 9
    assert first != second
    assert order.at(4) == DataOrder(rows=11, batch=3, seed=5).at(4)
    assert len(DataOrder(rows=2, batch=3, seed=5).at(7)) == 2


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_learning_rates_are_the_trainers(kind: Any) -> None:
    name = "constant_with_warmup" if kind == "constant" else kind
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=20)
    for step in range(22):
        assert objective.lr_factor(kind, step, 20, 3) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_chunked_losses_and_gradients_equal_torch_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 16, requires_grad=True), torch.randn(50, 16)
    labels, scale = torch.randint(50, (37,)), torch.rand(37)
    expected = functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
    (expected * scale).sum().backward()
    for budget in (1, 500, 10**6):
        losses, grad = token_loss.token_losses(hidden.detach(), labels, weight, None, scale, budget=budget)
        assert torch.allclose(losses, expected, atol=1e-5)
        assert grad is not None
        assert torch.allclose(grad, hidden.grad, atol=1e-6)  # type: ignore[arg-type]


def test_layout_takes_packed_rows_apart() -> None:
    packed_row = MicroBatch.from_packed(list(range(10, 20)), list(range(10, 20)), [4, 6])
    assert packed_row.trained == 8  # the first token of a sequence is nobody's prediction
    layout = build_layout([packed_row, MicroBatch.of([([1, 2], [1, 2])])], torch.device("cpu"))
    assert layout.slots == (32, 16)
    assert layout.position_ids[0, 16:22].tolist() == [0, 1, 2, 3, 4, 5]
    assert layout.input_ids[0].tolist() == [10, 11, 12, 13, *[0] * 12, 14, 15, 16, 17, 18, 19, *[0] * 10]
    assert layout.trained.tolist() == [0, 1, 2, 16, 17, 18, 19, 20, 32]
    assert layout.uniform is None
    assert build_layout([packed_row], torch.device("cpu")).uniform == 16
    assert layout.trained_counts == (8, 1)
    assert layout.labels.tolist() == [11, 12, 13, 15, 16, 17, 18, 19, 2]
