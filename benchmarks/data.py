"""Seconds and peak memory of reading, tokenising and checking a data set of short rows.

    python benchmarks/data.py            # 1,000,000 rows; target: under 5 minutes and 2 GB on 2 cores
    python benchmarks/data.py --quick    # 20,000 rows
    python benchmarks/data.py --rows 100000 --json

The rows are support messages of about 12 words with answers of about 8, made from a seed, with 1% duplicates.
The tokenizer is a byte-level one trained on the spot (4,096 tokens), so that nothing is downloaded. Each stage
runs in a process of its own; memory is the peak resident size of that process with all libraries in it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make(folder: Path, rows: int) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randrange(2, 10))) for _ in range(8000)]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        line = ""
        for i in range(rows):
            if i % 100 or not line:
                prompt, answer = " ".join(rng.choices(words, k=12)), " ".join(rng.choices(words, k=8))
                line = json.dumps({"prompt": f"{prompt} {i}?", "completion": answer}) + "\n"
            file.write(line)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    raw.train_from_iterator([" ".join(rng.choices(words, k=50)) for _ in range(2000)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def _ground(folder: str, packing: bool) -> Any:
    from ft_ray.chat import Chat, load_tokenizer
    from ft_ray.recipe import from_dict

    data = {"train": [{"path": f"{folder}/rows.jsonl"}]}
    sequence = {"max_length": 1024, "packing": packing}
    recipe = from_dict({"name": "bench", "model": {"id": "x"}, "data": data, "sequence": sequence})
    return recipe, Chat(load_tokenizer(Path(folder)))


def _measured(stage: str, folder: str, packing: bool, pipe: Any) -> None:
    from ft_ray.dataset import prepare
    from ft_ray.preflight import check

    recipe, chat = _ground(folder, packing)
    cache = Path(folder) / "cache"
    start = time.perf_counter()
    prepared = prepare(recipe, chat, model_hash="bench", cache=cache)
    out: dict[str, Any] = {"counts": prepared.counts}
    if stage == "check":
        start = time.perf_counter()
        report = check(recipe, prepared, chat)
        out |= {"findings": report.codes(), "tokens": report.stats["total_tokens"]}
    out["seconds"] = round(time.perf_counter() - start, 1)
    out["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    pipe.send(out)


def run(stage: str, folder: Path, packing: bool) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(stage, str(folder), packing, theirs))
    process.start()
    theirs.close()
    try:
        return dict(ours.recv())
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="20,000 rows")
    parser.add_argument("--packing", action="store_true", help="pack the training rows too")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = 20_000 if args.quick else args.rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, rows)
        stages = {stage: run(stage, folder, args.packing) for stage in ("prepare", "check")}
        size = (folder / "rows.jsonl").stat().st_size
    seconds = sum(s["seconds"] for s in stages.values())
    result = {"rows": rows, "file_mb": round(size / 1e6, 1), "packing": args.packing, "seconds": round(seconds, 1),
              "rows_per_second": round(rows / seconds), "peak_mb": max(s["peak_mb"] for s in stages.values()),
              "stages": stages}  # fmt: skip
    if args.json:
        print(json.dumps(result))
        return
    for stage, s in stages.items():
        print(f"{stage:8} {s['seconds']:7.1f} s  peak {s['peak_mb']:5d} MB")
    print(f"{rows} rows in {seconds:.1f} s, {result['rows_per_second']} rows/s")
    print(f"findings: {', '.join(stages['check']['findings'])}")


if __name__ == "__main__":
    main()
