"""DTensors in two processes of gloo: outputs and gradients equal those of one process. Cases: dtensor_*_cases.py."""

import json
import os

import dtensor_layer_cases  # noqa: F401  registers its cases
import dtensor_op_cases  # noqa: F401
import pytest
import torch
from dtensor_cases import CASES
from processes import run_code

gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
pytestmark = pytest.mark.skipif(not (gloo and hasattr(os, "fork")), reason="needs a system that can fork, and gloo")


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """The failures of each process, by case."""
    results = tmp_path_factory.mktemp("dtensor") / "failures"
    code = "import sys, dtensor_cases, dtensor_op_cases, dtensor_layer_cases; dtensor_cases.main(sys.argv[1])"
    run_code(code, str(results), TRITON_INTERPRET="0", OMP_NUM_THREADS="1")
    return [json.loads(results.with_suffix(f".{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_compute_what_one_does(failures, name):
    if failures[0].get(name, "").startswith("skip: "):
        pytest.skip(failures[0][name])
    found = [f"process {rank}:\n{failed[name]}" for rank, failed in enumerate(failures) if name in failed]
    assert not found, "\n".join(found)
