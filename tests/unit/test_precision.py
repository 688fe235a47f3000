"""float32 in place of 16 bits on CPUs that cannot multiply in 16 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ft_ray import precision, recipe

AVX2 = "processor\t: 0\nflags\t\t: fpu sse2 avx avx2 fma\n"
AVX512 = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512dq avx512bw avx512vl\n"
SAPPHIRE = AVX512.replace("avx512vl", "avx512vl avx512_fp16 amx_bf16")
LUNAR_LAKE = "flags\t\t: avx2 avx_vnni avx_vnni_int8 avx_ne_convert\n"
GRAVITON3 = "processor\t: 0\nFeatures\t: fp asimd asimdhp bf16 i8mm\n"
GRAVITON2 = "processor\t: 0\nFeatures\t: fp asimd asimdhp\n"


def made(**values: object) -> recipe.Recipe:
    return recipe.from_dict({"name": "r", "model": {"id": "m"}, "data": {"train": [{"path": "x"}]}, **values})


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(precision, "_CPUINFO", file)
    monkeypatch.setattr(precision, "cpu_multiplies", precision.cpu_multiplies.__wrapped__)
    return file


@pytest.mark.parametrize(
    ("said", "bf16", "fp16"),
    [(AVX2, False, False), (AVX512, True, False), (SAPPHIRE, True, True), (LUNAR_LAKE, True, True),
     (GRAVITON3, True, True), (GRAVITON2, False, True), ("", False, False)],
)  # fmt: skip
def test_what_a_cpu_multiplies(cpu: Path, said: str, bf16: bool, fp16: bool) -> None:
    cpu.write_text(said)
    assert [precision.cpu_multiplies(name) for name in ("bf16", "fp16", "fp32")] == [bf16, fp16, True]


def test_without_the_kernels_list_nothing_is_taken_for_granted(cpu: Path) -> None:
    assert not precision.cpu_multiplies("bf16") and precision.cpu_multiplies("fp32")


def test_this_machines_cpu_is_judged_as_torch_judges_it() -> None:
    assert precision.cpu_multiplies("bf16") == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert precision.cpu_multiplies("fp16") == torch.ops.mkldnn._is_mkldnn_fp16_supported()


def test_bf16_becomes_float32_on_a_cpu_without_it_alone(cpu: Path) -> None:
    cpu.write_text(AVX2)
    asked = made(method="qlora", quantization={"compute_dtype": "bf16"})
    on_cpu, said = precision.on_device(asked, "cpu")
    assert (on_cpu.precision, precision.compute_name(on_cpu), said) == (
        "fp32", "fp32",
        "precision bf16 -> fp32: a CPU without instructions for bf16 matrices is faster in float32",
    )  # fmt: skip
    assert precision.on_device(asked, "cuda:0") == (asked, None)
    assert precision.on_device(asked, "cpu", able=True) == (asked, None)  # of the ranks' own CPUs
    assert precision.on_device(made(precision="fp32"), "cpu")[1] is None
    cpu.write_text(AVX512)
    assert precision.on_device(asked, "cpu") == (asked, None)
    assert precision.on_device(asked, "cpu", able=False)[0] == on_cpu


def test_what_a_quantized_base_computes_in_counts_too(cpu: Path) -> None:
    cpu.write_text(AVX2)
    asked = made(method="qlora", precision="fp32", quantization={"compute_dtype": "bf16"})
    on_cpu, said = precision.on_device(asked, "cpu")
    assert precision.compute_name(on_cpu) == "fp32" and said and said.startswith("precision bf16 -> fp32")
