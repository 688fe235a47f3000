"""A new version on a live endpoint under load: promoted, refused and rolled back by the command line, from another
process, while a client asks without pause."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from safetensors.torch import load_file, save_file

from ft_ray.chat import Chat, load_tokenizer
from ft_ray.manifest import Manifest, key_of
from ft_ray.recipe import from_dict
from ft_ray.registry import Registry
from ft_ray.rollout import agreement
from ft_ray.serve_args import EngineArgs, Limits
from ft_ray.serving import Endpoint, serve
from ft_ray.storage import Store
from tests import tiny
from tests.serving_client import SteadyClient

REPOSITORY = Path(__file__).resolve().parents[2]


def answers(folder: Path, prompts: list[list[dict[str, str]]]) -> list[str]:
    """What transformers answers, greedily."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=24, do_sample=False)
        found.append(str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)))
    return found


def no_numbers(folder: Path) -> None:
    """Weights that compute NaN, as a broken kernel or a damaged merge would: the last norm's."""
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]["model.norm.weight"]
    path = folder / where
    tensors = load_file(path)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})


def register(
    root: Path, registry: Registry, seed: int, *, spoiled: bool = False, broken: bool = False
) -> int:
    """A run folder as `ft-ray run` leaves it, with a tiny model of its own and its offline predictions."""
    store = Store(root / f"run-{seed}")
    with store.stage("merged") as out:
        tiny.build(out, seed=seed, hidden=128)
        if broken:
            no_numbers(out)
        chat = Chat(load_tokenizer(out))
        record = {"template_hash": chat.template_hash, "eos_ids": sorted(chat.eos_ids)}
        (out / "ft_ray.json").write_text(json.dumps(record))
    prompts = [[{"role": "user", "content": f"Question {i}"}] for i in range(8)]
    said = answers(store.local("merged"), prompts)
    rows = [
        {"id": str(i), "prompt": p, "reference": "", "prediction": "0123456789" * 3 if spoiled else a, "scores": {}}
        for i, (p, a) in enumerate(zip(prompts, said, strict=True))
    ]
    store.write("predictions.jsonl", "".join(json.dumps(r) + "\n" for r in rows).encode())
    model = {"id": str(store.local("merged"))}
    recipe = from_dict({"name": "tiny", "model": model, "data": {"train": [{"path": "x"}]}})
    store.write_json("recipe.yaml", recipe.to_dict())  # JSON is YAML
    Manifest.start(recipe).save(store)
    return registry.register(
        "tiny", source=store.address("merged"), manifest="", merged_hash=key_of(store.tree("merged")),
        template_hash=chat.template_hash, test_hash="", metrics={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rollout")
    registry = Registry(str(root))
    assert [register(root, registry, 0), register(root, registry, 1)] == [1, 2]
    assert register(root, registry, 2, spoiled=True) == 3
    assert register(root, registry, 3, broken=True) == 4
    registry.set_champion("tiny", 1, who="test", why="test")
    return root


@pytest.fixture(scope="module")
def endpoint(root: Path) -> Iterator[Endpoint]:
    with serve(
        "tiny", storage=str(root), port=0, limits=Limits(max_tokens=64),
        engine=EngineArgs(max_length=256, max_sequences=16, kv_cache_gib=0.1, dtype="float32"),
    ) as endpoint:  # fmt: skip
        yield endpoint


def command(root: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The command line in a process of its own, as an operator in another terminal."""
    done = subprocess.run(
        [sys.executable, "-m", "ft_ray", *arguments, "--json", "--verbose", "--storage", str(root)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    print(done.stderr)
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def engines() -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile, or is a zombie
            found += [process.pid] if "Server:tiny" in "".join(process.cmdline()[:1]) else []
    return found


def alone() -> list[int]:
    """The only engine, once there is only one: a process takes a moment to end."""
    deadline = time.monotonic() + 120
    while len(engines()) != 1:
        assert time.monotonic() < deadline, engines()
        time.sleep(0.2)
    return engines()


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_promotion_and_rollback_under_load_fail_no_request(root: Path, endpoint: Endpoint) -> None:
    registry = Registry(str(root))
    with SteadyClient(endpoint.url, "tiny") as client:
        client.wait("1")
        # No room for two: said, and nothing is changed.
        taken = placement_group([{"CPU": max(1, int(ray.available_resources()["CPU"]))}])
        ray.get(taken.ready(), timeout=60)
        code, value = command(root, "promote", "tiny", "2", "--force")
        assert code == 2 and "no room for version 2 of tiny beside version 1" in value["error"], value
        assert "--stop-first" in value["error"] and registry.champion("tiny").version == 1
        remove_placement_group(taken)
        client.wait("1")

        code, value = command(root, "promote", "tiny", "2", "--force", "--why", "a test")
        assert code == 0, value
        assert (value["rollout"]["version"], value["rollout"]["previous"]) == (2, 1)
        assert value["rollout"]["asked"] == 8 and value["rollout"]["agreed"] == 8
        assert registry.champion("tiny").version == 2
        before = client.versions["1"]
        client.wait("2")
        assert client.versions["1"] == before
        (survivor,) = alone()  # the old one is gone

        # Its answers are not those of its evaluation: refused, and the old one serves on.
        code, value = command(root, "promote", "tiny", "3", "--force")
        assert code == 3 and "8 of 8 prompts otherwise" in value["error"], value
        assert registry.champion("tiny").version == 2
        client.wait("2")
        assert alone() == [survivor]  # it was never started again

        code, value = command(root, "rollback", "tiny")
        assert code == 0 and (value["version"], value["previous"]) == (1, 2), value
        assert registry.champion("tiny").version == 1
        client.wait("1")
        client.stop()
    print(client.sent, dict(client.outcomes), dict(client.versions), f"longest {client.longest:.1f} s")
    assert client.failed() == {} and sum(client.outcomes.values()) == client.sent
    assert set(client.versions) == {"1", "2"}
    alone()


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_replica_that_computes_no_numbers_never_takes_traffic(root: Path, endpoint: Endpoint) -> None:
    """Its engine starts and answers; only the question that each replica puts to its own engine finds it out."""
    registry = Registry(str(root))
    champion = registry.champion("tiny").version
    with SteadyClient(endpoint.url, "tiny", threads=2) as client:
        client.wait(str(champion))
        code, value = command(root, "promote", "tiny", "4", "--force")
        assert code == 1 and "the engine computes no numbers" in value["error"], value
        assert registry.champion("tiny").version == champion
        client.wait(str(champion))
        client.stop()
    assert client.failed() == {} and set(client.versions) == {str(champion)}
    alone()


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_stop_first_makes_requests_wait_and_fails_none(root: Path, endpoint: Endpoint) -> None:
    taken = placement_group([{"CPU": max(1, int(ray.available_resources()["CPU"]))}])
    ray.get(taken.ready(), timeout=60)
    try:
        # As long as limits.timeout: two starts in a row took over the client's usual 120 seconds under load.
        with SteadyClient(endpoint.url, "tiny", threads=2, timeout=600) as client:
            client.wait("1")
            code, value = command(root, "promote", "tiny", "3", "--force", "--stop-first")  # which the gate refuses
            assert code == 3 and "8 of 8 prompts otherwise" in value["error"], value
            client.wait("1")
            code, value = command(root, "promote", "tiny", "2", "--force", "--stop-first")
            assert code == 0 and value["rollout"]["version"] == 2, value
            client.wait("2")
            client.stop()
        assert set(client.versions) == {"1", "2"}, "nobody had an answer of the one refused"
        assert client.failed() == {} and sum(client.outcomes.values()) == client.sent
        print(f"the longest wait: {client.longest:.1f} s")
    finally:
        remove_placement_group(taken)


def test_answers_agree_when_they_say_the_same() -> None:
    assert agreement(["Billing", "a b  c"], ["Billing", "a b c"]) == [True, True]
    assert agreement(["Billing"], ["Shipping"]) == [False]
    long = "word " * 100
    assert agreement([long, long[:200]], [long[:200], long]) == [True, True]  # cut at a token limit
    assert agreement([long], [""]) == [False]
