"""Every file in cluster/ passes Ray's own validation, and our rules on what Ray lets through."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import ft_ray
from ft_ray import recipe

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster"
FILES = sorted(FOLDER.rglob("*.yaml"))
RECIPES = sorted((Path(ft_ray.__file__).parent / "recipes").rglob("*.yaml"))
TOKEN = "auth_token"

# Ray checks no key of a node_config; the cloud would refuse a misspelt one only when the node is asked for.
# A value: None for any, a set of values, a dict for a mapping, [dict] for a list of mappings.
AWS: dict[str, Any] = {
    "InstanceType": None,
    "ImageId": None,
    "IamInstanceProfile": {"Arn": None},
    "InstanceMarketOptions": {
        "MarketType": {"spot"},
        "SpotOptions": {"InstanceInterruptionBehavior": {"terminate"}, "SpotInstanceType": {"one-time"}},
    },
    "BlockDeviceMappings": [
        {
            "DeviceName": None,
            "Ebs": {"VolumeSize": None, "VolumeType": {"gp3"}, "Encrypted": {True}, "DeleteOnTermination": {True}},
        }
    ],
    "MetadataOptions": {"HttpTokens": {"required"}, "HttpPutResponseHopLimit": {1}},
}
GCP: dict[str, Any] = {
    "machineType": None,
    "disks": [
        {
            "boot": {True},
            "autoDelete": {True},
            "type": {"PERSISTENT"},
            "initializeParams": {"diskSizeGb": None, "sourceImage": None},
        }
    ],
    "metadata": {"items": [{"key": {"install-nvidia-driver"}, "value": {"True"}}]},
    "serviceAccounts": [{"email": None, "scopes": None}],
    "scheduling": {
        "provisioningModel": {"SPOT", "STANDARD"},
        "instanceTerminationAction": {"DELETE"},
        "onHostMaintenance": {"TERMINATE"},
        "automaticRestart": {False},
    },
}
ALLOWED = {"aws": AWS, "gcp": GCP}
MACHINES = {  # CPUs and GPUs, from the clouds' own lists
    "m7i.xlarge": (4, 0),
    "m7i.4xlarge": (16, 0),
    "g6e.4xlarge": (16, 1),
    "n2-standard-4": (4, 0),
    "n2-standard-16": (16, 0),
    "g2-standard-16": (16, 1),
}


def load(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = prepare_config(config)
    validate_config(result)
    return result


def strangers(value: Any, allowed: Any, where: str = "node_config") -> list[str]:
    """What `allowed` does not know, by its place."""
    if allowed is None:
        return []
    if isinstance(allowed, set):
        return [] if value in allowed else [f"{where}: {value!r}"]
    if isinstance(allowed, list):
        if not isinstance(value, list):
            return [f"{where}: not a list"]
        return [f for i, v in enumerate(value) for f in strangers(v, allowed[0], f"{where}[{i}]")]
    if not isinstance(value, dict):
        return [f"{where}: not a mapping"]
    found = [f"{where}.{key}: unknown" for key in value if key not in allowed]
    return found + [f for k, v in value.items() if k in allowed for f in strangers(v, allowed[k], f"{where}.{k}")]


def head(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def typed(config: dict[str, Any]) -> bool:
    return "available_node_types" in config


def workers(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config["available_node_types"].items() if k != config["head_node_type"]}


def test_all_are_seen() -> None:
    assert {p.name for p in FILES} >= {"aws.yaml", "gcp.yaml", "onprem.yaml", "single.yaml"}
    assert [p for p in FOLDER.rglob("*") if p.is_file() and p.suffix != ".yaml"] == []
    assert RECIPES
    assert sum(typed(load(p)) for p in FILES) >= 2


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_opens_with_what_it_is_for_and_its_commands(path: Path) -> None:
    text = head(path)
    for command in ("ray up", "ray dashboard", "ray attach", "ray down"):
        assert f"{command} cluster/{path.name}" in text
    job = re.search(r"ray job submit (?:.|\n)*?-- \\\n#\s+ft-ray run (\S+)(.*)", text)
    assert job, "no command that submits a job"
    overrides = job[2].split()
    loaded = recipe.load("qlora_8b", overrides).recipe
    assert loaded.storage == next(o for o in overrides if o.startswith("storage=")).removeprefix("storage=")
    # The driver's share and the one worker's are together one GPU.
    share = re.search(r"--entrypoint-num-gpus (\S+)", text)
    assert share and isinstance(loaded.resources.gpus, float)
    assert float(share[1]) + loaded.resources.gpus * loaded.resources.workers == pytest.approx(1)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_rays_own_validation_takes_it(path: Path) -> None:
    config = load(path)
    result = prepared(config)
    assert result["cluster_name"] == config["cluster_name"]
    assert len({load(p)["cluster_name"] for p in FILES if load(p)["provider"]["type"] == "local"}) == 2


def test_rays_validation_refuses_what_is_wrong() -> None:
    config = load(FOLDER / "aws.yaml")
    config["available_node_types"]["gpu"]["max_wrokers"] = 3
    with pytest.raises(Exception, match="max_wrokers"):
        prepared(config)
    config = load(FOLDER / "aws.yaml")
    config["available_node_types"]["gpu"]["min_workers"] = 99
    with pytest.raises(ValueError, match="max_workers"):
        prepared(config)


@pytest.mark.parametrize("path", [p for p in FILES if typed(load(p))], ids=lambda p: p.name)
def test_node_configs_hold_known_keys_only(path: Path) -> None:
    config = load(path)
    allowed = ALLOWED[config["provider"]["type"]]
    for name, node in config["available_node_types"].items():
        assert strangers(node["node_config"], allowed) == [], name
        machine = node["node_config"].get("InstanceType") or node["node_config"]["machineType"]
        cpus, gpus = MACHINES[machine]
        if name == config["head_node_type"]:
            assert node["resources"] == {"CPU": 0, "GPU": 0} and node["max_workers"] == 0
        else:
            assert (node["resources"]["CPU"], node["resources"].get("GPU", 0)) == (cpus, gpus), name


def test_a_misspelt_node_config_key_is_caught() -> None:
    """Ray takes it; ours do not."""
    config = load(FOLDER / "aws.yaml")
    node = config["available_node_types"]["gpu-spot"]["node_config"]
    node["InstanceMarketOption"] = node.pop("InstanceMarketOptions")
    prepared(config)
    assert strangers(node, AWS) == ["node_config.InstanceMarketOption: unknown"]
    config = load(FOLDER / "gcp.yaml")
    node = config["available_node_types"]["gpu-spot"]["node_config"]
    node["disks"][0]["initializeParams"]["diskSizeGB"] = 200
    node["scheduling"]["provisioningModel"] = "Spot"
    prepared(config)
    assert strangers(node, GCP) == [
        "node_config.disks[0].initializeParams.diskSizeGB: unknown",
        "node_config.scheduling.provisioningModel: 'Spot'",
    ]


@pytest.mark.parametrize("path", [p for p in FILES if typed(load(p))], ids=lambda p: p.name)
def test_spot_comes_first_and_on_demand_takes_its_place(path: Path) -> None:
    config = load(path)
    spot, demand = config["available_node_types"]["gpu-spot"], config["available_node_types"]["gpu"]
    assert spot["priority"] > demand["priority"]
    assert spot["resources"] == demand["resources"]
    assert spot["min_workers"] == demand["min_workers"] == 0
    marks = ("InstanceMarketOptions", "scheduling")
    same = [{k: v for k, v in n["node_config"].items() if k not in marks} for n in (spot, demand)]
    assert same[0] == same[1]
    assert [any(str(n["node_config"].get(m)).lower().find("spot") >= 0 for m in marks) for n in (spot, demand)] == [
        True, False,
    ]  # fmt: skip
    assert config["max_workers"] <= sum(n["max_workers"] for n in workers(config).values())
    assert 1 <= config["idle_timeout_minutes"] <= 30
    cpu = config["available_node_types"]["cpu"]
    assert "GPU" not in cpu["resources"] and cpu["max_workers"] >= 1


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
@pytest.mark.parametrize("path", [p for p in FILES if typed(load(p))], ids=lambda p: p.name)
def test_every_shipped_recipe_fits(path: Path, file: Path) -> None:
    """As it is, and as the file's own command asks for it: each worker on one node, all of them within the limits."""
    config = load(path)
    command: list[str] = re.findall(r"(resources\.\w+=\S+)", head(path))
    assert command
    for overrides in ([], command):
        wanted = recipe.load(file, overrides).recipe.resources
        need = {
            "CPU": 1 if isinstance(wanted.cpus, str) else wanted.cpus,
            "GPU": 1 if isinstance(wanted.gpus, str) else wanted.gpus,
        }
        places = 0
        for node in workers(config).values():
            have = node["resources"]
            each = min(int(have.get(k, 0) // v) for k, v in need.items() if v)
            places += each * node["max_workers"]
        assert places >= wanted.workers, f"{file.name} {overrides} asks for {wanted.workers} x {need}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_token_is_asked_for_and_no_port_is_public(path: Path) -> None:
    config = load(path)
    text = path.read_text(encoding="utf-8")
    starts = [c for c in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]) if "start" in c]
    assert len(starts) == (2 if config["provider"].get("worker_ips") != [] else 1)
    for command in starts:
        assert "RAY_AUTH_MODE=token" in command
        assert re.search(rf"RAY_AUTH_TOKEN_PATH=\S+/{TOKEN}\b", command)
        assert 'chmod 600 "$RAY_AUTH_TOKEN_PATH"' in command
        assert "--dashboard-host=0.0.0.0" not in command and "ray-client-server-port" not in command
    assert "--dashboard-host=127.0.0.1" in starts[0] and "--head" in starts[0]
    (mounted,) = config["file_mounts"].items()
    assert mounted[1] == "~/.ft-ray/cluster"
    folder = mounted[0].replace("~", "$HOME")
    assert f"RAY_AUTH_TOKEN_PATH={folder}/{TOKEN}" in starts[0]
    if config["provider"]["type"] == "aws":
        assert "IpPermissions" not in config["provider"]["security_group"], "would open more than SSH"
    # No secret in the file: nothing that looks like a key or a password with a value.
    assert re.findall(r"(?i)\b(?:hf_[a-z0-9]{20,}|AKIA[0-9A-Z]{16})\b", text) == []
    for line in text.splitlines():
        assert not re.search(r"(?i)(?:token|password|secret|key)=(?!token\b)[^/$\s]", line.split("#")[0]), line


