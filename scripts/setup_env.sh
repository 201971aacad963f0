#!/usr/bin/env bash
# Makes the virtual environment of this checkout, with PyTorch and fastattn in it, compiled kernels included; what is
# there already is used again. The other scripts call it.
#
#   scripts/setup_env.sh [EXTRAS]          extras of pyproject.toml, e.g. train,test
#   scripts/setup_env.sh --torch-only      PyTorch without fastattn
#
# Environment: PYTHON (interpreter to start from), FASTATTN_VENV (default .venv), FASTATTN_TORCH (what pip shall
# install as PyTorch), and everything setup.py reads.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-}
venv=${FASTATTN_VENV:-.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
python=$venv/bin/python
started=$SECONDS

say() { printf '[setup %3ds] %s\n' $((SECONDS - started)) "$*"; }
die() {
  printf 'setup: error: %s\n' "$*" >&2
  exit 1
}

# the first Python that is new enough, by version and not by name
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.{13,12,11,10} python; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
    [ "$candidate" = "${PYTHON:-}" ] && [ -n "$candidate" ] && die "PYTHON=$candidate is no Python 3.10 or newer"
  done
  die "expected Python 3.10 or newer, found none (Debian, Ubuntu: apt-get install python3 python3-venv)"
}

torch_version() {
  "$1" -c '
import importlib.metadata, re, sys
version = importlib.metadata.version("torch")
print(version)
sys.exit([int(n) for n in re.findall(r"\d+", version)[:2]] < [2, 11])' 2>/dev/null
}

make_venv() {
  local base inherit=()
  base=$(find_python)
  say "virtual environment $venv with $("$base" --version)"
  if torch_version "$base" >/dev/null; then
    inherit=(--system-site-packages)
    say "it takes over PyTorch $(torch_version "$base") of this Python"
  fi
  if ! "$base" -m venv "${inherit[@]}" "$venv" >/dev/null 2>&1; then
    rm -rf "$venv"
    die "expected a working venv module in $base (Debian, Ubuntu: apt-get install python3-venv)"
  fi
}

# pip with its output in a file, of which the end is shown when it fails
pip_install() {
  if ! "$python" -m pip install --disable-pip-version-check "$@" >"$venv/setup.log" 2>&1; then
    tail -n 25 "$venv/setup.log" >&2
    if grep -qE 'NewConnectionError|Timeout|name resolution|Network is unreachable|from versions: none' \
      "$venv/setup.log"; then
      die "pip found no package registry, or nothing there for this Python: is there a network? (log: $venv/setup.log)"
    fi
    die "pip install $* failed: the reason is above, all of it in $venv/setup.log"
  fi
}

if ! "$python" -m pip --version >/dev/null 2>&1; then
  if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
    die "$venv is there but is no virtual environment: move it away, or set FASTATTN_VENV"
  fi
  rm -rf "$venv" # an interrupted setup, or its Python is gone
  make_venv
fi

if ! torch_version "$python" >/dev/null; then
  # without a GPU one fixed release, so that every machine tests the same one
  wanted=${FASTATTN_TORCH:-torch==2.13.0}
  if [ -z "${FASTATTN_TORCH:-}" ] && nvidia-smi -L >/dev/null 2>&1; then
    wanted="torch>=2.11"
  fi
  say "PyTorch: pip install $wanted (a large download)"
  pip_install "$wanted"
fi
say "PyTorch $(torch_version "$python")"

if [ "$extras" = --torch-only ]; then
  exit
fi

say "fastattn${extras:+[$extras]}: packages it needs, and its kernels"
pip_install "setuptools>=80" ninja "pybind11>=2.13"
if [ "${FASTATTN_NATIVE:-auto}" = auto ] && [ -z "${CXX:-}" ] && ! command -v g++ c++ clang++ >/dev/null; then
  say "no C++ compiler: everything runs, on plain PyTorch (Debian, Ubuntu: apt-get install g++, then this script again)"
fi
pip_install --no-build-isolation -e ".${extras:+[$extras]}"
"$python" - <<'END'
import json

with open("fastattn/_build_info.json") as file:
    info = json.load(file)
for part in info["built"]:
    print(f"              compiled {part}")
for part, reason in info["not_built"].items():
    lines = reason.strip().splitlines()
    print(f"              not compiled {part}: {lines[0]}" + (" ... (fastattn info)" if len(lines) > 1 else ""))
END
say "ready"
