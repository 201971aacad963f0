"""What the CUDA compiler made of csrc/cuda: registers, spills, wide loads and stores, and dependencies of _cuda.so.

The numbers are read from the logs of ptxas and the objects that `python setup.py build_ext --inplace` leaves in build/.
"""

import collections
import ctypes
import glob
import os
import re
import shutil
import struct
import subprocess

import pytest
import torch

import fastattn

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LIBRARY = os.path.join(os.path.dirname(fastattn.__file__), "_cuda.so")

# kernel -> the registers a thread may use; the launchers rely on it to fill a multiprocessor
CEILINGS = {
    "norm_fwd_kernel<1>": 40,
    "norm_fwd_kernel<2>": 64,
    "norm_fwd_kernel<4>": 128,
    "norm_fwd_wide_kernel": 64,
    "norm_bwd_kernel<1>": 80,
    "norm_bwd_kernel<2>": 128,
    "norm_bwd_wide_kernel": 96,
    "norm_bwd_strip_kernel": 64,
    "norm_bwd_columns_kernel": 32,
    "dropout_kernel": 64,
    "activation_fwd_kernel": 32,
    "activation_fwd_kernel<gated>": 40,
    "activation_bwd_kernel": 64,
    "activation_bwd_kernel<gated>": 80,
    "activation_dbias_kernel": 32,
    "rotary_kernel": 128,
}
OURS = ("norm", "norm_bwd", "dropout", "feed_forward", "rotary")  # the .cu files in this table


def built(pattern):
    paths = [p for name in OURS for p in glob.glob(os.path.join(ROOT, f"build/temp*/csrc/cuda/{name}.{pattern}"))]
    if not paths:
        pytest.skip("the CUDA kernels were not built in this checkout (python setup.py build_ext --inplace, with nvcc)")
    return paths


def kernel_name(mangled):
    """The kernel of a mangled name, with the number of groups per thread or "gated" if a template argument says so."""
    name = next(n for n in sorted(CEILINGS, key=len, reverse=True) if n.partition("<")[0] in mangled)
    base = name.partition("<")[0]
    if not any(n.startswith(f"{base}<") for n in CEILINGS):
        return base
    argument = re.search(rf"{base}I.*L(?:i(\d)|b1)E", mangled)
    return f"{base}<{argument.group(1) or 'gated'}>" if argument else base


def entries():
    pattern = re.compile(
        r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores,"
        r" (\d+) bytes spill loads.*?Used (\d+) registers",
        re.S,
    )
    for path in built("o.log"):
        with open(path, encoding="utf-8") as file:
            for mangled, arch, *numbers in pattern.findall(file.read()):
                yield (kernel_name(mangled), arch, *map(int, numbers))


def test_no_kernel_spills_and_registers_stay_below_their_ceiling():
    worst = collections.defaultdict(int)
    for name, arch, stack, stores, loads, registers in entries():
        assert (stack, stores, loads) == (0, 0, 0), f"{name} {arch}: {stack} bytes of stack, {stores} spilled"
        worst[name] = max(worst[name], registers)
    assert set(worst) == set(CEILINGS)
    over = {name: (used, CEILINGS[name]) for name, used in worst.items() if used > CEILINGS[name]}
    assert not over, f"registers used, allowed: {over}"


def cuobjdump():
    triton = pytest.importorskip("triton.backends.nvidia", reason="Triton, whose wheel has cuobjdump, is not installed")
    path = os.path.join(os.path.dirname(triton.__file__), "bin", "cuobjdump")
    return path if os.path.exists(path) else shutil.which("cuobjdump") or pytest.skip("no cuobjdump")


