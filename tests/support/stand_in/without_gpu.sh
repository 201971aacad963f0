#!/usr/bin/env bash
# Runs a command as if there were a GPU whose launches do nothing (runtime.c):
#
#   tests/support/stand_in/without_gpu.sh FOLDER COMMAND...
#
# FOLDER receives the library; a folder that has one is used as it is. It needs gcc and the headers of CUDA in CUDA_HOME
# (default /usr/local/cuda), and serves the torch of the `python` on PATH, a CUDA build. Our own _cuda.so must be linked
# to the shared runtime, so build it in a copy whose setup.py says -lcudart in place of
# "-lcudart_static -lrt -lpthread -ldl". Run pytest with --assert=plain: printing a tensor can take all memory, because
# PyTorch takes sizes from the device then.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
if [ ! -e "$folder/libcuda.so.1" ]; then
  gcc -O1 -w -fPIC -I"${CUDA_HOME:-/usr/local/cuda}/include" -c "$here/runtime.c" -o "$folder/runtime.o"
  torch=$(python -c 'import importlib.util as u; print(*u.find_spec("torch").submodule_search_locations)')
  nm --defined-only "$folder/runtime.o" | awk '$2 == "T" {print $3}' | sort >"$folder/made"
  for library in "$torch"/lib/lib{c10_cuda,torch_cuda,torch_python,torch_cpu,caffe2_nvrtc,torch_nvshmem}.so; do
    [ ! -e "$library" ] || nm -D --undefined-only "$library"
  done | sed 's/@.*//' | awk '$2 ~ /^(cuda|cu[A-Z]|cublas|nccl)/ {print $2}' | sort -u >"$folder/wanted"
  comm -13 "$folder/made" "$folder/wanted" | sed 's/.*/int &(void) { return 0; }/' >"$folder/stubs.c"
  gcc -O1 -w -shared -fPIC -Wl,-soname,libcuda.so.1 "$folder/runtime.o" "$folder/stubs.c" -ldl -o "$folder/new"
  mv "$folder/new" "$folder/libcuda.so.1"
fi
exec env LD_PRELOAD="$folder/libcuda.so.1" LD_LIBRARY_PATH="$folder:${LD_LIBRARY_PATH:-}" \
  TRITON_LIBCUDA_PATH="$folder" CC=gcc CXX=g++ "$@"
