"""The data check: every planted fault is found with its place, clean data raise (next to) nothing."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import pyarrow as pa
import pytest
from datasketch import MinHash

from ft_ray.chat import IGNORED, Chat, load_tokenizer
from ft_ray.dataset import prepare
from ft_ray.errors import DataError, GateRefused
from ft_ray.near_duplicates import CONTRADICT, THRESHOLD, Signatures, hashed, jaccard, shingles
from ft_ray.preflight import DataReport, Finding, check, gate
from ft_ray.prepared_data import Prepared
from ft_ray.recipe import from_dict
from ft_ray.review import read_review, write_review
from ft_ray.rows import normal
from ft_ray.sensitive import find
from tests import tiny

Rows = list[dict[str, Any]]
WORDS = [
    "amber",
    "basil",
    "cedar",
    "delta",
    "ember",
    "fable",
    "grove",
    "hazel",
    "ivory",
    "jasper",
    "koala",
    "lemon",
    "maple",
    "noble",
    "ocean",
    "pearl",
    "quartz",
    "raven",
    "sable",
    "tulip",
    "umber",
    "velvet",
    "willow",
    "xenon",
    "yarrow",
    "zephyr",
    "anchor",
    "beacon",
    "candle",
    "dagger",
    "engine",
    "falcon",
    "garden",
    "harbor",
    "island",
    "jungle",
    "kettle",
    "ladder",
    "mirror",
    "needle",
    "orange",
    "pepper",
    "quiver",
    "ribbon",
    "saddle",
    "temple",
    "uncle",
    "valley",
    "window",
    "yellow",
]


def clean(count: int = 1200, seed: int = 0) -> Rows:
    rng = random.Random(seed)
    return [
        {
            "prompt": f"Tell me of {' '.join(rng.choices(WORDS, k=8))} in {i}?",
            "completion": " ".join(rng.choices(WORDS, k=9)),
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return Chat(load_tokenizer(tiny.build(tmp_path_factory.mktemp("tiny"))))


Checked = Callable[..., tuple[DataReport, Prepared]]


@pytest.fixture
def checked(tmp_path: Path, chat: Chat) -> Checked:
    """Prepares and checks rows; `validation` and `test` are rows of sources of their own."""

    def run(rows: Rows, *, review: Path | None = None, **keys: Any) -> tuple[DataReport, Prepared]:
        data: dict[str, Any] = {}
        for name in ("validation", "test"):
            if name in keys:
                data[name] = [{"path": str(_write(tmp_path / f"{name}.jsonl", keys.pop(name)))}]
        data["train"] = [{"path": str(_write(tmp_path / "train.jsonl", rows))}]
        recipe = from_dict({"name": "t", "model": {"id": "x"}, "data": data, **keys})
        prepared = prepare(recipe, chat, model_hash="m", cache=tmp_path / "cache")
        return check(recipe, prepared, chat, review=review), prepared

    return run


def _write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def only(report: DataReport, code: str) -> Finding:
    found = [f for f in report.findings if f.code == code]
    assert len(found) == 1, report.codes()
    return found[0]


def places(finding: Finding) -> set[int]:
    return {int(e.split("train.jsonl:")[1].split()[0].rstrip(":")) for e in finding.examples}


def test_clean_data_raise_no_warning(checked: Checked) -> None:
    report, prepared = checked(clean(3000))
    assert report.of("error") == report.of("warning") == []
    assert set(report.codes()) <= {"size", "room"}
    gate(report, strict=True)
    stats = report.stats
    assert stats["distinct"] == prepared.distinct
    assert stats["tokens"]["min"] <= stats["tokens"]["p50"] <= stats["tokens"]["p95"] <= stats["tokens"]["max"]
    lengths = prepared.tokens("train")["length"]
    assert stats["tokens"]["max"] >= max(lengths)
    assert DataReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert report.summary()["warnings"] == 0


def _plant(count: int, **change: Any) -> Rows:
    rows = clean()
    for i in range(100, 100 + count):
        rows[i] = {k: v(rows[i][k]) if callable(v) else v for k, v in {**rows[i], **change}.items()}
    return rows


SECRET = "ghp_" + "aB3dE5fG7hJ9kL1mN2pQ4rS6tU8vW0xY2zA4"
PLANTED: dict[str, tuple[str, str, Rows]] = {
    "e-mail": ("pii", "e-mail address", _plant(2, prompt=lambda p: p + " Write to jane.miller@gmx.de")),
    "card": ("pii", "payment card number", _plant(1, prompt="My card is 4539 1488 0343 6467, please")),
    "iban": ("pii", "IBAN", _plant(1, prompt="Send it to DE89 3704 0044 0532 0130 00 today")),
    "ssn": ("pii", "US social security number", _plant(1, prompt="It is 536-90-4399, I think")),
    "phone": ("pii", "phone number", _plant(1, prompt="Call +49 30 901820 soon")),
    "secret": ("secret", "GitHub token", _plant(1, completion=f"Use {SECRET} for it")),
    "private key": ("secret", "private key", _plant(1, prompt="-----BEGIN RSA PRIVATE KEY-----\nMIIE")),
    "url": ("secret", "password in a URL", _plant(1, prompt="postgres://admin:h8Gk2pQz71x@db.corp.net/main")),
    "special": ("special_token", "special token", _plant(1, prompt="Ignore <|im_start|>system")),
    "broken": ("broken_text", "replacement character", _plant(1, prompt="caf\ufffd amber")),
    "mojibake": ("broken_text", "text decoded twice", _plant(1, prompt="cafÃ© amber")),
    "placeholder": ("placeholder", "unfilled placeholder", _plant(1, completion="Dear {{ customer_name }}, hello")),
    "boilerplate": ("boilerplate", "model speaking", _plant(1, completion="As an AI language model I cannot")),
}


@pytest.mark.parametrize("name", PLANTED)
def test_faults_in_the_text(name: str, checked: Checked) -> None:
    code, said, rows = PLANTED[name]
    report, _ = checked(rows)
    finding = only(report, code)
    assert said in finding.message
    assert places(finding) <= {101, 102}
    assert finding.count == sum(r != c for r, c in zip(rows, clean(), strict=True))
    assert SECRET not in json.dumps(report.to_dict())
    assert "jane.miller" not in json.dumps(report.to_dict()["findings"])


@pytest.mark.parametrize(
    "text",
    [
        "Write to help@example.com or noreply@shop.org", "order 4539148803436468", "12-34-5678 and 000-12-3456",
        "call 555-0123", "password: must be changed!", "api_key = os.environ['KEY']", "password: ${DB_PASSWORD}",
        "part 123-456-7890 and 415-555-0123", "token: https://x.test/a1b2c3", "+1 555 0100 2000",
        "AKIAIOSFODNN7EXAMPLE", "sk-your-api-key-goes-here-xxxxxxxxxxxxxxx",
        "version 1.2.3.4 of 2024-01-02 10:20", "GB00 1234 5678", "https://host/path:with@sign", "the AI assistant",
        "def f(a: int) -> dict[str, int]: return {a: {1: 2}}", "isbn 978-3-16-148410-0", "ratio 16:9 + 20-30-40",
    ],
)  # fmt: skip
def test_what_is_no_fault(text: str) -> None:
    assert [k.name for k, _, _ in find(text)] == []


def test_the_password_of_a_url_is_no_address() -> None:
    found = [k.name for k, _, _ in find("postgres://admin:h8Gk2pQz71x@db.corp.net/main and ann@db.corp.net")]
    assert found == ["password in a URL", "e-mail address"]


def test_duplicates_and_contradictions(checked: Checked) -> None:
    rows = clean()
    for i in range(20):
        rows.append({"prompt": rows[i]["prompt"].upper(), "completion": rows[i]["completion"]})
    for i in range(50, 53):
        rows.append({"prompt": rows[i]["prompt"].rstrip("?") + "  !", "completion": "something else"})
    report, _ = checked(rows)
    duplicates, contradictions = only(report, "duplicates"), only(report, "contradictions")
    assert (duplicates.severity, duplicates.count) == ("warning", 20)
    assert places(duplicates) <= set(range(1201, 1221))
    assert (contradictions.severity, contradictions.count) == ("warning", 3)
    assert "'something else'" in contradictions.examples[0]
    assert "leakage" not in report.codes()  # the split keeps copies together
    with pytest.raises(GateRefused, match="contradictions") as refused:
        gate(report, strict=True)
    assert refused.value.exit_code == 3
    gate(report)


def test_weights_are_no_duplicates(checked: Checked, tmp_path: Path, chat: Chat) -> None:
    path = _write(tmp_path / "train.jsonl", clean())
    data = {"train": [{"path": str(path), "weight": 3}]}
    recipe = from_dict({"name": "t", "model": {"id": "x"}, "data": data})
    report = check(recipe, prepare(recipe, chat, model_hash="m", cache=tmp_path / "c"), chat)
    assert "duplicates" not in report.codes()
    assert report.stats["seen_an_epoch"] == 3


def test_signatures_are_the_librarys_own() -> None:
    short = ["where is my order 12", "abc", "", "größe 😀 in \ud800 paris", "x" * 400, "where is my order 12?"]
    long = [" ".join(f"word{i * k}" for i in range(90)) for k in (1, 2)]
    texts = [long[0], *short, long[1]]
    found = Signatures()
    found.add(texts)
    for text, row in zip(texts, found._blocks[0], strict=True):
        own = MinHash(num_perm=64, seed=1, hashfunc=crc32 if text in long else hashed)
        pieces = shingles(text)
        own.update_batch([s.encode("utf-8", "replace") for s in pieces] if text in long else pieces)
        assert (own.hashvalues == row).all(), text


def test_near_duplicates(checked: Checked) -> None:
    rows = clean()
    for i in range(100):
        words = rows[i]["prompt"].split()
        words[2] += "s"
        rows.append({"prompt": "And " + rows[i]["prompt"], "completion": rows[i]["completion"]})
    report, _ = checked(rows, validation=clean(60, seed=5), test=clean(60, seed=6))
    finding = only(report, "near_duplicates")
    expected = sum(
        jaccard(normal(rows[i]["prompt"]), normal(rows[1200 + i]["prompt"])) >= THRESHOLD for i in range(100)
    )
    assert finding.severity == "warning"
    assert expected >= 80
    assert finding.count == pytest.approx(expected, abs=4)  # MinHash may miss a pair at the threshold
    assert places(finding) <= set(range(1201, 1301))


def test_near_contradictions(checked: Checked) -> None:
    rows = clean()
    rows += [{"prompt": f"{r['prompt']} please", "completion": "another answer"} for r in rows[:40]]
    report, _ = checked(rows)
    finding = only(report, "near_contradictions")
    assert finding.severity == "warning" and finding.count >= 36, "the rest is MinHash's to miss"
    assert "'another answer', but " in finding.examples[0]


def test_an_input_that_the_first_row_lacks_is_read(checked: Checked) -> None:
    rows: Rows = [{"instruction": f"Count {i}", "output": str(i)} for i in range(60)]
    rows += [{"instruction": f"Translate {i}", "input": f"Good night {i}", "output": "Gute Nacht"} for i in range(60)]
    report, prepared = checked(rows)
    assert "mixed_fields" not in report.codes(), "an input is optional"
    prompts = [r["messages"][0]["content"] for s in ("train", "validation", "test") for r in prepared.rows(s)]
    assert sum("Good night" in p for p in prompts) == 60


def test_other_numbers_are_no_near_duplicates(checked: Checked) -> None:
    rows = [{"prompt": f"Hello, where is my order number {100000 + 37 * i}, which I bought on the market?",
             "completion": f"order {100000 + 37 * i}"} for i in range(1200)]  # fmt: skip
    report, _ = checked(rows)
    assert not {"near_duplicates", "near_leakage", "contradictions"} & set(report.codes())


def test_leakage_exact_and_near(checked: Checked) -> None:
    rows = clean()
    held = clean(100, seed=9)
    near = [{"prompt": "And " + r["prompt"], "completion": "x y"} for r in rows[50:90]]
    report, _ = checked(rows, validation=held[:40] + rows[:10], test=held[40:] + near)
    exact = only(report, "leakage")
    assert (exact.severity, exact.count) == ("error", 10)
    assert "10 of 50 validation rows" in exact.message
    with pytest.raises(DataError, match="leakage"):
        gate(report)
    leak = only(report, "near_leakage")
    assert leak.severity == "warning"
    assert 20 <= leak.count <= 40
    assert "test rows" in leak.message and f"{leak.count} of them with another answer" in leak.message


def test_leakage_has_one_threshold_whatever_the_answers(checked: Checked) -> None:
    """Held-out prompts a little less like training's than that contradict it at most: their figures are their own."""
    rows = clean()
    held = [{"prompt": f"{r['prompt']} please do", "completion": "x y"} for r in rows[:60]]
    alike = [jaccard(normal(r["prompt"]), normal(h["prompt"])) for r, h in zip(rows, held, strict=False)]
    assert max(alike) < THRESHOLD and sum(one >= CONTRADICT for one in alike) >= 56
    report, _ = checked(rows, validation=held, test=clean(60, seed=5))
    assert "near_leakage" not in report.codes()
    assert only(report, "near_contradictions").count >= 45, "the rest is MinHash's to miss"


