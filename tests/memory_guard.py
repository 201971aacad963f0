"""Out-of-bounds reads and writes caught without a sanitizer: operands and outputs inside arenas of NaN.

A read outside of `guarded(tensor)` turns a result into NaN; `Sentinel.check` finds a write outside of an output and an
element that was not written. A read that strays into the next row of the same tensor is caught only with a `gap`.
"""

import math

import torch


def _arena(shape, dtype, device, offset, gap, padding=4096):
    row = shape[-1] + gap
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, row if len(strides) == 1 else strides[0] * size)
    start = padding + offset
    length = start + math.prod(shape[:-1]) * row + padding
    buffer = torch.full((length,), float("nan"), dtype=dtype, device=device)
    return buffer, buffer.as_strided(shape, strides, start)


def guarded(tensor, offset=0, gap=0):
    """The same values surrounded by NaN; `offset` elements misalign the pointer, `gap` NaN elements follow each row."""
    _, view = _arena(tuple(tensor.shape), tensor.dtype, tensor.device, offset, gap)
    return view.copy_(tensor)


class Sentinel:
    """An output `tensor` full of NaN, surrounded by NaN."""

    def __init__(self, shape, dtype=torch.float32, device="cpu", offset=0, gap=0):
        self.buffer, self.tensor = _arena(tuple(shape), dtype, device, offset, gap)

    def check(self):
        outside = torch.ones_like(self.buffer, dtype=torch.bool)
        outside.as_strided(self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()).fill_(False)
        written = int((~torch.isnan(self.buffer[outside])).sum())
        assert not written, f"{written} elements written outside the output"
        missing = int(torch.isnan(self.tensor).sum())
        assert not missing, f"{missing} output elements are NaN: not written, or read out of bounds"
