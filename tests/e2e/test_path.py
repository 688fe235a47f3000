"""The road from data to champion on the tiny model, through the public API and the command line."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import ft_ray
from ft_ray import ray_session
from ft_ray.chat import Chat, load_tokenizer
from ft_ray.errors import BudgetSpent, GateRefused, InputError, StorageError
from ft_ray.recipe import Recipe, from_dict
from ft_ray.registry import Registry
from ft_ray.run_folder import trained_by
from ft_ray.storage import Store
from tests import tiny

pytestmark = pytest.mark.heavy
ROOT = Path(__file__).parents[2]


def values(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "model": {"id": str(model)},
        "data": {"train": [{"path": str(folder / "rows.jsonl")}], "split": {"validation": 0.15, "test": 0.2}},
        "method": "lora",
        "lora": {"r": 8, "alpha": 16, "dropout": 0.0},
        "sequence": {"max_length": 128},
        "batch": {"global": 8},
        "optim": {"name": "adamw_torch", "lr": 1e-2},
        "schedule": {"epochs": 1, "max_steps": 12},
        "precision": "fp32",
        "gradient_checkpointing": False,
        "evaluation": {"every": 6, "max_new_tokens": 8, "few_shot": 1, "max_rows": 16},
        "checkpoint": {"every": 4},
        "resources": {"workers": 1, "gpus": 0},
        "tracking": {"to": []},
        "storage": str(folder / "runs"),
        **changes,
    }


@contextlib.contextmanager
def openai_server(answer: str) -> Iterator[str]:
    """A real HTTP server with an OpenAI-shaped chat route that always answers `answer`; yields its /v1 address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            message = {"role": "assistant", "content": answer}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            body = {"id": "x", "object": "chat.completion", "created": 0, "model": "theirs", "choices": [choice]}
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session.session():
        yield


@pytest.fixture(scope="module")
def trained(session: None, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Recipe, Any]:
    folder = tmp_path_factory.mktemp("path")
    tiny.rows(folder / "rows.jsonl", 200)
    recipe = from_dict(values(folder, tiny_model, budget={"usd_per_hour": 2.5}))
    return recipe, ft_ray.run(recipe)


def test_the_manifest_shows_every_stage_steps_and_hashes(trained: tuple[Recipe, Any]) -> None:
    recipe, manifest = trained
    assert {n: r.status for n, r in manifest.stages.items()} == dict.fromkeys(
        ["data_check", "train", "merge", "evaluate", "register"], "done"
    )
    assert manifest.stages["train"].metrics["steps"] == 12
    store = Store(recipe.run_path)
    for tree in ("adapter", "merged"):
        assert store.verify(tree) == []
    lineage = manifest.lineage
    assert lineage.recipe_hash == recipe.hash and lineage.base_hash and lineage.template_hash
    assert set(lineage.data_hash) == {"train", "validation", "test"}
    assert manifest.stages["merge"].metrics["kl"] < 1e-6
    scores = manifest.stages["evaluate"].metrics
    assert scores["primary"] in scores["tuned"] and scores["rows"] == 16
    cost = manifest.stages["train"].metrics["cost"]
    assert cost["hours"] > 0 and cost["usd"] == pytest.approx(cost["hours"] * 2.5)
    assert manifest.stages["train"].metrics["plan"]["total"] > 2**29
    page = store.read("report.html").decode()
    assert "<h2>Samples</h2>" in page and "<h2>Cost</h2>" in page and scores["seconds"]["tuned"] > 0
    assert scores["heldout_loss"]["tuned"] < scores["heldout_loss"]["base"]
    predictions = [json.loads(line) for line in store.read("predictions.jsonl").splitlines()]
    assert len(predictions) == 16 and all(p["prompt"][-1]["role"] == "user" for p in predictions)


def test_an_endpoint_and_general_data_are_measured_beside(trained: tuple[Recipe, Any], tmp_path: Path) -> None:
    recipe, _ = trained
    (tmp_path / "general.jsonl").write_text(
        "".join(json.dumps({"prompt": f"say {i}", "completion": f"word {i}"}) + "\n" for i in range(8))
    )
    evaluation = recipe.evaluation.model_copy(update={"forgetting": str(tmp_path / "general.jsonl"), "max_rows": 4})
    changed = recipe.model_copy(update={"evaluation": evaluation})
    with openai_server("7") as url:
        manifest = ft_ray.evaluate(changed, split="validation", url=url, model="theirs")
    metrics = manifest.stages["evaluate_validation_remote"].metrics
    assert metrics["remote"]["exact_match"]["n"] == 4
    assert set(metrics["general_loss"]) == {"base", "tuned"} and metrics["general_loss"]["base"] > 0
    predictions = Store(recipe.run_path).read("predictions_validation_beside_remote.jsonl").splitlines()
    assert [json.loads(line)["prediction"] for line in predictions] == ["7"] * 4
    with pytest.raises(InputError, match="both its url"):
        ft_ray.evaluate(recipe, url="http://127.0.0.1:9/v1")


