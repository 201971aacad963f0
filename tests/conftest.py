"""Prints which fastattn and which backends the tests see, and insists on those that FASTATTN_REQUIRE names."""

import os

import pytest
import torch

import fastattn
from fastattn.ops._backends import BACKENDS


def pytest_report_header(config):
    threads = torch.get_num_threads()
    lines = [f"fastattn {fastattn.__version__} of {os.path.dirname(fastattn.__file__)}, torch {torch.__version__}"]
    for device, state in fastattn.backends().items():
        lines += [f"  {device} {name}: {reason}" for name, reason in state.items() if name != "reference"]
    return [*lines, f"  {threads} threads" if threads > 1 else "  1 thread"]


def pytest_sessionstart(session):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in filter(None, os.environ.get("FASTATTN_REQUIRE", "").split(",")):
        if name not in BACKENDS:
            raise pytest.UsageError(f"FASTATTN_REQUIRE must name some of {', '.join(BACKENDS)}, got {name!r}")
        reason = fastattn.backends()[device][name]
        if reason != "available":
            raise pytest.UsageError(f"FASTATTN_REQUIRE={name}, but it is not there for {device} tensors: {reason}")
