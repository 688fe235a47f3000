"""Which errors of a rank reach the user as themselves, and which are retried."""

from __future__ import annotations

import contextlib
import json
import pickle
import tempfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.exceptions
import torch
from ray.train import Checkpoint
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    UserExceptionWithTraceback,
    WorkerGroupStartupFailedError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.context import StorageContext, is_managed_checkpoint
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from ft_ray import (
    base_model,
    checkpoint,
    process_groups,
    ray_session,
    recipe,
    sft,
    train_listener,
    train_rank,
    train_sizes,
    trainer,
)
from ft_ray.errors import ModelError, OutOfMemory, StorageError, TrainingError
from ft_ray.objective import plan_batch
from ft_ray.storage import Store
from ft_ray.train_control import RAY_RECORDS, Board, ToldToEnd, classify, ray_records, root_causes
from ft_ray.train_faults import MOST_PREEMPTIONS, RetryLostWorkers, describe
from ft_ray.train_room import cpus_each, in_words, scaling, use_gpu
from ft_ray.train_sizes import FreeRoom
from tests.parity.test_training import make


def group(*failures: BaseException) -> WorkerGroupError:
    wrapped = {rank: UserExceptionWithTraceback(error, "a long\ntraceback") for rank, error in enumerate(failures)}
    return WorkerGroupError("many lines", wrapped)


class Posts:
    """Where an actor's board would be: what is posted is kept."""

    def __init__(self) -> None:
        self.posted: list[dict[str, Any]] = []
        self.post = SimpleNamespace(remote=self.posted.append)


def test_a_rank_s_error_is_unwrapped() -> None:
    first, second = ModelError("no such module."), RuntimeError("the peer closed the connection")
    assert root_causes(group(second, first)) == [second, first]
    assert classify(first) is first
    assert classify(second) is None