@pytest.mark.parametrize("path", [p for p in FILES if "docker" in load(p)], ids=lambda p: p.name)
def test_containers_are_pinned_and_confined(path: Path) -> None:
    config = load(path)
    image = config["docker"]["image"]
    assert re.fullmatch(rf"[\w./-]+/ft-ray:{re.escape(ft_ray.__version__)}-(gpu|cpu)(@sha256:[0-9a-f]{{64}})?", image)
    options = config["docker"]["run_options"]
    assert "--cap-drop=ALL" in options and "--security-opt=no-new-privileges" in options
    assert not any(o.startswith(("--privileged", "--user=root", "--pid", "--cap-add")) for o in options)
    assert any(o.startswith("--env=MLFLOW_TRACKING_URI=http") for o in options), "several nodes need a registry server"
    environment = dict(o.removeprefix("--env=").split("=", 1) for o in options if o.startswith("--env="))
    assert environment["RAY_AUTH_MODE"] == "token"
    assert f"RAY_AUTH_TOKEN_PATH={environment['RAY_AUTH_TOKEN_PATH']} " in config["head_start_ray_commands"][1]
    assert len({load(p)["docker"]["image"] for p in FILES if "docker" in load(p)}) == 1


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_nothing_unpinned_is_installed(path: Path) -> None:
    config = load(path)
    names = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    commands = [c for name in names for c in config[name]]  # a missing one would take Ray's default: a nightly wheel
    for command in commands:
        for word in re.findall(r"pip install (.*)", command):
            assert all(w.startswith("-") or "==" in w for w in word.split()), command
    assert "latest" not in path.read_text(encoding="utf-8").replace("/latest/ami-id", "")
