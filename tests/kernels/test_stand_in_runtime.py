"""The stand-in for the CUDA runtime (tests/support/stand_in): what it does, and what it refuses as a device would."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

RUN = pathlib.Path(__file__).parents[1] / "support" / "stand_in" / "without_gpu.sh"
HEADERS = pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include", "cuda.h")

# error codes: 9 invalid configuration, 101 invalid device, 209 no code for the device, 900 in a capture
PROGRAM = """
import ctypes
from ctypes import byref, c_int, c_size_t, c_uint, c_void_p

cuda = ctypes.CDLL(None)  # found without a name, because it is loaded before
Dim = type("Dim", (ctypes.Structure,), {"_fields_": [(n, c_uint) for n in "xyz"]})
launch = lambda x, y=1, threads=32, shared=0: cuda.cudaLaunchKernel(
    None, Dim(x, y, 1), Dim(threads, 1, 1), None, c_size_t(shared), None)

count, value = c_int(), c_int()
cuda.cudaGetDeviceCount(byref(count))
cuda.cudaDeviceGetAttribute(byref(value), 75, 0)
assert (count.value, value.value, cuda.cudaSetDevice(2)) == (2, 12, 101)

memory, graph, mode = c_void_p(), c_void_p(), c_int(2)
assert cuda.cudaMalloc(byref(memory), c_size_t(8)) == 0
assert ctypes.string_at(memory, 8) == bytes(8)
cuda.cudaMemcpy(memory, b"fastattn", c_size_t(8), 1)
assert ctypes.string_at(memory, 8) == b"fastattn"

assert launch(5) == 0
assert [launch(0), launch(1, 65536), launch(1, threads=2048), launch(1, shared=10**6)] == [9] * 4
assert (cuda.cudaGetLastError(), cuda.cudaGetLastError()) == (9, 0)

cuda.cudaStreamBeginCapture(None, 0)
assert [launch(5), cuda.cudaMalloc(byref(memory), c_size_t(8)), cuda.cudaDeviceSynchronize()] == [0, 900, 900]
cuda.cudaThreadExchangeStreamCaptureMode(byref(mode))  # as torch does where it allocates for a graph
assert cuda.cudaMalloc(byref(memory), c_size_t(8)) == 0
cuda.cudaStreamEndCapture(None, byref(graph))
assert cuda.cudaDeviceSynchronize() == 0
"""


@pytest.mark.skipif(not HEADERS.exists(), reason="no headers of CUDA")
@pytest.mark.skipif(not all(map(shutil.which, ("gcc", "nm"))), reason="no gcc or nm")
def test_memory_launches_and_captures(tmp_path):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # the script asks `python` for its torch
    environment = os.environ | {"STAND_IN_ARCH": "120", "STAND_IN_GPUS": "2", "PATH": path}
    done = subprocess.run(
        [RUN, tmp_path / "made", sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
