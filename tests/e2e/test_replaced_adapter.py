"""An adapter that was made again after it was deployed, over HTTP: refused where it was not loaded yet, by a 503."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ft_ray.chat import Chat, load_tokenizer
from ft_ray.serve_args import EngineArgs, Limits
from ft_ray.serving import Endpoint, serve
from ft_ray.storage import Store
from tests import tiny

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(400)]


def adapter(store: Store, name: str, base: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    with store.stage(name) as out:
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(out))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = Store(tmp_path_factory.mktemp("adapters"))
    with made.stage("tiny") as out:
        tiny.build(out, hidden=128)
        (out / "ft_ray.json").write_text(json.dumps({"template_hash": Chat(load_tokenizer(out)).template_hash}))
    for name in ("one", "two", "three"):
        adapter(made, name, made.local("tiny"))
    return made


@pytest.fixture(scope="module")
def endpoint(store: Store) -> Iterator[Endpoint]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with serve(
            folder=store.address("tiny"), adapters={n: store.address(n) for n in ("one", "two", "three")}, port=0,
            limits=Limits(max_tokens=16),
            engine=EngineArgs(max_length=256, max_sequences=8, kv_cache_gib=0.1, dtype="float32", threads=1),
        ) as endpoint:  # fmt: skip
            yield endpoint


def test_an_adapter_made_again_is_refused_and_the_rest_answers(endpoint: Endpoint, store: Store) -> None:
    def ask(model: str, stream: bool = False) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "stream": stream}
        return httpx.post(f"{endpoint.url}/v1/chat/completions", json=body, timeout=120)

    assert ask("tiny").status_code == ask("tiny:one").status_code == 200
    for name in ("one", "two"):
        adapter(store, name, store.local("tiny"))
    for stream in (False, True):
        refused = ask("tiny:two", stream)
        assert refused.status_code == 503, refused.text
        error = refused.json()["error"]
        assert error["message"] == "the adapter two cannot be loaded now: it has to be deployed again."
        assert error["code"] == "unavailable" and "/" not in error["message"]
    assert ask("tiny:one").status_code == 200, "it is in the engine's memory"
    shutil.rmtree(store.local("three"))
    assert ask("tiny:three").status_code == 503
    assert ask("tiny").status_code == 200
