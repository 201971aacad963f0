"""Detects out-of-bounds reads without a sanitizer: operands are placed inside arenas of NaN.

A read outside `guarded(tensor)` turns a result into NaN. A read that strays into the next row of the same tensor is
detected only with a `gap`. `far` reveals offsets that do not fit into 32 bits. With `at_the_end_of_memory`, a read past
the end ends the process, even where its value is not used.
"""

import ctypes
import math
import mmap

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


def at_the_end_of_memory(tensor):
    """The same values, contiguous. The page of memory after the last one cannot be read."""
    size = tensor.numel() * tensor.element_size()
    readable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, readable + mmap.PAGESIZE)
    end = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)) + readable)
    assert ctypes.CDLL(None).mprotect(end, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    if size == 0:
        return tensor.clone()
    there = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=readable - size)
    return there.view(tensor.shape).copy_(tensor)


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
