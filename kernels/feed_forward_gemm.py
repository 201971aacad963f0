"""Products of the feed-forward block with the pass that follows them in the epilogue.

    forward     preact = x · w1ᵀ + b1,  hidden = act(preact) * keep * dropout_scale
    backward    dhidden = dy · w2,  dpreact = dhidden * keep * dropout_scale * act'(preact),  dbias = sum_rows(dpreact),
                and hidden again for the gradient of w2

Programs stay and walk over output tiles, GROUP_M of them below each other, so that a column of weights is read from the
cache. Forward: preact is rounded to its dtype before the activation, as the backward will see it; it is not written
where nobody wants it, which saves that memory too. Backward: dhidden is never written; each row of tiles stores one row
of fp32 sums for dbias, which a second kernel adds in order. The ungated form only: a gated one needs two products.

Which call runs here is a measured table, since the vendor's product may be faster than what the fusion saves
(`fuses`). Limits: fewer than 2^31 rows and columns. Tiles come through TMA descriptors on sm_90 and newer where
addresses and strides are multiples of 16 bytes, else through pointers.
Reference: fastattn.reference.feed_forward; the order of the tiles follows Triton's tutorial 03.
"""

import os

import torch
import triton
import triton.language as tl

from fastattn.kernels.attention_config import architecture
from fastattn.kernels.common import (
    INTERPRETED,
    VARYING,
    as_rows,
    dropout_constants,
    dropout_halfwords,
    launch,
    persistent_programs,
    register,
)  # fmt: skip
from fastattn.kernels.feed_forward import NAMES, _activation
from fastattn.kernels.feed_forward_table import TABLE
from fastattn.kernels.norm import add_up
from fastattn.ops import _gemm

GROUP_M = 2 if INTERPRETED else 8
# where it is forced and the table says nothing; the backward holds more of a tile at a time
DEFAULT = {"fwd": (128, 128, 64, 8, 3), "bwd": (128, 64, 64, 8, 3)}
INTERPRETED_ROW = (32, 32, 32, 4, 1)


