"""The text of `fastattn info`: what is installed, which backends run where, and why the others do not."""

import importlib.metadata
import os
import platform

import torch

from fastattn import __version__, _native, reference
from fastattn.ops import _libraries
from fastattn.ops._backends import backends, on_request, order, registered_ops, why_not_on_device

_VARIABLES = ("CUDA_HOME", "CUDA_VISIBLE_DEVICES", "CXX", "MAX_JOBS", "OMP_NUM_THREADS", "TRITON_INTERPRET")


def _version_of(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions():
    yield "fastattn", f"{__version__} in {os.path.dirname(_native.__file__)}"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
    yield "triton", _version_of("triton")


def _devices():
    threads = torch.get_num_threads()
    yield "cpu", f"{_cpu_model()}, {threads} thread{'s' * (threads != 1)}"
    if not torch.cuda.is_available():
        yield "cuda", "torch sees no CUDA device"
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}",
            f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors,"
            f" {gpu.total_memory / 2**30:.0f} GiB",
        )


def _backends():
    for device, state in backends().items():
        for name, reason in state.items():
            text = reason if reason == "available" else f"no: {reason}"
            capability = _native.cpu_capability()
            if (device, name) == ("cpu", "native") and capability:
                text += f", using its {capability} kernels"
            yield f"{device} {name}", text


def _served(op, device):
    """The backends of an op on a device as text; those that run only when named are listed separately."""
    usable = [name for name in order(device) if why_not_on_device(op, name, device) is None]
    text = " > ".join(name for name in usable if on_request(op, name, device) is None)
    for name in usable:
        if reason := on_request(op, name, device):
            text += f" ({name} only if named: {reason})"
    return f"{device}: {text}"


def _ops():
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for op in registered_ops():
        yield op, "   ".join(_served(op, device) for device in devices)


def _build():
    info = _libraries.build_info()
    if not info:
        yield "nothing", "this checkout was never built (pip install -e .)"
        return
    made = _libraries.built_for()
    yield "compiler", made["cxx"] or "none"
    yield "nvcc", f"{made['nvcc']} for {', '.join(made['cuda_archs'])}" if made["nvcc"] else "none"
    yield "torch headers", made["torch"] or "none"
    for part in info["built"]:
        yield part, "built" + (f" for {', '.join(made['cpu_variants'])}" if part == "_cpu.so" else "")
    for part, reason in info["not_built"].items():
        yield part, "not built: " + reason.strip().replace("\n", "\n    ")
    module = _libraries.introspection()
    if module is None:
        yield "_C", f"not built for Python {platform.python_version()}: the facts above are those of the last build"
        return
    best, used = module.best_cpu_capability(), module.cpu_capability()
    yield "this processor", best if best == used else f"{best}, limited to {used} by FASTATTN_CPU_CAPABILITY"
    same = "the same numbers as" if _is_philox_of_reference(module) else "OTHER NUMBERS THAN"
    yield "dropout", f"Philox4x32-10, {same} the reference"


def _is_philox_of_reference(module):
    """Whether the compiled random number generator gives the words of fastattn.reference."""
    counter, key = [1, 2**31, 3, 2**32 - 1], [5, 2**32 - 2]
    words = reference.philox4x32([torch.tensor(word) for word in counter], [torch.tensor(word) for word in key])
    return module.philox(counter, key) == [int(word) for word in words]


def _environment():
    for name in sorted(os.environ):
        if name.startswith("FASTATTN_") or name in _VARIABLES:
            yield name, os.environ[name]


def report():
    """Versions, devices, backends per op, the build, and the reason for each missing part.

    Returns: str of several lines, without a newline at the end.
    """
    sections = {
        "Versions": _versions(),
        "Devices": _devices(),
        "Backends": _backends(),
        "Ops (backends in the order of choice)": _ops(),
        "Compiled part": _build(),
        "Environment variables": _environment(),
    }
    lines = []
    for title, pairs in sections.items():
        pairs = list(pairs) or [("none", "")]
        width = max(len(name) for name, _ in pairs)
        lines += ["", title, *(f"  {name:{width}}  {text}".rstrip() for name, text in pairs)]
    return "\n".join(lines[1:])
