"""Dropout with the residual add: out = keep * dropout_scale * x + residual, in the dtype of the residual, or of x.

A program owns a tile of BLOCK_M rows and BLOCK_N columns. Nothing is saved: the backward is the same kernel without a
residual. Limits: fewer than 2^31 columns. Reference: fastattn.reference.dropout.
"""

import torch
import triton
import triton.language as tl

from fastattn.kernels.common import (
    VARYING,
    Launch,
    as_rows,
    dropout_constants,
    dropout_rows,
    eights,
    in_eights,
    launch,
    launch_for,
    register,
)

# By width. Wider rows are divided into tiles of the last entry.
TABLE = (Launch(32, 64, 4), Launch(16, 128, 4), Launch(8, 256, 4), Launch(4, 512, 4), Launch(2, 1024, 4))


@triton.jit(do_not_specialize=VARYING)
def dropout_fwd_kernel(
    x_ptr, residual_ptr, rng_ptr, out_ptr, rows, cols, x_stride, residual_stride, threshold, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EIGHTS: tl.constexpr = False,
):  # fmt: skip
    cols = in_eights(cols, EIGHTS)
    x_stride = in_eights(x_stride, EIGHTS)
    residual_stride = in_eights(residual_stride, EIGHTS)
    column_tiles = tl.cdiv(cols, BLOCK_N)
    tile = tl.program_id(0)
    row = (tile // column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = (tile % column_tiles) * BLOCK_N
    col = start + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (col < cols)[None, :]

    out = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if rng_ptr is not None:
        out = dropout_rows(out, rng_ptr, threshold, scale, row, start, BLOCK_N)
    if residual_ptr is not None:
        offs = row[:, None] * residual_stride + col[None, :]
        out += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row[:, None] * cols + col[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def dropout_fwd(x, residual, rng, dropout_p):
    out = torch.empty(x.shape, dtype=x.dtype if residual is None else residual.dtype, device=x.device)
    if not out.numel():
        return out
    cols = x.shape[-1]
    rows = x.numel() // cols
    x, x_stride = as_rows(x)
    residual, residual_stride = (None, 0) if residual is None else as_rows(residual)
    rng, threshold, scale = dropout_constants(rng, dropout_p)
    tile = launch_for(TABLE, cols) or TABLE[-1]
    grid = (triton.cdiv(rows, tile.block_m) * triton.cdiv(cols, tile.block_n),)
    launch(
        dropout_fwd_kernel, grid, x.device, x, residual, rng, out, rows, cols, x_stride, residual_stride, threshold,
        scale, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, EIGHTS=eights(cols, x_stride, residual_stride),
        **tile.options(),
    )  # fmt: skip
    return out


register("dropout_fwd", dropout_fwd)
