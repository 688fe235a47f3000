"""From a sweep's record to a registered candidate, on the tiny model and a real Ray: chosen, confirmed, retrained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ft_ray import base_model, model_loading, ray_session, search_space, sweep_finish, sweep_winner
from ft_ray.chat import chat_of
from ft_ray.dataset import prepare
from ft_ray.errors import GateRefused
from ft_ray.packed_training import train_packed
from ft_ray.recipe import Recipe, from_dict
from ft_ray.shared_base import SharedBase
from ft_ray.storage import Store
from ft_ray.sweep_results import Point, SweepResult, TrialResult

pytestmark = [pytest.mark.heavy, pytest.mark.faults]  # a minute: not for every run

# The default learns nothing in 24 steps; t0 and t1 do; t2 is the default under another name.
TRIALS: dict[str, dict[str, Any]] = {
    "t0": {"optim.lr": 3e-3}, "t1": {"optim.lr": 5e-3, "lora.r": 16, "lora.alpha": 32}, "t2": {"optim.lr": 1e-4},
}  # fmt: skip


def recipe_of(folder: Path, model: Path) -> Recipe:
    return from_dict({
        "name": "swept",
        "model": {"id": str(model)},
        "data": {"train": [{"path": str(folder / "rows.jsonl")}], "split": {"validation": 0.15, "test": 0.1}},
        "method": "lora",
        "lora": {"r": 8, "alpha": 16, "dropout": 0.0},
        "sequence": {"max_length": 64},
        "batch": {"global": 8},
        "optim": {"name": "adamw_torch", "lr": 1e-4},
        "schedule": {"epochs": 2, "max_steps": 24},
        "precision": "fp32",
        "gradient_checkpointing": False,
        "evaluation": {"every": 12, "max_new_tokens": 4, "baselines": False, "max_rows": 4},
        "checkpoint": {"every": 12},
        "resources": {"workers": 1, "gpus": 0},
        "tracking": {"to": []},
        "storage": str(folder / "runs"),
    })  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Recipe, SweepResult]:
    """A finished sweep: three real trainings, and the record that `ft-ray sweep` would leave of them."""
    folder = tmp_path_factory.mktemp("swept")
    rows = [{"prompt": f"say the word {i}", "completion": "yes yes yes yes"} for i in range(160)]
    for i in (7, 77, 120):
        rows[i]["completion"] = "quite another answer"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = recipe_of(folder, tiny_model)
    files = base_model.resolve(recipe.model)
    prepared = prepare(recipe, chat_of(recipe.model, files.folder), model_hash=files.hash)
    shared = SharedBase(model_loading.load_model(files, recipe, device="cpu", quantized=False))
    recipes = {name: search_space.apply(recipe, config) for name, config in TRIALS.items()}
    found = train_packed(shared, {n: (r, prepared) for n, r in recipes.items()}, folder=folder / "adapters")
    shared.close()
    store, trials = Store(recipe.run_path), []
    for name, run in found.items():
        checkpoint = f"sweep/trials/{name}/best"
        store.commit(folder / "adapters" / name, checkpoint)
        history = [Point(step=step, validation_loss=loss) for step, loss in run.history]
        trials.append(TrialResult(
            id=name, config=TRIALS[name], status="done", steps=run.steps, tokens=1, history=history,
            best_step=run.best_step, best_loss=run.best_loss, checkpoint=checkpoint,
        ))  # fmt: skip
    result = SweepResult(
        name=recipe.name, recipe=recipe.to_dict(), recipe_hash=recipe.hash, space={}, trials=trials, mean_k=3.0,
        seconds=1.0, trained_tokens=3, device="cpu", shared=True,
    )  # fmt: skip
    return recipe, result


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session.session(num_cpus=2):
        yield


@pytest.fixture(scope="module")
def finished(session: None, swept: tuple[Recipe, SweepResult]) -> Any:
    said: list[str] = []
    recipe, result = swept

    def listen(event: dict[str, Any]) -> None:
        if event["kind"] == "status":
            said.append(event["message"])

    analysis, manifest = sweep_finish.promote_winner(recipe, result, top=3, seeds=2, on_event=listen)
    return analysis, manifest, said


def test_the_winner_is_confirmed_retrained_and_registered(finished: Any, swept: tuple[Recipe, SweepResult]) -> None:
    analysis, manifest, said = finished
    chosen = analysis.chosen
    assert chosen in ("t0", "t1") and analysis.config == TRIALS[chosen]
    confirmed = analysis.confirmation
    # t2 has the default's own values: it is not compared with itself.
    assert {c.name for c in confirmed.comparisons} == {"t0", "t1"}
    assert confirmed.comparisons[0].high < 0 and f"{chosen} is better than the default" in confirmed.verdict
    assert any("better than the default" in line for line in said)
    sweep = manifest.lineage.sweep
    assert sweep["trial"] == chosen and sweep["matches"] and sweep["recipe_hash"] == swept[0].hash
    assert sweep["expected"][0] <= sweep["retrained_loss"] <= sweep["expected"][1]
    assert {n: r.status for n, r in manifest.stages.items()} == dict.fromkeys(
        ["data_check", "train", "merge", "evaluate", "register"], "done"
    )
    assert manifest.stages["train"].metrics["steps"] == 24


def test_packed_and_alone_agree_far_below_the_gate(finished: Any) -> None:
    """Same seed, fp32, no dropout: only the start weights' generator differs between the two paths."""
    _, manifest, _ = finished
    sweep = manifest.lineage.sweep
    packed = sum(sweep["packed_losses"]) / len(sweep["packed_losses"])
    assert abs(packed - sweep["retrained_loss"]) < 0.1 * packed


