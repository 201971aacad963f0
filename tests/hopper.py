"""Where the kernels for Hopper run: on such a GPU, or else their sources in the emulation."""

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
        places: (table, key, name of the op) of the ops that the public function takes from tables.
    """
    reason = fastattn.backends()["cuda"]["native"] if HOPPER else emulate_cuda.why_not_available() or "available"
    if reason != "available":
        pytest.skip(reason)
    if not HOPPER:
        ops = emulate_cuda.load(library)
        for table, key, op in places:
            monkeypatch.setitem(table, key, getattr(ops, op).native)
