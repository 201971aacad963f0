"""Calls of all kernels, native ones too, are captured into CUDA graphs over the stand-in for the runtime.

It needs a CUDA build of PyTorch and a _cuda.so that is linked to the shared runtime (without_gpu.sh says how).
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

import fastattn

SUPPORT = pathlib.Path(__file__).parents[1] / "support"
LIBRARY = pathlib.Path(fastattn.__file__).with_name("_cuda.so")


def why_not():
    if torch.version.cuda is None:
        return "this PyTorch has no CUDA"
    if not LIBRARY.exists():
        return "_cuda.so was not built"
    if not all(map(shutil.which, ("gcc", "nm"))):
        return "no gcc or nm"
    needed = subprocess.run(["nm", "-D", "--undefined-only", LIBRARY], capture_output=True, text=True).stdout
    return None if "cudaLaunchKernel" in needed else "_cuda.so has a CUDA runtime of its own"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    command = [SUPPORT / "stand_in" / "without_gpu.sh", tmp_path_factory.mktemp("stand_in"), sys.executable, "-P"]
    environment = os.environ | {"PATH": path, "TRITON_INTERPRET": "0", "PYTHONPATH": str(LIBRARY.parents[1])}
    done = subprocess.run(
        [*command, SUPPORT / "captured_runtime.py"], env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_call_waits_or_allocates_outside_the_pool(report):
    calls = [row for row in report if not row[0].startswith("planted")]
    assert {backend for _, backend, *_ in calls} == {"native", "triton"}
    assert [row for row in calls if row[2] < 1 or row[3] or row[4]] == []


def test_a_wait_and_an_allocation_are_seen(report):
    assert [row[3] > 0 for row in report if row[0].startswith("planted")] == [True, True]