def test_out_of_memory_is_named() -> None:
    for error in (
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
        torch.distributed.DistBackendError(
            "NCCL error in: NCCLUtils.cpp:92, unhandled cuda error, NCCL version 2.29.7\n"
            "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA calloc async 608 bytes"
        ),
    ):
        found = classify(error)
        assert isinstance(found, OutOfMemory)
        assert "ran out of memory: lower batch.per_device" in str(found)
    found = classify(ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory"))
    assert "its machine ran out of memory" in str(found)


def test_a_full_disk_is_named_whoever_met_it_and_however_it_is_worded() -> None:
    for error in (
        OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),  # pyarrow
        OSError(122, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # safetensors
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        ValueError("a wrapper"),
    ):
        if isinstance(error, ValueError):
            error.__cause__ = OSError(28, "No space left on device")
        found = classify(error, "s3://bucket/run")
        assert isinstance(found, StorageError)
        assert "no space left at s3://bucket/run or on the worker's own disk; nothing was committed" in str(found)
    assert "no space left at /data/x;" in str(classify(OSError(28, "No space left on device", "/data/x")))
    staged = f"{tempfile.gettempdir()}/ft-ray-staged-x1/0123abcd-step-5/state-00000-of-00002.safetensors"
    message = str(classify(OSError(28, "No space left on device", staged), "s3://bucket/run"))
    assert f"no space left at {tempfile.gettempdir()} of a worker's machine; nothing was committed" in message
    assert "set TMPDIR to a folder on another disk" in message and "set storage" not in message
    assert classify(OSError("connection 28000 refused")) is None


def test_ray_s_own_records_stay_in_memory_and_every_process_s_are_alike() -> None:
    records = StorageContext(RAY_RECORDS, "run", ray_records())
    copy = pickle.loads(pickle.dumps(ray_records()))
    assert is_managed_checkpoint(records, Checkpoint(f"{records.experiment_fs_path}/x", filesystem=copy))
    assert not Path(RAY_RECORDS).exists()


def test_only_lost_workers_are_retried_and_no_more_often_than_allowed() -> None:
    policy = RetryLostWorkers(DefaultFailurePolicy(FailureConfig(max_failures=2)))
    lost = group(ray.exceptions.ActorDiedError())
    assert policy.make_decision(group(StorageError("no space left."))) is FailureDecision.RAISE
    assert policy.make_decision(group(torch.cuda.OutOfMemoryError("CUDA out of memory"))) is FailureDecision.RAISE
    assert [policy.make_decision(lost) for _ in range(3)] == [
        FailureDecision.RETRY, FailureDecision.RETRY, FailureDecision.RAISE,
    ]  # fmt: skip


def test_the_rank_that_was_lost_is_named_rather_than_those_that_noticed() -> None:
    died = WorkerHealthCheckFailedError("A worker health check failed.", failure=ray.exceptions.ActorDiedError())
    hung = WorkerHealthCheckTimeoutError("A worker health check has been hanging for 31.00 seconds.")
    noticed = RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4321")
    assert describe(WorkerGroupError("", {0: noticed, 1: died})) == "rank 1 lost its process"
    assert describe(WorkerGroupError("", {0: noticed, 1: hung})) == "rank 1 did not answer any more"
    assert describe(WorkerGroupError("", {0: noticed})) == "rank 0 lost the connection to another rank"
    assert describe(WorkerGroupError("", {0: KeyError("x"), 2: KeyError("x")})) == "ranks 0, 2 failed (KeyError: 'x')"
    assert describe(PreemptionError(PreemptionInfo(None, {"a": [1]}))) == "the machine of rank 1 was taken back"


def test_machines_taken_back_do_not_count_as_failures() -> None:
    config = FailureConfig(max_failures=0, max_preemption_failures=MOST_PREEMPTIONS)
    policy = RetryLostWorkers(DefaultFailurePolicy(config))
    taken = PreemptionError(PreemptionInfo(None, {"a": [1]}))
    decisions = [policy.make_decision(taken) for _ in range(101)]
    assert decisions == [FailureDecision.RETRY] * MOST_PREEMPTIONS + [FailureDecision.RAISE], "bounded all the same"
    assert policy.make_decision(group(ray.exceptions.ActorDiedError())) is FailureDecision.RAISE


def test_starts_that_fail_are_counted_with_the_other_failures() -> None:
    policy = RetryLostWorkers(DefaultFailurePolicy(FailureConfig(max_failures=3)), board := Posts())
    died = ControllerError(WorkerGroupStartupFailedError("worker 1 of 2 died"))
    taken = ray.exceptions.RayTaskError("setup", "Traceback", RuntimeError("Address already in use"))
    failed = ControllerError(taken.as_instanceof_cause())
    lost = group(ray.exceptions.ActorDiedError())
    decisions = [policy.make_decision(one) for one in (died, failed, lost, died)]
    assert decisions == [FailureDecision.RETRY] * 3 + [FailureDecision.RAISE]
    assert [post["counts"] for post in board.posted] == [True] * 3
    assert board.posted[0]["what"] == "the workers did not start: worker 1 of 2 died"
    assert board.posted[1]["what"] == "the workers did not start: Address already in use"
    for fault in (ValueError("a bug"), InsufficientClusterResourcesError("never")):
        fresh = RetryLostWorkers(DefaultFailurePolicy(FailureConfig(max_failures=3)))
        assert fresh.make_decision(ControllerError(fault)) is FailureDecision.RAISE, "the same would happen again"
    assert describe(ControllerError(ValueError("a bug"))) == "Ray failed: a bug"


def test_a_death_by_preemption_that_nobody_announced_is_not_counted() -> None:
    config = FailureConfig(max_failures=0, max_preemption_failures=MOST_PREEMPTIONS)
    policy = RetryLostWorkers(DefaultFailurePolicy(config), board := Posts())
    gone = ray.exceptions.RayActorError(preempted=True)
    unseen = WorkerGroupError("", {1: WorkerHealthCheckFailedError("A worker health check failed.", failure=gone)})
    assert policy.make_decision(unseen) is FailureDecision.RETRY
    assert [post["counts"] for post in board.posted] == [False]


def test_a_rank_that_was_told_to_end_is_named_and_not_counted() -> None:
    policy = RetryLostWorkers(DefaultFailurePolicy(FailureConfig(max_failures=0)))
    told = group(ToldToEnd(1), pickle.loads(pickle.dumps(ToldToEnd(1))))
    assert describe(told) == "rank 1 was told to end (SIGTERM)"
    decisions = [policy.make_decision(told) for _ in range(MOST_PREEMPTIONS + 1)]
    assert decisions == [FailureDecision.RETRY] * MOST_PREEMPTIONS + [FailureDecision.RAISE], "bounded all the same"
    assert policy.make_decision(group(ray.exceptions.ActorDiedError())) is FailureDecision.RAISE


def test_workers_get_cpus_that_fit_on_machines_and_not_on_their_sum() -> None:
    assert cpus_each(1, [4, 4], most=64) == 4, "one worker is on one machine"
    assert cpus_each(4, [4, 4, 4], most=64) == 2, "three CPUs each would fit on three machines only"
    assert cpus_each(2, [3, 3], most=64) == 3
    assert cpus_each(1, [64], most=8) == 8
    assert cpus_each(2, [0], most=8) == 1, "of a cluster that is scaled to zero"


def test_a_run_reserves_its_workers_and_not_the_whole_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"CPU": 64.0, "GPU": 8.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: {key: 4 * value for key, value in have.items()})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": have}] * 4)
    monkeypatch.setattr(ray_session, "may_grow", lambda: True)
    base = {"name": "t", "model": {"id": "m"}, "data": {"train": [{"path": "x"}]}, "method": "full"}
    made = recipe.from_dict({**base, "resources": {"workers": 2}})
    said: list[str] = []
    for gpu, each in ((True, {"CPU": 8, "GPU": 1}), (False, {"CPU": 8})):
        asked = scaling(made, gpu, said.append)
        assert (asked.num_workers, asked.resources_per_worker) == (2, each), "of 256 CPUs and 32 GPUs"
    assert said == []


