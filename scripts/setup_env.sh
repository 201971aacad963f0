#!/usr/bin/env bash
# Creates the virtual environment of this checkout, with PyTorch, fastattn and its compiled kernels, or reuses an
# existing one. The other scripts call it.
#
#   scripts/setup_env.sh [EXTRAS]          extras of pyproject.toml, e.g. train,test
#   scripts/setup_env.sh --torch-only      PyTorch without fastattn
#
# Environment: PYTHON (interpreter to start from), FASTATTN_VENV (default .venv), FASTATTN_TORCH (the arguments of
# pip install for PyTorch, options too), and everything setup.py reads.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-}
venv=${FASTATTN_VENV:-.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
python=$venv/bin/python
# PyTorch's index of CPU builds: on the default index the wheels for Linux need gigabytes of CUDA libraries
cpu_index=https://download.pytorch.org/whl/cpu
started=$SECONDS

say() { printf '[setup %3ds] %s\n' $((SECONDS - started)) "$*"; }
die() {
  printf 'setup: error: %s\n' "$*" >&2
  exit 1
}

# the first Python that is new enough, judged by its version, not its name
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
  fi
  if ! "$base" -m venv "${inherit[@]}" "$venv" >/dev/null 2>&1; then
    rm -rf "$venv"
    die "expected a working venv module in $base (Debian, Ubuntu: apt-get install python3-venv)"
  fi
  if torch_version "$python" >/dev/null; then # not if $base is itself in a virtual environment
    say "it takes over PyTorch $(torch_version "$python") of this Python"
  fi
}

# runs pip with its output in a file
try_pip_install() {
  "$python" -m pip install --disable-pip-version-check "$@" >"$venv/setup.log" 2>&1
}

# the same; on failure, prints the end of the file and exits
pip_install() {
  try_pip_install "$@" || pip_failed "$@"
}

pip_failed() {
  tail -n 25 "$venv/setup.log" >&2
  if grep -qE 'NewConnectionError|Timeout|name resolution|Network is unreachable|from versions: none' \
    "$venv/setup.log"; then
    die "pip found no package registry, or nothing there for this Python: is there a network? (log: $venv/setup.log)"
  fi
  die "pip install $* failed: the reason is above, all of it in $venv/setup.log"
}

has_gpu() { nvidia-smi -L >/dev/null 2>&1; }

install_torch() {
  local wanted from_cpu_index
  if [ -n "${FASTATTN_TORCH:-}" ]; then
    read -ra wanted <<<"$FASTATTN_TORCH"
    say "PyTorch: pip install ${wanted[*]}"
    pip_install "${wanted[@]}"
    return
  fi
  if has_gpu; then
    say "PyTorch: pip install 'torch>=2.11', the newest, with CUDA (a download of about 3 GB)"
    pip_install "torch>=2.11"
    return
  fi
  wanted=torch==2.13.0 # a fixed release, so that all machines without a GPU test the same one
  if [ "$(uname -s)" = Linux ]; then
    from_cpu_index=(--index-url "$cpu_index" --timeout 10 --retries 0 "$wanted")
    say "PyTorch: no GPU here, so the CPU build: pip install $wanted --index-url $cpu_index (about 200 MB)"
    if try_pip_install "${from_cpu_index[@]}"; then
      return
    fi
    # give up an index only if it has nothing: a broken download must not turn into one of gigabytes. The second is what
    # pip says of an empty index if its settings name constraints for torch.
    grep -qE 'No matching distribution|ResolutionImpossible' "$venv/setup.log" || pip_failed "${from_cpu_index[@]}"
    say "that index cannot be reached; the default index gives a build with CUDA on most machines (about 3 GB)"
  fi
  say "PyTorch: pip install $wanted"
  pip_install "$wanted"
}

# the requirements of fastattn and of these extras, one a line
packages_of() {
  "$python" - "$1" <<'END'
import sys

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
print(*project["dependencies"], sep="\n")
for extra in filter(None, sys.argv[1].split(",")):
    print(*project["optional-dependencies"][extra], sep="\n")
END
}

# whether this PyTorch can use the GPU that nvidia-smi lists
say_what_torch_sees() {
  local line
  "$python" - <<'END' | while read -r line; do say "$line"; done
import warnings

import torch

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    seen = torch.cuda.is_available()
if seen:
    print("it sees", *(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())))
else:
    reason = " ".join(str(caught[0].message).split()) if caught else f"built for CUDA {torch.version.cuda}"
    reason = reason if torch.version.cuda else "it is a build without CUDA"
    print(f"nvidia-smi lists a GPU, but this PyTorch sees none: {reason}")
    print("all runs on the CPU; for the GPU update its driver, or remove the virtual environment and run this again")
    print("with FASTATTN_TORCH set to a build for your driver, as pytorch.org lists them")
END
}

if ! "$python" -m pip --version >/dev/null 2>&1; then
  if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
    die "$venv exists but is not a virtual environment: move it away, or set FASTATTN_VENV"
  fi
  rm -rf "$venv" # an interrupted setup, or its Python no longer exists
  make_venv
fi

if ! torch_version "$python" >/dev/null; then
  install_torch
fi
say "PyTorch $(torch_version "$python")"
if has_gpu; then
  say_what_torch_sees
fi

if [ "$extras" = --torch-only ]; then
  exit
fi

say "fastattn${extras:+[$extras]}: packages it needs, and its kernels"
pip_install "setuptools>=80" ninja "pybind11>=2.13"
export FASTATTN_NATIVE=${FASTATTN_NATIVE:-auto} # here fastattn runs without kernels, if they cannot be compiled
"$python" setup.py -q build_ext --inplace >"$venv/build.log" 2>&1 & # while pip is busy with the packages
compiling=$!
trap 'kill "$compiling" 2>/dev/null || true' EXIT
if [ "$FASTATTN_NATIVE" = auto ] && [ -z "${CXX:-}" ] && ! command -v g++ c++ clang++ >/dev/null; then
  say "no C++ compiler: everything runs, on plain PyTorch (Debian, Ubuntu: apt-get install g++, then this script again)"
fi
mapfile -t packages < <(packages_of "$extras")
# for CI, uv installs the many packages of the tests in a third of the time; it knows no settings of pip
if [ -z "${CI:-}" ] || ! try_pip_install uv || ! "$python" -m uv pip install --quiet --python "$python" "${packages[@]}"; then
  pip_install "${packages[@]}"
fi
wait "$compiling" || true # the installation compiles what is left, and says why it cannot
pip_install --no-build-isolation --no-deps -e .
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
