"""Seconds and peak memory of merging an adapter, beside reading and writing the same bytes and beside PEFT.

    python benchmarks/merge.py                   # 1.2 billion parameters in bf16, 2.5 GB
    python benchmarks/merge.py --quick           # 0.2 billion parameters
    python benchmarks/merge.py --layers 32 --hidden 4096 --intermediate 14336   # the shape of an 8B model
    python benchmarks/merge.py --device cuda --base FOLDER --parts copy,merge --json FILE

The base has random weights in Llama's layout; the adapter has rank 16 on all seven projections. Every part
runs in a process of its own: `copy` reads and writes the base's bytes, `merge` is the streaming merge,
`dequantized` the same with the NF4 round trip of QLoRA, `peft` loads, merges and saves with PEFT. Seconds leave
out imports; memory is the peak resident size above what the process had with all libraries loaded. Files
are in the page cache for all parts alike. Prints ratios; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def make(folder: Path, layers: int, hidden: int, intermediate: int, vocabulary: int) -> None:
    """Writes base/ and adapter/ to `folder`."""
    import torch
    from transformers import GenerationConfig, LlamaConfig

    from ft_ray.safetensors_io import Entry, Writer, plan_shards, write_index
    from tests.tiny import build

    base, adapter = folder / "base", folder / "adapter"
    build(base)
    for path in base.glob("*.safetensors*"):
        path.unlink()
    kv = hidden // 4
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden), "mlp.down_proj": (hidden, intermediate),
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, tie_word_embeddings=False,
        dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(base)
    GenerationConfig(eos_token_id=2).save_pretrained(base)
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        sizes |= {f"{at}.{name}.weight": shape for name, shape in shapes.items()}
        sizes |= {f"{at}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    sizes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    shards = plan_shards([Entry(n, torch.bfloat16, s) for n, s in sizes.items()], 2_000_000_000)
    for file, entries in shards:
        with Writer(base / file, entries) as writer:
            for entry in entries:
                writer.write(entry.name, torch.randn(entry.shape, dtype=torch.bfloat16) * 0.02)
    write_index(base, shards)
    make_adapter(adapter, sizes)


def make_adapter(adapter: Path, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """A random adapter of rank 16 on every projection of a base whose tensors have these `sizes`."""
    import torch

    from ft_ray.safetensors_io import Entry, Writer

    adapter.mkdir()
    tensors = {}
    for name, shape in sizes.items():
        if "_proj" in name:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(16, shape[1]) * 0.02
            tensors[f"{key}.lora_B.weight"] = torch.randn(shape[0], 16) * 0.02
    entries = [Entry(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]
    with Writer(adapter / "adapter_model.safetensors", entries) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32,
                "target_modules": sorted({n.split(".")[-2] for n in sizes if "_proj" in n})}  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(settings))


def take(folder: Path, base: Path) -> None:
    """`base`, a model folder that exists, as base/ of `folder`, with an adapter beside it."""
    from safetensors import safe_open

    (folder / "base").symlink_to(base.resolve(), target_is_directory=True)
    sizes = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            sizes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    make_adapter(folder / "adapter", sizes)


def part(name: str, folder: Path, device: str) -> dict[str, float]:
    """Runs one part in this process."""
    import bitsandbytes  # noqa: F401
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from ft_ray.merging import merge
    from ft_ray.recipe import Quantization

    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak that VmHWM reports
    started = time.perf_counter()
    if name == "copy":
        out.mkdir()
        for path in sorted(base.glob("*.safetensors")):
            with path.open("rb") as source, (out / path.name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 24)
    elif name == "peft":
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": device})
        PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=False).save_pretrained(out)
    else:
        mode: dict[str, Any] = {"base_mode": "full"}
        if name == "dequantized":
            mode = {"base_mode": "dequantized", "quantization": Quantization(), "compute_dtype": torch.bfloat16}
        merge(base, adapter, out, device=device, max_shard_bytes=2_000_000_000, **mode)
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 3), "peak_bytes": status("VmHWM") - before}


def status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.2 billion parameters")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="one JSON object on stdout, or in FILE")
    parser.add_argument("--device", default="cpu", help="where updates are computed: cpu or cuda")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=64000)
    parser.add_argument("--base", type=Path, help="a Llama's model folder to merge into, instead of one made here")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--parts", default="copy,merge,dequantized,peft", help="which parts, in order")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(part(args.part, args.folder, args.device)))
        return
    if args.quick:
        args.layers, args.hidden, args.intermediate, args.vocabulary = 8, 1024, 4096, 32000
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        if args.base:
            take(folder, args.base)
        else:
            make(folder, args.layers, args.hidden, args.intermediate, args.vocabulary)
        size = sum(p.stat().st_size for p in (folder / "base").glob("*.safetensors"))
        results: dict[str, Any] = {"bytes": size, "device": args.device, "parts": {}}
        for one in args.parts.split(","):
            command = [sys.executable, __file__, "--part", one, "--folder", str(folder), "--device", args.device]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results["parts"][one] = json.loads(done.stdout.splitlines()[-1])
            shutil.rmtree(folder / "out")
            if args.json and args.json != "-":
                Path(args.json).write_text(json.dumps(results) + "\n")
    if args.json == "-":
        print(json.dumps(results))
        return
    copy = results["parts"].get("copy", {}).get("seconds")
    print(f"base {size / 1e9:.2f} GB on {args.device}")
    for one, found in results["parts"].items():
        ratio = f"{found['seconds'] / copy:5.2f} x copy" if copy else ""
        share = found["peak_bytes"] / size
        memory = f"peak {found['peak_bytes'] / 1e6:7.0f} MB ({share:.2f} x model)"
        print(f"{one:12} {found['seconds']:8.2f} s {ratio}   {memory}")


if __name__ == "__main__":
    main()
