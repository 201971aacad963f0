"""LayerNorm and RMSNorm, with the preceding bias, dropout and residual add. norm_bwd.py is the backward.

    r = keep * dropout_scale * (x + x_bias) + residual        rounded once, to the dtype of the residual, or of x
    y = (r - mean) * rstd * weight + bias                     rms: mean = 0

A program owns BLOCK_M rows, loads them once and keeps them in registers. Statistics are centred and in fp32. Rows that
are too wide for registers are read again from the cache.
Saved: r and the fp32 statistics, never a mask. Limits: fewer than 2^31 columns.
Reference: fastattn.reference.norm.
"""

import torch
import triton
import triton.language as tl

from fastattn.kernels.common import (
    VARYING,
    Launch,
    as_rows,
    contiguous,
    dropout_constants,
    dropout_rows,
    eights,
    in_eights,
    launch,
    launch_for,
    register,
)  # fmt: skip

# By width: block_n is the number of columns, rounded up to a power of two. Wider rows are read in blocks of WIDE.
FORWARD = (
    Launch(16, 128, 4),
    Launch(8, 256, 4),
    Launch(4, 512, 4),
    Launch(2, 1024, 4),
    Launch(1, 2048, 4),
    Launch(1, 4096, 8),
    Launch(1, 8192, 8),
    Launch(1, 16384, 16),
)
WIDE = Launch(1, 4096, 8)


