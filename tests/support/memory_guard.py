"""Detects out-of-bounds reads without a sanitizer: operands are placed inside arenas of NaN.

A read outside `guarded(tensor)` turns a result into NaN. A read that strays into the next row of the same tensor is
detected only with a `gap`. `far` reveals offsets that do not fit into 32 bits.
"""

import math

import pytest
import torch

PADDING = 4096


def guarded(tensor, offset=0, gap=0):
    """The same values surrounded by NaN. `offset` elements misalign the pointer; `gap` NaN elements follow each row."""
    shape = tuple(tensor.shape)
    row = shape[-1] + gap
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, row if len(strides) == 1 else strides[0] * size)
    length = 2 * PADDING + offset + math.prod(shape[:-1]) * row
    buffer = torch.full((length,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    return buffer.as_strided(shape, strides, PADDING + offset).copy_(tensor)


def leave_nan(*shapes, dtypes=(torch.float32, torch.bfloat16)):
    """Free memory that holds NaN; the next allocations of these sizes are likely to get it."""
    held = [torch.full(tuple(shape), float("nan"), dtype=dtype) for shape in shapes for dtype in dtypes]
    del held


def far(tensor, dim):
    """The same values, with the first and the last in `dim` 2^31 elements apart, or skip the test.

    With three of them the stride fits 32 bits and the offset does not.

    The memory between them is reserved and never touched, which works on systems that overcommit memory.
    """
    shape = list(tensor.shape)
    strides = list(tensor[(slice(None),) * dim + (slice(1),)].contiguous().stride())
    strides[dim] = 2**31 // (shape[dim] - 1)
    elements = 2**31 + math.prod(shape)
    try:
        buffer = torch.empty(elements, dtype=tensor.dtype, device=tensor.device)
    except RuntimeError as error:
        pytest.skip(f"{elements * tensor.element_size() / 2**30:.1f} GiB of address space are not to be had: {error}")
    return buffer.as_strided(shape, strides).copy_(tensor)
