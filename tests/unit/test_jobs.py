"""Submitting to a cluster, up to the wire: ids, what travels, what is refused, a log that survives its connection."""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main
import yaml
from ray.job_submission import JobDetails, JobStatus
from typer.testing import CliRunner

from ft_ray import cli_jobs, job_logs, jobs, ray_session, serve_deploy
from ft_ray.cli import app
from ft_ray.errors import InputError, ServingError, TrainingError
from ft_ray.job_logs import LostConnection
from ft_ray.job_upload import LIMIT, Upload, survey
from ft_ray.jobs import Client, exit_code
from ft_ray.serve_file import read


@functools.cache
def group() -> Any:
    return typer.main.get_command(app)


def describe(arguments: list[str], **more: Any) -> Any:
    """As `submit` does: the command line's own parser reads the arguments."""
    context = group().make_context("ft-ray", list(arguments))
    return jobs.describe(cli_jobs._parsed(context, arguments), **more)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    write(tmp_path)
    return tmp_path


def write(folder: Path, **changes: Any) -> None:
    recipe = {
        "name": "Mine",
        "model": {"id": "acme/base"},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "storage": "s3://acme/ft",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **changes}))


def test_the_id_is_of_what_is_run(project: Path) -> None:
    first = describe(["run", "recipe.yaml"])
    assert first.base.startswith("ft-ray-run-mine-") and first.attempt(1) == first.base
    assert first.attempt(3) == f"{first.base}-3"
    (project / "other.txt").write_text("another file in the folder")
    assert describe(["run", "recipe.yaml"]).base == first.base
    others = {
        describe(["train", "recipe.yaml"]).base, describe(["run", "recipe.yaml", "lora.r=8"]).base,
        describe(["run", "recipe.yaml", "--fresh"]).base,
    }  # fmt: skip
    assert len(others | {first.base}) == 4
    write(project, seed=3)
    assert describe(["run", "recipe.yaml"]).base not in {*others, first.base}


def test_a_data_check_is_a_job_too(project: Path) -> None:
    made = describe(["data", "check", "recipe.yaml"])
    assert made.entrypoint == "ft-ray data check recipe.yaml" and made.base.startswith("ft-ray-data-check-")


def test_an_option_s_value_is_not_taken_for_the_recipe(project: Path) -> None:
    (project / "space.yaml").write_text(SPACE)
    first = describe(["sweep", "--space", "space.yaml", "recipe.yaml"])
    assert first.name == "Mine" and first.base == describe(["sweep", "recipe.yaml", "--space=space.yaml"]).base
    for options in (["--storage", "s3://acme/ft"], ["--why", "because.it", "--storage=s3://acme/ft"]):
        assert describe(["promote", *options, "support-8b"]).name == "support-8b"
    assert describe(["rollback", "--why", "a=b", "recipe.yaml", "seed=3"]).name == "Mine"


@pytest.mark.parametrize("ref", ["support_8b", "acme/support.8b@2", "8B"])
def test_an_id_holds_nothing_that_an_address_does_not(project: Path, ref: str) -> None:
    base = describe(["promote", ref, "--storage", "s3://acme/ft"]).base
    assert re.fullmatch(r"[a-z][a-z0-9-]+", base), base


