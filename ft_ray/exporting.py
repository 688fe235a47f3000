"""A trained model for use elsewhere: a hub, a GGUF file, an Ollama folder, a vLLM command line.

What goes out is the merged model that passed the gates, with the trained chat template and end tokens.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ft_ray import gguf_export, ollama
from ft_ray.chat import Chat, load_tokenizer
from ft_ray.console import percent
from ft_ray.errors import InputError, ModelError, StorageError
from ft_ray.manifest import Manifest
from ft_ray.model_folder import read_json, read_record
from ft_ray.recipe import Recipe
from ft_ray.recipe_sections import SERVED_LENGTH
from ft_ray.storage import COMMIT, Store

__all__ = ["TARGETS", "export", "model_card", "vllm_command"]

Say = Callable[[dict[str, Any]], None]
TARGETS = ("hub", "gguf", "ollama", "vllm")
MOST_TOKENS, SEQUENCES = 4096, 128
"""Defaults of `serve_args` (Limits.max_tokens, EngineArgs.max_sequences), which lies in a later layer."""


def export(
    recipe: Recipe,
    manifest: Manifest,
    store: Store,
    target: str,
    *,
    out: str | None = None,
    repo: str | None = None,
    dtype: str = "f16",
    private: bool = True,
    dry_run: bool = False,
    on_event: Say = lambda event: None,
) -> dict[str, Any]:
    """Exports the run's merged model to one of TARGETS; returns what was made (with `dry_run`: what would be).

    `out` is a file (gguf) or folder (ollama); `repo` the hub's OWNER/NAME. Raises InputError when there is no merged
    model, ModelError when its template is not the trained one or cannot be written for the target.
    """
    if target not in TARGETS:
        raise InputError(f"--to {target!r} is not one of {', '.join(TARGETS)}.")
    if store.tree("merged") is None:
        raise InputError(f"{store.address('merged')} is not there: run ft-ray merge first.")
    folder = store.local("merged")
    chat = Chat(load_tokenizer(folder, trust_remote_code=recipe.model.trust_remote_code))
    trained = read_record(folder).get("template_hash")
    if trained and trained != chat.template_hash:
        raise ModelError(f"the chat template in {folder} is not the one trained with: merge the run again.")
    if target == "vllm":
        return {"command": vllm_command(recipe, folder, store.address("merged"))}
    if target == "hub":
        return _to_hub(recipe, manifest, folder, repo, private, dry_run, on_event)
    if target == "gguf":
        file = Path(out or f"{recipe.name}.{dtype}.gguf")
        _free(file)
        if dry_run:
            return {"would_write": str(file)}
        on_event({"kind": "status", "message": f"writing {file}"})
        return {"file": str(file), **_gguf(folder, file, chat, recipe.name, dtype)}
    place = Path(out or f"{recipe.name}-ollama")
    _free(place)
    # Refused before gigabytes are written.
    text = ollama.modelfile(
        chat, "./model.gguf", temperature=recipe.serving.temperature, context=_context(recipe, folder)
    )
    if dry_run:
        return {"would_write": str(place), "modelfile": text}
    on_event({"kind": "status", "message": f"writing {place}/model.gguf"})
    place.mkdir(parents=True)
    try:
        facts = _gguf(folder, place / "model.gguf", chat, recipe.name, dtype)
        (place / "Modelfile").write_text(text, encoding="utf-8")
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return {"folder": str(place), "command": f"ollama create {recipe.name} -f {place}/Modelfile", **facts}


def _gguf(folder: Path, file: Path, chat: Chat, name: str, dtype: str) -> dict[str, Any]:
    """Written beside and renamed: a file of that name is a whole one."""
    part = file.with_name(f".{file.name}.part")
    try:
        facts = gguf_export.write(folder, part, chat, name=name, dtype=dtype)
        part.rename(file)
    except OSError as error:
        raise StorageError(f"{file} cannot be written ({error.strerror}): choose another --output.") from error
    finally:
        part.unlink(missing_ok=True)
    return facts


def _free(place: Path) -> None:
    if place.exists():
        raise InputError(f"{place} exists: choose another --output, or remove it.")
    if not place.parent.is_dir():
        raise InputError(f"{place.parent} is no folder: make it, or choose another --output.")


def _context(recipe: Recipe, folder: Path) -> int:
    own = int(read_json(folder / "config.json").get("max_position_embeddings") or SERVED_LENGTH)
    return recipe.serving.max_length or min(own, SERVED_LENGTH)


def vllm_command(recipe: Recipe, folder: Path, address: str) -> str:
    """`vllm serve …` with what `ft-ray serve` sets: length, sequences, sampling.

    vLLM takes sampling defaults from generation_config.json silently (vLLM #15281); `--generation-config vllm` stops
    that. The end tokens it still reads there, where the merge put every one that was trained.
    """
    sampling = {"temperature": recipe.serving.temperature, "top_p": 1.0, "max_new_tokens": MOST_TOKENS}
    parts = [
        "vllm", "serve", address, "--served-model-name", recipe.name,
        "--max-model-len", str(_context(recipe, folder)), "--max-num-seqs", str(SEQUENCES),
        "--generation-config", "vllm",
        "--override-generation-config", json.dumps(sampling),
    ]  # fmt: skip
    return shlex.join(parts)


# A hub


def _to_hub(
    recipe: Recipe, manifest: Manifest, folder: Path, repo: str | None, private: bool, dry_run: bool, on_event: Say
) -> dict[str, Any]:
    if repo is None or repo.count("/") != 1:
        raise InputError("export to a hub needs its --repo OWNER/NAME.")
    card = model_card(recipe, manifest, repo)
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != COMMIT)
    if dry_run:
        return {"would_push": repo, "private": private, "files": files, "card": card}
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        on_event({"kind": "status", "message": f"pushing {len(files)} files to {repo}"})
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repo)
        done = api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=files, commit_message="ft-ray export")
    except (HfHubHTTPError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise StorageError(
            f"the hub did not take {repo} ({first}): check HF_TOKEN and its right to write, then run it again."
        ) from error
    return {"repo": repo, "commit": str(getattr(done, "oid", "")), "files": files}


def hub_id(model: str) -> str | None:
    """OWNER/NAME on a hub of `model`, an id or a folder of the hub's cache; None for any other place."""
    cached = re.search(r"(?:^|/)models--([^/]+?)--([^/]+)/snapshots/", model)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    known = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model) and not Path(model).exists()
    return model if known else None


