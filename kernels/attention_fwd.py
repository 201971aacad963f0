"""Attention forward.

    s   = scale * q·k;  s = softcap * tanh(s / softcap);  s = s + bias - slope * |i + off - j|;  -inf where hidden
    lse = log(sum_j exp(s) [+ exp(sink)]);  out = (exp(s - lse) ∘ keep * dropout_scale) · v

One program owns BLOCK_M queries of one head and loops over the keys with an online softmax in base 2. Blocks of keys
that no query sees are skipped. Blocks that all queries see have a loop without comparisons; the other blocks (edges)
have a loop with them. Features are compile-time switches (an absent tensor is None), so a plain call pays for none of
them. Row offsets have 64 bits. Saved for the backward: out and lse, the natural logarithm, in fp32.

Scores are kept times log2(e), so that the softmax needs one FMA for its exponent. With NATURAL they are kept unscaled,
and lse is saved in two parts. Otherwise a bias near FLT_MAX times log2(e) would be infinite, and scores that a large
bias makes equal would be rounded to different values. ALiBi uses NATURAL too, and so does fp32, where products cost far
more.

Limits: head dims up to 256, padded with zeros in the kernel to a power of two. On sm_90 and newer, keys and values are
loaded through TMA descriptors if strides and addresses are multiples of 16 bytes, otherwise through pointers.
Reference: Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023.
"""

import torch
import triton
import triton.language as tl

from fastattn.kernels.attention_call import UNSPECIALIZED, prepare
from fastattn.kernels.attention_frame import (
    block_start,
    find_head,
    head_frame,
    key_blocks,
    key_side,
    load_of_sequence,
    query_side,
    walk,
)
from fastattn.kernels.attention_tile import (
    add_sink,
    clear_hidden,
    empty_softmax,
    exponential,
    keep_tile,
    load_tile,
    store_tile,
    tile_scores,
    visible_tile,
)
from fastattn.kernels.common import LN_2, LOG2_E, Rows, launch, register, unit_stride