def test_the_winner_is_a_plain_peft_folder(finished: Any, swept: tuple[Recipe, SweepResult], tiny_model: Path) -> None:
    store = Store(swept[0].run_path)
    assert store.verify(sweep_winner.TREE) == []
    folder = store.local(sweep_winner.TREE)
    assert {p.name for p in folder.iterdir() if not p.name.startswith(".")} <= {
        "adapter_config.json", "adapter_model.safetensors", "committed.json", "_COMMITTED", "COMMITTED"
    }  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = base(ids).logits
    tuned = PeftModel.from_pretrained(base, folder)
    assert tuned.peft_config["default"].r == TRIALS[finished[0].chosen].get("lora.r", 8)
    assert not torch.allclose(tuned(ids).logits, plain)


_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

model, adapter, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
llm = LLM(model=model, dtype="float32", enforce_eager=True, enable_lora=True, max_lora_rank=16, max_model_len=64,
          max_num_seqs=2, kv_cache_memory_bytes=1 << 26, skip_tokenizer_init=True)
asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
found = []
for lora in (None, LoRARequest("winner", 1, adapter)):
    out = llm.generate({"prompt_token_ids": ids}, asked, lora_request=lora, use_tqdm=False)[0]
    found.append([entry[token].logprob for token, entry in zip(ids[1:], out.prompt_logprobs[1:])])
print("FOUND", json.dumps(found))
"""


def test_vllm_loads_the_winner_and_answers_as_peft_does(finished: Any, swept: Any, tiny_model: Path) -> None:
    folder = Store(swept[0].run_path).local(sweep_winner.TREE)
    ids = [5, 6, 7, 8, 9, 10, 11, 12]
    done = subprocess.run(
        [sys.executable, "-c", _VLLM, str(tiny_model), str(folder), json.dumps(ids)], capture_output=True, text=True,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    plain, tuned = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))[6:])
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokens = torch.tensor([ids])
    for found, model in ((plain, base), (tuned, PeftModel.from_pretrained(base, folder))):
        with torch.no_grad():
            expected = model(tokens).logits.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-3, rtol=0)
    assert max(abs(a - b) for a, b in zip(plain, tuned, strict=True)) > 0.05, "the adapter changes nothing"


def test_pages_pictures_and_wrong_labels(finished: Any, swept: tuple[Recipe, SweepResult]) -> None:
    store = Store(swept[0].run_path)
    analysis = store.read_json("sweep/analysis.json")
    assert analysis["chosen"] == analysis["confirmation"]["winner"] == finished[0].chosen
    page = store.read("sweep/report.html").decode()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org/", "") and "https://" not in page
    assert store.read("sweep/loss.png").startswith(b"\x89PNG")
    lines = store.read("sweep/relabel.csv").decode().splitlines()
    assert lines[0].startswith("file,line,prompt,answer,least_loss,loss_")
    assert all("quite another answer" in line for line in lines[1:])
    assert len(lines) > 1  # at least one of the three is in the training split


def test_the_same_command_again_trains_nothing(
    finished: Any, swept: tuple[Recipe, SweepResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*given: Any) -> Any:
        raise AssertionError("it would train again")

    monkeypatch.setattr(sweep_winner, "_remote", refused)
    monkeypatch.setattr("ft_ray.trainer.train", refused)
    analysis, manifest, _ = finished
    again, after = sweep_finish.promote_winner(*swept, top=3, seeds=2, on_event=lambda event: None)
    assert again == analysis and after.lineage.sweep == manifest.lineage.sweep
    assert after.stages["register"].metrics == manifest.stages["register"].metrics


def test_a_winner_that_does_not_come_out_again_is_refused(finished: Any, swept: tuple[Recipe, SweepResult]) -> None:
    analysis, _, _ = finished
    recipe, result = swept
    lucky = analysis.trial.model_copy(update={"best_loss": analysis.trial.best_loss / 3})
    claimed = sweep_finish.Analysis(lucky, analysis.config, analysis.chosen, None, None, None, ())
    with pytest.raises(GateRefused, match="retrained alone"):
        sweep_finish.retrain(recipe, result, claimed, on_event=lambda event: None)