def test_training_rows_that_are_still_wrong(trained: tuple[Recipe, Any], tmp_path: Path) -> None:
    from ft_ray import reporting

    recipe, _ = trained
    with pytest.raises(InputError, match="--split train first"):
        reporting.write_corrections(recipe.run_path, str(tmp_path / "wrong.jsonl"))
    manifest = ft_ray.evaluate(recipe, split="train")
    assert manifest.stages["evaluate_train"].metrics["rows"] == 16
    count = reporting.write_corrections(recipe.run_path, str(tmp_path / "wrong.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "wrong.jsonl").read_text().splitlines()]
    assert len(rows) == count > 0 and all(r["messages"][-1]["role"] == "assistant" for r in rows)


def test_running_again_repeats_nothing(trained: tuple[Recipe, Any]) -> None:
    recipe, manifest = trained
    events: list[dict[str, Any]] = []
    again = ft_ray.run(recipe, on_event=events.append)
    assert {e["state"] for e in events if e["kind"] == "stage"} == {"skipped"}
    assert again.stages["register"].metrics == manifest.stages["register"].metrics


def test_a_corrupt_artifact_is_made_again(trained: tuple[Recipe, Any]) -> None:
    recipe, _ = trained
    store = Store(recipe.run_path)
    before = store.tree("merged")
    store.remove("merged")
    manifest = ft_ray.merge(recipe)
    assert manifest.stages["merge"].status == "done"
    assert store.tree("merged") == before


def test_the_merge_gate_refuses_with_exit_code_3(trained: tuple[Recipe, Any], tmp_path: Path) -> None:
    # A copy of the trained run, so that the others find theirs as it was.
    made, _ = trained
    shutil.copytree(made.run_path, tmp_path / "runs" / "tiny")
    Store(f"{tmp_path}/runs/tiny").remove("merged")
    strict = made.evaluation.model_copy(update={"parity_kl": 1e-30})
    recipe = made.model_copy(update={"evaluation": strict, "storage": str(tmp_path / "runs")})
    with pytest.raises(GateRefused, match="mean KL") as caught:
        ft_ray.merge(recipe)
    assert caught.value.exit_code == 3
    store = Store(recipe.run_path)
    assert store.tree("adapter") is not None and store.tree("merged") is None
    manifest = ft_ray.Manifest.load(store)
    assert manifest is not None and manifest.stages["merge"].status == "failed"
    assert manifest.stages["merge"].metrics["kl"] > 1e-30
    with pytest.raises(InputError, match="run ft-ray merge first"):
        ft_ray.evaluate(recipe)


def test_promotion_gates_compare_on_the_same_test_rows(trained: tuple[Recipe, Any], tiny_model: Path) -> None:
    recipe, _ = trained
    registry = Registry(recipe.storage)
    forced = ft_ray.promote("tiny", storage=recipe.storage, force=True, why="first")
    assert registry.champion("tiny").version == forced["version"] == 1
    assert ft_ray.promote("tiny", storage=recipe.storage)["reasons"] == ["it was the champion already"]

    # Another seed too: with max_rows, both must have answered the same rows.
    worse = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"lr": 1e-6}), "seed": 1})
    with pytest.raises(InputError, match=r"optim.lr 0.01 -> 1e-06.*--fresh"):
        ft_ray.train(worse)
    ft_ray.run(worse, fresh=True)
    assert Store(registry.champion("tiny").source.rsplit("/", 1)[0]).verify("merged") == []
    with pytest.raises(GateRefused, match="not better than the champion's") as caught:
        ft_ray.promote("tiny", storage=recipe.storage)
    assert caught.value.exit_code == 3
    assert registry.champion("tiny").version == 1
    compared = ft_ray.compare("tiny@1", "tiny@2", storage=recipe.storage)
    assert compared["recipe"] == [("optim.lr", 0.01, 1e-6), ("seed", 0, 1)] and compared["data"] == []
    assert compared["rows"] == 16
    done = ft_ray.promote("tiny@2", storage=recipe.storage, force=True, why="to see it recorded")
    assert done["forced"] and done["previous"] == 1
    assert registry.champion("tiny").version == 2
    last = registry.history("tiny")[-1]
    assert (last.version, last.previous, last.forced) == (2, 1, True)
    assert "to see it recorded" in last.why and last.who


