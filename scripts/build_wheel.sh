#!/usr/bin/env bash
# Builds a wheel with the kernels for CPU and CUDA into dist/, and checks it. Needs a C++ compiler, but no GPU and no
# CUDA toolkit: without nvcc, pip downloads the compiler for the build.
#
# The wheel works with CPython 3.10 or newer and PyTorch 2.11 or newer, whatever the build used. Only fastattn._C, which
# is optional, is bound to the Python of the build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup_env.sh --torch-only
python=$(cd "${FASTATTN_VENV:-.venv}" && pwd)/bin/python
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

echo "[wheel] building"
FASTATTN_NATIVE=1 FASTATTN_CUDA=1 "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps -w "$scratch" .
wheel=$(echo "$scratch"/fastattn-*.whl)
case $wheel in
  *-py3-none-linux_*.whl) ;;
  *) echo "wheel: error: the tag must be py3-none-linux_*, got ${wheel##*/}" >&2 && exit 1 ;;
esac

echo "[wheel] contents"
"$python" -m zipfile -l "$wheel"

echo "[wheel] loading it in a new virtual environment that has only PyTorch"
"$python" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$wheel"
"$python" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' \
  >"$(echo "$scratch"/venv/lib/python3*/site-packages)/torch.pth"
cd "$scratch"
venv/bin/python -W ignore - <<'END'
import os

import torch

import fastattn
import fastattn._C
from fastattn import _native

package = os.path.dirname(_native.__file__)
assert package.startswith(os.getcwd()), package
info = _native.build_info()
assert not info["not_built"], info
assert sorted(info["built"]) == sorted(name for name in os.listdir(package) if name.endswith(".so")), info
assert fastattn.backends()["cpu"]["native"] == "available", fastattn.backends()
x, weight = torch.randn(4, 100), torch.randn(100)
torch.testing.assert_close(fastattn.layer_norm(x, weight), torch.nn.functional.layer_norm(x, (100,), weight))
torch.ops.fastattn.parallel_chunks()
if torch.version.cuda:
    torch.ops.load_library(os.path.join(package, "_cuda.so"))
print(f"[wheel] loads; CPU kernels: {_native.cpu_capability()}; CUDA:", fastattn.backends()["cuda"]["native"])
END
cd - >/dev/null

if "$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch-abi-audit >/dev/null 2>&1; then
  "$scratch/venv/bin/torch-abi-audit" fastattn
else
  echo "[wheel] torch-abi-audit cannot be installed: skipping this check"
fi
mkdir -p dist
mv "$wheel" dist/
echo "[wheel] dist/${wheel##*/}"
