"""Every op and every layer with fake tensors on "cuda": called, compiled and exported, forward and backward.

tests/support/traced.py runs the cases: those of tests/gpu/first.py, and one for each layer.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import traced

from fastattn import nn


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if torch.version.cuda is None and shutil.which("g++") is None:
        pytest.skip("no g++ for the guard of a device that PyTorch was built without")
    if torch.version.cuda is not None and not torch.cuda.is_available():
        pytest.skip("autograd of this PyTorch asks the GPU: it needs one, or tests/support/stand_in/without_gpu.sh")
    script = pathlib.Path(traced.__file__)
    environment = os.environ | {"PYTHONPATH": f"{traced.ROOT}:{script.parent}"}
    done = subprocess.run(
        [sys.executable, script, tmp_path_factory.mktemp("guard")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_op_and_layer_has_a_case(found):
    assert found["uncalled"] == []
    assert set(traced.LAYERS) == set(nn.__all__)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_every_raw_op_with_a_kernel_for_cuda_is_reached(backend, found):
    assert found[f"unreached {backend}"] == []


@pytest.mark.parametrize("name", [*traced.CALLS, *traced.LAYERS])
@pytest.mark.parametrize(("how", "backend"), traced.RUNS)
def test_forward_and_backward(name, how, backend, found):
    assert found[f"{how} {backend} {name}"] == ""
