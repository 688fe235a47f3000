"""Exports: GGUF read back by two readers, Ollama's template held against Jinja, a push against a hub's stand-in."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ft_ray import gguf_export, ollama, reporting
from ft_ray.chat import Chat, load_tokenizer
from ft_ray.errors import InputError, MissingPackageError, ModelError
from ft_ray.exporting import model_card
from ft_ray.lm_harness import check, figures
from ft_ray.manifest import Manifest
from ft_ray.recipe import Harness, from_dict
from ft_ray.serve_args import EngineArgs, Limits
from ft_ray.storage import Store
from tests import tiny
from tests.run_folders import run_folder

ROOT = Path(__file__).parents[2]
IDS = torch.tensor([[1, 50, 60, 70, 80, 90, 2, 100]])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[str, Store]:
    recipe, store = run_folder(tmp_path_factory.mktemp("runs"), tiny_model)
    return recipe.run_path, store


@pytest.mark.parametrize(("dtype", "off"), [("f32", 1e-6), ("f16", 2e-2), ("bf16", 8e-2)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_is_the_model(tmp_path: Path, dtype: str, off: float, tied: bool) -> None:
    """transformers reads GGUF on its own and undoes the permutation: its logits are the original's."""
    gguf = pytest.importorskip("gguf")
    model = tiny.build(tmp_path / "model", tied=tied, seed=4)
    recipe, store = run_folder(tmp_path / "runs", model)
    made = reporting.export(recipe.run_path, "gguf", out=str(tmp_path / "m.gguf"), dtype=dtype)
    assert made["pre_tokenizer"] == "gpt-2" and made["tensors"] == 2 * 9 + (2 if tied else 3)
    assert [p.name for p in tmp_path.glob(".*.part")] == []
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    field = lambda name: reader.get_field(name).contents()  # noqa: E731
    chat = Chat(load_tokenizer(model))
    assert field("tokenizer.chat_template") == chat.template
    assert field("tokenizer.ggml.eos_token_id") == 2 == field("tokenizer.ggml.eot_token_id")
    assert field("tokenizer.ggml.add_bos_token") is False
    assert field("tokenizer.ggml.tokens")[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert field("tokenizer.ggml.token_type")[:4] == [3, 3, 3, 1]
    assert (field("llama.attention.head_count"), field("llama.attention.head_count_kv")) == (4, 2)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(read(IDS).logits, original(IDS).logits, atol=off, rtol=0)
    with pytest.raises(InputError, match="exists"):
        reporting.export(recipe.run_path, "gguf", out=str(tmp_path / "m.gguf"))
    assert store.verify("merged") == []


def test_what_no_gguf_is_written_for(tmp_path: Path) -> None:
    model = tiny.build(tmp_path / "model")
    chat = Chat(load_tokenizer(model))
    spec = json.loads((model / "tokenizer.json").read_text())
    for change, said in (
        ({"pre_tokenizer": {"type": "Metaspace"}}, "no byte-level BPE"),
        ({"pre_tokenizer": {**spec["pre_tokenizer"], "use_regex": False}}, "has no name that llama.cpp"),
        ({"pre_tokenizer": {**spec["pre_tokenizer"], "add_prefix_space": True}}, "puts a space before"),
    ):
        (model / "tokenizer.json").write_text(json.dumps({**spec, **change}))
        with pytest.raises(ModelError, match=said):
            gguf_export.write(model, tmp_path / "x.gguf", chat, name="x")
    (model / "tokenizer.json").write_text(json.dumps(spec))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "gemma"}))
    with pytest.raises(ModelError, match="gemma model, and GGUF is written for llama"):
        gguf_export.write(model, tmp_path / "x.gguf", chat, name="x")