@triton.jit
def _matrix(base, rows, cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """What _tile reads from: a descriptor, or the pointer."""
    if TMA:
        matrix = tl.make_tensor_descriptor(base, [rows, cols], [stride, 1], [ROWS, COLS])
    else:
        matrix = base
    return matrix


@triton.jit
def _tile(matrix, row, col, rows, cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """The tile that begins at (row, col), zeros outside of the matrix."""
    if TMA:
        tile = matrix.load([row, col])
    else:
        r = row + tl.arange(0, ROWS)
        c = col + tl.arange(0, COLS)
        pointers = matrix + r.to(tl.int64)[:, None] * stride + c[None, :]
        tile = tl.load(pointers, mask=(r < rows)[:, None] & (c < cols)[None, :], other=0.0)
    return tile


@triton.jit
def _product(
    a, w, row, col, rows, cols, depth, a_stride, w_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The tile at (row, col) of a (rows, depth) · w (depth, cols), in fp32; TRANSPOSED: w is (cols, depth)."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        left = _tile(a, row, k, rows, depth, a_stride, BLOCK_M, BLOCK_K, TMA)
        if TRANSPOSED:
            right = tl.trans(_tile(w, col, k, cols, depth, w_stride, BLOCK_N, BLOCK_K, TMA))
        else:
            right = _tile(w, k, col, depth, cols, w_stride, BLOCK_K, BLOCK_N, TMA)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(tile row, tile column): columns of GROUP_M tiles, one after the other."""
    in_group = GROUP_M * tiles_n
    first = tile // in_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % in_group % height, tile % in_group // height


@triton.jit
def _keep(rng_ptr, row, start_n, threshold, BLOCK_N: tl.constexpr):
    group = start_n // 8 + tl.arange(0, BLOCK_N // 8)
    return dropout_halfwords(rng_ptr, row, row >> 32, group) >= threshold


@triton.jit(do_not_specialize=VARYING)
def linear_activation_kernel(
    x_ptr, w_ptr, bias_ptr, rng_ptr, preact_ptr, hidden_ptr, rows, cols, depth, x_stride, w_stride, threshold, scale,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    x = _matrix(x_ptr, rows, depth, x_stride, BLOCK_M, BLOCK_K, TMA)
    w = _matrix(w_ptr, cols, depth, w_stride, BLOCK_N, BLOCK_K, TMA)
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(cols, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP_M)
        start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = _product(x, w, start_m, start_n, rows, cols, depth, x_stride, w_stride, BLOCK_M, BLOCK_N, BLOCK_K, True,
                       TMA)  # fmt: skip

        row = start_m.to(tl.int64) + tl.arange(0, BLOCK_M)
        col = start_n + tl.arange(0, BLOCK_N)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        offs = row[:, None] * cols + col[None, :]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
        preact = acc.to(hidden_ptr.dtype.element_ty)
        if preact_ptr is not None:
            tl.store(preact_ptr + offs, preact, mask=mask)
        hidden = _activation(preact.to(tl.float32), ACTIVATION)[0]
        if rng_ptr is not None:
            hidden = tl.where(_keep(rng_ptr, row, start_n, threshold, BLOCK_N), hidden * scale, 0.0)
        tl.store(hidden_ptr + offs, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def linear_activation_bwd_kernel(
    dy_ptr, w_ptr, preact_ptr, rng_ptr, dpreact_ptr, hidden_ptr, dbias_ptr, rows, cols, depth, dy_stride, w_stride,
    preact_stride, threshold, scale,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    dy = _matrix(dy_ptr, rows, depth, dy_stride, BLOCK_M, BLOCK_K, TMA)
    w = _matrix(w_ptr, depth, cols, w_stride, BLOCK_K, BLOCK_N, TMA)
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(cols, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP_M)
        start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        dact = _product(dy, w, start_m, start_n, rows, cols, depth, dy_stride, w_stride, BLOCK_M, BLOCK_N, BLOCK_K,
                        False, TMA)  # fmt: skip

        row = start_m.to(tl.int64) + tl.arange(0, BLOCK_M)
        col = start_n + tl.arange(0, BLOCK_N)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        offs = row[:, None] * cols + col[None, :]
        preact = tl.load(preact_ptr + row[:, None] * preact_stride + col[None, :], mask=mask, other=0.0)
        hidden, slope = _activation(preact.to(tl.float32), ACTIVATION)
        if rng_ptr is not None:
            keep = _keep(rng_ptr, row, start_n, threshold, BLOCK_N)
            dact = tl.where(keep, dact * scale, 0.0)
            hidden = tl.where(keep, hidden * scale, 0.0)
        if hidden_ptr is not None:
            tl.store(hidden_ptr + offs, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
        dpreact = dact * slope  # 0 in rows beyond the last one: their dy loads as 0
        tl.store(dpreact_ptr + offs, dpreact.to(dpreact_ptr.dtype.element_ty), mask=mask)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + tile_m.to(tl.int64) * cols + col, tl.sum(dpreact, axis=0), mask=col < cols)


FORCED = os.environ.get("FASTATTN_FUSED_GEMM") == "1"


def table_row(way, device, dtype, d_model, d_ff):
    """The measured row for "fwd" or "bwd" of such a block, or None."""
    return TABLE.get((architecture(device)[0], way, d_model, d_ff, dtype.itemsize))


def _row(way, *key):
    return table_row(way, *key) or (INTERPRETED_ROW if INTERPRETED else DEFAULT[way])


def fuses(way, device, dtype, d_model, d_ff):
    """Whether product and pass are one kernel: where the table has a row, everywhere with FASTATTN_FUSED_GEMM=1."""
    if FORCED:
        return device.type == "cpu" or dtype.itemsize == 2  # fp32 products of Triton are slow on every architecture
    return table_row(way, device, dtype, d_model, d_ff) is not None


def _launch(kernel, row, tensors, sizes, matrices, strides, threshold, scale, activation):
    device, dtype = matrices[0].device, matrices[0].dtype
    block_m, block_n, block_k, warps, stages = row
    unit = 16 // dtype.itemsize
    tma = architecture(device)[1] and all(
        m.data_ptr() % 16 == 0 and stride and stride % unit == 0 for m, stride in zip(matrices, strides, strict=False)
    )
    programs = min(triton.cdiv(sizes[0], block_m) * triton.cdiv(sizes[1], block_n), persistent_programs(device, 1))
    launch(
        kernel, (programs,), device, *tensors, *sizes, *strides, threshold, scale, ACTIVATION=NAMES[activation],
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=GROUP_M, TMA=tma, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def linear_activation_fwd(x, w, bias, rng, dropout_p, activation, need_preact):
    (rows, depth), cols = x.shape, w.shape[0]
    hidden = torch.empty((rows, cols), dtype=x.dtype, device=x.device)
    preact = torch.empty((rows, cols) if need_preact else (0,), dtype=x.dtype, device=x.device)
    x, x_stride = as_rows(x)
    w, w_stride = as_rows(w)
    rng, threshold, scale = dropout_constants(rng, dropout_p)
    bias = bias if bias is None else bias.contiguous()
    tensors = (x, w, bias, rng, preact if need_preact else None, hidden)
    if hidden.numel():
        row = _row("fwd", x.device, x.dtype, depth, cols)
        _launch(linear_activation_kernel, row, tensors, (rows, cols, depth), (x, w), (x_stride, w_stride), threshold,
                scale, activation)  # fmt: skip
    return preact, hidden


def linear_activation_bwd(dy, w, preact, rng, dropout_p, activation, need_hidden, need_dbias):
    (rows, depth), cols = dy.shape, w.shape[1]
    device, dtype = dy.device, dy.dtype
    dpreact = torch.empty((rows, cols), dtype=dtype, device=device)
    hidden = torch.empty((rows, cols) if need_hidden else (0,), dtype=dtype, device=device)
    dbias = (torch.empty if rows else torch.zeros)(cols if need_dbias else 0, dtype=dtype, device=device)
    if not dpreact.numel():
        return dpreact, hidden, dbias
    dy, dy_stride = as_rows(dy)
    w, w_stride = as_rows(w)
    preact, preact_stride = as_rows(preact)
    rng, threshold, scale = dropout_constants(rng, dropout_p)
    row = _row("bwd", device, dtype, depth, cols)
    tiles_m = triton.cdiv(rows, row[0])
    partial = torch.empty((tiles_m, cols), dtype=torch.float32, device=device) if need_dbias else None
    tensors = (dy, w, preact, rng, dpreact, hidden if need_hidden else None, partial)
    _launch(linear_activation_bwd_kernel, row, tensors, (rows, cols, depth), (dy, w),
            (dy_stride, w_stride, preact_stride), threshold, scale, activation)  # fmt: skip
    if need_dbias:
        add_up((partial, None, None), (dbias, None, None))
    return dpreact, hidden, dbias


register("linear_activation_fwd", linear_activation_fwd)
register("linear_activation_bwd", linear_activation_bwd)
if TABLE or FORCED:
    _gemm.set_fused(fuses)
