#!/usr/bin/env bash
# Sets up the environment, trains a small language model on text that ships with Python, and prints a sample.
#
#   scripts/demo.sh [--steps N ...]        options of `fastattn train`
#
# The environment variables of scripts/setup_env.sh apply here too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=runs/demo

if ! nvidia-smi -L >/dev/null 2>&1 && [ ! -e fastattn/_cuda.so ]; then
  export FASTATTN_CUDA=${FASTATTN_CUDA:-0} # the demo does not run the CUDA kernels
fi
scripts/setup_env.sh train
fastattn() {
  printf '\n$ fastattn' && printf ' %q' "$@" && echo
  "${FASTATTN_VENV:-.venv}/bin/fastattn" "$@"
}
fastattn train --config recipes/char_lm.yaml "$@" --run "$run" --overwrite
fastattn evaluate "$run"
fastattn generate "$run" --prompt "The "
printf '\nThe run is in %s: loss curve, checkpoints, report. More text: %s/bin/fastattn generate %s --prompt "A list"\n' \
  "$run" "${FASTATTN_VENV:-.venv}" "$run"
