"""sm90_units.cu as a library: compiled by nvcc for a GPU, or as C++ for the emulation."""

import os
import shutil
import subprocess

import emulate_cuda
import pytest


def on_hardware():
    """The units compiled by nvcc; skips if that is not possible."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.path.exists(nvcc):
        pytest.skip("no nvcc to compile the units with")
    library = os.path.join(emulate_cuda.ROOT, f"build/sm90_units.{os.getpid()}.so")
    os.makedirs(os.path.dirname(library), exist_ok=True)
    command = [nvcc, "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-o", library]
    command += ["-gencode=arch=compute_90a,code=sm_90a", f"-I{emulate_cuda.ROOT}/csrc"]
    done = subprocess.run(
        [*command, f"{emulate_cuda.ROOT}/tests/support/sm90_units.cu"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return library


def emulated(*flags):
    reason = emulate_cuda.why_not_available()
    if reason:
        pytest.skip(reason)
    return emulate_cuda.compile_library(emulate_cuda.rewritten("tests/support/sm90_units.cu"), flags, with_torch=False)
