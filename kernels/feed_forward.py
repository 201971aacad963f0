"""The passes of the feed-forward block between its matrix products.

    hidden = act(preact) * keep * dropout_scale                gated: act(gate) * preact * keep * dropout_scale
    dact = dhidden * keep * dropout_scale
    dpreact = dact * act'(preact)                              gated: dact * act(gate)
                                                                      dgate = dact * preact * act'(gate)
    dbias = sum_rows(dpreact),  dbias_gate = sum_rows(dgate)

Forward: a program owns a tile. Backward: a program owns a strip of BLOCK_N columns, loops over blocks of rows and sums
its share of the bias gradients in fp32. A second kernel adds the shares in a fixed order, without atomics. The backward
also stores hidden again, for the gradient of w2. Saved: the pre-activations, never hidden or a mask.
Limits: fewer than 2^31 columns. Reference: fastattn.reference.feed_forward.
"""

import torch
import triton
import triton.language as tl

from fastattn.kernels.common import (
    VARYING,
    Launch,
    as_rows,
    dropout_constants,
    dropout_halfwords,
    eights,
    in_eights,
    launch,
    persistent_programs,
    register,
)  # fmt: skip
from fastattn.kernels.norm_bwd import add_up
from fastattn.reference import ACTIVATIONS

NAMES = tuple(ACTIVATIONS)
FORWARD = Launch(8, 256, 4)
BACKWARD = Launch(8, 128, 4)
PROGRAMS_PER_MULTIPROCESSOR = 8


@triton.jit
def _sigmoid(x):
    """The sigmoid 1 / (1 + e^-x) and 1 minus it, both to full relative precision."""
    e = tl.exp(-x)
    s = 1 / (1 + e)
    return s, tl.minimum(e, 8.5e37) * s  # the bound avoids inf * 0


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    """Return the value of the activation at x and its slope there."""
    if ACTIVATION == "gelu":
        # The normal distribution: P(-a) = exp(-a^2 / 2) * q(1 / (1 + 0.4 a)) for a >= 0. q was fitted to erfcx, with a
        # relative error of 9e-8. 1 + erf would cancel for negative x.
        a = tl.minimum(tl.abs(x), 15.0)
        t = 1 / (1 + 0.4 * a)
        e = tl.exp(-0.5 * a * a)
        q = -0.03922225534915924 * t + 0.19896432757377625
        q = (q * t - 0.3707125782966614) * t + 0.24802842736244202
        q = (q * t - 0.010648469440639019) * t + 0.15779447555541992
        q = (q * t + 0.15591822564601898) * t + 0.15988917648792267
        tail = e * (q * t - 1.1282214472885244e-05)
        p = tl.where(x < 0, tail, 1 - tail)
        value = x * p
        slope = p + x * 0.3989422804014327 * e
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(z)) / 2 = sigmoid(2 z)
        c1: tl.constexpr = 1.5957691216057308  # 2 sqrt(2 / pi)
        c3: tl.constexpr = 0.07135481627159843  # c1 * 0.044715
        s, complement = _sigmoid(x * (c1 + c3 * x * x))
        value = x * s
        slope = s + x * (c1 + 3 * c3 * x * x) * (s * complement)
    elif ACTIVATION == "silu":
        s, complement = _sigmoid(x)
        value = x * s
        slope = s + x * (s * complement)
    else:
        tl.static_assert(ACTIVATION == "relu" or ACTIVATION == "relu2")
        value = tl.where(x <= 0, 0.0, x)  # keeps NaN
        slope = tl.where(x <= 0, 0.0, 1.0)
        if ACTIVATION == "relu2":
            slope = 2 * value
            value = value * value
    return value, slope


