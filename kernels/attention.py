"""Attention forward, and the tile arithmetic that the backward shares.

    s   = scale * q·k;  s = softcap * tanh(s / softcap);  s = s + bias - slope * |i + off - j|;  -inf where invisible
    lse = log(sum_j exp(s) [+ exp(sink)]);  out = (exp(s - lse) ∘ keep * dropout_scale) · v

One program owns BLOCK_M queries of one head and walks over the keys with an online softmax in base 2. Blocks of keys
that no query of it sees are skipped; blocks that all of them see take a loop without comparisons, the others (edges)
one with. Features are compile-time switches (an absent tensor is None), so a plain call pays for none of them. Row
offsets are 64 bits wide. Saved for the backward: out and lse, natural logarithm in fp32.

Scores are kept times log2(e), so that the softmax needs one FMA for its exponent. NATURAL keeps them as they are, and
lse in two parts: beside a bias as large as FLT_MAX log2(e) would make them infinite, and scores that a large bias makes
equal would be rounded to different ones. The same for ALiBi, and in fp32, where products cost far more than that.

Limits: head dims up to 256, padded with zeros in the kernel to a power of two. Keys and values come through TMA
descriptors on sm_90 and newer where strides and addresses are multiples of 16 bytes, else through pointers.
Reference: Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023.
"""

import functools

import torch
import triton
import triton.language as tl

from fastattn.kernels.attention_config import pick
from fastattn.kernels.common import (
    LN_2,
    LOG2_E,
    contiguous,
    dropout_constants,
    dropout_halfwords,
    launch,
    register,
    tanh,
    unit_stride,
)
from fastattn.ops._layout import empty_in_layout


@triton.jit
def locate(batch, within, cu_seqlens_q, cu_seqlens_k, seqlens_k, seqlen_q, seqlen_k, TOP_LEFT: tl.constexpr,
           OF_KEYS: tl.constexpr):  # fmt: skip
    """(index in the batch dimension, first row of q and k, both lengths, length of the visible keys, off).

    Where `batch` is not `within` the packed sequences the rows are those behind the last one, and there is nothing on
    the other side. OF_KEYS: the rows in question are keys.
    """
    index = batch
    first_q = batch * 0
    first_k = batch * 0
    if cu_seqlens_q is not None:
        index = batch * 0
        begin_q = tl.load(cu_seqlens_q + batch)
        begin_k = tl.load(cu_seqlens_k + batch)
        seqlen_q = tl.load(cu_seqlens_q + batch + 1, mask=within, other=begin_q if OF_KEYS else seqlen_q) - begin_q
        seqlen_k = tl.load(cu_seqlens_k + batch + 1, mask=within, other=seqlen_k if OF_KEYS else begin_k) - begin_k
        first_q = begin_q.to(tl.int64)
        first_k = begin_k.to(tl.int64)
    length_k = seqlen_k
    if seqlens_k is not None:
        length_k = tl.maximum(tl.minimum(tl.load(seqlens_k + batch, mask=within, other=0), seqlen_k), 0)
    off = length_k - seqlen_q
    if TOP_LEFT:
        off = 0
    return index, first_q, first_k, seqlen_q, seqlen_k, length_k, off


SEARCHED = tl.constexpr(128)  # sequences that one step of find_tile looks at


@triton.jit
def find_tile(cu_seqlens, tiles, total, tile, BLOCK: tl.constexpr):
    """(sequence, tile within it, whether it is a sequence) of one of the `tiles` into which packed rows are divided.

    Sequence b begins with tile cu_seqlens[b] // BLOCK + b. So it gets at least as many tiles as its rows need, and all
    sequences together total // BLOCK + sequences: the grid grows with the rows and not with the longest sequence. The
    rows behind the last sequence come after it as if they were one more.
    """
    sequences = tiles - 1 - total // BLOCK
    low = sequences * 0
    size = sequences + 1
    while size > 1:  # the answer is among sequences low to low + size - 1
        step = (size + SEARCHED - 1) // SEARCHED
        local = tl.arange(0, SEARCHED) * step
        begins = tl.load(cu_seqlens + low + local, mask=local < size, other=0) // BLOCK + low + local
        passed = tl.sum(((begins <= tile) & (local < size)).to(tl.int32))
        low += tl.maximum(passed - 1, 0) * step
        size = tl.minimum(step, sequences + 1 - low)
    tile -= tl.load(cu_seqlens + low) // BLOCK + low
    return low.to(tl.int64), tile, low < sequences


