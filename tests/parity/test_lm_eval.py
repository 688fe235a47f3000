"""lm-eval by recipe key, for real: a task of one's own on local rows; the figures are those of the likelihoods."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from ft_ray.errors import InputError
from ft_ray.lm_harness import check, run
from ft_ray.recipe import Harness

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the extra lm-eval is not installed"),
]

CHOICES = ("amber", "basil", "cedar")
TASK = """\
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [amber, basil, cedar]
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_a_local_task_needs_no_hub(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"question": f"word {i} is ", "label": i % 3} for i in range(30)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    with pytest.raises(InputError, match="holds no task file"):
        check(Harness(tasks=("words",), include=str(tasks)))
    (tasks / "words.yaml").write_text(TASK.format(rows=data))
    found = run(Harness(tasks=("words",), include=str(tasks)), tiny_model, device="cpu")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)

    def likelihood(question: str, choice: str) -> float:
        asked, ids = len(tokenizer(question).input_ids), tokenizer(question + choice, return_tensors="pt").input_ids
        with torch.no_grad():
            logs = model(ids).logits[0, :-1].log_softmax(-1)
        return float(logs[range(asked - 1, ids.shape[1] - 1), ids[0, asked:]].sum())

    said = [max(range(3), key=lambda k: likelihood(str(row["question"]), CHOICES[k])) for row in rows]
    right = sum(s == row["label"] for s, row in zip(said, rows, strict=True))
    assert found["words"]["acc"] == pytest.approx(right / len(rows))
    few = run(Harness(tasks=("words",), include=str(tasks), limit=6), tiny_model, device="cpu")
    first = sum(s == row["label"] for s, row in zip(said[:6], rows[:6], strict=True))
    assert few["words"]["acc"] == pytest.approx(first / 6)
    with pytest.raises(InputError, match="check the names"):
        run(Harness(tasks=("no_such_task",)), tiny_model, device="cpu")
