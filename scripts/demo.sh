#!/usr/bin/env bash
# Sets everything up, trains a small language model on text that ships with Python, and lets it write.
#
#   scripts/demo.sh [--steps N ...]        options of `fastattn train`
#
# The environment variables of scripts/setup_env.sh hold here too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=runs/demo

if ! nvidia-smi -L >/dev/null 2>&1 && [ ! -e fastattn/_cuda.so ]; then
  export FASTATTN_CUDA=${FASTATTN_CUDA:-0} # nothing here would run the CUDA kernels
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