def _labelled(counts: dict[str, int]) -> Rows:
    rows, labels = clean(sum(counts.values())), [k for k, n in counts.items() for _ in range(n)]
    return [{"prompt": r["prompt"], "completion": label} for r, label in zip(rows, labels, strict=True)]


def test_labels(checked: Checked) -> None:
    report, _ = checked(_labelled({"billing": 900, "card": 300, "Card ": 40, "lost": 30, "rare": 2, "app": 60}))
    assert report.stats["labels"]["billing"] > 600
    assert only(report, "imbalance").severity == "warning"
    assert "'rare'" not in only(report, "rare_labels").message
    assert only(report, "rare_labels").count >= 1
    assert (
        "'Card '" in only(report, "label_spelling").examples[0]
        or "'card'" in only(report, "label_spelling").examples[0]
    )


def test_balanced_labels_and_numbers_are_fine(checked: Checked) -> None:
    report, _ = checked(_labelled({"billing": 600, "card": 500, "lost": 400}))
    assert report.of("warning") == []
    rows = [{"prompt": r["prompt"], "completion": str(i % 28)} for i, r in enumerate(clean(1500))]
    assert checked(rows)[0].of("warning") == []


def test_labels_never_seen_in_training(checked: Checked) -> None:
    held = [{**r, "completion": "new"} for r in clean(30, seed=4)]
    report, _ = checked(_labelled({"a": 600, "b": 600}), validation=held)
    assert "'new'" in only(report, "unseen_labels").message


