"""Gradient of an attention bias that is broadcast: ds of the backward, summed over the broadcast dimensions.

A program owns a tile of dbias. It recomputes the scores of all batch entries, heads, rows and columns that share the
tile, and sums in fp32 registers. If that gives too few programs, the sum is divided into parts, which are added in
order. So equal inputs give equal bits without atomics. Besides dbias, the kernel needs memory of at most a quarter of
q, never a score matrix. The price is two more matrix products per tile of scores.
"""

import math

import torch
import triton
import triton.language as tl

from fastattn.kernels.attention_call import UNSPECIALIZED
from fastattn.kernels.attention_frame import (
    find_head,
    key_blocks,
    locate,
    query_side,
    side_of,
)
from fastattn.kernels.attention_tile import (
    load_softmax,
    load_tile,
    score_gradient,
    zeros,
)
from fastattn.kernels.common import launch

# Sizes of the tile grid and of the sum. One binary serves all values, as for UNSPECIALIZED.
COUNTS = ["bias_batch", "bias_heads", "bias_rows", "sum_heads", "sum_rows", "sum_cols", "tile_rows", "tile_cols",
          "n_terms", "chunk"]  # fmt: skip


@triton.jit(do_not_specialize=[*UNSPECIALIZED, *COUNTS])
def attention_dbias_kernel(q, k, v, do, dbias_ptr, softmax, features, n_heads, group, total_q, total_k, bias_batch,
                           bias_heads, bias_rows, bias_cols, sum_heads, sum_rows, sum_cols, tile_rows, tile_cols,
                           n_terms, chunk, window_left, window_right, threshold, form: tl.constexpr, ROW: tl.constexpr,
                           COLUMN: tl.constexpr):  # fmt: skip
    """Compute a tile of dbias (parts, *bias.shape), which is contiguous.

    The terms of the sum have the indices (batch, head, row block, column block). sum_* is the number of terms in each
    of these dimensions: 1 unless the bias is broadcast there. ROW, COLUMN: the bias has one row, one column."""
    pid = tl.program_id(0).to(tl.int64)
    tile_n = (pid % tile_cols).to(tl.int32)
    tile_m = (pid // tile_cols % tile_rows).to(tl.int32)
    own_head = pid // tile_cols // tile_rows % bias_heads
    own_batch = pid // tile_cols // tile_rows // bias_heads % bias_batch
    part = (pid // tile_cols // tile_rows // bias_heads // bias_batch).to(tl.int32)

    acc = zeros(form.BLOCK_M, form.BLOCK_N)
    for term in range(part * chunk, tl.minimum((part + 1) * chunk, n_terms)):
        start_n = (tile_n + term % sum_cols) * form.BLOCK_N
        start_m = (tile_m + term // sum_cols % sum_rows) * form.BLOCK_M
        q_head = own_head + term // sum_cols // sum_rows % sum_heads
        batch = own_batch + term // sum_cols // sum_rows // sum_heads
        span = locate(batch, batch >= 0, features, total_q, total_k, window_left, window_right, form, False)
        seen = key_blocks(start_m, form.BLOCK_M, span, form)
        if (start_n >= seen.first * form.BLOCK_N) & (start_n < seen.end * form.BLOCK_N):
            head = find_head(q_head, span, features, n_heads, threshold)
            q_side = query_side(q, q_head, span, form.HEAD_DIM, form.BLOCK_D, form.BLOCK_M, False)
            do_side = query_side(do, q_head, span, form.HEAD_DIM_V, form.BLOCK_DV, form.BLOCK_M, False)
            k_side = side_of(k, batch, q_head // group, span.first_k, 0, span.length_k, form.HEAD_DIM, form.BLOCK_D,
                             form.BLOCK_N, False)  # fmt: skip
            v_side = side_of(v, batch, q_head // group, span.first_k, 0, span.length_k, form.HEAD_DIM_V, form.BLOCK_DV,
                             form.BLOCK_N, False)  # fmt: skip
            q_tile = load_tile(q_side, start_m, form.HEAD_DIM, form.BLOCK_D, form.BLOCK_M, True, False)
            do_tile = load_tile(do_side, start_m, form.HEAD_DIM_V, form.BLOCK_DV, form.BLOCK_M, True, False)
            k_tile = load_tile(k_side, start_n, form.HEAD_DIM, form.BLOCK_D, form.BLOCK_N, True, False)
            v_tile = load_tile(v_side, start_n, form.HEAD_DIM_V, form.BLOCK_DV, form.BLOCK_N, True, False)
            offs_m = start_m + tl.arange(0, form.BLOCK_M)
            rows = load_softmax(softmax, (batch * n_heads + q_head) * total_q, offs_m, span.seqlen_q, form)
            ds, _capped, _visible = score_gradient(
                q_tile, k_tile, v_tile, do_tile, rows, start_m, start_n, span, head, features, form, True
            )
            acc += ds

    dbias_ptr += ((part * bias_batch + own_batch) * bias_heads + own_head) * bias_rows * bias_cols
    rows = (tile_m * form.BLOCK_M + tl.arange(0, form.BLOCK_M)).to(tl.int64)
    cols = tile_n * form.BLOCK_N + tl.arange(0, form.BLOCK_N)
    if ROW and COLUMN:
        tl.store(dbias_ptr, tl.sum(acc).to(dbias_ptr.dtype.element_ty))
    elif ROW:
        tl.store(dbias_ptr + cols, tl.sum(acc, 0).to(dbias_ptr.dtype.element_ty), mask=cols < bias_cols)
    elif COLUMN:
        tl.store(dbias_ptr + rows, tl.sum(acc, 1).to(dbias_ptr.dtype.element_ty), mask=rows < bias_rows)
    else:
        tl.store(dbias_ptr + rows[:, None] * bias_cols + cols[None, :], acc.to(dbias_ptr.dtype.element_ty),
                 mask=(rows < bias_rows)[:, None] & (cols < bias_cols)[None, :])  # fmt: skip


_PROGRAMS = 512  # the programs of attention_dbias_kernel that keep a large GPU busy


def attention_dbias(plan, inputs, softmax, features):
    """Compute dbias of a bias that is broadcast over at least one dimension."""
    q, bias = inputs[0].ptr, features.bias.ptr
    start = plan.start("dbias")
    n_heads, _, total_q, total_k = plan.sizes
    full, blocks = (plan.batch, n_heads, total_q, total_k), (1, 1, start.form.BLOCK_M, start.form.BLOCK_N)
    tiles = [triton.cdiv(size, block) for size, block in zip(bias.shape, blocks, strict=True)]
    terms = [
        triton.cdiv(whole, block) if size == 1 else 1
        for size, whole, block in zip(bias.shape, full, blocks, strict=True)
    ]
    n_tiles, n_terms = math.prod(tiles), math.prod(terms)
    if n_tiles == 0 or n_terms == 0:
        return torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
    # The fp32 partial sums take at most a quarter of the memory of q.
    room = q.numel() * q.element_size() // (16 * bias.numel())
    chunk = triton.cdiv(n_terms, max(1, min(n_terms, triton.cdiv(_PROGRAMS, n_tiles), room)))
    chunks = triton.cdiv(n_terms, chunk)
    dbias = bias.new_empty((chunks, *bias.shape), dtype=torch.float32 if chunks > 1 else bias.dtype)
    launch(
        attention_dbias_kernel, (chunks * n_tiles,), q.device, *inputs, dbias, softmax, features, *plan.sizes,
        *bias.shape, *terms[1:], *tiles[2:], n_terms, chunk, *plan.window, start.form, ROW=bias.shape[2] == 1,
        COLUMN=bias.shape[3] == 1, **start.options,
    )  # fmt: skip
    return dbias.squeeze(0) if chunks == 1 else dbias.sum(0).to(bias.dtype)