def _unnamed(model: str) -> str:
    """A base without a hub id, without where it lay: that is nobody's business on a hub."""
    return f"`{model.rstrip('/').rpartition('/')[2].removeprefix('package:')}`, a base that is on no hub"


def model_card(recipe: Recipe, manifest: Manifest, repo: str) -> str:
    """README.md for a hub: what it was made from, how it was measured, and with what it can be made again."""
    known = manifest.lineage
    stage = manifest.stages.get("evaluate")
    scores = stage.metrics if stage is not None and stage.status == "done" else {}
    meta: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["ft-ray"]}
    base = hub_id(recipe.model.id)
    if base is not None:
        meta |= {"base_model": base, "base_model_relation": "finetune"}
    import yaml

    out = ["---", yaml.safe_dump(meta, sort_keys=False).strip(), "---", "", f"# {repo.partition('/')[2]}", ""]
    made = {"lora": "LoRA", "qlora": "QLoRA"}.get(recipe.method, "full fine-tuning")
    merged = "" if recipe.method == "full" else "; the adapter is merged in"
    out += [f"Tuned from {f'`{base}`' if base else _unnamed(recipe.model.id)}: {made} with ft-ray{merged}.", ""]
    names = [n for n in ("base", "few_shot", "tuned") if isinstance(scores.get(n), Mapping)]
    if names:
        out += [f"On {scores.get('rows')} held-out test rows, with 95% intervals:", ""]
        out += [
            "| metric | " + " | ".join(n.replace("_", "-") for n in names) + " |",
            "|" + " --- |" * (len(names) + 1),
        ]
        for metric in dict.fromkeys(m for n in names for m in scores[n]):
            out.append(f"| {metric} | " + " | ".join(percent(scores[n].get(metric)) for n in names) + " |")
        out.append("")
    else:
        out += ["It was not measured on a test split.", ""]
    rows = [
        ("recipe", known.recipe_hash), ("base weights", known.base_hash), ("base revision", known.base_revision),
        ("chat template", known.template_hash), *((f"{k} data", v) for k, v in known.data_hash.items()),
        ("git commit", known.git_commit),
    ]  # fmt: skip
    out += ["SHA-256 of what it was made from:", "", *(f"- {k}: `{v}`" for k, v in rows if v), ""]
    return "\n".join(out)
