"""Launches of the Triton kernels by Triton's own launcher, on a driver that records them: see stand_in/driver.c.

The launchers run on CPU tensors in place of GPU tensors, and Triton compiles for the architecture that the driver
states. Each kernel is launched twice. A launch must arrive with the grid, the threads, the shared memory and the bytes
of every parameter that the launcher passed; besides the launch, the second one must make no call of the driver
that a capture into a graph forbids. Nothing is computed. Tests run this file in a process of its own:

    python tests/support/launches.py '[{"arch": 90, "call": "norm", "arguments": {...}}, ...]'
"""

import ctypes
import json
import os
import struct
import subprocess
import sys
import tempfile

import compilations
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
MOST_PARAMETERS = 256
ALLOWED = {"cuLaunchKernelEx", "cuPointerGetAttribute", "cuCtxGetCurrent", "cuCtxSetCurrent", "cuDeviceGet",
           "cuDevicePrimaryCtxRetain", "cuStreamIsCapturing", "cuTensorMapEncodeTiled"}  # fmt: skip
_FORMATS = {"i1": "<b", "u1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u32": "<I", "u64": "<Q",
            "fp32": "<f", "fp64": "<d"}  # fmt: skip


class Record(ctypes.Structure):
    """The last launch, as driver.c keeps it."""

    _fields_ = [
        ("name", ctypes.c_char * 256),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("parameters", ctypes.c_uint64 * MOST_PARAMETERS),
    ]


def compiler():
    """The C compiler without a prefix such as ccache: Triton takes CC as the name of a program."""
    return next(word for word in reversed((os.environ.get("CC") or "gcc").split()) if not word.startswith("-"))


def build(folder):
    """Compile the driver as libcuda.so.1 in a folder."""
    from triton.backends import nvidia

    include = os.path.join(os.path.dirname(nvidia.__file__), "include")
    subprocess.run(
        [compiler(), "-O1", "-w", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1", "-o",
         f"{folder}/libcuda.so.1", f"{HERE}/stand_in/driver.c"], check=True,
    )  # fmt: skip


def run(cases, timeout=300):
    """Return the recorded launches of each case, from a separate process. Cases as in compilations.py."""
    with tempfile.TemporaryDirectory() as folder:
        build(folder)
        path = os.pathsep.join([compilations.ROOT, os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"LD_LIBRARY_PATH": folder, "TRITON_LIBCUDA_PATH": folder, "PYTHONPATH": path}
        environment["CC"] = compiler()
        environment.pop("TRITON_INTERPRET", None)
        found = []
        for arch in dict.fromkeys(case["arch"] for case in cases):
            mine = [case for case in cases if case["arch"] == arch]
            done = subprocess.run(
                [sys.executable, os.path.abspath(__file__), json.dumps(mine)], text=True, capture_output=True,
                env=environment | {"STAND_IN_ARCH": str(arch)}, timeout=timeout,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-4000:]
            found += json.loads(done.stdout.splitlines()[-1])
    return found


def leaves(value, kind):
    """Yield (argument, type) of what a kernel receives; constants are part of the binary."""
    if isinstance(kind, tuple):
        for part, part_kind in zip(value, kind, strict=True):
            yield from leaves(part, part_kind)
    elif kind.startswith("tensordesc"):  # the map itself, in which the driver that stands in writes the address
        yield value.base, "*map"
        yield from ((size, "i32") for size in value.shape)
        yield from ((stride, "i64") for stride in value.strides)
    elif kind != "constexpr":
        yield value, kind


def as_bytes(value, kind):
    if kind.startswith("*"):
        return struct.pack("<Q", value.data_ptr())
    return struct.pack(_FORMATS[kind], value)


class Recorder:
    """Stands in for JITFunction.run: launches twice and compares what arrived with what was passed."""

    def __init__(self, launch):
        self.launch = launch
        self.library = ctypes.CDLL("libcuda.so.1")
        self.library.stand_in_last.restype = ctypes.POINTER(Record)
        self.found = []

    def calls(self):
        text = ctypes.create_string_buffer(4096)
        self.library.stand_in_calls(text, len(text))
        return set(text.value.decode().split())

    def __call__(self, kernel, *args, grid, warmup, **constants):
        made = self.launch(kernel, *args, grid=grid, warmup=True, **constants)
        passed = list(kernel.signature.bind(*args, **{n: v for n, v in constants.items() if n in kernel.arg_names})
                      .arguments.items())  # fmt: skip
        expected = [as_bytes(*leaf) for name, value in passed for leaf in leaves(value, made.src.signature[name])]
        for _ in range(2):
            self.calls()
            before = self.library.stand_in_launches()
            self.library.stand_in_expect(len(expected))
            self.launch(kernel, *args, grid=grid, warmup=False, **constants)
            assert self.library.stand_in_launches() == before + 1, kernel.__name__
        calls = self.calls()
        arrived = self.library.stand_in_last().contents
        wrong = [i for i, data in enumerate(expected)
                 if arrived.parameters[i].to_bytes(8, "little")[: len(data)] != data]  # fmt: skip
        whole = (*grid, 1, 1)[:3]
        self.found.append({
            "kernel": kernel.__name__, "name": arrived.name.decode(), "grid": list(arrived.grid), "wanted": list(whole),
            "threads": arrived.block, "warps": made.metadata.num_warps, "shared": arrived.shared,
            "needed": made.metadata.shared, "parameters": len(expected), "wrong": wrong,
            "scratch": made.metadata.global_scratch_size, "forbidden": sorted(calls - ALLOWED),
            "maps": "cuTensorMapEncodeTiled" in calls,
        })  # fmt: skip


def launched(case):
    """Return the case with what its launches were."""
    from triton.runtime.jit import JITFunction

    recorder = Recorder(JITFunction.run)
    JITFunction.run = lambda kernel, *args, **options: recorder(kernel, *args, **options)
    try:
        compilations.CALLS[case["call"]](**case["arguments"])
    finally:
        JITFunction.run = recorder.launch
    return {**case, "launches": recorder.found}


def main(cases):
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    compilations.pretend(cases[0]["arch"])
    driver = CudaDriver()
    driver.get_device_capability = lambda device: divmod(cases[0]["arch"], 10)
    driver.get_current_device, driver.get_current_stream = lambda: 0, lambda device: 0
    triton.runtime.driver.set_active(driver)
    compilations.kernels("common")._scratch = lambda size, alignment, stream: torch.empty(size, dtype=torch.int8)
    print(json.dumps([launched(case) for case in cases]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
