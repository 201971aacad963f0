"""Shared by the kernels: dropout in the project's Philox layout, tensors as rows, facts about devices, launches.

Dropout uses Philox4x32-10 with key rng[0] and counter (column // 8, row, slab, rng[1]). Halfword column % 8 of the four
words, in little-endian order, drops its element if it is below the threshold. `fastattn.reference.philox_keep` is the
specification; masks are equal to it bit for bit.
"""

import contextlib
import contextvars
import functools
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.ops._register import implement
from fastattn.reference import dropout_scale, dropout_threshold

# Sizes that vary between calls and do not affect the quality of the code: one binary serves all values. Without this,
# Triton would compile one for 1, one for multiples of 16 and one for the rest.
VARYING = ["rows", "threshold", "programs"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
DEVICE_MADE, HOST_MADE = tl.constexpr(1), tl.constexpr(2)  # Form.TMA: who makes the descriptors
_INTERPRETED_PROGRAMS = 2  # the programs of a persistent grid; two are enough to test that partial sums are added


class Launch(NamedTuple):
    """A row of a table of launch parameters: the tile of a program, its warps, the stages of loads in its loops, and
    the number of registers that a thread may use."""

    block_m: int
    block_n: int
    warps: int
    stages: int | None = None  # None: Triton decides
    registers: int | None = None  # None: the assembler decides

    def options(self):
        """Return the keyword arguments of a Triton launch."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}
        return {name: value for name, value in options.items() if value is not None}


def launch_for(table, cols):
    """Return the first Launch of a table, ordered by block_n, that holds a row of `cols` columns, or None."""
    return next((row for row in table if cols <= row.block_n), None)


class Variants(NamedTuple):
    """A row of the table of attention: one Launch for each kind of call."""

    full: Launch
    causal: Launch
    extra: Launch | None = None  # None only for dk and dv: those calls have one launch for both
    alibi: Launch | None = None  # None: as `extra`


def eights(*sizes):
    """Return whether sizes and strides are multiples of 8 elements, but not all of 16.

    Triton sees only multiples of 16. It would read rows of 1000 columns in half precision 2 bytes at a time instead of
    16.
    """
    return all(size % 8 == 0 for size in sizes) and any(size % 16 for size in sizes)


@triton.jit
def in_eights(size, EIGHTS: tl.constexpr):
    """Return `size`, which the compiler knows to be a multiple of 8 if EIGHTS."""
    if EIGHTS:
        size = size // 8 * 8
    return size


class Rows(NamedTuple):
    """A (batch, heads, rows, columns) tensor such as q, k or v, with its strides. The stride of columns is 1."""

    ptr: Any
    strides: Any


@triton.jit
def tanh(x):
    # The quotient cancels near 0, where the series is exact to fp32.
    x2 = x * x
    series = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
    e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    quotient = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def dropout_halfwords(rng_ptr, row, slab, group):
    """Return the 16-bit numbers that decide whether the columns of `group` are kept.

    Args:
        row, slab: int64 (M,), of which the low 32 bits are used.
        group: (G,), column // 8, consecutive.
    Returns: uint32 (M, 8 * G), starting with column 8 * group[0].
    """
    seed = tl.load(rng_ptr)
    offset = tl.load(rng_ptr + 1)
    zero = tl.zeros((row.shape[0], group.shape[0]), tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        zero + group[None, :].to(tl.uint32),
        zero + row[:, None].to(tl.uint32),
        zero + slab[:, None].to(tl.uint32),
        zero + offset.to(tl.uint32),
    )
    # Interleaving puts even positions first: halfword 2 * i is the low half of word i, and 2 * i + 1 is its high half.
    low = tl.interleave(tl.interleave(w0 & 0xFFFF, w2 & 0xFFFF), tl.interleave(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.interleave(tl.interleave(w0 >> 16, w2 >> 16), tl.interleave(w1 >> 16, w3 >> 16))
    return tl.interleave(low, high)


@triton.jit
def dropout_rows(x, rng_ptr, threshold, scale, row, first_col, BLOCK_N: tl.constexpr):
    """Return keep * scale * x for x (M, BLOCK_N) in fp32. `row` has the row numbers, int64; first_col % 8 = 0."""
    group = first_col // 8 + tl.arange(0, BLOCK_N // 8)
    halfword = dropout_halfwords(rng_ptr, row, row >> 32, group)
    return tl.where(halfword >= threshold, x * scale, 0.0)


def dropout_constants(rng, dropout_p):
    """Return (rng or None, threshold, scale) as kernel arguments; rng is None if nothing can be dropped."""
    threshold = dropout_threshold(dropout_p) if rng is not None else 0
    return (rng, threshold, dropout_scale(dropout_p)) if threshold else (None, 0, 1.0)


def as_rows(t):
    """Return (t, row stride), or a contiguous copy if t does not collapse to rows with inner stride 1."""
    if t.is_contiguous():
        return t, t.shape[-1]
    t = t.reshape(-1, t.shape[-1])
    if t.shape[1] > 1 and t.stride(1) != 1:
        t = t.contiguous()
    return t, t.stride(0)


def contiguous(t):
    return t if t is None else t.contiguous()


def unit_stride(t):
    """Return t (batch, heads, rows, columns) with column stride 1. Other tensors, such as expanded gradients, are
    copied."""
    return t if t.stride(3) == 1 or t.size(3) == 1 else t.contiguous()


@functools.cache
def _multiprocessors(index):
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device):
    """Return the number of multiprocessors of a device; it is 1 in the interpreter."""
    return 1 if device.type == "cpu" else _multiprocessors(device.index)


def persistent_programs(device, per_multiprocessor):
    """Return the size of a grid whose programs loop: `per_multiprocessor` for each multiprocessor of the device."""
    if device.type == "cpu":
        return _INTERPRETED_PROGRAMS
    return multiprocessors(device) * per_multiprocessor


_NO_GUARD = contextlib.nullcontext()


def device_guard(device):
    """Make the device of the tensors current, because Triton launches on the current device."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(device)


def _scratch(size, alignment, stream):
    """Return memory for the TMA descriptors that a kernel creates, on the current device and stream."""
    return torch.empty(size, dtype=torch.int8, device="cpu" if INTERPRETED else "cuda")


def _launch_with_scratch(kernel, grid, args, constants):
    triton.set_allocator(_scratch)
    kernel[grid](*args, **constants)


def uses_tma(args):
    """Return whether the last argument of a kernel is a Form with descriptors that the kernel makes."""
    return bool(args) and getattr(args[-1], "TMA", 0) == DEVICE_MADE.value


def launch(kernel, grid, device, *args, **constants):
    """Run kernel[grid](*args, **constants) on a device, with the options that all launches share.

    Multiply-adds are fused, whatever the default of this version of Triton is. If the last argument is a Form with
    descriptors that the kernel makes, the kernel gets memory for them. The caller's allocator is not replaced.
    """
    constants["enable_fp_fusion"] = True
    with device_guard(device):
        if uses_tma(args):
            contextvars.copy_context().run(_launch_with_scratch, kernel, grid, args, constants)
        else:
            kernel[grid](*args, **constants)


def register(name, function):
    """Register `function` as the triton overload of a raw op: for CUDA, and for CPU tensors in the interpreter."""
    implement(name, "triton", "CUDA", function)
    if INTERPRETED:
        implement(name, "triton", "CPU", function)