@triton.jit
def _load_r(
    x_ptr, x_bias_ptr, residual_ptr, rng_ptr, cols, x_stride, residual_stride, threshold, scale, row, start, mask,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    col = start + tl.arange(0, BLOCK_N)
    r = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if x_bias_ptr is not None:
        r += tl.load(x_bias_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    if rng_ptr is not None:
        r = dropout_rows(r, rng_ptr, threshold, scale, row, start, BLOCK_N)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + col[None, :], mask=mask, other=0.0)
        r = (r + residual.to(tl.float32)).to(residual_ptr.dtype.element_ty).to(tl.float32)
    elif rng_ptr is not None or x_bias_ptr is not None:
        r = r.to(x_ptr.dtype.element_ty).to(tl.float32)
    return r


@triton.jit
def affine(y, weight_ptr, bias_ptr, col, cols):
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _store_stats(stats_ptr, mean, rstd, row, rows, RMS: tl.constexpr):
    if not RMS:
        tl.store(stats_ptr + row, mean, mask=row < rows)
        stats_ptr += tl.cast(rows, tl.int64)
    tl.store(stats_ptr + row, rstd, mask=row < rows)


@triton.jit
def load_stats(stats_ptr, row, rows, RMS: tl.constexpr):
    mean = tl.zeros(row.shape, tl.float32)
    if not RMS:
        mean = tl.load(stats_ptr + row, mask=row < rows, other=0.0)
        stats_ptr += tl.cast(rows, tl.int64)
    return mean, tl.load(stats_ptr + row, mask=row < rows, other=0.0)


@triton.jit
def _finish_stats(mean, centered_sum, square_sum, cols, eps, RMS: tl.constexpr):
    """Return (mean, rstd) from the sums of r - mean and of its square. The first sum is the mean's rounding error.

    If the squares exceed fp32, rstd is 0; NaN stays NaN. A maximum that drops NaN would give 1 / sqrt(eps) for both.
    """
    variance = square_sum / cols
    if not RMS:
        rest = centered_sum / cols
        mean += rest
        rest = tl.where(variance < float("inf"), rest, 0.0)
        variance = tl.maximum(variance - rest * rest, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return mean, 1 / tl.sqrt(variance + eps)


@triton.jit(do_not_specialize=VARYING)
def norm_fwd_kernel(
    x_ptr, x_bias_ptr, residual_ptr, weight_ptr, bias_ptr, rng_ptr, y_ptr, r_ptr, stats_ptr,
    rows, cols, x_stride, residual_stride, threshold, scale, eps,
    RMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EIGHTS: tl.constexpr = False,
):  # fmt: skip
    cols = in_eights(cols, EIGHTS)
    x_stride = in_eights(x_stride, EIGHTS)
    residual_stride = in_eights(residual_stride, EIGHTS)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (col < cols)[None, :]

    r = _load_r(
        x_ptr,
        x_bias_ptr,
        residual_ptr,
        rng_ptr,
        cols,
        x_stride,
        residual_stride,
        threshold,
        scale,
        row,
        0,
        mask,
        BLOCK_N,
    )  # (BLOCK_M, BLOCK_N)
    if r_ptr is not None:
        tl.store(r_ptr + row[:, None] * cols + col[None, :], r.to(r_ptr.dtype.element_ty), mask=mask)

    # The centred second moment is computed from registers, without cancellation.
    mean = tl.zeros((BLOCK_M,), tl.float32)
    if not RMS:
        mean = tl.sum(r, axis=1) / cols
    centered = tl.where(mask, r - mean[:, None], 0.0)
    mean, rstd = _finish_stats(mean, tl.sum(centered, axis=1), tl.sum(centered * centered, axis=1), cols, eps, RMS)
    if stats_ptr is not None:
        _store_stats(stats_ptr, mean, rstd, row, rows, RMS)

    y = affine((r - mean[:, None]) * rstd[:, None], weight_ptr, bias_ptr, col, cols)
    tl.store(y_ptr + row[:, None] * cols + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def norm_fwd_wide_kernel(
    x_ptr, x_bias_ptr, residual_ptr, weight_ptr, bias_ptr, rng_ptr, y_ptr, r_ptr, stats_ptr,
    rows, cols, x_stride, residual_stride, threshold, scale, eps,
    RMS: tl.constexpr, BLOCK_N: tl.constexpr, EIGHTS: tl.constexpr = False,
):  # fmt: skip
    cols = in_eights(cols, EIGHTS)
    x_stride = in_eights(x_stride, EIGHTS)
    residual_stride = in_eights(residual_stride, EIGHTS)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)

    # Three passes over a row that stays in the L2 cache: mean, centred second moment, result.
    mean = tl.zeros((1,), tl.float32)
    if not RMS:
        total = tl.zeros((1, BLOCK_N), tl.float32)
        for start in range(0, cols, BLOCK_N):
            mask = (start + tl.arange(0, BLOCK_N) < cols)[None, :]
            r = _load_r(
                x_ptr, x_bias_ptr, residual_ptr, rng_ptr, cols, x_stride, residual_stride, threshold, scale, row, start,
                mask, BLOCK_N,
            )  # fmt: skip
            total += tl.where(mask, r, 0.0)
        mean = tl.sum(total, axis=1) / cols

    rest = tl.zeros((1, BLOCK_N), tl.float32)
    squares = tl.zeros((1, BLOCK_N), tl.float32)
    for start in range(0, cols, BLOCK_N):
        mask = (start + tl.arange(0, BLOCK_N) < cols)[None, :]
        r = _load_r(
            x_ptr, x_bias_ptr, residual_ptr, rng_ptr, cols, x_stride, residual_stride, threshold, scale, row, start,
            mask, BLOCK_N,
        )  # fmt: skip
        centered = tl.where(mask, r - mean[:, None], 0.0)
        rest += centered
        squares += centered * centered
    mean, rstd = _finish_stats(mean, tl.sum(rest, axis=1), tl.sum(squares, axis=1), cols, eps, RMS)
    if stats_ptr is not None:
        _store_stats(stats_ptr, mean, rstd, row, rows, RMS)

    for start in range(0, cols, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        mask = (col < cols)[None, :]
        r = _load_r(
            x_ptr, x_bias_ptr, residual_ptr, rng_ptr, cols, x_stride, residual_stride, threshold, scale, row, start,
            mask, BLOCK_N,
        )  # fmt: skip
        if r_ptr is not None:
            tl.store(r_ptr + row[:, None] * cols + col[None, :], r.to(r_ptr.dtype.element_ty), mask=mask)
        y = affine((r - mean[:, None]) * rstd[:, None], weight_ptr, bias_ptr, col, cols)
        tl.store(y_ptr + row[:, None] * cols + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def _forward(x, residual, weight, bias, rng, dropout_p, eps, rms, x_bias, y, r, stats):
    cols = x.shape[-1]
    rows = x.numel() // cols
    x, x_stride = as_rows(x)
    residual, residual_stride = (None, 0) if residual is None else as_rows(residual)
    rng, threshold, scale = dropout_constants(rng, dropout_p)
    args = (
        x, contiguous(x_bias), residual, contiguous(weight), contiguous(bias), rng, y, r, stats,
        rows, cols, x_stride, residual_stride, threshold, scale, eps,
    )  # fmt: skip
    constants = {"RMS": rms, "EIGHTS": eights(cols, x_stride, residual_stride)}
    tile = launch_for(FORWARD, cols)
    if tile is not None:
        launch(
            norm_fwd_kernel, (triton.cdiv(rows, tile.block_m),), x.device, *args, BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n, **constants, **tile.options(),
        )  # fmt: skip
    else:
        launch(norm_fwd_wide_kernel, (rows,), x.device, *args, BLOCK_N=WIDE.block_n, **constants, **WIDE.options())


def norm_infer(x, residual, weight, bias, rng, dropout_p, eps, rms, x_bias=None):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        _forward(x, residual, weight, bias, rng, dropout_p, eps, rms, x_bias, y, None, None)
    return y


def norm_fwd(x, residual, weight, bias, rng, dropout_p, eps, rms, x_bias=None):
    cols = x.shape[-1]
    plain = residual is None and rng is None and x_bias is None
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    r = torch.empty((0,) if plain else x.shape, dtype=x.dtype if residual is None else residual.dtype, device=x.device)
    stats = torch.empty((1 if rms else 2, x.numel() // cols if cols else 0), dtype=torch.float32, device=x.device)
    if y.numel():
        _forward(x, residual, weight, bias, rng, dropout_p, eps, rms, x_bias, y, None if plain else r, stats)
    return y, r, stats


register("norm_infer", norm_infer)
register("norm_fwd", norm_fwd)
