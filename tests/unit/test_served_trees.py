"""What a replica serves is what was checked at deployment, wherever the trees lie and whenever they are fetched."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ft_ray import serve_app, serve_ingress, serving
from ft_ray.chat import Chat, load_tokenizer
from ft_ray.errors import DamagedError, ModelError, ServingError, StorageError
from ft_ray.manifest import key_of
from ft_ray.registry import Registry
from ft_ray.serve_args import ServeArgs, parse
from ft_ray.serve_replica import Adapters, Engine, Fetch
from ft_ray.served_model import Served
from ft_ray.storage import COMMIT, Store
from tests import tiny
from tests.object_stores import FailingProxy, gs, s3


@pytest.fixture(scope="module", params=["local", "s3", "gs"])
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, FailingProxy | None]]:
    """Where run folders lie, and what may break on the way there."""
    folder = tmp_path_factory.mktemp("place")
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FT_RAY_CACHE", str(folder / "cache"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        if request.param == "local":
            yield str(folder / "runs"), None
        else:
            proxy = stack.enter_context(s3() if request.param == "s3" else gs(folder))
            yield f"{request.param}://runs/all", proxy


@pytest.fixture
def tree(place: tuple[str, FailingProxy | None], request: pytest.FixtureRequest) -> Store:
    """The run folder of a tiny model, `merged`, and of an adapter of it, `adapter`."""
    store = Store(f"{place[0]}/{request.node.name.partition('[')[0][-20:]}")
    with store.stage("merged") as out:
        tiny.build(out)
        chat = Chat(load_tokenizer(out))
        record = {"template_hash": chat.template_hash, "eos_ids": sorted(chat.eos_ids)}
        (out / "ft_ray.json").write_text(json.dumps(record))
    adapter_of(store, seed=0)
    return store


def adapter_of(store: Store, seed: int) -> None:
    """Commits an adapter; another seed is one of other weights, as a second run makes it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(store.local("merged"))
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    with store.stage("adapter") as out:
        get_peft_model(model, config).save_pretrained(str(out))


def found_in(store: Store) -> Served:
    return serving.find(ServeArgs(folder=store.address("merged"), adapters={"a": store.address("adapter")}))


def replica(found: Served) -> Any:
    """The LLMConfig as a replica sees it."""
    given = serve_app._llm_config(found, "cpu", 2)["callback_config"]["callback_kwargs"]
    engine = SimpleNamespace(hf_model_id="")
    return SimpleNamespace(
        callback_config=SimpleNamespace(callback_kwargs=given), engine=engine, get_engine_config=lambda: engine
    )


def fetched(config: Any) -> Path:
    """The folder that a replica has vLLM read."""
    callback: Any = Fetch.__new__(Fetch)
    callback.llm_config, callback.kwargs = config, config.callback_config.callback_kwargs
    callback.ctx = SimpleNamespace(run_init_node=True)
    asyncio.run(callback.on_before_node_init())
    assert callback.ctx.run_init_node is False
    return Path(config.engine.hf_model_id)


def load(adapters: Adapters, config: Any) -> Any:
    return asyncio.run(adapters.load_model_from_config("m:a", config))


def damage(store: Store, name: str) -> None:
    content = store.read(name)
    store.write(name, content[:-1] + bytes([content[-1] ^ 1]))


def test_a_replica_serves_what_was_found(tree: Store) -> None:
    found = found_in(tree)
    assert found.tree_hash == key_of(tree.tree("merged"))
    assert found.adapter_hashes == {"a": key_of(tree.tree("adapter"))}
    config, adapters = replica(found), Adapters()
    folder, adapter = fetched(config), load(adapters, config)
    for local, name in ((folder, "merged"), (Path(adapter.local_path), "adapter")):
        for file in (one for one in tree.tree(name) or {} if one != COMMIT):
            assert (local / file).read_bytes() == tree.read(f"{name}/{file}")
    assert adapter.model_id == "m:a" and adapter.lora_assigned_int_id == 1
    assert load(adapters, config) == adapter


