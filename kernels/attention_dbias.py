"""Gradient of an attention bias that broadcasts: ds of the backward, summed over the broadcast dimensions.

A program owns a tile of dbias and computes the scores of all batch entries, heads, rows and columns that share it once
more, summing in fp32 registers. Where that gives too few programs the sum is cut into chunks, whose partial sums are
added in order. So equal inputs give equal bits without atomics, in the memory of dbias and at most a quarter of q:
never a score matrix. The price is two more matrix products per tile of scores.
"""

import math

import torch
import triton
import triton.language as tl

from fastattn.kernels.attention import UNSPECIALIZED, key_blocks, load_tile, locate, score_gradient
from fastattn.kernels.common import launch


@triton.jit(
    do_not_specialize=[
        *UNSPECIALIZED, "bias_batch", "bias_heads", "bias_rows", "sum_heads", "sum_rows", "sum_cols", "tile_rows",
        "tile_cols", "n_terms", "chunk",
    ]
)  # fmt: skip
def attention_dbias(q, k, v, do, high, low, delta, dbias, bias, sink, mask, seqlens_k, cu_seqlens_q, cu_seqlens_k,
                    slopes, rng, q_strides, k_strides, v_strides, do_strides, bias_strides, mask_strides, slopes_stride,
                    n_heads, group, total_q, total_k, bias_batch, bias_heads, bias_rows, bias_cols, sum_heads, sum_rows,
                    sum_cols, tile_rows, tile_cols, n_terms, chunk, window_left, window_right, softcap, scale,
                    threshold, rescale, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
                    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr,
                    HAS_RIGHT: tl.constexpr, TOP_LEFT: tl.constexpr, SOFTCAP: tl.constexpr, ROW: tl.constexpr,
                    COLUMN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dbias (chunks, *bias.shape) contiguous. The terms of the sum are numbered (batch, head, row block, column block),
    sum_* of each that the bias broadcasts over, else 1; ROW, COLUMN: the bias has one row, one column for all."""
    ALIBI: tl.constexpr = slopes is not None
    pid = tl.program_id(0).to(tl.int64)
    tile_n = (pid % tile_cols).to(tl.int32)
    tile_m = (pid // tile_cols % tile_rows).to(tl.int32)
    own_head = pid // tile_cols // tile_rows % bias_heads
    own_batch = pid // tile_cols // tile_rows // bias_heads % bias_batch
    split = (pid // tile_cols // tile_rows // bias_heads // bias_batch).to(tl.int32)
    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for term in range(split * chunk, tl.minimum((split + 1) * chunk, n_terms)):
        start_n = (tile_n + term % sum_cols) * BLOCK_N
        start_m = (tile_m + term // sum_cols % sum_rows) * BLOCK_M
        head = own_head + term // sum_cols // sum_rows % sum_heads
        batch = own_batch + term // sum_cols // sum_rows // sum_heads
        _index, _first_q, _first_k, seqlen_q, _seqlen_k, length_k, off = locate(
            batch, True, cu_seqlens_q, cu_seqlens_k, seqlens_k, total_q, total_k, TOP_LEFT, False
        )
        first, _first_full, _end_full, end = key_blocks(
            start_m, BLOCK_M, BLOCK_N, seqlen_q, length_k, off, window_left, window_right, HAS_LEFT, HAS_RIGHT
        )
        if (start_n >= first * BLOCK_N) & (start_n < end * BLOCK_N):
            q_base = q + batch * q_strides[0] + head * q_strides[1]
            do_base = do + batch * do_strides[0] + head * do_strides[1]
            k_base = k + batch * k_strides[0] + head // group * k_strides[1]
            v_base = v + batch * v_strides[0] + head // group * v_strides[1]
            q_tile = load_tile(q_base, q_strides[2], start_m, local_m, 0, seqlen_q, HEAD_DIM, BLOCK_D, True, False)
            do_tile = load_tile(do_base, do_strides[2], start_m, local_m, 0, seqlen_q, HEAD_DIM_V, BLOCK_DV, True,
                                False)  # fmt: skip
            k_tile = load_tile(k_base, k_strides[2], start_n, local_n, 0, length_k, HEAD_DIM, BLOCK_D, True, False)
            v_tile = load_tile(v_base, v_strides[2], start_n, local_n, 0, length_k, HEAD_DIM_V, BLOCK_DV, True, False)
            rows = start_m + local_m
            row = (batch * n_heads + head) * total_q + rows
            row_high = tl.load(high + row, mask=rows < seqlen_q, other=float("inf"))
            row_low = tl.load(low + row, mask=rows < seqlen_q, other=0.0)
            row_delta = tl.load(delta + row, mask=rows < seqlen_q, other=0.0)
            head_mask = mask
            if mask is not None:
                head_mask = mask + batch * mask_strides[0] + head * mask_strides[1]
            slope = 0.0
            if ALIBI:
                slope = tl.load(slopes + batch * slopes_stride + head)
            slab = (batch * n_heads + head).to(tl.int32)
            ds, _capped, _visible = score_gradient(
                q_tile, k_tile, v_tile, do_tile, row_high, row_low, row_delta, rows[:, None],
                (start_n + local_n)[None, :], start_m, start_n, off, seqlen_q, length_k, window_left, window_right,
                scale, softcap, bias + batch * bias_strides[0] + head * bias_strides[1], bias_strides, head_mask,
                mask_strides, slope, rng, slab, threshold, rescale, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, SOFTCAP,
                ALIBI, True, PRECISION, True,
            )  # fmt: skip
            acc += ds

    dbias += ((split * bias_batch + own_batch) * bias_heads + own_head) * bias_rows * bias_cols
    rows = (tile_m * BLOCK_M + local_m).to(tl.int64)
    cols = tile_n * BLOCK_N + local_n
    if ROW and COLUMN:
        tl.store(dbias, tl.sum(acc).to(dbias.dtype.element_ty))
    elif ROW:
        tl.store(dbias + cols, tl.sum(acc, 0).to(dbias.dtype.element_ty), mask=cols < bias_cols)
    elif COLUMN:
        tl.store(dbias + rows, tl.sum(acc, 1).to(dbias.dtype.element_ty), mask=rows < bias_rows)
    else:
        tl.store(dbias + rows[:, None] * bias_cols + cols[None, :], acc.to(dbias.dtype.element_ty),
                 mask=(rows < bias_rows)[:, None] & (cols < bias_cols)[None, :])  # fmt: skip


_PROGRAMS = 512  # of attention_dbias: as many as keep a large GPU busy


def launch_dbias(plan, inputs, features, strides):
    """dbias of a bias that broadcasts over at least one dimension."""
    q, bias = inputs[0], features[0]
    _, _, constants, _ = plan.launch("dbias")
    full = (plan.batch, plan.n_heads, plan.total_q, plan.total_k)
    blocks = (1, 1, constants["BLOCK_M"], constants["BLOCK_N"])
    tiles = [triton.cdiv(size, block) for size, block in zip(bias.shape, blocks, strict=True)]
    terms = [
        triton.cdiv(whole, block) if size == 1 else 1
        for size, whole, block in zip(bias.shape, full, blocks, strict=True)
    ]
    n_tiles, n_terms = math.prod(tiles), math.prod(terms)
    if n_tiles == 0 or n_terms == 0:
        return torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
    room = q.numel() * q.element_size() // (16 * bias.numel())  # partial sums in fp32 take at most a quarter of q
    chunk = triton.cdiv(n_terms, max(1, min(n_terms, triton.cdiv(_PROGRAMS, n_tiles), room)))
    chunks = triton.cdiv(n_terms, chunk)
    dbias = bias.new_empty((chunks, *bias.shape), dtype=torch.float32 if chunks > 1 else bias.dtype)
    launch(
        attention_dbias, (chunks * n_tiles,), q.device, *inputs, dbias, *features, *strides, *plan.feature_strides,
        plan.n_heads, plan.group, plan.total_q, plan.total_k, *bias.shape, *terms[1:], *tiles[2:], n_terms, chunk,
        *plan.numbers, ROW=bias.shape[2] == 1, COLUMN=bias.shape[3] == 1, **constants,
    )  # fmt: skip
    return dbias[0] if chunks == 1 else dbias.sum(0).to(bias.dtype)
