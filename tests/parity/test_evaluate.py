"""Generation equal to transformers' own, losses that do not depend on the batch, and KL that is KL."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ft_ray import parity as parity_module
from ft_ray.chat import Chat, load_tokenizer
from ft_ray.errors import DataError, ModelError
from ft_ray.evaluation import HFModel, compare, evaluate, few_shot, heldout_loss, parity
from ft_ray.recipe import Recipe, from_dict
from tests import tiny
from tests.token_rows import TokenRows


def recipe_of(folder: Path, **evaluation: Any) -> Recipe:
    return from_dict(
        {
            "name": "tiny",
            "model": {"id": str(folder)},
            "data": {"train": [{"path": "unused"}]},
            "precision": "fp32",
            "evaluation": evaluation,
        }
    )


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> HFModel:
    loaded = HFModel.load(tiny_model, Chat(load_tokenizer(tiny_model)), recipe_of(tiny_model))
    # At its initial scale a random model says what its last token tells it; larger weights make all tokens count.
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "_proj" in name:
                parameter *= 6
    return loaded


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny.build(tmp_path_factory.mktemp("other") / "model", seed=1)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompts(count: int = 13, *, system: str | None = None) -> list[list[dict[str, str]]]:
    rng = random.Random(3)
    first = [{"role": "system", "content": system}] if system else []
    words = ["where", "is", "my", "parcel", "please", "tell", "me", "now", "or", "give", "the", "money", "back"]
    return [
        [*first, {"role": "user", "content": " ".join(rng.choices(words, k=rng.randint(1, 12)))}] for _ in range(count)
    ]


def plain_generate(model: HFModel, ids: list[int], new_tokens: int) -> list[int]:
    """transformers' own greedy search on one prompt, without padding, cut at the first end token."""
    out = model.model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(model.chat.eos_ids),
        pad_token_id=0,
    )[0, len(ids) :].tolist()
    return next((out[:i] for i, token in enumerate(out) if token in model.chat.eos_ids), out)


@pytest.mark.parametrize("system", [None, "You are terse and you answer with digits."], ids=["alone", "shared prefix"])
@pytest.mark.parametrize("batch", [1, 4, 13])
def test_generation_equals_transformers_token_by_token(
    model: HFModel, monkeypatch: pytest.MonkeyPatch, system: str | None, batch: int
) -> None:
    # A random model rarely says its EOS: a tenth of the vocabulary ends answers, so that rows end one by one.
    monkeypatch.setattr(model.chat, "eos_ids", frozenset({2, *range(5, 259, 10)}))
    monkeypatch.setattr(model, "batch", batch)
    ids = [model.chat.prompt_ids(p) for p in prompts(system=system)]
    answers = model.generate_ids(ids, 16)
    assert answers == [plain_generate(model, one, 16) for one in ids]
    assert len({len(a) for a in answers}) > 3  # they did end at different places
    assert model.model.config._attn_implementation == "sdpa"


def test_answers_come_in_order_as_text(model: HFModel) -> None:
    asked = prompts(5)
    forward = model.generate(asked, 8)
    assert forward == list(reversed(model.generate(list(reversed(asked)), 8)))
    assert len(set(forward)) > 1
    assert not any("<|im_end|>" in answer for answer in forward)


def test_a_prompt_over_the_context_is_an_error(model: HFModel) -> None:
    with pytest.raises(DataError, match=r"prompt 2 has \d+ tokens and the model's context 512"):
        model.generate([*prompts(1), [{"role": "user", "content": "x" * 600}]], 4)


def reference_loss(model: Any, rows: list[dict[str, Any]]) -> float:
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        kept = labels != -100
        total += torch.nn.functional.cross_entropy(logits[kept].double(), labels[kept], reduction="sum").item()
        count += int(kept.sum())
    return total / count


def test_heldout_loss_is_the_token_mean_whatever_the_batch(model: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(TokenRows(held_out=24, longest=40).tokens("validation"))
    expected = reference_loss(model.model, rows)
    losses = [heldout_loss(model.model, rows, batch) for batch in (1, 8, 24)]
    assert losses == pytest.approx([expected] * 3, abs=1e-6)
    # The mean of batch means, which is not reported, is another number on these rows.
    means = [reference_loss(model.model, rows[i : i + 8]) for i in (0, 8, 16)]
    assert abs(sum(means) / 3 - expected) > 1e-4
    monkeypatch.setattr(parity_module, "_BUDGET", 1)
    monkeypatch.setattr(parity_module, "_CHUNK", 1000)
    assert heldout_loss(model, rows) == pytest.approx(expected, abs=1e-6)


def test_no_trained_token_is_an_error(model: HFModel) -> None:
    with pytest.raises(DataError, match="no trained token"):
        heldout_loss(model, [{"input_ids": [1, 5, 6], "labels": [-100] * 3}])


def test_parity_is_the_kl_over_answer_tokens(model: HFModel, other: Any) -> None:
    rows = list(TokenRows().tokens("validation"))
    same = parity(model.model, model.model, rows)
    assert (same.kl_mean, same.top1_agreement) == (0.0, 1.0)
    found = parity(model.model, other, rows, batch=4)
    total, agree, count = 0.0, 0, 0
    for row in rows:
        kept = torch.tensor(row["labels"][1:]) != -100
        with torch.no_grad():
            p, q = (m(torch.tensor([row["input_ids"]])).logits[0, :-1][kept].log_softmax(-1)
                    for m in (model.model, other))  # fmt: skip
        total += torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item()
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += int(kept.sum())
    assert found.kl_mean == pytest.approx(total / count, rel=1e-5)
    assert found.top1_agreement == agree / count < 1
    assert found.tokens == count
    assert found.kl_max > found.kl_mean > 0.001


def test_parity_refuses_a_model_that_gives_nan(model: HFModel, tiny_model: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        parity(model.model, broken, TokenRows().tokens("validation"))


def test_evaluate_end_to_end_and_compare_with_itself(model: HFModel, tmp_path: Path) -> None:
    asked = prompts(6)
    answers = model.generate(asked, 8)
    rows = [
        {"messages": [*p, {"role": "assistant", "content": a if i % 2 else "no"}], "file": "d.jsonl", "line": i + 1}
        for i, (p, a) in enumerate(zip(asked, answers, strict=True))
    ]
    result = evaluate(model, rows, "exact_match", max_new_tokens=8)
    assert result.primary == "exact_match"
    assert result.metrics["exact_match"]["value"] == 0.5
    assert [p["line"] for p in result.predictions] == [1, 2, 3, 4, 5, 6]
    assert [p["prediction"] for p in result.predictions] == answers
    stored = [json.loads(json.dumps(p)) for p in result.predictions]
    same = compare(stored, result.predictions)["metrics"]["exact_match"]
    assert (same["difference"], same["ties"], same["p"]) == (0.0, 6, 1.0)
    # Few-shot examples change the prompt and keep the row's name, so that both can be paired.
    shots = few_shot(rows, 2, seed=1)
    with_shots = evaluate(model, [shots.prepend(r) for r in rows], "exact_match", max_new_tokens=8)
    assert [p["id"] for p in with_shots.predictions] == [p["id"] for p in result.predictions]
    assert [len(p["prompt"]) for p in with_shots.predictions] == [5] * 6
    assert compare(result.predictions, with_shots.predictions)["rows"] == 6
