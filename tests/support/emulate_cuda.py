"""The CUDA kernels and their wrappers as CPU ops, to test what they compute where there is no GPU.

The sources in csrc/cuda are compiled by the C++ compiler against emulate_cuda.h. Only the launch syntax, the dispatch
key and the stream are rewritten; CUDA's headers are needed for its types.
"""

import ctypes
import functools
import glob
import hashlib
import os
import pathlib
import re
import shutil
import subprocess

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# per library: the sources, compiled as one translation unit, and the ops they register
_ROWS = ("norm", "dropout", "feed_forward", "rotary")
ROWS = (
    ("error.cu", "norm_bwd.cu", *(f"{name}{end}" for end in (".cu", "_ops.cpp") for name in _ROWS)),
    (
        "norm_infer",
        "norm_fwd",
        "norm_bwd",
        "dropout_fwd",
        "activation_fwd",
        "activation_bwd",
        "rotary_fwd",
        "rotary_fwd_",
    ),
)
ATTENTION = (
    (
        "attention_fwd_sm90.cu",
        "attention_bwd_passes_sm90.cu",
        "attention_dkdv_sm90.cu",
        "attention_dq_sm90.cu",
        "error.cu",
        "attention_ops.cpp",
    ),
    ("attention_fwd", "attention_bwd"),
)
DECODE = (
    ("attention_decode_sm90.cu", "attention_decode_passes_sm90.cu", "error.cu", "attention_decode_ops.cpp"),
    ("attention_decode_fwd", "attention_decode_append"),
)
_REWRITES = (
    (r"(\w+(?:<[^;<>]*(?:\([^()]*\))?[^;<>]*>)?)\s*<<<(.*?)>>>\s*\(", r"emulated::launch(\1, \2)("),
    (
        r"extern __shared__ (?:__align__\(\d+\) )?(float|unsigned char) (\w+)\[\];",
        r"\1* \2 = reinterpret_cast<\1*>(emulated::dynamic_shared);",
    ),
    (r"STABLE_TORCH_LIBRARY_IMPL\(fastattn, CUDA", "STABLE_TORCH_LIBRARY_IMPL(fastattn_emulated, CPU"),
)
_PRELUDE = """
#define USE_CUDA 1
#define FASTATTN_HAS_SM90
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include "emulate_cuda.h"
#define aoti_torch_get_current_cuda_stream(device, stream) (*(stream) = nullptr, 0)
namespace emulated { struct NoGuard { explicit NoGuard(int) {} }; }
#define DeviceGuard NoGuard
namespace torch::stable::accelerator { using emulated::NoGuard; }
"""

_definitions = []


def cuda_headers():
    """The include directory of a CUDA toolkit, or None."""
    nvcc = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and os.path.dirname(os.path.dirname(nvcc))]
    found = [os.path.join(r, "include") for r in roots if r and os.path.exists(f"{r}/include/cuda_bf16.h")]
    return found[0] if found else None


def why_not_available():
    """Why the kernels cannot be emulated here, or None."""
    if shutil.which("g++") is None:
        return "no g++"
    return None if cuda_headers() else "no CUDA headers"


def rewritten(path):
    """Rewrite the source of a .cu file or a wrapper as C++ for emulate_cuda.h."""
    text = pathlib.Path(ROOT, path).read_text(encoding="utf-8")
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text, flags=re.S)
    return f'#line 1 "{path}"\n{text}'


def compile_library(source, flags=(), with_torch=True):
    """Compile C++ with emulate_cuda.h, once per content; return the path of the library in build/."""
    headers = [
        *glob.glob(os.path.join(ROOT, "csrc/**/*.*h"), recursive=True),
        *glob.glob(os.path.join(ROOT, "tests/support/emulate_cuda.*")),
        os.path.join(ROOT, "tests/support/sm90_indices.h"),
        *glob.glob(os.path.join(ROOT, "tests/support/emulated/**/*.cuh"), recursive=True),
    ]
    parts = [
        source.encode(),
        " ".join(flags).encode(),
        torch.__version__.encode(),
        *(pathlib.Path(path).read_bytes() for path in sorted(headers)),
    ]
    digest = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    build = os.path.join(ROOT, "build")
    library = os.path.join(build, f"emulated_{digest}.so")
    if not os.path.exists(library):
        os.makedirs(build, exist_ok=True)
        command = ["g++", "-x", "c++", "-", "-o", f"{library}.{os.getpid()}", "-shared", "-fPIC", "-std=c++20", "-O1"]
        command += ["-fvisibility=hidden", "-w", "-DTORCH_TARGET_VERSION=0x020b000000000000", *flags]
        command += [f"-I{ROOT}/{folder}" for folder in ("tests/support/emulated", "csrc", "csrc/cuda", "tests/support")]
        command += ["-isystem", cuda_headers()]
        if with_torch:
            torch_dir = os.path.dirname(torch.__file__)
            command += ["-isystem", f"{torch_dir}/include"]
            command += [f"-L{torch_dir}/lib", "-Wl,--no-as-needed", "-ltorch_cpu"]
        done = subprocess.run(command, input=source, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr[-6000:]
        os.replace(f"{library}.{os.getpid()}", library)
    return library


@functools.cache
def load(sources_and_ops=ROWS):
    """Compile, load and return the ops: the namespace torch.ops.fastattn_emulated."""
    import fastattn  # noqa: F401  (its schemas are copied)

    sources, ops = sources_and_ops
    # the emulated matrix products run long enough to pay for the optimisation; the passes over rows do not
    flags = () if sources_and_ops is ROWS else ("-O2",)
    library = compile_library(_PRELUDE + "".join(rewritten(f"csrc/cuda/{name}") for name in sources), flags)
    definitions = torch.library.Library("fastattn_emulated", "FRAGMENT")
    for op in ops:
        schema = str(getattr(torch.ops.fastattn, op).native._schema)
        definitions.define(schema.removeprefix("fastattn::"))
    _definitions.append(definitions)  # they live as long as the library object
    if sources_and_ops is ROWS:
        load.launches = ctypes.CDLL(library).emulated_launches
    if sources_and_ops is ATTENTION:
        load.exponentials = ctypes.CDLL(library).emulated_exponentials
    torch.ops.load_library(library)
    return torch.ops.fastattn_emulated