def test_damaged_objects_are_not_served(tree: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found whole, damaged since: a replica that starts later, on a machine that has no copy yet."""
    found = found_in(tree)
    monkeypatch.setenv("FT_RAY_CACHE", str(tmp_path / "another-machine"))
    damage(tree, f"merged/{min(name for name in tree.tree('merged') or {} if name.endswith('.safetensors'))}")
    damage(tree, "adapter/adapter_model.safetensors")
    with pytest.raises((ServingError, DamagedError), match=r"merged/.*\.safetensors: content differs from its"):
        fetched(replica(found))
    with pytest.raises(HTTPException) as caught:
        load(Adapters(), replica(found))
    assert (caught.value.status_code, caught.value.detail) == (
        503, "the adapter a cannot be loaded now: it has to be deployed again."
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"merged/.*\.safetensors: content differs from its recorded hash: it was"):
        found_in(tree)


def test_a_model_made_again_since_is_not_served_by_replicas_that_start_later(tree: Store) -> None:
    """Its own record is as whole as the first one's."""
    found = found_in(tree)
    with tree.stage("merged") as out:
        tiny.build(out, seed=1)
    with pytest.raises(ServingError, match=r"/merged is not what was deployed: it was made again since; deploy again"):
        fetched(replica(found))
    tree.remove("merged")
    with pytest.raises(ServingError, match="is not what was deployed"):
        fetched(replica(found))


def test_an_adapter_made_again_since_is_refused_by_replicas_that_have_not_read_it(tree: Store) -> None:
    config, had = replica(found_in(tree)), Adapters()
    first = load(had, config)
    adapter_of(tree, seed=1)
    with pytest.raises(HTTPException) as caught:
        load(Adapters(), config)
    assert caught.value.status_code == 503 and "it has to be deployed again" in caught.value.detail
    if tree.is_local:  # vLLM would read what lies there now
        with pytest.raises(HTTPException):
            load(had, config)
    else:
        assert load(had, config) == first
    again = replica(found_in(tree))
    assert load(Adapters(), again).lora_assigned_int_id == 1


@pytest.mark.parametrize("place", ["s3", "gs"], indirect=True)
def test_an_outage_is_told_from_another_tree(tree: Store, place: tuple[str, FailingProxy]) -> None:
    config, adapters, proxy = replica(found_in(tree)), Adapters(), place[1]
    proxy.arm("GET", f"/adapter/{COMMIT}", "403", 100)
    with pytest.raises(HTTPException, match=r"503: the adapter a cannot be loaded now: ask again\.$"):
        load(adapters, config)
    proxy.disarm()
    assert load(adapters, config).lora_assigned_int_id == 1
    proxy.arm("GET", f"/adapter/{COMMIT}", "403", 100)
    assert load(adapters, config).lora_assigned_int_id == 1, "nothing is asked for what it has"
    with pytest.raises(StorageError):
        found_in(tree)
    proxy.disarm()


@pytest.mark.parametrize("place", ["local"], indirect=True)  # the registry is a database in any case
def test_a_replica_is_told_what_the_registry_knows(tree: Store, tmp_path: Path) -> None:
    registry, hashes = Registry(str(tmp_path)), key_of(tree.tree("merged"))
    registry.register(
        "m", source=tree.address("merged"), manifest="", merged_hash=hashes, template_hash="", test_hash="", metrics={}
    )
    found = serving.find(parse({"model": "m@1", "storage": str(tmp_path)}))
    assert found.tree_hash == hashes
    assert fetched(replica(found)).is_dir()


def test_folders_without_a_record_have_nothing_to_compare(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "plain")
    found = serving.find(ServeArgs(folder=str(folder)))
    assert (found.tree_hash, found.adapter_hashes) == ("", {})
    assert fetched(replica(found)) == folder


@pytest.mark.parametrize("crossed", [False, True])
def test_an_adapter_that_cannot_be_loaded_is_a_503_of_openais_shape(crossed: bool) -> None:
    """As it leaves a replica, and as Ray hands it to the ingress, another process."""
    with pytest.raises(HTTPException) as caught:
        asyncio.run(Adapters().load_model_from_config("m:a", replica_without_disk()))
    error: Exception = caught.value
    if crossed:
        error = RayTaskError("chat", "Traceback", pickle.loads(pickle.dumps(error))).as_instanceof_cause()
    scope = {"type": "http", "headers": [], "method": "POST", "path": "/v1/chat/completions"}
    answer = asyncio.run(serve_ingress._openai_error(Request(scope), error))
    said = json.loads(bytes(answer.body))["error"]
    assert answer.status_code == 503 and said["code"] == "unavailable"
    assert said["message"] == "the adapter a cannot be loaded now: it has to be deployed again."


def replica_without_disk() -> Any:
    known = {"adapters": {"a": "/nowhere/adapter"}, "adapter_hashes": {"a": "0" * 64}}
    return SimpleNamespace(callback_config=SimpleNamespace(callback_kwargs=known))


def test_an_adapter_that_vllm_does_not_take_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(self: Any, disk_lora_model: Any) -> None:
        raise ValueError("Failed to load lora model: gone")

    monkeypatch.setattr(VLLMEngine, "resolve_lora", refuse)
    wanted: Any = SimpleNamespace(model_id="m:a")
    with pytest.raises(HTTPException, match="503: the adapter a cannot be loaded now: ask again"):
        asyncio.run(Engine.__new__(Engine).resolve_lora(wanted))
