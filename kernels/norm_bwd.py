"""The backward of LayerNorm and RMSNorm; norm.py is the forward.

    wdy = weight * dy,  xhat = (r - mean) * rstd
    dr = (wdy - mean(wdy) - xhat * mean(wdy * xhat)) * rstd + dr_out           rms: without mean(wdy)
    dresidual = dr,  dx = keep * dropout_scale * dr,  dweight = sum_rows(dy * xhat),  dbias = sum_rows(dy)
    dx_bias = sum_rows(dx)

Resident programs loop over blocks of rows, and each sums its own dweight, dbias and dx_bias in fp32. A second kernel
adds the sums of all programs in a fixed order, without atomics. Rows that are too wide for registers are read again
from the cache; the second kernel then reads all rows of a strip of columns. Limits: fewer than 2^31 columns.
Reference: fastattn.reference.norm; the partial sums follow Triton's tutorial 05.
"""

import torch
import triton
import triton.language as tl

from fastattn.kernels.common import (
    INTERPRETED,
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
    persistent_programs,
    register,
)  # fmt: skip
from fastattn.kernels.norm import FORWARD, WIDE, affine, load_stats

BACKWARD = (*FORWARD[:6], Launch(1, 8192, 16))  # up to 4096 columns as in the forward
# The number of warps that fit on a multiprocessor. With dx_bias each thread keeps a third sum and has up to 144
# registers. So fewer warps fit, and rows of more than BIASED_COLS columns would spill.
RESIDENT_WARPS, BIASED_WARPS, BIASED_COLS = 16, 12, 4096
# Sums over all rows of a strip of wide rows. A program has 32 KB of 16-bit dy and r in flight. By Little's law, 4.8
# TB/s and 0.8 us need 29 KB per multiprocessor.
STRIP = Launch(128, 64, 16)
# The interpreter's time per program does not depend on its width.
INTERPRETED_STRIP_N = 4096
SUM = Launch(128, 32, 4)  # adds the partial sums


