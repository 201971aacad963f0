#!/usr/bin/env bash
# Installs a wheel and a version of PyTorch into a new virtual environment, and calls every op there.
#
#   scripts/check_wheel.sh WHEEL                      with the PyTorch of scripts/setup_env.sh
#   scripts/check_wheel.sh WHEEL PYTHON TORCH...      e.g. dist/fastattn-*.whl python3.12 torch==2.11.0
#
# TORCH are the arguments of pip install for PyTorch.
set -euo pipefail
wheel=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${FASTATTN_VENV:-.venv}
python=${2:-$venv/bin/python}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch/venv"
fresh=$scratch/venv/bin/python
if [ $# -gt 2 ]; then
  "$fresh" -m pip install --quiet --disable-pip-version-check "${@:3}" numpy
else
  "$python" -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
    >"$(echo "$scratch"/venv/lib/python3*/site-packages)/torch.pth"
fi
"$fresh" -m pip install --quiet --disable-pip-version-check --no-deps "$wheel"
cp scripts/check_wheel.py "$scratch"
cd "$scratch"
LD_BIND_NOW=1 "$fresh" -W ignore check_wheel.py