@triton.jit(do_not_specialize=VARYING)
def activation_fwd_kernel(
    preact_ptr, gate_ptr, rng_ptr, hidden_ptr, rows, cols, preact_stride, gate_stride, threshold, scale,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EIGHTS: tl.constexpr = False,
):  # fmt: skip
    cols = in_eights(cols, EIGHTS)
    preact_stride = in_eights(preact_stride, EIGHTS)
    gate_stride = in_eights(gate_stride, EIGHTS)
    strips = tl.cdiv(cols, BLOCK_N)
    tile = tl.program_id(0)
    row = (tile // strips).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = (tile % strips) * BLOCK_N
    col = start + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (col < cols)[None, :]

    preact = tl.load(preact_ptr + row[:, None] * preact_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + row[:, None] * gate_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        hidden = _activation(gate, ACTIVATION)[0] * preact
    else:
        hidden = _activation(preact, ACTIVATION)[0]
    if rng_ptr is not None:
        group = start // 8 + tl.arange(0, BLOCK_N // 8)
        halfword = dropout_halfwords(rng_ptr, row, row >> 32, group)
        hidden = tl.where(halfword >= threshold, hidden * scale, 0.0)
    tl.store(hidden_ptr + row[:, None] * cols + col[None, :], hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def activation_bwd_kernel(
    dhidden_ptr, preact_ptr, gate_ptr, rng_ptr, dpreact_ptr, dgate_ptr, hidden_ptr, dbias_ptr, dbias_gate_ptr,
    rows, cols, dhidden_stride, preact_stride, gate_stride, threshold, scale,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EIGHTS: tl.constexpr = False,
):  # fmt: skip
    cols = in_eights(cols, EIGHTS)
    dhidden_stride = in_eights(dhidden_stride, EIGHTS)
    preact_stride = in_eights(preact_stride, EIGHTS)
    gate_stride = in_eights(gate_stride, EIGHTS)
    program, programs = tl.program_id(1), tl.num_programs(1)
    start = tl.program_id(0) * BLOCK_N
    col = start + tl.arange(0, BLOCK_N)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for block in range(program, tl.cdiv(rows, BLOCK_M), programs):
        row = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        offs = row[:, None] * cols + col[None, :]
        preact = tl.load(preact_ptr + row[:, None] * preact_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        dact = tl.load(dhidden_ptr + row[:, None] * dhidden_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + row[:, None] * gate_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
            value, slope = _activation(gate, ACTIVATION)
            hidden = value * preact
        else:
            value, slope = _activation(preact, ACTIVATION)
            hidden = value
        if rng_ptr is not None:
            group = start // 8 + tl.arange(0, BLOCK_N // 8)
            keep = dropout_halfwords(rng_ptr, row, row >> 32, group) >= threshold
            dact = tl.where(keep, dact * scale, 0.0)
            hidden = tl.where(keep, hidden * scale, 0.0)
        if hidden_ptr is not None:
            tl.store(hidden_ptr + offs, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)

        if gate_ptr is not None:
            dpreact = dact * value
            dgate = dact * preact * slope
            tl.store(dgate_ptr + offs, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
            dbias_gate += dgate  # Rows after the last one add 0, because their dhidden loads as 0.
        else:
            dpreact = dact * slope
        tl.store(dpreact_ptr + offs, dpreact.to(dpreact_ptr.dtype.element_ty), mask=mask)
        dbias += dpreact

    offs = program.to(tl.int64) * cols + col
    if dbias_ptr is not None:
        tl.store(dbias_ptr + offs, tl.sum(dbias, axis=0), mask=col < cols)
    if dbias_gate_ptr is not None:
        tl.store(dbias_gate_ptr + offs, tl.sum(dbias_gate, axis=0), mask=col < cols)


def _flat(preact, gate):
    """Return rows, cols, and preact and gate as rows with their strides."""
    cols = preact.shape[-1]
    return preact.numel() // cols, cols, *as_rows(preact), *((None, 0) if gate is None else as_rows(gate))


def activation_fwd(preact, gate, rng, dropout_p, activation):
    hidden = torch.empty(preact.shape, dtype=preact.dtype, device=preact.device)
    if not hidden.numel():
        return hidden
    rows, cols, preact, preact_stride, gate, gate_stride = _flat(preact, gate)
    rng, threshold, scale = dropout_constants(rng, dropout_p)
    grid = (triton.cdiv(rows, FORWARD.block_m) * triton.cdiv(cols, FORWARD.block_n),)
    launch(
        activation_fwd_kernel, grid, preact.device, preact, gate, rng, hidden, rows, cols, preact_stride, gate_stride,
        threshold, scale, ACTIVATION=NAMES[activation], BLOCK_M=FORWARD.block_m, BLOCK_N=FORWARD.block_n,
        EIGHTS=eights(cols, preact_stride, gate_stride), **FORWARD.options(),
    )  # fmt: skip
    return hidden


def activation_bwd(dhidden, preact, gate, rng, dropout_p, activation, need_hidden, need_dbias, need_dbias_gate):
    dtype, device = preact.dtype, preact.device
    cols = preact.shape[-1]
    new = torch.empty if preact.numel() else torch.zeros
    need_dbias_gate = need_dbias_gate and gate is not None
    dpreact = torch.empty(preact.shape, dtype=dtype, device=device)
    dgate = torch.empty(preact.shape if gate is not None else (0,), dtype=dtype, device=device)
    hidden = torch.empty(preact.shape if need_hidden else (0,), dtype=dtype, device=device)
    dbias = new(cols if need_dbias else 0, dtype=dtype, device=device)
    dbias_gate = new(cols if need_dbias_gate else 0, dtype=dtype, device=device)
    if not preact.numel():
        return dpreact, dgate, hidden, dbias, dbias_gate

    rows, cols, preact, preact_stride, gate, gate_stride = _flat(preact, gate)
    dhidden, dhidden_stride = as_rows(dhidden)
    rng, threshold, scale = dropout_constants(rng, dropout_p)
    strips = triton.cdiv(cols, BACKWARD.block_n)
    walkers = triton.cdiv(persistent_programs(device, PROGRAMS_PER_MULTIPROCESSOR), strips)
    programs = min(triton.cdiv(rows, BACKWARD.block_m), walkers)
    partials = [
        torch.empty((programs, cols), dtype=torch.float32, device=device) if needed else None
        for needed in (need_dbias, need_dbias_gate)
    ]
    launch(
        activation_bwd_kernel, (strips, programs), device, dhidden, preact, gate, rng, dpreact,
        None if gate is None else dgate, hidden if need_hidden else None, *partials, rows, cols, dhidden_stride,
        preact_stride, gate_stride, threshold, scale, ACTIVATION=NAMES[activation], BLOCK_M=BACKWARD.block_m,
        BLOCK_N=BACKWARD.block_n, EIGHTS=eights(cols, dhidden_stride, preact_stride, gate_stride),
        **BACKWARD.options(),
    )  # fmt: skip
    if need_dbias or need_dbias_gate:
        add_up((*partials, None), (dbias if need_dbias else None, dbias_gate if need_dbias_gate else None, None))
    return dpreact, dgate, hidden, dbias, dbias_gate


register("activation_fwd", activation_fwd)
register("activation_bwd", activation_bwd)
