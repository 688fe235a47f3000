"""Runs are recorded by the driver alone, in the same place again after a resume."""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from ft_ray import mlflow_store, recipe
from ft_ray.errors import InputError, MissingPackageError, StorageError
from ft_ray.storage import Store
from ft_ray.sweep_children import Children
from ft_ray.tracking import Tracker


def make(storage: Path | str, **tracking: Any) -> recipe.Recipe:
    values = {"name": "t", "model": {"id": "m"}, "data": {"train": [{"path": "x"}]}, "storage": str(storage)}
    return recipe.from_dict({**values, "tracking": tracking})


def test_a_run_and_its_resume_are_one_mlflow_run(tmp_path: Path) -> None:
    made = make(tmp_path)
    store = Store(made.run_path)
    tracker = Tracker(made, store)
    tracker.set_tags({"base_hash": "ab" * 32, "absent": None})
    for step in (1, 2):
        tracker.on_event({"kind": "step", "step": step, "loss": 3.0 - step, "lr": 1e-3, "accuracy": None})
    tracker.on_event({"kind": "eval", "step": 2, "loss": 1.5})
    tracker.on_event({"kind": "status", "message": "x"})
    tracker.log_metrics({"bad": float("nan"), "text": "no"}, 2)
    tracker.finish("stopped")

    assert (tmp_path / "mlflow.db").exists(), "sqlite lies beside the run folders"
    client = mlflow_store.client(mlflow_store.tracking_uri(str(tmp_path)))
    run_id = tracker.run_id
    assert run_id is not None
    run = client.get_run(run_id)
    assert run.info.status == "KILLED"
    assert run.data.params["lora.r"] == "16"
    assert run.data.tags["base_hash"] == "ab" * 32
    assert run.data.metrics["train/loss"] == 1.0
    assert run.data.metrics["validation/loss"] == 1.5
    assert "bad" not in run.data.metrics
    assert [m.value for m in client.get_metric_history(run_id, "train/loss")] == [2.0, 1.0]

    again = Tracker(make(tmp_path, experiment="ft-ray"), store)
    assert again.run_id == run_id
    assert client.get_run(run_id).info.status == "RUNNING"
    again.finish()
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_file_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"MLflow 3 has no file store"):
        Tracker(make(tmp_path, uri=str(tmp_path / "mlruns")), Store(tmp_path / "t"))


def test_tensorboard_files_lie_in_the_run_folder(tmp_path: Path) -> None:
    made = make(tmp_path, to=["tensorboard"])
    tracker = Tracker(made, Store(made.run_path))
    tracker.on_event({"kind": "step", "step": 1, "loss": 2.0})
    tracker.finish()
    assert tracker.run_id is None
    assert list((tmp_path / "t" / "tensorboard").glob("events.out.tfevents.*"))


def test_a_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match=r"tracking.to: wandb needs the package 'wandb'.*pip install"):
        Tracker(make(tmp_path, to=["wandb"]), Store(tmp_path / "t"))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed here")
def test_an_offline_wandb_run_has_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr("ft_ray.tracking.cache_dir", lambda: tmp_path / "cache")
    made = make(tmp_path, to=["wandb"])
    tracker = Tracker(made, Store(made.run_path))
    tracker.on_event({"kind": "step", "step": 1, "loss": 2.125})
    tracker.on_event({"kind": "eval", "step": 1, "loss": 1.375})
    tracker.finish()
    wandb.teardown()  # its helper process would else live as long as this one
    (file,) = (tmp_path / "cache").rglob("*.wandb")
    written = file.read_bytes()  # uncompressed records; wandb has no public reader of them
    for name, value in ((b"train/loss", b"2.125"), (b"validation/loss", b"1.375"), (b"lora.r", b"16")):
        assert re.search(re.escape(name) + rb".{0,12}" + re.escape(value), written, re.DOTALL), name


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = make(tmp_path)
    tracker = Tracker(made, Store(made.run_path))
    assert tracker.run_id is not None
    mlflow_store.client(mlflow_store.tracking_uri(str(tmp_path))).delete_run(tracker.run_id)
    with caplog.at_level(logging.WARNING, logger="ft_ray"):
        tracker.log_metrics({"loss": 1.0}, 1)
        tracker.flush()
        tracker.finish()
    assert "mlflow no longer takes this run" in caplog.text


def test_a_password_in_the_uri_reaches_no_tracker_and_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "http://ann:PW@127.0.0.1:9"
    made = make(tmp_path, to=["tensorboard"], uri=uri)
    tracker = Tracker(made, Store(made.run_path))
    tracker.set_tags({"registry": uri})
    tracker.finish()
    (events,) = (tmp_path / "t" / "tensorboard").glob("events.out.tfevents.*")
    assert b"tracking.uri: http://127.0.0.1:9" in events.read_bytes() and b"PW" not in events.read_bytes()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(StorageError, match=r"MLflow at http://127\.0\.0\.1:9 does not answer") as caught:
        Tracker(make(tmp_path, uri=uri), Store(made.run_path))
    assert "PW" not in str(caught.value)


def test_each_trial_of_a_sweep_is_a_child_of_the_sweeps_run(tmp_path: Path) -> None:
    made = make(tmp_path, to=["mlflow"])
    children = Children(made, Store(made.run_path).sub("sweep"))
    for step in (10, 20):
        for trial, rank in (("00", 8), ("01", 32), ("02", 64)):
            result = {"step": step, "validation_loss": step / rank, "train_loss": None if trial == "01" else 2.0}
            children.report(trial, {"lora.r": rank}, result)
    children.report("02", {"lora.r": 64}, {"step": 30, "validation_loss": 1e4, "train_loss": None, "diverged": True})
    children.report("03", {"lora.r": 8}, {"done": True})  # Tune's last word: nothing was measured
    children.report("04", {"lora.rank": 8}, {"step": 10})
    children.close({"00": "TERMINATED", "01": "ERROR", "02": "RUNNING"})

    client = mlflow_store.client(mlflow_store.tracking_uri(str(tmp_path)))
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    trials = {run.data.tags["ft_ray.trial"]: run for run in found if run is not parent}
    assert parent.info.run_name == "t-sweep" and parent.info.status == "KILLED", "one trial is to go on"
    assert sorted(trials) == ["00", "01", "02"]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials.values()} == {parent.info.run_id}
    assert [trials[name].data.params["lora.r"] for name in ("00", "01", "02")] == ["8", "32", "64"]
    assert [trials[name].info.status for name in ("00", "01", "02")] == ["FINISHED", "FAILED", "KILLED"]
    history = client.get_metric_history(trials["01"].info.run_id, "validation/loss")
    assert [(m.step, m.value) for m in history] == [(10, 10 / 32), (20, 20 / 32)]
    diverged = trials["02"]
    assert diverged.data.metrics["validation/loss"] == 20 / 64 and diverged.data.tags["ft_ray.diverged_at_step"] == "30"
    assert "train/loss" not in trials["01"].data.metrics and trials["00"].data.metrics["train/loss"] == 2.0


def test_a_sweep_that_goes_on_goes_on_in_the_same_runs(tmp_path: Path) -> None:
    made = make(tmp_path, to=["mlflow"])
    for step in (10, 20):
        children = Children(made, Store(made.run_path).sub("sweep"))
        children.report("00", {"lora.r": 8}, {"step": step, "validation_loss": 1.0})
        children.close({"00": "TERMINATED" if step == 20 else "PENDING"})
    client = mlflow_store.client(mlflow_store.tracking_uri(str(tmp_path)))
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len(found) == 2 and {run.info.status for run in found} == {"FINISHED"}