def accesses(file):
    """For each kernel on sm_90a: its name, plain and mangled, 16-byte accesses by instruction, 8- and 16-bit ones."""
    objects = [path for path in built("o") if path.endswith(f"/{file}.o")]
    done = subprocess.run([cuobjdump(), "-sass", "-arch", "sm_90a", *objects], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for function in done.stdout.split("Function : ")[1:]:
        mangled = function.split(maxsplit=1)[0]
        code = re.findall(r"\b(LDG|STG)\.E((?:\.\w+)*)", function)
        wide = collections.Counter(op for op, suffix in code if ".128" in suffix)
        yield (
            kernel_name(mangled),
            mangled,
            wide,
            [op + suffix for op, suffix in code if re.search(r"\.[US](8|16)\b", suffix)],
        )


def test_held_rows_are_loaded_and_stored_16_bytes_at_a_time():
    seen = 0
    for name, mangled, wide, narrow in (*accesses("norm"), *accesses("norm_bwd")):
        if not name.startswith(("norm_fwd_kernel", "norm_bwd_kernel")) or "Dynamic" in mangled:
            continue
        seen += 1
        # x, residual, weight and bias in three dtypes; y and r
        assert wide["LDG"] >= 4, f"{mangled}: {wide['LDG']} wide loads"
        assert wide["STG"] >= 2, f"{mangled}: {wide['STG']} wide stores"
        assert not narrow, f"{mangled}: {narrow}"
    assert seen == 25  # 5 pairs of dtypes, 3 widths forward and 2 backward


def test_activation_passes_load_and_store_16_bytes_at_a_time_where_rows_are_aligned():
    # inputs and outputs of the four kernels; an aligned group is one access in half precision, two in float
    expected = {"fwd_kernel": (1, 1), "fwd_kernel<gated>": (2, 1), "bwd_kernel": (2, 2), "bwd_kernel<gated>": (3, 3)}
    seen = collections.Counter()
    for name, mangled, wide, _ in accesses("feed_forward"):
        if name == "activation_dbias_kernel":
            continue
        loads, stores = expected[name.removeprefix("activation_")]
        accesses_per_group = 2 if f"{name.partition('<')[0]}If" in mangled else 1
        assert wide["LDG"] >= loads * accesses_per_group, f"{mangled}: {wide['LDG']} wide loads"
        assert wide["STG"] >= stores * accesses_per_group, f"{mangled}: {wide['STG']} wide stores"
        seen[name] += 1
    assert set(seen.values()) == {15}  # 3 dtypes, 5 activations


def needed_libraries(path):
    """DT_NEEDED of a 64-bit little-endian ELF file."""
    with open(path, "rb") as file:
        data = file.read()
    header_offset, header_size, header_count = (
        struct.unpack_from("<Q", data, 40)[0],
        struct.unpack_from("<H", data, 58)[0],
        struct.unpack_from("<H", data, 60)[0],
    )
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, header_offset + i * header_size) for i in range(header_count)]
    dynamic = next(s for s in sections if s[1] == 6)
    strings = sections[dynamic[6]][4]
    tags = [struct.unpack_from("<qQ", data, dynamic[4] + i) for i in range(0, dynamic[5], 16)]
    return [data[strings + v : data.index(b"\0", strings + v)].decode() for tag, v in tags if tag == 1]


def test_cuda_library_needs_torch_but_no_cuda_runtime():
    if not os.path.exists(LIBRARY):
        pytest.skip("_cuda.so was not built")
    needed = needed_libraries(LIBRARY)
    assert "libtorch_cuda.so" in needed
    assert not [name for name in needed if name.startswith(("libcudart", "libcuda.", "libc10", "libpython"))]


def test_every_symbol_of_the_cuda_library_is_in_this_pytorch():
    """It needs a CUDA build of PyTorch, but no GPU."""
    if not os.path.exists(LIBRARY) or torch.version.cuda is None:
        pytest.skip("_cuda.so was not built, or this PyTorch has no CUDA")
    ctypes.CDLL(LIBRARY, mode=os.RTLD_NOW)
    for name in ("norm_fwd", "attention_fwd", "attention_decode_fwd", "rotary_fwd", "activation_fwd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastattn::{name}.native", "CUDA"), name


def test_rotary_loads_and_stores_16_bytes_at_a_time_where_rows_are_aligned():
    seen = 0
    for _, mangled, wide, _ in accesses("rotary"):
        seen += 1
        assert wide["LDG"] >= 2, f"{mangled}: {wide['LDG']} wide loads"
        assert wide["STG"] >= 2, f"{mangled}: {wide['STG']} wide stores"
    assert seen == 20  # 5 pairs of dtypes, interleaved or not, one number or two for a pair of channels
