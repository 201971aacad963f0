#!/usr/bin/env bash
# Sets everything up and runs all tests that this machine can run; a test that is skipped says why.
#
#   scripts/test.sh [PYTEST_OPTIONS ...]   e.g. -k norm -x
#
# Without a GPU the Triton kernels run in Triton's interpreter. The environment variables of scripts/setup_env.sh hold
# here too; FASTATTN_REQUIRE (e.g. native,triton) names backends whose absence is a failure, by default the compiled one
# if it was built. With CI set the benchmarks run too, once each and without timing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup_env.sh train,eval,words,test
pytest=("${FASTATTN_VENV:-.venv}/bin/python" -m pytest)
status=0

check() {
  printf '\n$ %s\n' "$*"
  "$@" || { local code=$?; [ "$status" -ne 0 ] || status=$code; }
}

if [ -z "${FASTATTN_REQUIRE+set}" ] && [ -e fastattn/_cpu.so ]; then
  export FASTATTN_REQUIRE=native
fi
# a file stays on one worker, so that what its tests share is made once
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tests of several threads ask for them
parallel=(-n "$(getconf _NPROCESSORS_ONLN)" --dist loadfile)
check "${pytest[@]}" "${parallel[@]}" "$@"
if [ -n "${CI:-}" ]; then
  check "${pytest[@]}" benchmarks --benchmark-disable "${parallel[@]}"
fi
exit "$status"
