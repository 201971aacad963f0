"""Out-of-bounds reads caught without a sanitizer: operands inside arenas of NaN.

A read outside of `guarded(tensor)` turns a result into NaN. A read that strays into the next row of the same tensor is
caught only with a `gap`.
"""

import math

import torch

PADDING = 4096


def guarded(tensor, offset=0, gap=0):
    """The same values surrounded by NaN; `offset` elements misalign the pointer, `gap` NaN elements follow each row."""
    shape = tuple(tensor.shape)
    row = shape[-1] + gap
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, row if len(strides) == 1 else strides[0] * size)
    length = 2 * PADDING + offset + math.prod(shape[:-1]) * row
    buffer = torch.full((length,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    return buffer.as_strided(shape, strides, PADDING + offset).copy_(tensor)