@triton.jit
def _forward_blocks(
    acc, l_i, m_i, q, k_side, v_side, blocks, start_m, span, head, features, form: tl.constexpr, EDGE: tl.constexpr
):
    MASKED: tl.constexpr = EDGE or form.MASKED
    i = (start_m + tl.arange(0, form.BLOCK_M))[:, None]
    BOTH: tl.constexpr = form.HAS_LEFT or form.KEY_MASK
    STAGES: tl.constexpr = 1 if EDGE and form.KEY_MASK else None  # few blocks, and clear_hidden needs shared memory
    begin, end = walk(blocks, EDGE, BOTH)
    for block in tl.range(begin, end, num_stages=STAGES):
        start_n = block_start(block, blocks, form.BLOCK_N, EDGE, BOTH)
        j = (start_n + tl.arange(0, form.BLOCK_N))[None, :]
        k = load_tile(k_side, start_n, form.HEAD_DIM, form.BLOCK_D, form.BLOCK_N, EDGE, form.TMA)
        qk = tl.dot(q, tl.trans(k), input_precision=form.PRECISION)
        if form.FUSED_SCALE:
            s = qk
        else:
            s, _ = tile_scores(qk, i, j, span, head, features, form)
        visible = visible_tile(i, j, span, head, features, form, EDGE)
        if MASKED:
            s = tl.where(visible, s, float("-inf"))

        if form.FUSED_SCALE:  # the scale is positive, so one FMA per score can scale and subtract the maximum
            m_new = tl.maximum(m_i, tl.max(s, 1) * (features.scale * LOG2_E))
        else:
            m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = m_new
        # If a row has seen nothing, subtract 0, because -inf - -inf is NaN.
        if MASKED or features.bias is not None:
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        if form.FUSED_SCALE:
            p = tl.exp2(s * (features.scale * LOG2_E) - m_safe[:, None])
        else:
            p = exponential(s - m_safe[:, None], form.NATURAL)
        alpha = exponential(m_i - m_safe, form.NATURAL)
        l_i = l_i * alpha + tl.sum(p, 1)
        if features.rng_ptr is not None:
            p = tl.where(keep_tile(start_m, start_n, head, features, form), p, 0.0)

        v = load_tile(v_side, start_n, form.HEAD_DIM_V, form.BLOCK_DV, form.BLOCK_N, EDGE, form.TMA)
        v = clear_hidden(v, visible, start_n, span, head, features, form, EDGE)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=form.PRECISION)
        m_i = m_new
    return acc, l_i, m_i


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_fwd_kernel(q, k, v, out, lse_ptr, lse_low_ptr, features, n_heads, group, total_q, total_k, blocks,
                         window_left, window_right, threshold, k_map, v_map, form: tl.constexpr):  # fmt: skip
    """Compute out and lse of a block of queries.

    total_q, total_k: rows of q and k per batch entry, or of all packed sequences. lse_low_ptr: receives the rounding
    error of lse, or None. k_map, v_map: descriptors made by the host, or None."""
    start_m, q_head, span = head_frame(
        features, n_heads, total_q, total_k, blocks, window_left, window_right, form, False
    )
    if start_m >= span.seqlen_q:
        return
    head = find_head(q_head, span, features, n_heads, threshold)
    k_side = key_side(k, k_map, q_head // group, span, form.HEAD_DIM, form.BLOCK_D, form)
    v_side = key_side(v, v_map, q_head // group, span, form.HEAD_DIM_V, form.BLOCK_DV, form)
    q_side = query_side(q, q_head, span, form.HEAD_DIM, form.BLOCK_D, form.BLOCK_M, False)
    q_tile = load_tile(q_side, start_m, form.HEAD_DIM, form.BLOCK_D, form.BLOCK_M, True, False)

    # Online softmax over the blocks that all rows see, then over the edges.
    acc, l_i, m_i = empty_softmax(form.BLOCK_M, form.BLOCK_DV)
    seen = key_blocks(start_m, form.BLOCK_M, span, form)
    acc, l_i, m_i = _forward_blocks(
        acc, l_i, m_i, q_tile, k_side, v_side, seen, start_m, span, head, features, form, EDGE=False
    )
    acc, l_i, m_i = _forward_blocks(
        acc, l_i, m_i, q_tile, k_side, v_side, seen, start_m, span, head, features, form, EDGE=True
    )

    if not form.NATURAL:
        m_i *= LN_2
    if features.sink_ptr is not None:
        sink_score = load_of_sequence(features.sink_ptr + q_head, span.within, float("-inf"), features)
        acc, l_i, m_i = add_sink(acc, l_i, m_i, sink_score)
    # A row that saw nothing gives output 0 and lse -inf.
    empty = l_i == 0.0
    m_i = tl.where(empty, 0.0, m_i)
    l_i = tl.where(empty, 1.0, l_i)
    acc *= (features.rescale / l_i)[:, None]
    log_l = tl.log2(l_i) * LN_2
    row_lse = m_i + log_l
    store_tile(out, span.index, q_head, span.first_q, start_m, span.seqlen_q, acc, form.HEAD_DIM_V)
    offs_m = start_m + tl.arange(0, form.BLOCK_M)
    inside = offs_m < span.seqlen_q
    row = (span.index * n_heads + q_head) * total_q + span.first_q + offs_m
    tl.store(lse_ptr + row, tl.where(empty, float("-inf"), row_lse), mask=inside)
    if lse_low_ptr is not None:
        tl.store(lse_low_ptr + row, m_i - row_lse + log_l, mask=inside)


NOTHING = ((0,), (1,))  # shape and strides


def attention_fwd(q, k, v, *rest):
    """The raw op attention_fwd: returns (out, lse, lse_low)."""
    *inputs, need_low = rest
    plan, features = prepare(q, k, v, *inputs)
    if plan.copies:
        return attention_fwd(unit_stride(q), unit_stride(k), unit_stride(v), *rest)
    out = q.new_empty_strided(*plan.layouts[0])
    lse = torch.empty_strided(*plan.lse_layout, dtype=torch.float32, device=q.device)
    low = torch.empty_strided(*(plan.lse_layout if need_low else NOTHING), dtype=torch.float32, device=q.device)
    start = plan.start("fwd")
    if start.grid[0]:
        form, *maps = start.choose(features.seqlens_k_ptr is None, k, v)
        launch(
            attention_fwd_kernel, start.grid, q.device, *plan.inputs(q, k, v), Rows(out, plan.out_strides), lse,
            low if need_low else None, features, *plan.sizes, start.blocks, *plan.window, *maps, form, **start.options,
        )  # fmt: skip
    return out, lse, low


register("attention_fwd", attention_fwd)
