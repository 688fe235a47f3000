"""What was trained is what a GPU serves: vLLM's own log-probabilities, and the guarded endpoint on Ray Serve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from ft_ray.api_keys import issue_key
from ft_ray.merging import merge
from ft_ray.serve_args import EngineArgs, Limits
from ft_ray.serving import Endpoint, serve
from tests import tiny

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(500),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = [[3 + (start + by * k) % 250 for k in range(96)] for start, by in ((0, 1), (5, 2), (9, 3), (40, 7))]
# vLLM in a process of its own gives its memory back when it is done. Prints the log-probability of every token.
_VLLM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, options, rows = json.loads(sys.argv[1])
    model = LLM(model=folder, dtype="bfloat16", max_model_len=256, enforce_eager=True, **options)
    answers = model.generate(
        [{"prompt_token_ids": ids} for ids in rows], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    )
    found = [
        [step[token].logprob for step, token in zip(answer.prompt_logprobs[1:], ids[1:])]
        for answer, ids in zip(answers, rows)
    ]
    print("FOUND", json.dumps(found))
"""


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": DEVICE}).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(base, adapter with random weights, merged model), bf16, heads of 64."""
    root = tmp_path_factory.mktemp("served")
    base = tiny.build(root / "base", dtype="bfloat16", hidden=128, heads=2, layers=4)
    torch.manual_seed(1)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.05
    adapted.save_pretrained(root / "adapter")
    merge(base, root / "adapter", root / "merged", device=DEVICE)
    return base, root / "adapter", root / "merged"


def by_transformers(model: Any) -> torch.Tensor:
    """Log-probability of every token but the first of ROWS."""
    ids = torch.tensor(ROWS, device=DEVICE)
    with torch.no_grad():
        scores = model(ids).logits[:, :-1].float().log_softmax(-1)
    return scores.gather(-1, ids[:, 1:, None])[..., 0].cpu()


def by_vllm(folder: Path) -> torch.Tensor:
    options = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**28}  # whatever else is on the GPU
    done = subprocess.run(
        [sys.executable, "-c", _VLLM, json.dumps([str(folder), options, ROWS])],
        env={**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.tensor(json.loads(done.stdout.rsplit("FOUND ", 1)[1]))


def test_adapter_merged_and_served_weights_give_the_same_log_probabilities(folders: tuple[Path, Path, Path]) -> None:
    base, adapter, merged = folders
    untrained = by_transformers(load(base))
    adapted = by_transformers(PeftModel.from_pretrained(load(base), str(adapter)).eval())
    by_hf, served = by_transformers(load(merged)), by_vllm(merged)
    differences = {"merged": by_hf - adapted, "served": served - adapted, "served to merged": served - by_hf}
    for name, difference in differences.items():
        # bf16 keeps 8 bits: a step of a log-probability near 6 is 0.03.
        assert difference.abs().mean() < 0.03 and difference.abs().max() < 0.25, (name, difference.abs().max())
    assert (untrained - adapted).abs().mean() > 0.15, "the adapter changes what is compared"


@pytest.fixture(scope="module")
def endpoint(folders: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    keys = str(tmp_path_factory.mktemp("keys") / "keys.json")
    key = issue_key(keys, "test")
    engine = EngineArgs(
        device="gpu" if DEVICE == "cuda" else "cpu", gpu_memory=0.1, kv_cache_gib=0.25, max_length=256, max_sequences=8,
        compiled=False, dtype="bfloat16",
    )  # fmt: skip
    with serve(folder=str(folders[2]), port=0, keys=keys, engine=engine, limits=Limits(max_tokens=64)) as one:
        one.api_key = key
        yield one


def test_the_guarded_endpoint_answers(endpoint: Endpoint) -> None:
    question = {"model": endpoint.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    signed = {"authorization": f"Bearer {endpoint.api_key}"}
    with httpx.Client(base_url=endpoint.url, timeout=60) as client:

        def ask(headers: dict[str, str] = signed, **change: Any) -> httpx.Response:
            return client.post("/v1/chat/completions", json={**question, **change}, headers=headers)

        answer = ask()
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] >= 1, answer.text
        assert ask(stream=True).text.rstrip().endswith("data: [DONE]")
        assert ask(headers={}).status_code == 401
        assert ask(chat_template="{{ 1 }}").status_code == 422
        assert ask(max_tokens=10**6).status_code == 422
        assert ask(model="another").status_code == 404
        assert client.get("/docs", headers=signed).status_code == 404


def test_no_list_that_a_request_may_hold_ends_the_engine(endpoint: Endpoint) -> None:
    """vLLM's runner for GPUs has rows of fixed length for them, and the engine ends of a request that has more."""
    question = {"model": endpoint.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    # The tokenizer makes a token of each byte, and knows 259. An id may be named twice, a bias may not.
    most: list[tuple[dict[str, Any], int]] = [
        ({"allowed_token_ids": [5] * 1024}, 200), ({"stop_token_ids": [*range(5, 105)], "min_tokens": 2}, 200),
        ({"logit_bias": {str(token): 1 for token in range(259)}}, 200), ({"bad_words": ["\U00013000" * 500]}, 200),
        ({"bad_words": [f"\u20ac{chr(0x400 + i)}\U00013000" for i in range(128)]}, 200),
        ({"allowed_token_ids": [5] * 1025}, 422), ({"stop_token_ids": [5] * 101, "min_tokens": 2}, 422),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, 422), ({"bad_words": ["\U00013000" * 501]}, 422),
    ]  # fmt: skip
    with httpx.Client(base_url=endpoint.url, timeout=60, headers={"authorization": f"Bearer {endpoint.api_key}"}) as c:
        for change, status in [*most, ({}, 200)]:
            answer = c.post("/v1/chat/completions", json={**question, **change})
            assert answer.status_code == status, (list(change), answer.text)
            assert c.post("/v1/chat/completions", json=question).status_code == 200, (list(change), "the engine ended")
