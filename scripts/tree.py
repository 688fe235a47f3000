"""Rewrites the trees of files in README.md and docs/map.md from the files themselves: `make tree`; --check only says.

README.md has the folders and what a user opens; docs/map.md has every file of the folders that hold code.

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
START, END = "<!-- tree -->", "<!-- /tree -->"
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
    "docs": "guide, cost, operations, reference, map of the modules",
    "ft_ray": "all the code",
    "k8s": "KubeRay manifests, kustomize base and overlays, Dockerfile",
    "pyproject.toml": "dependencies and extras; settings of ruff, mypy, pytest and import-linter",
    "scripts": "env.sh (make env), lock.py (constraints), tree.py (this tree)",
    "serve": "Ray Serve config files for serve deploy",
    "tests": "unit, declarative, parity, distributed, e2e, gpu",
    "tune_spaces": "search spaces",
}
FOLDED = {"benchmarks/results": "the measured numbers, one JSON file a measurement"}  # folders shown as one line
WORDS = {  # files that cannot say it themselves
    "ft_ray/report.css": "The look of a run's report, in light and in dark",
    "k8s/dashboards/endpoint.json": "Grafana dashboard of the endpoint: latency, tokens, queue, refusals",
}
# Which folders' files a page lists.
PAGES = {
    "README.md": ("tune_spaces", "serve", "cluster", "docs"),
    "docs/map.md": ("ft_ray", "k8s", "benchmarks", "constraints", "tests"),
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


def entries(page: str) -> list[tuple[str, str]]:
    """(name, purpose) of every line of a page's tree, in order. Only README.md names the other top-level files."""
    files = tracked()
    lines: list[tuple[str, str]] = []
    for top in sorted({p.parts[0] for p in files}, key=lambda name: (not (ROOT / name).is_dir(), name.lower())):
        below = [p for p in files if p.parts[0] == top and len(p.parts) > 1]
        name = f"{top}/" if below else top
        if page == "README.md" or top in PAGES[page]:
            lines.append((name, TOP.get(top) or purpose(Path(top))))
        if top in PAGES[page]:
            lines += listed(top, below)
    return lines


def tree(lines: list[tuple[str, str]]) -> str:
    # A few long paths push their own line to the right, not the whole column.
    left = min(max(len(name) for name, _ in lines), LONGEST) + 2
    padded = [(f"{name}  ".ljust(left), text) for name, text in lines]
    return "\n".join(f"{name}{shortened(text, WIDTH - len(name))}".rstrip() for name, text in padded)


def rewritten(text: str, lines: list[tuple[str, str]]) -> str:
    before, rest = text.split(START, 1)
    return f"{before}{START}\n```text\n{tree(lines)}\n```\n{END}{rest.split(END, 1)[1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rewrites the trees of files in README.md and docs/map.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when one is out of date")
    check = parser.parse_args(arguments).check
    failed = False
    for name in PAGES:
        page = ROOT / name
        old, lines = page.read_text(encoding="utf-8"), entries(name)
        new = rewritten(old, lines)
        silent = [entry.strip() for entry, text in lines if not text]
        if silent:
            sys.stderr.write(f"no word on what these are for: {', '.join(silent)}\n")
        if new == old:
            sys.stderr.write(f"{name}: tree is up to date\n")
        elif check:
            sys.stderr.write(f"{name}: tree is out of date: run make tree\n")
        else:
            page.write_text(new, encoding="utf-8")
            sys.stderr.write(f"{name}: tree rewritten\n")
        failed = failed or bool(silent) or (check and new != old)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
