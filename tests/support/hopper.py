"""Runs tests of the kernels for Hopper on a Hopper GPU, or with their sources in the emulation."""

import emulate_cuda
import pytest
import torch

import fastattn

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if HOPPER else "cpu"


def use_hopper_kernels(monkeypatch, library, places):
    """backend="native" is the CUDA kernel for a test: emulated ops stand in for those of the CPU, or it is skipped.

    Args:
        library: of emulate_cuda.
        places: (RawOps, name of the op) of the tables from which the public function takes its ops.
    """
    reason = fastattn.backends()["cuda"]["native"] if HOPPER else emulate_cuda.why_not_available() or "available"
    if reason != "available":
        pytest.skip(reason)
    if not HOPPER:
        ops = emulate_cuda.load(library)
        for table, op in places:
            for kind in (table, table.direct):
                monkeypatch.setitem(kind, "native", getattr(ops, op).native)