@pytest.mark.parametrize(("grows", "asked"), [(True, (1, 2)), (False, 2)])
def test_fewer_workers_may_begin_where_machines_can_come(
    monkeypatch: pytest.MonkeyPatch, grows: bool, asked: Any
) -> None:
    have = {"CPU": 8.0, "GPU": 1.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: have)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": have}])
    monkeypatch.setattr(ray_session, "may_grow", lambda: grows)
    base = {"name": "t", "model": {"id": "m"}, "data": {"train": [{"path": "x"}]}, "method": "full"}
    made = recipe.from_dict({**base, "resources": {"workers": 2, "min_workers": 1}})
    assert use_gpu(made) == grows, "one GPU is enough to begin with"
    said: list[str] = []
    found = scaling(made, True, said.append)
    assert found.num_workers == asked
    assert in_words(found) == ("1 to 2 workers" if grows else "2 workers") + " of 4 CPUs and 1 GPU"
    assert made.zero_stage == made.by(1).zero_stage == 3, "one worker cuts the model as two did"
    assert (made.by(1).resources.workers, plan_batch(made.by(1), "cpu").global_rows) == (1, made.batch.global_)


def test_workers_are_as_many_as_there_is_free_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"a": {"CPU": 4.0, "GPU": 1.0}, "b": {"CPU": 4.0, "GPU": 1.0}}
    free: dict[str, dict[str, float]] = {name: dict(resources) for name, resources in have.items()}
    monkeypatch.setattr(train_sizes, "available_resources_per_node", lambda: free)
    monkeypatch.setattr(FreeRoom, "_maybe_send_resource_request", lambda self: None)
    monkeypatch.setattr(FreeRoom, "_get_reserved_resources", lambda self: self._latest_reserved_resources)
    asked = ScalingConfig(
        num_workers=(1, 2), use_gpu=True, resources_per_worker={"CPU": 2, "GPU": 1}, elastic_resize_monitor_interval_s=0
    )
    policy = FreeRoom(asked)
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision), "Ray has not answered yet"
    policy._latest_reserved_resources = have
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2
    free["b"] = {"CPU": 4.0}  # an endpoint holds its GPU
    assert policy.make_decision_for_non_running_worker_group().num_workers == 1
    free["a"] = {"CPU": 2.0}  # now the worker runs there
    state = SimpleNamespace(start_time=0.0, num_workers=1)
    assert isinstance(policy.make_decision_for_running_worker_group(state, None), NoopDecision)
    free["b"] = {"CPU": 4.0, "GPU": 1.0}
    assert policy.make_decision_for_running_worker_group(state, None).num_workers == 2
    free.clear()
    policy._latest_reserved_resources = {}
    assert policy.make_decision_for_non_running_worker_group().num_workers == 1, "asked for, and waited for"


def test_a_coordinator_that_never_answers_does_not_keep_a_run_waiting_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would look again and again, and `resources.wait`, which begins with the start of workers, would not count."""
    clock = [0.0]
    monkeypatch.setattr(train_sizes.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(FreeRoom, "_maybe_send_resource_request", lambda self: None)
    monkeypatch.setattr(FreeRoom, "_get_reserved_resources", lambda self: None)
    policy = FreeRoom(ScalingConfig(num_workers=(2, 4), resources_per_worker={"CPU": 1}))
    for start in (100.0, 500.0):  # and again after a worker was lost
        for passed in (0, 5, 9.9):
            clock[0] = start + passed
            assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
        clock[0] = start + 10.1
        assert policy.make_decision_for_non_running_worker_group().num_workers == 2


def test_the_step_that_the_first_workers_went_on_from_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later ones go on from what this command has saved; so do those of another rung of the memory ladder."""
    monkeypatch.setattr(train_listener.ray, "get", lambda made, timeout: made)
    told: list[dict[str, Any]] = []
    listener = train_listener.Listener(told.append, None, retries=3)
    for steps in ([], [10, 30], [20]):
        board = Board()
        listener.listen_to(SimpleNamespace(take=SimpleNamespace(remote=board.take)))
        for step in steps:
            board.post({"kind": "resumed", "step": step})
        listener.turn()
        assert listener.resumed == (10 if steps else None)
    assert {event["kind"] for event in told} == {"status"}


