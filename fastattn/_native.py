"""Loads the compiled libraries and the Triton kernels, and records why a backend is unavailable."""

import ctypes
import importlib.util
import os
import warnings

import torch

from fastattn.ops._backends import set_unavailable, why_not_available
from fastattn.ops._libraries import PACKAGE, built_for, load_library

# in the order of CpuCapability in csrc/cpu/capability.h
CPU_CAPABILITIES = ("default", "avx2", "avx512", "avx512bf16", "amx")
_KERNEL_MODULES = (
    "attention_fwd", "attention_bwd", "attention_decode", "cross_entropy", "dropout", "feed_forward", "norm",
    "norm_bwd", "rotary",
)  # fmt: skip


def _load_cuda():
    """Why the native CUDA kernels are unavailable, or a function that returns the reason for each device."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return load_library("_cuda.so") or (_native_refuses if torch.cuda.is_available() else "torch sees no CUDA device")


def _native_refuses(index):
    """Why the CUDA library cannot run on a device, or None; asks the library's own runtime, not torch's."""
    answer = ctypes.CDLL(os.path.join(PACKAGE, "_cuda.so")).fastattn_cuda_refusal
    answer.restype = ctypes.c_char_p
    with torch.cuda.device(index):
        error = answer()
    if error is None:
        return None
    info = built_for()
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    return (
        f"built with CUDA {info['nvcc']} for {', '.join(info['cuda_archs'])}, it cannot run on this GPU of compute"
        f" capability {capability}: {error.decode()}"
    )


def _triton_refuses(index):
    """Why the Triton kernels cannot run on a device, or None."""
    import triton

    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or newer; this one has {'.'.join(map(str, capability))}"
    try:
        with torch.cuda.device(index):  # the driver compiles its launcher, which needs a C compiler
            triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"it cannot launch kernels on this machine: {error}"
    if capability[0] == 9 and not os.environ.get("TRITON_PTXAS_PATH"):
        _warn_of_assembler(triton.__version__)
    return None


def _warn_of_assembler(version):
    """Warn of Triton below 3.9: its ptxas for Hopper may reuse registers that a product still reads."""
    if tuple(map(int, version.split(".")[:2])) < (3, 9):
        warnings.warn(
            f"Triton {version} compiles for Hopper GPUs with a ptxas that may give wrong matrix products (wgmma):"
            " install Triton 3.9 or newer, or set TRITON_PTXAS_PATH to the ptxas of CUDA 13.3 or newer",
            stacklevel=2,
        )


def _load_triton():
    """Import the Triton kernels, which register themselves; return the reasons for "cpu" and "cuda" (`_load_cuda`)."""
    if importlib.util.find_spec("triton") is None:
        return ("triton is not installed",) * 2
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    cpu = None if interpreted else "Triton takes CPU tensors only in its interpreter (TRITON_INTERPRET=1)"
    cuda = _triton_refuses if torch.cuda.is_available() else "torch sees no CUDA device"
    if torch.version.hip:
        cuda = "its kernels are for NVIDIA GPUs, but this torch is built for ROCm"
    if cpu and not callable(cuda):
        return cpu, cuda  # nothing could run: skip the slow import
    if importlib.util.find_spec("fastattn.kernels") is None:
        return ("fastattn/kernels is missing: a copy of the repository lost its symbolic link to kernels/",) * 2
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken triton must not break fastattn
        return (f"triton is installed, but its import fails: {error}",) * 2
    for name in _KERNEL_MODULES:
        importlib.import_module(f"fastattn.kernels.{name}")
    return cpu, cuda


def load_backends():
    """Load every available backend, once, at import."""
    capability = os.environ.get("FASTATTN_CPU_CAPABILITY") or CPU_CAPABILITIES[-1]
    if capability not in CPU_CAPABILITIES:
        raise ValueError(f"FASTATTN_CPU_CAPABILITY must be one of {', '.join(CPU_CAPABILITIES)}, got {capability!r}")
    cpu = load_library("_cpu.so")
    set_unavailable("native", "cpu", cpu)
    set_unavailable("native", "cuda", _load_cuda())
    for device, reason in zip(("cpu", "cuda"), _load_triton(), strict=True):
        set_unavailable("triton", device, reason)
    if cpu is not None and cpu != "FASTATTN_NATIVE=0":  # left out on purpose: no warning
        warnings.warn(f"fastattn runs without its C++ kernels for the CPU: {cpu}", stacklevel=3)


def cpu_capability():
    """The instruction set of the CPU kernels in use (one of CPU_CAPABILITIES), or None without these kernels."""
    if why_not_available("native", "cpu") is not None:
        return None
    return CPU_CAPABILITIES[torch.ops.fastattn.cpu_capability()]