def test_the_entrypoint_is_the_command_itself(project: Path) -> None:
    request = describe(["run", "recipe.yaml", "data.system=Be kind; rm -rf /"])
    assert request.entrypoint == "ft-ray run recipe.yaml 'data.system=Be kind; rm -rf /'"
    assert request.metadata["run"] == "Mine" and request.metadata["verb"] == "run"
    assert request.runtime_env["working_dir"] == str(project)
    assert int(request.runtime_env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > 60, "time for a checkpoint"


SECRETS = [
    ("HF_TOKEN=x", "HF_TOKEN looks like a secret"),
    ("MY_API_KEY=abc", "MY_API_KEY looks like a secret"),
    ("AWS_SECRET_ACCESS_KEY=x", "AWS_SECRET_ACCESS_KEY looks like a secret"),
    ("OTHER=hf_" + "aB3dE6gH9jK2" * 3, "OTHER looks like a secret"),
    ("PROXY=http://me:hunter22@proxy:3128", "PROXY looks like a secret"),
    ("HF_TOKEN", "values are not taken from the environment here"),
]


@pytest.mark.parametrize(("pair", "message"), SECRETS, ids=[m for _, m in SECRETS])
def test_no_secret_enters_a_job(project: Path, monkeypatch: pytest.MonkeyPatch, pair: str, message: str) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "aB3dE6gH9jK2" * 3)
    with pytest.raises(InputError, match=message) as refused:
        describe(["run", "recipe.yaml"], env=[pair])
    assert "on the cluster's nodes" in str(refused.value)
    _, given, value = pair.partition("=")
    assert not given or len(value) < 5 or value not in str(refused.value)
    allowed = describe(["run", "recipe.yaml"], env=["HF_TOKEN_PATH=/etc/hub/token", "NCCL_DEBUG=INFO"])
    assert allowed.runtime_env["env_vars"]["HF_TOKEN_PATH"] == "/etc/hub/token"
    assert "hf_" not in str(allowed)


def test_a_password_in_the_command_or_the_recipe_is_refused_without_being_said(project: Path) -> None:
    with pytest.raises(InputError, match="holds a secret") as refused:
        describe(["run", "recipe.yaml", "tracking.uri=http://me:hunter22@mlflow:5000"])
    assert "hunter22" not in str(refused.value)
    write(project, tracking={"uri": "http://me:hunter22@mlflow:5000"})
    with pytest.raises(InputError, match=r"^tracking.uri of recipe.yaml holds a password") as refused:
        describe(["run", "recipe.yaml"])
    assert "hunter22" not in str(refused.value)


def test_storage_that_goes_with_the_job_is_refused(project: Path) -> None:
    write(project, storage="runs")
    with pytest.raises(InputError, match=r"storage 'runs' would be a folder inside the job's own copy.*s3:// or gs://"):
        describe(["run", "recipe.yaml"])
    write(project, storage="/mnt/shared/runs")
    describe(["run", "recipe.yaml"])


def test_what_the_recipe_names_must_travel_along(project: Path) -> None:
    (project / ".gitignore").write_text("*.jsonl\n")
    with pytest.raises(InputError, match=r"data.train rows.jsonl would not travel along: it is left out by .gitignore"):
        describe(["run", "recipe.yaml"])
    (project / ".gitignore").unlink()
    (project / "sub").mkdir()
    with pytest.raises(InputError, match=r"the recipe recipe.yaml would not travel along: it is not in it as named"):
        describe(["run", "recipe.yaml"], working_dir="sub")
    with pytest.raises(InputError, match="would not travel along"):
        describe(["run", str(project / "recipe.yaml")])
    with pytest.raises(InputError, match="run has no recipe"):
        describe(["run", "seed=3"])


