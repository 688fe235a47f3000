"""scripts/env.sh, the script behind `make env`, with a small lock and packages made here instead of 4 GB."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "env.sh"
PACKAGES = {"torch": "2.13.0+cpu", "ray": "2.60.0", "transformers": "5.19.0", "trl": "1.16.0", "peft": "0.21.2"}


def _checkout(folder: Path) -> Path:
    """A checkout with the real script, a lock of five empty packages, and an `ft_ray` that says where it is."""
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    for name, version in PACKAGES.items():
        with zipfile.ZipFile(wheels / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            info = f"{name}-{version}.dist-info"
            wheel.writestr(f"{name}/__init__.py", "")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    for part in ("scripts", "constraints", "ft_ray"):
        (folder / part).mkdir()
    shutil.copy2(SCRIPT, folder / "scripts")
    (folder / "constraints" / "cpu.txt").write_text("".join(f"{n}=={v}\n" for n, v in PACKAGES.items()))
    (folder / "ft_ray" / "__init__.py").touch()
    (folder / "ft_ray" / "cli.py").write_text(f"def main():\n    print({str(folder)!r})\n")
    return folder


def _start(checkout: Path, root: Path, **more: str) -> subprocess.Popen[str]:
    settings = {
        "FT_RAY_ENV_ROOT": str(root),
        "FT_RAY_STACK": "cpu",
        "FT_RAY_PYTHON": sys.executable,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(checkout / "wheels"),
    }
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MAKEFLAGS")} | settings | more
    return subprocess.Popen(
        ["bash", str(checkout / "scripts" / "env.sh")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _run(checkout: Path, root: Path, **more: str) -> tuple[int, str, str]:
    process = _start(checkout, root, **more)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_made_once_by_two_at_the_same_time_and_shared_by_checkouts(tmp_path: Path) -> None:
    checkout, root = _checkout(tmp_path / "one"), tmp_path / "envs"
    both = [_start(checkout, root), _start(checkout, root)]
    results = [(process.communicate(timeout=120), process.returncode) for process in both]
    assert [code for _, code in results] == [0, 0], results
    folders = {out.strip().splitlines()[-1] for (out, _), _ in results}
    assert len(folders) == 1
    errors = [err for (_, err), _ in results]
    assert sum("making" in e for e in errors) == 1, "both built"
    assert sum("waiting for it" in e for e in errors) == 1
    binaries = Path(folders.pop())

    # Another checkout with the same constraints installs nothing, and `ft-ray` follows the folder it is called in.
    second = tmp_path / "two"
    shutil.copytree(checkout, second)
    (second / "ft_ray" / "cli.py").write_text("def main():\n    print('two')\n")
    code, out, err = _run(second, root, PIP_FIND_LINKS="/nowhere")
    assert (code, out.strip(), err) == (0, str(binaries), "")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for folder, said in ((checkout, str(checkout)), (second / "ft_ray", "two"), (tmp_path, "two")):
        shown = subprocess.run([binaries / "ft-ray"], cwd=folder, env=environment, capture_output=True, text=True)
        assert shown.stdout.strip() == said, shown.stderr

    # Other constraints, another environment.
    lock = second / "constraints" / "cpu.txt"
    lock.write_text(lock.read_text() + "absent==1.0\n")
    code, out, err = _run(second, root)
    assert code == 1
    assert out == ""
    assert "No matching distribution found for absent==1.0" in err
    assert "the packages could not be installed" in err


def test_an_install_that_was_cut_short_is_never_used(tmp_path: Path) -> None:
    checkout, root = _checkout(tmp_path / "one"), tmp_path / "envs"
    process = _start(checkout, root)
    assert process.stderr is not None
    for line in process.stderr:
        if "venv" in line:
            break
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    (half,) = [p for p in root.iterdir() if p.is_dir()]
    (half / "left-over").touch()
    code, out, err = _run(checkout, root)
    assert code == 0, err
    assert Path(out.strip()) == half / "bin"
    assert not (half / "left-over").exists(), "built on top of a broken one"


def test_a_cpu_torch_that_pip_does_not_find_comes_from_the_pytorch_index(tmp_path: Path) -> None:
    checkout, index = _checkout(tmp_path / "one"), tmp_path / "simple"
    (index / "torch").mkdir(parents=True)
    wheel = next((checkout / "wheels").glob("torch-*"))
    shutil.move(wheel, index / "torch")
    (index / "torch" / "index.html").write_text(f'<a href="{wheel.name.replace("+", "%2B")}">{wheel.name}</a>')
    nowhere = (tmp_path / "empty").as_uri()
    settings = {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": nowhere, "PIP_EXTRA_INDEX_URL": nowhere}
    code, out, err = _run(checkout, tmp_path / "envs", FT_RAY_TORCH_INDEX=index.as_uri(), **settings)
    assert code == 0, err
    assert f"torch==2.13.0+cpu from {index.as_uri()} ..." in err
    code, out, err = _run(checkout, tmp_path / "other", FT_RAY_TORCH_INDEX=nowhere, **settings)
    assert (code, out) == (1, "")
    assert f"torch==2.13.0+cpu is neither where pip looks by itself nor at {nowhere}" in err


def test_no_python_that_fits_says_which_and_how(tmp_path: Path) -> None:
    checkout = _checkout(tmp_path / "one")
    code, out, err = _run(checkout, tmp_path / "envs", FT_RAY_PYTHON="/bin/false")
    assert (code, out) == (1, "")
    assert "no Python 3.11 to 3.13 with venv found" in err
    assert "FT_RAY_PYTHON=" in err
    code, _, err = _run(checkout, tmp_path / "envs", FT_RAY_STACK="tpu")
    assert code == 1
    assert "FT_RAY_STACK=tpu is neither cpu nor gpu" in err
    assert not (tmp_path / "envs").exists()


@pytest.mark.parametrize("target", ["env", "demo", "test", "test-faults", "lint", "types", "clean", "help"])
def test_make_help_lists(target: str) -> None:
    shown = subprocess.run(["make", "-s", "help"], cwd=SCRIPT.parents[1], capture_output=True, text=True, check=True)
    assert f"make {target} " in shown.stdout
