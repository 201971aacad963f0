"""Attention backward: kernels without atomics, so that equal inputs give equal bits.

    delta = rowsum(do ∘ out) - dlse, lse = high + low   attention_preprocess_kernel: a block of rows of one head
    p  = exp(s - lse),  pd = p ∘ keep * dropout_scale
    dp = keep * dropout_scale ∘ (do·vᵀ),  ds = p ∘ (dp - delta),  dsr = ds * (1 - (s_capped / softcap)²)
    dv = pdᵀ·do,  dk = scale * dsrᵀ·q                   attention_dkdv_kernel: a block of keys of one head of k
    dq = scale * dsr·k                                  attention_dq_kernel: a block of queries of one head
    dbias = ds summed over the broadcast dims           attention_dq_kernel if there are none, else attention_dbias.py
    dsink[h] = -sum exp(sink - lse) * delta             attention_preprocess_kernel, one partial sum per program

The scores are computed twice, in attention_dkdv_kernel and in attention_dq_kernel. The former computes them transposed,
so that p and ds are left operands without a shuffle. Where the sums of dk and dv would fill the registers, each has a
launch of its own, and the scores are computed three times (docs/lab/gpu-rows.md). In return, no gradient needs an fp32
buffer, and the order of every sum is fixed.

The limits and features are those of the forward. Reference: Dao, "FlashAttention-2", 2023, algorithm 2.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.kernels.attention_call import UNSPECIALIZED, prepare, rows_of
from fastattn.kernels.attention_config import PREPROCESS
from fastattn.kernels.attention_dbias import attention_dbias
from fastattn.kernels.attention_frame import (
    block_start,
    find_head,
    head_frame,
    key_blocks,
    key_side,
    query_blocks,
    query_side,
    side_of,
    walk,
)
from fastattn.kernels.attention_tile import (
    clear_hidden,
    keep_tile,
    load_softmax,
    load_tile,
    probability,
    score_gradient,
    score_ptrs,
    store_tile,
    tile_scores,
    visible_tile,
    zeros,
)
from fastattn.kernels.common import LOG2_E, Rows, contiguous, launch, register, unit_stride


class Softmax(NamedTuple):
    """The statistics that the backward reads for each row of scores: (batch, heads, rows) in fp32.
    attention_preprocess_kernel writes them."""

    high_ptr: Any
    low_ptr: Any
    delta_ptr: Any


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_preprocess_kernel(out, do, lse_ptr, lse_low_ptr, dlse_ptr, sink_ptr, dsink_ptr, softmax, n_heads, total_q,
                                blocks, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr,
                                BLOCK_M: tl.constexpr):  # fmt: skip
    """Compute the statistics of a block of rows. Packed sequences need no special treatment here.

    lse is read in one part or two, and written in the form that the other kernels subtract. `high` is +inf if a row saw
    nothing. `low` is times log2(e); without `low`, all of lse is in `high`, times log2(e). A row that saw nothing does
    not contribute to dsink, whatever its do. The rows after the last packed sequence are such rows.
    """
    pid = tl.program_id(0)
    batch = (pid // blocks // n_heads).to(tl.int64)
    head = (pid // blocks % n_heads).to(tl.int64)
    start_m = pid % blocks * BLOCK_M
    out_side = side_of(out, batch, head, 0, 0, total_q, HEAD_DIM_V, BLOCK_DV, BLOCK_M, False)
    do_side = side_of(do, batch, head, 0, 0, total_q, HEAD_DIM_V, BLOCK_DV, BLOCK_M, False)
    out_tile = load_tile(out_side, start_m, HEAD_DIM_V, BLOCK_DV, BLOCK_M, True, False).to(tl.float32)
    do_tile = load_tile(do_side, start_m, HEAD_DIM_V, BLOCK_DV, BLOCK_M, True, False).to(tl.float32)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    inside = offs_m < total_q
    row = (batch * n_heads + head) * total_q + offs_m
    d = tl.sum(out_tile * do_tile, 1)
    if dlse_ptr is not None:
        d -= tl.load(dlse_ptr + row, mask=inside, other=0.0)
    row_lse = tl.load(lse_ptr + row, mask=inside, other=float("-inf"))
    empty = row_lse == float("-inf")
    row_lse = tl.where(empty, float("inf"), row_lse)
    row_low = tl.zeros([BLOCK_M], tl.float32)
    if lse_low_ptr is not None:
        row_low = tl.load(lse_low_ptr + row, mask=inside, other=0.0) * LOG2_E
    tl.store(softmax.delta_ptr + row, d, mask=inside)
    if softmax.low_ptr is not None:
        tl.store(softmax.high_ptr + row, row_lse, mask=inside)
        tl.store(softmax.low_ptr + row, row_low, mask=inside)
    else:  # a finite bound is needed, because the row may have only a sink near -FLT_MAX
        tl.store(softmax.high_ptr + row, tl.maximum(row_lse * LOG2_E, -3e38), mask=inside)
    if sink_ptr is not None:
        share = tl.exp2((tl.load(sink_ptr + head) - row_lse) * LOG2_E - row_low)
        tl.store(dsink_ptr + (batch * blocks + pid % blocks) * n_heads + head,
                 -tl.sum(tl.where(empty, 0.0, share * d)))  # fmt: skip


@triton.jit
def _softmax_of_block(softmax, first, block, blocks, end, form: tl.constexpr, EDGE: tl.constexpr):
    """Return load_softmax for the rows of a block of queries."""
    rows = block_start(block, blocks, form.BLOCK_M, EDGE, True) + tl.arange(0, form.BLOCK_M)
    return load_softmax(softmax, first, rows, end, form)


@triton.jit
def _dkdv_scores(k, q, row_high, row_low, i, j, span, head, features, form: tl.constexpr, EDGE: tl.constexpr):
    """Return (p, capped score, visible) for a tile with keys as rows."""
    if form.LSE_FIRST:  # then no register has to hold lse
        row_high = row_high * (-1.0 / (features.scale * LOG2_E))
        above = tl.broadcast_to(row_high[None, :], (form.BLOCK_N, form.BLOCK_M))
        qk = tl.dot(k, tl.trans(q), above, input_precision=form.PRECISION)
    else:
        qk = tl.dot(k, tl.trans(q), input_precision=form.PRECISION)
    s, capped = tile_scores(qk, i, j, span, head, features, form)
    visible = visible_tile(i, j, span, head, features, form, EDGE)
    if EDGE or form.MASKED:
        s = tl.where(visible, s, float("-inf"))
    p = tl.exp2(s) if form.LSE_FIRST else probability(s, row_high[None, :], row_low[None, :], form.NATURAL)
    return p, capped, visible


@triton.jit
def _dkdv_blocks(dk, dv, k, v, q_side, do_side, softmax, first, blocks, start_n, span, head, features,
                 form: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """Add a range of blocks of queries to dk and dv. first: the first row of the query head in `softmax`."""
    j = (start_n + tl.arange(0, form.BLOCK_N))[:, None]
    begin, end = walk(blocks, EDGE, True)
    if form.LSE_FIRST:
        ahead = _softmax_of_block(softmax, first, begin, blocks, span.seqlen_q, form, EDGE)
    for block in range(begin, end):
        start_m = block_start(block, blocks, form.BLOCK_M, EDGE, True)
        q = load_tile(q_side, start_m, form.HEAD_DIM, form.BLOCK_D, form.BLOCK_M, EDGE, form.TMA)
        do = load_tile(do_side, start_m, form.HEAD_DIM_V, form.BLOCK_DV, form.BLOCK_M, EDGE, form.TMA)
        if form.LSE_FIRST:
            row_high, row_low, row_delta = ahead
        else:
            row_high, row_low, row_delta = _softmax_of_block(softmax, first, block, blocks, span.seqlen_q, form, EDGE)

        # Everything is transposed: the rows of a tile are keys.
        i = (start_m + tl.arange(0, form.BLOCK_M))[None, :]
        p, capped, visible = _dkdv_scores(k, q, row_high, row_low, i, j, span, head, features, form, EDGE)
        pd = p
        if form.WITH_DK:
            if form.DELTA_FIRST:  # the registers of delta are then free
                minus = tl.broadcast_to(-row_delta[None, :], p.shape)
                dp = tl.dot(v, tl.trans(do), minus, input_precision=form.PRECISION)
            else:
                dp = tl.dot(v, tl.trans(do), input_precision=form.PRECISION)
        if features.rng_ptr is not None:
            keep = tl.trans(keep_tile(start_m, start_n, head, features, form))
            pd = tl.where(keep, p, 0.0)
            if form.WITH_DK:
                dp = tl.where(keep, dp * features.rescale, 0.0)
        if form.WITH_DV:
            dv = tl.dot(pd.to(do.dtype), do, dv, input_precision=form.PRECISION)
        if form.WITH_DK:
            if not form.DELTA_FIRST:
                dp -= row_delta[None, :]
            ds = p * dp
            if form.SOFTCAP:
                ds *= 1 - capped * capped
            if EDGE or form.MASKED:  # p = 0 is not enough: a hidden key may be NaN
                ds = tl.where(visible, ds, 0.0)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=form.PRECISION)
        if form.LSE_FIRST:  # for the next block, under the product of dk
            ahead = _softmax_of_block(softmax, first, block + 1, blocks, span.seqlen_q, form, EDGE)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_dkdv_kernel(q, k, v, do, dk, dv, softmax, features, n_heads, total_q, total_k, blocks, window_left,
                          window_right, threshold, q_map, do_map, form: tl.constexpr):  # fmt: skip
    """Compute dk and dv of a block of keys. q_map, do_map: descriptors made by the host, or None."""
    start_n, k_head, span = head_frame(
        features, n_heads // form.GROUP, total_q, total_k, blocks, window_left, window_right, form, True
    )
    if start_n >= span.seqlen_k:
        return
    k_side = side_of(k, span.index, k_head, span.first_k, 0, span.length_k, form.HEAD_DIM, form.BLOCK_D, form.BLOCK_N,
                     False)  # fmt: skip
    v_side = side_of(v, span.index, k_head, span.first_k, 0, span.length_k, form.HEAD_DIM_V, form.BLOCK_DV,
                     form.BLOCK_N, False)  # fmt: skip
    k_tile = load_tile(k_side, start_n, form.HEAD_DIM, form.BLOCK_D, form.BLOCK_N, True, False)
    v_tile = k_tile
    if form.WITH_DK:
        v_tile = load_tile(v_side, start_n, form.HEAD_DIM_V, form.BLOCK_DV, form.BLOCK_N, True, False)
    seen_by = query_blocks(start_n, span, form)

    # loop over the query heads that share these keys; what does not depend on the head is computed again for each,
    # because there are no registers to keep it in
    dk_acc = zeros(form.BLOCK_N, form.BLOCK_D) if form.WITH_DK else 0.0
    dv_acc = zeros(form.BLOCK_N, form.BLOCK_DV) if form.WITH_DV else 0.0
    for member in tl.range(0, form.GROUP, disable_licm=True):
        q_head = k_head * form.GROUP + member
        head = find_head(q_head, span, features, n_heads, threshold)
        q_side = query_side(q, q_head, span, form.HEAD_DIM, form.BLOCK_D, form.BLOCK_M, form.TMA, q_map)
        do_side = query_side(do, q_head, span, form.HEAD_DIM_V, form.BLOCK_DV, form.BLOCK_M, form.TMA, do_map)
        first = (span.index * n_heads + q_head) * total_q + span.first_q
        dk_acc, dv_acc = _dkdv_blocks(
            dk_acc, dv_acc, k_tile, v_tile, q_side, do_side, softmax, first, seen_by, start_n, span, head, features,
            form, EDGE=True,
        )  # fmt: skip
        dk_acc, dv_acc = _dkdv_blocks(
            dk_acc, dv_acc, k_tile, v_tile, q_side, do_side, softmax, first, seen_by, start_n, span, head, features,
            form, EDGE=False,
        )  # fmt: skip

    # Keys past seqlens_k have gradient 0, whatever their rows have accumulated.
    seen = (start_n + tl.arange(0, form.BLOCK_N) < span.length_k)[:, None]
    if form.WITH_DK:
        dk_acc = tl.where(seen, dk_acc * features.scale, 0.0)
        store_tile(dk, span.index, k_head, span.first_k, start_n, span.seqlen_k, dk_acc, form.HEAD_DIM)
    if form.WITH_DV:
        dv_acc = tl.where(seen, dv_acc * features.rescale, 0.0)
        store_tile(dv, span.index, k_head, span.first_k, start_n, span.seqlen_k, dv_acc, form.HEAD_DIM_V)


@triton.jit
def _dq_blocks(dq, dbias, q, do, softmax, k_side, v_side, blocks, start_m, span, head, features, form: tl.constexpr,
               EDGE: tl.constexpr):  # fmt: skip
    """Add a range of blocks of keys to dq, and store dbias. softmax: the result of load_softmax."""
    BOTH: tl.constexpr = form.HAS_LEFT or form.KEY_MASK
    STAGES: tl.constexpr = 1 if EDGE and form.KEY_MASK else None  # few blocks; clear_hidden needs shared memory
    begin, end = walk(blocks, EDGE, BOTH)
    for block in tl.range(begin, end, num_stages=STAGES):
        start_n = block_start(block, blocks, form.BLOCK_N, EDGE, BOTH)
        k = load_tile(k_side, start_n, form.HEAD_DIM, form.BLOCK_D, form.BLOCK_N, EDGE, form.TMA)
        v = load_tile(v_side, start_n, form.HEAD_DIM_V, form.BLOCK_DV, form.BLOCK_N, EDGE, form.TMA)
        ds, capped, visible = score_gradient(q, k, v, do, softmax, start_m, start_n, span, head, features, form, EDGE)
        if dbias is not None:
            i = (start_m + tl.arange(0, form.BLOCK_M))[:, None]
            j = (start_n + tl.arange(0, form.BLOCK_N))[None, :]
            inside = (i < span.seqlen_q) & (j < span.length_k)
            tl.store(score_ptrs(dbias, head, i, j), ds.to(dbias.ptr.dtype.element_ty), mask=inside)
        if form.SOFTCAP:
            ds *= 1 - capped * capped
        if form.MASKED or (EDGE and form.KEY_MASK):  # a hidden key may be NaN, and then `capped` is too
            ds = tl.where(visible, ds, 0.0)
        k = clear_hidden(k, visible, start_n, span, head, features, form, EDGE)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=form.PRECISION)
    return dq


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_dq_kernel(q, k, v, do, dq, dbias, softmax, features, n_heads, group, total_q, total_k, blocks,
                        window_left, window_right, threshold, k_map, v_map, form: tl.constexpr):  # fmt: skip
    """Compute dq of a block of queries, and dbias if wanted. k_map, v_map: descriptors made by the host, or None."""
    start_m, q_head, span = head_frame(
        features, n_heads, total_q, total_k, blocks, window_left, window_right, form, False
    )
    if start_m >= span.seqlen_q:
        return
    head = find_head(q_head, span, features, n_heads, threshold)
    k_side = key_side(k, k_map, q_head // group, span, form.HEAD_DIM, form.BLOCK_D, form)
    v_side = key_side(v, v_map, q_head // group, span, form.HEAD_DIM_V, form.BLOCK_DV, form)
    q_side = query_side(q, q_head, span, form.HEAD_DIM, form.BLOCK_D, form.BLOCK_M, False)
    do_side = query_side(do, q_head, span, form.HEAD_DIM_V, form.BLOCK_DV, form.BLOCK_M, False)
    q_tile = load_tile(q_side, start_m, form.HEAD_DIM, form.BLOCK_D, form.BLOCK_M, True, False)
    do_tile = load_tile(do_side, start_m, form.HEAD_DIM_V, form.BLOCK_DV, form.BLOCK_M, True, False)
    offs_m = start_m + tl.arange(0, form.BLOCK_M)
    first = (span.index * n_heads + q_head) * total_q + span.first_q
    rows = load_softmax(softmax, first, offs_m, span.seqlen_q, form)

    dq_acc = zeros(form.BLOCK_M, form.BLOCK_D)
    seen = key_blocks(start_m, form.BLOCK_M, span, form)
    dq_acc = _dq_blocks(
        dq_acc, dbias, q_tile, do_tile, rows, k_side, v_side, seen, start_m, span, head, features, form, EDGE=False
    )
    dq_acc = _dq_blocks(
        dq_acc, dbias, q_tile, do_tile, rows, k_side, v_side, seen, start_m, span, head, features, form, EDGE=True
    )
    store_tile(dq, span.index, q_head, span.first_q, start_m, span.seqlen_q, dq_acc * features.scale, form.HEAD_DIM)


def attention_bwd(do, dlse, q, k, v, out, lse, lse_low, bias, *rest):
    """The raw op attention_bwd: (dq, dk, dv, dbias, dsink)."""
    *rest, need_dbias, _ = rest  # deterministic: this backward always is
    sink = rest[0]
    do = torch.zeros_like(out) if do is None else do
    q, k, v, do, out = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(do), unit_stride(out)
    lse = lse.contiguous()
    lse_low = lse_low.contiguous() if lse_low.numel() else None
    plan, features = prepare(q, k, v, bias, *rest)
    dq, dk, dv = (t.new_empty_strided(*layout) for t, layout in zip((q, k, v), plan.layouts[1:], strict=True))
    softmax = Softmax(torch.empty_like(lse), torch.empty_like(lse) if plan.natural else None, torch.empty_like(lse))
    inputs = (*plan.inputs(q, k, v), rows_of(do))
    n_heads, _, total_q, total_k = plan.sizes
    blocks = triton.cdiv(total_q, PREPROCESS.block_m)
    programs = blocks * n_heads * plan.batch
    partial = 0 if sink is None else (plan.batch * blocks, n_heads)
    dsink = q.new_empty(partial, dtype=torch.float32)
    if programs:
        launch(
            attention_preprocess_kernel, (programs,), q.device, rows_of(out), inputs[3], lse, lse_low,
            contiguous(dlse), features.sink_ptr, dsink, softmax, n_heads, total_q, blocks,
            HEAD_DIM_V=plan.form.HEAD_DIM_V, BLOCK_DV=plan.form.BLOCK_DV, BLOCK_M=PREPROCESS.block_m,
            **PREPROCESS.options(),
        )  # fmt: skip

    for start in map(plan.start, plan.launches_of_keys()):
        if start.grid[0]:
            form, *maps = start.choose(True, q, do)
            launch(
                attention_dkdv_kernel, start.grid, q.device, *inputs, rows_of(dk), rows_of(dv), softmax, features,
                n_heads, total_q, total_k, start.blocks, *plan.window, *maps, form, **start.options,
            )  # fmt: skip

    fused = need_dbias and bias.shape == (plan.batch, n_heads, total_q, total_k)
    dbias = torch.zeros(bias.shape, dtype=bias.dtype, device=q.device) if fused else None
    start = plan.start("dq")
    if start.grid[0]:
        form, *maps = start.choose(features.seqlens_k_ptr is None, k, v)
        launch(
            attention_dq_kernel, start.grid, q.device, *inputs, rows_of(dq),
            Rows(dbias, dbias.stride()) if fused else None, softmax, features, *plan.sizes, start.blocks, *plan.window,
            *maps, form, **start.options,
        )  # fmt: skip
    if not need_dbias:
        dbias = q.new_empty(0)
    elif not fused:
        dbias = attention_dbias(plan, inputs, softmax, features)
    return dq, dk, dv, dbias, dsink if sink is None else dsink.sum(0)


register("attention_bwd", attention_bwd)