def test_a_file_that_is_not_there_is_refused_before_anything_is_sent(project: Path) -> None:
    """Named like a file of this machine; a model or data set of a hub is named otherwise and may be anywhere."""
    (project / "rows.jsonl").unlink()
    with pytest.raises(InputError, match=r"^data.train rows.jsonl does not exist here: mend the path, or give an addr"):
        describe(["run", "recipe.yaml"])
    with pytest.raises(InputError, match=r"^data.train demo/train.jsonl does not exist here"):
        describe(["run", "qlora_demo", "storage=s3://acme/ft"])
    write(project, data={"train": [{"path": "./rows"}]})
    with pytest.raises(InputError, match=r"^data.train ./rows does not exist here"):
        describe(["run", "recipe.yaml"])
    for absent in ("rows.jsonl.gz", "data/rows.jsonl.gz", "data/rows.ndjson", "data/", "data/by/day", "rows", "../a"):
        write(project, data={"train": [{"path": absent}]})
        with pytest.raises(InputError, match=f"^data.train {absent} does not exist here"):
            describe(["run", "recipe.yaml"])
    rows = {"train": [{"path": "s3://acme/rows"}]}
    for absent in ("models/", "models/acme/base", "./base"):
        write(project, data=rows, model={"id": absent})
        with pytest.raises(InputError, match=f"^model.id {absent} does not exist here"):
            describe(["run", "recipe.yaml"])
    write(project, data={**rows, "general": {"path": "general.ndjson"}})
    with pytest.raises(InputError, match=r"^data.general general.ndjson does not exist here"):
        describe(["run", "recipe.yaml"])
    write(project, data={"train": [{"path": "squad", "format": "hub"}]})
    describe(["run", "recipe.yaml"])
    for elsewhere in ("s3://acme/rows.jsonl", "acme/rows", "/mnt/ft-ray/rows.jsonl"):
        write(project, data={"train": [{"path": elsewhere}]})
        describe(["run", "recipe.yaml"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run recipe.yaml --bogus", "No such option: --bogus"),
        ("sweep recipe.yaml --spice x", "No such option: --spice"),
        ("run", "Missing argument 'RECIPE'"),
        ("serve recipe.yaml", "'serve' does not run in a job"),
    ],
)
def test_a_command_that_does_not_parse_is_refused_before_anything_is_sent(
    project: Path, monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    monkeypatch.setattr(jobs, "Client", lambda address: pytest.fail("it was sent"))
    done = CliRunner().invoke(app, ["submit", "--json", "--", *command.split()])
    assert done.exit_code == 2 and message in done.output.replace("\\'", "'"), done.output
    good = CliRunner().invoke(app, ["submit", "--json", "--dry-run", "--", "run", "recipe.yaml", "--strict", "seed=3"])
    assert good.exit_code == 0, good.output


def test_credentials_stay_at_home(project: Path) -> None:
    (project / ".aws").mkdir()
    for name in (".env", "server.pem", ".aws/config", "auth_token", "id_ed25519", "notes.txt"):
        (project / name).write_text("x")
    assert set(survey(project).sizes) == {"rows.jsonl", "recipe.yaml", "notes.txt"}
    request = describe(["run", "recipe.yaml"])
    assert {".env", "*.pem", "auth_token"} <= set(request.runtime_env["excludes"]), "and Ray leaves them out too"


def test_a_large_folder_is_refused_with_what_is_large(project: Path) -> None:
    (project / "models").mkdir()
    for name, size in (("models/a.bin", 300), ("models/b.bin", 150), ("dump.bin", 120), ("ignored.bin", 900)):
        with (project / name).open("wb") as file:
            file.truncate(size * 2**20)  # sparse: nothing is written
    (project / ".gitignore").write_text("ignored.bin\n")
    with pytest.raises(InputError) as refused:
        describe(["run", "recipe.yaml"])
    assert "has 570 MiB and a job takes less than 500 along (models/ 450 MiB, dump.bin 120 MiB" in str(refused.value)
    assert "ignored.bin" not in str(refused.value)
    with (project / ".rayignore").open("w") as file:
        file.write("dump.bin\n")
    assert describe(["run", "recipe.yaml"]).upload.total < 500 * 2**20


def test_a_folder_of_the_limit_is_refused(tmp_path: Path) -> None:
    Upload(tmp_path, (), {"a": LIMIT - 1}).check()
    with pytest.raises(InputError, match="takes less than 500 along"):
        Upload(tmp_path, (), {"a": LIMIT}).check()


def test_ray_packs_what_was_measured(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    import zipfile

    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    (project / "sub").mkdir()
    (project / "sub" / ".gitignore").write_text("*.log\n")
    for name in ("sub/a.py", "sub/a.log", ".env", "venv", "b.txt"):
        (project / name).write_text("x")
    upload = survey(project)
    package = tmp_path_factory.mktemp("package") / "p.zip"
    excludes = [*get_runtime_env_default_excludes(), *upload.excludes]
    create_package(str(project), package, include_gitignore=True, excludes=excludes)
    assert sorted(zipfile.ZipFile(package).namelist()) == sorted(upload.sizes)
    assert "sub/a.log" not in upload.sizes and "sub/a.py" in upload.sizes


def details(status: JobStatus, code: int | None = None) -> JobDetails:
    return JobDetails(type="SUBMISSION", entrypoint="x", status=status, submission_id="j", driver_exit_code=code)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0), (JobStatus.FAILED, 1, 1), (JobStatus.FAILED, 2, 2), (JobStatus.FAILED, 3, 3),
        (JobStatus.FAILED, 130, 130), (JobStatus.FAILED, 127, 1), (JobStatus.FAILED, -9, 1),
        (JobStatus.FAILED, None, 1), (JobStatus.STOPPED, None, 130),
    ],
)  # fmt: skip
def test_the_exit_code_is_that_of_the_command(status: JobStatus, code: int | None, expected: int) -> None:
    assert exit_code(details(status, code)) == expected


