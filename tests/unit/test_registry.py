"""Versions, champion, history and rollback target, and a new registry opened by four processes at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ft_ray import mlflow_store, serve_args
from ft_ray.errors import InputError, StorageError
from ft_ray.registry import Registry
from ft_ray.serve_deploy import registered

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A new store as bytes: creating one takes two seconds, copying it none."""
    folder = tmp_path_factory.mktemp("registry")
    uri = mlflow_store.ready(f"sqlite:///{folder}/mlflow.db")
    return Path(uri.removeprefix("sqlite:///")).read_bytes()


@pytest.fixture
def registry(tmp_path: Path, migrated: bytes, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(migrated)
    return Registry(str(tmp_path))


def add(registry: Registry, merged: str, name: str = "support", **changes: object) -> int:
    values: dict[str, object] = {
        "source": f"/runs/{merged}/merged", "manifest": f"/runs/{merged}/manifest.json", "merged_hash": merged,
        "template_hash": "t" * 64, "test_hash": "d" * 64, "metrics": {"exact_match": {"value": 0.9, "n": 200}},
    }  # fmt: skip
    return registry.register(name, **{**values, **changes})  # type: ignore[arg-type]


def test_versions_count_up_and_keep_their_lineage(registry: Registry) -> None:
    assert [add(registry, "a"), add(registry, "b")] == [1, 2]
    one = registry.versions("support")[0]
    assert (one.source, one.merged_hash, one.manifest) == ("/runs/a/merged", "a", "/runs/a/manifest.json")
    assert one.template_hash == "t" * 64 and one.test_hash == "d" * 64
    assert one.metrics == {"exact_match": {"value": 0.9, "n": 200}}
    assert registry.newest("support").version == 2


def test_the_same_artifacts_are_the_same_version_with_newer_metrics(registry: Registry) -> None:
    assert add(registry, "a") == add(registry, "a", metrics={"exact_match": {"value": 0.95}}) == 1
    assert registry.versions("support")[0].metrics == {"exact_match": {"value": 0.95}}
    assert add(registry, "a", name="other") == 1
    assert add(registry, "a", source="/elsewhere/merged") == 2


def test_what_a_served_file_s_model_stands_for(registry: Registry, tmp_path: Path) -> None:
    file = serve_args.parse({"model": "support@champion", "storage": str(tmp_path)})
    said: list[str] = []
    assert registered(file, said.append) is None, "there is none"
    assert said[0] == "asking the registry for support@champion" and "no model 'support' is registered" in said[1]
    for version in (1, 2):
        add(registry, str(version))
        registry.set_champion("support", version, who="ann@host", why="better")
        assert registered(file, said.append) == version
    assert registered(serve_args.parse({"model": "support@1", "storage": str(tmp_path)}), said.append) == 1
    assert registered(serve_args.parse({"folder": str(tmp_path)}), said.append) is None
    assert registered(serve_args.parse({"model": "support", "storage": str(tmp_path / "none")}), said.append) is None
    assert not (tmp_path / "none").exists(), "asking makes no registry"


def test_references(registry: Registry) -> None:
    add(registry, "a")
    add(registry, "b")
    with pytest.raises(InputError, match=r"support has no champion yet: run ft-ray promote support.*support@2"):
        registry.resolve("support")
    registry.set_champion("support", 1, who="ann@host", why="better")
    assert registry.resolve("support").version == registry.resolve("support@champion").version == 1
    assert registry.resolve("support@2").merged_hash == "b"
    with pytest.raises(InputError, match=r"no version '7': registered are 1, 2"):
        registry.resolve("support@7")
    with pytest.raises(InputError, match="no model 'nobody' is registered"):
        registry.resolve("nobody")
    with pytest.raises(InputError, match="is not a model name"):
        registry.versions("x' or name != '")
    assert registry.champion_or_none("nobody") is None and registry.history("nobody") == []


def test_promotions_are_recorded_and_name_the_rollback_target(registry: Registry) -> None:
    for merged in "abc":
        add(registry, merged)
    registry.set_champion("support", 1, who="ann@host", why="first")
    with pytest.raises(InputError, match="nothing to roll back to"):
        registry.previous_champion("support")
    registry.set_champion("support", 3, who="bob@host", why="gate refused: " + "x" * 9000, forced=True)
    one, two = registry.history("support")
    assert (one.version, one.previous, one.who, one.why, one.forced) == (1, None, "ann@host", "first", False)
    assert (two.version, two.previous, two.forced) == (3, 1, True) and two.when >= one.when
    assert registry.previous_champion("support").version == 1
    with pytest.raises(InputError, match="no version '9'"):
        registry.set_champion("support", 9, who="x", why="x")
    assert registry.champion("support").version == 3


_OPEN = """
import sys, time
from ft_ray.registry import Registry
while time.time() < float(sys.argv[2]): pass
r = Registry(sys.argv[1])
v = r.register("m", source="/x/" + sys.argv[3], manifest="", merged_hash=sys.argv[3], template_hash="",
               test_hash="", metrics={})
r.set_champion("m", v, who=sys.argv[3], why="race")
print(v)
"""


def test_a_new_registry_opened_by_four_processes_at_once(tmp_path: Path) -> None:
    import os
    import time

    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    env.pop("MLFLOW_TRACKING_URI", None)
    start = str(time.time() + 4)  # all have imported by then, and open the store within a moment
    command = [sys.executable, "-c", _OPEN, str(tmp_path / "new"), start]
    processes = [
        subprocess.Popen([*command, str(i)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(4)
    ]
    results = [(p.communicate(timeout=120), p.returncode) for p in processes]
    assert [code for _, code in results] == [0] * 4, [err for (_, err), _ in results]
    assert sorted(int(out) for (out, _), _ in results) == [1, 2, 3, 4]
    registry = Registry(str(tmp_path / "new"))
    assert len(registry.history("m")) == 4 and registry.champion("m").version in (1, 2, 3, 4)


def test_where_the_store_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert mlflow_store.tracking_uri(str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    assert mlflow_store.tracking_uri(str(tmp_path), "http://mlflow:5000") == "http://mlflow:5000"
    monkeypatch.setenv("FT_RAY_CACHE", str(tmp_path / "cache"))
    kept = mlflow_store.tracking_uri("memory://acme/ft")
    assert kept.startswith(f"sqlite:///{tmp_path}/cache/") and "on this machine only" in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert mlflow_store.tracking_uri("memory://acme/ft") == "https://mlflow.example"
    with pytest.raises(InputError, match="MLflow 3 has no file store"):
        mlflow_store.tracking_uri(str(tmp_path), "file:///tmp/mlruns")


def test_an_error_of_the_server_does_not_tell_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    registry = Registry(uri="http://ann:PW@127.0.0.1:9")
    with pytest.raises(StorageError, match=r"the model registry http://127\.0\.0\.1:9 failed") as caught:
        registry.versions("m")
    assert "PW" not in str(caught.value)


def test_a_store_that_is_not_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_text(yaml.safe_dump({"not": "sqlite"}) * 100)
    with pytest.raises(StorageError, match=r"cannot be opened .*check that it is a sqlite file"):
        Registry(str(tmp_path)).versions("support")
