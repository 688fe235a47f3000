"""Full fine-tuning shared out by ZeRO over two processes: the numbers of one process, resumable by any other number."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ft_ray import base_model, checkpoint, ray_session, recipe
from ft_ray.consolidate import consolidate
from ft_ray.errors import StorageError, TrainingError
from ft_ray.state_files import StateFiles
from ft_ray.storage import Store
from ft_ray.trainer import train
from tests import tiny
from tests.distributed.ranks import Job, run
from tests.distributed.test_trainer import Events, at_step
from tests.parity.test_training import make
from tests.token_rows import TokenRows

Results = dict[str, dict[str, Any]]
TINY = 107_200  # parameters of the tiny model


def full(base: Path, workers: int = 2, sharding: str = "auto", **values: Any) -> dict[str, Any]:
    resources = {"workers": workers, "sharding": sharding, **values.pop("resources", {})}
    settings: dict[str, Any] = {
        "optim": {"lr": 1e-3, "weight_decay": 0.1},
        "evaluation": {"every": 4},
        "checkpoint": {"every": 4},  # one is saved halfway too
    }
    return make(base, method="full", resources=resources, **{**settings, **values}).to_dict()


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("tied") / "model", tied=True, dtype="bfloat16")


@pytest.fixture(scope="module")
def dropout_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each rank draws from its own generator at every step."""
    return tiny.build(tmp_path_factory.mktemp("dropout") / "model", attention_dropout=0.2)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.2 GB in fp32: large beside what a process allocates anyway."""
    folder = tiny.build(tmp_path_factory.mktemp("wide") / "model")
    for path in folder.glob("model*"):
        path.unlink()
    config = LlamaConfig(
        vocab_size=259, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20MB")
    return folder


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tied_model: Path, wide_model: Path,
    dropout_model: Path,
) -> Results:  # fmt: skip
    """What two workers do, in one pair of processes: importing the libraries takes longer than a run."""
    folder = tmp_path_factory.mktemp("two")
    bf16 = {"precision": "bf16", "batch": {"per_device": 2}}
    jobs = [
        Job("warm", full(tiny_model), measure=True),
        Job("loading", full(wide_model), measure=True),
        Job("zero3", full(tiny_model)),
        Job("resumed", full(tiny_model), resume=str(folder / "zero3" / "step-4")),
        Job("zero2", full(tiny_model, sharding="zero2")),
        Job("by_matrix", full(tiny_model, deepspeed={"zero_optimization": {"leaf_module": {}}})),
        Job("snapshots", full(tiny_model, checkpoint={"every": 4, "snapshot": True}), twice=True),
        Job("tied", full(tied_model, **bf16)),
        Job("tied_resumed", full(tied_model, **bf16), resume=str(folder / "tied" / "step-4")),
        Job("dropout", full(dropout_model)),
        Job("dropout_resumed", full(dropout_model), resume=str(folder / "dropout" / "step-4")),
        Job("kept_activations", full(tiny_model, gradient_checkpointing=False)),
        Job("recomputed_again", full(tiny_model)),
        Job("answering", full(tiny_model, evaluation={"every": 4, "format_rows": 2, "max_new_tokens": 4})),
    ]
    return run(folder, 2, jobs)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, two: Results) -> Results:
    before = str(two["zero3"]["folder"] / "step-4")
    jobs = [
        Job("plain", full(tiny_model, 1)),
        Job("from_two", full(tiny_model, 1), resume=before),
        Job("zero3_from_two", full(tiny_model, 1, "zero3"), resume=before),
        Job("other_optimizer", full(tiny_model, 1, optim={"name": "sgd"}), resume=before),
    ]
    return run(tmp_path_factory.mktemp("one"), 1, jobs)


def weights(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(result["folder"] / "live.pt", weights_only=True)
    return found


def furthest(result: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two runs' losses at the same steps; the shorter one was resumed."""
    count = min(len(result["losses"]), len(other["losses"]))
    assert count >= 2 and "error" not in result
    pairs = zip(result["losses"][-count:], other["losses"][-count:], strict=True)
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.heavy
def test_each_rank_holds_half_of_weights_and_optimizer(two: Results) -> None:
    assert [rank["local"] for rank in two["zero3"]["ranks"]] == pytest.approx([TINY * 4 / 2] * 2, rel=0.01)
    assert [rank["local"] for rank in two["zero2"]["ranks"]] == [TINY * 4] * 2, "ZeRO-2 leaves the weights whole"
    for name in ("zero3", "zero2"):
        files = sorted((two[name]["folder"] / "step-8").glob("state-*.safetensors"))
        assert [f.name for f in files] == [f"state-0000{r}-of-00002.safetensors" for r in (0, 1)]
        sizes = [sum(t.numel() for t in load_file(f).values()) for f in files]
        assert sum(sizes) == 3 * TINY, "weights and two moments, every element once"
        assert sizes == pytest.approx([1.5 * TINY] * 2, rel=0.02)
    assert two["zero3"]["facts"]["trainable_parameters"] == TINY