def go(template: str, messages: list[tuple[str, str]]) -> str:
    """The subset of Go's text/template that `Turns.go` writes, run by the rules of its documentation."""
    actions = re.findall(r'\{\{-? ?((?:"(?:[^"\\]|\\.)*"|[^}])*?) ?\}\}', template)
    literal = re.sub(r'\{\{-? ?((?:"(?:[^"\\]|\\.)*"|[^}])*?) ?\}\}', "", template)
    assert literal == "", "no text outside of actions, whose white space could be trimmed"

    def block(at: int, message: tuple[str, str] | None, on: bool) -> tuple[str, int]:
        out = ""
        while at < len(actions):
            action = actions[at]
            if action.startswith('"'):
                out += json.loads(action) if on else ""
            elif action == ".Content":
                assert message is not None
                out += message[1] if on else ""
            elif action.startswith("range"):
                parts = [block(at + 1, m, on) for m in messages]
                out, at = out + "".join(p for p, _ in parts), parts[0][1]
            elif action.startswith("if"):
                taken, done = _true(action, message), False
                while True:
                    inner, at = block(at + 1, message, on and taken and not done)
                    out, done = out + inner, done or taken
                    if actions[at] == "end":
                        break
                    taken = _true(actions[at].removeprefix("else "), message)
            else:
                return out, at  # end, else if
            at += 1
        return out, at

    def _true(condition: str, message: tuple[str, str] | None) -> bool:
        wanted = re.findall(r'"(\w+)"', condition)[0]
        if condition.startswith("if ne (index .Messages 0).Role"):
            return messages[0][0] != wanted
        assert condition.startswith("if eq .Role") and message is not None
        return message[0] == wanted

    return block(0, None, True)[0]


