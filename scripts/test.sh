#!/usr/bin/env bash
# Sets up the environment and runs all tests that this machine can run; a skipped test says why.
#
#   scripts/test.sh [PYTEST_OPTIONS ...]   e.g. -k norm -x
#
# Without a GPU, the Triton kernels run in Triton's interpreter. The environment variables of scripts/setup_env.sh apply
# here too. FASTATTN_REQUIRE (e.g. native,triton) names backends that must be available; the default is the compiled one
# if it was built. With CI set, the benchmarks also run, once each and without timing. FASTATTN_SET_UP=1: the environment
# is ready.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${FASTATTN_SET_UP:-}" ]; then
  scripts/setup_env.sh train,eval,words,test
fi
unset PYTHONDONTWRITEBYTECODE # or each of hundreds of processes compiles the files of PyTorch again
pytest=("${FASTATTN_VENV:-.venv}/bin/python" -m pytest)
status=0

check() {
  printf '\n$ %s\n' "$*"
  "$@" || { local code=$?; [ "$status" -ne 0 ] || status=$code; }
}

if [ -z "${FASTATTN_REQUIRE+set}" ] && [ -e fastattn/_cpu.so ]; then
  export FASTATTN_REQUIRE=native
fi
# Each file stays on one worker, so that its tests share their fixtures. The files keep their order: sorted by their
# number of tests, long files of one test would come last, and one worker would wait for the other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tests that need several threads set this themselves
parallel=(-n "$(getconf _NPROCESSORS_ONLN)" --dist loadfile --no-loadscope-reorder --max-worker-restart 0)
check "${pytest[@]}" "${parallel[@]}" "$@"
if [ -n "${CI:-}" ]; then
  check "${pytest[@]}" benchmarks --benchmark-disable "${parallel[@]}"
fi
exit "$status"
