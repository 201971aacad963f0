#!/usr/bin/env bash
# Runs all checks that need an NVIDIA GPU, without a network. Those that show most per minute come first.
#
#   scripts/gpu_check.sh [--force] [PART ...]      all parts but the last by default, the most important first:
#     info       versions, device, available backends, and why the others are unavailable
#     first      one call of each family of kernels, forward and backward, against PyTorch: about two minutes
#     rows       memcheck of Triton's attention for every row of its table, head dim 32 first
#     hopper     compute capability 9.0: the building blocks of the attention kernels, those kernels, and memcheck of
#                some of their calls; the results of racecheck are printed but do not fail the part
#     tests      streams, graphs, sizes beyond 32 bits, and the results of the ops on CUDA
#     forward    the speed of attention against PyTorch's backends, FlexAttention and Triton
#     backward   the same for the gradients
#     decode     the same on a cache
#     bench      norm against PyTorch
#     sanitizer  memcheck, racecheck, initcheck and synccheck on small cases
#     tune       tries launches of attention and rewrites kernels/attention_table.py. If it reaches the limit, run it
#                again: it keeps its times
#
# Wheels in dist/ are used if present (scripts/build_wheel.sh builds ours without a GPU; those of pytest and
# pytest-benchmark may be there too). Otherwise the kernels are built here, which needs nvcc, ninja and pybind11. Each
# part takes at most nine minutes, or LIMIT seconds. A part that passed is not run again without --force. Results, one
# JSON and one log per part, go to $OUT if set, else to benchmarks/results/gpu, and all of them into gpu_check.tar.gz
# there, the one file to send. PYTHON names the interpreter. scripts/README.md says what to type on a rented machine.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
python=${PYTHON:-python3}
results=${OUT:-$root/benchmarks/results/gpu}
site=${TMPDIR:-/tmp}/fastattn_gpu_check
limit=${LIMIT:-540}
force=
all=(info first rows hopper tests forward backward decode bench sanitizer)
parts=()
for argument in "$@"; do
  case $argument in
    --force) force=1 ;;
    info | first | rows | hopper | tests | forward | backward | decode | bench | sanitizer | tune) parts+=("$argument") ;;
    *) echo "gpu_check: there is no part '$argument'; the parts are ${all[*]} tune, and the only option is --force" >&2 && exit 2 ;;
  esac
