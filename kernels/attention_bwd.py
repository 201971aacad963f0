"""Attention backward: kernels without atomics, so that equal inputs give equal bits.

    delta = rowsum(do ∘ out) - dlse, lse = high + low   attention_preprocess: a block of rows of one head
    p  = exp(s - lse),  pd = p ∘ keep * dropout_scale
    dp = keep * dropout_scale ∘ (do·vᵀ),  ds = p ∘ (dp - delta),  dsr = ds * (1 - (s_capped / softcap)²)
    dv = pdᵀ·do,  dk = scale * dsrᵀ·q                   attention_dkdv: a block of keys of one head of k
    dq = scale * dsr·k                                  attention_dq: a block of queries of one head
    dbias = ds summed over the broadcast dims           attention_dq if there are none, else attention_dbias.py
    dsink[h] = -sum exp(sink - lse) * delta             attention_preprocess, one partial sum a program

The scores are computed twice, in attention_dkdv (transposed, so that p and ds are left operands without a shuffle) and
in attention_dq; in return no gradient needs a buffer in fp32 and the order of every sum is fixed.

Limits and features as in the forward. Reference: Dao, "FlashAttention-2", 2023, algorithm 2.
"""

import torch
import triton
import triton.language as tl

from fastattn.kernels.attention import (
    UNSPECIALIZED,
    descriptors_fit,
    find_tile,
    keep_tile,
    key_blocks,
    load_tile,
    locate,
    prepare,
    probability,
    score_gradient,
    tile_scores,
    tile_source,
    visible_tile,
)
from fastattn.kernels.attention_config import PREPROCESS
from fastattn.kernels.attention_dbias import launch_dbias
from fastattn.kernels.common import LOG2_E, contiguous, launch, register, unit_stride


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_preprocess(out, do, lse, lse_low, dlse, sink, delta, high, low, dsink, out_strides, do_strides, n_heads,
                         total_q, blocks_m, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr,
                         BLOCK_M: tl.constexpr):  # fmt: skip
    """Packed sequences are rows like any other here. lse comes in one part or two, and goes on as the other kernels
    subtract it: `high` +inf where a row saw nothing, `low` times log2(e); without `low`, `high` is all times log2(e).
    A row that saw nothing has no part in dsink, whatever stands in do. Rows behind the last packed sequence are such.
    """
    pid = tl.program_id(0)
    batch = (pid // blocks_m // n_heads).to(tl.int64)
    head = (pid // blocks_m % n_heads).to(tl.int64)
    offs_m = pid % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_DV)
    inside = offs_m < total_q
    tile = inside[:, None] & (offs_d < HEAD_DIM_V)[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    out += batch * out_strides[0] + head * out_strides[1]
    do += batch * do_strides[0] + head * do_strides[1]
    out_tile = tl.load(out + rows * out_strides[2] + offs_d[None, :], mask=tile, other=0.0).to(tl.float32)
    do_tile = tl.load(do + rows * do_strides[2] + offs_d[None, :], mask=tile, other=0.0).to(tl.float32)
    row = (batch * n_heads + head) * total_q + offs_m
    d = tl.sum(out_tile * do_tile, 1)
    if dlse is not None:
        d -= tl.load(dlse + row, mask=inside, other=0.0)
    row_lse = tl.load(lse + row, mask=inside, other=float("-inf"))
    empty = row_lse == float("-inf")
    row_lse = tl.where(empty, float("inf"), row_lse)
    row_low = tl.zeros([BLOCK_M], tl.float32)
    if lse_low is not None:
        row_low = tl.load(lse_low + row, mask=inside, other=0.0) * LOG2_E
    tl.store(delta + row, d, mask=inside)
    if low is not None:
        tl.store(high + row, row_lse, mask=inside)
        tl.store(low + row, row_low, mask=inside)
    else:  # finite below: a row may have nothing but a sink near -FLT_MAX
        tl.store(high + row, tl.maximum(row_lse * LOG2_E, -3e38), mask=inside)
    if sink is not None:
        share = tl.exp2((tl.load(sink + head) - row_lse) * LOG2_E - row_low)
        tl.store(dsink + (batch * blocks_m + pid % blocks_m) * n_heads + head,
                 -tl.sum(tl.where(empty, 0.0, share * d)))  # fmt: skip


@triton.jit
def query_blocks(start_n, BLOCK_M, BLOCK_N, seqlen_q, length_k, off, window_left, window_right, HAS_LEFT, HAS_RIGHT):
    """Blocks of queries that see keys start_n..: (first, first full, end of full, end); "full" sees every key."""
    end_n = tl.minimum(start_n + BLOCK_N, length_k)
    low = 0
    high = tl.where(end_n > start_n, seqlen_q, 0)
    full_low = 0
    full_high = seqlen_q
    if HAS_RIGHT:
        low = tl.minimum(tl.maximum(start_n - off - window_right, 0), seqlen_q)
        full_low = tl.maximum(end_n - 1 - off - window_right, 0)
    if HAS_LEFT:
        high = tl.minimum(high, tl.maximum(end_n - off + window_left, 0))
        full_high = tl.maximum(tl.minimum(seqlen_q, start_n - off + window_left + 1), 0)
    first = low // BLOCK_M
    end = tl.maximum((high + BLOCK_M - 1) // BLOCK_M, first)
    first_full = tl.minimum(tl.maximum((full_low + BLOCK_M - 1) // BLOCK_M, first), end)
    end_full = tl.minimum(tl.maximum(full_high // BLOCK_M, first_full), end)
    return first, first_full, end_full, end


@triton.jit
def _dkdv_blocks(dk, dv, k, v, q_src, do_src, stride_q, stride_do, high, low, delta, first, end, split, gap, start_n,
                 offs_n, off, seqlen_q, length_k, window_left, window_right, scale, softcap, bias, bias_strides, mask,
                 mask_strides, slope, rng, slab, threshold, rescale, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
                 BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
                 NATURAL: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    MASKED: tl.constexpr = EDGE or mask is not None
    for block in range(first, end):
        start_m = block * BLOCK_M
        if EDGE:
            start_m = tl.where(block < split, block, block + gap) * BLOCK_M
        start_m = tl.multiple_of(start_m, BLOCK_M)
        offs_m = tl.arange(0, BLOCK_M)
        q = load_tile(q_src, stride_q, start_m, offs_m, 0, seqlen_q, HEAD_DIM, BLOCK_D, EDGE, TMA)
        do = load_tile(do_src, stride_do, start_m, offs_m, 0, seqlen_q, HEAD_DIM_V, BLOCK_DV, EDGE, TMA)
        rows = start_m + offs_m
        row_high = tl.load(high + rows, mask=rows < seqlen_q, other=float("inf"))  # +inf: rows past the end give p = 0
        row_low = row_high
        if NATURAL:
            row_low = tl.load(low + rows, mask=rows < seqlen_q, other=0.0)
        row_delta = tl.load(delta + rows, mask=rows < seqlen_q, other=0.0)

        # everything transposed: keys are rows
        i = rows[None, :]
        j = offs_n[:, None]
        qk = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        s, capped = tile_scores(qk, i, j, off, seqlen_q, length_k, scale, softcap, bias, bias_strides, slope, SOFTCAP,
                                ALIBI, NATURAL)  # fmt: skip
        visible = visible_tile(i, j, off, seqlen_q, length_k, window_left, window_right, mask, mask_strides, HAS_LEFT,
                               HAS_RIGHT, EDGE)  # fmt: skip
        if MASKED:
            s = tl.where(visible, s, float("-inf"))
        p = probability(s, row_high[None, :], row_low[None, :], NATURAL)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        pd = p
        if rng is not None:
            keep = tl.trans(keep_tile(rng, slab, start_m, start_n, threshold, BLOCK_M, BLOCK_N))
            pd = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * rescale, 0.0)
        dv = tl.dot(pd.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (dp - row_delta[None, :])
        if SOFTCAP:
            ds *= 1 - capped * capped
        if MASKED:  # p = 0 alone would let a NaN of an unseen key through
            ds = tl.where(visible, ds, 0.0)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_dkdv(q, k, v, do, high, low, delta, dk, dv, bias, sink, mask, seqlens_k, cu_seqlens_q, cu_seqlens_k,
                   slopes, rng, q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides, bias_strides,
                   mask_strides, slopes_stride, n_heads, total_q, total_k, blocks_n, window_left, window_right, softcap,
                   scale, threshold, rescale, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, TOP_LEFT: tl.constexpr, SOFTCAP: tl.constexpr,
                   TMA: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    ALIBI: tl.constexpr = slopes is not None
    NATURAL: tl.constexpr = low is not None
    pid = tl.program_id(0)
    n_kv_heads = n_heads // GROUP
    batch = (pid // blocks_n // n_kv_heads).to(tl.int64)
    head_k = (pid // blocks_n % n_kv_heads).to(tl.int64)
    pid_n = pid % blocks_n  # ascending is right for causal: the first keys are seen by the most queries
    within = True
    if cu_seqlens_k is not None:
        batch, pid_n, within = find_tile(cu_seqlens_k, blocks_n, total_k, pid_n, BLOCK_N)
    index, first_q, first_k, seqlen_q, seqlen_k, length_k, off = locate(
        batch, within, cu_seqlens_q, cu_seqlens_k, seqlens_k, total_q, total_k, TOP_LEFT, True
    )
    start_n = pid_n * BLOCK_N
    if start_n >= seqlen_k:
        return
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k += index * k_strides[0] + head_k * k_strides[1] + first_k * k_strides[2]
    v += index * v_strides[0] + head_k * v_strides[1] + first_k * v_strides[2]
    k_tile = load_tile(k, k_strides[2], start_n, tl.arange(0, BLOCK_N), 0, length_k, HEAD_DIM, BLOCK_D, True, False)
    v_tile = load_tile(v, v_strides[2], start_n, tl.arange(0, BLOCK_N), 0, length_k, HEAD_DIM_V, BLOCK_DV, True, False)
    first, first_full, end_full, end = query_blocks(
        start_n, BLOCK_M, BLOCK_N, seqlen_q, length_k, off, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    gap = end_full - first_full

    # the query heads that share these keys, one after the other
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(GROUP):
        head = head_k * GROUP + member
        q_base = q + index * q_strides[0] + head * q_strides[1] + first_q * q_strides[2]
        do_base = do + index * do_strides[0] + head * do_strides[1] + first_q * do_strides[2]
        q_src = tile_source(q_base, q_strides[2], seqlen_q, HEAD_DIM, BLOCK_M, BLOCK_D, TMA)
        do_src = tile_source(do_base, do_strides[2], seqlen_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, TMA)
        row = (index * n_heads + head) * total_q + first_q
        head_low = low
        if NATURAL:
            head_low = low + row
        head_bias = bias
        if bias is not None:
            head_bias = bias + batch * bias_strides[0] + head * bias_strides[1]
        head_mask = mask
        if mask is not None:
            head_mask = mask + batch * mask_strides[0] + head * mask_strides[1]
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + batch * slopes_stride + head, mask=within, other=0.0)
        slab = (batch * n_heads + head).to(tl.int32)
        dk_acc, dv_acc = _dkdv_blocks(
            dk_acc, dv_acc, k_tile, v_tile, q_src, do_src, q_strides[2], do_strides[2], high + row, head_low,
            delta + row, first, end - gap, first_full, gap, start_n, offs_n, off, seqlen_q, length_k, window_left,
            window_right, scale, softcap, head_bias, bias_strides, head_mask, mask_strides, slope, rng, slab, threshold,
            rescale, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI,
            NATURAL, TMA, PRECISION, EDGE=True,
        )  # fmt: skip
        dk_acc, dv_acc = _dkdv_blocks(
            dk_acc, dv_acc, k_tile, v_tile, q_src, do_src, q_strides[2], do_strides[2], high + row, head_low,
            delta + row, first_full, end_full, 0, 0, start_n, offs_n, off, seqlen_q, length_k, window_left,
            window_right, scale, softcap, head_bias, bias_strides, head_mask, mask_strides, slope, rng, slab, threshold,
            rescale, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI,
            NATURAL, TMA, PRECISION, EDGE=False,
        )  # fmt: skip

    # keys past seqlens_k have gradient 0; whatever their rows accumulated is not theirs
    seen = (offs_n < length_k)[:, None]
    dk_acc = tl.where(seen, dk_acc * scale, 0.0)
    dv_acc = tl.where(seen, dv_acc * rescale, 0.0)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = offs_n.to(tl.int64)[:, None]
    inside = (offs_n < seqlen_k)[:, None]
    dk += index * dk_strides[0] + head_k * dk_strides[1] + first_k * dk_strides[2]
    dv += index * dv_strides[0] + head_k * dv_strides[1] + first_k * dv_strides[2]
    tl.store(dk + rows * dk_strides[2] + offs_d[None, :], dk_acc.to(dk.dtype.element_ty),
             mask=inside & (offs_d < HEAD_DIM)[None, :])  # fmt: skip
    tl.store(dv + rows * dv_strides[2] + offs_dv[None, :], dv_acc.to(dv.dtype.element_ty),
             mask=inside & (offs_dv < HEAD_DIM_V)[None, :])  # fmt: skip


@triton.jit
def _dq_blocks(dq, q, do, row_high, row_low, row_delta, k_src, v_src, stride_k, stride_v, first, end, split, gap,
               start_m, offs_m, off, seqlen_q, length_k, begin_k, end_k, window_left, window_right, scale, softcap,
               bias, bias_strides, dbias, dbias_strides, mask, mask_strides, slope, rng, slab, threshold, rescale,
               HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
               SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, NATURAL: tl.constexpr, TMA: tl.constexpr,
               PRECISION: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    offs_n = tl.arange(0, BLOCK_N)
    for block in range(first, end):
        start_n = block * BLOCK_N
        if EDGE and HAS_LEFT:
            start_n = tl.where(block < split, block, block + gap) * BLOCK_N
        start_n = tl.multiple_of(start_n, BLOCK_N)
        i = offs_m[:, None]
        j = (start_n + offs_n)[None, :]
        k = load_tile(k_src, stride_k, start_n, offs_n, begin_k, end_k, HEAD_DIM, BLOCK_D, EDGE, TMA)
        v = load_tile(v_src, stride_v, start_n, offs_n, begin_k, end_k, HEAD_DIM_V, BLOCK_DV, EDGE, TMA)
        ds, capped, visible = score_gradient(
            q, k, v, do, row_high, row_low, row_delta, i, j, start_m, start_n, off, seqlen_q, length_k, window_left,
            window_right, scale, softcap, bias, bias_strides, mask, mask_strides, slope, rng, slab, threshold,
            rescale, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, NATURAL, PRECISION, EDGE,
        )  # fmt: skip
        if dbias is not None:
            pointers = dbias + i.to(tl.int64) * dbias_strides[2] + j.to(tl.int64) * dbias_strides[3]
            tl.store(pointers, ds.to(dbias.dtype.element_ty), mask=(i < seqlen_q) & (j < length_k))
        if SOFTCAP:
            ds *= 1 - capped * capped
        if mask is not None:  # an unseen key may hold NaN: neither its score nor its row may count
            ds = tl.where(visible, ds, 0.0)
            seen = tl.max(visible.to(tl.int32), 0) > 0
            k = tl.where(seen[:, None], k, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_dq(q, k, v, do, high, low, delta, dq, dbias, bias, sink, mask, seqlens_k, cu_seqlens_q, cu_seqlens_k,
                 slopes, rng, q_strides, k_strides, v_strides, do_strides, dq_strides, dbias_strides, bias_strides,
                 mask_strides, slopes_stride, n_heads, group, total_q, total_k, blocks_m, window_left, window_right,
                 softcap, scale, threshold, rescale, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
                 BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, TOP_LEFT: tl.constexpr, SOFTCAP: tl.constexpr,
                 TMA: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    ALIBI: tl.constexpr = slopes is not None
    NATURAL: tl.constexpr = low is not None
    pid = tl.program_id(0)
    pid_m = pid % blocks_m
    if HAS_RIGHT:
        pid_m = blocks_m - 1 - pid_m
    batch = (pid // blocks_m // n_heads).to(tl.int64)
    head = (pid // blocks_m % n_heads).to(tl.int64)
    within = True
    if cu_seqlens_q is not None:
        batch, pid_m, within = find_tile(cu_seqlens_q, blocks_m, total_q, pid_m, BLOCK_M)
    index, first_q, first_k, seqlen_q, _, length_k, off = locate(
        batch, within, cu_seqlens_q, cu_seqlens_k, seqlens_k, total_q, total_k, TOP_LEFT, False
    )
    start_m = pid_m * BLOCK_M
    if start_m >= seqlen_q:
        return
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q += index * q_strides[0] + head * q_strides[1] + first_q * q_strides[2]
    do += index * do_strides[0] + head * do_strides[1] + first_q * do_strides[2]
    k += index * k_strides[0] + head // group * k_strides[1] + first_k * k_strides[2]
    v += index * v_strides[0] + head // group * v_strides[1] + first_k * v_strides[2]
    if bias is not None:
        bias += batch * bias_strides[0] + head * bias_strides[1]
    if dbias is not None:
        dbias += batch * dbias_strides[0] + head * dbias_strides[1]
    if mask is not None:
        mask += batch * mask_strides[0] + head * mask_strides[1]
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + batch * slopes_stride + head, mask=within, other=0.0)
    slab = (batch * n_heads + head).to(tl.int32)
    begin_k = 0
    end_k = length_k
    if HAS_LEFT:
        begin_k = off - window_left
    if HAS_RIGHT:
        end_k = tl.minimum(length_k, seqlen_q + off + window_right)
    k_src = tile_source(k, k_strides[2], end_k, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
    v_src = tile_source(v, v_strides[2], end_k, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA)
    local_m = tl.arange(0, BLOCK_M)
    q_tile = load_tile(q, q_strides[2], start_m, local_m, 0, seqlen_q, HEAD_DIM, BLOCK_D, True, False)
    do_tile = load_tile(do, do_strides[2], start_m, local_m, 0, seqlen_q, HEAD_DIM_V, BLOCK_DV, True, False)
    inside = offs_m < seqlen_q
    row = (index * n_heads + head) * total_q + first_q + offs_m
    row_high = tl.load(high + row, mask=inside, other=float("inf"))
    row_low = row_high
    if NATURAL:
        row_low = tl.load(low + row, mask=inside, other=0.0)
    row_delta = tl.load(delta + row, mask=inside, other=0.0)

    dq_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first, first_full, end_full, end = key_blocks(
        start_m, BLOCK_M, BLOCK_N, seqlen_q, length_k, off, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    gap = end_full - first_full
    dq_acc = _dq_blocks(
        dq_acc, q_tile, do_tile, row_high, row_low, row_delta, k_src, v_src, k_strides[2], v_strides[2], first_full,
        end_full, 0, 0, start_m, offs_m, off, seqlen_q, length_k, begin_k, end_k, window_left, window_right, scale,
        softcap, bias, bias_strides, dbias, dbias_strides, mask, mask_strides, slope, rng, slab, threshold, rescale,
        HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, NATURAL, TMA,
        PRECISION, EDGE=False,
    )  # fmt: skip
    if HAS_LEFT:
        end -= gap
    else:
        first = end_full
    dq_acc = _dq_blocks(
        dq_acc, q_tile, do_tile, row_high, row_low, row_delta, k_src, v_src, k_strides[2], v_strides[2], first, end,
        first_full, gap, start_m, offs_m, off, seqlen_q, length_k, begin_k, end_k, window_left, window_right, scale,
        softcap, bias, bias_strides, dbias, dbias_strides, mask, mask_strides, slope, rng, slab, threshold, rescale,
        HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, NATURAL, TMA,
        PRECISION, EDGE=True,
    )  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    dq += index * dq_strides[0] + head * dq_strides[1] + first_q * dq_strides[2]
    pointers = dq + offs_m.to(tl.int64)[:, None] * dq_strides[2] + offs_d[None, :]
    tl.store(pointers, (dq_acc * scale).to(dq.dtype.element_ty), mask=inside[:, None] & (offs_d < HEAD_DIM)[None, :])


def launch_bwd(do, dlse, q, k, v, out, lse, lse_low, bias, *rest):
    """The raw op attention_bwd: (dq, dk, dv, dbias, dsink)."""
    *rest, need_dbias, _ = rest  # deterministic: it always is
    sink = rest[0]
    do = torch.zeros_like(out) if do is None else do
    q, k, v, do, out = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(do), unit_stride(out)
    lse = lse.contiguous()
    lse_low = lse_low.contiguous() if lse_low.numel() else None
    dlse = contiguous(dlse)
    plan, features = prepare(q, k, v, bias, *rest)
    dq, dk, dv = (t.new_empty_strided(*layout) for t, layout in zip((q, k, v), plan.layouts[1:], strict=True))
    delta, high = torch.empty_like(lse), torch.empty_like(lse)
    low = torch.empty_like(lse) if plan.natural else None
    inputs = (q, k, v, do, high, low, delta)
    strides = (*plan.strides, do.stride()[:3])
    sizes = (plan.total_q, plan.total_k)
    rows = triton.cdiv(plan.total_q, PREPROCESS["BLOCK_M"])
    programs = rows * plan.n_heads * q.shape[0]
    partial = 0 if sink is None else (q.shape[0] * rows, plan.n_heads)
    dsink = q.new_empty(partial, dtype=torch.float32)
    if programs:
        launch(
            attention_preprocess, (programs,), q.device, out, do, lse, lse_low, dlse, sink, delta, high, low,
            dsink, out.stride()[:3], strides[3], plan.n_heads, plan.total_q, rows, HEAD_DIM_V=v.shape[3],
            BLOCK_DV=plan.switches["BLOCK_DV"], **PREPROCESS,
        )  # fmt: skip

    grid, blocks, constants, tma = plan.launch("dkdv")
    if grid[0]:
        launch(
            attention_dkdv, grid, q.device, *inputs, dk, dv, *features, *strides, dk.stride()[:3], dv.stride()[:3],
            *plan.feature_strides, plan.n_heads, *sizes, blocks, *plan.numbers, TMA=tma and descriptors_fit(q, do),
            **constants,
        )  # fmt: skip

    fused = need_dbias and bias.shape == (plan.batch, plan.n_heads, *sizes)
    dbias = torch.zeros(bias.shape, dtype=bias.dtype, device=q.device) if fused else None
    grid, blocks, constants, tma = plan.launch("dq")
    if grid[0]:
        launch(
            attention_dq, grid, q.device, *inputs, dq, dbias, *features, *strides, dq.stride()[:3],
            dbias.stride() if fused else (0, 0, 0, 0), *plan.feature_strides, plan.n_heads, plan.group, *sizes, blocks,
            *plan.numbers, TMA=tma and descriptors_fit(k, v), **constants,
        )  # fmt: skip
    if not need_dbias:
        dbias = q.new_empty(0)
    elif not fused:
        dbias = launch_dbias(plan, inputs, features, strides)
    return dq, dk, dv, dbias, dsink if sink is None else dsink.sum(0)


register("attention_bwd", launch_bwd)
