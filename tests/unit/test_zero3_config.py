"""DeepSpeed's configuration from the recipe, and what of it a recipe may not say."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from ft_ray import deepspeed_keys, nvme, objective, recipe, whole_layers
from ft_ray.deepspeed_keys import check_values
from ft_ray.early_checks import check_settings
from ft_ray.errors import InputError, ModelError, RecipeError, TrainingError
from ft_ray.estimate import Setting
from ft_ray.state_files import unread
from ft_ray.train_control import classify
from ft_ray.zero3 import Zero, config, layer_parameters, sharding_of


def make(**values: Any) -> recipe.Recipe:
    base = {"name": "t", "model": {"id": "m"}, "data": {"train": [{"path": "x"}]}, "method": "full"}
    return recipe.from_dict({**base, **values})


def derived(made: recipe.Recipe, hidden: int = 4096, on_gpu: bool = True) -> dict[str, Any]:
    return config(made, objective.plan_batch(made, "cuda" if on_gpu else "cpu"), hidden, on_gpu=on_gpu)


def test_stage_3_is_what_several_workers_take() -> None:
    made = make(resources={"workers": 4}, batch={"global": 16, "per_device": 2}, optim={"max_grad_norm": 0.5})
    found = derived(made)
    zero = found["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["contiguous_gradients"]) == (3, True, True)
    assert zero["reduce_bucket_size"] == 4096**2
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 4096**2)
    assert zero["stage3_param_persistence_threshold"] == 40_960
    assert "offload_optimizer" not in zero and "offload_param" not in zero
    assert (found["train_batch_size"], found["train_micro_batch_size_per_gpu"]) == (16, 2)
    assert (found["gradient_accumulation_steps"], found["gradient_clipping"]) == (2, 0.5)
    assert found["bf16"] == {"enabled": True} and found["fp16"] == {"enabled": False}
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}, "two passes a step add up in fp32"
    assert "data_types" not in derived(make(resources={"workers": 4}, batch={"global": 16, "per_device": 4}))
    json.dumps(found)


@pytest.mark.parametrize(
    ("workers", "sharding", "stage"),
    [(1, "auto", 0), (2, "auto", 3), (1, "zero3", 3), (2, "zero2", 2), (2, "zero1", 1), (2, "ddp", 0)],
)
def test_one_key_chooses_the_sharding_and_the_plan_counts_with_it(workers: int, sharding: str, stage: int) -> None:
    made = make(resources={"workers": workers, "sharding": sharding})
    assert made.zero_stage == stage == Setting.of(made).zero
    if stage:
        assert derived(made)["zero_optimization"]["stage"] == stage


def test_the_next_layer_is_fetched_whole_and_a_layer_reduced_at_once() -> None:
    made = make(resources={"workers": 2})
    llama = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    layer = layer_parameters(llama)
    assert layer == 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    by_matrix = make(resources={"workers": 2}, deepspeed={"zero_optimization": {"leaf_module": {}}})
    cases = ((made, layer, True), (made, 10**10, False), (made, 0, False), (by_matrix, layer, False))
    for recipe_, given, whole in cases:
        zero = config(recipe_, objective.plan_batch(made, "cuda"), 4096, on_gpu=True, layer=given)["zero_optimization"]
        assert zero["stage3_prefetch_bucket_size"] == (layer if whole else int(0.9 * 4096**2))
        assert zero["reduce_bucket_size"] == (layer + 16 * 4096 if whole else 4096**2)
        assert zero["memory_efficient_linear"] is not whole, "by default activations are computed again"
    assert layer_parameters({"model_type": "unheard-of"}) == 0


class Layer(GradientCheckpointingLayer):
    def __init__(self, inner: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Linear(2, 2)
        self.inner = Layer() if inner else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.weight(hidden)
        return out


def test_decoder_layers_are_leaves_and_must_be_given_hidden_states_by_position() -> None:
    model = torch.nn.Sequential(Layer(), Layer(inner=True), torch.nn.Linear(2, 2))
    assert whole_layers.gather_whole_layers(model) == 2, "the outermost alone"
    hidden = torch.ones(1, 2, requires_grad=True)
    assert model(hidden).requires_grad
    with torch.no_grad():
        model[0](hidden=hidden.detach())
    with pytest.raises(TrainingError, match=r"cannot take a Layer as one.*leaf_module"):
        model[0](hidden=hidden)


def test_layers_that_share_a_weight_or_are_called_twice_are_not_taken_as_one() -> None:
    one, other = Layer(), Layer()
    other.weight.weight = one.weight.weight
    assert whole_layers.gather_whole_layers(torch.nn.Sequential(one, other)) == 0
    layer, hidden = Layer(), torch.ones(1, 2, requires_grad=True)
    assert whole_layers.gather_whole_layers(torch.nn.Sequential(layer)) == 1
    first = layer(hidden)
    with pytest.raises(TrainingError, match=r"called more than once in a forward pass.*leaf_module"):
        layer(first)
    first.sum().backward()
    layer(layer(hidden))  # it was looked at once, and is not any more


def test_a_layer_too_large_to_be_gathered_at_once_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_layers, "MOST", 5)
    assert whole_layers.gather_whole_layers(torch.nn.Sequential(Layer())) == 0


def test_an_adapter_is_never_sharded() -> None:
    assert make(method="lora", resources={"workers": 4}).zero_stage == 0
    assert sharding_of(make(method="lora"), {"hidden_size": 8}, "cpu") is None
    for method, more in itertools.product(
        ("lora", "qlora"), ({"resources": {"sharding": "zero3"}}, {"deepspeed": {"dump_state": True}})
    ):
        with pytest.raises(RecipeError, match=r"shards the weights of method full; .*leave resources.sharding at auto"):
            make(method=method, **more)


def test_offload_by_recipe_key_and_how_it_is_done_by_deepspeed_s_own() -> None:
    both = {"offload_optimizer": True, "offload_parameters": True}
    zero = derived(make(resources={"workers": 2, **both}), on_gpu=False)["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": False}
    assert not zero["overlap_comm"]
    more = {"zero_optimization": {"offload_optimizer": {"buffer_count": 5, "pin_memory": False}, "sub_group_size": 7}}
    zero = derived(make(resources={"workers": 2, "offload_optimizer": True}, deepspeed=more))["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "buffer_count": 5, "pin_memory": False}
    assert (zero["stage"], zero["sub_group_size"]) == (3, 7)
    for workers, key, says in ((1, "offload_optimizer", "set resources.sharding to zero3"),
                               (1, "offload_parameters", "needs ZeRO-3")):  # fmt: skip
        with pytest.raises(RecipeError, match=says):
            make(resources={"workers": workers, key: True})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"zero_optimisation": {}}, r"no key 'zero_optimisation' .*did you mean 'zero_optimization'"),
        ({"train_batch_size": 8}, r"train_batch_size follows from the recipe: set batch.global instead"),
        ({"bf16": {"enabled": True}}, r"set precision instead"),
        ({"optimizer": {}}, r"set optim instead"),
        ({"scheduler": {}}, r"set schedule instead"),
        ({"gradient_clipping": 1.0}, r"set optim.max_grad_norm instead"),
        ({"zero_optimization": {"stage": 2}}, r"set resources.sharding instead"),
        ({"zero_optimization": {"sub_group_sise": 2}}, r"did you mean 'sub_group_size'"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, r"set resources.offload_parameters: true"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, r"needs offload_optimizer.nvme_path, a"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, r"not supported, .*set resources.offload_par"),
        ({"zero_optimization": 3}, r"zero_optimization is a mapping"),
        ({"zero_optimization": {"round_robin_gradients": True}}, r"round_robin_gradients lays .*would be scrambled"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, r"zenflow puts an update of DeepSpeed's own in"),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}, r"offload_optimizer.ratio shares the update"),
        ({"zero_optimization": {"offload_optimizer": {"super_offload": True}}}, r"super_offload puts an update of"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, r"no key 'data_types.grad_acum_dtype' .*mean 'grad_accum_dtype'"),
        ({"data_types": {"param_dtype": "bf16"}}, r"data_types.param_dtype follows .* set precision instead"),
        ({"data_types": "fp32"}, r"data_types is a mapping"),
        ({"flops_profiler": {"enable": True}}, r"no key 'flops_profiler.enable' .*did you mean 'enabled'"),
        ({"flops_profiler": {"enabled": "yes"}}, r"flops_profiler.enabled is true or false, not 'yes'"),
        ({"flops_profiler": {"profile_step": True}}, r"flops_profiler.profile_step is a whole number, not True"),
        ({"comms_logger": {"prof_op": []}}, r"no key 'comms_logger.prof_op'"),
        ({"csv_monitor": {"output": "x"}}, r"no key 'csv_monitor.output'"),
        ({"tensorboard": {"name": "x"}}, r"no key 'tensorboard.name'"),
        ({"wandb": {"teem": "x"}}, r"no key 'wandb.teem' .*did you mean 'team'"),
        ({"timers": {"thruput": {}}}, r"no key 'timers.thruput'"),
        ({"timers": {"throughput": {"synchronised": True}}}, r"no key 'timers.throughput.synchronised'"),
        ({"timers": {"throughput": 1}}, r"timers.throughput is a mapping"),
        ({"aio": {"queue_depth": "deep"}}, r"aio.queue_depth is a whole number, not 'deep'"),
        ({"gradient_predivide_factor": "two"}, r"gradient_predivide_factor is a number, not 'two'"),
        ({"steps_per_print": 1.5}, r"steps_per_print is a whole number, not 1.5"),
        ({"prescale_gradients": 1}, r"prescale_gradients is true or false, not 1"),
        ({"checkpoint": {"tag_validation": "Warn"}}, r"'deepspeed': checkpoint is for DeepSpeed's own checkpoints"),
        ({"activation_checkpointing": {"profile": True}}, r"activation_checkpointing is for .*set gradient_checkp"),
        ({"compile": {"deepcompile": True}}, r"compile is for engine.compile\(\), which nobody calls here"),
    ],
)
def test_what_deepspeed_would_ignore_or_the_recipe_decides_is_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        make(resources={"workers": 2}, deepspeed=values)
    with pytest.raises(RecipeError, match=r"^recipe: 'deepspeed'"):
        make(resources={"workers": 2}, deepspeed=values)


def test_states_that_are_no_values_for_each_weight_are_refused() -> None:
    eight = {"optim": {"name": "adamw_8bit"}}
    with pytest.raises(TrainingError, match=r"optim.name adamw_8bit .*adamw_torch.*or resources.sharding: ddp"):
        Zero(make(resources={"workers": 2}, **eight), {"hidden_size": 64}, "cpu")
    assert sharding_of(make(**eight), {"hidden_size": 64}, "cpu") is None, "one process keeps them in its own format"


def test_models_whose_files_hold_other_tensors_are_refused() -> None:
    mixtral = {"model_type": "mixtral", "hidden_size": 64}
    with pytest.raises(ModelError, match=r"mixtral models are stored in other tensors .*use method lora"):
        sharding_of(make(resources={"workers": 2}), mixtral, "cpu")
    assert sharding_of(make(), mixtral, "cpu") is None
    assert sharding_of(make(), {"model_type": "llama", "hidden_size": 64}, "cpu") is not None


def test_a_rank_of_zero3_fetches_its_own_part_and_no_other() -> None:
    parts = [f"state-0000{rank}-of-00003.safetensors" for rank in range(3)]
    names = [*parts, "state.json", "progress.json"]
    index = {"sharding": "zero3", "workers": 3, "buffers": []}
    assert unread(names, index, "zero3", 1, 3) == {parts[0], parts[2]}
    assert unread(names, {**index, "buffers": ["b"]}, "zero3", 1, 3) == {parts[2]}
    for sharding, workers in (("zero3", 2), ("zero2", 3), ("ddp", 3)):
        assert unread(names, index, sharding, 1, workers) == set()


def test_the_shipped_recipe_shards() -> None:
    made = recipe.load("full_zero3").recipe
    assert (made.method, made.resources.workers, made.zero_stage) == ("full", 2, 3)
    assert derived(made, 576, on_gpu=False)["zero_optimization"]["reduce_bucket_size"] == 1 << 20


NVME = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/fast"}}}


def test_offload_to_nvme_passes_where_its_states_can_be_saved() -> None:
    made = make(resources={"workers": 2}, deepspeed=NVME)
    assert nvme.path_of(made.deepspeed) == "/fast"
    zero = derived(made)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "nvme", "pin_memory": True, "nvme_path": "/fast"}
    assert made.deepspeed == NVME, "what is derived is another mapping"
    for values, says in (
        ({"optim": {"name": "adagrad"}}, r"cannot keep adagrad's states: use optim.name adamw_torch"),
        ({"checkpoint": {"snapshot": True}}, r"checkpoint.snapshot: true copies a state that is in memory"),
        ({"resources": {"workers": 2, "sharding": "zero2"}}, r"offload to NVMe needs ZeRO-3"),
    ):
        with pytest.raises(RecipeError, match=says):
            make(**{"resources": {"workers": 2}, "deepspeed": NVME, **values})


def test_a_machine_without_libaio_is_told_so_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'cannot find -laio' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    recipe = make(resources={"workers": 2}, deepspeed=NVME)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match=r"cannot be built here: libaio's .*apt-get install libaio-dev"):
        check_settings(recipe)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    check_settings(recipe)  # its workers are elsewhere
    compiler.unlink()
    assert nvme.missing() == "g++ is missing: apt-get install g++ libaio-dev"


def test_a_rank_has_a_folder_of_its_own_on_nvme(tmp_path: Path) -> None:
    folders = [nvme.folder_of(str(tmp_path), run, rank) for run in ("runs/a", "runs/b") for rank in (0, 1)]
    assert len(set(folders)) == 4 and folders[0] == nvme.folder_of(str(tmp_path), "runs/a", 0)
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "x.swp").write_bytes(b"0")
    nvme.remove(folders[0])
    assert folders[1].exists() and not folders[0].exists()
    for folder in folders[1:]:
        nvme.remove(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sub_group_size": -1}, "sub_group_size: Input should be greater than or equal to 0"),
        ({"reduce_bucket_size": "many"}, "reduce_bucket_size: Input should be a valid integer"),
        ({"offload_optimizer": {"device": "nvme", "nvme_pth": "/x"}}, "offload_optimizer.nvme_pth: Extra inputs"),
    ],
)
def test_values_that_deepspeed_does_not_take_end_the_run_without_a_retry(values: dict[str, Any], said: str) -> None:
    check_values({"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}})
    with pytest.raises(RecipeError, match=rf"deepspeed\.zero_optimization\.{said}") as caught:
        check_values({"zero_optimization": {"stage": 3, **values}})
    assert classify(caught.value) is caught.value, "not tried again"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data_types": {"grad_accum_dtype": "float33"}}, r"data_types.grad_accum_dtype: DeepSpeed takes fp32, bf16,"),
        ({"data_types": {"buffer_dtype": "int8"}}, r"data_types.buffer_dtype: DeepSpeed takes fp32, bf16, fp16, not"),
        ({"data_types": {"keep_in_fp32_modules": "norm"}}, r"data_types.keep_in_fp32_modules: 'auto' or a list"),
        ({"communication_data_type": "fp8"}, r"communication_data_type: Invalid communication_data_type"),
        ({"communication_data_type": 16}, r"communication_data_type: "),
        ({"gradient_allreduce_op": "max"}, r"gradient_allreduce_op: Invalid gradient_allreduce_op"),
        ({"gradient_allreduce_op": "sum"}, r"gradient_allreduce_op: sum makes a step depend"),
        ({"comms_logger": {"prof_ops": "all_reduce"}}, r"comms_logger.prof_ops: Input should be a valid list"),
        ({"csv_monitor": {"enabled": "perhaps"}}, r"csv_monitor.enabled: Input should be a valid boolean"),
        ({"tensorboard": {"output_path": 3}}, r"tensorboard.output_path: Input should be a valid string"),
        ({"wandb": {"project": 3}}, r"wandb.project: Input should be a valid string"),
        ({"timers": {"throughput": {"enabled": "x"}}}, r"timers.throughput.enabled: Input should be a valid boolean"),
        ({"zero_optimization": {"leaf_module": 3}}, r"zero_optimization(.leaf_module)?: "),
    ],
)
def test_values_of_other_sections_are_checked_by_deepspeed_before_its_engine_reads_them(
    values: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=rf"deepspeed\.{said}"):
        check_values({"zero_optimization": {"stage": 3}, **values})


def test_what_deepspeed_takes_passes() -> None:
    values: dict[str, Any] = {
        "data_types": {"grad_accum_dtype": "fp32", "buffer_dtype": "bf16", "keep_in_fp32_modules": ["norm"]},
        "comms_logger": {"enabled": False, "prof_ops": ["all_reduce"]},
        "csv_monitor": {"enabled": False, "output_path": "x", "job_name": "y"},
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "flops_profiler": {"enabled": False, "profile_step": 2, "recompute_fwd_factor": 0.5, "output_file": None},
        "communication_data_type": "fp32", "gradient_allreduce_op": "mean", "gradient_predivide_factor": 1,
        "prescale_gradients": False, "steps_per_print": 1e9, "aio": {"queue_depth": 16},
    }  # fmt: skip
    check_values(derived(make(resources={"workers": 2}, deepspeed=values)))


def test_keys_of_the_other_sections_are_deepspeed_s() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.profiling import constants as profiling
    from deepspeed.runtime import constants
    from deepspeed.utils.config import TIMERS_THROUGHPUT, DeepSpeedThroughputTimerConfig

    found = deepspeed_keys._SECTIONS
    for name, model in (
        ("comms_logger", CommsLoggerConfig), ("csv_monitor", CSVConfig), ("tensorboard", TensorBoardConfig),
        ("wandb", WandbConfig), ("timers.throughput", DeepSpeedThroughputTimerConfig),
    ):  # fmt: skip
        assert set(found[name]) == set(model.model_fields), name
    assert found["timers"] == (TIMERS_THROUGHPUT,)
    of_profiler = [n for n in vars(profiling) if n.startswith("FLOPS_PROFILER_") and not n.endswith("_DEFAULT")]
    assert set(found["flops_profiler"]) == {getattr(profiling, n) for n in of_profiler if "FORMAT" not in n}
    types = {constants.GRAD_ACCUM_DTYPE, constants.BUFFER_DTYPE, constants.KEEP_IN_FP32_MODULES}
    assert set(found["data_types"]) == types
    sections = {key.partition(".")[0] for key in deepspeed_keys._KINDS if "." in key}
    assert sections <= set(found), "a kind is known of keys that are"


def test_every_key_of_zero_optimization_is_taken_or_refused_with_its_reason() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    def reads(key: str) -> bool:
        return key in deepspeed_keys._ZERO or any(
            f"zero_optimization.{key}" in known for known in (deepspeed_keys._OWNED, deepspeed_keys._REFUSED)
        )

    old = {"cpu_offload_use_pin_memory", "compute_grad_norm", "override_module_apply"}  # deprecated, or not a user's
    fields = DeepSpeedZeroConfig.model_fields
    left = {name for name, field in fields.items() if not reads(name) and not reads(field.alias or "")}
    assert left == old
    assert set(deepspeed_keys._ZERO) <= set(fields) | {field.alias for field in fields.values()}


def test_keys_of_aio_are_deepspeed_s() -> None:
    from deepspeed.runtime.swap_tensor import constants

    known = {value for name, value in vars(constants).items() if name.startswith("AIO_") and isinstance(value, str)}
    assert set(deepspeed_keys._AIO) <= known
    make(deepspeed={"aio": {"queue_depth": 16}}, resources={"sharding": "zero3"})
    with pytest.raises(RecipeError, match=r"no key 'aio\.queue_dept' that can be set here"):
        make(deepspeed={"aio": {"queue_dept": 16}}, resources={"sharding": "zero3"})