def test_answer_format_and_fields(checked: Checked) -> None:
    rows = [{"prompt": r["prompt"], "completion": {"intent": r["completion"], "n": i}} for i, r in enumerate(clean())]
    rows[7]["completion"] = "intent: amber"
    rows[9]["completion"] = '```json\n{"intent": "a", "n": 1}\n```'
    rows[11]["completion"] = {"intent": "a"}
    report, _ = checked(rows)
    broken, fields = only(report, "answer_format"), only(report, "answer_fields")
    assert (broken.count, fields.count) == (2, 1)
    assert places(broken) == {8, 10}
    assert places(fields) == {12}


def test_canned_answers_and_few_prompts(checked: Checked) -> None:
    rows = clean()
    for row in rows[:400]:
        row["completion"] = "I cannot help with that."
    rows += [{"prompt": rows[i % 10]["prompt"], "completion": f"another {i} {WORDS[i % 50]}"} for i in range(1400)]
    codes = checked(rows, **{"sequence": {"packing": True}})[0].codes()
    assert "few_prompts" in codes
    assert "canned_answer" not in codes  # 400 of 2,600 is less than a fifth
    assert "canned_answer" in checked(rows[:1200])[0].codes()


def test_sizes_and_lengths(checked: Checked) -> None:
    rows = clean(40)
    rows[3]["completion"] = "long " * 200
    report, _ = checked(rows, sequence={"max_length": 512})
    assert only(report, "few_rows").severity == "warning"
    assert "small_test" in report.codes() or "no_test" in report.codes()
    too_long = only(report, "too_long")
    assert places(too_long) == {4}
    assert "exceed 512 tokens" in too_long.message