def test_no_rank_holds_the_whole_model_while_it_loads(two: Results, wide_model: Path) -> None:
    whole = 4 * sum(t.numel() for f in wide_model.glob("*.safetensors") for t in load_file(f).values())
    for rank in two["loading"]["ranks"]:
        assert rank["resident"] == pytest.approx(whole / 2, rel=0.01)
        assert rank["loading"] < 0.75 * whole, "with every buffer that loading takes"


@pytest.mark.parametrize("name", ["zero3", "zero2"])
def test_the_losses_are_those_of_a_single_process(name: str, two: Results, one: Results) -> None:
    assert len(two[name]["losses"]) == 8
    assert furthest(two[name], one["plain"]) < 1e-6
    assert two[name]["norms"] == pytest.approx(one["plain"]["norms"], abs=1e-5)
    assert two[name]["evaluation"] == pytest.approx(one["plain"]["evaluation"], abs=1e-6)
    for key, value in weights(one["plain"]).items():
        torch.testing.assert_close(weights(two[name])[key], value, atol=5e-5, rtol=0)


def test_training_goes_on_after_the_sharded_model_has_answered_prompts(two: Results) -> None:
    """Weights gathered in inference mode would be inference tensors, which autograd may not save for a backward."""
    asked = [row for row in two["answering"]["evaluations"] if "valid" in row]
    assert len(asked) >= 2 and asked[0]["step"] < 8, "in the middle too"
    assert two["answering"]["losses"] == two["zero3"]["losses"]
    assert two["answering"]["evaluation"] == two["zero3"]["evaluation"]


@pytest.mark.parametrize("name", ["by_matrix", "kept_activations", "recomputed_again"])
def test_layers_taken_whole_train_as_matrix_by_matrix(name: str, two: Results, one: Results) -> None:
    assert two["zero3"]["leaves"] == two["kept_activations"]["leaves"] == 2, "the decoder layers"
    assert two["by_matrix"]["leaves"] == two["zero2"]["leaves"] == 0, "the recipe said so; nothing is gathered"
    assert furthest(two[name], two["zero3"]) < 1e-6 and furthest(two[name], one["plain"]) < 1e-6
    assert two[name]["norms"] == pytest.approx(two["zero3"]["norms"], abs=1e-5)
    assert two[name]["local"] == two["zero3"]["local"]
    own = {"zero3": False, "by_matrix": True, "kept_activations": True, "recomputed_again": False}
    assert two[name]["own_linear"] is own[name], "DeepSpeed's Linear, of which a process gets rid again"


@pytest.mark.parametrize(
    ("straight", "resumed"), [("zero3", "resumed"), ("tied", "tied_resumed"), ("dropout", "dropout_resumed")]
)
def test_the_same_workers_resume_bit_for_bit(straight: str, resumed: str, two: Results) -> None:
    assert two[resumed]["losses"] == two[straight]["losses"][4:]
    assert two[resumed]["norms"] == two[straight]["norms"][4:]
    before, after = weights(two[straight]), weights(two[resumed])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_random_numbers_go_on_where_they_were(two: Results) -> None:
    """What the case of dropout above rests on: numbers are drawn, and every rank draws its own."""
    assert furthest(two["dropout"], two["zero3"]) > 1e-4
    states = [torch.load(two["dropout"]["folder"] / "step-4" / f"rng_state_{rank}.pth", weights_only=False)["cpu"]
              for rank in (0, 1)]  # fmt: skip
    assert not torch.equal(*states)


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.glob("state*"))
    assert len(names) >= 2 and names == sorted(path.name for path in other.glob("state*"))
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_a_snapshot_that_is_written_while_training_goes_on_is_of_its_step(two: Results) -> None:
    assert two["snapshots"]["losses"] == two["zero3"]["losses"]
    places = [(two[name]["folder"] / f"step-{at}") for at in (2, 4, 6, 8) for name in ("snapshots", "zero3")]
    assert all(same_files(*pair) for pair in zip(places[::2], places[1::2], strict=True))
    assert not same_files(places[0], places[2]), "steps differ"
    at_once = two["snapshots"]["folder"] / "at-once"
    assert all(same_files(at_once / place.name, place) for place in places[::2])


def test_one_worker_goes_on_where_two_stopped(two: Results, one: Results) -> None:
    for name in ("from_two", "zero3_from_two"):
        assert len(one[name]["losses"]) == 4
        assert furthest(one[name], two["zero3"]) < 1e-5