def test_an_adapter_made_elsewhere_reaches_every_gate(session: None, tmp_path: Path, tiny_model: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ft_ray.importing import import_adapter

    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "theirs")
    # With a chat template of its own, as Axolotl and Unsloth save it.
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = tiny.CHATML.replace("<|im_start|>", "<|im_start|>the ")
    tokenizer.save_pretrained(tmp_path / "theirs")
    tiny.rows(tmp_path / "rows.jsonl", 60)
    recipe, manifest = import_adapter(
        str(tmp_path / "theirs"), str(tiny_model), data=[str(tmp_path / "rows.jsonl")], storage=str(tmp_path / "runs"),
        overrides=["evaluation.max_new_tokens=24"],
    )  # fmt: skip
    assert recipe.evaluation.max_new_tokens == 24
    assert manifest.stages["data_check"].status == "done"
    assert manifest.stages["merge"].metrics["kl"] < 1e-6
    assert manifest.stages["evaluate"].metrics["rows"] > 0
    predictions = Store(recipe.run_path).read("predictions.jsonl")
    assert manifest.stages["evaluate"].artifacts["predictions.jsonl"] == hashlib.sha256(predictions).hexdigest()
    theirs, own = Chat(tokenizer).template_hash, Chat(load_tokenizer(tiny_model)).template_hash
    assert manifest.lineage.template_hash == theirs != own
    assert Registry(recipe.storage).newest("theirs").version == 1

    other = tiny.build(tmp_path / "other", layers=1)
    with pytest.raises(InputError) as caught:
        import_adapter(
            str(tmp_path / "theirs"), str(other), data=[str(tmp_path / "rows.jsonl")], name="bad",
            storage=str(tmp_path / "runs"),
        )  # fmt: skip
    assert "layers.1" in str(caught.value)
    assert not (tmp_path / "runs" / "bad").exists(), "an adapter that does not fit leaves no run behind"


@pytest.mark.timeout(600)  # whole trainings in processes of their own
@pytest.mark.parametrize("told", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.faults)])
def test_a_signal_leaves_a_run_that_resumes(tmp_path: Path, tiny_model: Path, told: signal.Signals) -> None:
    """Both signals leave the same state; the run that goes on from it is paid for once."""
    import yaml

    tiny.rows(tmp_path / "rows.jsonl", 400)
    settings = values(tmp_path, tiny_model, schedule={"epochs": 1000, "max_steps": 200}, checkpoint={"every": 100})
    settings["evaluation"] |= {"every": 1000}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ft_ray", "train", str(tmp_path / "recipe.yaml")]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
    assert child.stderr is not None
    seen: list[str] = []
    for line in child.stderr:
        seen.append(line)
        if "step " in line and "loss" in line:
            break
    child.send_signal(told)
    rest, _ = child.communicate(timeout=240), None
    assert child.returncode == 130, "".join(seen) + str(rest)
    store = Store(tmp_path / "runs" / "tiny")
    manifest = ft_ray.Manifest.load(store)
    assert manifest is not None and manifest.stages["train"].status == "stopped"
    assert store.tree("adapter") is None
    saved = [name for name in store.list("checkpoints") if "-step-" in name]
    assert saved and all(store.verify(f"checkpoints/{name}") == [] for name in saved)
    if told == signal.SIGTERM:
        return
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)["stages"]["train"]["metrics"]
    assert metrics["steps"] == 200 and metrics["resumed_from"] > 0


def test_a_spent_budget_stops_with_a_checkpoint_and_a_report(session: None, tmp_path: Path, tiny_model: Path) -> None:
    tiny.rows(tmp_path / "rows.jsonl", 200)
    settings = values(tmp_path, tiny_model, name="poor", budget={"hours": 1e-5})
    with pytest.raises(BudgetSpent, match="budget") as caught:
        ft_ray.run(from_dict(settings))
    assert caught.value.exit_code == 3
    store = Store(f"{tmp_path}/runs/poor")
    assert "Training was stopped at step" in store.read("report.html").decode(), "such a run ends with a report too"
    manifest = ft_ray.Manifest.load(store)
    assert manifest is not None and manifest.stages["train"].status == "stopped"
    stopped_at = manifest.stages["train"].metrics["steps"]
    assert 0 < stopped_at < 12
    assert f"-step-{stopped_at:08d}" in " ".join(store.list("checkpoints")), store.list("checkpoints")
    more = from_dict(settings | {"budget": {"hours": 1}})
    assert trained_by(more) == trained_by(from_dict(settings)), "with a larger budget the same run goes on"
    plan = ft_ray.plan(from_dict(settings | {"method": "lora"}))
    assert all(option.seconds and option.usd for option in plan.options), "time and cost from the checked data"


def test_what_would_fail_hours_later_fails_first(tmp_path: Path, tiny_model: Path) -> None:
    tiny.rows(tmp_path / "rows.jsonl", 40)
    for change, said in [
        ({"metric": "gone.py:score"}, "gone.py"),
        ({"schema": str(tmp_path / "gone.json")}, "gone.json"),
        ({"forgetting": str(tmp_path / "gone.jsonl")}, "gone.jsonl"),
    ]:
        settings = values(tmp_path, tiny_model, name="early")
        settings["evaluation"] |= change
        with pytest.raises(InputError, match=said):
            ft_ray.run(from_dict(settings))
    with pytest.raises(InputError, match="adamw_tourch"):
        ft_ray.run(from_dict(values(tmp_path, tiny_model, name="early", optim={"name": "adamw_tourch"})))
    assert not Store(f"{tmp_path}/runs/early").exists("data_check.json")


def test_two_runs_of_one_name_at_once(session: None, tmp_path: Path, tiny_model: Path) -> None:
    tiny.rows(tmp_path / "rows.jsonl", 40)
    recipe = from_dict(values(tmp_path, tiny_model, name="busy"))
    with Store(recipe.run_path).lock(), pytest.raises(StorageError, match="in use by process"):
        ft_ray.train(recipe)
