"""Captures one call of each kernel family into a CUDA graph, over the stand-in for the runtime (without_gpu.sh).

The calls are those of tests/gpu/first.py, with the gradients of all inputs. The stand-in refuses what a
capture would refuse: a wait, and an allocation that PyTorch does not make for the graph. It also counts launches and
refusals, so one whose error code nobody read is seen. Prints a JSON list of [family, backend, launches, refusals,
error].

    tests/support/stand_in/without_gpu.sh FOLDER python tests/support/captured_runtime.py
"""

import contextlib
import ctypes
import json
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "gpu"))
import first


def counts():
    runtime = ctypes.CDLL(None)
    return runtime.stand_in_launches(), runtime.stand_in_refusals()


def gradients(family, given, backend):
    out = family.call(**given, backend=backend)
    if family.grad:
        torch.autograd.grad(out.sum(), [t for t in given.values() if t.requires_grad])


def captured(family, backend):
    """Return [launches, refusals, error] of a capture, after a call that loads the kernels."""
    given = first.inputs(family, "cuda", family.dtype)
    gradients(family, given, backend)
    before, error = counts(), None
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            gradients(family, given, backend)
    except Exception as raised:  # a line of the report
        error = f"{type(raised).__name__}: {raised}"
    return [*(now - then for now, then in zip(counts(), before, strict=True)), error]


def planted(what):
    """A call that captures refuse."""
    x = torch.ones(3, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        if what == "wait":
            x.sum().item()
        else:  # the error code is not read
            ctypes.CDLL(None).cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(8))


def main():
    report = [
        [family.name, backend, *captured(family, backend)]
        for family in first.FAMILIES
        for backend in ("native", "triton")
        if not first.refused(family, backend, "cuda")
    ]
    for what in ("wait", "allocation"):
        before = counts()[1]
        with contextlib.suppress(RuntimeError):
            planted(what)
        report.append([f"planted: {what}", "native", 1, counts()[1] - before, None])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