@pytest.mark.injected
def test_a_last_checkpoint_that_is_damaged_before_it_is_the_result_ends_the_run_by_name(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before it is no result: the weights of half a training."""
    made = make(tiny_model)
    store, names, ended = Store(tmp_path / "run"), list[str](), list[str]()

    def ranks(fitting: Any, prepared: Any, files: Any, to: Store, seen: Any, key: str, *rest: Any) -> dict[str, Any]:
        for step in (4, 8):
            names.append(checkpoint.name(key, step, "aa"))
            progress = {"step": step, "total": 8, "best_step": step, "history": []}
            (tmp_path / "sent").mkdir(exist_ok=True)
            (tmp_path / "sent" / "progress.json").write_text(json.dumps(progress))
            (tmp_path / "sent" / "adapter_model.safetensors").write_bytes(bytes(step))
            checkpoint.commit(to, names[-1], [checkpoint.upload(to, tmp_path / "sent", names[-1])])
        Path(to.path(f"checkpoints/{names[-1]}/adapter_model.safetensors")).unlink()
        return {"kind": "result", "stopped": ended[-1]}

    # A stand-in for the module: what else in this process asks Ray goes on asking Ray.
    monkeypatch.setattr(trainer, "ray", SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setattr(trainer.train_room, "use_gpu", lambda recipe: False)
    monkeypatch.setattr(trainer.shared_storage, "seen_here", lambda store: contextlib.nullcontext())
    monkeypatch.setattr(trainer, "_run_workers", ranks)
    files, rows = base_model.resolve(made.model), SimpleNamespace(hashes=None)
    for stopped in ("", "early_stop"):
        ended.append(stopped)
        with pytest.raises(TrainingError, match=r"lost or damaged .* of step 4 is whole: run the same command again"):
            trainer.train(made, rows, files, store, on_event=lambda event: None)
        assert store.tree("adapter") is None
    ended.append("interrupted")
    outcome = trainer.train(made, rows, files, store, on_event=lambda event: None)
    assert (outcome.status, outcome.metrics["steps"]) == ("stopped", 4)


def test_the_board_hands_events_on_once_and_answers_with_the_stop_sign() -> None:
    board = Board()
    assert board.post({"kind": "status"}) is False
    board.stop()
    assert board.post({"kind": "step", "step": 1}) is True
    board.post({"kind": "result", "stopped": ""})
    assert [e["kind"] for e in board.take()] == ["status", "step"]
    assert board.take() == []
    assert board.result() == {"kind": "result", "stopped": ""}


def test_a_checkpoint_is_saved_for_each_machine_that_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks: Any = object.__new__(train_rank._RankHooks)
    hooks._saved_for, said = frozenset(), []
    hooks.say = said.append
    told = iter([(), ("a",), ("a",), ("a", "b"), ("a", "b"), ("b",)])  # node ids, at one step after the other
    monkeypatch.setattr(train_rank, "machines_that_go", lambda: frozenset(next(told)))
    assert [hooks.save_requested() for _ in range(6)] == [False, True, False, True, False, False]
    assert len(said) == 2


@pytest.mark.parametrize("step", [0, 7, 60_000])
def test_ranks_draw_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A rank that was not there when the checkpoint was written has no state of a generator to take up."""
    seeds = {}
    for rank in range(4):
        monkeypatch.setattr(sft, "world", lambda rank=rank: (rank, 4))
        trainer = SimpleNamespace(
            recipe=SimpleNamespace(seed=3), progress=SimpleNamespace(step=step, stopped=""), sharding=None,
            agree=lambda value: [0], hooks=SimpleNamespace(stop_requested=lambda: False),
            train=lambda rank=rank, **_: seeds.update({rank: torch.initial_seed()}),
        )  # fmt: skip
        sft.run(trainer, Path("checkpoint") if step else None)
    assert len(set(seeds.values())) == 4
    if step == 0:
        assert seeds == {rank: 3 + rank for rank in range(4)}


def test_groups_that_are_made_later_wait_as_long_as_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import distributed_c10d

    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))
    wait = timedelta(seconds=77)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", wait, world_size=1, rank=0)
    try:
        assert timeout_of(torch.distributed.new_group([0])) != wait, "else nothing is to be done any more"
        process_groups.share_timeout()
        assert timeout_of(torch.distributed.new_group([0])) == wait
    finally:
        torch.distributed.destroy_process_group()


def timeout_of(group: Any) -> timedelta:
    found: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return found