done
[ ${#parts[@]} -gt 0 ] || parts=("${all[@]}")
mkdir -p "$results"

wheels=(dist/*.whl)
if [ -e "${wheels[0]}" ]; then
  "$python" -m pip install --quiet --no-deps --no-index --no-compile --upgrade --target "$site" "${wheels[@]}" || exit 1
  export PYTHONPATH=$site
else
  "$python" setup.py -q build_ext --inplace || exit 1
  export PYTHONPATH=$root
fi
export FASTATTN_REQUIRE=native,triton
# in an unpacked archive, not even the commit of a repository around it
commit=$(GIT_CEILING_DIRECTORIES=$(dirname "$root") git rev-parse --short HEAD 2>/dev/null || cat scripts/commit)
status=0

# run_part NAME COMMAND...: writes the log and the JSON of a part
run_part() {
  local name=$1 code started=$SECONDS
  shift
  timeout "$limit" "$@" 2>&1 | tee "$results/$name.log"
  code=${PIPESTATUS[0]}
  "$python" -P - "$results/$name.json" "$name" "$code" $((SECONDS - started)) "$commit" <<'END'
import json
import sys

import torch

path, part, code, seconds, commit = sys.argv[1:]
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
facts = {"part": part, "exit_code": int(code), "seconds": int(seconds), "commit": commit, "gpu": gpu}
with open(path, "w", encoding="utf-8") as file:
    json.dump(facts | {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}, file)
END
  echo "gpu_check: $name ended with $code after $((SECONDS - started)) s"
  [ "$code" -eq 0 ] || status=1
}

info() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader &&
    "$python" -P -c 'import fastattn; from fastattn._info import report; print(report())' &&
    "$python" -P -c '
import fastattn, torch
assert torch.cuda.is_available(), "torch sees no CUDA device"
for name in ("native", "triton"):
    reason = fastattn.backends()["cuda"][name]
    assert reason == "available", f"{name}: {reason}"
x = torch.randn(1000, 1024, device="cuda")
for name in ("native", "triton"):
    torch.testing.assert_close(fastattn.layer_norm(x, backend=name), torch.nn.functional.layer_norm(x, (1024,)))
    print(name, "computes layer_norm")
'
}

first() {
  "$python" -P tests/gpu/first.py
}

# A row that reads or writes out of bounds would disturb everything after it.
rows() {
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed" && return 1; }
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  timeout 520 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -P tests/gpu/first.py --rows || return 1
}

sanitizer() {
  local tool code=0
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed" && return 1; }
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck initcheck synccheck; do
    echo "[$tool]"
    timeout 130 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -P -m pytest -q -p no:cacheprovider tests/kernels/test_norm_kernels.py \
      -k "test_widths and (17-64 or 5-100 or 6-768 or 2-2056) or test_dropout_keeps and 5-100" || code=1
  done
  return $code
}

# Tests that could deadlock get their own process and time limit.
hopper() {
  local capability code=0
  capability=$("$python" -P -c 'import torch; print(*torch.cuda.get_device_capability())')
  [ "$capability" = "9 0" ] || { echo "compute capability $capability: these kernels are for 9 0" && return 0; }
  local pytest=("$python" -P -m pytest -q -x -p no:cacheprovider)
  timeout 120 "${pytest[@]}" tests/kernels/test_sm90_units.py || return 1
  for name in exponentials lengths stages random forward_only packed columns hidden nothing far_behind strides empty same_bits \
    deterministic backward_after raw nan_in gradients; do
    echo "[$name]"
    timeout 60 "${pytest[@]}" tests/kernels/test_attention_sm90.py -k "$name" || code=1
  done
  for name in random equal_scores every_query stages split_counts strides empty raw; do
    echo "[decode $name]"
    timeout 60 "${pytest[@]}" tests/kernels/test_attention_decode_sm90.py -k "$name" || code=1
  done
  [ $code -eq 0 ] || return 1
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed" && return 1; }
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    echo "[$tool]"
    timeout 100 compute-sanitizer --tool "$tool" --error-exitcode 9 "${pytest[@]}" tests/kernels/test_attention_sm90.py \
      tests/kernels/test_attention_decode_sm90.py -k "lengths or nothing or forward_only and 256 or split_counts" && continue
    if [ "$tool" = racecheck ]; then
      echo "racecheck did not pass. This does not fail the part: racecheck can report a race where an mbarrier orders a copy."
    else
      code=1
    fi
  done
  return $code
}

# It ends by a signal that lets it note what it was doing.
tune() {
  timeout -s INT 520 "$python" -P scripts/tune_attention.py --resume "$results/tune_attention.json"
}
export -f info first rows sanitizer hopper tune
export python results

for part in "${parts[@]}"; do
  if [ -z "$force" ] && grep -qs '"exit_code": 0' "$results/$part.json" && grep -qs "\"$commit\"" "$results/$part.json"
  then
    echo "gpu_check: $part has already passed"
    continue
  fi
  case $part in
    tests)
      run_part tests "$python" -P -m pytest -q -p no:cacheprovider tests/kernels/test_gpu.py tests/kernels/test_*_kernels.py \
        tests/ops/test_norm.py tests/ops/test_dropout.py tests/ops/test_attention_decode.py::test_random_calls_triton -k "not cpu"
      ;;
    forward | backward)
      run_part "$part" "$python" -P -m pytest -q -s -p no:cacheprovider benchmarks/test_attention_gpu.py \
        -k "${part:0:1}wd" --benchmark-json "$results/bench_attention_$part.json"
      ;;
    decode)
      run_part decode "$python" -P -m pytest -q -s -p no:cacheprovider benchmarks/test_attention_decode.py \
        --benchmark-json "$results/bench_attention_decode.json"
      ;;
    bench)
      run_part bench "$python" -P -m pytest -q -p no:cacheprovider benchmarks/test_norm.py \
        --benchmark-json "$results/bench_norm.json"
      ;;
    *) run_part "$part" bash -c "$part" ;;
  esac
done
rm -f "$results/gpu_check.tar.gz"
(cd "$results" && tar -czf gpu_check.tar.gz -- *.json *.log 2>/dev/null) && echo "gpu_check: send $results/gpu_check.tar.gz"
exit $status
