"""Rewrites the two trees of files in README.md from the files themselves: `make tree`; --check only says.

The first has the folders and what a user opens; the second, folded away, every file of the folders that hold code.

A module's line is the first line of its docstring, a YAML file's its first comment, a page's its title. Folders
of measured numbers are one line. Exit code 1: --check found the tree out of date, or a file has no line.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH, LONGEST = 120, 27
TOP = {  # top-level names whose line is not in the file itself
    ".ci": "run: system packages, lint, types, import contracts, then the tests",
    ".gitattributes": "line endings, binary files",
    ".gitignore": "what is built or run here",
    ".pre-commit-config.yaml": "the same checks before every commit, offline",
    "CHANGELOG.md": "what changed",
    "CONTRIBUTING.md": "how to work on it, the rules that are checked",
    "LICENSE": "Apache-2.0",
    "Makefile": "env, demo, test, lint, types, imports, wheel, hooks, clean",
    "README.md": "this page",
    "benchmarks": "side-by-side measurements and their results",
    "cluster": "Ray cluster-launcher files for ray up",
    "constraints": "the exact CPU and GPU stacks",
    "docs": "guide, cost, operations, reference",
    "ft_ray": "all the code",
    "k8s": "KubeRay manifests, kustomize base and overlays, Dockerfile",
    "pyproject.toml": "dependencies and extras; settings of ruff, mypy, pytest and import-linter",
    "scripts": "env.sh (make env), lock.py (constraints), tree.py (this tree)",
    "serve": "Ray Serve config files for serve deploy, and a load balancer before them",
    "tests": "unit, declarative, parity, distributed, e2e, gpu",
    "tune_spaces": "search spaces",
}
FOLDED = {"benchmarks/results": "the measured numbers, one JSON file a measurement"}  # folders shown as one line
WORDS = {  # files that cannot say it themselves
    "ft_ray/report.css": "The look of a run's report, in light and in dark",
    "k8s/dashboards/endpoint.json": "Grafana dashboard of the endpoint: latency, tokens, queue, refusals",
}
# Which folders' files a tree lists, by its mark in README.md.
TREES = {
    "tree": ("tune_spaces", "serve", "cluster", "docs"),
    "files": ("ft_ray", "k8s", "benchmarks", "constraints", "tests"),
}


def tracked() -> list[Path]:
    """Files that git tracks or would, relative to the root; all files where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return [p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file()]
    return sorted({Path(line) for line in out.splitlines() if (ROOT / line).exists()})


def purpose(path: Path) -> str:
    """One line: what the file is for, in its own words where it has any."""
    if path.as_posix() in WORDS:
        return WORDS[path.as_posix()]
    try:
        text = (ROOT / path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    for line in text.splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").strip()
    return ""


def shortened(text: str, width: int) -> str:
    """The text if it fits, else up to its last clause that does, else cut at a word."""
    if len(text) <= width:
        return text.rstrip(".")
    clause = max(text[:width].rfind(mark) for mark in (": ", ", ", "; "))
    if clause >= 20:
        return text[:clause]
    return text[: width - 2].rsplit(" ", 1)[0].rstrip(".,:;") + " …"


def listed(top: str, below: list[Path]) -> list[tuple[str, str]]:
    """The lines of the files of one folder."""
    lines = {}
    for path in below:
        folded = next((f for f in FOLDED if path.is_relative_to(f)), None)
        if folded:
            lines[f"  {Path(folded).relative_to(top).as_posix()}/"] = FOLDED[folded]
        elif path.name != "py.typed":
            lines[f"  {path.relative_to(top).as_posix()}"] = purpose(path)
    return list(lines.items())


def entries(mark: str) -> list[tuple[str, str]]:
    """(name, purpose) of every line of a tree, in order. Only the first names the other top-level files."""
    files = tracked()
    lines: list[tuple[str, str]] = []
    for top in sorted({p.parts[0] for p in files}, key=lambda name: (not (ROOT / name).is_dir(), name.lower())):
        below = [p for p in files if p.parts[0] == top and len(p.parts) > 1]
        if mark == "tree" or top in TREES[mark]:
            lines.append((f"{top}/" if below else top, TOP.get(top) or purpose(Path(top))))
        if top in TREES[mark]:
            lines += listed(top, below)
    return lines


def tree(lines: list[tuple[str, str]]) -> str:
    # A few long paths push their own line to the right, not the whole column.
    left = min(max(len(name) for name, _ in lines), LONGEST) + 2
    padded = [(f"{name}  ".ljust(left), text) for name, text in lines]
    return "\n".join(f"{name}{shortened(text, WIDTH - len(name))}".rstrip() for name, text in padded)


def rewritten(text: str, mark: str, lines: list[tuple[str, str]]) -> str:
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, rest = text.split(start, 1)
    return f"{before}{start}\n```text\n{tree(lines)}\n```\n{end}{rest.split(end, 1)[1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rewrites the trees of files in README.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when one is out of date")
    check = parser.parse_args(arguments).check
    page = ROOT / "README.md"
    new = old = page.read_text(encoding="utf-8")
    silent = []
    for mark in TREES:
        lines = entries(mark)
        silent += [name.strip() for name, text in lines if not text]
        new = rewritten(new, mark, lines)
    if silent:
        sys.stderr.write(f"no word on what these are for: {', '.join(silent)}\n")
    if new == old:
        sys.stderr.write("the trees are up to date\n")
    elif check:
        sys.stderr.write("the trees are out of date: run make tree\n")
    else:
        page.write_text(new, encoding="utf-8")
        sys.stderr.write("the trees were rewritten\n")
    return int(bool(silent) or (check and new != old))


if __name__ == "__main__":
    sys.exit(main())