def test_two_workers_go_on_where_one_stopped(one: Results, tiny_model: Path, tmp_path: Path) -> None:
    jobs = [
        Job("plain", full(tiny_model), resume=str(one["plain"]["folder"] / "step-4")),
        Job("zero3", full(tiny_model), resume=str(one["zero3_from_two"]["folder"] / "step-6")),
    ]
    back = run(tmp_path, 2, jobs)
    assert [len(back[name]["losses"]) for name in ("plain", "zero3")] == [4, 2]
    assert all(furthest(back[name], one["plain"]) < 1e-5 for name in back)


def test_the_written_model_is_the_live_one(
    two: Results, one: Results, tiny_model: Path, tied_model: Path, tmp_path: Path
) -> None:
    for result, base, dtype in (
        (two["zero3"], tiny_model, "float32"),
        (two["zero2"], tiny_model, "float32"),
        (one["plain"], tiny_model, "float32"),
        (two["tied"], tied_model, "bfloat16"),
    ):
        out = tmp_path / result["folder"].parent.name / result["folder"].name
        out.mkdir(parents=True)
        counts = consolidate(result["folder"] / "step-8", base, out, dtype=dtype, max_shard_bytes=100_000)
        assert counts["shards"] > 1 and (out / "model.safetensors.index.json").exists()
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        live = weights(result)
        assert loaded.dtype == getattr(torch, dtype)
        assert dict(loaded.named_parameters()).keys() == live.keys()
        assert all(torch.equal(parameter, live[name]) for name, parameter in loaded.named_parameters())
        trained = [n for n, p in AutoModelForCausalLM.from_pretrained(base, dtype="auto").named_parameters()
                   if not torch.equal(p, live[n])]  # fmt: skip
        # A norm's weight of 1 moves less than bf16 can tell within a few steps; every matrix moved.
        assert [n for n in live if live[n].dim() > 1 and n not in trained] == []
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight, "tied in the file and tied when loaded"


def test_another_optimizer_or_a_lost_part_is_refused(two: Results, one: Results, tmp_path: Path) -> None:
    assert "has states of AdamW, this run steps with SGD: go on with the optim.name" in one["other_optimizer"]["error"]
    copy = tmp_path / "copy"
    shutil.copytree(two["zero3"]["folder"] / "step-4", copy)
    part = copy / "state-00001-of-00002.safetensors"
    held = load_file(part)
    name = next(key for key in held if key.startswith("weight/"))
    save_file({k: v for k, v in held.items() if k != name}, part)
    parameter = name.partition("/")[2].partition("@")[0]
    with StateFiles(copy) as state, pytest.raises(TrainingError, match=r"elements of weight of .*: remove that"):
        state.read("weight", parameter)
    part.unlink()
    with StateFiles(copy) as state, pytest.raises(TrainingError, match=r"and lacks state-00001-of-00002.safetensors"):
        state.read("weight", parameter)


