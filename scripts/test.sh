#!/usr/bin/env bash
# Sets everything up and runs all tests that this machine can run; a test that is skipped says why.
#
#   scripts/test.sh [PYTEST_OPTIONS ...]   e.g. -k norm -x
#
# The environment variables of scripts/setup_env.sh hold here too. FASTATTN_REQUIRE (e.g. native,triton) names the
# backends whose absence is a failure; by default those that were built.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup_env.sh train,eval,test
pytest=("${FASTATTN_VENV:-.venv}/bin/python" -m pytest)
status=0

check() {
  printf '\n$ %s\n' "$*"
  "$@" || { local code=$?; [ "$status" -ne 0 ] || status=$code; }
}

if [ -z "${FASTATTN_REQUIRE+set}" ] && [ -e fastattn/_cpu.so ]; then
  export FASTATTN_REQUIRE=native
fi
check "${pytest[@]}" "$@"
# Triton decides when it is imported whether it interprets, so its kernels are tested in a process of their own
check env TRITON_INTERPRET=1 "${pytest[@]}" -m interpreter "$@"
if [ -n "${CI:-}" ]; then
  check "${pytest[@]}" benchmarks --benchmark-disable
fi
exit "$status"
