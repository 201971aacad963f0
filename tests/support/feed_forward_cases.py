"""Shared by the tests of the feed-forward op and of its kernels."""

import os

import pytest
import torch

import fastattn
from fastattn import reference

BACKEND = os.environ.get("FASTATTN_BACKEND") or "native"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Triton's interpreter computes bf16 on raw bits and truncates in stores
FLOATS = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16)

needs_kernels = pytest.mark.skipif(
    fastattn.backends()["cpu"][BACKEND] != "available",
    reason=f"no {BACKEND} kernels for the CPU: {fastattn.backends()['cpu'][BACKEND]}",
)


def keep_factor(rng, dropout_p, shape):
    rows = torch.arange(shape[:-1].numel())
    keep = reference.philox_keep(rng, dropout_p, rows, rows >> 32, shape[-1]).view(shape)
    return keep * reference.dropout_scale(dropout_p)