@triton.jit
def _load_dy_xhat(dy_ptr, r_ptr, dy_stride, r_stride, mean, rstd, row, col, mask):
    dy = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    r = tl.load(r_ptr + row[:, None] * r_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    return dy, (r - mean[:, None]) * rstd[:, None]


@triton.jit
def _store_dr(
    dr, dr_out_ptr, rng_ptr, dx_ptr, dresidual_ptr, cols, dr_out_stride, threshold, scale, row, start, mask,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store dresidual and dx. Return dx in fp32."""
    col = start + tl.arange(0, BLOCK_N)
    if dr_out_ptr is not None:
        dr += tl.load(dr_out_ptr + row[:, None] * dr_out_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if dresidual_ptr is not None:
        offs = row[:, None] * cols + col[None, :]
        tl.store(dresidual_ptr + offs, dr.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if rng_ptr is not None:
        dr = dropout_rows(dr, rng_ptr, threshold, scale, row, start, BLOCK_N)
    tl.store(dx_ptr + row[:, None] * cols + col[None, :], dr.to(dx_ptr.dtype.element_ty), mask=mask)
    return dr


@triton.jit(do_not_specialize=VARYING)
def norm_bwd_kernel(
    dy_ptr, dr_out_ptr, r_ptr, weight_ptr, stats_ptr, rng_ptr, dx_ptr, dresidual_ptr,
    dweight_ptr, dbias_ptr, dx_bias_ptr, rows, cols, dy_stride, dr_out_stride, r_stride, threshold, scale,
    RMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EIGHTS: tl.constexpr = False,
):  # fmt: skip
    cols = in_eights(cols, EIGHTS)
    dy_stride = in_eights(dy_stride, EIGHTS)
    dr_out_stride = in_eights(dr_out_stride, EIGHTS)
    r_stride = in_eights(r_stride, EIGHTS)
    program, programs = tl.program_id(0), tl.num_programs(0)
    col = tl.arange(0, BLOCK_N)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dx_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for block in range(program, tl.cdiv(rows, BLOCK_M), programs):
        row = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        mean, rstd = load_stats(stats_ptr, row, rows, RMS)
        dy, xhat = _load_dy_xhat(dy_ptr, r_ptr, dy_stride, r_stride, mean, rstd, row, col, mask)
        if dweight_ptr is not None:
            dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy

        # dr = (wdy - mean(wdy) - xhat * mean(wdy * xhat)) * rstd
        wdy = affine(dy, weight_ptr, None, col, cols)
        dr = wdy - xhat * (tl.sum(wdy * xhat, axis=1) / cols)[:, None]
        if not RMS:
            dr -= (tl.sum(wdy, axis=1) / cols)[:, None]
        dx = _store_dr(
            dr * rstd[:, None], dr_out_ptr, rng_ptr, dx_ptr, dresidual_ptr, cols, dr_out_stride, threshold, scale,
            row, 0, mask, BLOCK_N,
        )  # fmt: skip
        if dx_bias_ptr is not None:
            dx_bias += dx

    offs = program.to(tl.int64) * cols + col
    if dweight_ptr is not None:
        tl.store(dweight_ptr + offs, tl.sum(dweight, axis=0), mask=col < cols)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + offs, tl.sum(dbias, axis=0), mask=col < cols)
    if dx_bias_ptr is not None:
        tl.store(dx_bias_ptr + offs, tl.sum(dx_bias, axis=0), mask=col < cols)


@triton.jit(do_not_specialize=VARYING)
def norm_bwd_wide_kernel(
    dy_ptr, dr_out_ptr, r_ptr, weight_ptr, stats_ptr, rng_ptr, dx_ptr, dresidual_ptr,
    rows, cols, dy_stride, dr_out_stride, r_stride, threshold, scale,
    RMS: tl.constexpr, BLOCK_N: tl.constexpr, EIGHTS: tl.constexpr = False,
):  # fmt: skip
    cols = in_eights(cols, EIGHTS)
    dy_stride = in_eights(dy_stride, EIGHTS)
    dr_out_stride = in_eights(dr_out_stride, EIGHTS)
    r_stride = in_eights(r_stride, EIGHTS)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    mean, rstd = load_stats(stats_ptr, row, rows, RMS)

    sum_wdy = tl.zeros((1, BLOCK_N), tl.float32)
    sum_wdy_xhat = tl.zeros((1, BLOCK_N), tl.float32)
    for start in range(0, cols, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        mask = (col < cols)[None, :]
        dy, xhat = _load_dy_xhat(dy_ptr, r_ptr, dy_stride, r_stride, mean, rstd, row, col, mask)
        wdy = affine(dy, weight_ptr, None, col, cols)
        sum_wdy += wdy
        sum_wdy_xhat += wdy * xhat
    mean_wdy_xhat = tl.sum(sum_wdy_xhat, axis=1) / cols
    mean_wdy = tl.sum(sum_wdy, axis=1) / cols

    for start in range(0, cols, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        mask = (col < cols)[None, :]
        dy, xhat = _load_dy_xhat(dy_ptr, r_ptr, dy_stride, r_stride, mean, rstd, row, col, mask)
        dr = affine(dy, weight_ptr, None, col, cols) - xhat * mean_wdy_xhat[:, None]
        if not RMS:
            dr -= mean_wdy[:, None]
        _store_dr(
            dr * rstd[:, None], dr_out_ptr, rng_ptr, dx_ptr, dresidual_ptr, cols, dr_out_stride, threshold, scale,
            row, start, mask, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def norm_bwd_strip_kernel(
    dy_ptr, r_ptr, dx_ptr, stats_ptr, dweight_ptr, dbias_ptr, dx_bias_ptr, rows, cols, dy_stride, r_stride,
    RMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EIGHTS: tl.constexpr = False,
):  # fmt: skip
    cols = in_eights(cols, EIGHTS)
    dy_stride = in_eights(dy_stride, EIGHTS)
    r_stride = in_eights(r_stride, EIGHTS)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if dweight_ptr is not None or dbias_ptr is not None:
        dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in range(tl.cdiv(rows, BLOCK_M)):
            row = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            mask = (row < rows)[:, None] & (col < cols)[None, :]
            mean, rstd = load_stats(stats_ptr, row, rows, RMS)
            dy, xhat = _load_dy_xhat(dy_ptr, r_ptr, dy_stride, r_stride, mean, rstd, row, col, mask)
            dweight += dy * xhat
            dbias += dy
        if dweight_ptr is not None:
            tl.store(dweight_ptr + col, tl.sum(dweight, axis=0).to(dweight_ptr.dtype.element_ty), mask=col < cols)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + col, tl.sum(dbias, axis=0).to(dbias_ptr.dtype.element_ty), mask=col < cols)
    if dx_bias_ptr is not None:  # a separate loop, because three sums at once take twice the registers
        dx_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in range(tl.cdiv(rows, BLOCK_M)):
            row = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            mask = (row < rows)[:, None] & (col < cols)[None, :]
            dx_bias += tl.load(dx_ptr + row[:, None] * cols + col[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_bias_ptr + col, tl.sum(dx_bias, axis=0).to(dx_bias_ptr.dtype.element_ty), mask=col < cols)


@triton.jit
def _add_up(partials_ptr, out_ptr, programs, cols, col, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, programs, BLOCK_M):
        program = start + tl.arange(0, BLOCK_M)
        offs = program[:, None].to(tl.int64) * cols + col[None, :]
        total += tl.load(partials_ptr + offs, mask=(program < programs)[:, None] & (col < cols)[None, :], other=0.0)
    tl.store(out_ptr + col, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=col < cols)


@triton.jit(do_not_specialize=VARYING)
def add_up_kernel(
    dweight_partials_ptr, dbias_partials_ptr, dx_bias_partials_ptr, dweight_ptr, dbias_ptr, dx_bias_ptr,
    programs, cols,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EIGHTS: tl.constexpr = False,
):  # fmt: skip
    cols = in_eights(cols, EIGHTS)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if dweight_ptr is not None:
        _add_up(dweight_partials_ptr, dweight_ptr, programs, cols, col, BLOCK_M, BLOCK_N)
    if dbias_ptr is not None:
        _add_up(dbias_partials_ptr, dbias_ptr, programs, cols, col, BLOCK_M, BLOCK_N)
    if dx_bias_ptr is not None:
        _add_up(dx_bias_partials_ptr, dx_bias_ptr, programs, cols, col, BLOCK_M, BLOCK_N)


def add_up(partials, outputs):
    """Set outputs to partials (programs, cols) summed over programs in order. Each argument holds three tensors or
    None."""
    programs, cols = next(t for t in partials if t is not None).shape
    out = next(t for t in outputs if t is not None)
    launch(
        add_up_kernel, (triton.cdiv(cols, SUM.block_n),), out.device, *partials, *outputs, programs, cols,
        BLOCK_M=SUM.block_m, BLOCK_N=SUM.block_n, EIGHTS=eights(cols), **SUM.options(),
    )  # fmt: skip


def norm_bwd(
    dy, dr_out, r, weight, stats, rng, dropout_p, rms, separate_dresidual, need_dweight, need_dbias, need_dx_bias=False
):
    cols, device = dy.shape[-1], dy.device
    rows = dy.numel() // cols if cols else 0
    dtype = torch.float32 if weight is None else weight.dtype
    new = torch.empty if rows else torch.zeros
    dx = torch.empty(dy.shape, dtype=dy.dtype, device=device)
    dresidual = torch.empty(dy.shape if separate_dresidual else (0,), dtype=r.dtype, device=device)
    needed = (need_dweight, need_dbias, need_dx_bias)
    sums = [new(cols if wanted else 0, dtype=dtype, device=device) for wanted in needed]
    if not rows:
        return dx, dresidual, *sums

    dy, dy_stride = as_rows(dy)
    r, r_stride = as_rows(r)
    dr_out, dr_out_stride = (None, 0) if dr_out is None else as_rows(dr_out)
    rng, threshold, scale = dropout_constants(rng, dropout_p)
    inputs = (dy, dr_out, r, contiguous(weight), stats, rng, dx, dresidual if separate_dresidual else None)
    sizes = (rows, cols, dy_stride, dr_out_stride, r_stride, threshold, scale)
    constants = {"RMS": rms, "EIGHTS": eights(cols, dy_stride, dr_out_stride, r_stride)}
    outputs = [t if wanted else None for t, wanted in zip(sums, needed, strict=True)]
    tile = launch_for(BACKWARD, cols)
    if tile is not None and not (need_dx_bias and cols > BIASED_COLS):
        resident = BIASED_WARPS if need_dx_bias and tile.warps == 4 else RESIDENT_WARPS
        programs = min(triton.cdiv(rows, tile.block_m), persistent_programs(device, resident // tile.warps))
        # Triton 3.8 and 3.9 crash at this width on sm_90 if they compile dbias and dx_bias without dweight.
        with_dweight = need_dweight or (need_dbias and need_dx_bias and tile.block_n == 128)
        partials = [
            torch.empty((programs, cols), dtype=torch.float32, device=device) if wanted else None
            for wanted in (with_dweight, need_dbias, need_dx_bias)
        ]
        launch(
            norm_bwd_kernel, (programs,), device, *inputs, *partials, *sizes, BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n, **constants, **tile.options(),
        )  # fmt: skip
        if any(needed):
            add_up(partials, outputs)
        return dx, dresidual, *sums
    strip = STRIP._replace(block_n=INTERPRETED_STRIP_N) if INTERPRETED else STRIP
    launch(norm_bwd_wide_kernel, (rows,), device, *inputs, *sizes, BLOCK_N=WIDE.block_n, **constants, **WIDE.options())
    if any(needed):
        launch(
            norm_bwd_strip_kernel, (triton.cdiv(cols, strip.block_n),), device, dy, r, dx, stats, *outputs, rows, cols,
            dy_stride, r_stride, BLOCK_M=strip.block_m, BLOCK_N=strip.block_n, **constants, **strip.options(),
        )  # fmt: skip
    return dx, dresidual, *sums


register("norm_bwd", norm_bwd)
