#!/usr/bin/env bash
# Makes the project's Python environment, or finds it made, and prints its bin folder as the last line.
#
#   scripts/env.sh            FT_RAY_STACK=cpu|gpu (default: gpu where nvidia-smi lists one), FT_RAY_PYTHON=python3.12,
#                             FT_RAY_ENV_ROOT=/where/environments/are/kept, FT_RAY_TORCH_INDEX=a mirror of PyTorch's CPU index
#
# It lies outside the checkout, named by the hash of the constraints and the Python, so that several checkouts
# share it and a second call installs nothing. The project itself is not installed into it: the Makefile puts
# the checkout on PYTHONPATH, and the environment's `ft-ray` finds the checkout it is called from. An install
# that was cut short lacks its mark and is made anew; a lock keeps two from building at once.
set -euo pipefail
recipe=3 # raise it when this script installs something else from the same constraints
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
say() { printf 'ft-ray env: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

fits() { # a Python from 3.11 to 3.13 that can make environments
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}
python=
for candidate in ${FT_RAY_PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
  if command -v "$candidate" >/dev/null 2>&1 && fits "$candidate"; then python=$candidate; break; fi
done
[[ $python ]] || die "no Python 3.11 to 3.13 with venv found: install one (Debian: apt-get install python3-venv)" \
  "or name it: FT_RAY_PYTHON=/path/to/python3.12"

stack=${FT_RAY_STACK:-auto}
if [[ $stack == auto ]]; then
  if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then stack=gpu; else stack=cpu; fi
fi
lock=$root/constraints/$stack.txt
[[ -f $lock ]] || die "FT_RAY_STACK=$stack is neither cpu nor gpu"

identity=$("$python" -c 'import platform, sys; print(sys.version, sys.base_prefix, platform.machine())')
key=$({ echo "$recipe $identity"; cat "$lock"; } | sha256sum | cut -c1-16)
home=${FT_RAY_ENV_ROOT:-${XDG_CACHE_HOME:-$HOME/.cache}/ft-ray/envs}/$stack-$key
mark=$home/.complete

finish() { echo "$root" >"$home/.checkout"; echo "$home/bin"; exit 0; }
ready() { [[ -f $mark ]] && "$home/bin/python" -c '' 2>/dev/null; }
ready && finish

mkdir -p "$(dirname "$home")"
exec 9>"$home.lock"
if ! flock -n 9; then say "another process is building $home; waiting for it"; flock 9; fi
ready && finish # made while this one waited

started=$SECONDS
log=$home.log
: >"$log"
step() { # TEXT COMMAND...: runs it with its output in the log, saying every 20 s that it is still at it
  local text=$1 from=$SECONDS pid
  shift
  say "$text ..."
  "$@" >>"$log" 2>&1 9>&- &
  pid=$!
  trap 'kill "$pid" 2>/dev/null; say "interrupted; the next call starts anew"; exit 130' INT TERM
  while kill -0 "$pid" 2>/dev/null; do
    sleep 1
    if (((SECONDS - from) % 20 == 0)); then say "$text ... $((SECONDS - from)) s"; fi
  done
  trap - INT TERM
  wait "$pid"
}
failed() { tail -n 15 "$log" >&2; die "$1; the whole log is $log"; }

say "making $home with $("$python" --version) (about 4.5 GB; 3 to 6 minutes, once)"
rm -rf "$home"
step "venv" "$python" -m venv "$home" || failed "the environment could not be made"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PYTHONNOUSERSITE=1 DS_BUILD_OPS=0
unset PYTHONPATH PIP_REQUIRE_VIRTUALENV PIP_TARGET PIP_PREFIX PIP_USER
# Bytecode is compiled afterwards, on all cores at once.
pip=("$home/bin/python" -m pip install --quiet --no-deps --no-compile)

# DeepSpeed is published as source. Built before torch is there it is pure Python (its kernels are compiled at first
# use); beside torch its setup fails with these build tools. The tools are the lock's, not whatever is newest.
if deepspeed=$(grep '^deepspeed==' "$lock"); then
  step "build tools" "${pip[@]}" "$(grep '^setuptools==' "$lock")" || failed "setuptools could not be installed"
  step "$deepspeed" "${pip[@]}" --no-build-isolation "$deepspeed" || failed "$deepspeed could not be built"
fi
torch=$(grep '^torch==' "$lock")
index=${FT_RAY_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
# pip's own configuration first (a wheel on disk, a mirror), then PyTorch's CPU index.
if ! step "$torch" "${pip[@]}" "$torch"; then
  [[ $stack == cpu ]] || failed "$torch could not be installed"
  step "$torch from $index" "${pip[@]}" --index-url "$index" "$torch" ||
    failed "$torch is neither where pip looks by itself nor at $index"
fi
rest=$(grep -c '^[A-Za-z]' "$lock")
step "$rest packages of constraints/$stack.txt" "${pip[@]}" -r "$lock" || failed "the packages could not be installed"
# The examples and tests of some packages are not meant for every Python.
step "bytecode" "$home/bin/python" -m compileall -q -j 0 -x '/(tests?|testing)/' "$home/lib" || true

cat >"$home/bin/ft-ray" <<WRAPPER
#!$home/bin/python
"""ft-ray of the checkout it is called from, else of the one that asked for this environment last."""
import importlib.util, os, pathlib, sys
if importlib.util.find_spec("ft_ray") is None:
    here = pathlib.Path.cwd()
    last = pathlib.Path("$home/.checkout").read_text().strip()
    for folder in (here, *here.parents, pathlib.Path(last)):
        if (folder / "ft_ray" / "__init__.py").is_file():
            sys.path.insert(0, str(folder))  # for this process, PYTHONPATH for Ray's workers
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
            break
    else:
        sys.exit(f"ft-ray: the checkout {last} is gone: call this from a checkout of ft-ray, or run make env in one.")
from ft_ray.cli import main
sys.exit(main())
WRAPPER
chmod +x "$home/bin/ft-ray"
say "checking it"
PYTHONPATH=$root "$home/bin/python" -c 'import torch, ray, transformers, trl, peft' >>"$log" 2>&1 ||
  failed "the environment does not import"
touch "$mark"
say "done in $((SECONDS - started)) s"
finish