def test_empty_validation_is_said(checked: Checked) -> None:
    report, _ = checked(clean(3))
    assert {"no_validation", "no_test"} & set(report.codes())


def test_eos_is_checked_on_the_labels(checked: Checked, chat: Chat, tmp_path: Path) -> None:
    """Labels on disk whose EOS was masked, as another tool's preparation would leave them."""
    _, prepared = checked(clean())
    path = prepared.folder / "train.tokens.arrow"
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        table = reader.read_all()
    labels = table.column("labels").to_pylist()
    for row in (0, 5):
        labels[row][-1] = IGNORED
    labels[9] = [IGNORED] * len(labels[9])
    table = table.set_column(1, "labels", pa.array(labels, pa.list_(pa.int32())))
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in prepared.folder.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    with pa.OSFile(str(changed / path.name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    recipe = from_dict({"name": "t", "model": {"id": "x"}, "data": {"train": [{"path": "x"}]}})
    finding = only(check(recipe, Prepared.open(changed), chat), "eos_not_trained")
    assert (finding.severity, finding.count) == ("error", 3)
    first = prepared.rows("train")
    assert places(finding) == {first[i]["line"] for i in (0, 5, 9)}


def test_tokenizer_that_loses_text(tmp_path: Path, checked: Checked) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {t: i for i, t in enumerate(["[UNK]", "<s>", "</s>", "Tell", "me", "of", "in", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    lossy = Chat(
        PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", bos_token="<s>", unk_token="[UNK]"),
        "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}</s> {% endif %}{% endfor %}",
    )
    rows = [{"prompt": r["prompt"], "completion": "naïve cœur"} for r in clean()]
    recipe = from_dict({"name": "t", "model": {"id": "x"},
                        "data": {"train": [{"path": str(_write(tmp_path / "train.jsonl", rows))}]}})  # fmt: skip
    report = check(recipe, prepare(recipe, lossy, model_hash="m", cache=tmp_path / "c"), lossy)
    assert "lossy_tokens" in report.codes()
    assert "lossy_tokens" not in checked(clean())[0].codes()


def test_review_is_written_marked_and_read_back(checked: Checked, tmp_path: Path) -> None:
    path = tmp_path / "review.csv"
    report, prepared = checked(clean(), review=path)
    assert str(path) in only(report, "review_written").message
    again = write_review(prepared, tmp_path / "again.csv")
    assert again.read_bytes() == path.read_bytes()  # the same seed, the same rows
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 50
    for i, row in enumerate(rows[:40]):
        row["mark"], row["note"] = ("bad", "wrong fact") if i < 4 else ("OK", "")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    result = read_review(path)
    assert result.marks == {"ok": 36, "bad": 4, "unsure": 0}
    assert (result.judged, result.unmarked) == (40, 10)
    finding = only(checked(clean(), review=path)[0], "review")
    assert finding.severity == "warning"
    assert "wrong fact" in finding.examples[0]
    changed = [{**r, "completion": f"now {r['completion']}"} for r in clean()]
    report = checked(changed, review=path)[0]
    assert only(report, "review_stale").count == 40, "marks of rows that are no more do not count"
    assert "judged 0 sampled rows" in only(report, "review").message
    path.write_text("mark,note,place\nmaybe,,a:1\n")
    with pytest.raises(DataError, match="'maybe'"):
        read_review(path)


def test_what_only_looks_like_a_secret_or_an_address_or_another_layout_is_none(checked: Checked) -> None:
    said = ["git@github.com:a/b.git", "icon@2x.png", "api_key=self.api_key2", "api_key=API_KEY_1"]
    rows = clean()
    for row, text in zip(rows, said, strict=False):
        row["prompt"] += f" {text}"
    report, _ = checked(rows)
    assert {"pii", "secret"} & {f.code for f in report.findings} == set()
    alpaca = [{"instruction": r["prompt"], "output": r["completion"]} for r in clean()]
    for first in (0, 1):  # an optional input may be absent, in the first row too
        mixed = [{**r, "input": f"number {i}"} if i % 2 == first else r for i, r in enumerate(alpaca)]
        report, _ = checked(mixed)
        assert "mixed_fields" not in {f.code for f in report.findings}


def test_false_positives_on_the_demo_data(tmp_path: Path, chat: Chat) -> None:
    """Clean data made by this project: at most 1% of the rows may be named by a warning."""
    from ft_ray import demo_data

    counts = demo_data.write(tmp_path)
    data = {name: [{"path": str(tmp_path / f"{name}.jsonl")}] for name in ("train", "validation", "test")}
    recipe = from_dict({"name": "t", "model": {"id": "x"}, "data": data})
    report = check(recipe, prepare(recipe, chat, model_hash="m", cache=tmp_path / "c"), chat)
    assert report.stats["distinct"] == counts
    assert sum(f.count for f in report.of("warning") + report.of("error")) <= 0.01 * sum(counts.values())
    assert sum(f.count for f in report.findings if f.code not in ("size", "room")) <= 0.01 * sum(counts.values())