@pytest.mark.heavy
def test_on_ray_two_workers_leave_an_ordinary_model(one: Results, tiny_model: Path, tmp_path: Path) -> None:
    settings = full(tiny_model, checkpoint={"every": 4, "snapshot": True})
    store, made, events = Store(tmp_path / "run"), recipe.from_dict(settings), Events()
    files = base_model.resolve(made.model)
    with ray_session.session(num_cpus=2):
        outcome = train(made, TokenRows(count=30), files, store, on_event=events)
    stood_still = [event["stood_still"] for event in events if event["kind"] == "checkpoint"]
    assert outcome.metrics["saves"] == len(stood_still) == 4
    assert outcome.metrics["stood_still"] == max(stood_still) and min(stood_still) > 0
    assert (outcome.status, outcome.tree, outcome.metrics["workers"]) == ("done", "model", 2)
    losses = [r["loss"] for r in outcome.history if r["kind"] == "step"]
    assert losses == pytest.approx(one["plain"]["losses"], abs=1e-6)
    newest = max((n for n in store.list("checkpoints") if "-step-" in n), key=checkpoint.step_of)
    written = set(store.tree(f"checkpoints/{newest}") or {})
    parts = {f"state-0000{rank}-of-00002.safetensors" for rank in (0, 1)}
    assert parts | {"state.json", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth", "progress.json"} <= written
    assert not any("optim" in name or name.startswith("model") for name in written)
    assert store.verify("model") == []
    folder = store.local("model")
    assert {"config.json", "model.safetensors", "tokenizer.json", "ft_ray.json"} <= {p.name for p in folder.iterdir()}
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_on_ray_two_workers_are_interrupted_and_one_ends_the_run(tiny_model: Path, tmp_path: Path) -> None:
    asked = full(tiny_model, checkpoint={"every": 4, "keep": 2}, schedule={"epochs": 10})
    made, rows = recipe.from_dict(asked), TokenRows(count=30)
    files, store = base_model.resolve(made.model), Store(tmp_path / "run")
    with ray_session.session(num_cpus=2):
        events = Events(at_step(3), threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start)
        outcome = train(made, rows, files, store, on_event=events)
        assert (outcome.status, outcome.reason, outcome.metrics["workers"]) == ("stopped", "interrupted", 2)
        stopped = outcome.metrics["steps"]
        alone = recipe.from_dict({**asked, "resources": {"workers": 1}})
        outcome = train(alone, rows, files, store, on_event=Events())
    assert (outcome.status, outcome.tree, outcome.metrics["resumed_from"]) == ("done", "model", stopped)
    losses = [r["loss"] for r in outcome.history if r["kind"] == "step"]
    straight = run(tmp_path / "straight", 1, [Job("plain", alone.to_dict())])
    assert losses == pytest.approx(straight["plain"]["losses"], abs=1e-5)


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_disk_that_is_full_when_a_snapshot_is_written_keeps_what_was_saved(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small files of the second checkpoint fit the disk on which it is staged, and its pieces do not."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    tempfile.gettempdir()  # this process keeps its own
    monkeypatch.setenv("TMPDIR", str(disk))
    store, made = Store(tmp_path / "run"), recipe.from_dict(
        full(tiny_model, checkpoint={"every": 4, "keep": 9, "snapshot": True}, schedule={"epochs": 20})
    )

    def fill() -> None:
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 300_000))

    events = Events(lambda event: event["kind"] == "checkpoint", fill)
    try:
        with (
            ray_session.session(num_cpus=2),
            pytest.raises(StorageError, match=r"no space left at .*earlier artifacts are intact") as caught,
        ):
            train(made, TokenRows(count=30), base_model.resolve(made.model), store, on_event=events)
        assert caught.value.exit_code == 1
        assert not any("retry" in event.get("message", "") for event in events), "a full disk is not tried again"
        committed = [n for n in store.list("checkpoints") if store.tree(f"checkpoints/{n}")]
        assert committed and all(store.verify(f"checkpoints/{n}") == [] for n in committed)
        saved = [event["step"] for event in events if event["kind"] == "checkpoint"]
        assert sorted(map(checkpoint.step_of, committed)) == saved
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_every_sharding_gives_the_same_losses_and_takes_over_from_every_other(tiny_model: Path, tmp_path: Path) -> None:
    plain = run(tmp_path / "one", 1, [Job("plain", full(tiny_model, 1))])["plain"]
    kinds = ("zero3", "zero2", "zero1", "ddp")
    jobs = [Job(kind, full(tiny_model, sharding=kind)) for kind in kinds]
    offload = {"offload_optimizer": True, "offload_parameters": True}
    jobs += [
        Job("offloaded", full(tiny_model, resources=offload)),
        Job("accumulated", full(tiny_model, batch={"per_device": 1})),
        Job("kept", full(tiny_model, gradient_checkpointing=False)),
        Job("hpz", full(tiny_model, deepspeed={"zero_optimization": {"zero_hpz_partition_size": 2}})),
    ]
    written_later = {"checkpoint": {"every": 4, "snapshot": True}}
    jobs += [Job(f"{kind}_snapshots", full(tiny_model, sharding=kind, **written_later)) for kind in kinds]
    jobs.append(Job("offloaded_snapshots", full(tiny_model, resources=offload, **written_later)))
    jobs += [
        Job(f"{a}_to_{b}", full(tiny_model, sharding=b), resume=str(tmp_path / a / "step-4"))
        for a in kinds
        for b in kinds
        if a != b
    ]
    bf16 = {"sharding": "zero1", "precision": "bf16", "batch": {"per_device": 2}}  # an optimizer class of its own
    jobs += [
        Job("bf16", full(tiny_model, **bf16)),
        Job("bf16_resumed", full(tiny_model, **bf16), resume=str(tmp_path / "bf16" / "step-4")),
    ]
    found = run(tmp_path, 2, jobs)
    straight, resumed = found.pop("bf16"), found.pop("bf16_resumed")
    assert len(straight["losses"]) == 8 and resumed["losses"] == straight["losses"][4:]
    assert len(found) == 25
    own_groups = {name: found[name]["own_groups"] for name in ("zero3", "hpz")}
    assert own_groups["zero3"] == 0 < own_groups["hpz"], "hpZ gathers every weight within a group of its own"
    for kind in (*kinds, "offloaded"):
        for at in (2, 4, 6, 8):
            assert same_files(tmp_path / kind / f"step-{at}", tmp_path / f"{kind}_snapshots" / f"step-{at}"), kind
    for name, result in found.items():
        assert furthest(result, plain) < 1e-6, name
        assert result["evaluation"] == pytest.approx(plain["evaluation"], abs=1e-6), name