class Wire:
    """A connection that hands out one log in pieces, and breaks where the test says."""

    def __init__(self, log: str, *, breaks: list[int], status: JobStatus = JobStatus.SUCCEEDED) -> None:
        self.log, self.breaks, self.status, self.opened = log, breaks, status, 0

    def info(self, job: str) -> Any:
        return details(self.status)

    async def tail(self, job: str) -> AsyncIterator[str]:
        self.opened += 1
        end = self.breaks.pop(0) if self.breaks else len(self.log)
        for start in range(0, end, 7):
            await asyncio.sleep(0)
            yield self.log[start : min(start + 7, end)]
        if end < len(self.log):
            raise LostConnection("cut")


def test_a_log_is_told_once_however_often_its_connection_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_logs, "_LONGEST_PAUSE", 0.0)
    log = "".join(f"line {i}\n" for i in range(50))
    wire, told, said = Wire(log, breaks=[0, 20, 13, 200, 200]), [], []
    info = job_logs.follow(wire, "j", write=told.append, say=said.append)
    assert "".join(told) == log and info.status == JobStatus.SUCCEEDED and wire.opened == 6
    assert sum("connection lost (cut): trying again" in s for s in said) == 5


def test_a_silent_log_is_opened_anew_without_a_word_of_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a head tells it whose handler answers no ping, and a router that has forgotten the connection."""
    for name, seconds in (("_QUIET", 0.01), ("_STALE", 0.03), ("_LONGEST_PAUSE", 0.0)):
        monkeypatch.setattr(job_logs, name, seconds)

    class Silent(Wire):
        async def tail(self, job: str) -> AsyncIterator[str]:
            self.opened += 1
            yield self.log[:9]
            if self.opened < 3:
                await asyncio.sleep(60)
            yield self.log[9:]

    log = "".join(f"line {i}\n" for i in range(9))
    wire, told, said = Silent(log, breaks=[], status=JobStatus.RUNNING), [], []  # type: ignore[var-annotated]

    def write(text: str) -> None:
        told.append(text)
        if "".join(told) == log:
            wire.status = JobStatus.SUCCEEDED

    assert job_logs.follow(wire, "j", write=write, say=said.append).status == JobStatus.SUCCEEDED
    assert "".join(told) == log and wire.opened == 3
    assert set(said) == {"job j is running"}


def test_patience_ends_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(Wire):
        def info(self, job: str) -> Any:
            raise LostConnection("no job API answers")

    with pytest.raises(TrainingError, match=r"the job j may go on; `ft-ray jobs logs j` follows it again"):
        job_logs.follow(Dead("x" * 9, breaks=[0] * 99), "j", write=print, say=lambda m: None, patience=0.5)


class Head:
    """The part of a client that submitting uses, in memory."""

    def __init__(self, *known: tuple[str, JobStatus], then: JobStatus = JobStatus.PENDING) -> None:
        self.known, self.sent, self.lost, self.then = dict(known), [], 0, then

    def submit_job(self, **job: Any) -> str:
        self.sent.append(job)
        self.known[job["submission_id"]] = self.then
        if self.lost:
            self.lost -= 1
            raise LostConnection("cut after it was sent")
        return str(job["submission_id"])


@pytest.mark.parametrize(
    ("before", "again", "expected"),
    [
        ([], False, ("", True)),
        ([JobStatus.RUNNING], False, ("", False)),
        ([JobStatus.SUCCEEDED], False, ("", False)),
        ([JobStatus.SUCCEEDED], True, ("-2", True)),
        ([JobStatus.FAILED], False, ("-2", True)),
        ([JobStatus.FAILED, JobStatus.STOPPED], False, ("-3", True)),
        ([JobStatus.FAILED, JobStatus.RUNNING], True, ("-2", False)),
    ],
)
def test_a_retry_attaches_or_starts_the_next_attempt(
    project: Path, monkeypatch: pytest.MonkeyPatch, before: list[JobStatus], again: bool, expected: tuple[str, bool]
) -> None:
    request = describe(["run", "recipe.yaml"])
    head: Any = Head(*((request.attempt(i + 1), status) for i, status in enumerate(before)))
    monkeypatch.setattr(
        jobs, "jobs", lambda client: [SimpleNamespace(submission_id=k, status=v) for k, v in client.known.items()]
    )
    assert jobs.submit(head, request, again=again) == (request.base + expected[0], expected[1])
    assert len(head.sent) == expected[1]


def test_promoting_is_done_each_time_and_needs_no_recipe(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"--storage 'runs' would be a folder inside the job's own copy"):
        describe(["promote", "support-8b@3"])
    request = describe(["promote", "support-8b@3", "--storage", "s3://acme/ft"])
    assert request.base.startswith("ft-ray-promote-support-8b-")
    monkeypatch.setattr(jobs, "jobs", lambda client: [SimpleNamespace(submission_id=k, status=v) for k, v in known])
    known, head = [(request.base, JobStatus.SUCCEEDED)], Head()
    client: Any = head
    assert jobs.submit(client, request) == (f"{request.base}-2", True)


def test_other_data_are_another_job(project: Path) -> None:
    before = describe(["run", "recipe.yaml"])
    assert describe(["run", "recipe.yaml"]).base == before.base
    with (project / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "one more", "completion": "row"}\n')
    assert describe(["run", "recipe.yaml"]).base != before.base


SPACE = "search:\n  lora.r: {choice: [2, 4]}\n"


def test_a_sweep_takes_its_space_along_and_a_retry_goes_on(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"tune_spaces/lora_small.yaml would not travel along"):
        describe(["sweep", "recipe.yaml"])  # found beside the code, where a node of the cluster need not have it
    (project / "space.yaml").write_text(SPACE)
    request = describe(["sweep", "recipe.yaml", "--space", "space.yaml"])
    assert describe(["sweep", "recipe.yaml", "--space=space.yaml"]).entrypoint.endswith("--space=space.yaml")
    (project / "space.yaml").write_text(SPACE.replace("4", "8"))
    assert describe(["sweep", "recipe.yaml", "--space", "space.yaml"]).base != request.base, "another search"
    (project / "space.yaml").write_text(SPACE)
    monkeypatch.setattr(
        jobs, "jobs", lambda client: [SimpleNamespace(submission_id=k, status=v) for k, v in client.known.items()]
    )
    head: Any = Head()
    jobs.submit(head, request)
    head.known[request.base] = JobStatus.FAILED
    assert jobs.submit(head, request) == (f"{request.base}-2", True)
    head.known[f"{request.base}-2"] = JobStatus.SUCCEEDED
    jobs.submit(head, request, again=True)
    command = "ft-ray sweep recipe.yaml --space space.yaml"
    assert [job["entrypoint"] for job in head.sent] == [command, f"{command} --resume", command]
    fresh = describe(["sweep", "recipe.yaml", "--space", "space.yaml", "--fresh"])
    assert fresh.retry == fresh.entrypoint
    with pytest.raises(InputError, match=r"nowhere.yaml: cannot be read"):
        describe(["sweep", "recipe.yaml", "--space", "nowhere.yaml"])


@pytest.mark.parametrize("meanwhile", [JobStatus.RUNNING, JobStatus.SUCCEEDED, JobStatus.FAILED])
def test_an_answer_lost_after_sending_starts_no_second_job(
    project: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: JobStatus
) -> None:
    request, head = describe(["run", "recipe.yaml"]), Head(then=meanwhile)
    head.lost = 1
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(
        jobs, "jobs", lambda client: [SimpleNamespace(submission_id=k, status=v) for k, v in client.known.items()]
    )
    said: list[str] = []
    client: Any = head
    assert jobs.submit(client, request, say=said.append, again=True) == (request.base, True)
    assert len(head.sent) == 1 and said == ["cut after it was sent: trying again"]


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray remembers whether tokens are on: an earlier test of this process may have had them."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with ray_session._reread_auth():
        yield


@pytest.mark.usefixtures("no_token")
def test_the_address_that_was_given_is_the_one_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert Client("http://head:8265/").address == "http://head:8265"
    with pytest.raises(InputError, match=r"10.0.0.1:6379 is not the address of a job API: give --address http://HEAD"):
        Client()
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:8265")
    assert Client().address == "http://other:8265"


def serve_file(folder: Path, **changes: Any) -> None:
    args = {"model": "support-8b@champion", "storage": "s3://acme/ft", "keys": "s3://acme/ft/keys.json", **changes}
    application = {"name": "support-8b", "import_path": "ft_ray.serving:build", "args": args}
    (folder / "service.yaml").write_text(yaml.safe_dump({"applications": [application]}))


def test_deploying_takes_its_file_along_and_is_done_each_time(project: Path) -> None:
    serve_file(project)
    request = describe(["deploy", "service.yaml"])
    assert request.repeats and request.name == "support-8b" and request.entrypoint == "ft-ray deploy service.yaml"
    serve_file(project, limits={"n": 2})
    assert describe(["deploy", "service.yaml"]).base != request.base


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage": "runs"}, "storage 'runs' of service.yaml is a path in this folder, which no replica has"),
        ({"keys": "keys.json"}, "keys 'keys.json' of service.yaml is a path in this folder"),
        ({"adapters": {"a": "out/a"}}, r"adapters\.a 'out/a' of service.yaml is a path in this folder"),
        ({"uri": "http://me:hunter22@mlflow:5000"}, r"applications\.args\.uri of service.yaml holds a secret"),
        ({"kies": "x"}, "unknown key 'kies'"),
    ],
)
def test_a_file_that_no_replica_could_serve_is_refused_before_it_is_sent(
    project: Path, changes: dict[str, Any], message: str
) -> None:
    serve_file(project, **changes)
    with pytest.raises(InputError, match=message) as refused:
        describe(["deploy", "service.yaml"])
    assert "hunter22" not in str(refused.value)
    (project / ".gitignore").write_text("service.yaml\n")
    serve_file(project)
    with pytest.raises(InputError, match="would not travel along"):
        describe(["deploy", "service.yaml"])


class Serving:
    """A head that tells one state of `app` after the other, once it was given the file."""

    def __init__(self, *states: Any, others: dict[str, Any] | None = None) -> None:
        self.states, self.given, self.others = list(states), [], others or {}  # type: ignore[var-annotated]

    def serve(self, document: dict[str, Any]) -> None:
        self.given.append(document)

    def serving(self) -> dict[str, Any]:
        if not self.given:
            return {"applications": self.others}
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        return {"applications": {"support-8b": state}, "http_options": {"host": "0.0.0.0", "port": 8000}}


@pytest.mark.parametrize(
    ("http", "host"),
    [({"host": "0.0.0.0"}, "0.0.0.0"), (None, "0.0.0.0"), ({"port": 8000}, "0.0.0.0"), ({"host": "::"}, "::"),
     ({"host": "10.0.0.5"}, "10.0.0.5"), ({"host": "my-host"}, "my-host")],
)  # fmt: skip
def test_an_open_address_without_keys_is_not_deployed(project: Path, http: dict[str, Any] | None, host: str) -> None:
    """As by `ft-ray serve`: whoever reaches it would be answered. A file that names no host listens everywhere."""
    serve_file(project, keys=None)
    path = project / "service.yaml"
    document = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**document, **({"http_options": http} if http else {})}))
    refused = rf"listens on {re.escape(host)}, which can be reached from other machines, and asks for no API key"
    with pytest.raises(InputError, match=refused):
        read(path)
    with pytest.raises(InputError, match=refused):
        describe(["deploy", "service.yaml"])
    done = CliRunner().invoke(app, ["deploy", str(path), "--dry-run"])
    assert done.exit_code == 2 and "set keys: in its args" in " ".join(done.stderr.split())


def test_a_loopback_address_needs_none_but_on_a_cluster_that_listens_elsewhere(project: Path) -> None:
    serve_file(project, keys=None)
    path = project / "service.yaml"
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "http_options": {"host": host}}))
        assert read(path).args.keys is None

    class Open(Serving):
        def serving(self) -> dict[str, Any]:
            return {**super().serving(), "http_options": {"host": "0.0.0.0", "port": 8000}}

    head = Open({"status": "RUNNING"})
    with pytest.raises(InputError, match=r"Serve listens on 0\.0\.0\.0 already, which other machines reach, whatever"):
        serve_deploy.deploy(head, read(path), timeout=60, say=lambda message: None)
    assert head.given == []
    fresh = Serving({"status": "RUNNING"})
    serve_deploy.deploy(fresh, read(path), timeout=60, say=lambda message: None)
    assert len(fresh.given) == 1


def test_deploying_ends_with_what_serve_says(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_deploy, "_PAUSE", 0)
    serve_file(project)
    file, said = read(project / "service.yaml"), []  # type: ignore[var-annotated]

    def deploy(head: Serving, timeout: float = 60) -> dict[str, Any]:
        return serve_deploy.deploy(head, file, timeout=timeout, say=said.append)

    head = Serving({"status": "DEPLOYING"}, LostConnection("the head answers 503"), {"status": "RUNNING"},
                   others={"support-8b": {"source": "declarative"}, "mine": {"source": "imperative"}})  # fmt: skip
    assert deploy(head)["http"]["port"] == 8000 and head.given == [file.document]
    replica = {"message": "Traceback (most recent call last):\n  File x\nValueError: no room\n"}
    with pytest.raises(ServingError, match="support-8b did not start: ValueError: no room"):
        deploy(Serving({"status": "DEPLOY_FAILED", "message": "Failed", "deployments": {"a": {}, "b": replica}}))
    with pytest.raises(ServingError, match=r"was not up after 0 minutes \(deploying\)"):
        deploy(Serving({"status": "DEPLOYING"}), timeout=0.01)
    other = Serving({"status": "RUNNING"}, others={"shop": {"source": "declarative"}})
    promoted = Serving({"status": "RUNNING"}, others={"shop": {"source": "imperative", "route_prefix": "/"}})
    for head in (other, promoted):
        with pytest.raises(InputError, match="the cluster serves shop, which this file would end or leave without its"):
            deploy(head)
        assert head.given == []


def test_a_new_champion_is_a_change_of_the_file(project: Path) -> None:
    """Ray compares files: NAME@champion alone would say the same whatever version it stands for."""
    serve_file(project)
    file, head = read(project / "service.yaml"), Serving({"status": "RUNNING"})
    for version in (1, 1, 2, None):
        serve_deploy.deploy(head, file, timeout=60, say=lambda message: None, version=version)
    one, again, two, unknown = head.given
    assert one == again != two and unknown == file.document
    assert one["applications"][0]["args"] == two["applications"][0]["args"] == file.document["applications"][0]["args"]


def test_a_redeploy_that_leaves_nobody_to_answer_says_what_would_not(project: Path) -> None:
    serve_file(project)
    file, said = read(project / "service.yaml"), []  # type: ignore[var-annotated]
    for running, version in (("Server:support-8b-v1", 2), ("Server:support-8b-v2", 2), ("Server:support-8b-v1", None)):
        state = {"source": "declarative", "deployments": {"Ingress": {}, running: {}}}
        head = Serving({"status": "RUNNING"}, others={"support-8b": state})
        serve_deploy.deploy(head, file, timeout=60, say=said.append, version=version)
    (warned,) = [text for text in said if "promote" in text]
    assert "ends before version 2 is up, and nothing answers meanwhile" in warned
    assert "ft-ray promote support-8b 2" in warned