TEMPLATES = {
    "chatml": tiny.CHATML,
    "default system": (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are \"kind\"."
        "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama 3": (
        "{{ '<|endoftext|>' }}{% for m in messages %}<|im_start|>{{ m.role }}<|x|>\n\n{{ m.content | trim }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|x|>\n\n{% endif %}"
    ),
}
TALKS = [
    [("user", "Hi")],
    [("system", "be {{kind}}"), ("user", 'a "quoted" \\n line\n\ttab')],
    [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")],
    [("system", "s"), ("user", "1"), ("assistant", "2"), ("user", "3")],
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ollamas_template_is_the_trained_one(name: str, tiny_model: Path) -> None:
    chat = Chat(load_tokenizer(tiny_model), TEMPLATES[name])
    text = ollama.modelfile(chat, "./model.gguf", context=512)
    template = re.findall(r'^TEMPLATE """(.*)"""$', text, re.MULTILINE | re.DOTALL)[0]
    for talk in TALKS:
        wanted = chat.prompt_text([{"role": r, "content": c} for r, c in talk])
        assert go(template, talk) == wanted
    assert 'PARAMETER stop "<|im_end|>"' in text and "PARAMETER num_ctx 512" in text
    assert text.startswith("# The trained template strips") == (name == "llama 3")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last else m.content[:1] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "{% for m in messages %}<|im_start|>{{ loop.index }}{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ],
)
def test_a_template_that_ollama_cannot_have_is_refused(template: str, tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be written for Ollama: .*serve this model with vLLM"):
        ollama.translate(Chat(load_tokenizer(tiny_model), template))


def test_an_ollama_folder(run: tuple[str, Store], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    planned = reporting.export(run[0], "ollama", out=str(tmp_path / "o"), dry_run=True)
    assert "TEMPLATE" in planned["modelfile"] and not (tmp_path / "o").exists()
    made = reporting.export(run[0], "ollama", out=str(tmp_path / "o"))
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["Modelfile", "model.gguf"]
    assert (tmp_path / "o" / "Modelfile").read_text() == planned["modelfile"]
    assert made["command"].startswith("ollama create support -f ")


def test_the_vllm_command_sets_what_ft_ray_serve_sets(run: tuple[str, Store]) -> None:
    parts = shlex.split(reporting.export(run[0], "vllm")["command"])
    settings = json.loads(parts[parts.index("--override-generation-config") + 1])
    assert settings == {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": Limits().max_tokens}
    assert parts[parts.index("--max-num-seqs") + 1] == str(EngineArgs().max_sequences)
    ends = json.loads((run[1].local("merged") / "generation_config.json").read_text())["eos_token_id"]
    assert ends == 2, "vLLM reads the end tokens there"
    assert parts[:2] == ["vllm", "serve"] and parts[parts.index("--max-model-len") + 1] == "512"


def test_no_export_without_a_merged_model(tmp_path: Path, tiny_model: Path, run: tuple[str, Store]) -> None:
    recipe, _ = run_folder(tmp_path, tiny_model, merged=False)
    with pytest.raises(InputError, match="run ft-ray merge first"):
        reporting.export(recipe.run_path, "gguf")
    with pytest.raises(InputError, match="not one of hub, gguf, ollama, vllm"):
        reporting.export(run[0], "floppy")
    with pytest.raises(InputError, match="--repo OWNER/NAME"):
        reporting.export(run[0], "hub")


class Hub:
    """A stand-in for a hub: takes the calls that huggingface_hub makes to push small files, and keeps these."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str] = set()


@pytest.fixture
def hub() -> Iterator[tuple[str, Hub]]:
    kept = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _say(self, value: Any, code: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.path != "/api/validate-yaml":
                kept.tokens.add(self.headers.get("authorization", ""))
            if self.path == "/api/repos/create":
                kept.created.append(json.loads(body))
                self._say({"url": f"http://{self.headers['host']}/me/support", "id": "me/support"})
            elif self.path == "/api/validate-yaml":
                self._say({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                names = [f["path"] for f in json.loads(body)["files"]]
                self._say({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    row = json.loads(line)
                    if row["key"] == "file":
                        kept.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
                address = f"http://{self.headers['host']}/me/support/commit/abc"
                self._say({"commitUrl": address, "commitOid": "abc", "success": True})
            else:
                self._say({}, 404)

        def do_GET(self) -> None:
            self._say({"id": "me/support", "sha": "abc", "siblings": [], "private": True, "tags": []})

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", kept
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.faults
def test_a_push_to_a_hub(hub: tuple[str, Hub], run: tuple[str, Store], tmp_path: Path) -> None:
    """Through the command line, against the stand-in."""
    url, kept = hub
    environment = {
        **os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret", "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "ft_ray", "export", run[0], "--to", "hub", "--repo", "me/support", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["repo"], said["commit"]) == ("me/support", "abc")
    assert kept.created[0]["visibility"] == "private" and kept.tokens == {"Bearer hf_secret"}
    assert "hf_secret" not in done.stdout + done.stderr
    folder = run[1].local("merged")
    wanted = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    assert set(kept.files) == wanted | {"README.md"}
    assert all(kept.files[n] == (folder / n).read_bytes() for n in wanted)
    card = kept.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: transformers") and "| json_match | 0.050" in card


@pytest.mark.parametrize(("base", "known"), [
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"), ("/srv/models/secret-place/llama", None),
    ("/home/ann/.cache/hub/models--org--base/snapshots/0e9e39f", "org/base"), ("package:demo_model", None),
    ("../models/llama", None),
])  # fmt: skip
def test_the_card_names_the_base_and_no_path_of_this_machine(base: str, known: str | None) -> None:
    made = from_dict({"name": "r", "model": {"id": base}, "data": {"train": [{"path": "x"}]}})
    card = model_card(made, Manifest.start(made), "me/support")
    assert ("base_model: " in card) is (known is not None) and f"base_model: {known}" in card + "base_model: None"
    assert not any(place in card for place in ("/srv", "secret-place", "ann", "snapshots", "../", "package:"))


def test_lm_eval_says_how_to_install_it() -> None:
    with pytest.raises(MissingPackageError, match=r"ft-ray\[lm-eval\]"):
        check(Harness(tasks=("hellaswag",)))
    assert figures({"acc,none": 0.5, "alias": "x", "acc_stderr,none": 0.1}) == {"acc": 0.5, "acc_stderr": 0.1}