@triton.jit
def key_blocks(start_m, BLOCK_M, BLOCK_N, seqlen_q, length_k, off, window_left, window_right, HAS_LEFT, HAS_RIGHT):
    """Blocks of keys that rows start_m.. see: (first, first full, end of full, end); "full" is seen by every row."""
    end_m = tl.minimum(start_m + BLOCK_M, seqlen_q)
    low = 0
    high = length_k
    full_low = 0
    full_high = length_k
    if HAS_LEFT:
        low = tl.minimum(tl.maximum(start_m + off - window_left, 0), length_k)
        full_low = tl.maximum(end_m - 1 + off - window_left, 0)
    if HAS_RIGHT:
        high = tl.maximum(tl.minimum(length_k, end_m + off + window_right), 0)
        full_high = tl.maximum(tl.minimum(length_k, start_m + off + window_right + 1), 0)
    first = low // BLOCK_N
    end = tl.maximum((high + BLOCK_N - 1) // BLOCK_N, first)
    first_full = tl.minimum(tl.maximum((full_low + BLOCK_N - 1) // BLOCK_N, first), end)
    end_full = tl.minimum(tl.maximum(full_high // BLOCK_N, first_full), end)
    return first, first_full, end_full, end


@triton.jit
def load_tile(src, stride, start, offs, begin, end, DIM: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
              TMA: tl.constexpr):  # fmt: skip
    """Rows start + offs of a head, zeros in rows outside of [begin, end) if EDGE and in columns past DIM."""
    if TMA:
        tile = src.load([start, 0])
    else:
        rows = start + offs
        offs_d = tl.arange(0, BLOCK_D)
        pointers = src + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
        inside = ((rows >= begin) & (rows < end))[:, None]
        if EDGE and DIM != BLOCK_D:
            tile = tl.load(pointers, mask=inside & (offs_d < DIM)[None, :], other=0.0)
        elif EDGE:
            tile = tl.load(pointers, mask=inside, other=0.0)
        elif DIM != BLOCK_D:
            tile = tl.load(pointers, mask=(offs_d < DIM)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def tile_source(base, stride, rows, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
                TMA: tl.constexpr):  # fmt: skip
    """What load_tile reads from: a descriptor that ends after `rows` rows, or the pointer."""
    if TMA:
        source = tl.make_tensor_descriptor(base, [tl.maximum(rows, 1), DIM], [stride, 1], [BLOCK_ROWS, BLOCK_D])
    else:
        source = base
    return source


@triton.jit
def visible_tile(i, j, off, seqlen_q, length_k, window_left, window_right, mask, mask_strides, HAS_LEFT: tl.constexpr,
                 HAS_RIGHT: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """Which key each query sees; i and j are positions shaped to broadcast, so that it serves transposed tiles too."""
    inside = (j < length_k) & (i < seqlen_q)
    visible = inside
    if EDGE and HAS_LEFT:
        visible = visible & (j >= i + (off - window_left))
    if EDGE and HAS_RIGHT:
        visible = visible & (j <= i + (off + window_right))
    if mask is not None:
        pointers = mask + i.to(tl.int64) * mask_strides[2] + j.to(tl.int64) * mask_strides[3]
        visible = visible & (tl.load(pointers, mask=inside, other=0) != 0)
    return visible


@triton.jit
def tile_scores(qk, i, j, off, seqlen_q, length_k, scale, softcap, bias, bias_strides, slope, SOFTCAP: tl.constexpr,
                ALIBI: tl.constexpr, NATURAL: tl.constexpr):  # fmt: skip
    """(scores, times log2(e) unless NATURAL, capped / softcap); the second is meaningless without a cap."""
    capped = qk
    factor = scale
    if SOFTCAP:
        capped = tanh(qk * (scale / softcap))
        factor = softcap
    if not NATURAL:
        factor *= LOG2_E
    if bias is not None:
        pointers = bias + i.to(tl.int64) * bias_strides[2] + j.to(tl.int64) * bias_strides[3]
        add = tl.load(pointers, mask=(i < seqlen_q) & (j < length_k), other=0.0).to(tl.float32)
        s = tl.fma(capped, factor, add)  # fused by name: forward and backward must round alike
    else:
        s = capped * factor
    if ALIBI:
        s = tl.fma(tl.abs(i + off - j).to(tl.float32), -slope, s)
    return s, capped


@triton.jit
def exponential(difference, NATURAL: tl.constexpr):
    """e to the difference of two scores."""
    if NATURAL:
        difference *= LOG2_E
    return tl.exp2(difference)


@triton.jit
def probability(s, lse_high, lse_low, NATURAL: tl.constexpr):
    """exp(s - lse) for both parts of lse as the preprocess of the backward leaves them."""
    difference = s - lse_high
    if NATURAL:
        # above 0 only where another backend, whose lse it is, rounded the scores otherwise: by 64 beside a bias of 1e9
        difference = tl.minimum(difference, 0.0, propagate_nan=tl.PropagateNan.ALL) * LOG2_E - lse_low
    return tl.exp2(difference)


@triton.jit
def keep_tile(rng, slab, start_m, start_n, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Dropout's decisions on a tile of scores: row and column are positions, the slab is batch * n_heads + head."""
    row = start_m + tl.arange(0, BLOCK_M)
    return dropout_halfwords(rng, row, row * 0 + slab, start_n // 8 + tl.arange(0, BLOCK_N // 8)) >= threshold


@triton.jit
def score_gradient(q, k, v, do, row_high, row_low, row_delta, i, j, start_m, start_n, off, seqlen_q, length_k,
                   window_left, window_right, scale, softcap, bias, bias_strides, mask, mask_strides, slope, rng, slab,
                   threshold, rescale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr,
                   HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, NATURAL: tl.constexpr,
                   PRECISION: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """(ds, capped score, visible) of a tile with queries as rows."""
    MASKED: tl.constexpr = EDGE or mask is not None
    qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s, capped = tile_scores(qk, i, j, off, seqlen_q, length_k, scale, softcap, bias, bias_strides, slope, SOFTCAP,
                            ALIBI, NATURAL)  # fmt: skip
    visible = visible_tile(i, j, off, seqlen_q, length_k, window_left, window_right, mask, mask_strides, HAS_LEFT,
                           HAS_RIGHT, EDGE)  # fmt: skip
    if MASKED:  # before the exponential: lse may lie far below 0, the score of a key that is none
        s = tl.where(visible, s, float("-inf"))
    p = probability(s, row_high[:, None], row_low[:, None], NATURAL)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if rng is not None:
        keep = keep_tile(rng, slab, start_m, start_n, threshold, BLOCK_M, BLOCK_N)
        dp = tl.where(keep, dp * rescale, 0.0)
    ds = p * (dp - row_delta[:, None])
    if MASKED:
        ds = tl.where(visible, ds, 0.0)
    return ds, capped, visible


@triton.jit
def _forward_blocks(acc, l_i, m_i, q, k_src, v_src, stride_k, stride_v, first, end, split, gap, start_m, offs_m, off,
                    seqlen_q, length_k, begin_k, end_k, window_left, window_right, scale, softcap, bias, bias_strides,
                    mask, mask_strides, slope, rng, slab, threshold, HEAD_DIM: tl.constexpr,
                    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
                    ALIBI: tl.constexpr, NATURAL: tl.constexpr, FUSED_SCALE: tl.constexpr, TMA: tl.constexpr,
                    PRECISION: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    MASKED: tl.constexpr = EDGE or mask is not None
    offs_n = tl.arange(0, BLOCK_N)
    for block in range(first, end):
        start_n = block * BLOCK_N
        if EDGE and HAS_LEFT:
            start_n = tl.where(block < split, block, block + gap) * BLOCK_N
        start_n = tl.multiple_of(start_n, BLOCK_N)
        i = offs_m[:, None]
        j = (start_n + offs_n)[None, :]
        k = load_tile(k_src, stride_k, start_n, offs_n, begin_k, end_k, HEAD_DIM, BLOCK_D, EDGE, TMA)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if FUSED_SCALE:
            s = qk
        else:
            s, _ = tile_scores(qk, i, j, off, seqlen_q, length_k, scale, softcap, bias, bias_strides, slope, SOFTCAP,
                               ALIBI, NATURAL)  # fmt: skip
        visible = visible_tile(i, j, off, seqlen_q, length_k, window_left, window_right, mask, mask_strides, HAS_LEFT,
                               HAS_RIGHT, EDGE)  # fmt: skip
        if MASKED:
            s = tl.where(visible, s, float("-inf"))

        if FUSED_SCALE:  # the scale is positive: it may be applied to the maximum, and then in one FMA per score
            m_new = tl.maximum(m_i, tl.max(s, 1) * (scale * LOG2_E))
        else:
            m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = m_new
        if MASKED or bias is not None:  # a row that has seen nothing: exponentiate around 0, not -inf - -inf
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        if FUSED_SCALE:
            p = tl.exp2(s * (scale * LOG2_E) - m_safe[:, None])
        else:
            p = exponential(s - m_safe[:, None], NATURAL)
        alpha = exponential(m_i - m_safe, NATURAL)
        l_i = l_i * alpha + tl.sum(p, 1)
        if rng is not None:
            p = tl.where(keep_tile(rng, slab, start_m, start_n, threshold, BLOCK_M, BLOCK_N), p, 0.0)

        v = load_tile(v_src, stride_v, start_n, offs_n, begin_k, end_k, HEAD_DIM_V, BLOCK_DV, EDGE, TMA)
        if mask is not None:  # what stands in a key that nobody sees must not spread through 0 * NaN
            seen = tl.max(visible.to(tl.int32), 0) > 0
            v = tl.where(seen[:, None], v, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_new
    return acc, l_i, m_i


# what varies from call to call without making better code: one binary for all values
UNSPECIALIZED = [
    "n_heads", "group", "total_q", "total_k", "blocks_m", "blocks_n", "window_left", "window_right", "threshold",
    "slopes_stride",
]  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_fwd(q, k, v, out, lse, lse_low, bias, sink, mask, seqlens_k, cu_seqlens_q, cu_seqlens_k, slopes, rng,
                  q_strides, k_strides, v_strides, out_strides, bias_strides, mask_strides, slopes_stride, n_heads,
                  group, total_q, total_k, blocks_m, window_left, window_right, softcap, scale, threshold, rescale,
                  HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
                  TOP_LEFT: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, FUSED_SCALE: tl.constexpr,
                  TMA: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """total_q, total_k: rows of q and k in a batch entry, all packed sequences together; rescale: dropout's factor;
    lse_low: for what rounding takes from lse, or None."""
    ALIBI: tl.constexpr = slopes is not None
    pid = tl.program_id(0)
    pid_m = pid % blocks_m
    if HAS_RIGHT:
        pid_m = blocks_m - 1 - pid_m  # causal: the longest rows first
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
    k += index * k_strides[0] + head // group * k_strides[1] + first_k * k_strides[2]
    v += index * v_strides[0] + head // group * v_strides[1] + first_k * v_strides[2]
    if bias is not None:
        bias += batch * bias_strides[0] + head * bias_strides[1]
    if mask is not None:
        mask += batch * mask_strides[0] + head * mask_strides[1]
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + batch * slopes_stride + head, mask=within, other=0.0)
    slab = (batch * n_heads + head).to(tl.int32)

    # keys that the windows leave to no query at all are not even read
    begin_k = 0
    end_k = length_k
    if HAS_LEFT:
        begin_k = off - window_left
    if HAS_RIGHT:
        end_k = tl.minimum(length_k, seqlen_q + off + window_right)
    k_src = tile_source(k, k_strides[2], end_k, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
    v_src = tile_source(v, v_strides[2], end_k, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA)
    q_tile = load_tile(q, q_strides[2], start_m, tl.arange(0, BLOCK_M), 0, seqlen_q, HEAD_DIM, BLOCK_D, True, False)

    # online softmax over the blocks that all rows see, then over the edges
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    first, first_full, end_full, end = key_blocks(
        start_m, BLOCK_M, BLOCK_N, seqlen_q, length_k, off, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    gap = end_full - first_full
    acc, l_i, m_i = _forward_blocks(
        acc, l_i, m_i, q_tile, k_src, v_src, k_strides[2], v_strides[2], first_full, end_full, 0, 0, start_m, offs_m,
        off, seqlen_q, length_k, begin_k, end_k, window_left, window_right, scale, softcap, bias, bias_strides, mask,
        mask_strides, slope, rng, slab, threshold, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
        HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, NATURAL, FUSED_SCALE, TMA, PRECISION, EDGE=False,
    )  # fmt: skip
    if HAS_LEFT:
        end -= gap
    else:
        first = end_full
    acc, l_i, m_i = _forward_blocks(
        acc, l_i, m_i, q_tile, k_src, v_src, k_strides[2], v_strides[2], first, end, first_full, gap, start_m, offs_m,
        off, seqlen_q, length_k, begin_k, end_k, window_left, window_right, scale, softcap, bias, bias_strides, mask,
        mask_strides, slope, rng, slab, threshold, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
        HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, NATURAL, FUSED_SCALE, TMA, PRECISION, EDGE=True,
    )  # fmt: skip

    if not NATURAL:
        m_i *= LN_2
    if sink is not None:
        sink_score = tl.load(sink + head, mask=within, other=float("-inf"))
        m_new = tl.maximum(m_i, sink_score)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = exponential(m_i - m_safe, True)
        l_i = l_i * alpha + exponential(sink_score - m_safe, True)
        acc *= alpha[:, None]
        m_i = m_new
    # a row that saw nothing gives output 0 and lse -inf
    empty = l_i == 0.0
    m_i = tl.where(empty, 0.0, m_i)
    l_i = tl.where(empty, 1.0, l_i)
    acc *= (rescale / l_i)[:, None]
    log_l = tl.log2(l_i) * LN_2
    row_lse = m_i + log_l
    offs_d = tl.arange(0, BLOCK_DV)
    inside = offs_m < seqlen_q
    out += index * out_strides[0] + head * out_strides[1] + first_q * out_strides[2]
    pointers = out + offs_m.to(tl.int64)[:, None] * out_strides[2] + offs_d[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=inside[:, None] & (offs_d < HEAD_DIM_V)[None, :])
    row = (index * n_heads + head) * total_q + first_q + offs_m
    tl.store(lse + row, tl.where(empty, float("-inf"), row_lse), mask=inside)
    if lse_low is not None:
        tl.store(lse_low + row, m_i - row_lse + log_l, mask=inside)


NOTHING = ((0,), (1,))  # shape and strides


def broadcast_strides(shape, strides):
    """Strides of a (1 or batch, 1 or heads, ...) tensor with 0 where it is broadcast."""
    return tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))


def precision(dtype):
    """How fp32 products are computed: as the TF32 switch of PyTorch says."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def descriptors_fit(*tensors):
    """Whether TMA can read these (batch, heads, rows, columns) tensors: addresses, strides multiples of 16 bytes."""
    for t in tensors:
        unit = 16 // t.element_size()
        batch, head, row = t.stride()[:3]
        if t.data_ptr() % 16 or batch % unit or head % unit or row % unit or row == 0:
            return False
    return True


class Plan:
    """What follows from shapes, strides and options alone: made once for each kind of call, as Python is slow.

    q, k, v, bias, mask are (shape, strides) or None; `sequences` is the number of packed sequences or None.
    """

    def __init__(self, q, k, v, bias, mask, dtype, device, fp32_precision, alibi_dims, drops, sequences, window_left,
                 window_right, top_left, softcap, dropout_p, scale):  # fmt: skip
        (batch, self.n_heads, self.total_q, head_dim), (_, self.kv_heads, self.total_k, _) = q[0], k[0]
        head_dim_v = v[0][3]
        self.group = self.n_heads // max(self.kv_heads, 1)
        self.batch, self.sequences = batch, sequences
        self.layouts = [
            (like.shape, like.stride())
            for like in (
                empty_in_layout(torch.empty_strided(*t, device="meta"), last)
                for t, last in ((q, head_dim_v), (q, head_dim), (k, head_dim), (v, head_dim_v))
            )
        ]  # of out, dq, dk, dv
        rows = torch.empty((batch, self.n_heads, self.total_q), device="meta")
        self.lse_layout = (rows.shape, rows.stride())  # empty_strided takes half the time of empty
        self.copies = any(shape[3] != 1 and strides[3] != 1 for shape, strides in (q, k, v))
        self.strides = (q[1][:3], k[1][:3], v[1][:3])
        self.feature_strides = (
            (0, 0, 0, 0) if bias is None else broadcast_strides(*bias),
            (0, 0, 0, 0) if mask is None else broadcast_strides(*mask),
            self.n_heads if alibi_dims == 2 else 0,
        )
        reach = self.total_q + self.total_k  # a side as long as this is no limit
        has_left, has_right = 0 <= window_left < reach, 0 <= window_right < reach
        self.drops, threshold, rescale = dropout_constants(drops or None, dropout_p)
        self.numbers = (window_left, window_right, softcap, scale, threshold, rescale)
        self.switches = {
            "HEAD_DIM": head_dim,
            "HEAD_DIM_V": head_dim_v,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "BLOCK_DV": max(16, triton.next_power_of_2(head_dim_v)),
            "HAS_LEFT": has_left,
            "HAS_RIGHT": has_right,
            "TOP_LEFT": top_left,
            "SOFTCAP": softcap > 0.0,
            "PRECISION": fp32_precision,
        }
        linear = bias is None and not alibi_dims and softcap == 0.0
        self.natural = dtype == torch.float32 or bias is not None or alibi_dims > 0
        extra = not linear or mask is not None or self.drops
        self.kind = (device, dtype, max(head_dim, head_dim_v), bool(extra), has_left or has_right)
        fused_scale = linear and not self.natural and scale > 0.0
        self.special = {"fwd": {"NATURAL": self.natural, "FUSED_SCALE": fused_scale}, "dkdv": {"GROUP": self.group}}
        self.launches = {}

    def launch(self, kernel):
        """(grid, blocks of the rows, constants and options, whether TMA may be used) of a kernel."""
        if kernel not in self.launches:
            config, tma = pick(kernel, *self.kind)
            block, length, heads = "BLOCK_M", self.total_q, self.n_heads
            if kernel == "dkdv":
                block, length, heads = "BLOCK_N", self.total_k, self.kv_heads
            elif self.switches["HAS_LEFT"]:  # keys before the first window must not be read: a descriptor cannot say so
                tma = False
            blocks = triton.cdiv(length, config[block])
            if self.sequences is not None and blocks:
                blocks = length // config[block] + self.sequences + 1  # what find_tile counts on
            constants = {**self.switches, **self.special.get(kernel, {}), **config}
            self.launches[kernel] = (blocks * heads * self.batch,), blocks, constants, tma
        return self.launches[kernel]


plan_for = functools.lru_cache(4096)(Plan)


def geometry(t):
    return None if t is None else (t.shape, t.stride())


def prepare(q, k, v, bias, sink, mask, seqlens_k, cu_seqlens_q, cu_seqlens_k, slopes, rng, max_seqlen_q, max_seqlen_k,
            *options):  # fmt: skip
    """(plan, the optional tensors as the kernels take them) for the arguments of the raw ops.

    The longest lengths that a caller promises do not matter: programs find their sequence.
    """
    plan = plan_for(
        geometry(q), geometry(k), geometry(v), geometry(bias), geometry(mask), q.dtype, q.device, precision(q.dtype),
        0 if slopes is None else slopes.dim(), rng is not None,
        None if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1, *options,
    )  # fmt: skip
    return plan, (
        bias, contiguous(sink), mask, contiguous(seqlens_k), contiguous(cu_seqlens_q), contiguous(cu_seqlens_k),
        contiguous(slopes), contiguous(rng) if plan.drops else None,
    )  # fmt: skip


def launch_fwd(q, k, v, *rest):
    """The raw op attention_fwd: (out, lse, lse_low)."""
    *inputs, need_low = rest
    plan, features = prepare(q, k, v, *inputs)
    if plan.copies:
        return launch_fwd(unit_stride(q), unit_stride(k), unit_stride(v), *rest)
    shape, out_strides = plan.layouts[0]
    out = q.new_empty_strided(shape, out_strides)
    lse = torch.empty_strided(*plan.lse_layout, dtype=torch.float32, device=q.device)
    low = torch.empty_strided(*(plan.lse_layout if need_low else NOTHING), dtype=torch.float32, device=q.device)
    grid, blocks, constants, tma = plan.launch("fwd")
    if grid[0]:
        tma = tma and descriptors_fit(k, v)
        launch(
            attention_fwd, grid, q.device, q, k, v, out, lse, low if need_low else None, *features, *plan.strides,
            out_strides[:3], *plan.feature_strides, plan.n_heads, plan.group, plan.total_q, plan.total_k, blocks,
            *plan.numbers, TMA=tma, **constants,
        )  # fmt: skip
    return out, lse, low


register("attention_fwd", launch_fwd)
